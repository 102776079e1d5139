// What the CPU code decides about a call: which kernels run, on how many threads and how these divide the
// work, which weights are packed and when, chunks of steps, how each product is made. Pure functions of sizes
// and machine, without torch, so that the drivers run what tests and fastlstm.explain read. Thresholds:
// tuning.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "cpu/tuning.h"

namespace fastlstm {

inline int64_t round_up(int64_t n, int64_t by) { return (n + by - 1) / by * by; }

// Of x, weights and results; float16 runs as float32.
enum class Dtype { float32, float64, bfloat16 };

// The weights of a frozen layer, packed before the call (cpu/packed.h): as stored, or rounded from float32.
enum class Frozen { no, stored, bfloat16, int8 };
Frozen frozen_named(const std::string& name);  // raises std::invalid_argument for another name

// A way to divide a direction among threads: members split the rows, or the units, or in row_groups both.
struct PartitionChoice {
  int members, row_groups;
  bool split_units, concurrent;
};

struct Machine {
  int threads;           // available to this call
  int64_t l2_bytes;      // of one core
  int64_t vector_bytes;  // of the float kernels' instruction set
  bool bf16_kernels;     // bf16::kernels of cpu/bf16.h is not null
  const CostFigures* figures = &kCostFigures;
  std::optional<PartitionChoice> forced =
      {};  // the only candidate; `python -m benchmarks calibrate` times each
  int64_t int8_width =
      0;  // of a vector of the kernels of cpu/int8.h, in elements; 0: that of the float kernels
  bool blas_is_slow_at_unaligned_rows = false;  // of float32 results (kAlignedGemm)
};

// A layer's call. Sizes as in cpu/sequence.h.
struct LayerShape {
  Dtype dtype;
  int64_t T, B, N;     // steps, rows, sum of lengths
  int64_t given_rows;  // rows of x: T * B where it is padded
  double active_rows;  // the number of rows of a row's own step, mean over all N rows: above N / T in ragged
                       // batches
  int64_t I, H, P, D;
  bool dense_with_h0 =
      false;  // neither lengths nor resets, and an initial state: dW_hh is the sum of two products
  Frozen frozen = Frozen::no;
  bool norm = false;            // layer normalization
  bool bf16_requested = false;  // float32: torch's flag asks for bfloat16 products (docs/numerics.md)

  bool proj() const { return P != H; }
  int64_t real_bytes() const { return dtype == Dtype::float64 ? 8 : 4; }  // of sums and states
};

inline int64_t int8_width(const LayerShape& s, const Machine& machine) {
  return machine.int8_width ? machine.int8_width : machine.vector_bytes / s.real_bytes();
}

// The threads of a layer: per direction a number of members that split either the rows (and never meet), or
// the units (and meet at a barrier in every step), or both: groups of members split the rows, and the members
// of a group the units.
struct ThreadPartition {
  int64_t D = 1;
  int members = 1;          // per direction
  bool concurrent = false;  // directions on threads of their own
  bool split_units = false;
  int copies = 1;      // of a direction's packed weights
  int row_groups = 1;  // of members that split units

  // Microseconds of the time loop by the cost model (cost.h), and the least of every kind of partition,
  // infinite where there is none.
  double predicted_us = 0, one_thread_us = 0, directions_us = 0, rows_us = 0, units_us = 0, grid_us = 0;
  bool one_available = true;  // the call has one thread

  int threads() const { return members * (concurrent ? static_cast<int>(D) : 1); }
  // Returns true if each thread is the only one to read its packed weights: it then packs them, so that they
  // are in its cache.
  bool private_weights() const {
    return (split_units && row_groups == 1) || copies > 1 || (concurrent && members == 1);
  }
  // The copy that the member of this index reads.
  int64_t copy(int index) const { return copies > 1 ? index % members : 0; }
  int shares() const { return split_units ? members / row_groups : 1; }  // of a direction's weights
  int row_shares() const { return split_units ? row_groups : members; }  // of its rows
};

enum class EngineKind {
  float_panels,   // engine_float.h; bfloat16 is widened where it is packed
  bf16_panels,    // engine_float.h with panels of bfloat16, widened as they are read
  bf16_products,  // engine_bf16.h
  int8_products,  // engine_int8.h
};

// Why a float32 layer's products are not bfloat16 although requested. none: they are, or are not requested.
// one_step: an LSTMCell runs as a layer of one step under compile, vmap and autocast, and does not follow the
// flag.
enum class Bf16Refusal { none, no_kernels, frozen, layer_norm, no_features, few_units, one_step, few_rows };

enum class WeightMode { prepacked, pack_on_use, unpacked };

struct ForwardPlan {
  EngineKind engine = EngineKind::float_panels;
  Bf16Refusal bf16_refusal = Bf16Refusal::none;
  ThreadPartition partition;
  WeightMode w_ih = WeightMode::prepacked, w_hh = WeightMode::prepacked, w_hr = WeightMode::prepacked;
  int64_t hoisted_steps = 0;           // of x W_ih^T made at once, at full steps; 0: it is made step by step
  bool alternate_block_order = false;  // odd steps read the blocks of W_hh from last to first
};

enum class Gemm {
  small,         // gemm.h on one thread
  skinny,        // gemm.h on all threads, by columns
  blas,          // the BLAS behind ATen
  aligned_blas,  // the same into a temporary with aligned rows, which is then copied or added to C
  bf16           // bf16_gemm.h on all threads
};

// A product's kind is that of a chunk of all its rows.
struct WgradPlan {
  bool at_once = false;     // one product; otherwise a sum over chunks
  bool transposed = false;  // made as its transpose
  bool float64 = false;     // float32 products of kFloat64WgradBlockRows rows, summed in float64
  Gemm gemm = Gemm::blas;
};

struct BackwardPlan {
  EngineKind engine = EngineKind::float_panels;
  ThreadPartition partition;
  bool pack_hh = true;
  bool alternate_block_order = false;
  int64_t chunk_steps = 1;
  Gemm dx = Gemm::blas;
  WgradPlan dw_ih, dw_hh, dw_hr;
};

struct CpuPlan {
  ForwardPlan forward;
  BackwardPlan backward;
};

// LSTMCell (cpu/one_step.h).
struct CellPlan {
  ThreadPartition forward, backward;
  WeightMode weights = WeightMode::unpacked;   // of forward, both
  bool layer_backward = false;                 // backward is that of a layer of one step
  bool pack_hh = false, private_pack = false;  // by backward; each thread its own
};

ForwardPlan plan_forward(const LayerShape& s, const Machine& machine);
BackwardPlan plan_backward(const LayerShape& s, const Machine& machine);
inline CpuPlan plan(const LayerShape& s, const Machine& machine) {
  return {plan_forward(s, machine), plan_backward(s, machine)};
}
CellPlan plan_cell(Dtype dtype, int64_t B, int64_t I, int64_t H, const Machine& machine);

// Returns true if the kernels of cpu/bf16.h run a layer.
bool uses_bf16_products(const LayerShape& s, const Machine& machine);
Bf16Refusal bf16_refusal(const LayerShape& s, const Machine& machine);
// Of a frozen layer, whatever the sizes of a call: the packed weights must fit all.
EngineKind frozen_engine(const LayerShape& s, const Machine& machine);

// In words, for fastlstm.explain.
std::string reason(const ThreadPartition& partition);
std::string describe(const ForwardPlan& plan, const LayerShape& s);
std::string describe(const BackwardPlan& plan, const LayerShape& s);
std::string describe_forward(const CellPlan& plan);
std::string describe_backward(const CellPlan& plan);

// ---- What kernels ask step by step, of the rows or units of one thread.

// Returns true if what a thread reads in every step stays in its L2 from step to step.
inline bool stays_in_l2(double bytes, int64_t l2_bytes) { return bytes <= kL2ResidentMaxFraction * l2_bytes; }

// Returns true if x W_ih^T of a thread's rows of a step is made together with that of the next steps.
inline bool hoists_input_projection(int64_t T, bool ih_prepacked, int64_t rows) {
  return T > 1 && (!ih_prepacked || rows < kHoistBelowRows);
}
// Rows of x W_ih^T that are made at once. N: rows of all steps.
inline int64_t hoist_rows(int64_t N) { return N <= kHoistAllMaxRows ? N : kHoistTileRows; }

// How C [m, n] = A [m, k] B [k, n] is made. widened: B is bfloat16 and A is not.
inline Gemm gemm_kind(int64_t m, int64_t n, int64_t k, bool transposed_a, bool widened) {
  if (m * n * k <= kSmallGemmMaxMacs && k <= kSmallGemmMaxDepth) return Gemm::small;
  if (!transposed_a && m <= (widened ? kWidenedGemmMaxRows : kSkinnyGemmMaxRows)) return Gemm::skinny;
  return Gemm::blas;
}

}  // namespace fastlstm
