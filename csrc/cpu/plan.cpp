// The decisions of cpu/plan.h.
#include "cpu/plan.h"

#include "cpu/bf16.h"
#include "cpu/cost.h"

namespace fastlstm {
namespace {

int64_t width(const LayerShape& s, const Machine& machine) { return machine.vector_bytes / s.real_bytes(); }
// Units and features are split among threads in multiples of a panel, two vectors (Kernels::unit_block).
int64_t unit_block(const LayerShape& s, const Machine& machine) { return 2 * width(s, machine); }
// The largest share of n units or features.
int64_t largest_share(int64_t n, int64_t block, int shares) {
  return std::min(n, (round_up(n, block) / block + shares - 1) / shares * block);
}

// ---- Weights.

// Panels of bfloat16 where the L2 of a thread does not hold its part of W_hh as float: where it does, float
// panels are as fast as the FMAs and need no widening.
EngineKind engine_kind(const LayerShape& s, const ThreadPartition& threads, const Machine& machine) {
  if (s.frozen != Frozen::no) return frozen_engine(s, machine);
  const int64_t elements = 4 * s.H * s.P / threads.shares();
  return s.dtype == Dtype::bfloat16 && !stays_in_l2(elements * 4.0, machine.l2_bytes)
             ? EngineKind::bf16_panels
             : EngineKind::float_panels;
}

int64_t panel_bytes(EngineKind engine, const LayerShape& s) {
  return engine == EngineKind::float_panels ? s.real_bytes() : 2;
}

bool used_once(const LayerShape& s) { return s.T == 1 && (!s.proj() || s.N <= kRowBlockRows); }

bool reads_hh_unpacked(const LayerShape& s) {
  const int64_t bytes = 4 * s.H * s.P * s.real_bytes();
  return bytes > kHhPackAlwaysMaxBytes && s.B <= kUnpackedMaxRows &&
         (s.N <= kHhUnpackedMaxRows || bytes > kHhPackMaxBytes);
}

// Packing takes what the products of a few rows save by it. Packing whole weights pays where they are read
// again and again. With layer normalization a row needs the products of all units before its cell, so that no
// weight is packed block by block for one use.
WeightMode w_ih_mode(const LayerShape& s) {
  return s.frozen != Frozen::no                    ? WeightMode::prepacked
         : s.N <= kUnpackedMaxRows                 ? WeightMode::unpacked
         : s.norm                                  ? WeightMode::prepacked
         : used_once(s) || s.N <= kHoistAllMaxRows ? WeightMode::pack_on_use
                                                   : WeightMode::prepacked;
}
WeightMode w_hh_mode(const LayerShape& s) {
  return s.frozen != Frozen::no                            ? WeightMode::prepacked
         : s.N <= kUnpackedMaxRows || reads_hh_unpacked(s) ? WeightMode::unpacked
         : used_once(s) && !s.norm                         ? WeightMode::pack_on_use
                                                           : WeightMode::prepacked;
}

// shares: of W_hh, of which a thread reads one in each step.
bool packs_hh_for_backward(const LayerShape& s, int shares, const Machine& machine) {
  const int64_t bytes = 4 * s.H * s.P * s.real_bytes() / shares;
  return s.N > (s.B > kBackwardNarrowMaxRows                             ? kBackwardUnpackedMaxRows
                : bytes < machine.l2_bytes && s.dtype != Dtype::bfloat16 ? kBackwardNarrowUnpackedMaxRows
                                                                         : kBackwardStreamedUnpackedMaxRows);
}

// ---- Products after the loop.

// kind of a product C [m, n] over depth k, or the BLAS into aligned rows.
Gemm with_aligned_rows(Gemm kind, int64_t m, int64_t n, int64_t k, const LayerShape& s,
                       const Machine& machine) {
  const bool aligned = n * s.real_bytes() % kBlasRowAlignBytes == 0;
  if (kind != Gemm::blas || aligned || s.real_bytes() != 4 || !machine.blas_is_slow_at_unaligned_rows)
    return kind;
  const bool pays = std::any_of(std::begin(kAlignedGemm), std::end(kAlignedGemm), [&](const auto& limit) {
    return m >= limit.min_m && n >= limit.min_n && k >= limit.min_k;
  });
  return pays ? Gemm::aligned_blas : kind;
}

// dW [m, n] over N rows, in chunks of at most `rows`.
WgradPlan plan_wgrad(int64_t m, int64_t n, int64_t rows, bool at_once, const LayerShape& s,
                     const Machine& machine) {
  WgradPlan p;
  p.at_once = at_once;
  // In bfloat16 a single product is made in blocks of dW, rounded while a cache holds them.
  const bool in_blocks = at_once && s.dtype == Dtype::bfloat16;
  if (!in_blocks) {
    const bool narrow =
        std::any_of(std::begin(kTransposedWgrad), std::end(kTransposedWgrad),
                    [&](const auto& limit) { return n <= limit.max_columns && s.N >= limit.min_rows; });
    p.transposed = narrow && m * n * rows > kSmallGemmMaxMacs;
    p.float64 = s.real_bytes() == 4 && s.N > kFloat32WgradMaxRows;
  }
  if (p.transposed) std::swap(m, n);
  const int64_t depth = p.float64 ? std::min(rows, kFloat64WgradBlockRows) : rows;
  p.gemm = gemm_kind(m, n, depth, true, false);
  if (!in_blocks) p.gemm = with_aligned_rows(p.gemm, m, n, depth, s, machine);
  return p;
}

int64_t chunk_steps(const LayerShape& s) {
  const int64_t row_bytes = std::max<int64_t>(1, 4 * s.H * s.real_bytes());
  const int64_t rows = std::max(kChunkMinRows, kChunkMinBytes / row_bytes);
  return std::clamp<int64_t>(rows / std::max<int64_t>(1, s.B), 1, s.T);
}

// Of float32 layers.
bool has_units_for_bf16(const LayerShape& s) {
  return s.H >= kFloat32ToBf16MinUnits && s.P >= kFloat32ToBf16MinFeatures;
}

int64_t chunk_steps_bf16(const LayerShape& s) {
  const int64_t B = std::max<int64_t>(1, s.B);
  return std::min(s.T,
                  std::max((s.T + kBf16ChunksMax - 1) / kBf16ChunksMax, (kBf16ChunkMinRows + B - 1) / B));
}

}  // namespace

// Packing the weights takes what the products of a few rows save by it.
bool uses_bf16_products(const LayerShape& s, const Machine& machine) {
  if (s.frozen != Frozen::no) return frozen_engine(s, machine) == EngineKind::bf16_products;
  if (s.dtype == Dtype::float32 && s.bf16_requested) return bf16_refusal(s, machine) == Bf16Refusal::none;
  return s.dtype == Dtype::bfloat16 && machine.bf16_kernels && s.given_rows > kUnpackedMaxRows && s.H > 0 &&
         s.I > 0 && !s.norm;
}

Bf16Refusal bf16_refusal(const LayerShape& s, const Machine& machine) {
  if (s.dtype != Dtype::float32 || !s.bf16_requested) return Bf16Refusal::none;
  if (s.frozen == Frozen::stored || s.frozen == Frozen::int8) return Bf16Refusal::frozen;
  if (!machine.bf16_kernels) return Bf16Refusal::no_kernels;
  if (s.norm) return Bf16Refusal::layer_norm;
  if (s.I == 0) return Bf16Refusal::no_features;
  if (!has_units_for_bf16(s)) return Bf16Refusal::few_units;
  if (s.frozen == Frozen::bfloat16) return Bf16Refusal::none;  // frozen_engine depends on no other size
  if (s.T == 1) return Bf16Refusal::one_step;
  return s.N < kFloat32ToBf16MinRows ? Bf16Refusal::few_rows : Bf16Refusal::none;
}

EngineKind frozen_engine(const LayerShape& s, const Machine& machine) {
  if (s.frozen == Frozen::int8) return EngineKind::int8_products;
  if (s.frozen == Frozen::stored && s.dtype != Dtype::bfloat16) return EngineKind::float_panels;
  const bool has_units = s.dtype == Dtype::bfloat16 ? s.H > 0 : has_units_for_bf16(s);
  return machine.bf16_kernels && has_units && s.I > 0 ? EngineKind::bf16_products : EngineKind::bf16_panels;
}

Loop forward_loop(const LayerShape& s, const Machine& machine) {
  if (s.frozen == Frozen::int8) return int8_forward_loop(s);
  Loop loop = uses_bf16_products(s, machine) ? bf16_forward_loop(s)
                                             : float_forward_loop(s, w_ih_mode(s), w_hh_mode(s));
  if (s.frozen != Frozen::no) loop.packed = 0;
  return loop;
}

Loop backward_loop(const LayerShape& s, const Machine& machine) {
  if (uses_bf16_products(s, machine)) return bf16_backward_loop(s, chunk_steps_bf16(s));
  // Whether W_hh is packed depends a little on its shares; here it is taken whole.
  return float_backward_loop(s, packs_hh_for_backward(s, 1, machine), chunk_steps(s));
}

ForwardPlan plan_forward(const LayerShape& s, const Machine& machine) {
  ForwardPlan p;
  p.bf16_refusal = bf16_refusal(s, machine);
  p.partition = choose_partition(forward_loop(s, machine), machine);
  const auto alternates = [&](double bytes) { return s.T > 1 && !stays_in_l2(bytes, machine.l2_bytes); };
  if (uses_bf16_products(s, machine)) {
    p.engine = EngineKind::bf16_products;
    const int64_t units = largest_share(s.H, bf16::kUnits, p.partition.shares());
    p.alternate_block_order = alternates(8.0 * (s.I + s.P) * units);
    return p;
  }
  p.w_ih = w_ih_mode(s), p.w_hh = w_hh_mode(s);
  if (s.frozen == Frozen::int8) {
    const int64_t block = int8_width(s, machine);
    p.engine = EngineKind::int8_products;
    const int64_t rows =
        std::max<int64_t>(1, (s.B + p.partition.row_shares() - 1) / p.partition.row_shares());
    if (rows <= kInt8HoistRows) p.hoisted_steps = std::clamp<int64_t>(kInt8HoistRows / rows, 1, s.T);
    const int64_t units = largest_share(s.H, block, p.partition.shares());
    p.alternate_block_order = alternates(4.0 * s.P * round_up(units, block));
    return p;
  }
  p.w_hr = s.N <= kUnpackedMaxRows && s.dtype != Dtype::bfloat16 && s.frozen == Frozen::no
               ? WeightMode::unpacked
               : WeightMode::prepacked;
  p.engine = engine_kind(s, p.partition, machine);
  const int64_t row_shares = p.partition.row_shares();
  const int64_t rows = std::max<int64_t>(1, (s.B + row_shares - 1) / row_shares);
  if (hoists_input_projection(s.T, p.w_ih == WeightMode::prepacked, rows))
    p.hoisted_steps = std::clamp<int64_t>(hoist_rows(s.N) / rows, 1, s.T);
  const int64_t units = largest_share(s.H, unit_block(s, machine), p.partition.shares());
  p.alternate_block_order = alternates(4.0 * s.P * units * panel_bytes(p.engine, s));
  return p;
}

BackwardPlan plan_backward(const LayerShape& s, const Machine& machine) {
  BackwardPlan p;
  p.partition = choose_partition(backward_loop(s, machine), machine);
  const auto alternates = [&](double bytes) { return s.T > 1 && !stays_in_l2(bytes, machine.l2_bytes); };
  if (uses_bf16_products(s, machine)) {
    p.engine = EngineKind::bf16_products;
    p.alternate_block_order = alternates(8.0 * s.H * largest_share(s.P, bf16::kUnits, p.partition.shares()));
    p.chunk_steps = chunk_steps_bf16(s);
    if (s.dtype == Dtype::float32) p.dx = p.dw_ih.gemm = p.dw_hh.gemm = p.dw_hr.gemm = Gemm::bf16;
    p.dw_ih.at_once = p.dw_hr.at_once = p.chunk_steps == s.T;
    p.dw_hh.at_once = p.chunk_steps == s.T && !s.dense_with_h0;
    return p;
  }
  const bool bf16 = s.dtype == Dtype::bfloat16;
  p.engine = engine_kind(s, p.partition, machine);
  p.pack_hh = packs_hh_for_backward(s, p.partition.shares(), machine);
  const int64_t features = largest_share(s.P, unit_block(s, machine), p.partition.shares());
  p.alternate_block_order = p.pack_hh && alternates(4.0 * s.H * features * panel_bytes(p.engine, s));
  p.chunk_steps = chunk_steps(s);
  const int64_t rows = std::min(s.N, p.chunk_steps * s.B);
  const bool one_chunk = p.chunk_steps >= s.T;
  p.dx = with_aligned_rows(gemm_kind(rows, s.I, 4 * s.H, false, bf16), rows, s.I, 4 * s.H, s, machine);
  p.dw_ih = plan_wgrad(4 * s.H, s.I, rows, one_chunk, s, machine);
  p.dw_hh = plan_wgrad(4 * s.H, s.P, rows, one_chunk && !s.dense_with_h0, s, machine);
  p.dw_hr = plan_wgrad(s.P, s.H, rows, one_chunk, s, machine);
  return p;
}

CellPlan plan_cell(Dtype dtype, int64_t B, int64_t I, int64_t H, const Machine& machine) {
  CellPlan p;
  const LayerShape s{dtype, 1, B, B, B, double(B), I, H, H, 1};
  p.weights = B <= kUnpackedMaxRows ? WeightMode::unpacked : WeightMode::pack_on_use;
  p.forward = choose_partition(float_forward_loop(s, p.weights, p.weights), machine);
  p.layer_backward = B * 4 * H * std::max(I, H) > kCellWgradMaxMacs;
  if (p.layer_backward) return p;
  p.backward = choose_partition(cell_backward_loop(s), machine);
  p.pack_hh = packs_hh_for_backward(s, 1, machine);
  p.private_pack =
      p.pack_hh && round_up(H, unit_block(s, machine)) * 4 * H * s.real_bytes() <= kCellPrivatePackMaxBytes;
  return p;
}

}  // namespace fastlstm
