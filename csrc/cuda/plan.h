// How a layer's recurrence is laid over the device for the persistent kernels, or why it is not: a pure
// function of sizes, type and device, and of B for the division of the batch alone. No header but the
// standard's, so that every build has it and the tests can ask it.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <string>

namespace fastlstm::cuda {

// Whether the persistent kernels may run at all: off, since no GPU has run them yet (docs/gpu-notes.md).
inline std::atomic<bool> persistent_enabled{false};

struct DeviceLimits {
  int sms;         // streaming multiprocessors
  int64_t shared;  // bytes of shared memory one block may ask for
};

enum class Phase { forward, backward };

struct Recurrence {
  int64_t H, P, B;
  int D;
  int element;  // bytes: 2 for float16 and bfloat16, 4 for TF32; 0 for what tensor cores have no product for
};

// The product of a step is A [rows, K] times the state [K, 8 * columns]; A stays in the block. A row of A or
// of the state is cut into chunks of 64 bytes of K, which the 8 warps of a block divide among them.
//   forward   A [4 * units, H]: the gates' rows of the block's units          state: h [B, H]
//   backward  A [units, 4 * members * units]: the block's columns of W_hh     state: dgates [B, 4H]
struct Layout {
  int units;       // hidden units of a block
  int held;        // chunks of A in registers, per warp; the others are in shared memory
  int columns;     // tiles of 8 rows of the batch in a slice, which a block takes at once
  int chunks;      // per warp; the last warps' may be padding
  int members;     // blocks of a group, which holds one copy of W_hh
  int groups;      // per direction; they never wait for each other
  int slices;      // of the batch; group g takes slices g, g + groups, ...
  int64_t state;   // 16-byte words of a slice's state: [columns, 8 * chunks, 32 lanes]
  int64_t shared;  // bytes of shared memory of a block

  int blocks(int D) const { return D * groups * members; }
};

struct Plan {
  std::string reason;  // why the step-wise path runs instead; empty when the layout serves
  Layout layout = {};
};

constexpr int kPlanWarps = 8;       // kWarps in cuda/warp.cuh
constexpr int kChunkBytesOfK = 64;  // 16 bytes of a lane, four lanes to a row
// A persistent launch loads all of W_hh first; for fewer steps than this it does not pay.
constexpr int64_t kLeastSteps = 4;

// What the kernels are compiled for, best first: as many units as fit, since what a block must take in per
// step is the whole state, whatever part of it the block makes.
struct Variant {
  int units;
  int held[2];  // chunks in registers for slices of 8 and of 16 rows, as ptxas can place them
};
constexpr Variant kForwardVariants[] = {{32, {2, 1}}, {32, {1, 1}}, {16, {4, 4}}};
constexpr Variant kBackwardVariants[] = {{32, {8, 5}}, {32, {4, 4}}, {16, {16, 16}}};

inline Layout lay_out(Phase phase, const Recurrence& r, const DeviceLimits& device, const Variant& v,
                      int columns) {
  const bool forward = phase == Phase::forward;
  Layout p = {};
  p.units = v.units, p.held = v.held[columns - 1], p.columns = columns;
  p.members = static_cast<int>((r.H + v.units - 1) / v.units);
  const int64_t rows = forward ? 4 * v.units : v.units;
  const int64_t K = static_cast<int64_t>(p.members) * v.units * (forward ? 1 : 4);
  const int64_t chunks = (K * r.element + kChunkBytesOfK - 1) / kChunkBytesOfK;
  p.chunks = std::max(p.held, static_cast<int>((chunks + kPlanWarps - 1) / kPlanWarps));
  const int64_t weights = static_cast<int64_t>(p.chunks - p.held) * kPlanWarps * rows * kChunkBytesOfK;
  const int64_t partial_sums = static_cast<int64_t>(kPlanWarps) * 8 * columns * (rows + 4) * 4;
  p.shared = weights + partial_sums;
  p.state = static_cast<int64_t>(columns) * p.chunks * kPlanWarps * 32;
  p.slices = static_cast<int>((r.B + 8 * columns - 1) / (8 * columns));
  p.groups = std::min(p.slices, device.sms / (p.members * r.D));
  return p;
}

inline Plan plan(Phase phase, const Recurrence& r, const DeviceLimits& device) {
  if (r.P != r.H) return {"proj_size > 0 has no persistent kernel"};
  if (r.element == 0)
    return {"only float16, bfloat16, and float32 at TF32 precision have persistent kernels"};
  if (r.H < 1 || r.B < 1) return {"there is nothing to compute"};
  if (device.sms < 1) return {"there is no GPU that can launch blocks together"};
  const auto& variants = phase == Phase::forward ? kForwardVariants : kBackwardVariants;
  // A layer of more units than this fits no wave of blocks, and would overflow the search.
  for (int k = 0; k < 3 && r.H <= 32 * static_cast<int64_t>(device.sms); ++k) {
    const Variant& v = variants[k];
    const Layout one = lay_out(phase, r, device, v, 1);
    // The next variant fits a small state without padding, with as many units.
    const bool padded = k + 1 < 3 && variants[k + 1].units == v.units &&
                        lay_out(phase, r, device, variants[k + 1], 1).chunks < v.held[0];
    if (padded || one.shared > device.shared || one.members * r.D > device.sms) continue;
    if (one.slices <= one.groups) return {"", one};
    // Twice the rows at once where the groups cannot take all slices of 8 side by side.
    const Layout two = lay_out(phase, r, device, v, 2);
    return {"", two.shared <= device.shared ? two : one};
  }
  const std::string both = r.D == 2 ? " of both directions" : "";
  return {"W_hh" + both + " at H=" + std::to_string(r.H) + ", " +
          std::to_string((4 * r.H * r.H * r.element * r.D) >> 20) +
          " MiB, does not fit into the registers and shared memory of " + std::to_string(device.sms) +
          " SMs"};
}

}  // namespace fastlstm::cuda
