// Every tunable threshold of the CUDA code, by decision. Names: k<Decision><Max|Min|Below><Unit>; Max and Min
// are inclusive, Below is exclusive. What follows from the hardware or from the registers (tile shapes, K
// iterations in registers, warps per CTA, poll limits) stays beside its kernel.
//
// Above each: what switches, the measured crossover, GPU and date. "Not measured" means that the value was
// chosen by calculation or by habit.
#pragma once

#include <cstdint>

namespace fastlstm::cuda {

// ---- Chunks of time steps

// Buffers that hold some steps at a time have about this size: x W_ih^T of a chunk is two waves of GEMM tiles
// on the largest GPUs, and stays in L2 until the cell kernels have read it. Not measured.
#ifndef FASTLSTM_CUDA_CHUNK_BYTES  // the tests set a small one, so that small cases run in chunks
#define FASTLSTM_CUDA_CHUNK_BYTES (32 << 20)
#endif
constexpr int64_t kStepChunkBytes = FASTLSTM_CUDA_CHUNK_BYTES;
// The same for the persistent kernels, which load W_hh once per chunk. Not measured.
constexpr int64_t kPersistentStepChunkBytes = 4 * kStepChunkBytes;
// Backward: dgates [T, B, 4H] is as large as the saved gates, so it is computed in up to this many chunks, of
// at least this size; the GEMMs after the loop then accumulate over the chunks. Not measured.
constexpr int64_t kDgatesMaxChunks = 4, kDgatesChunkMinBytes = 2 * kStepChunkBytes;

// ---- Persistent kernels

// From this many steps on they may run: a launch first loads all of W_hh. Not measured; the stage `points` of
// scripts/gpu_numbers.sh has T = 4 to 32.
constexpr int64_t kPersistentMinSteps = 4;
// How many steps before its use a CTA prefetches its input into L2. H100, H = 512, B = 16, bfloat16: this
// distance, and loading the next step's input only after the state is sent, took forward from 3.4 to 2.2 us
// per step and training from 7.1 to 5.1 (docs/gpu-kernels.md, "A step"). Other distances: not measured.
constexpr int kPrefetchSteps = 3;

// ---- Step-wise kernels

// Rows of dgates per partial sum of a bias gradient: one at::sum over all rows takes 128 MiB of scratch
// memory. The number was not measured.
constexpr int64_t kSumRunRows = 128;
// Layers of the grid that gathers rows of ragged batches; further steps run in a loop. Not measured.
constexpr int64_t kRaggedGridMaxSteps = 1024;

// ---- The cost model (plan.h), which selects the kernels. us, and bytes or multiply-adds per clock.

// Fitted to times per step of each variant on an H100 80GB HBM3 (docs/gpu-kernels.md, "Time per step"),
// before the critical path was shortened (99557cf); not fitted again. On other GPUs only the order of what is
// compared has a meaning.
struct GpuCostFigures {
  double clock_mhz = 1755;
  double l2_bytes_per_clock = 64;  // into one SM
  double all_l2_bytes_per_clock = 4.0e6 / 1755;
  double shared_bytes_per_clock = 128;                 // of one SM
  double dsmem_bytes_per_clock = 2.65e6 / 1755 / 132;  // into one SM, from its peers
  double macs_per_clock = 0.63 * 2048;                 // of one SM, in 16 bits
  double dsmem_latency_us = 0.4;
  double grid_turn_us = 2.0;  // of a batch tile, where a group has several
  double flag_us = 0.8, flag_cta_us = 0.033;
  // The cell with the barriers around it, with 8 rows of the batch per CTA; a reduce-scatter takes longer.
  double cell_us = 1.0, reduce_scatter_cell_us = 1.4;

  // Step-wise kernels: the host's two launches (measured: H100, docs/gpu-kernels.md), loading W_hh into the
  // SMs (fitted), and B rows (calculated: GEMM at 600 TFLOP/s in 16 bits, memory at 3 TB/s).
  double step_forward_us = 12, step_backward_us = 17;
  double step_weight_us_per_byte = 0.6e-6;
  double step_macs_per_us = 3.0e8, step_bytes_per_us = 3.0e6;
};
inline constexpr GpuCostFigures kGpuCostFigures;

}  // namespace fastlstm::cuda
