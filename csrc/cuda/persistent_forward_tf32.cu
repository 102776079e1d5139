#include "cuda/launch_persistent_forward.cuh"

namespace fastlstm::cuda {
FASTLSTM_PERSISTENT_FWD(float)
}
