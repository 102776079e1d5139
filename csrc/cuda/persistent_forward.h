// A CTA of the persistent forward kernel; Group (group_flags.h) defines how it communicates with its group.
//
// The critical path of a step runs from the arrival of a state to the sending of the next: the GEMM, the
// sums, the cell and one store. So a thread keeps the state of its elements, offsets included, in registers,
// and loads the next step's x W_ih^T and stores results after the state is sent. RAGGED: with lengths or
// resets; a call without them does not check rows (tests/gpu/test_cuda_sass.py counts the instructions).
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, class Group, bool RAGGED>
struct ForwardBlock {
  static constexpr bool kCluster = Group::kCluster, kDataFlag = Group::kDataFlag;
  static constexpr int kUnits = Group::kUnits, kBatchTileRows = Group::kBatchTileRows;
  static constexpr int kElements = Group::Elements::kElements;  // per thread
  using A = Acc<T>;
  // TF32 and data flags have no registers for the offset of the outputs and compute it in each step.
  static constexpr bool kKeepsOutputOffset = sizeof(T) == 2 && !kDataFlag;

  // An element of a batch tile, and what a thread keeps of it between steps.
  struct ThreadState {
    typename Group::StateAddress local_slot;  // of its h in the state that this step computes
    int sum_offset;                           // of its gates; negative: there is no such element
    int length;                               // RAGGED: of its row
    bool next_from_zero;                      // RAGGED: the next step starts from zero state
    int64_t y_offset;                         // kKeepsOutputOffset: in [T, B, D*H], of this step
    int64_t gates_offset;                     // of gate i in [D, slots, B, 4H], of this step
    T h_prev;                                 // kDataFlag, RAGGED: as its state n has it
    A c;                                      // previous c, after a reset
    A x[4];                                   // x W_ih^T

    FASTLSTM_DEVICE bool exists() const { return sum_offset >= 0; }
  };
  using ThreadStates = PerLane<ThreadState>[kElements];
  using Biases = PerLane<A>[kElements][4];

  static FASTLSTM_DEVICE void run(const PersistentForward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const CtaCoord cta(p, warp);
    Group group(s, warp, cta);
    ThreadStates elements;
    Biases bias;
    load_biases(s, warp, cta, bias);
    // With one batch tile per group, its state stays in registers for the whole launch.
    const bool several_tiles = !kCluster && !kDataFlag && p.batch_tiles > p.groups;
    for (int batch_tile = cta.group; batch_tile < p.batch_tiles; batch_tile += p.groups)
      send_initial_state(s, warp, cta, batch_tile, group);
    if (!several_tiles) load_elements(s, warp, cta, cta.group, 0, group, elements);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int batch_tile = cta.group; batch_tile < p.batch_tiles; batch_tile += p.groups) {
        if (several_tiles) load_elements(s, warp, cta, batch_tile, i, group, elements);
        step(s, warp, cta, batch_tile, i, several_tiles, group, bias, elements);
      }
    }
    group.leave(warp);
  }

  static FASTLSTM_DEVICE Element element(const PersistentForward<T>& s, const Warp& warp, int lane, int q,
                                         const CtaCoord& cta, int batch_tile) {
    return Group::Elements::element(warp, lane, q, cta.rank, batch_tile, s.step.H, s.step.steps.B);
  }
  static FASTLSTM_DEVICE StepCoord step_coord(const PersistentForward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? at : s.step.steps.T - 1 - at;
    return {t, t - s.slot_t[d], at == 0, at == s.step.steps.T - 1};
  }
  // Elements from step t to the next one, in scan order, of [., B, 4H].
  static FASTLSTM_DEVICE int64_t step_stride(const PersistentForward<T>& s, int d) {
    return (d == 0 ? 4 : -4) * s.step.steps.B * s.step.H;
  }
  // In [D, B, H].
  static FASTLSTM_DEVICE int64_t carried_offset(const PersistentForward<T>& s, int d, const Element& e) {
    return (d * s.step.steps.B + e.b) * s.step.H + e.j;
  }
  static FASTLSTM_DEVICE void load_gates_x(const PersistentForward<T>& s, ThreadState& x) {
#pragma unroll
    for (int g = 0; g < 4; ++g) x.x[g] = s.step.gates_x[x.gates_offset + g * s.step.H];
  }

  // b_ih + b_hh of the thread's units, the same in all batch tiles.
  static FASTLSTM_DEVICE void load_biases(const PersistentForward<T>& s, const Warp& warp,
                                          const CtaCoord& cta, Biases& bias) {
    const int64_t H = s.step.H;
    const T *ih = s.step.bias_ih[cta.d], *hh = s.step.bias_hh[cta.d];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = Group::Elements::element(warp, lane, q, cta.rank, 0, H, kBatchTileRows);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          bias[q][g][lane] =
              !e.exists ? 0 : load_or_zeros<1>(ih, g * H + e.j).v[0] + load_or_zeros<1>(hh, g * H + e.j).v[0];
        }
      }
    }
  }

  // Loads the thread's elements of a batch tile for the launch's step i.
  static FASTLSTM_DEVICE void load_elements(const PersistentForward<T>& s, const Warp& warp,
                                            const CtaCoord& cta, int batch_tile, int i, Group& group,
                                            ThreadStates& elements) {
    const ForwardStep<T>& f = s.step;
    const int64_t B = f.steps.B, H = f.H;
    const int d = cta.d;
    const StepCoord m = step_coord(s, d, i);
    group.bind(warp, batch_tile, i);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, q, cta, batch_tile);
        ThreadState& x = elements[q][lane];
        x.sum_offset = keep_in_register(e.exists ? group.sum_offset(4 * e.unit, e.row) : -1);
        if constexpr (kDataFlag) x.local_slot = Group::kNoWord;
        if (!e.exists) continue;
        const int64_t state = carried_offset(s, d, e);
        x.local_slot = group.address(warp, e.row, e.unit);
        if constexpr (kDataFlag) {
          if (!Group::writes(lane)) x.local_slot = Group::kNoWord;
        }
        if constexpr (kKeepsOutputOffset) x.y_offset = ((m.t * B + e.b) * f.D + d) * H + e.j;
        x.gates_offset = ((d * f.slots + m.slot) * B + e.b) * 4 * H + e.j;
        x.c = m.first ? load_or_zeros<1>(f.c0, state).v[0] : f.c[state];
        if constexpr (RAGGED) {
          x.length = static_cast<int>(f.steps.lengths ? f.steps.lengths[e.b] : f.steps.T);
          if (starts_from_zero_state(f.steps, d, m.t, e.b, x.length)) x.c = 0;
          x.next_from_zero = starts_from_zero_state(f.steps, d, step_after(d, m.t), e.b, x.length);
          if constexpr (kDataFlag) narrow(initial_h(s, d, m, e).v[0], x.h_prev);
        }
        load_gates_x(s, x);
      }
    }
  }

  // h_prev of the launch's first step, after a reset.
  static FASTLSTM_DEVICE VecN<A, 1> initial_h(const PersistentForward<T>& s, int d, const StepCoord& m,
                                              const Element& e) {
    const int64_t at = carried_offset(s, d, e);
    if (!m.first) return load<1>(s.step.state.h + at);
    if (starts_from_zero_state(s.step.steps, d, m.t, e.b)) return zeros<A, 1>();
    return load_or_zeros<1>(s.step.state.h0, at);
  }

  // Sends h_prev of the launch's first step, as state 0.
  static FASTLSTM_DEVICE void send_initial_state(const PersistentForward<T>& s, const Warp& warp,
                                                 const CtaCoord& cta, int batch_tile, Group& group) {
    const StepCoord m = step_coord(s, cta.d, 0);
    group.bind(warp, batch_tile, -1);
    if constexpr (kDataFlag) {
      if (s.epoch == 0) group.fill_padding(warp, batch_tile, s.step.H, s.step.steps.B);
      PerLane<typename Group::StateAddress> words;
      PerLane<T> h[1];
      for (const int lane : warp.lanes()) {
        const Element e = element(s, warp, lane, 0, cta, batch_tile);
        words[lane] = e.exists && Group::writes(lane) ? group.address(warp, e.row, e.unit) : Group::kNoWord;
        narrow(e.exists ? initial_h(s, cta.d, m, e).v[0] : 0, h[0][lane]);
      }
      group.store(warp, words, h);
      group.clear(warp, words);
      group.fence(warp);
    } else {
#pragma unroll 1
      for (int q = 0; q < kElements; ++q) {
        for (const int lane : warp.lanes()) {
          const Element e = element(s, warp, lane, q, cta, batch_tile);
          if (!e.exists) continue;
          store<1>(group.pointer(warp, group.address(warp, e.row, e.unit)), initial_h(s, cta.d, m, e));
        }
      }
      warp.block_sync();
      group.send(warp);
    }
  }

  // Computes state i + 1 from state i.
  static FASTLSTM_DEVICE void step(const PersistentForward<T>& s, const Warp& warp, const CtaCoord& cta,
                                   int batch_tile, int i, bool several_tiles, Group& group,
                                   const Biases& bias, ThreadStates& elements) {
    const StepCoord m = step_coord(s, cta.d, i);
    const bool last = i == s.count - 1;

    PerLane<Gates<A>> gates[kElements];
    PerLane<A> h[kElements];
    PerLane<T> sent[kElements];  // kDataFlag
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
        if constexpr (kDataFlag) narrow(0.0f, sent[q][lane]);
        if (!x.exists()) continue;
        Gates<A>& gate = gates[q][lane];
        if (!RAGGED || m.t < x.length) {
          const float4 sum = group.sum4(warp, lane, q, x.sum_offset);
          gate = activate<Fast>(Gates<A>{x.x[0] + sum.x, x.x[1] + sum.y, x.x[2] + sum.z, x.x[3] + sum.w});
          x.c = next_c(gate, x.c);
          h[q][lane] = gate.o * Fast::tanh(x.c);
        } else {
          gate = {0, 0, 0, 0};
          if constexpr (kDataFlag) {
            h[q][lane] = widen(x.h_prev);
          } else {
            h[q][lane] = widen(*group.pointer(warp, group.previous(x.local_slot)));
          }
        }
        // The next GEMM does not mask its input, so a reset is applied here. After the launch's last step the
        // state is not read.
        const A next_h = RAGGED && x.next_from_zero ? 0 : h[q][lane];
        if constexpr (kDataFlag) {
          narrow(next_h, sent[q][lane]);
          if constexpr (RAGGED) x.h_prev = sent[q][lane];
        } else {
          narrow(next_h, *group.pointer(warp, x.local_slot));
        }
      }
    }
    if constexpr (kDataFlag) {
      if (!last) send_words(warp, group, elements, sent);
      warp.block_sync();  // the sums have been read
    } else {
      warp.block_sync();  // the state is written, and the sums have been read
      if (!last) group.send(warp);
    }
    prefetch_l2(s, warp, cta, batch_tile, i + kPrefetchSteps);
    const bool stays_in_registers = !several_tiles && !last;
    PerLane<bool> later_from_zero[kElements];  // of the step after next
    if (stays_in_registers) load_next_step(s, warp, cta, batch_tile, m, elements, later_from_zero);
    if constexpr (kDataFlag) {
      if (!last) group.fence(warp);
    }
    store_outputs(s, warp, cta, batch_tile, m, last, stays_in_registers, gates, h, elements);
    if (!stays_in_registers) return;
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        x.local_slot = group.next(x.local_slot);
        if constexpr (RAGGED) {
          if (x.next_from_zero) x.c = 0;
          x.next_from_zero = later_from_zero[q][lane];
        }
      }
    }
    group.advance(warp);
  }

  // kDataFlag: sends state i + 1, and clears the words of state i + 3.
  static FASTLSTM_DEVICE void send_words(const Warp& warp, const Group& group, const ThreadStates& elements,
                                         const PerLane<T> (&sent)[kElements]) {
    PerLane<typename Group::StateAddress> words;
    for (const int lane : warp.lanes()) words[lane] = elements[0][lane].local_slot;
    group.store(warp, words, sent);
    group.clear(warp, words);
  }

  static FASTLSTM_DEVICE void load_next_step(const PersistentForward<T>& s, const Warp& warp,
                                             const CtaCoord& cta, int batch_tile, const StepCoord& m,
                                             ThreadStates& elements,
                                             PerLane<bool> (&later_from_zero)[kElements]) {
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        x.gates_offset += step_stride(s, cta.d);
        load_gates_x(s, x);
        if constexpr (RAGGED) {
          const int64_t t = step_after(cta.d, step_after(cta.d, m.t));
          later_from_zero[q][lane] = starts_from_zero_state(
              s.step.steps, cta.d, t, element(s, warp, lane, q, cta, batch_tile).b, x.length);
        }
      }
    }
  }

  // Prefetches the CTA's input of the launch's step i into L2: per row and gate the cache lines that the
  // CTA's units would fill if they were aligned.
  static FASTLSTM_DEVICE void prefetch_l2(const PersistentForward<T>& s, const Warp& warp,
                                          const CtaCoord& cta, int batch_tile, int i) {
    const int64_t B = s.step.steps.B, H = s.step.H, slot = step_coord(s, cta.d, i).slot;
    constexpr int kLinesPerRow = kCacheLines<A, kUnits>, kUnitsPerLine = kUnits / kLinesPerRow;
    if (i >= s.count || cta.rank * kUnits >= H) return;
    for (const int lane : warp.lanes()) {
      const int thread = warp.index() * 32 + lane, row = thread / (4 * kLinesPerRow),
                gate = thread / kLinesPerRow % 4;
      const int64_t b = int64_t{batch_tile} * kBatchTileRows + row;
      const int unit = cta.rank * kUnits + thread % kLinesPerRow * kUnitsPerLine;
      if (row >= kBatchTileRows || b >= B || unit >= H) continue;
      prefetch(s.step.gates_x + (((cta.d * s.step.slots + slot) * B + b) * 4 + gate) * H + unit);
    }
  }

  // Stores the results of a step other than the state that is sent. stays_in_registers: the next step's input
  // has been loaded; last: of the launch.
  static FASTLSTM_DEVICE void store_outputs(const PersistentForward<T>& s, const Warp& warp,
                                            const CtaCoord& cta, int batch_tile, const StepCoord& m,
                                            bool last, bool stays_in_registers,
                                            const PerLane<Gates<A>> (&gates)[kElements],
                                            const PerLane<A> (&h)[kElements], ThreadStates& elements) {
    const ForwardStep<T>& f = s.step;
    const int d = cta.d;
    const int64_t B = f.steps.B, H = f.H;
    // From [D, slots, B, 4H] to [D, T, B, 4H], and back by a step if the next one has been loaded.
    const int64_t shift =
        (d * (f.steps.T - f.slots) + s.slot_t[d]) * B * 4 * H - (stays_in_registers ? step_stride(s, d) : 0);
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        ThreadState& x = elements[q][lane];
        if (!x.exists()) continue;
        const bool valid = !RAGGED || m.t < x.length;
        const Element e = element(s, warp, lane, q, cta, batch_tile);
        int64_t y_offset = ((m.t * B + e.b) * f.D + d) * H + e.j;
        if constexpr (kKeepsOutputOffset) y_offset = x.y_offset, x.y_offset += step_stride(s, d) / 4 * f.D;
        narrow(valid ? h[q][lane] : 0, f.state.y[y_offset]);
        if (f.cells) narrow(valid ? x.c : 0, f.cells[y_offset]);
        if (f.gates) {
          const Gates<A>& gate = gates[q][lane];
          T* const to = f.gates + shift + x.gates_offset;
          narrow(gate.i, to[0]);
          narrow(gate.f, to[H]);
          narrow(gate.g, to[2 * H]);
          narrow(gate.o, to[3 * H]);
        }
        if (!stays_in_registers) {
          const int64_t state = carried_offset(s, d, e);
          if (m.last) {
            narrow(x.c, f.c_n[state]);
            narrow(h[q][lane], f.state.h_n[state]);
          } else {
            f.c[state] = x.c;
            if (last) narrow(RAGGED && x.next_from_zero ? 0 : h[q][lane], f.state.h[state]);
          }
        }
      }
    }
  }
};

}  // namespace fastlstm::cuda
