// Every tunable threshold of the CPU code, by decision. Names: k<Decision><Max|Min|Below><Unit>; Max and Min
// are inclusive, Below is exclusive. Sizes that follow from the instruction set (vector width, register
// tiles, depth of a pass) stay beside their kernel.
//
// Above each: what switches, and the measurement where one is recorded. "Fitted" means that the value was
// found by timing layers during development on machines of at most two threads (Intel Sapphire and Emerald
// Rapids, AMD Zen 4, AVX2 EPYC) and that no figure of the crossover itself is recorded; docs/design.md, "The
// CPU kernels", has what is. On more than two threads nothing has been measured.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastlstm {

// ---- Threads of the float kernels (partition in plan.cpp). MACs are estimates.

// From this many multiply-adds of all steps on, a layer runs on more than one thread. A fork and join cost
// about what 5e5 of them take. Fitted, 2026-11.
inline constexpr double kThreadsMinMacs = 1e6;
// From this many multiply-adds of a step on, units are split: a barrier costs about what 1e4 of them take,
// and h passes from core to core. Fitted, 2026-11.
inline constexpr double kUnitSplitMinMacs = 6e4;
// A step counts as at least this many rows: fewer wait for their weights, from the L2 or, in a layer of one
// step, from where the last call left them. Recorded: T = B = 1, H = 256 takes 64 us on one thread and 20 on
// two (docs/design.md, "Threads"). Fitted, 2026-11.
inline constexpr double kStepCostMinRows = 2, kSingleStepCostMinRows = 4;
// What the pointwise stage costs, as multiply-adds per gate and row. Fitted, 2026-11.
inline constexpr int64_t kGateCostMacs = 16;

// Weights of more than this part of an L2 do not stay in it from step to step: threads that split rows then
// need kStreamedRowSplitMinRows each, blocks are read in alternating order, and bfloat16 panels stay
// bfloat16. Recorded for the alternating order: forward on two threads, B = 1, H = 512 takes 45 us a step in
// one order and 35 in both; H = 1024 283 and 248 (docs/design.md, "Weights larger than the L2"). Fitted,
// 2026-11-28.
inline constexpr double kL2ResidentMaxFraction = 0.75;

// Rows are split, and not units, where each thread has at least this many. Splitting rows reads all weights
// in every thread. Recorded: T = 200, B = 8, H = 64 with 4 rows a thread takes 0.56 ms in forward and 1.8 in
// training, with half of the units 0.98 and 3.4 (docs/design.md, "Threads"). Fitted, 2026-11-28.
inline constexpr double kRowSplitMinRows = 3.5;
// The same for weights of at most kPrivatePackMaxBytes. Fitted, 2026-11-28.
inline constexpr double kSmallWeightRowSplitMinRows = 2;
// The same with projection, where a split of units meets at two barriers a step. Fitted, 2026-11-28.
inline constexpr double kProjectionRowSplitMinRows = 1;
// The same for weights that no L2 holds, and for a single step, for which each thread packs them itself.
// Recorded with projection: T = 50, B = 16, I = 80, H = 800, P = 512, forward takes 29 ms with rows split and
// 18 with units split, a training step 81 and 60 (docs/design.md, "Threads"). Fitted, 2026-11-28.
inline constexpr double kStreamedRowSplitMinRows = 24;
// Up to this size of the weights, a single step may split rows. Fitted, 2026-11.
inline constexpr double kSingleStepRowSplitMaxBytes = 1 << 20;
// Up to this size of the weights, each thread that splits rows packs a copy of its own: what another core has
// just written comes at 10 to 14 GB/s (docs/design.md, "Threads"). Fitted, 2026-11-28.
inline constexpr double kPrivatePackMaxBytes = 1 << 16;
// Up to this size of the weights, a thread reads them from its L2 in little time beside its rows: rows per
// thread are then the mean active rows, above N / T where rows end one by one. Recorded: B = 16, random
// lengths, H = 64 takes 20 % less time in forward and 10 % in training (docs/design.md, "Threads"). Fitted,
// 2026-11-28.
inline constexpr double kCheapReadMaxBytes = 3 << 17;
// What reading the weights costs a thread in each step, as rows, where ragged rows are divided. Recorded:
// lengths from T/2 to T take 7 to 14 % less time in forward, 3 to 11 % in training (docs/design.md,
// "Threads"). Fitted, 2026-11-28.
inline constexpr int64_t kWeightReadCostRows = 2;
// Polls of a barrier before a waiting thread yields; a step lasts microseconds. Fitted.
inline constexpr int kBarrierYieldMinPolls = 4000;

// ---- Threads of the bfloat16 kernels (cpu/bf16.h), whose products are faster, so that threads pay later.

// As kThreadsMinMacs, kUnitSplitMinMacs and kGateCostMacs. Fitted, 2026-11-26.
inline constexpr double kBf16ThreadsMinMacs = 1e7;
inline constexpr double kBf16UnitSplitMinMacs = 4e5;
inline constexpr int64_t kBf16GateCostMacs = 256;
// Rows are split where each thread has at least this many, a tile, and the weights have at most this size.
// Fitted, 2026-11-26.
inline constexpr double kBf16RowSplitMinRows = 16;
inline constexpr double kBf16RowSplitMaxBytes = 1 << 20;

// ---- How forward reads the weights.

// Up to this many rows of all steps both weights, and up to this many rows a step a large W_hh, are read
// unpacked, as dot products. Packing takes what 3 to 5 rows save by it: H = 100 takes 4.7 us to pack, a step
// 1.0 us less (docs/design.md, "Few rows"). Fitted, 2026-11-28.
inline constexpr int64_t kUnpackedMaxRows = 4;
// A W_hh of at most this size is always packed: it stays in an L2, packed or not, and a few rows repay the
// packing. Fitted, 2026-11-28.
inline constexpr int64_t kHhPackAlwaysMaxBytes = 1 << 19;
// A larger one is read unpacked for up to this many rows of all steps: it comes through the L3 to be packed
// and goes back, what 20 to 60 steps save. Recorded: T = 7, B = 1, H = 400 takes 218 us unpacked and 350
// packed (docs/design.md, "Few rows"). Fitted, 2026-11-28.
inline constexpr int64_t kHhUnpackedMaxRows = 48;
// Beyond this size, W_hh is read unpacked for any number of steps: each waits for the L3 either way, at 27
// GB/s a core (docs/design.md, "Few rows"). Fitted, 2026-11-28.
inline constexpr int64_t kHhPackMaxBytes = 1 << 22;
// Rows of a step whose pre-activations wait in scratch while the weights of one block of units pass. With
// projection, up to this many rows of a single step pack weights on use. Fitted, 2026-11-22.
inline constexpr int64_t kRowBlockRows = 96;
// Rows of a step whose x the bfloat16 kernels copy into scratch at once. Fitted, 2026-11-27.
inline constexpr int64_t kBf16RowBlockRows = 128;
// Up to this many rows of all steps, x W_ih^T is made for all of them at once, from a W_ih that is packed on
// use. Fitted, 2026-11-28.
inline constexpr int64_t kHoistAllMaxRows = 192;
// Below this many rows a step, x W_ih^T is hoisted: made for kHoistTileRows rows of several steps at once,
// because reading W_ih in each step would cost more than the product. Recorded: T = 3, B = 1, I = 600, H =
// 400 takes 0.49 ms with W_ih read in every step and 0.26 hoisted (docs/design.md, "Forward"). Fitted,
// 2026-11-22.
inline constexpr int64_t kHoistBelowRows = 48;
inline constexpr int64_t kHoistTileRows = 96;
// Up to this length of its rows, packing a weight prefetches the next rows: too short for the hardware's
// prefetching. Fitted.
inline constexpr int64_t kPackPrefetchMaxBytes = 512;

// ---- How backward reads W_hh.

// Up to this many rows of all steps, backward reads W_hh unpacked, if some step has more than
// kBackwardNarrowMaxRows rows. Fitted, 2026-11-28.
inline constexpr int64_t kBackwardUnpackedMaxRows = 12;
// Steps of at most this many rows have thresholds of their own:
inline constexpr int64_t kBackwardNarrowMaxRows = 2;
// where an L2 holds what a thread reads of a float W_hh, unpacked is nearly as fast as packed; fitted;
inline constexpr int64_t kBackwardNarrowUnpackedMaxRows = 64;
// otherwise, and for bfloat16, which is widened at each reading, packing pays from 9 rows on. Recorded: T =
// 64, B = 1, H = 512, a backward pass takes 8.7 ms unpacked and 3.3 packed, at H = 1024 42 and 26
// (docs/design.md, "Few rows"). Fitted, 2026-11-28.
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

// dW of at most this many columns is made as its transpose, if the second figure of rows is reached.
// Recorded: MKL is 1.1 to 2.3 times as fast at it for 10 to 100 columns, 1.06 to 1.2 times from 112 to 224,
// and no faster from 256 on; H = 64: 10 % less time (docs/design.md, "Products after the backward loop").
// 2026-11-27, two Intel cores.
struct TransposedWgrad {
  int64_t max_columns, min_rows;
};
inline constexpr TransposedWgrad kTransposedWgrad[] = {{64, 0}, {112, 1024}, {224, 2048}};
// float32 dW over more rows is summed in float64, this many rows at a time. A BLAS sums a deep product in few
// parts, and its error grows with the depth. Recorded: 256,000 rows at H = 1 err by 2.5 ulp instead of 56
// (docs/design.md, "Products after the backward loop"). 2026-11-27.
inline constexpr int64_t kFloat32WgradMaxRows = 16384;
inline constexpr int64_t kFloat64WgradBlockRows = 4096;
// Elements of dW that are made at a time in bfloat16, and rounded while a cache holds them. Fitted,
// 2026-11-29.
inline constexpr int64_t kBf16WgradBlockElements = 1 << 16;

// Up to this many multiply-adds, and this depth, whose scratch would otherwise be megabytes, the microkernels
// of gemm.h make a product: a BLAS call costs 3 to 5 us, with two threads 20 (docs/design.md, "Small
// products"). Fitted, 2026-11-26.
inline constexpr int64_t kSmallGemmMaxMacs = 1 << 20;
inline constexpr int64_t kSmallGemmMaxDepth = 1 << 13;
// Up to this many rows they make any product: some of MKL's kernels (on an AMD CPU those of 1 to 3 rows more
// than a multiple of 4) are slower, and err 5 times as much. 2026-11-27.
inline constexpr int64_t kSkinnyGemmMaxRows = 12;
// The same where B is bfloat16, widened as it is read; a BLAS needs a float32 copy. Fitted, 2026-11-29.
inline constexpr int64_t kWidenedGemmMaxRows = 96;
// Columns of such a product that a thread takes at a time.
inline constexpr int64_t kSkinnyGemmTaskColumns = 64;

// ---- LSTMCell (one_step.cpp).

// Up to this many multiply-adds of a weight's gradient, microkernels that read both factors in place keep up
// with a BLAS; above, its packing pays. Fitted, 2026-11-26.
inline constexpr int64_t kCellWgradMaxMacs = int64_t{1} << 22;
// Up to this size of the packed W_hh, each thread packs its own, which is as fast as fetching it from
// another's cache. Fitted, 2026-11-28.
inline constexpr int64_t kCellPrivatePackMaxBytes = 1 << 18;

// ---- Grain of parallel loops (elements of the task that one thread takes at least), and memory.

inline constexpr int64_t kPackTaskMinElements = 1 << 16;
inline constexpr int64_t kBiasGradTaskMinElements = 4096, kBiasGradTaskColumns = 64;
inline constexpr int64_t kRowCopyTaskMinRows = 4096;
inline constexpr int64_t kGroupedWgradTaskMinMacs = 1 << 16;
// Up to this many elements, bfloat16 is widened and rounded on the calling thread, without the dispatcher.
inline constexpr int64_t kInlineConvertMaxElements = 1 << 15;
// Blocks from this size on are kept for the next call, smaller ones malloc itself keeps; at most this many
// bytes idle (docs/design.md, "Memory").
inline constexpr size_t kCachedBlockMinBytes = size_t{1} << 18;
inline constexpr size_t kCachedIdleMaxBytes = size_t{1} << 29;
// From this size on a workspace is in pages of 2 MiB. Recorded: a loop of microkernels of 12 rows, 178
// GFLOP/s on two cores and 282 (docs/design.md, "Weights larger than the L2"). 2026-11-28.
inline constexpr int64_t kHugePagesMinBytes = int64_t{1} << 22;

}  // namespace fastlstm
