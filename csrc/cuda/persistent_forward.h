// A block of the persistent forward kernel; how it is in touch with its group is that one's affair (Group,
// described in group_flags.h).
//
// What lies between a state's arrival and the sending of the next bounds the step. So a thread keeps what it
// can of its elements in registers, and reads the next x W_ih^T and stores results after the state is sent.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group>
struct ForwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = (kUnits * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread
  using A = Acc<T>;

  // An element of a slice, and what a thread keeps of it from step to step.
  struct Track {
    int length;    // steps of its row
    int64_t at;    // its place in [T, B, D*H] at the coming step
    int64_t wide;  // that of its gate i in [D, slots, B, 4H]
    A c;           // that enters the step
    A x[4];        // x W_ih^T
  };
  using Tracks = PerLane<Track>[kElements];
  using Biases = PerLane<A>[kElements][4];

  static FASTLSTM_DEVICE void run(const PersistentForward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
    Tracks tracks;
    Biases bias;
    read_biases(s, warp, member, bias);
    // With one slice in its charge, the block keeps it in registers from here on.
    const bool many = p.slices > p.groups;
    for (int slice = member.group; slice < p.slices; slice += p.groups) enter(s, warp, member, slice, group);
    if (!many) open(s, warp, member, member.group, 0, tracks);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        if (many) open(s, warp, member, slice, i, tracks);
        step(s, warp, member, slice, i, many, group, bias, tracks);
      }
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Moment moment(const PersistentForward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? at : s.step.steps.T - 1 - at;
    return {t, t - s.slot_t[d], at == 0, at == s.step.steps.T - 1};
  }
  // Elements of a [B, 4H] that lies beyond step t's in the direction's order.
  static FASTLSTM_DEVICE int64_t stride(const PersistentForward<T>& s, int d) {
    return (d == 0 ? 4 : -4) * s.step.steps.B * s.step.H;
  }
  static FASTLSTM_DEVICE int64_t of_state(const PersistentForward<T>& s, int d, const Element& e) {
    return (d * s.step.steps.B + e.b) * s.step.H + e.j;
  }
  static FASTLSTM_DEVICE void read_x(const PersistentForward<T>& s, Track& x) {
#pragma unroll
    for (int g = 0; g < 4; ++g) x.x[g] = s.step.gates_x[x.wide + g * s.step.H];
  }

  // b_ih + b_hh of the thread's units, which are the same in all slices.
  static FASTLSTM_DEVICE void read_biases(const PersistentForward<T>& s, const Warp& warp,
                                          const Member& member, Biases& bias) {
    const int64_t H = s.step.H;
    const T *ih = s.step.bias_ih[member.d], *hh = s.step.bias_hh[member.d];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, 0, H, kSliceRows);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          bias[q][g][lane] =
              !e.exists ? 0 : load_or_zeros<1>(ih, g * H + e.j).v[0] + load_or_zeros<1>(hh, g * H + e.j).v[0];
        }
      }
    }
  }

  // The thread's elements of a slice as they enter the launch's step i.
  static FASTLSTM_DEVICE void open(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Tracks& tracks) {
    const ForwardStep<T>& f = s.step;
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
        x.wide = ((d * f.slots + m.slot) * B + e.b) * 4 * H + e.j;
        x.c = m.first ? load_or_zeros<1>(f.c0, state).v[0] : f.c[state];
        read_x(s, x);
      }
    }
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
        const int64_t at = of_state(s, member.d, e);
        Vec<A, 1> h = m.first ? load_or_zeros<1>(s.step.state.h0, at) : load<1>(s.step.state.h + at);
        if (m.first && enters_fresh(s.step.steps, member.d, m.t, e.b)) h = zeros<A, 1>();
        store<1>(group.own(warp, slice, 0, e.row, e.unit), h);
      }
    }
    group.send(warp, slice, 0);
  }

  // From state i to state i + 1.
  static FASTLSTM_DEVICE void step(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, bool many, Group& group, const Biases& bias,
                                   Tracks& tracks) {
    const Steps& steps = s.step.steps;
    const int64_t B = steps.B, H = s.step.H;
    const int d = member.d;
    const Moment m = moment(s, d, i);
    const bool last = i == s.count - 1;

    PerLane<Gates<A>> gates[kElements];
    PerLane<A> h[kElements];
    group.receive(warp, slice, i);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        Track& x = tracks[q][lane];
        Gates<A>& gate = gates[q][lane];
        if (m.t < x.length) {
          const auto sum = [&](int g) {
            return x.x[g] + bias[q][g][lane] + group.sum(warp, i, g * kUnits + e.unit, e.row);
          };
          gate = activate<Fast>(Gates<A>{sum(0), sum(1), sum(2), sum(3)});
          x.c = next_c(gate, enters_fresh(steps, d, m.t, e.b) ? 0 : x.c);
          h[q][lane] = gate.o * Fast::tanh(x.c);
        } else {
          gate = {0, 0, 0, 0};
          h[q][lane] = widen(*group.own(warp, slice, i, e.row, e.unit));
        }
        // The next product reads the state as it stands, so a reset is applied where it is written.
        const A next = enters_fresh(steps, d, step_after(d, m.t), e.b) ? 0 : h[q][lane];
        if (!last) {
          narrow(next, *group.own(warp, slice, i + 1, e.row, e.unit));
        } else if (!m.last) {
          narrow(next, s.step.state.h[of_state(s, d, e)]);
        }
      }
    }
    if (last) {
      warp.block_sync();  // the sums have been read
    } else {
      group.send(warp, slice, i + 1);
    }
    fetch(s, warp, member, slice, i + kStepsAhead);
    const bool stays = !many && !last;
    if (stays) read_ahead(s, warp, member, slice, tracks);
    put_out(s, warp, member, slice, m, stays, gates, h, tracks);
  }

  static FASTLSTM_DEVICE void read_ahead(const PersistentForward<T>& s, const Warp& warp,
                                         const Member& member, int slice, Tracks& tracks) {
    const int64_t B = s.step.steps.B, H = s.step.H;
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        tracks[q][lane].wide += stride(s, member.d);
        read_x(s, tracks[q][lane]);
      }
    }
  }

  // Into L2 what the block will read at the launch's step i: one line, or two, for each row and gate.
  static FASTLSTM_DEVICE void fetch(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                    int slice, int i) {
    const int64_t B = s.step.steps.B, H = s.step.H, slot = moment(s, member.d, i).slot;
    const int unit = member.index * kUnits;
    if (i >= s.count || unit >= H) return;
    for (const int lane : warp.lanes()) {
      const int row = (warp.index() * 32 + lane) / 4, gate = lane % 4;
      const int64_t b = int64_t{slice} * kSliceRows + row;
      if (row >= kSliceRows || b >= B) continue;
      prefetch(s.step.gates_x + (((member.d * s.step.slots + slot) * B + b) * 4 + gate) * H + unit);
    }
  }

  // What a step gives but for the state; `stays`: the tracks go on with the next step, which was read ahead.
  static FASTLSTM_DEVICE void put_out(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                      int slice, const Moment& m, bool stays,
                                      const PerLane<Gates<A>> (&gates)[kElements],
                                      const PerLane<A> (&h)[kElements], Tracks& tracks) {
    const ForwardStep<T>& f = s.step;
    const int d = member.d;
    const int64_t B = f.steps.B, H = f.H;
    // From [D, slots, B, 4H] to [D, T, B, 4H], and back over what was read ahead.
    const int64_t shift = (d * (f.steps.T - f.slots) + s.slot_t[d]) * B * 4 * H - (stays ? stride(s, d) : 0);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<kUnits, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        Track& x = tracks[q][lane];
        const bool valid = m.t < x.length;
        narrow(valid ? h[q][lane] : 0, f.state.y[x.at]);
        if (f.cells) narrow(valid ? x.c : 0, f.cells[x.at]);
        if (f.gates) {
          const Gates<A>& gate = gates[q][lane];
          T* const to = f.gates + shift + x.wide;
          narrow(gate.i, to[0]);
          narrow(gate.f, to[H]);
          narrow(gate.g, to[2 * H]);
          narrow(gate.o, to[3 * H]);
        }
        if (!stays) {
          const int64_t state = of_state(s, d, e);
          if (m.last) {
            narrow(x.c, f.c_n[state]);
            narrow(h[q][lane], f.state.h_n[state]);
          } else {
            f.c[state] = x.c;
          }
        }
        x.at += stride(s, d) / 4 * f.D;
      }
    }
  }
};

}  // namespace fastlstm::cuda
