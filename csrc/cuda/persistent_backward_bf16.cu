#include "cuda/launch_persistent_backward.cuh"

namespace fastlstm::cuda {
FASTLSTM_PERSISTENT_BWD(__nv_bfloat16)
}
