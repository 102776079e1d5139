// A block of the persistent backward kernel; how it is in touch with its group is that one's affair (Group,
// described in group_flags.h). As in forward, a thread keeps what it can in registers, and reads the next
// step's input and stores results after the state is sent. All of the cell's derivatives that do not wait for
// dh are computed before the wait. RAGGED: with lengths or resets.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group, bool RAGGED>
struct BackwardBlock {
  static constexpr bool kCluster = Group::kCluster;
  static constexpr int kUnits = Group::kUnits, kSliceRows = Group::kSliceRows;
  static constexpr int kElements = Group::Elements::kElements;  // of a thread
  using A = Acc<T>;

  // An element of a slice, and what a thread keeps of it from step to step.
  struct ThreadState {
    typename Group::Place own;  // of its gate i in the state that the step makes; the others' follow
    int sum;                    // of its dh; below zero where there is no such element
    int64_t at;                 // its place in [T, B, D*H] at the step that is read
    int64_t wide;               // that of its gate i in [D, T, B, 4H]
    A dc;                       // of the c that the step done before has left
    T gates[4], c, dy;          // of the coming step; dy: unless there is none
    T c_prev;                   // unless the step enters with c0 or with zeros
    // RAGGED: steps of its row; whether the coming step is entered with zeros; of the step done before,
    // whether the row has it and whether it was entered with zeros, and what dh the row carries past the
    // steps it lacks.
    int length;
    bool fresh, had_step, was_fresh;
    A carry;

    FASTLSTM_DEVICE bool exists() const { return sum >= 0; }
  };
  using ThreadStates = PerLane<ThreadState>[kElements];

  // What a step knows before dh comes.
  struct Pending {
    bool valid;
    CellDerivatives<A> cell;
    A dy, dc;  // dc: with dcells
    A dh;      // of a launch's first step, which receives none
  };

  static FASTLSTM_DEVICE void run(const PersistentBackward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Group group(s, warp, member);
    ThreadStates elements;
    // With one slice in its charge, the block keeps it in registers from here on.
    const bool many = !kCluster && p.slices > p.groups;
    if (!many) open(s, warp, member, member.group, 0, group, elements);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        if (many) open(s, warp, member, slice, i, group, elements);
        step(s, warp, member, slice, i, many, group, elements);
      }
    }
    if (s.dh) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups)
        finish(s, warp, member, slice, group);
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Element element(const PersistentBackward<T>& s, const Warp& warp, int lane, int q,
                                         const Member& member, int slice) {
    return Group::Elements::element(warp, lane, q, member.index, slice, s.step.H, s.step.steps.B);
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
                                   ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    const HiddenGradient<T>& y = f.gradient;
#pragma unroll
    for (int g = 0; g < 4; ++g) x.gates[g] = f.gates[x.wide + g * f.H];
    x.c = f.cells[x.at];
    if (t != (d == 0 ? 0 : f.steps.T - 1)) x.c_prev = f.cells[x.at - stride(s, d) * f.D];
    if (y.dy) x.dy = y.dy[t * y.dy_t + e.b * y.dy_b + d * f.H + e.j];
    if constexpr (RAGGED) x.fresh = enters_fresh(f.steps, d, t, e.b, x.length);
  }

  // The thread's elements of a slice as they enter the launch's step i.
  static FASTLSTM_DEVICE void open(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Group& group, ThreadStates& elements) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H;
    const int d = member.d;
    const Moment m = moment(s, d, i);
    group.bind(warp, slice, i - 1);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, member, slice);
        ThreadState& x = elements[q][lane];
        x.sum = keep(e.exists ? group.sum_at(e.unit, e.row) : -1);
        if (!e.exists) continue;
        const int64_t state = of_state(s, d, e);
        x.own = group.place(warp, e.row, e.unit);
        x.at = ((m.t * B + e.b) * f.D + d) * H + e.j;
        x.wide = ((d * f.steps.T + m.t) * B + e.b) * 4 * H + e.j;
        x.dc = m.first ? load_or_zeros<1>(f.dc_n, state).v[0] : f.dc[state];
        if constexpr (RAGGED) {
          x.length = static_cast<int>(f.steps.lengths ? f.steps.lengths[e.b] : f.steps.T);
          const int64_t done = step_after(d, m.t);
          x.had_step = m.first || done < x.length;
          x.was_fresh = !m.first && enters_fresh(f.steps, d, done, e.b, x.length);
          x.carry = x.had_step ? 0 : f.gradient.carry[state];
        }
        read(s, d, m.t, e, x);
      }
    }
  }

  // All of the step that does not depend on what the group's members send. `valid` and zeros but for dc and
  // dh for a row that lacks the step.
  static FASTLSTM_DEVICE Pending prepare(const PersistentBackward<T>& s, int d, const Moment& m, int i,
                                         const Element& e, const ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    Pending in = {!RAGGED || m.t < x.length, {{0, 0, 0, 0}, 0, 0}, 0, x.dc, 0};
    const int64_t state = of_state(s, d, e);
    if (i == 0) in.dh = m.first ? load_or_zeros<1>(f.gradient.dh_n, state).v[0] : f.gradient.dh[state];
    if (!in.valid) return in;
    if (f.gradient.dy) in.dy = widen(x.dy);
    if (f.dcells) in.dc += widen(f.dcells[m.t * f.dcells_t + e.b * f.dcells_b + d * f.H + e.j]);
    A c_prev;
    if (d == 0 ? m.t == 0 : m.t + 1 == (RAGGED ? x.length : f.steps.T)) {
      c_prev = load_or_zeros<1>(f.c0, state).v[0];
    } else {
      c_prev = widen(x.c_prev);
    }
    if (RAGGED && x.fresh) c_prev = 0;
    in.cell =
        cell_derivatives(Gates<A>{widen(x.gates[0]), widen(x.gates[1]), widen(x.gates[2]), widen(x.gates[3])},
                         c_prev, Fast::tanh(widen(x.c)));
    return in;
  }

  // State i: the gradients of the gates of the launch's step i.
  static FASTLSTM_DEVICE void step(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, bool many, Group& group, ThreadStates& elements) {
    const int d = member.d;
    const Moment m = moment(s, d, i);
    const bool last = i == s.count - 1;

    PerLane<Pending> in[kElements];
    PerLane<Gates<A>> out[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const ThreadState& x = elements[q][lane];
        if (x.exists()) in[q][lane] = prepare(s, d, m, i, element(s, warp, lane, q, member, slice), x);
      }
    }
    if (i > 0) group.receive(warp);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        const Pending& known = in[q][lane];
        A dh = i > 0 ? group.sum(warp, lane, q, x.sum) : known.dh;
        if constexpr (RAGGED) {
          if (!x.had_step) dh = x.carry;
          if (x.was_fresh) dh = 0;
        }
        if (!RAGGED || known.valid) {
          A dc = known.dc;
          out[q][lane] = cell_backward(known.cell, dh + known.dy, dc);
          x.dc = RAGGED && x.fresh ? 0 : dc;
        } else {
          out[q][lane] = {0, 0, 0, 0}, x.carry = dh;
        }
        T* const own = group.own(warp, x.own);
        narrow(out[q][lane].i, own[0]);
        narrow(out[q][lane].f, own[kGateOffset<T, kUnits, 1>]);
        narrow(out[q][lane].g, own[kGateOffset<T, kUnits, 2>]);
        narrow(out[q][lane].o, own[kGateOffset<T, kUnits, 3>]);
      }
    }
    warp.block_sync();  // the state is there, and the sums have been read
    if (!last || s.dh) group.send(warp);
    prefetch_l2(s, warp, member, slice, i + kStepsAhead);
    const bool stays = !many && !last;
    PerLane<bool> fresh[kElements];
    if constexpr (RAGGED) {
#pragma unroll
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) fresh[q][lane] = elements[q][lane].fresh;
      }
    }
    if (stays) {
#pragma unroll
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) {
          ThreadState& x = elements[q][lane];
          if (!x.exists()) continue;
          x.at -= stride(s, d) * s.step.D, x.wide -= 4 * stride(s, d);
          read(s, d, step_before(d, m.t), element(s, warp, lane, q, member, slice), x);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        store_outputs(s, m, d, element(s, warp, lane, q, member, slice), in[q][lane].valid, out[q][lane],
                      stays, x);
        x.own = group.flip(x.own);
        if constexpr (RAGGED) x.had_step = in[q][lane].valid, x.was_fresh = fresh[q][lane];
      }
    }
    if (!many) group.advance(warp);
  }

  // What a step gives but for the state that is sent; dc only where it leaves the registers.
  static FASTLSTM_DEVICE void store_outputs(const PersistentBackward<T>& s, const Moment& m, int d,
                                            const Element& e, bool valid, const Gates<A>& gates, bool stays,
                                            const ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    const int64_t H = f.H;
    T* const dgates = f.dgates + ((d * f.slots + m.slot) * f.steps.B + e.b) * 4 * H + e.j;
    narrow(gates.i, dgates[0]);
    narrow(gates.f, dgates[H]);
    narrow(gates.g, dgates[2 * H]);
    narrow(gates.o, dgates[3 * H]);
    if (!stays) f.dc[of_state(s, d, e)] = x.dc;
    // Also read where no launch follows, for the gradient of h0.
    if (RAGGED && !valid) f.gradient.carry[of_state(s, d, e)] = x.carry;
  }

  // Into L2 what the block will read at the launch's step i: of each row its gates, c of the step before, dy.
  static FASTLSTM_DEVICE void prefetch_l2(const PersistentBackward<T>& s, const Warp& warp,
                                          const Member& member, int slice, int i) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H, t = moment(s, member.d, i).t, before = step_before(member.d, t);
    constexpr int kOfRow = kLines<T, kUnits>, kOfLine = kUnits / kOfRow;  // units
    if (i >= s.count || member.index * kUnits >= H) return;
    for (const int lane : warp.lanes()) {
      const int thread = warp.index() * 32 + lane, row = thread / (8 * kOfRow), what = thread / kOfRow % 8;
      const int64_t b = int64_t{slice} * kSliceRows + row;
      const int unit = member.index * kUnits + thread % kOfRow * kOfLine;
      if (row >= kSliceRows || b >= B || unit >= H) continue;
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
    group.bind(warp, slice, s.count - 1);
    group.receive(warp);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, member, slice);
        if (e.exists) s.dh[of_state(s, member.d, e)] = group.sum(warp, lane, q, group.sum_at(e.unit, e.row));
      }
    }
    warp.block_sync();  // the sums have been read
  }
};

}  // namespace fastlstm::cuda
