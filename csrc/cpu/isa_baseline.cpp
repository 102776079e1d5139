// The kernels for what every CPU of the target architecture has: SSE2 on x86-64, NEON on aarch64.
#define FASTLSTM_ISA baseline
#define FASTLSTM_VECTOR_BYTES 16
#include "cpu/kernel_table.h"
