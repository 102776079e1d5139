// A block of the persistent forward kernel; how it communicates with its group is defined by Group
// (group_flags.h).
//
// The critical path of a step runs from the arrival of a state to the sending of the next: the product, the
// sums, the cell and one store. So a thread keeps what it can of its elements in registers, addresses
// included, and reads the next x W_ih^T and stores results after the state is sent. Without lengths and
// resets no row is checked: RAGGED is an instantiation of its own (tests/gpu/test_cuda_sass.py counts the
// instructions).
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group, bool RAGGED>
struct ForwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = Group::Elements::kElements;  // of a thread
  using A = Acc<T>;
  // TF32 computes the place of its outputs again in each step: there are no registers for it.
  static constexpr bool kKeepsPlace = sizeof(T) == 2;

  // An element of a slice, and what a thread keeps of it from step to step.
  struct ThreadState {
    typename Group::Place own;  // of its h in the state that the step makes
    int sum;                    // of its gates; below zero where there is no such element
    int length;                 // RAGGED: steps of its row
    bool fresh;                 // RAGGED: whether the next step is entered with zeros
    int64_t at;                 // in 16 bits: its place in [T, B, D*H] at the coming step
    int64_t wide;               // its gate i in [D, slots, B, 4H] at the coming step
    A c;                        // that enters the step, a reset applied
    A x[4];                     // x W_ih^T

    FASTLSTM_DEVICE bool exists() const { return sum >= 0; }
  };
  using ThreadStates = PerLane<ThreadState>[kElements];
  using Biases = PerLane<A>[kElements][4];

  static FASTLSTM_DEVICE void run(const PersistentForward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
    ThreadStates elements;
    Biases bias;
    read_biases(s, warp, member, bias);
    // With one slice in its charge, the block keeps it in registers from here on.
    const bool many = !kCluster && p.slices > p.groups;
    for (int slice = member.group; slice < p.slices; slice += p.groups) enter(s, warp, member, slice, group);
    if (!many) open(s, warp, member, member.group, 0, group, elements);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        if (many) open(s, warp, member, slice, i, group, elements);
        step(s, warp, member, slice, i, many, group, bias, elements);
      }
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Element element(const PersistentForward<T>& s, const Warp& warp, int lane, int q,
                                         const Member& member, int slice) {
    return Group::Elements::element(warp, lane, q, member.index, slice, s.step.H, s.step.steps.B);
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
  static FASTLSTM_DEVICE void read_x(const PersistentForward<T>& s, ThreadState& x) {
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
        const Element e = Group::Elements::element(warp, lane, q, member.index, 0, H, kSliceRows);
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
                                   int slice, int i, Group& group, ThreadStates& elements) {
    const ForwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H;
    const int d = member.d;
    const Moment m = moment(s, d, i);
    group.bind(warp, slice, i);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, member, slice);
        ThreadState& x = elements[q][lane];
        x.sum = keep(e.exists ? group.sum_at(4 * e.unit, e.row) : -1);
        if (!e.exists) continue;
        const int64_t state = of_state(s, d, e);
        x.own = group.place(warp, e.row, e.unit);
        if constexpr (kKeepsPlace) x.at = ((m.t * B + e.b) * f.D + d) * H + e.j;
        x.wide = ((d * f.slots + m.slot) * B + e.b) * 4 * H + e.j;
        x.c = m.first ? load_or_zeros<1>(f.c0, state).v[0] : f.c[state];
        if constexpr (RAGGED) {
          x.length = static_cast<int>(f.steps.lengths ? f.steps.lengths[e.b] : f.steps.T);
          if (enters_fresh(f.steps, d, m.t, e.b, x.length)) x.c = 0;
          x.fresh = enters_fresh(f.steps, d, step_after(d, m.t), e.b, x.length);
        }
        read_x(s, x);
      }
    }
  }

  // Sends the h that enters the launch's first step, as state 0.
  static FASTLSTM_DEVICE void enter(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                    int slice, Group& group) {
    const Moment m = moment(s, member.d, 0);
    group.bind(warp, slice, -1);
#pragma unroll 1
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, member, slice);
        if (!e.exists) continue;
        const int64_t at = of_state(s, member.d, e);
        Vec<A, 1> h = m.first ? load_or_zeros<1>(s.step.state.h0, at) : load<1>(s.step.state.h + at);
        if (m.first && enters_fresh(s.step.steps, member.d, m.t, e.b)) h = zeros<A, 1>();
        store<1>(group.own(warp, group.place(warp, e.row, e.unit)), h);
      }
    }
    warp.block_sync();
    group.send(warp);
  }

  // From state i to state i + 1.
  static FASTLSTM_DEVICE void step(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, bool many, Group& group, const Biases& bias,
                                   ThreadStates& elements) {
    const Moment m = moment(s, member.d, i);
    const bool last = i == s.count - 1;

    PerLane<Gates<A>> gates[kElements];
    PerLane<A> h[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
#pragma unroll
        for (int g = 0; g < 4; ++g) elements[q][lane].x[g] += bias[q][g][lane];
      }
    }
    group.receive(warp);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        Gates<A>& gate = gates[q][lane];
        if (!RAGGED || m.t < x.length) {
          const float4 sum = group.sum4(warp, lane, q, x.sum);
          gate = activate<Fast>(Gates<A>{x.x[0] + sum.x, x.x[1] + sum.y, x.x[2] + sum.z, x.x[3] + sum.w});
          x.c = next_c(gate, x.c);
          h[q][lane] = gate.o * Fast::tanh(x.c);
        } else {
          gate = {0, 0, 0, 0};
          h[q][lane] = widen(*group.own(warp, group.before(x.own)));
        }
        // The next product reads the state as it stands, so a reset is applied where it is written. After a
        // launch's last step it is not read.
        narrow(RAGGED && x.fresh ? 0 : h[q][lane], *group.own(warp, x.own));
      }
    }
    warp.block_sync();  // the state is there, and the sums have been read
    if (!last) group.send(warp);
    prefetch_l2(s, warp, member, slice, i + kStepsAhead);
    const bool stays = !many && !last;
    PerLane<bool> fresh[kElements];  // after the next step
    if (stays) read_ahead(s, warp, member, slice, m, elements, fresh);
    store_outputs(s, warp, member, slice, m, last, stays, gates, h, elements);
    if (!stays) return;
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        x.own = group.flip(x.own);
        if constexpr (RAGGED) {
          if (x.fresh) x.c = 0;
          x.fresh = fresh[q][lane];
        }
      }
    }
    group.advance(warp);
  }

  static FASTLSTM_DEVICE void read_ahead(const PersistentForward<T>& s, const Warp& warp,
                                         const Member& member, int slice, const Moment& m,
                                         ThreadStates& elements, PerLane<bool> (&fresh)[kElements]) {
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        x.wide += stride(s, member.d);
        read_x(s, x);
        if constexpr (RAGGED) {
          const int64_t t = step_after(member.d, step_after(member.d, m.t));
          fresh[q][lane] =
              enters_fresh(s.step.steps, member.d, t, element(s, warp, lane, q, member, slice).b, x.length);
        }
      }
    }
  }

  // Into L2 what the block will read at the launch's step i: for each row and gate the lines that would be
  // full if they began with the block's units.
  static FASTLSTM_DEVICE void prefetch_l2(const PersistentForward<T>& s, const Warp& warp,
                                          const Member& member, int slice, int i) {
    const int64_t B = s.step.steps.B, H = s.step.H, slot = moment(s, member.d, i).slot;
    constexpr int kOfRow = kLines<A, kUnits>, kOfLine = kUnits / kOfRow;  // units
    if (i >= s.count || member.index * kUnits >= H) return;
    for (const int lane : warp.lanes()) {
      const int thread = warp.index() * 32 + lane, row = thread / (4 * kOfRow), gate = thread / kOfRow % 4;
      const int64_t b = int64_t{slice} * kSliceRows + row;
      const int unit = member.index * kUnits + thread % kOfRow * kOfLine;
      if (row >= kSliceRows || b >= B || unit >= H) continue;
      prefetch(s.step.gates_x + (((member.d * s.step.slots + slot) * B + b) * 4 + gate) * H + unit);
    }
  }

  // What a step gives but for the state that is sent; `stays`: the elements go on with the next step, which
  // was read ahead; `last`: of the launch.
  static FASTLSTM_DEVICE void store_outputs(const PersistentForward<T>& s, const Warp& warp,
                                            const Member& member, int slice, const Moment& m, bool last,
                                            bool stays, const PerLane<Gates<A>> (&gates)[kElements],
                                            const PerLane<A> (&h)[kElements], ThreadStates& elements) {
    const ForwardStep<T>& f = s.step;
    const int d = member.d;
    const int64_t B = f.steps.B, H = f.H;
    // From [D, slots, B, 4H] to [D, T, B, 4H], and back over what was read ahead.
    const int64_t shift = (d * (f.steps.T - f.slots) + s.slot_t[d]) * B * 4 * H - (stays ? stride(s, d) : 0);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        const bool valid = !RAGGED || m.t < x.length;
        const Element e = element(s, warp, lane, q, member, slice);
        int64_t at = ((m.t * B + e.b) * f.D + d) * H + e.j;  // in [T, B, D*H]
        if constexpr (kKeepsPlace) at = x.at, x.at += stride(s, d) / 4 * f.D;
        narrow(valid ? h[q][lane] : 0, f.state.y[at]);
        if (f.cells) narrow(valid ? x.c : 0, f.cells[at]);
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
            if (last) narrow(RAGGED && x.fresh ? 0 : h[q][lane], f.state.h[state]);
          }
        }
      }
    }
  }
};

}  // namespace fastlstm::cuda
