// Forward of one direction over the whole sequence: per step h W_hh^T, then the cell while the tile is in L1.
#pragma once

#include "cpu/gemm.h"
#include "cpu/sequence.h"

namespace fastlstm::FASTLSTM_ISA {

// A unit block is one vector of W units; its weights are packed as two panels, [P][i, f][W] and [P][g, o][W].
template <class T>
constexpr int64_t kGateBlock = 4 * kWidth<T>;
// Rows whose pre-activations wait in scratch while one unit block's weights pass.
constexpr int64_t kRowGroup = 48;
template <class T>
int64_t forward_packed_size(int64_t H, int64_t P) {
  return (H + kWidth<T> - 1) / kWidth<T> * P * kGateBlock<T>;
}

template <class T>
void pack_forward(const T* w_hh, int64_t H, int64_t P, T* packed) {
  constexpr int64_t W = kWidth<T>;
  for (int64_t u0 = 0; u0 < H; u0 += W) {
    const int64_t n = std::min(W, H - u0);
    T* block = packed + u0 / W * P * kGateBlock<T>;
    for (int64_t k0 = 0; k0 < P; k0 += 16)  // 16 columns of a row are a cache line or two: read them together
      for (int64_t gate = 0; gate < 4; ++gate)
        for (int64_t u = 0; u < W; ++u) {
          const T* row = w_hh + (gate * H + u0 + std::min(u, n - 1)) * P;
          T* out = block + gate / 2 * P * kPanel<T> + gate % 2 * W + u;
          const int64_t k1 = std::min(k0 + 16, P);
          if (u < n)
            for (int64_t k = k0; k < k1; ++k) out[k * kPanel<T>] = row[k];
          else
            for (int64_t k = k0; k < k1; ++k) out[k * kPanel<T>] = 0;
        }
  }
}

template <class T>
int64_t forward_scratch(int64_t H, int64_t P) {
  // pre-activations of a row group, and with projection the h of all units before it, for a row group
  return kRowGroup * kGateBlock<T> + (P == H ? 0 : kRowGroup * (H + (P + kPanel<T>)));
}

template <class T>
struct ForwardStep {
  const ForwardArgs<T>& a;
  int64_t t, s;    // time, and place in the direction's order
  const T* h_in;   // [B, P]
  T* h_out;        // [B, P]
  T* gates;        // [count, 4H]
  int64_t next_t;  // the step after this one in the direction's order, or -1
  T* pre;          // [kRowGroup, 4 gates, W]
  T* hidden;       // [kRowGroup, H] with projection

  // Whether sorted row r enters the next step with zero state.
  bool cleared_next(int64_t r) const {
    return a.rows.fresh && next_t >= 0 && r < a.rows.count_at(next_t) && a.rows.fresh_at(next_t, r);
  }

  // Units [u0, u0 + n), n <= W, of row r: `product` holds h W_hh^T as [4][W].
  FASTLSTM_INLINE void cell(int64_t r, int64_t r_group, int64_t u0, int n, const T* product) const {
    constexpr int W = kWidth<T>;
    const int64_t H = a.H;
    T* g = gates + r * 4 * H + u0;
    T* c = a.c + r * H + u0;
    const bool full = n == W;
    auto get = [&](const T* p) { return full ? load(p) : load_part(p, n); };
    auto put = [&](T* p, Vec<T> v) { full ? store(p, v) : store_part(p, v, n); };
    const T* bias = a.bias + u0;
    const Gates<Vec<T>> gate = activate<Activation<T>>(
        Gates<Vec<T>>{load(product) + (get(g) + get(bias)), load(product + W) + (get(g + H) + get(bias + H)),
                      load(product + 2 * W) + (get(g + 2 * H) + get(bias + 2 * H)),
                      load(product + 3 * W) + (get(g + 3 * H) + get(bias + 3 * H))});
    const Vec<T> c_prev = a.rows.fresh_at(t, r) ? Vec<T>{} : get(c);
    const Vec<T> c_next = next_c(gate, c_prev);
    const Vec<T> h = gate.o * Activation<T>::tanh(c_next);
    if (a.keep_gates) {
      put(g, gate.i);
      put(g + H, gate.f);
      put(g + 2 * H, gate.g);
      put(g + 3 * H, gate.o);
    }
    put(c, c_next);
    const int64_t row = t * a.rows.B + a.rows.batch_row_at(r);
    if (a.cells) put(a.cells + row * a.cells_stride + u0, c_next);
    if (a.w_hr) {
      put(hidden + r_group * H + u0, h);
    } else {
      put(a.y + row * a.y_stride + u0, h);
      put(h_out + r * a.P + u0, cleared_next(r) ? Vec<T>{} : h);
    }
  }

  // h = hidden W_hr^T for rows [r0, r1), to the state and to y.
  void project(int64_t r0, int64_t r1, T* out /* [kRowGroup, padded P] */) const {
    constexpr int64_t W2 = kPanel<T>;
    const int64_t H = a.H, P = a.P, ld = (P + W2 - 1) / W2 * W2;
    for (int64_t p = 0; p < P; p += W2) panel_product(r1 - r0, H, hidden, H, a.w_hr + p * H, out + p, ld);
    for (int64_t r = r0; r < r1; ++r) {
      const T* h = out + (r - r0) * ld;
      const int64_t row = t * a.rows.B + a.rows.batch_row_at(r);
      std::copy(h, h + P, a.y + row * a.y_stride);
      if (cleared_next(r))
        std::fill(h_out + r * P, h_out + (r + 1) * P, T(0));
      else
        std::copy(h, h + P, h_out + r * P);
    }
  }

  // Rows [r0, r1), at most kRowGroup, of the unit block at u0, from packed weights.
  FASTLSTM_INLINE void block_packed(int64_t r0, int64_t r1, int64_t u0) const {
    constexpr int W = kWidth<T>;
    const int64_t P = a.P, rows = r1 - r0;
    const T* w = a.packed + u0 / W * P * kGateBlock<T>;
    const T* h = h_in + r0 * P;
    constexpr int64_t ld = kGateBlock<T>, W2 = kPanel<T>;
    if (rows <= 2) {  // four vectors of columns, for enough accumulators
      if (rows == 1) tile<T, 1, 4>(P, h, P, w, W2, pre, ld, false, P * W2);
      if (rows == 2) tile<T, 2, 4>(P, h, P, w, W2, pre, ld, false, P * W2);
    } else {
      panel_product(rows, P, h, P, w, pre, ld);                // i, f
      panel_product(rows, P, h, P, w + P * W2, pre + W2, ld);  // g, o
    }
    const int n = static_cast<int>(std::min<int64_t>(W, a.H - u0));
    for (int64_t r = r0; r < r1; ++r) {
      // A row's gates lie 4H elements after the last one's, where no hardware prefetch finds them.
      const T* soon = gates + (r + 4) * 4 * a.H + u0;
      for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(soon + gate * a.H, 1, 3);
      cell(r, r - r0, u0, n, pre + (r - r0) * ld);
    }
  }

  // The same for one row from weight_hh as stored: dot products along its rows. For few rows and steps this
  // beats packing, whose cost is that of several passes over the weights.
  FASTLSTM_INLINE void block_direct(int64_t r, int64_t r_group, int64_t u0) const {
    constexpr int W = kWidth<T>;
    const int64_t H = a.H, P = a.P;
    const int n = static_cast<int>(std::min<int64_t>(W, H - u0));
    const T* h = h_in + r * P;
    const int64_t whole = P / W * W;
    const int tail = static_cast<int>(P - whole);
    alignas(64) T product[4 * W] = {};
    for (int u = 0; u < n; ++u) {
      Vec<T> acc[4] = {};
      const T* w = a.w_hh + (u0 + u) * P;
      for (int64_t k = 0; k < whole; k += W) {
        const Vec<T> hk = load(h + k);
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) acc[gate] += hk * load(w + gate * H * P + k);
      }
      if (tail) {
        const Vec<T> hk = load_part(h + whole, tail);
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) acc[gate] += hk * load_part(w + gate * H * P + whole, tail);
      }
      for (int gate = 0; gate < 4; ++gate) product[gate * W + u] = sum<T>(acc[gate]);
    }
    cell(r, r_group, u0, n, product);
  }
};

template <class T>
void forward(const ForwardArgs<T>& a, const Member& me) {
  constexpr int64_t W = kWidth<T>;
  const int64_t steps = a.rows.T;
  T* scratch = a.scratch + me.index * forward_scratch<T>(a.H, a.P);
  T* hidden = scratch + kRowGroup * kGateBlock<T>;
  const int64_t base = a.rows.offset_at(a.reverse ? steps - a.first - a.steps : a.first);
  for (int64_t s = a.first; s < a.first + a.steps; ++s) {
    const int64_t t = a.reverse ? steps - 1 - s : s;
    const int64_t next_t = s + 1 < steps ? (a.reverse ? t - 1 : t + 1) : -1;
    const ForwardStep<T> step{a,
                              t,
                              s,
                              a.h + (s % 2) * a.rows.B * a.P,
                              a.h + ((s + 1) % 2) * a.rows.B * a.P,
                              a.gates + (a.rows.offset_at(t) - base) * 4 * a.H,
                              next_t,
                              scratch,
                              hidden};
    const int64_t end = std::min(me.row_end, a.rows.count_at(t));
    for (int64_t r0 = me.row_begin; r0 < end; r0 += kRowGroup) {
      const int64_t r1 = std::min(end, r0 + kRowGroup);
      if (a.packed) {
        for (int64_t u = me.unit_begin; u < me.unit_end; u += W) step.block_packed(r0, r1, u);
      } else {
        for (int64_t r = r0; r < r1; ++r)
          for (int64_t u = me.unit_begin; u < me.unit_end; u += W) step.block_direct(r, r - r0, u);
      }
      if (a.w_hr) step.project(r0, r1, hidden + kRowGroup * a.H);
    }
    if (me.barrier) me.barrier->wait();
  }
}

}  // namespace fastlstm::FASTLSTM_ISA
