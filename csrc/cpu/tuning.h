// Every tunable threshold of the CPU code, by decision. Names: k<Decision><Max|Min|Below><Unit>; Max and Min
// are inclusive, Below is exclusive. Sizes that follow from the instruction set (vector width, register
// tiles, depth of a pass) stay beside their kernel.
//
// Above each: what switches, and the measurement where one is recorded. "Fitted" means that the value was
// found by timing layers during development on machines of at most two threads (Intel Sapphire and Emerald
// Rapids, AMD Zen 4, AVX2 EPYC) and that no figure of the crossover itself is recorded; docs/cpu-kernels.md,
// has what is. On more than two threads nothing has been measured.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm {

// ---- The cost model (cost.cpp), which predicts the time of a loop on every partition of the threads.

// Its figures. `python -m benchmarks calibrate` measures those of a machine and prints which plans would
// change. They are recorded in docs/cpu-kernels.md, or fitted to the times of 3,000 random layers on every
// partition of two threads (Intel Xeon, AVX-512, L2 of 2 MiB, 2026-11-29; docs/cpu-kernels.md).
// Nothing has been measured beyond two threads; the figures marked so are guesses on the side of fewer
// threads. Rows in a name: the time of that many rows' multiply-adds.
struct CostFigures {
  // What a core multiplies and adds, in vectors per us. Recorded: 12 rows, AVX-512, float32, at 162 to 170
  // GFLOP/s a core (docs/cpu-kernels.md).
  double vector_fmas_per_us = 5000;
  // The pointwise stage, as multiply-adds per gate and row, of gate_cost_min_rows rows at least: fewer are
  // bound by the latency of its divisions. Fitted, 2026-11-29.
  double gate_cost_macs = 24, gate_cost_min_rows = 3;
  // Reading the weights from the L2; fewer rows than this are bound by it. Fitted, 2026-11-29. Recorded: T =
  // 200, B = 8, H = 64 with 4 rows a thread takes 0.56 ms in forward and 1.8 in training, with half of the
  // units 0.98 and 3.4 (docs/cpu-kernels.md). 2026-11-28.
  double l2_read_rows = 4.5;
  // Reading weights that an L2 does not hold: 4 bytes per multiply-add at 32 GB/s a core (gemm.h,
  // kPanelLines). Prefetching hides a part of it that grows with the rows, and all of it from
  // l3_hidden_min_rows on. Fitted: with 24 rows per thread split rows take no more time than split units.
  // Recorded: T = 50, B = 16, I = 80, H = 800, P = 512, forward takes 29 ms with rows split and 18 with units
  // split (docs/cpu-kernels.md). 2026-11-28.
  double l3_read_rows = 10.5, l3_hidden_min_rows = 24;
  // Up to this many threads read from the L3, or pack weights, at full speed; more share the bandwidth. Not
  // measured.
  double l3_full_speed_max_threads = 8;
  // Reading from it takes this many times as long while two directions run at once, whose weights share it.
  // Measured, 2026-11-29: 1.15 to 1.4 for 5 to 50 MB a direction; no CSV.
  double l3_two_directions = 1.2;
  // Starting and joining two threads, and each further one (not measured). 1.5 us in a loop that does nothing
  // else, 2 to 3 fitted where one pass is repeated, more in a training step: T = 2, B = 14, I = 19, H = 47,
  // float64 takes 123 us on one thread and 137 on two. 2026-11-29.
  double fork_join_us = 4.5, fork_join_thread_us = 0.5;
  // A barrier of two threads, the passing of cache lines included, and each further thread, which count down
  // on one cache line (not measured). Measured, 2026-11-29: 0.18 us in a loop that does nothing else, 0.6
  // fitted, since threads do not arrive at once.
  double barrier_us = 0.55, barrier_thread_us = 0.1;
  // What another core has just written comes at 10 to 14 GB/s (docs/cpu-kernels.md, "Threads"): states of
  // units, and the gradients of the gates, which the products after the loop read on one thread where they
  // are small. T = 20, B = 8, I = H = 32: backward takes 14 us longer on two threads; 2026-11-30, no CSV.
  double core_to_core_bytes_per_us = 10000;
  // Packing weights on one thread. Recorded: H = 100, 160 KB, takes 4.7 us (docs/cpu-kernels.md).
  // Fitted, 2026-11-29: 20,000 to 35,000.
  double pack_bytes_per_us = 25000;
  // Threads that split rows write parts of the same cache lines in each step, the ends of their rows of y, c
  // and the gates; more of them where a thread's rows of h take less than kRowBoundaryBytes. Fitted,
  // 2026-11-29: T = 138, B = 14, H = 1 takes 138 us on one thread and 175 on two. Rows of whole cache lines
  // share none, but what follows reads them from another core. Measured, 2026-11-30, no CSV, one thread and
  // two: T = 20, B = 8, I = 10, H = 32 takes 36 and 31 us in forward; T = 50, B = 6, I = H = 16 33 and 32,
  // and 110 and 123 us in a training step.
  double row_boundary_us = 0.17, whole_line_row_boundary_us = 0.05;

  // The figures of the bfloat16 kernels (cpu/bf16.h). Their products are faster, so a second thread is faster
  // only for larger layers; the rate was fitted to that crossover, about 1e7 multiply-adds. Rows are computed
  // in whole tiles, which hide the reading from the L2. Fitted, 2026-11-26.
  double bf16_macs_per_us = 833e3;
  double bf16_gate_cost_macs = 256;
  double bf16_l2_read_rows = 16;
  // 2 bytes per multiply-add at 32 GB/s; the second in the proportion of l3_hidden_min_rows. Not measured.
  double bf16_l3_read_rows = 52, bf16_l3_hidden_min_rows = 120;

  // The figures of the int8 kernels (cpu/int8.h); the rate is that of a lane of 32 bits. Fitted to one thread
  // of an Intel Xeon with AVX512_VNNI at 2.3 GHz: T = 100, B = 16, I = H = 512 takes 14.6 ms; B = 32, I = H =
  // 128 2.5 ms; T = 50, B = 1, I = H = 512 0.68 ms; I = 80, H = 1024 5.2 ms. 2026-11-30, no CSV. Products in
  // AMX tiles have the same figures: their speed is not measured.
  double int8_vector_macs_per_us = 16500;
  double int8_gate_cost_macs = 150;
  double int8_l2_read_rows = 1.6;
  double int8_l3_read_rows = 5.5, int8_l3_hidden_min_rows = 12;
};
inline constexpr CostFigures kCostFigures;

// Two cache lines (CostFigures::row_boundary_us).
inline constexpr double kRowBoundaryBytes = 128;
// Rows that the bfloat16 kernels compute at once.
inline constexpr double kBf16TileCostRows = 16;
// The bfloat16 kernels' weights of more than this part of an L2, which x and the states share, are evicted
// from it between steps. Fitted. Recorded: T = 232, B = 4, I = 402, H = 228 bidirectional, 1.1 MiB a
// direction, forward takes 1.18 times as long in turn, by units, as with a thread per direction (AVX512_BF16,
// L2 of 2 MiB). 2026-11-29, no CSV.
inline constexpr double kBf16L2ResidentMaxFraction = 0.75;
// Min fraction of the predicted time that more threads, or a barrier per step, must save over the best so
// far: threads cost CPU time, a barrier waits for whichever thread was interrupted, and a prediction is no
// more exact. Recorded: T = 35, B = 75, I = 2, H = 186, rows of random lengths, forward is predicted to take
// 1529 us by units and 1533 by rows; it takes 1.15 times as long by units. 2026-11-29, no CSV.
inline constexpr double kPartitionMinGain = 0.02;

// ---- Other decisions about threads.

// Weights of more than this part of an L2 are evicted from it between steps: the cost model reads them from
// the L3, blocks are read in alternating order, and bfloat16 panels stay bfloat16. Recorded for the
// alternating order: forward on two threads, B = 1, H = 512 takes 45 us a step in one order and 35 in both; H
// = 1024 283 and 248 (docs/cpu-kernels.md). Fitted, 2026-11-28.
inline constexpr double kL2ResidentMaxFraction = 0.75;
// A single step packs its weights in every thread that splits rows: rows are split where each thread has at
// least this many and the weights have at most this size, units otherwise. Fitted, 2026-11-28.
inline constexpr double kSingleStepRowSplitMinRows = 24;
inline constexpr double kSingleStepRowSplitMaxBytes = 1 << 20;
// Up to this part of an L2, each thread that splits rows packs a copy of the weights for itself: packing them
// takes less time than reading what another core has just packed, and no start of threads of its own.
// Measured against 64 KiB, 44 layers of 2 threads: up to this part 1.0 to 1.7 times as fast in forward, above
// it 0.75 to 1.14. Two cores of an Intel Xeon, L2 of 2 MiB, no CSV, 2026-11-29.
inline constexpr double kPrivatePackMaxL2Fraction = 0.25;
// What reading the weights costs a thread in each step, as rows, where ragged rows are divided. Recorded:
// lengths from T/2 to T take 7 to 14 % less time in forward, 3 to 11 % in training (docs/cpu-kernels.md).
// Fitted, 2026-11-28.
inline constexpr int64_t kWeightReadCostRows = 2;
// Polls of a barrier before a waiting thread yields; a step lasts microseconds. Fitted.
inline constexpr int kBarrierYieldMinPolls = 4000;

// ---- How forward reads the weights.

// Up to this many rows of all steps both weights, and up to this many rows a step a large W_hh, are read
// unpacked, as dot products. Packing costs what 3 to 5 rows save by it: H = 100 takes 4.7 us to pack, a step
// 1.0 us less (docs/cpu-kernels.md). Fitted, 2026-11-28.
inline constexpr int64_t kUnpackedMaxRows = 4;
// A W_hh of at most this size is always packed: it stays in an L2, packed or not, and a few rows repay the
// packing. Fitted, 2026-11-28.
inline constexpr int64_t kHhPackAlwaysMaxBytes = 1 << 19;
// A larger one is read unpacked for up to this many rows of all steps: packing streams it through L3 twice,
// which costs what 20 to 60 steps save. Recorded: T = 7, B = 1, H = 400 takes 218 us unpacked and 350
// packed (docs/cpu-kernels.md). Fitted, 2026-11-28.
inline constexpr int64_t kHhUnpackedMaxRows = 48;
// Beyond this size, W_hh is read unpacked for any number of steps: each is bound by the L3 either way, at 27
// GB/s per core (docs/cpu-kernels.md). Fitted, 2026-11-28.
inline constexpr int64_t kHhPackMaxBytes = 1 << 22;
// Rows of a step whose pre-activations are in scratch while the weights of one block of units are read. With
// projection, up to this many rows of a single step pack weights on use. Fitted, 2026-11-22.
inline constexpr int64_t kRowBlockRows = 96;
// float32 layers of fewer units, features of h or rows of all steps are multiplied in float32 even if
// bfloat16 products are requested: rounding factors takes longer than the products save. Estimated, not
// measured: times of both on one Intel core (AVX512_BF16 at half of FMA's rate), their products' share scaled
// to the rates of Zen 4. Predicted speedup of a training step, T = 50, B = 32, I = H: 0.76 at 16 units, 1.5
// at 32; H = 64, T x B: 0.92 at 10 rows, 0.97 to 1.1 at 16, 1.3 at 32 (docs/cpu-kernels.md); with projection
// to 8 and 16 features 0.89 and 1.06 at 32 units, 1.16 and 1.24 at 64. 2026-11-30, no CSV. MinUnits and
// MinFeatures also decide for float32 layers frozen in bfloat16, requested or not.
inline constexpr int64_t kFloat32ToBf16MinUnits = 32;
inline constexpr int64_t kFloat32ToBf16MinFeatures = 16;
inline constexpr int64_t kFloat32ToBf16MinRows = 32;
// Rows of a step whose x the bfloat16 kernels copy into scratch at once. Fitted, 2026-11-27.
inline constexpr int64_t kBf16RowBlockRows = 128;
// Up to this many rows of all steps, x W_ih^T is computed for all of them at once, from a W_ih packed on
// use. Fitted, 2026-11-28.
inline constexpr int64_t kHoistAllMaxRows = 192;
// Below this many rows a step, x W_ih^T is hoisted: computed for kHoistTileRows rows of several steps at
// once, because reading W_ih in each step would cost more than the product. Recorded: T = 3, B = 1, I = 600,
// H = 400 takes 0.49 ms with W_ih read in every step and 0.26 hoisted (docs/cpu-kernels.md). Fitted,
// 2026-11-22.
inline constexpr int64_t kHoistBelowRows = 48;
inline constexpr int64_t kHoistTileRows = 96;
// The int8 kernels compute x W_ih^T for this many rows of several steps at once, where a step has fewer.
// Measured, 2026-11-30, one thread, no CSV: T = 50, B = 1, I = H = 512 takes 0.74 ms at 8 rows, 0.68 at 48,
// 0.65 at 96; T = 200, B = 1, I = H = 64 0.085, 0.086 and 0.089.
inline constexpr int64_t kInt8HoistRows = 48;
// The AMX kernels of int8 multiply fewer rows than this by AVX512_VNNI. Estimated, not measured: four tile
// products take 64 cycles for any number of rows up to 16, the same products by AVX512_VNNI 32 cycles per
// row, and sums of tiles pass through memory.
inline constexpr int64_t kInt8AmxMinRows = 5;
// Up to this length of its rows, packing a weight prefetches the next rows: too short for the hardware's
// prefetching. Fitted.
inline constexpr int64_t kPackPrefetchMaxBytes = 512;

// ---- How backward reads W_hh.

// Up to this many rows of all steps, backward reads W_hh unpacked, if some step has more than
// kBackwardNarrowMaxRows rows. Fitted, 2026-11-28.
inline constexpr int64_t kBackwardUnpackedMaxRows = 12;
// Steps of at most this many rows have thresholds of their own:
inline constexpr int64_t kBackwardNarrowMaxRows = 2;
// if a thread's share of a float W_hh fits its L2, unpacked is nearly as fast as packed; fitted;
inline constexpr int64_t kBackwardNarrowUnpackedMaxRows = 64;
// otherwise, and for bfloat16, which is widened at each reading, packing was faster from 9 rows on. Recorded:
// T = 64, B = 1, H = 512, a backward pass takes 8.7 ms unpacked and 3.3 packed, at H = 1024 42 and 26
// (docs/cpu-kernels.md). Fitted, 2026-11-28.
inline constexpr int64_t kBackwardStreamedUnpackedMaxRows = 8;

// ---- Chunks of steps, and the products after each.

// A chunk of backward has at least this many rows, for efficient products, and more while the gradients of
// the gates stay within this size, in cache between the time loop and the products. Fitted, 2026-11-22.
inline constexpr int64_t kChunkMinRows = 1024;
inline constexpr int64_t kChunkMinBytes = int64_t{4} << 20;
// A chunk of the bfloat16 kernels' backward: this part of the steps, and at least this many rows. Fitted,
// 2026-11-26.
inline constexpr int64_t kBf16ChunksMax = 4;
inline constexpr int64_t kBf16ChunkMinRows = 1024;

// dW of at most max_columns columns is computed as its transpose, if it sums over min_rows rows or more.
// Recorded: MKL is 1.1 to 2.3 times as fast at it for 10 to 100 columns, 1.06 to 1.2 times from 112 to 224,
// and no faster from 256 on; H = 64: 10 % less time (docs/cpu-kernels.md).
// 2026-11-27, two Intel cores.
struct TransposedWgrad {
  int64_t max_columns, min_rows;
};
inline constexpr TransposedWgrad kTransposedWgrad[] = {{64, 0}, {112, 1024}, {224, 2048}};
// float32 dW over more rows is summed in float64, this many rows at a time. A BLAS sums a deep product in few
// parts, and its error grows with the depth. Recorded: 256,000 rows at H = 1 err by 2.5 ulp instead of 56
// (docs/cpu-kernels.md). 2026-11-27.
inline constexpr int64_t kFloat32WgradMaxRows = 16384;
inline constexpr int64_t kFloat64WgradBlockRows = 4096;
// Elements of dW that are computed at a time in bfloat16, and rounded while they are in cache. Fitted,
// 2026-11-29.
inline constexpr int64_t kBf16WgradBlockElements = 1 << 16;

// Up to this many multiply-adds, and this depth, whose scratch would otherwise be megabytes, the microkernels
// of gemm.h compute a product: a BLAS call costs 3 to 5 us, with two threads 20 (docs/cpu-kernels.md).
// Fitted, 2026-11-26.
inline constexpr int64_t kSmallGemmMaxMacs = 1 << 20;
inline constexpr int64_t kSmallGemmMaxDepth = 1 << 13;
// Up to this many rows the microkernels compute any product: some of MKL's kernels (on an AMD CPU those of 1
// to 3 rows more than a multiple of 4) are slower, and err 5 times as much. 2026-11-27.
inline constexpr int64_t kSkinnyGemmMaxRows = 12;
// Up to this many rows they compute a product whose B is bfloat16, widened as it is read; a BLAS needs a
// float32 copy. Fitted, 2026-11-29.
inline constexpr int64_t kWidenedGemmMaxRows = 96;
// Columns of a skinny product per task of a thread.
inline constexpr int64_t kSkinnyGemmTaskColumns = 64;

// If the BLAS is slow at float32 results C [m, n] whose rows do not begin at multiples of this many bytes
// (Machine::blas_is_slow_at_unaligned_rows), it computes products of these sizes, over depth k, into a
// temporary with aligned rows. Recorded: docs/cpu-kernels.md. Fitted, 2026-11-30, on two
// cores of an AMD EPYC (Zen 3), no CSV.
inline constexpr int64_t kBlasRowAlignBytes = 32;
struct AlignedGemm {
  int64_t min_m, min_n, min_k;
};
inline constexpr AlignedGemm kAlignedGemm[] = {{256, 256, 256}, {256, 600, 32}};

// ---- LSTMCell (one_step.cpp).

// Up to this many multiply-adds of a weight's gradient, microkernels that read both factors in place are as
// fast as a BLAS; above, a BLAS, which packs, was faster. Fitted, 2026-11-26.
inline constexpr int64_t kCellWgradMaxMacs = int64_t{1} << 22;
// Up to this size of the packed W_hh, each thread packs its own, which is as fast as fetching it from
// another's cache. Fitted, 2026-11-28.
inline constexpr int64_t kCellPrivatePackMaxBytes = 1 << 18;

// ---- Grain of parallel loops (elements of the task that one thread takes at least), and memory.

inline constexpr int64_t kPackTaskMinElements = 1 << 16;
inline constexpr int64_t kBiasGradTaskMinElements = 4096, kBiasGradTaskColumns = 64;
inline constexpr int64_t kRowCopyTaskMinRows = 4096;
inline constexpr int64_t kGroupedWgradTaskMinMacs = 1 << 16;
inline constexpr int64_t kRandomFlagsTaskMinPairs = 1 << 13;
// Up to this many elements, bfloat16 is widened and rounded on the calling thread, without the dispatcher.
inline constexpr int64_t kInlineConvertMaxElements = 1 << 15;
// Blocks from this size on are kept for the next call, smaller ones malloc itself keeps; at most this many
// bytes idle (docs/cpu-kernels.md).
inline constexpr size_t kCachedBlockMinBytes = size_t{1} << 18;
// A workspace of up to this size is in a block that the thread keeps, and that grows to this size: a small
// call allocates its results alone. Larger ones are kept as other blocks are.
// Measured, 2026-11-30, no CSV: a step of H = 64 calls malloc 12 times, for its results, in place of 16.
inline constexpr int64_t kThreadWorkspaceMaxBytes = int64_t{1} << 18;
inline constexpr size_t kCachedIdleMaxBytes = size_t{1} << 29;
// From this size on a workspace is in pages of 2 MiB. Recorded: a loop of microkernels of 12 rows, 178
// GFLOP/s on two cores and 282 (docs/cpu-kernels.md). 2026-11-28.
inline constexpr int64_t kHugePagesMinBytes = int64_t{1} << 22;

}  // namespace fastlstm
