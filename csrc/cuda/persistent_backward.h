// A block of the persistent backward kernel; how it is in touch with its group is that one's affair (Group,
// described in group_flags.h).
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group>
struct BackwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = (kUnits * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread

  static FASTLSTM_DEVICE void run(const PersistentBackward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        step(s, warp, member, slice, i, group);
      }
    }
    if (s.dh) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups)
        finish(s, warp, member, slice, group);
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Moment moment(const PersistentBackward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? s.step.steps.T - 1 - at : at;
    return {t, t - s.slot_t[d], at == 0, false};
  }

  // State i: the gradients of the gates of the launch's step i.
  static FASTLSTM_DEVICE void step(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Group& group) {
    const Steps& steps = s.step.steps;
    const int64_t B = steps.B, H = s.step.H;
    const Moment m = moment(s, member.d, i);

    PerLane<BackwardInput<Acc<T>, 1>> in[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) in[q][lane] = backward_input<T, 1>(s.step, m, member.d, e.b, e.j);
      }
    }
    if (i > 0) group.receive(warp, slice, i - 1);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        BackwardInput<Acc<T>, 1>& x = in[q][lane];
        Vec<Acc<T>, 1> dh;
        if (i > 0) {
          dh.v[0] = group.sum(warp, i - 1, e.unit, e.row);
        } else {
          dh = product_dh<T, 1>(steps, s.step.gradient, m.first, member.d, e.b, e.j);
        }
        dh = take_dh<T, 1>(steps, s.step.gradient, m.first, member.d, m.t, e.b, e.j, dh, x.dy);
        backward_output<T, 1>(s.step, m, member.d, e.b, e.j, x, dh);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          store<1>(group.own(warp, slice, i, e.row, g * kUnits + e.unit), x.a[g]);
        }
      }
    }
    if (i == s.count - 1 && !s.dh) {
      warp.block_sync();  // the sums have been read
    } else {
      group.send(warp, slice, i);
    }
  }

  // dh of the step that follows the launch.
  static FASTLSTM_DEVICE void finish(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                     int slice, Group& group) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    group.receive(warp, slice, s.count - 1);
#pragma unroll 1
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) s.dh[(member.d * B + e.b) * H + e.j] = group.sum(warp, s.count - 1, e.unit, e.row);
      }
    }
    warp.block_sync();  // the sums have been read
  }
};

}  // namespace fastlstm::cuda
