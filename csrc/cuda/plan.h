// How a layer's recurrence is laid over the device for the persistent kernels, or why it is not: a pure
// function of sizes, type and device. No header but the standard's, so that every build has it and the tests
// can ask it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>

namespace fastlstm::cuda {

// Whether the persistent kernels may run at all; off to measure and test the step-wise ones.
inline std::atomic<bool> persistent_enabled{true};
// 'A', 'B' or 'S' for that tier wherever it can serve, to measure and test it; 0: what is predicted to be
// fastest.
inline std::atomic<char> persistent_tier{0};

struct DeviceLimits {
  int sms;          // streaming multiprocessors
  int64_t shared;   // bytes of shared memory one block may ask for
  int cluster = 0;  // the most blocks of a cluster; 0 where there are none
  // Clusters on the device at once, where the runtime has been asked for a layout.
  int clusters = std::numeric_limits<int>::max();
};

enum class Phase { forward, backward };

struct Recurrence {
  int64_t H, P, B;
  int D;
  int element;  // bytes: 2 for float16 and bfloat16, 4 for TF32; 0 for what tensor cores have no product for
};

// The product of a step is A [rows, K] times a state [K, 8 * columns]; A stays in the block. It is cut into
// fragments of 16 rows and 64 bytes of K (a chunk), which the 8 warps of a block divide among them.
//   forward            A [units * 4, H]: rows of the block's units, a unit's four gates together   state: h
//   backward, tier B   A [units, members * 4 * units]: the block's columns of W_hh    state: all dgates
//   backward, tier A   A [members * units, 4 * units]: its rows of W_hh, transposed    state: its own dgates
// Tier A: a group is a thread-block cluster, whose blocks push into each other's shared memory. Tier B: it is
// any blocks of one launch that are on the device together, and states go through L2.
// Tier S: one block is a group, for small layers in 16 bits; nothing is exchanged (forward's A has its rows
// in another order, [8 warps, 4 gates, 16 units]).
struct Layout {
  bool cluster;    // tier A
  bool single;     // tier S, with slices of 4 rows
  bool scatters;   // tier A's backward: blocks hand on products, for the others to add
  int units;       // hidden units of a block
  int width;       // fragments a warp multiplies in a round: of its rows, or where it scatters of its K
  int rounds;      // of a warp, for all of its K or, where it scatters, its rows; the last may be padding
  int held;        // rounds whose fragments are in registers; the others are in shared memory
  int parts;       // into which the warps cut K; those of one part divide the rows
  int columns;     // tiles of 8 rows of the batch in a slice, which a block takes at once
  int members;     // blocks of a group, which holds one copy of W_hh
  int groups;      // per direction; they never wait for each other
  int slices;      // of the batch; group g takes slices g, g + groups, ...
  int64_t state;   // 16-byte words of a slice's state: [columns, chunks, 32 lanes]
  int64_t shared;  // bytes of shared memory of a block

  int64_t shared_weights() const {  // bytes of A that registers do not hold
    return int64_t{std::max(0, rounds - held)} * 8 * width * 1024;
  }
  int in_cluster() const {
    return cluster ? members : single ? -1 : 0;
  }  // blocks; 0: all together, -1: each by itself
  int64_t blocks(int D) const { return int64_t{D} * groups * members; }
};

struct Plan {
  std::string reason;  // why the step-wise path runs instead; empty if the layout can run
  Layout layout = {};
  std::string tier = {};  // which one, and why not the other
};

constexpr int kPlanWarps = 8;       // kWarps in cuda/warp.cuh
constexpr int kChunkBytesOfK = 64;  // 16 bytes of a lane, four lanes to a row
// A persistent launch first loads all of W_hh: with fewer steps than the first it does not pay (chosen
// without a measurement; scripts/gpu_numbers.sh has T = 4 to 32). Epochs and step counters have 32 bits,
// hence the second.
constexpr int64_t kPersistentMinSteps = 4, kPersistentMaxSteps = std::numeric_limits<int>::max() - 1;
constexpr bool supports_steps(int64_t T) { return kPersistentMinSteps <= T && T <= kPersistentMaxSteps; }

// Tier B: a lane polls one flag at most, so a warp's share of K may lie in the parts of 32 members: an eighth
// of all, and up to four more at its ends. (W_hh of a larger group fits no GPU of today.)
constexpr int kMaxFlags = 28 * kPlanWarps;

// Tier B, what the kernels are compiled for, best first: as many units as fit, since what a block must take
// in per step is the whole state, whatever part of it the block makes.
struct Variant {
  int units;
  int held[2];  // rounds in registers for slices of 8 and of 16 rows, as ptxas can place them
};
constexpr Variant kForwardVariants[] = {{32, {2, 1}}, {16, {3, 3}}};
constexpr Variant kBackwardVariants[] = {{32, {8, 3}}, {16, {16, 15}}};

// Tier A. A state is close by, so the warps cut K into two parts only: they read it four times, and add two
// shares for a sum instead of eight.
constexpr int kClusterUnits = 32;
constexpr int kClusterParts = 2;
// Floats from unit to unit of what the blocks push where they scatter.
constexpr int inbox_stride(int columns) { return 8 * columns + 2; }
constexpr int cluster_held(Phase phase, int element, int columns) {  // rounds, as ptxas can place them
  return (phase == Phase::forward ? 8 : 8 / element) / columns;
}

// Tier S.
constexpr int kSingleUnits = 128, kSingleRows = 4;
constexpr int kSingleForwardRounds = 4, kSingleBackwardRounds = 16;

constexpr int64_t up(int64_t n, int64_t by) { return (n + by - 1) / by; }
// Blocks of a cluster: one alone is none, and may not push even to itself.
constexpr int64_t cluster_members(int64_t H) { return std::max<int64_t>(2, up(H, kClusterUnits)); }

inline Layout lay_out(Phase phase, const Recurrence& r, const DeviceLimits& device, const Variant& v,
                      int columns) {
  const bool forward = phase == Phase::forward;
  Layout p = {};
  p.units = v.units, p.held = v.held[columns - 1], p.columns = columns, p.parts = kPlanWarps;
  p.members = static_cast<int>(up(r.H, v.units));
  p.width = (forward ? 4 : 1) * v.units / 16;
  const int64_t K = static_cast<int64_t>(p.members) * v.units * (forward ? 1 : 4);
  p.rounds = static_cast<int>(up(up(K * r.element, kChunkBytesOfK), kPlanWarps));
  const int64_t partial_sums = static_cast<int64_t>(kPlanWarps) * 8 * columns * (16 * p.width + 4) * 4;
  p.shared = p.shared_weights() + partial_sums;
  p.state = static_cast<int64_t>(columns) * p.rounds * kPlanWarps * 32;
  p.slices = static_cast<int>(up(r.B, 8 * columns));
  p.groups = std::min(p.slices, device.sms / (p.members * r.D));
  return p;
}

// A cluster for each slice: as they never wait for each other, any number of them may be launched.
inline Layout lay_out_clusters(Phase phase, const Recurrence& r, int held, int columns) {
  Layout p = {};
  p.cluster = true, p.scatters = phase == Phase::backward;
  p.units = kClusterUnits, p.held = held, p.columns = columns;
  p.members = static_cast<int>(cluster_members(r.H));
  p.slices = p.groups = static_cast<int>(up(r.B, 8 * columns));
  int64_t chunks, received;  // of the state; bytes that lie beside the states
  if (p.scatters) {
    chunks = up(4 * p.units * r.element, kChunkBytesOfK);
    p.parts = 1, p.width = static_cast<int>(chunks);
    p.rounds = static_cast<int>(up(p.members * p.units / 16, kPlanWarps));
    received = int64_t{2} * p.members * p.units * inbox_stride(columns) * 4;
  } else {
    p.parts = kClusterParts, p.width = 4 * p.units / 16 * p.parts / kPlanWarps;
    p.rounds = static_cast<int>(up(up(int64_t{p.members} * p.units * r.element, kChunkBytesOfK), p.parts));
    chunks = int64_t{p.rounds} * p.parts;
    received = int64_t{p.parts} * 8 * columns * (4 * p.units + 4) * 4;  // the warps' shares of the sums
  }
  p.state = columns * chunks * 32;
  p.shared = 16 + 2 * p.state * 16 + p.shared_weights() + received;
  return p;
}

// A block for each slice; they need not be on the device together.
inline Layout lay_out_single(Phase phase, const Recurrence& r) {
  const bool forward = phase == Phase::forward;
  Layout p = {};
  p.single = true, p.units = kSingleUnits, p.columns = 1, p.members = 1, p.parts = 1;
  p.width = forward ? 4 : 1, p.rounds = forward ? kSingleForwardRounds : kSingleBackwardRounds;
  p.held = p.rounds;
  p.slices = p.groups = static_cast<int>(up(r.B, kSingleRows));
  p.state = p.rounds * 32, p.shared = 2 * p.state * 16;
  return p;
}
inline bool fits_single(const Recurrence& r) { return r.element == 2 && r.H <= kSingleUnits; }

// Microseconds of a step of all slices, without the products before and after the loop: a model whose
// constants were fitted to times of an H100 (docs/gpu-kernels.md, "Time per step"). On other devices only the
// order of what it compares has a meaning.
inline double predicted(const Recurrence& r, const DeviceLimits& device, const Layout& p) {
  constexpr double kClock = 1755;                      // MHz
  constexpr double kL2 = 64, kAllL2 = 4.0e6 / kClock;  // bytes a clock: an SM's, and all of theirs
  constexpr double kShared = 128;                      // bytes a clock of an SM
  constexpr double kPeers = 2.65e6 / kClock / 132;     // bytes a clock an SM takes in of other SMs'
  constexpr double kMma = 0.63 * 2048;                 // multiply-adds a clock of an SM, in 16 bits
  constexpr double kPushTrip = 0.4, kTurn = 2.0;       // us
  const double flag_trip = 0.8 + 0.033 * p.members;    // us: more flags to poll, and later ones
  // us, with the barriers around it; a thread has an element for every 8 rows
  const double cell = (p.scatters ? 1.4 : 1.0) * (p.cluster ? 0.6 + 0.4 * p.columns : 1);
  const double rows = 8 * p.columns, units = p.members * p.units;
  const double mma = 4 * units * p.units * rows / kMma * r.element / 2;
  const double weights = p.shared_weights() / kShared;
  if (p.cluster) {
    const double push = (p.members - 1) * p.units * rows * (p.scatters ? 4 : r.element) / kPeers;
    const double read = 16.0 * p.state * (kPlanWarps / p.parts) / kShared;
    // Products are pushed while others are made; h when it is whole.
    const double terms = p.scatters ? units * rows * 4 : 2 * p.parts * 4.0 * p.units * rows * 4;
    const double product = std::max(mma, weights + read);
    const double work = (p.scatters ? std::max(product, push) : product + push) + terms / kShared;
    const double fit = std::max(1, std::min(device.clusters, device.sms / p.members));
    return (work / kClock + cell + kPushTrip) * std::ceil(r.D * p.slices / fit);
  }
  const double taken = 16.0 * p.state;
  const double fetch = std::max(taken / kL2, taken * p.blocks(r.D) / kAllL2);
  const double sums = 2.0 * kPlanWarps * rows * 16 * p.width * 4 / kShared;
  const double work = (std::max({fetch, weights, mma}) + sums) / kClock + cell;
  const double turns = std::ceil(static_cast<double>(p.slices) / p.groups);
  return turns == 1 ? work + flag_trip : turns * (work + kTurn);
}

// Microseconds of a step of the step-wise kernels: the largest of the host's two launches (measured: H100,
// docs/gpu-kernels.md), W_hh on its way to the SMs (fitted), and the arithmetic and traffic of B rows
// (calculated: the GEMM at 600 TFLOP/s in 16 bits, then what the kernels read and write of float32 sums and
// of the rest at 3 TB/s).
inline double predicted_by_step(Phase phase, const Recurrence& r) {
  constexpr double kMacsPerUs = 3.0e8, kBytesPerUs = 3.0e6;
  const bool forward = phase == Phase::forward;
  const double host = forward ? 12 : 17;
  const double weights = 4.0 * r.H * r.H * r.D, elements = static_cast<double>(r.H) * r.B * r.D;
  // Forward: gates_h written and read, gates_x read, c read and written; y, h and cells, and the activated
  // gates. Backward: dh and dc written and read; gates, dgates, cells of two steps and dy.
  const double bytes = forward ? 56 + 7 * r.element : 16 + 11 * r.element;
  const double rows = weights * r.B / kMacsPerUs * r.element / 2 + elements * bytes / kBytesPerUs;
  return std::max({host, 0.6e-6 * weights * r.element, rows});
}

// The best layout of tier A, or why there is none.
inline Plan plan_clusters(Phase phase, const Recurrence& r, const DeviceLimits& device) {
  if (device.cluster == 0) return {"this GPU has no thread-block clusters"};
  const int64_t members = cluster_members(r.H);
  if (members > device.cluster) {
    return {"a cluster of " + std::to_string(members) + " blocks exceeds " + std::to_string(device.cluster)};
  }
  // Slices of 8 rows, or of 16 where that saves turns. In TF32 backward's registers have no room for 16.
  Layout best = {};
  for (const int columns : {1, 2}) {
    if (columns == 2 && phase == Phase::backward && r.element == 4) continue;
    const Layout p = lay_out_clusters(phase, r, cluster_held(phase, r.element, columns), columns);
    if (device.clusters < 1 || p.shared > device.shared || p.blocks(r.D) > std::numeric_limits<int>::max())
      continue;
    if (best.members == 0 || predicted(r, device, p) < predicted(r, device, best)) best = p;
  }
  if (best.members == 0) return {"no cluster of " + std::to_string(members) + " such blocks fits this GPU"};
  return {"", best};
}

// The best layout of tier B; without members if none fits.
inline Layout lay_out_anywhere(Phase phase, const Recurrence& r, const DeviceLimits& device) {
  const auto& variants = phase == Phase::forward ? kForwardVariants : kBackwardVariants;
  // More units fit no wave of blocks, and would overflow the search.
  if (r.H > 32 * static_cast<int64_t>(device.sms)) return {};
  for (const Variant& v : variants) {
    const Layout one = lay_out(phase, r, device, v, 1);
    if (one.shared > device.shared || one.members * r.D > device.sms || one.members > kMaxFlags) continue;
    if (one.slices <= one.groups) return one;
    // Twice the rows at once where the groups cannot take all slices of 8 side by side.
    const Layout two = lay_out(phase, r, device, v, 2);
    return two.shared <= device.shared ? two : one;
  }
  return {};
}

inline Plan plan(Phase phase, const Recurrence& r, const DeviceLimits& device, char asked = 0) {
  if (r.P != r.H) return {"proj_size > 0 has no persistent kernel"};
  if (r.element == 0)
    return {"only float16, bfloat16, and float32 at TF32 precision have persistent kernels"};
  if (r.H < 1 || r.B < 1) return {"there is nothing to compute"};
  if (device.sms < 1) return {"there is no GPU that can launch blocks together"};
  // Only where asked for: that it is the fastest, at a calculated 0.65 us a step forward, has not been
  // measured.
  if (asked == 'S' && fits_single(r) && up(r.B, kSingleRows) * r.D <= std::numeric_limits<int>::max())
    return {"", lay_out_single(phase, r), "tier S: asked for S"};
  const Plan a = plan_clusters(phase, r, device);
  const Layout b = lay_out_anywhere(phase, r, device);
  const bool fits_a = a.reason.empty(), fits_b = b.members > 0;
  if (!fits_a && !fits_b) {
    const std::string both = r.D == 2 ? " of both directions" : "";
    return {"W_hh" + both + " at H=" + std::to_string(r.H) + ", " +
            std::to_string((4 * r.H * r.H * r.element * r.D) >> 20) +
            " MiB, does not fit into the registers and shared memory of " + std::to_string(device.sms) +
            " SMs"};
  }
  constexpr double kNever = std::numeric_limits<double>::infinity();
  const double time_a = fits_a ? predicted(r, device, a.layout) : kNever;
  const double time_b = fits_b ? predicted(r, device, b) : kNever;
  const double by_step = predicted_by_step(phase, r);
  const auto us = [](double time) {
    const auto tenths = static_cast<int64_t>(10 * time + 0.5);
    return std::to_string(tenths / 10) + "." + std::to_string(tenths % 10) + " us a step";
  };
  const bool take_a = fits_a && (asked == 'A' || !fits_b || (asked == 0 && time_a < time_b));
  const double taken = take_a ? time_a : time_b;
  if (asked == 0 && by_step < taken)
    return {"predicted " + us(by_step) + ", persistent kernels " + us(taken)};
  std::string why = asked ? "asked for " + std::string(1, asked) : "predicted " + us(taken);
  why += !fits_a   ? "; not A: " + a.reason
         : !fits_b ? "; not B: it needs more SMs"
         : asked   ? ""
                   : ", tier " + std::string(take_a ? "B " : "A ") + us(take_a ? time_b : time_a);
  return {"", take_a ? a.layout : b, std::string(take_a ? "tier A: " : "tier B: ") + why};
}

}  // namespace fastlstm::cuda
