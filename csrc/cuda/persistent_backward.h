// A CTA of the persistent backward kernel; Group (group_flags.h) defines how it communicates with its group.
// As in forward, a thread keeps its elements in registers, and loads the next step's input and stores results
// after the state is sent. Derivatives of the cell that do not depend on dh are computed before the wait.
// RAGGED: with lengths or resets.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group, bool RAGGED>
struct BackwardBlock {
  static constexpr bool kCluster = Group::kCluster, kDataFlag = Group::kDataFlag;
  static constexpr int kUnits = Group::kUnits, kBatchTileRows = Group::kBatchTileRows;
  static constexpr int kElements = Group::Elements::kElements;  // per thread
  using A = Acc<T>;

  // An element of a batch tile, and what a thread keeps of it between steps. "Done": the step that was
  // computed last, which follows this one in scan order.
  struct ThreadState {
    typename Group::StateAddress local_slot;  // of its gate i in the state that this step computes
    int sum_offset;                           // of its dh; negative: there is no such element
    int64_t y_offset;                         // in [T, B, D*H], of this step
    int64_t gates_offset;                     // of gate i in [D, T, B, 4H], of this step
    A dc;                                     // gradient of c from the step done
    T gates[4], c, dy;                        // of this step; dy: if there is one
    T c_prev;                                 // unless the step starts from c0 or from zero state
    // RAGGED: steps of its row; whether this step starts from zero state; whether the row has the step done,
    // and whether that started from zero state; the dh that the row carries past steps it lacks.
    int length;
    bool from_zero, done_valid, done_from_zero;
    A carry;

    FASTLSTM_DEVICE bool exists() const { return sum_offset >= 0; }
  };
  using ThreadStates = PerLane<ThreadState>[kElements];

  // What is computed of a step before dh arrives.
  struct PreparedCell {
    bool valid;
    CellDerivatives<A> cell;
    A dy, dc;  // dc: with dcells
    A dh;      // of the launch's first step, which receives none
  };

  static FASTLSTM_DEVICE void run(const PersistentBackward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const CtaCoord cta(p, warp);
    Group group(s, warp, cta);
    ThreadStates elements;
    // With one batch tile per group, its state stays in registers for the whole launch.
    const bool several_tiles = !kCluster && !kDataFlag && p.batch_tiles > p.groups;
    if constexpr (kDataFlag) {
      group.bind(warp, cta.group, -1);
      if (s.epoch == 0) group.fill_padding(warp, cta.group, s.step.H, s.step.steps.B);
    }
    if (!several_tiles) load_elements(s, warp, cta, cta.group, 0, group, elements);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int batch_tile = cta.group; batch_tile < p.batch_tiles; batch_tile += p.groups) {
        if (several_tiles) load_elements(s, warp, cta, batch_tile, i, group, elements);
        step(s, warp, cta, batch_tile, i, several_tiles, group, elements);
      }
    }
    if (s.dh) {
#pragma unroll 1
      for (int batch_tile = cta.group; batch_tile < p.batch_tiles; batch_tile += p.groups)
        store_final_dh(s, warp, cta, batch_tile, group);
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Element element(const PersistentBackward<T>& s, const Warp& warp, int lane, int q,
                                         const CtaCoord& cta, int batch_tile) {
    return Group::Elements::element(warp, lane, q, cta.rank, batch_tile, s.step.H, s.step.steps.B);
  }
  static FASTLSTM_DEVICE StepCoord step_coord(const PersistentBackward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? s.step.steps.T - 1 - at : at;
    return {t, t - s.slot_t[d], at == 0, false};
  }
  // Elements from step t to the next one, in scan order, of [., B, H]; backward moves against it.
  static FASTLSTM_DEVICE int64_t step_stride(const PersistentBackward<T>& s, int d) {
    return (d == 0 ? 1 : -1) * s.step.steps.B * s.step.H;
  }
  // In [D, B, H].
  static FASTLSTM_DEVICE int64_t carried_offset(const PersistentBackward<T>& s, int d, const Element& e) {
    return (d * s.step.steps.B + e.b) * s.step.H + e.j;
  }

  // Loads what forward saved of step t, and dy. Past a row's length the values are undefined and not used.
  static FASTLSTM_DEVICE void load_step(const PersistentBackward<T>& s, int d, int64_t t, const Element& e,
                                        ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    const HiddenGradient<T>& y = f.gradient;
#pragma unroll
    for (int g = 0; g < 4; ++g) x.gates[g] = f.gates[x.gates_offset + g * f.H];
    x.c = f.cells[x.y_offset];
    if (t != (d == 0 ? 0 : f.steps.T - 1)) x.c_prev = f.cells[x.y_offset - step_stride(s, d) * f.D];
    if (y.dy) x.dy = y.dy[t * y.dy_t + e.b * y.dy_b + d * f.H + e.j];
    if constexpr (RAGGED) x.from_zero = starts_from_zero_state(f.steps, d, t, e.b, x.length);
  }

  // Loads the thread's elements of a batch tile for the launch's step i.
  static FASTLSTM_DEVICE void load_elements(const PersistentBackward<T>& s, const Warp& warp,
                                            const CtaCoord& cta, int batch_tile, int i, Group& group,
                                            ThreadStates& elements) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H;
    const int d = cta.d;
    const StepCoord m = step_coord(s, d, i);
    group.bind(warp, batch_tile, i - 1);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, cta, batch_tile);
        ThreadState& x = elements[q][lane];
        x.sum_offset = keep_in_register(e.exists ? group.sum_offset(e.unit, e.row) : -1);
        if constexpr (kDataFlag) x.local_slot = Group::kNoWord;
        if (!e.exists) continue;
        const int64_t state = carried_offset(s, d, e);
        x.local_slot = group.address(warp, e.row, e.unit);
        if constexpr (kDataFlag) {
          if (!Group::writes(lane)) x.local_slot = Group::kNoWord;
        }
        x.y_offset = ((m.t * B + e.b) * f.D + d) * H + e.j;
        x.gates_offset = ((d * f.steps.T + m.t) * B + e.b) * 4 * H + e.j;
        x.dc = m.first ? load_or_zeros<1>(f.dc_n, state).v[0] : f.dc[state];
        if constexpr (RAGGED) {
          x.length = static_cast<int>(f.steps.lengths ? f.steps.lengths[e.b] : f.steps.T);
          const int64_t done = step_after(d, m.t);
          x.done_valid = m.first || done < x.length;
          x.done_from_zero = !m.first && starts_from_zero_state(f.steps, d, done, e.b, x.length);
          x.carry = x.done_valid ? 0 : f.gradient.carry[state];
        }
        load_step(s, d, m.t, e, x);
      }
    }
  }

  // Computes what does not depend on the group's other CTAs. For a row without the step: `valid` is false,
  // and all is zero but dc and dh.
  static FASTLSTM_DEVICE PreparedCell prepare(const PersistentBackward<T>& s, int d, const StepCoord& m,
                                              int i, const Element& e, const ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    PreparedCell in = {!RAGGED || m.t < x.length, {{0, 0, 0, 0}, 0, 0}, 0, x.dc, 0};
    const int64_t state = carried_offset(s, d, e);
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
    if (RAGGED && x.from_zero) c_prev = 0;
    in.cell =
        cell_derivatives(Gates<A>{widen(x.gates[0]), widen(x.gates[1]), widen(x.gates[2]), widen(x.gates[3])},
                         c_prev, Fast::tanh(widen(x.c)));
    return in;
  }

  // Computes state i: dgates of the launch's step i.
  static FASTLSTM_DEVICE void step(const PersistentBackward<T>& s, const Warp& warp, const CtaCoord& cta,
                                   int batch_tile, int i, bool several_tiles, Group& group,
                                   ThreadStates& elements) {
    const int d = cta.d;
    const StepCoord m = step_coord(s, d, i);
    const bool last = i == s.count - 1;

    PerLane<PreparedCell> prepared_cells[kElements];
    PerLane<Gates<A>> dgates[kElements];
    PerLane<T> sent[4];  // kDataFlag: dgates i, f, g, o
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const ThreadState& x = elements[q][lane];
        if (x.exists())
          prepared_cells[q][lane] = prepare(s, d, m, i, element(s, warp, lane, q, cta, batch_tile), x);
      }
    }
    if (i > 0) group.receive(warp);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if constexpr (kDataFlag) {
#pragma unroll
          for (int g = 0; g < 4; ++g) narrow(0.0f, sent[g][lane]);
        }
        if (!x.exists()) continue;
        const PreparedCell& prepared = prepared_cells[q][lane];
        A dh = i > 0 ? group.sum(warp, lane, q, x.sum_offset) : prepared.dh;
        if constexpr (RAGGED) {
          if (!x.done_valid) dh = x.carry;
          if (x.done_from_zero) dh = 0;
        }
        if (!RAGGED || prepared.valid) {
          A dc = prepared.dc;
          dgates[q][lane] = cell_backward(prepared.cell, dh + prepared.dy, dc);
          x.dc = RAGGED && x.from_zero ? 0 : dc;
        } else {
          dgates[q][lane] = {0, 0, 0, 0}, x.carry = dh;
        }
        const Gates<A>& gates = dgates[q][lane];
        if constexpr (kDataFlag) {
          narrow(gates.i, sent[0][lane]), narrow(gates.f, sent[1][lane]);
          narrow(gates.g, sent[2][lane]), narrow(gates.o, sent[3][lane]);
        } else {
          T* const own = group.pointer(warp, x.local_slot);
          narrow(gates.i, own[0]);
          narrow(gates.f, own[kGateOffset<T, kUnits, 1>]);
          narrow(gates.g, own[kGateOffset<T, kUnits, 2>]);
          narrow(gates.o, own[kGateOffset<T, kUnits, 3>]);
        }
      }
    }
    const bool sends = !last || s.dh;
    if constexpr (kDataFlag) {
      if (sends) send_words(warp, group, elements, sent);
      warp.block_sync();  // the sums have been read
    } else {
      warp.block_sync();  // the state is written, and the sums have been read
      if (sends) group.send(warp);
    }
    prefetch_l2(s, warp, cta, batch_tile, i + kPrefetchSteps);
    const bool stays_in_registers = !several_tiles && !last;
    PerLane<bool> this_from_zero[kElements];
    if constexpr (RAGGED) {
#pragma unroll
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) this_from_zero[q][lane] = elements[q][lane].from_zero;
      }
    }
    if (stays_in_registers) {
#pragma unroll
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) {
          ThreadState& x = elements[q][lane];
          if (!x.exists()) continue;
          x.y_offset -= step_stride(s, d) * s.step.D, x.gates_offset -= 4 * step_stride(s, d);
          load_step(s, d, step_before(d, m.t), element(s, warp, lane, q, cta, batch_tile), x);
        }
      }
    }
    if constexpr (kDataFlag) {
      if (sends) group.fence(warp);
    }
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        store_outputs(s, m, d, element(s, warp, lane, q, cta, batch_tile), prepared_cells[q][lane].valid,
                      dgates[q][lane], stays_in_registers, x);
        x.local_slot = group.next(x.local_slot);
        if constexpr (RAGGED)
          x.done_valid = prepared_cells[q][lane].valid, x.done_from_zero = this_from_zero[q][lane];
      }
    }
    if (!several_tiles) group.advance(warp);
  }

  // kDataFlag: sends state i, and clears the words of state i + 2.
  static FASTLSTM_DEVICE void send_words(const Warp& warp, const Group& group, const ThreadStates& elements,
                                         const PerLane<T> (&sent)[4]) {
    PerLane<typename Group::StateAddress> words;
    for (const int lane : warp.lanes()) words[lane] = elements[0][lane].local_slot;
    group.store(warp, words, sent);
    group.clear(warp, words);
  }

  // Stores the results of a step other than the state that is sent; dc only if it leaves the registers.
  static FASTLSTM_DEVICE void store_outputs(const PersistentBackward<T>& s, const StepCoord& m, int d,
                                            const Element& e, bool valid, const Gates<A>& gates,
                                            bool stays_in_registers, const ThreadState& x) {
    const BackwardStep<T>& f = s.step;
    const int64_t H = f.H;
    T* const dgates = f.dgates + ((d * f.slots + m.slot) * f.steps.B + e.b) * 4 * H + e.j;
    narrow(gates.i, dgates[0]);
    narrow(gates.f, dgates[H]);
    narrow(gates.g, dgates[2 * H]);
    narrow(gates.o, dgates[3 * H]);
    if (!stays_in_registers) f.dc[carried_offset(s, d, e)] = x.dc;
    // Also read after the last launch, for the gradient of h0.
    if (RAGGED && !valid) f.gradient.carry[carried_offset(s, d, e)] = x.carry;
  }

  // Prefetches the CTA's input of the launch's step i into L2: gates, c of the previous step, dy of each row.
  static FASTLSTM_DEVICE void prefetch_l2(const PersistentBackward<T>& s, const Warp& warp,
                                          const CtaCoord& cta, int batch_tile, int i) {
    const BackwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H, t = step_coord(s, cta.d, i).t, before = step_before(cta.d, t);
    constexpr int kLinesPerRow = kCacheLines<T, kUnits>, kUnitsPerLine = kUnits / kLinesPerRow;
    if (i >= s.count || cta.rank * kUnits >= H) return;
    for (const int lane : warp.lanes()) {
      const int thread = warp.index() * 32 + lane, row = thread / (8 * kLinesPerRow),
                source = thread / kLinesPerRow % 8;
      const int64_t b = int64_t{batch_tile} * kBatchTileRows + row;
      const int unit = cta.rank * kUnits + thread % kLinesPerRow * kUnitsPerLine;
      if (row >= kBatchTileRows || b >= B || unit >= H) continue;
      if (source < 4) {
        prefetch(f.gates + (((cta.d * f.steps.T + t) * B + b) * 4 + source) * H + unit);
      } else if (source == 4 && before >= 0 && before < f.steps.T) {
        prefetch(f.cells + ((before * B + b) * f.D + cta.d) * H + unit);
      } else if (source == 5 && f.gradient.dy) {
        prefetch(f.gradient.dy + t * f.gradient.dy_t + b * f.gradient.dy_b + cta.d * H + unit);
      }
    }
  }

  // Stores dh for the step after the launch.
  static FASTLSTM_DEVICE void store_final_dh(const PersistentBackward<T>& s, const Warp& warp,
                                             const CtaCoord& cta, int batch_tile, Group& group) {
    group.bind(warp, batch_tile, s.count - 1);
    group.receive(warp);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, cta, batch_tile);
        if (e.exists)
          s.dh[carried_offset(s, cta.d, e)] = group.sum(warp, lane, q, group.sum_offset(e.unit, e.row));
      }
    }
    warp.block_sync();  // the sums have been read
  }
};

}  // namespace fastlstm::cuda
