// The decisions of cpu/plan.h.
#include "cpu/plan.h"

#include "cpu/bf16.h"

namespace fastlstm {
namespace {

int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by * by; }
int64_t width(const LayerShape& s, const Machine& machine) { return machine.vector_bytes / s.real_bytes(); }
// Units and features are split among threads in multiples of a panel, two vectors (Kernels::unit_block).
int64_t unit_block(const LayerShape& s, const Machine& machine) { return 2 * width(s, machine); }
// The largest share of n units or features.
int64_t largest_share(int64_t n, int64_t block, int shares) {
  return std::min(n, (up(n, block) / block + shares - 1) / shares * block);
}

// ---- Candidates: what a partition may be.

ThreadPartition serial(int64_t D, const char* reason) { return {D, 1, false, false, 1, reason}; }

// Both directions at once, if there are two, each on one thread.
ThreadPartition by_direction(int64_t D, const char* reason) { return {D, 1, D == 2, false, 1, reason}; }

ThreadPartition by_rows(int64_t D, int members, bool private_copies, const char* reason) {
  return {D, members, D == 2, false, private_copies ? members : 1, reason};
}

ThreadPartition by_units(int64_t D, int members, const char* reason) {
  return {D, members, D == 2, members > 1, 1, reason};
}

// Threads of each direction, if directions run at once.
int threads_per_direction(const LayerShape& s, const Machine& machine) {
  return machine.threads / (s.D == 2 ? 2 : 1);
}

constexpr const char* kOneThread = "one thread is available";
constexpr const char* kLittleWork = "starting threads would take longer than they save";
constexpr const char* kNoMoreThreads = "no thread is left to divide a direction";
constexpr const char* kBarrierTooDear = "a barrier in each step would take longer than it saves";
constexpr const char* kOneUnitBlock = "H is less than two blocks of units";
constexpr const char* kFewRowsEach = "with rows split, each thread would read all weights for few rows";

// For the float kernels, in the order of preference. s.I is 0 where threads do not make x W_ih^T.
ThreadPartition partition(const LayerShape& s, const Machine& machine, bool rows_only = false) {
  const double rows = double(s.N) / s.T;  // of a step, in the mean
  const int64_t units = up(s.H, width(s, machine));
  const double step_macs = std::max(rows, s.T == 1 ? kSingleStepCostMinRows : kStepCostMinRows) * 4 * units *
                           (s.I + s.P + kGateCostMacs);
  if (machine.threads == 1) return serial(s.D, kOneThread);
  if (step_macs * s.T * s.D < kThreadsMinMacs) return serial(s.D, kLittleWork);
  const int most = threads_per_direction(s, machine);
  if (most <= 1) return by_direction(s.D, kNoMoreThreads);

  // Splitting rows reads all weights in every thread. In a single step each thread packs them for itself, for
  // which it must have several register tiles.
  const double weights = 4.0 * s.H * (s.I + s.P) * s.real_bytes();
  const bool streamed = s.T == 1 || !stays_in_l2(weights, machine.l2_bytes);
  const double min_rows = streamed                         ? kStreamedRowSplitMinRows
                          : s.proj()                       ? kProjectionRowSplitMinRows
                          : weights > kPrivatePackMaxBytes ? kRowSplitMinRows
                                                           : kSmallWeightRowSplitMinRows;
  const double rows_each = (weights > kCheapReadMaxBytes ? rows : s.active_rows) / most;
  const bool rows_fit = rows_each >= min_rows && (s.T > 1 || weights <= kSingleStepRowSplitMaxBytes);
  if (rows_only || rows_fit) {
    const int members = static_cast<int>(std::clamp<int64_t>(s.B, 1, most));
    return by_rows(s.D, members, weights <= kPrivatePackMaxBytes,
                   rows_only              ? "rows need no barrier"
                   : streamed && s.T == 1 ? "each thread has rows enough to pack the weights for itself"
                   : streamed             ? "each thread has rows enough to stream the weights through its L2"
                                          : "rows need no barrier, and each L2 holds the weights");
  }
  if (step_macs < kUnitSplitMinMacs) return by_direction(s.D, kBarrierTooDear);
  const int members =
      static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(1, s.H / unit_block(s, machine))));
  return by_units(s.D, members, members > 1 ? kFewRowsEach : kOneUnitBlock);
}

// For the bfloat16 kernels.
constexpr int64_t kBf16UnitBlock = 32;  // a tile's 64 columns are two of them
static_assert(kBf16UnitBlock == bf16::kUnits);

ThreadPartition partition_bf16(const LayerShape& s, const Machine& machine) {
  const double rows = double(s.N) / s.T;
  const double step_macs = rows * 4 * s.H * (s.I + s.H + kBf16GateCostMacs);
  if (machine.threads == 1) return serial(s.D, kOneThread);
  if (step_macs * s.T * s.D < kBf16ThreadsMinMacs) return serial(s.D, kLittleWork);
  const int most = threads_per_direction(s, machine);
  if (most <= 1) return by_direction(s.D, kNoMoreThreads);
  const double weights = 8.0 * s.H * (s.I + s.H);  // bytes; each thread that splits rows reads all of them
  if (s.T > 1 && rows / most >= kBf16RowSplitMinRows && weights <= kBf16RowSplitMaxBytes)
    return by_rows(s.D, most, false, "each thread has a tile of rows, and its L2 holds the weights");
  if (step_macs < kBf16UnitSplitMinMacs) return by_direction(s.D, kBarrierTooDear);
  const int members = static_cast<int>(std::min<int64_t>(most, std::max<int64_t>(1, s.H / kBf16UnitBlock)));
  return by_units(s.D, members, members > 1 ? kFewRowsEach : kOneUnitBlock);
}

// ---- Weights.

// Packing the weights takes what the products of a few rows save by it.
bool uses_bf16_products(const LayerShape& s, const Machine& machine) {
  return s.dtype == Dtype::bfloat16 && machine.bf16_kernels && s.given_rows > kUnpackedMaxRows && !s.proj() &&
         s.H > 0 && s.I > 0;
}

// Panels of bfloat16 where the L2 of a thread does not hold its part of W_hh as float: where it does, float
// panels are as fast as the FMAs and need no widening.
Driver driver(const LayerShape& s, const ThreadPartition& threads, const Machine& machine) {
  const int64_t elements = 4 * s.H * s.P / threads.shares();
  return s.dtype == Dtype::bfloat16 && !stays_in_l2(elements * 4.0, machine.l2_bytes) ? Driver::bf16_panels
                                                                                      : Driver::float_panels;
}

int64_t panel_bytes(Driver driver, const LayerShape& s) {
  return driver == Driver::float_panels ? s.real_bytes() : 2;
}

bool reads_hh_unpacked(const LayerShape& s) {
  const int64_t bytes = 4 * s.H * s.P * s.real_bytes();
  return bytes > kHhPackAlwaysMaxBytes && s.B <= kUnpackedMaxRows &&
         (s.N <= kHhUnpackedMaxRows || bytes > kHhPackMaxBytes);
}

// bytes: of W_hh that a thread reads in each step.
bool packs_hh_for_backward(int64_t N, int64_t B, int64_t bytes, bool bf16, const Machine& machine) {
  return N > (B > kBackwardNarrowMaxRows          ? kBackwardUnpackedMaxRows
              : bytes < machine.l2_bytes && !bf16 ? kBackwardNarrowUnpackedMaxRows
                                                  : kBackwardStreamedUnpackedMaxRows);
}

// ---- Products after the loop.

// dW [m, n] over N rows, in chunks of at most `rows`.
WgradPlan plan_wgrad(int64_t m, int64_t n, int64_t rows, bool at_once, const LayerShape& s) {
  WgradPlan p;
  p.at_once = at_once;
  // In bfloat16 a single product is made in blocks of dW, rounded while a cache holds them.
  if (!(at_once && s.dtype == Dtype::bfloat16)) {
    const bool narrow =
        std::any_of(std::begin(kTransposedWgrad), std::end(kTransposedWgrad),
                    [&](const auto& limit) { return n <= limit.max_columns && s.N >= limit.min_rows; });
    p.transposed = narrow && m * n * rows > kSmallGemmMaxMacs;
    p.float64 = s.real_bytes() == 4 && s.N > kFloat32WgradMaxRows;
  }
  p.gemm = gemm_kind(p.transposed ? n : m, p.transposed ? m : n,
                     p.float64 ? std::min(rows, kFloat64WgradBlockRows) : rows, true, false);
  return p;
}

int64_t chunk_steps(const LayerShape& s) {
  const int64_t row_bytes = std::max<int64_t>(1, 4 * s.H * s.real_bytes());
  const int64_t rows = std::max(kChunkMinRows, kChunkMinBytes / row_bytes);
  return std::clamp<int64_t>(rows / std::max<int64_t>(1, s.B), 1, s.T);
}

int64_t chunk_steps_bf16(const LayerShape& s) {
  const int64_t B = std::max<int64_t>(1, s.B);
  return std::min(s.T,
                  std::max((s.T + kBf16ChunksMax - 1) / kBf16ChunksMax, (kBf16ChunkMinRows + B - 1) / B));
}

}  // namespace

ForwardPlan plan_forward(const LayerShape& s, const Machine& machine) {
  ForwardPlan p;
  const auto alternates = [&](double bytes) { return s.T > 1 && !stays_in_l2(bytes, machine.l2_bytes); };
  if (uses_bf16_products(s, machine)) {
    p.driver = Driver::bf16_products;
    p.partition = partition_bf16(s, machine);
    const int64_t units = largest_share(s.H, kBf16UnitBlock, p.partition.shares());
    p.alternate_block_order = alternates(8.0 * (s.I + s.H) * units);
    return p;
  }
  p.partition = partition(s, machine);
  p.driver = driver(s, p.partition, machine);
  // Packing whole weights pays where they are read again and again.
  const bool few_rows = s.N <= kUnpackedMaxRows;
  const bool used_once = s.T == 1 && (!s.proj() || s.N <= kRowBlockRows);
  p.w_ih = few_rows                               ? WeightMode::unpacked
           : used_once || s.N <= kHoistAllMaxRows ? WeightMode::pack_on_use
                                                  : WeightMode::prepacked;
  p.w_hh = few_rows || reads_hh_unpacked(s) ? WeightMode::unpacked
           : used_once                      ? WeightMode::pack_on_use
                                            : WeightMode::prepacked;
  p.w_hr = few_rows && s.dtype != Dtype::bfloat16 ? WeightMode::unpacked : WeightMode::prepacked;
  const int64_t row_shares = p.partition.split_units ? 1 : p.partition.members;
  const int64_t rows = std::max<int64_t>(1, (s.B + row_shares - 1) / row_shares);
  if (hoists_input_projection(s.T, p.w_ih == WeightMode::prepacked, rows))
    p.hoisted_steps = std::clamp<int64_t>(hoist_rows(s.N) / rows, 1, s.T);
  const int64_t units = largest_share(s.H, unit_block(s, machine), p.partition.shares());
  p.alternate_block_order = alternates(4.0 * s.P * units * panel_bytes(p.driver, s));
  return p;
}

BackwardPlan plan_backward(const LayerShape& s, const Machine& machine) {
  BackwardPlan p;
  LayerShape loop = s;
  loop.I = 0;  // x W_ih^T has no part in backward's time loop
  const auto alternates = [&](double bytes) { return s.T > 1 && !stays_in_l2(bytes, machine.l2_bytes); };
  if (uses_bf16_products(s, machine)) {
    p.driver = Driver::bf16_products;
    p.partition = partition_bf16(loop, machine);
    p.alternate_block_order =
        alternates(8.0 * s.H * largest_share(s.H, kBf16UnitBlock, p.partition.shares()));
    p.chunk_steps = chunk_steps_bf16(s);
    p.dw_ih.at_once = p.chunk_steps == s.T;
    p.dw_hh.at_once = p.chunk_steps == s.T && !s.dense_with_h0;
    return p;
  }
  const bool bf16 = s.dtype == Dtype::bfloat16;
  p.partition = partition(loop, machine);
  p.driver = driver(s, p.partition, machine);
  const int64_t read = 4 * s.H * s.P * s.real_bytes() / p.partition.shares();
  p.pack_hh = packs_hh_for_backward(s.N, s.B, read, bf16, machine);
  const int64_t features = largest_share(s.P, unit_block(s, machine), p.partition.shares());
  p.alternate_block_order = p.pack_hh && alternates(4.0 * s.H * features * panel_bytes(p.driver, s));
  p.chunk_steps = chunk_steps(s);
  const int64_t rows = std::min(s.N, p.chunk_steps * s.B);
  const bool one_chunk = p.chunk_steps >= s.T;
  p.dx = gemm_kind(rows, s.I, 4 * s.H, false, bf16);
  p.dw_ih = plan_wgrad(4 * s.H, s.I, rows, one_chunk, s);
  p.dw_hh = plan_wgrad(4 * s.H, s.P, rows, one_chunk && !s.dense_with_h0, s);
  p.dw_hr = plan_wgrad(s.P, s.H, rows, one_chunk, s);
  return p;
}

CellPlan plan_cell(Dtype dtype, int64_t B, int64_t I, int64_t H, const Machine& machine) {
  CellPlan p;
  const auto shape = [&](int64_t inputs, int64_t features) {
    return LayerShape{dtype, 1, B, B, B, double(B), inputs, H, features, 1};
  };
  const LayerShape s = shape(I, H);
  p.forward = partition(s, machine);
  p.weights = B <= kUnpackedMaxRows ? WeightMode::unpacked : WeightMode::pack_on_use;
  p.layer_backward = B * 4 * H * std::max(I, H) > kCellWgradMaxMacs;
  if (p.layer_backward) return p;
  p.backward = partition(shape(2 * I, 2 * H), machine, /*rows_only=*/true);  // twice the products of forward
  p.pack_hh = packs_hh_for_backward(B, B, 4 * H * H * s.real_bytes(), false, machine);
  p.private_pack =
      p.pack_hh && up(H, unit_block(s, machine)) * 4 * H * s.real_bytes() <= kCellPrivatePackMaxBytes;
  return p;
}

}  // namespace fastlstm
