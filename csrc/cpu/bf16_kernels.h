// Forward and backward of a layer on the products of cpu/bf16_tiles_*.h, of which the includer has chosen
// one.
#pragma once

#include "cpu/bf16_numbers.h"
#include "cpu/mask_vectors.h"

namespace fastlstm::FASTLSTM_ISA {

// Rows [begin, end) of a left operand of depth K times columns [first, last) of packed weights, 32 or 64 at a
// time, from the last to the first if `reversed`.
struct ColumnProducts {
  int64_t K;
  const Bf16* a;  // row 0
  int64_t lda;
  const Bf16* packed;
  int64_t begin, end, first, last;
  bool reversed = false;

  // store(r0, r1, n0, width, out): rows [r0, r1) of `width` columns from n0 on are in out [.][64];
  // done(n0, n1): so are all rows of columns [n0, n1). between: of column_products.
  template <class Between, class Store, class Done>
  FASTLSTM_INLINE void run(Between&& between, Store&& store, Done&& done) const {
    alignas(64) float out[2 * kTileRows * 64];
    const int64_t next = padded(K) * kUnits;  // from the weights of 32 columns to the next
    const int64_t step = (wide_columns(end - begin) ? 2 : 1) * kUnits;
    const int64_t parts = (last - first + step - 1) / step;
    for (int64_t k = 0; k < parts; ++k) {
      const int64_t n0 = first + (reversed ? parts - 1 - k : k) * step;
      const bool wide = step > kUnits && n0 + kUnits < last;
      for (int64_t r0 = begin; r0 < end; r0 += 2 * kTileRows) {
        const int64_t r1 = std::min(end, r0 + 2 * kTileRows);
        column_products(r1 - r0, K, a + r0 * lda, lda, packed + n0 / kUnits * next, next, wide, out, between);
        store(r0, r1, n0, (wide ? 2 : 1) * kUnits, out);
      }
      done(n0, std::min(last, n0 + step));
    }
  }
};

// h of these features after its zoneout.
template <class T>
FASTLSTM_INLINE V zoned_h(const ForwardArgs<T>& a, int64_t t, int64_t r, int64_t p0, int n, V h) {
  const int64_t previous = a.rows.previous_row(a.reverse, t, r);
  const V h_prev = previous == Rows::kZeroState      ? V{}
                   : previous == Rows::kInitialState ? load_part(a.h0 + r * a.P + p0, n)
                                                     : get(a.y + previous * a.y_stride + p0, n);
  const V share = load_mask<float>(a.masks.zoneout_h, t, a.rows.batch_row_at(r), p0, n);
  return zoned<float>(a.masks.zoneout_h, share, h_prev, h);
}

// h for features [p0, p0 + n) of sorted row r at step t, to y and to the state that the next step reads.
template <class T>
FASTLSTM_INLINE void store_h(const ForwardArgs<T>& a, int64_t t, int64_t next_t, int64_t r, int64_t p0, int n,
                             V h, int64_t slot) {
  if (a.masks.zoneout_h) h = zoned_h(a, t, r, p0, n, h);
  put(a.y + a.rows.row_at(t, r) * a.y_stride + p0, h, n);
  const bool cleared =
      a.rows.fresh && next_t >= 0 && r < a.rows.count_at(next_t) && a.rows.fresh_at(next_t, r);
  V h_next = cleared ? V{} : h;
  if (a.masks.recurrent && next_t >= 0 && !cleared)
    h_next = rounded<T>(h) * load_mask<float>(a.masks.recurrent, next_t, a.rows.batch_row_at(r), p0, n);
  put(a.h + (slot * bf16::factor_rows(a.rows.B) + r) * row_stride(a.P) + p0, h_next, n);
  if constexpr (!std::is_same_v<T, Bf16>) put(a.h_state + (slot * a.rows.B + r) * a.P + p0, h_next, n);
}

// The cell for units [u0, u0 + n) of sorted row r at step t, from the products pre [4][16].
template <class T>
FASTLSTM_INLINE void forward_cell(const ForwardArgs<T>& a, int64_t t, int64_t next_t, int64_t r, int64_t u0,
                                  int n, const V* bias, const float* pre, int64_t slot) {
  const int64_t H = a.H;
  const Gates<V> gate = activate<FastActivation>(Gates<V>{
      load(pre) + bias[0], load(pre + 16) + bias[1], load(pre + 32) + bias[2], load(pre + 48) + bias[3]});
  float* c = a.c + r * H + u0;
  const V c_prev = a.rows.fresh_at(t, r) ? V{} : load_part(c, n);
  const V c_next = next_c(gate, c_prev);
  const V h = gate.o * FastActivation::tanh(c_next);
  V state = c_next;
  if (a.masks.zoneout_c)
    state =
        zoned<float>(a.masks.zoneout_c, load_mask<float>(a.masks.zoneout_c, t, a.rows.batch_row_at(r), u0, n),
                     c_prev, c_next);
  if (a.gates) {
    T* saved = a.gates + (a.rows.offset_at(t) + r) * 4 * H + 4 * u0;
    put(saved, gate.i, n);
    put(saved + n, gate.f, n);
    put(saved + 2 * n, gate.g, n);
    put(saved + 3 * n, gate.o, n);
  }
  store_part(c, state, n);
  if (a.cells) put(a.cells + a.rows.row_at(t, r) * a.cells_stride + u0, state, n);
  if (a.w_hr)
    put(a.hidden + r * row_stride(H) + u0, h, n);
  else
    store_h(a, t, next_t, r, u0, n, h, slot);
}

// h = hidden W_hr^T of rows [begin, end) and the member's features.
template <class T>
void project(const ForwardArgs<T>& a, const Member& me, int64_t t, int64_t next_t, int64_t slot,
             int64_t begin, int64_t end) {
  const int64_t last = me.feature_end;
  ColumnProducts{a.H, a.hidden, row_stride(a.H), a.w_hr, begin, end, me.feature_begin, last}.run(
      [] {},
      [&](int64_t r0, int64_t r1, int64_t n0, int64_t width, const float* out) {
        for (int64_t r = r0; r < r1; ++r, out += 64)
          for (int64_t j = 0; j < std::min(width, last - n0); j += 16)
            store_h(a, t, next_t, r, n0 + j, static_cast<int>(std::min<int64_t>(16, last - n0 - j)),
                    load(out + j), slot);
      },
      [](int64_t, int64_t) {});
}

// Rows [r, end) of units [u0, u0 + n) whose products are made and whose cells are not.
template <class T>
struct PendingCells {
  const ForwardArgs<T>& a;
  int64_t t, next_t;
  int64_t slot;  // of h that they write
  int64_t r = 0, end = 0, u0 = 0;
  int n = 0;
  V bias[4] = {};
  const float* pre = nullptr;  // of row r

  __attribute__((noinline)) void one() {
    if (n == kBlock)
      forward_cell(a, t, next_t, r, u0, kBlock, bias, pre, slot);
    else
      forward_cell(a, t, next_t, r, u0, n, bias, pre, slot);
    ++r;
    pre += 64;
  }
  FASTLSTM_INLINE void next() {
    if (r < end) one();
  }
  void finish() {
    while (r < end) one();
  }
};

template <class T>
void forward(const ForwardArgs<T>& a, const Member& me) {
  const ProductScope scope;
  const int64_t steps = a.rows.T, B = a.rows.B, H = a.H, I = a.I, P = a.P, ldx = row_stride(I),
                ldh = row_stride(P);
  Bf16* x = a.scratch + me.index * bf16::forward_scratch(I);
  std::fill_n(x, bf16::forward_scratch(I), Bf16(0));  // the padding of a row is multiplied by zeros
  const int64_t blocks = (me.unit_end - me.unit_begin + kBlock - 1) / kBlock;
  alignas(64) float buffers[2][2 * kTileRows * 64];
  int buffer = 0;
  for (int64_t s = 0; s < steps; ++s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t next_t = s + 1 == steps ? -1 : (a.reverse ? t - 1 : t + 1);
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    const Bf16* h_in = a.h + (s % 2) * bf16::factor_rows(B) * ldh;
    PendingCells<T> pending{a, t, next_t, (s + 1) % 2};
    const bool reverse_blocks =
        s % 2 == 1 && alternate_block_order(8.0 * (I + P) * (me.unit_end - me.unit_begin));
    for (int64_t g0 = me.row_begin; g0 < end; g0 += kBf16RowBlockRows) {
      const int64_t g1 = std::min(end, g0 + kBf16RowBlockRows);
      for (int64_t r = g0; r < g1; ++r) round_row(a.x + a.rows.row_at(t, r) * I, I, x + (r - g0) * ldx);
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t u0 = me.unit_begin + (reverse_blocks ? blocks - 1 - k : k) * kBlock;
        for (int64_t r0 = g0; r0 < g1; r0 += 2 * kTileRows) {
          const int64_t r1 = std::min(g1, r0 + 2 * kTileRows);
          float* pre = buffers[buffer ^= 1];
          const auto between = [&] { pending.next(); };
          // Tiles read up to 15 rows past the last; the results are discarded.
          gate_products(a, r1 - r0, x + (r0 - g0) * ldx, h_in + r0 * ldh, u0, pre, between);
          pending.finish();
          pending.r = r0;
          pending.end = r1;
          pending.u0 = u0;
          pending.n = static_cast<int>(std::min(kBlock, H - u0));
          for (int64_t gate = 0; gate < 4; ++gate)
            pending.bias[gate] = load_part(a.bias + gate * H + u0, pending.n);
          pending.pre = pre;
        }
      }
      if (a.w_hr && !me.barrier) {
        pending.finish();
        project(a, me, t, next_t, pending.slot, g0, g1);
      }
    }
    pending.finish();
    if (me.barrier) me.barrier->wait();
    if (a.w_hr && me.barrier) {
      project(a, me, t, next_t, pending.slot, me.row_begin, end);
      me.barrier->wait();
    }
  }
}

// The part of dh, the gradient of h_t's features [p0, p0 + n), that a zoneout passes to h_{t-1}; kept for it.
template <class T>
FASTLSTM_INLINE V keep_gradient(const BackwardArgs<T>& a, int64_t t, int64_t r, int64_t p0, int n, V dh) {
  const V kept = dh * load_mask<float>(a.masks.zoneout_h, t, a.rows.batch_row_at(r), p0, n);
  store_part(a.kept_h + r * padded(a.P) + p0, kept, n);
  return kept;
}

// dh: the gradient of the masked state that entered step t's product, features [p0, p0 + n). Returns that of
// h_{t-1}, with what the zoneout passes to it.
template <class T>
FASTLSTM_INLINE V masked_gradient(const BackwardArgs<T>& a, int64_t t, int64_t r, int64_t p0, int n, V dh) {
  if (a.masks.recurrent) dh *= load_mask<float>(a.masks.recurrent, t, a.rows.batch_row_at(r), p0, n);
  if (a.masks.zoneout_h) dh += load_part(a.kept_h + r * padded(a.P) + p0, n);
  return dh;
}

// The cell's gradients for units [u0, u0 + n) of sorted row r at step t.
template <class T>
FASTLSTM_INLINE void backward_cell(const BackwardArgs<T>& a, int64_t t, int64_t r, int64_t u0, int n,
                                   float* db) {
  const int64_t H = a.H, row = a.rows.row_at(t, r);
  const int64_t packed_row = a.rows.offset_at(t) + r;
  const T* g = a.gates + packed_row * 4 * H + 4 * u0;
  const int64_t previous = a.rows.previous_row(a.reverse, t, r);
  if (previous >= 0) {  // what is read after this step: too little at a time for the hardware to foresee
    const T* next = a.gates + (a.rows.offset_at(Rows::step_before(a.reverse, t)) + r) * 4 * H + 4 * u0;
    constexpr int64_t kLine = 64 / sizeof(T);
    for (int64_t k = 0; k < 4 * kBlock; k += kLine) __builtin_prefetch(next + k);
  }
  V dh = load_part((a.w_hr ? a.dhidden : a.dh) + r * padded(H) + u0, n);
  if (a.dy && !a.w_hr) dh += get(a.dy + row * a.dy_stride + u0, n);
  if (a.masks.zoneout_h && !a.w_hr) dh -= keep_gradient(a, t, r, u0, n, dh);
  V dc = load_part(a.dc + r * H + u0, n), kept_c = {};
  if (a.dcells) dc += get(a.dcells + row * a.dcells_stride + u0, n);
  if (a.masks.zoneout_c) {
    kept_c = dc * load_mask<float>(a.masks.zoneout_c, t, a.rows.batch_row_at(r), u0, n);
    dc -= kept_c;
  }
  const bool fresh = previous == Rows::kZeroState;
  const V c_prev = fresh           ? V{}
                   : previous >= 0 ? get(a.cells + previous * a.cells_stride + u0, n)
                                   : load_part(a.c0 + r * H + u0, n);
  const Gates<V> gate = {get(g, n), get(g + n, n), get(g + 2 * n, n), get(g + 3 * n, n)};
  // h was computed from c before its zoneout.
  const V c = a.masks.zoneout_c ? next_c(gate, c_prev) : get(a.cells + row * a.cells_stride + u0, n);
  const V tanh_c = FastActivation::tanh(c);
  const Gates<V> d = cell_backward(gate, c_prev, tanh_c, dh, dc);
  const auto sum = [&](float* to, V v) { store_part(to, load_part(to, n) + v, n); };
  sum(db + u0, d.i);
  sum(db + H + u0, d.f);
  sum(db + 2 * H + u0, d.g);
  sum(db + 3 * H + u0, d.o);
  Bf16* out = a.dgates + (packed_row - a.base) * row_stride(4 * H) + u0;
  put(out, d.i, n);
  put(out + H, d.f, n);
  put(out + 2 * H, d.g, n);
  put(out + 3 * H, d.o, n);
  store_part(a.dc + r * H + u0, fresh ? V{} : dc + kept_c, n);
  if (a.hidden) put(a.hidden + (packed_row - a.base) * H + u0, gate.o * tanh_c, n);
}

// The rows of some units of one step whose dh is made and whose cells are not.
template <class T>
struct PendingGradients {
  const BackwardArgs<T>& a;
  float* db;
  int64_t t = 0;
  int64_t unit_begin = 0, unit_end = 0;
  int64_t r = 0, end = 0, u0 = 0;  // the next cell is of row r < end and unit u0

  void at_step(int64_t s) { t = a.reverse ? a.rows.T - 1 - s : s; }
  void set(int64_t first_unit, int64_t last_unit, int64_t first_row, int64_t last_row) {
    u0 = unit_begin = first_unit;
    unit_end = last_unit;
    r = first_row;
    end = last_row;
  }
  __attribute__((noinline)) void one() {
    if (u0 + kBlock <= unit_end)
      backward_cell(a, t, r, u0, kBlock, db);
    else
      backward_cell(a, t, r, u0, static_cast<int>(unit_end - u0), db);
    u0 += kBlock;
    if (u0 < unit_end) return;
    u0 = unit_begin;
    ++r;
  }
  FASTLSTM_INLINE void next() {
    if (r < end) one();
  }
  void finish() {
    while (r < end) one();
  }
};

// With projection: the gradients of h for the member's features of rows [begin, end) at step t.
template <class T>
void projected_gradients(const BackwardArgs<T>& a, const Member& me, int64_t t, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    Bf16* dr = a.dr + (a.rows.offset_at(t) + r - a.base) * row_stride(a.P);
    const T* dy = a.dy ? a.dy + a.rows.row_at(t, r) * a.dy_stride : nullptr;
    for (int64_t p = me.feature_begin; p < me.feature_end; p += 16) {
      const int n = static_cast<int>(std::min<int64_t>(16, me.feature_end - p));
      V dh = load_part(a.dh + r * padded(a.P) + p, n);
      if (dy) dh += get(dy + p, n);
      if (a.masks.zoneout_h) dh -= keep_gradient(a, t, r, p, n, dh);
      put(dr + p, dh, n);
    }
  }
}

template <class T>
void backward(const BackwardArgs<T>& a, const Member& me) {
  const ProductScope scope;
  const int64_t H = a.H, P = a.P, ldg = row_stride(4 * H), r_begin = me.row_begin;
  const bool masked = a.masks.recurrent || a.masks.zoneout_h;
  const auto rows_at = [&](int64_t t) { return std::min(me.row_end, a.rows.count_at(t)); };
  PendingGradients<T> pending{a, a.db + me.index * 4 * H};
  const auto between = [&] { pending.next(); };
  pending.at_step(a.first + a.steps - 1);
  if (!a.w_hr) {
    pending.set(me.unit_begin, me.unit_end, r_begin, rows_at(pending.t));
    pending.finish();
  }
  for (int64_t s = a.first + a.steps - 1; s >= a.first; --s) {
    const int64_t t = pending.t, end = rows_at(t), offset = a.rows.offset_at(t) - a.base;
    if (a.w_hr) {
      projected_gradients(a, me, t, r_begin, end);
      if (me.barrier) me.barrier->wait();
      // The cells of some units run between the products that make dhidden of the next units.
      const int64_t ldr = row_stride(P), ld = padded(H);
      ColumnProducts{P, a.dr + offset * ldr, ldr, a.w_hr, r_begin, end, me.unit_begin, me.unit_end}.run(
          between,
          [&](int64_t r0, int64_t r1, int64_t n0, int64_t width, const float* out) {
            for (int64_t r = r0; r < r1; ++r, out += 64) std::copy_n(out, width, a.dhidden + r * ld + n0);
          },
          [&](int64_t n0, int64_t n1) {
            pending.finish();
            pending.set(n0, n1, r_begin, end);
          });
      pending.finish();
    }
    if (me.barrier) me.barrier->wait();
    if (s > a.first) pending.at_step(s - 1);
    // Without projection the cells of a step run between the products of the one after it, as soon as those
    // have made their dh.
    const int64_t pending_end = s > a.first && !a.w_hr ? rows_at(pending.t) : 0;
    const int64_t n_begin = me.feature_begin, n_end = me.feature_end, ld = padded(P);
    const bool reversed = s % 2 == 1 && alternate_block_order(8.0 * H * (n_end - n_begin));
    ColumnProducts{4 * H, a.dgates + offset * ldg, ldg, a.w_hh, r_begin, end, n_begin, n_end, reversed}.run(
        between,
        [&](int64_t r0, int64_t r1, int64_t n0, int64_t width, const float* out) {
          for (int64_t r = r0; r < r1; ++r, out += 64) {
            const bool fresh = a.rows.fresh_at(t, r);
            float* to = a.dh + r * ld + n0;
            if (masked)
              for (int64_t j = 0; j < std::min(width, P - n0); j += 16) {
                const int n = static_cast<int>(std::min<int64_t>(16, P - n0 - j));
                store_part(to + j, fresh ? V{} : masked_gradient(a, t, r, n0 + j, n, load(out + j)), n);
              }
            else
              for (int64_t j = 0; j < width; j += 16) store(to + j, fresh ? V{} : load(out + j));
          }
        },
        [&](int64_t n0, int64_t n1) {
          pending.finish();
          pending.set(n0, n1, r_begin, pending_end);
        });
    pending.finish();
  }
}

template <class T>
inline constexpr bf16::Kernels<T> kTable = {FASTLSTM_BF16_NAME, pack_gates<T>, pack_rows<T>, pack_columns<T>,
                                            forward<T>,         backward<T>,   gemm};

}  // namespace fastlstm::FASTLSTM_ISA
