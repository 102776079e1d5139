// A block of the persistent forward kernel; how it is in touch with its group is that one's affair (Group,
// described in group_flags.h).
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

// h between the steps: from the slot that entered the step to the one that enters the next.
template <class T>
struct Exchanged {
  const T* from;
  T* to;
  FASTLSTM_HD Vec<Acc<T>, 1> load() const { return cuda::load<1>(from); }
  FASTLSTM_HD void store(const Vec<Acc<T>, 1>& x) const { cuda::store<1>(to, x); }
};

template <class T, class Group>
struct ForwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = (kUnits * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread

  static FASTLSTM_DEVICE void run(const PersistentForward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
    for (int slice = member.group; slice < p.slices; slice += p.groups) enter(s, warp, member, slice, group);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        step(s, warp, member, slice, i, group);
      }
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Moment moment(const PersistentForward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? at : s.step.steps.T - 1 - at;
    return {t, t - s.slot_t[d], at == 0, at == s.step.steps.T - 1};
  }

  // Sends the h that enters the launch's first step, as state 0.
  static FASTLSTM_DEVICE void enter(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                    int slice, Group& group) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    const Moment m = moment(s, member.d, 0);
#pragma unroll 1
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        const int64_t at = (member.d * B + e.b) * H + e.j;
        Vec<Acc<T>, 1> h = m.first ? load_or_zeros<1>(s.step.state.h0, at) : load<1>(s.step.state.h + at);
        if (m.first && enters_fresh(s.step.steps, member.d, m.t, e.b)) h = zeros<Acc<T>, 1>();
        store<1>(group.own(warp, slice, 0, e.row, e.unit), h);
      }
    }
    group.send(warp, slice, 0);
  }

  // From state i to state i + 1.
  static FASTLSTM_DEVICE void step(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Group& group) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    const Moment m = moment(s, member.d, i);
    const bool last = i == s.count - 1;

    PerLane<ForwardInput<Acc<T>, 1>> in[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) in[q][lane] = forward_input<T, 1>(s.step, m, member.d, e.b, e.j);
      }
    }
    group.receive(warp, slice, i);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        ForwardInput<Acc<T>, 1>& x = in[q][lane];
#pragma unroll
        for (int g = 0; g < 4; ++g) x.gates[g].v[0] += group.sum(warp, i, g * kUnits + e.unit, e.row);
        const Exchanged<T> kept = {group.own(warp, slice, i, e.row, e.unit),
                                   last ? s.step.state.h + (member.d * B + e.b) * H + e.j
                                        : group.own(warp, slice, i + 1, e.row, e.unit)};
        forward_output<T, 1>(s.step, m, member.d, e.b, e.j, x.valid, x.c, x.gates, kept);
      }
    }
    if (last) {
      warp.block_sync();  // the sums have been read
    } else {
      group.send(warp, slice, i + 1);
    }
  }
};

}  // namespace fastlstm::cuda
