// The planner of the persistent kernels: how a layer's recurrence is distributed over the GPU, or why it is
// not. A pure function of sizes, dtype and device, with only standard headers, so that every build has it and
// the tests can call it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

#include "cuda/tuning.h"

namespace fastlstm::cuda {

// False: step-wise kernels only, for tests and measurements.
inline std::atomic<bool> persistent_enabled{true};
// The variant to use wherever it supports the layer, for tests and measurements: 'A' cluster, 'B' grid, 'D'
// grid with data flags, 'S' single-block; 0: the one of 'A' and 'B' with the smallest predicted time.
inline std::atomic<char> persistent_tier{0};

struct DeviceLimits {
  int sms;               // streaming multiprocessors
  int64_t shared_bytes;  // max shared memory of a CTA
  int max_cluster_ctas = 0;
  // Clusters that fit the device at once, if the runtime has been asked for a layout.
  int resident_clusters = std::numeric_limits<int>::max();
};

enum class Phase { forward, backward };

struct Recurrence {
  int64_t H, P, B;
  int D;
  int element_bytes;  // 2: float16 and bfloat16, 4: TF32, 0: a dtype without tensor-core products
};

constexpr int kWarps = 8;                     // per CTA
constexpr int kDataFlagSlots = 4;             // exchange.h
constexpr uint32_t kEmptyWord = 0xffffffffu;  // exchange.h
constexpr int kDataFlagMaxWords = 1 << 30;    // of 32 bits in the exchange buffer, exclusive
constexpr int kKSliceBytes = 64;              // of a row of K: 16 bytes of each of four lanes

// A step's GEMM is A [M, K] times a state [K, 8 * n_tiles]; A stays in the CTA. A is divided into fragments
// of 16 rows (an m tile) and 64 bytes of K (a K slice), which are distributed over the CTA's 8 warps.
//   forward            A [units * 4, H]: the CTA's units, the four gates of a unit adjacent. State: h
//   backward, grid     A [units, ctas_per_group * 4 * units]: the CTA's columns of W_hh. State: all dgates
//   backward, cluster  A [ctas_per_group * units, 4 * units]: its rows of W_hh, transposed. State: its dgates
// Cluster variant: a group is a thread-block cluster; CTAs store into each other's shared memory (DSMEM).
// Grid variant: a group is any set of CTAs that are resident together; states go through L2.
// Single-block variant: a group is one CTA, for small layers in 16 bits; nothing is exchanged. In forward the
// rows of A are [8 warps, 4 gates, 16 units].
struct Layout {
  bool cluster;         // cluster variant
  bool single;          // single-block variant, with batch tiles of 4 rows
  bool data_flag;       // grid variant whose data are their own flags, with one batch tile per group
  bool reduce_scatter;  // backward of the cluster variant: CTAs send partial products, and the receiver adds
  int units;            // hidden units per CTA
  int m_tiles;          // per warp and K iteration; with reduce_scatter: K slices, all of K
  int iters;  // K iterations of a warp; with reduce_scatter: m tiles of a warp. The last may be padding
  int register_iters;    // the first iterations, whose fragments are in registers; the rest in shared memory
  int split_k;           // parts of K; the warps of one part divide the rows
  int n_tiles;           // per batch tile, of 8 rows of the batch each
  int ctas_per_group;    // which hold one copy of W_hh
  int groups;            // per direction; groups never wait for each other
  int batch_tiles;       // group g processes batch tiles g, g + groups, ...
  int64_t state_words;   // 16-byte words of a batch tile's state: [n tiles, K slices, 32 lanes]
  int64_t shared_bytes;  // of a CTA

  int64_t shared_weight_bytes() const {  // the part of A that is not in registers
    return int64_t{std::max(0, iters - register_iters)} * 8 * m_tiles * 1024;
  }
  // CTAs per cluster of the launch; 0: cooperative launch, -1: CTAs are independent.
  int cluster_dim() const { return cluster ? ctas_per_group : single ? -1 : 0; }
  int exchange_slots() const { return data_flag ? kDataFlagSlots : 2; }  // of the grid variant
  int64_t ctas(int D) const { return int64_t{D} * groups * ctas_per_group; }
};

struct PersistentPlan {
  std::string reason;  // why the step-wise path runs instead; empty if the layout can run
  Layout layout = {};
  std::string description = {};  // the variant, and why not another
};

// Epochs and step counters have 32 bits.
constexpr int64_t kPersistentMaxSteps = std::numeric_limits<int>::max() - 1;
constexpr bool supports_steps(int64_t T) { return kPersistentMinSteps <= T && T <= kPersistentMaxSteps; }

// Grid variant: a lane polls at most one flag, so the share of K of a warp may overlap the parts of 32 CTAs:
// an eighth of all, and up to four more at its ends. W_hh of a larger group fits no GPU of today.
constexpr int kGridMaxCtas = 28 * kWarps;

// Grid variant, the compiled configurations, best first: as many units as fit, because a CTA reads the whole
// state per step, whatever part of it the CTA computes.
struct TileConfig {
  int units;
  int register_iters[2];  // for batch tiles of 8 and of 16 rows, as many as ptxas places without a spill
};
constexpr TileConfig kGridForwardConfigs[] = {{32, {2, 1}}, {16, {3, 3}}};
constexpr TileConfig kGridBackwardConfigs[] = {{32, {8, 3}}, {16, {16, 15}}};

// Cluster variant. The state is in shared memory, so K is split in two only: the warps read the state four
// times and add two partial sums instead of eight.
constexpr int kClusterUnits = 32;
constexpr int kClusterSplitK = 2;
// Reduce-scatter: floats from unit to unit of the inbox [units, rows + 2].
constexpr int inbox_stride(int n_tiles) { return 8 * n_tiles + 2; }
constexpr int cluster_register_iters(Phase phase, int element_bytes, int n_tiles) {  // as TileConfig's
  return (phase == Phase::forward ? 8 : 8 / element_bytes) / n_tiles;
}

// Single-block variant.
constexpr int kSingleUnits = 128, kSingleRows = 4;
constexpr int kSingleForwardIters = 4, kSingleBackwardIters = 16;

constexpr int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }
// At least two: a cluster of one CTA may not use remote stores.
constexpr int64_t cluster_ctas(int64_t H) { return std::max<int64_t>(2, ceil_div(H, kClusterUnits)); }

inline Layout grid_layout(Phase phase, const Recurrence& r, const DeviceLimits& device,
                          const TileConfig& config, int n_tiles) {
  const bool forward = phase == Phase::forward;
  Layout p = {};
  p.units = config.units, p.register_iters = config.register_iters[n_tiles - 1];
  p.n_tiles = n_tiles, p.split_k = kWarps;
  p.ctas_per_group = static_cast<int>(ceil_div(r.H, config.units));
  p.m_tiles = (forward ? 4 : 1) * config.units / 16;
  const int64_t K = static_cast<int64_t>(p.ctas_per_group) * config.units * (forward ? 1 : 4);
  p.iters = static_cast<int>(ceil_div(ceil_div(K * r.element_bytes, kKSliceBytes), kWarps));
  const int64_t partial_sums = static_cast<int64_t>(kWarps) * 8 * n_tiles * (16 * p.m_tiles + 4) * 4;
  p.shared_bytes = p.shared_weight_bytes() + partial_sums;
  p.state_words = static_cast<int64_t>(n_tiles) * p.iters * kWarps * 32;
  p.batch_tiles = static_cast<int>(ceil_div(r.B, 8 * n_tiles));
  p.groups = std::min(p.batch_tiles, device.sms / (p.ctas_per_group * r.D));
  return p;
}

// A cluster per batch tile. Clusters never wait for each other, so their number is not limited.
inline Layout cluster_layout(Phase phase, const Recurrence& r, int register_iters, int n_tiles) {
  Layout p = {};
  p.cluster = true, p.reduce_scatter = phase == Phase::backward;
  p.units = kClusterUnits, p.register_iters = register_iters, p.n_tiles = n_tiles;
  p.ctas_per_group = static_cast<int>(cluster_ctas(r.H));
  p.batch_tiles = p.groups = static_cast<int>(ceil_div(r.B, 8 * n_tiles));
  int64_t k_slices, sum_bytes;  // k_slices: of a state; sum_bytes: the inbox, or the partial sums
  if (p.reduce_scatter) {
    k_slices = ceil_div(4 * p.units * r.element_bytes, kKSliceBytes);
    p.split_k = 1, p.m_tiles = static_cast<int>(k_slices);
    p.iters = static_cast<int>(ceil_div(p.ctas_per_group * p.units / 16, kWarps));
    sum_bytes = int64_t{2} * p.ctas_per_group * p.units * inbox_stride(n_tiles) * 4;
  } else {
    p.split_k = kClusterSplitK, p.m_tiles = 4 * p.units / 16 * p.split_k / kWarps;
    const int64_t K = int64_t{p.ctas_per_group} * p.units;
    p.iters = static_cast<int>(ceil_div(ceil_div(K * r.element_bytes, kKSliceBytes), p.split_k));
    k_slices = int64_t{p.iters} * p.split_k;
    sum_bytes = int64_t{p.split_k} * 8 * n_tiles * (4 * p.units + 4) * 4;
  }
  p.state_words = n_tiles * k_slices * 32;
  p.shared_bytes = 16 + 2 * p.state_words * 16 + p.shared_weight_bytes() + sum_bytes;
  return p;
}

// A CTA per batch tile. They need not be resident together.
inline Layout single_block_layout(Phase phase, const Recurrence& r) {
  const bool forward = phase == Phase::forward;
  Layout p = {};
  p.single = true, p.units = kSingleUnits, p.n_tiles = 1, p.ctas_per_group = 1, p.split_k = 1;
  p.m_tiles = forward ? 4 : 1, p.iters = forward ? kSingleForwardIters : kSingleBackwardIters;
  p.register_iters = p.iters;
  p.batch_tiles = p.groups = static_cast<int>(ceil_div(r.B, kSingleRows));
  p.state_words = p.iters * 32, p.shared_bytes = 2 * p.state_words * 16;
  return p;
}
inline bool fits_single(const Recurrence& r) { return r.element_bytes == 2 && r.H <= kSingleUnits; }

// Predicted time of a step of all batch tiles, without the GEMMs before and after the loop. The figures are
// in tuning.h.
inline double estimated_us(const Recurrence& r, const DeviceLimits& device, const Layout& p) {
  constexpr const GpuCostFigures& f = kGpuCostFigures;
  // A thread has one element per 8 rows.
  const double cell =
      (p.reduce_scatter ? f.reduce_scatter_cell_us : f.cell_us) * (p.cluster ? 0.6 + 0.4 * p.n_tiles : 1);
  const double rows = 8 * p.n_tiles, units = p.ctas_per_group * p.units;
  const double mma = 4 * units * p.units * rows / f.macs_per_clock * r.element_bytes / 2;
  const double weights = p.shared_weight_bytes() / f.shared_bytes_per_clock;
  if (p.cluster) {
    const double sent = (p.ctas_per_group - 1) * p.units * rows * (p.reduce_scatter ? 4 : r.element_bytes) /
                        f.dsmem_bytes_per_clock;
    const double read = 16.0 * p.state_words * (kWarps / p.split_k) / f.shared_bytes_per_clock;
    // A reduce-scatter sends products while it computes others; an all-gather sends h at the end.
    const double terms = p.reduce_scatter ? units * rows * 4 : 2 * p.split_k * 4.0 * p.units * rows * 4;
    const double product = std::max(mma, weights + read);
    const double work =
        (p.reduce_scatter ? std::max(product, sent) : product + sent) + terms / f.shared_bytes_per_clock;
    const double fit = std::max(1, std::min(device.resident_clusters, device.sms / p.ctas_per_group));
    return (work / f.clock_mhz + cell + f.dsmem_latency_us) * std::ceil(r.D * p.batch_tiles / fit);
  }
  const double flags = f.flag_us + f.flag_cta_us * p.ctas_per_group;  // more flags, and later ones
  const double bytes = 16.0 * p.state_words;
  const double fetch = std::max(bytes / f.l2_bytes_per_clock, bytes * p.ctas(r.D) / f.all_l2_bytes_per_clock);
  const double sums = 2.0 * kWarps * rows * 16 * p.m_tiles * 4 / f.shared_bytes_per_clock;
  const double work = (std::max({fetch, weights, mma}) + sums) / f.clock_mhz + cell;
  const double turns = std::ceil(static_cast<double>(p.batch_tiles) / p.groups);
  return turns == 1 ? work + flags : turns * (work + f.grid_turn_us);
}

// The same of the step-wise kernels: the maximum of the host's two launches, loading W_hh into the SMs, and
// arithmetic and memory traffic of B rows.
inline double step_wise_us(Phase phase, const Recurrence& r) {
  constexpr const GpuCostFigures& f = kGpuCostFigures;
  const bool forward = phase == Phase::forward;
  const double host = forward ? f.step_forward_us : f.step_backward_us;
  const double weights = 4.0 * r.H * r.H * r.D, elements = static_cast<double>(r.H) * r.B * r.D;
  // Forward: gates_h written and read, gates_x read, c read and written; y, h and cells, and the activated
  // gates. Backward: dh and dc written and read; gates, dgates, cells of two steps and dy.
  const double bytes = forward ? 56 + 7 * r.element_bytes : 16 + 11 * r.element_bytes;
  const double rows =
      weights * r.B / f.step_macs_per_us * r.element_bytes / 2 + elements * bytes / f.step_bytes_per_us;
  return std::max({host, f.step_weight_us_per_byte * weights * r.element_bytes, rows});
}

// The fastest layout of the cluster variant, or why there is none.
inline PersistentPlan plan_cluster(Phase phase, const Recurrence& r, const DeviceLimits& device) {
  if (device.max_cluster_ctas == 0) return {"this GPU has no thread-block clusters"};
  const std::string cluster = "cluster of " + std::to_string(cluster_ctas(r.H)) + " CTAs";
  if (cluster_ctas(r.H) > device.max_cluster_ctas) {
    return {"a " + cluster + " exceeds " + std::to_string(device.max_cluster_ctas)};
  }
  // Batch tiles of 8 rows, or of 16 where that saves turns. TF32 backward has no registers for 16.
  Layout best = {};
  for (const int n_tiles : {1, 2}) {
    if (n_tiles == 2 && phase == Phase::backward && r.element_bytes == 4) continue;
    const Layout p =
        cluster_layout(phase, r, cluster_register_iters(phase, r.element_bytes, n_tiles), n_tiles);
    if (device.resident_clusters < 1 || p.shared_bytes > device.shared_bytes ||
        p.ctas(r.D) > std::numeric_limits<int>::max())
      continue;
    if (best.ctas_per_group == 0 || estimated_us(r, device, p) < estimated_us(r, device, best)) best = p;
  }
  if (best.ctas_per_group == 0) return {"no " + cluster + " fits this GPU"};
  return {"", best};
}

// The fastest layout of the grid variant; ctas_per_group = 0 if none fits.
inline Layout best_grid_layout(Phase phase, const Recurrence& r, const DeviceLimits& device) {
  const auto& configs = phase == Phase::forward ? kGridForwardConfigs : kGridBackwardConfigs;
  // More units fit no wave of CTAs, and would overflow below.
  if (r.H > 32 * static_cast<int64_t>(device.sms)) return {};
  for (const TileConfig& config : configs) {
    const Layout one = grid_layout(phase, r, device, config, 1);
    if (one.shared_bytes > device.shared_bytes || one.ctas_per_group * r.D > device.sms ||
        one.ctas_per_group > kGridMaxCtas)
      continue;
    if (one.batch_tiles <= one.groups) return one;
    // Batch tiles of 16 rows if the groups cannot process all tiles of 8 concurrently.
    const Layout two = grid_layout(phase, r, device, config, 2);
    return two.shared_bytes <= device.shared_bytes ? two : one;
  }
  return {};
}

// Data flags for a layout of the grid variant, or why not.
inline PersistentPlan with_data_flags(const Layout& grid, int D) {
  if (grid.ctas_per_group == 0) return {"too few SMs"};
  if (grid.n_tiles > 1 || grid.batch_tiles > grid.groups) {
    return {"the SMs hold fewer groups than there are batch tiles of 8 rows"};
  }
  PersistentPlan plan = {"", grid};
  plan.layout.data_flag = true;
  const int64_t words = int64_t{D} * grid.batch_tiles * plan.layout.exchange_slots() * grid.state_words * 4;
  if (words >= kDataFlagMaxWords) return {"the exchange buffer would have 4 GiB or more"};
  return plan;
}

inline PersistentPlan plan(Phase phase, const Recurrence& r, const DeviceLimits& device, char requested = 0) {
  if (r.P != r.H) return {"proj_size > 0 has no persistent kernel"};
  if (r.element_bytes == 0)
    return {"only float16, bfloat16, and float32 at TF32 precision have persistent kernels"};
  if (r.H < 1 || r.B < 1) return {"the layer has no units or no rows"};
  if (device.sms < 1) return {"persistent kernels require compute capability 8.0 and cooperative launch"};
  // Only if requested: its time, 0.65 us per step of forward by calculation, has not been measured.
  if (requested == 'S' && fits_single(r) &&
      ceil_div(r.B, kSingleRows) * r.D <= std::numeric_limits<int>::max())
    return {"", single_block_layout(phase, r), "single-block variant: requested (tier=S)"};
  const Layout grid = best_grid_layout(phase, r, device);
  // Only if requested, for the same reason. The variant has never run on a GPU.
  PersistentPlan data_flags = with_data_flags(grid, r.D);
  if (requested == 'D' && data_flags.reason.empty()) {
    data_flags.description = "grid variant with data flags: requested (tier=D)";
    return data_flags;
  }
  const PersistentPlan cluster = plan_cluster(phase, r, device);
  const bool fits_cluster = cluster.reason.empty(), fits_grid = grid.ctas_per_group > 0;
  if (!fits_cluster && !fits_grid) {
    const std::string both = r.D == 2 ? " of both directions" : "";
    return {"W_hh" + both + " at H=" + std::to_string(r.H) + ", " +
            std::to_string((4 * r.H * r.H * r.element_bytes * r.D) >> 20) +
            " MiB, does not fit into the registers and shared memory of " + std::to_string(device.sms) +
            " SMs"};
  }
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const double cluster_us = fits_cluster ? estimated_us(r, device, cluster.layout) : kNever;
  const double grid_us = fits_grid ? estimated_us(r, device, grid) : kNever;
  const double steps_us = step_wise_us(phase, r);
  const auto us = [](double time) {
    const auto tenths = static_cast<int64_t>(10 * time + 0.5);
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " us per step";
  };
  const bool use_cluster =
      fits_cluster && (requested == 'A' || !fits_grid || (requested == 0 && cluster_us < grid_us));
  const double chosen_us = use_cluster ? cluster_us : grid_us;
  if (requested == 0 && steps_us < chosen_us)
    return {"predicted " + us(steps_us) + ", persistent kernels " + us(chosen_us)};
  std::string why =
      requested ? std::string("requested (tier=") + requested + ")" : "predicted " + us(chosen_us);
  if (!fits_cluster) {
    why += "; not the cluster variant: " + cluster.reason;
  } else if (!fits_grid) {
    why += "; not the grid variant: too few SMs";
  } else if (!requested) {
    why += std::string(use_cluster ? ", grid" : ", cluster") + " variant " +
           us(use_cluster ? grid_us : cluster_us);
  }
  if (requested == 'D') why += "; no data flags: " + data_flags.reason;
  const char* const variant = use_cluster ? "cluster variant: " : "grid variant: ";
  return {"", use_cluster ? cluster.layout : grid, variant + why};
}

}  // namespace fastlstm::cuda
