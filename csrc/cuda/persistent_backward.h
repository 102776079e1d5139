// A block of the persistent backward kernel; how it is in touch with its group is that one's affair (Group,
// described in group_flags.h). As in forward, a thread keeps what it can in registers, and reads the next
// step's input and stores results after the state is sent.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group>
struct BackwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = (kUnits * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread
  using A = Acc<T>;

  // An element of a slice, and what a thread keeps of it from step to step.
  struct Track {
    int length;         // steps of its row
    int64_t at;         // its place in [T, B, D*H] at the step that is read
    int64_t wide;       // that of its gate i in [D, T, B, 4H]
    A dc;               // of the c that the step done before has left
    T gates[4], c, dy;  // of the coming step; dy: unless there is none
    T c_prev;           // unless the step enters with c0 or with zeros
  };
  using Tracks = PerLane<Track>[kElements];

  static FASTLSTM_DEVICE void run(const PersistentBackward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
    Tracks tracks;
    // With one slice in its charge, the block keeps it in registers from here on.
    const bool many = p.slices > p.groups;
    if (!many) open(s, warp, member, member.group, 0, tracks);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        if (many) open(s, warp, member, slice, i, tracks);
        step(s, warp, member, slice, i, many, group, tracks);
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
  // Elements of a [B, H] that lies beyond step t's in the direction's order, in which backward goes back.
  static FASTLSTM_DEVICE int64_t stride(const PersistentBackward<T>& s, int d) {
    return (d == 0 ? 1 : -1) * s.step.steps.B * s.step.H;
  }
  static FASTLSTM_DEVICE int64_t of_state(const PersistentBackward<T>& s, int d, const Element& e) {
    return (d * s.step.steps.B + e.b) * s.step.H + e.j;
  }

  // What forward saved of step t, and dy. Past a row's length that may be anything, and is not used.
  static FASTLSTM_DEVICE void read(const PersistentBackward<T>& s, int d, int64_t t, const Element& e,
                                   Track& x) {
    const BackwardStep<T>& f = s.step;
    const HiddenGradient<T>& y = f.gradient;
#pragma unroll
    for (int g = 0; g < 4; ++g) x.gates[g] = f.gates[x.wide + g * f.H];
    x.c = f.cells[x.at];
    if (t != (d == 0 ? 0 : f.steps.T - 1)) x.c_prev = f.cells[x.at - stride(s, d) * f.D];
    if (y.dy) x.dy = y.dy[t * y.dy_t + e.b * y.dy_b + d * f.H + e.j];
  }

  // The thread's elements of a slice as they enter the launch's step i.
  static FASTLSTM_DEVICE void open(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Tracks& tracks) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H;
    const int d = member.d;
    const Moment m = moment(s, d, i);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        Track& x = tracks[q][lane];
        const int64_t state = of_state(s, d, e);
        x.length = static_cast<int>(f.steps.lengths ? f.steps.lengths[e.b] : f.steps.T);
        x.at = ((m.t * B + e.b) * f.D + d) * H + e.j;
        x.wide = ((d * f.steps.T + m.t) * B + e.b) * 4 * H + e.j;
        x.dc = m.first ? load_or_zeros<1>(f.dc_n, state).v[0] : f.dc[state];
        read(s, d, m.t, e, x);
      }
    }
  }

  // The step's input as step.h's functions have it; zeros, but for dc, of a row that lacks the step.
  static FASTLSTM_DEVICE BackwardInput<A, 1> input(const PersistentBackward<T>& s, int d, int64_t t,
                                                   const Element& e, const Track& x) {
    const BackwardStep<T>& f = s.step;
    BackwardInput<A, 1> in = {t < x.length, {x.dc}, {0}, {{0}, {0}, {0}, {0}}, {0}, {0}};
    if (!in.valid) return in;
#pragma unroll
    for (int g = 0; g < 4; ++g) in.a[g].v[0] = widen(x.gates[g]);
    in.c.v[0] = widen(x.c);
    if (f.gradient.dy) in.dy.v[0] = widen(x.dy);
    if (f.dcells) add(in.dc, load<1>(f.dcells + t * f.dcells_t + e.b * f.dcells_b + d * f.H + e.j));
    if (d == 0 ? t == 0 : t + 1 == x.length) {
      in.c_prev = load_or_zeros<1>(f.c0, of_state(s, d, e));
    } else {
      in.c_prev.v[0] = widen(x.c_prev);
    }
    if (enters_fresh(f.steps, d, t, e.b)) in.c_prev.v[0] = 0;
    return in;
  }

  // State i: the gradients of the gates of the launch's step i.
  static FASTLSTM_DEVICE void step(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, bool many, Group& group, Tracks& tracks) {
    const Steps& steps = s.step.steps;
    const int64_t B = steps.B, H = s.step.H;
    const int d = member.d;
    const Moment m = moment(s, d, i);
    const bool last = i == s.count - 1;

    PerLane<BackwardInput<A, 1>> in[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        Track& x = tracks[q][lane];
        in[q][lane] = input(s, d, m.t, e, x);
      }
    }
    if (i > 0) group.receive(warp, slice, i - 1);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        Track& x = tracks[q][lane];
        BackwardInput<A, 1>& from = in[q][lane];
        Vec<A, 1> dh;
        if (i > 0) {
          dh.v[0] = group.sum(warp, i - 1, e.unit, e.row);
        } else {
          dh = product_dh<T, 1>(steps, s.step.gradient, m.first, d, e.b, e.j);
        }
        dh = take_dh<T, 1>(steps, s.step.gradient, m.first, d, m.t, e.b, e.j, dh, from.dy);
        backward_cell<Fast>(steps, d, m.t, e.b, from, dh);
        x.dc = from.dc.v[0];
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          store<1>(group.own(warp, slice, i, e.row, g * kUnits + e.unit), from.a[g]);
        }
      }
    }
    if (last && !s.dh) {
      warp.block_sync();  // the sums have been read
    } else {
      group.send(warp, slice, i);
    }
    fetch(s, warp, member, slice, i + kStepsAhead);
    const bool stays = !many && !last;
    if (stays) {
#pragma unroll
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) {
          const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
          if (!e.exists) continue;
          Track& x = tracks[q][lane];
          x.at -= stride(s, d) * s.step.D, x.wide -= 4 * stride(s, d);
          read(s, d, step_before(d, m.t), e, x);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) backward_store<T, 1>(s.step, m, d, e.b, e.j, in[q][lane], !stays);
      }
    }
  }

  // Into L2 what the block will read at the launch's step i: of each row its gates, c of the step before, dy.
  static FASTLSTM_DEVICE void fetch(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                    int slice, int i) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H, t = moment(s, member.d, i).t, before = step_before(member.d, t);
    const int unit = member.index * kUnits;
    if (i >= s.count || unit >= H) return;
    for (const int lane : warp.lanes()) {
      const int row = (warp.index() * 32 + lane) / 8, what = lane % 8;
      const int64_t b = int64_t{slice} * kSliceRows + row;
      if (row >= kSliceRows || b >= B) continue;
      if (what < 4) {
        prefetch(f.gates + (((member.d * f.steps.T + t) * B + b) * 4 + what) * H + unit);
      } else if (what == 4 && before >= 0 && before < f.steps.T) {
        prefetch(f.cells + ((before * B + b) * f.D + member.d) * H + unit);
      } else if (what == 5 && f.gradient.dy) {
        prefetch(f.gradient.dy + t * f.gradient.dy_t + b * f.gradient.dy_b + member.d * H + unit);
      }
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
        if (e.exists) s.dh[of_state(s, member.d, e)] = group.sum(warp, s.count - 1, e.unit, e.row);
      }
    }
    warp.block_sync();  // the sums have been read
  }
};

}  // namespace fastlstm::cuda
