// The work of one thread of each kernel in cell_kernels.h: V adjacent features of one row.
//
// Host and device code with plain memory accesses, so that the tests run it without a GPU
// (tests/gpu/test_cuda_host.py). The equations are in cell.h.
#pragma once

#include "cuda/masks.h"

namespace fastlstm::cuda {

FASTLSTM_HD bool has_step(const Steps& s, int64_t t, int64_t b) { return !s.lengths || t < s.lengths[b]; }

// Returns true if direction d starts step t of row b from zero state; the reverse direction does if step t +
// 1 is reset.
FASTLSTM_HD bool starts_from_zero_state(const Steps& s, int d, int64_t t, int64_t b) {
  const int64_t begins = t + d;
  return s.reset_mask && begins < s.T && has_step(s, begins, b) && s.reset_mask[begins * s.B + b];
}

// The same with the row's length. t may also be -1 or T.
FASTLSTM_HD bool starts_from_zero_state(const Steps& s, int d, int64_t t, int64_t b, int64_t length) {
  const int64_t begins = t + d;
  return s.reset_mask && begins < length && s.reset_mask[begins * s.B + b];
}

// Returns true if direction d starts step t of row b from h0 and c0.
FASTLSTM_HD bool starts_from_initial_state(const Steps& s, int d, int64_t t, int64_t b) {
  return d == 0 ? t == 0 : t + 1 == (s.lengths ? s.lengths[b] : s.T);
}

FASTLSTM_HD int64_t step_before(int d, int64_t t) { return d == 0 ? t - 1 : t + 1; }
FASTLSTM_HD int64_t step_after(int d, int64_t t) { return d == 0 ? t + 1 : t - 1; }

// A step of one direction.
struct StepCoord {
  int64_t t, slot;
  bool first, last;  // in scan order
};

// h_prev of step m; zero after a reset.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> previous_h(const Steps& steps, const HiddenState<T>& s, const StepCoord& m, int d,
                                       int64_t b, int64_t at) {
  if (!m.first) return s.unmasked ? load<V>(s.unmasked + at) : load<V>(s.h + at);
  return starts_from_zero_state(steps, d, m.t, b) ? zeros<Acc<T>, V>() : load_or_zeros<V>(s.h0, at);
}

// Stores h_t, features k ... k + V - 1, after its zoneout; a row that lacks the step keeps its h.
template <class T, int V>
FASTLSTM_HD void store_h(const Steps& steps, const HiddenState<T>& s, int D, const StepCoord& m, int d,
                         int64_t b, int64_t k, VecN<Acc<T>, V> h) {
  const int64_t at = (d * steps.B + b) * s.P + k;
  const bool valid = has_step(steps, m.t, b);
  if (!valid) {
    h = previous_h<T, V>(steps, s, m, d, b, at);
  } else if (s.zoneout.values) {
    zone<T, V>(s.zoneout, d, m.t, b, k, previous_h<T, V>(steps, s, m, d, b, at), h);
  }
  store<V>(s.y + ((m.t * steps.B + b) * D + d) * s.P + k, valid ? h : zeros<Acc<T>, V>());
  if (m.last) {
    store<V>(s.h_n + at, h);
    return;
  }
  // The next GEMM does not mask its input, so a reset and the recurrent mask are applied here.
  const int64_t next = step_after(d, m.t);
  if (starts_from_zero_state(steps, d, next, b)) h = zeros<Acc<T>, V>();
  if (s.unmasked) store<V>(s.unmasked + at, h);
  if (s.recurrent_mask.values) scale(h, load_mask<T, V>(s.recurrent_mask, d, next, b, k));
  store<V>(s.h + at, h);
}

// Offset of a row of the reserve, s.gates.
template <class Step>
FASTLSTM_HD int64_t reserve_row(const Step& s, int d, int64_t t, int64_t b) {
  return ((d * s.steps.T + t) * s.steps.B + b) * (s.norm[0].gain_x ? 12 : 4) * s.H;
}

// One unit's gates in a[4].
template <class A, int V>
FASTLSTM_HD Gates<A> gates_of(const VecN<A, V> (&a)[4], int k) {
  return {a[0].v[k], a[1].v[k], a[2].v[k], a[3].v[k]};
}
template <class A, int V>
FASTLSTM_HD void set_gates(VecN<A, V> (&a)[4], int k, const Gates<A>& gates) {
  a[0].v[k] = gates.i, a[1].v[k] = gates.f, a[2].v[k] = gates.g, a[3].v[k] = gates.o;
}

// The pre-activations a become activated gates.
template <class A, int V>
FASTLSTM_HD void activate_gates(VecN<A, V> (&a)[4]) {
#pragma unroll
  for (int k = 0; k < V; ++k) set_gates(a, k, activate<Exact<A>>(gates_of(a, k)));
}
template <class A, int V>
FASTLSTM_HD VecN<A, V> next_c_of(const VecN<A, V> (&a)[4], VecN<A, V> c_prev) {
#pragma unroll
  for (int k = 0; k < V; ++k) c_prev.v[k] = next_c(gates_of(a, k), c_prev.v[k]);
  return c_prev;
}
// h before any projection and zoneout; c: as it enters tanh.
template <class A, int V>
FASTLSTM_HD VecN<A, V> hidden_of(const VecN<A, V> (&a)[4], VecN<A, V> c) {
#pragma unroll
  for (int k = 0; k < V; ++k) c.v[k] = a[3].v[k] * Exact<A>::tanh(c.v[k]);
  return c;
}

template <class T, int V>
FASTLSTM_HD void add_biases(const ForwardStep<T>& s, int d, int g, int64_t j, VecN<Acc<T>, V>& a) {
  if (s.bias_ih[d]) add(a, load<V>(s.bias_ih[d] + g * s.H + j));
  if (s.bias_hh[d]) add(a, load<V>(s.bias_hh[d] + g * s.H + j));
}

// c_prev; zero after a reset.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> previous_c(const ForwardStep<T>& s, const StepCoord& m, int d, int64_t b,
                                       int64_t j) {
  const int64_t at = (d * s.steps.B + b) * s.H + j;
  if (starts_from_zero_state(s.steps, d, m.t, b)) return zeros<Acc<T>, V>();
  return m.first ? load_or_zeros<V>(s.c0, at) : load<V>(s.c + at);
}

// Forward's input other than h W_hh^T; gates are without it. For a row that lacks the step all is zero but c.
template <class A, int V>
struct ForwardInput {
  bool valid;  // the row has the step
  VecN<A, V> c, gates[4];
};

template <class T, int V>
FASTLSTM_HD ForwardInput<Acc<T>, V> forward_input(const ForwardStep<T>& s, const StepCoord& m, int d,
                                                  int64_t b, int64_t j) {
  using A = Acc<T>;
  const int64_t H = s.H;
  ForwardInput<A, V> in = {has_step(s.steps, m.t, b)};
  in.c = previous_c<T, V>(s, m, d, b, j);
#pragma unroll
  for (int g = 0; g < 4; ++g) in.gates[g] = zeros<A, V>();
  if (!in.valid) return in;
  const A* gates_x = s.gates_x + ((d * s.slots + m.slot) * s.steps.B + b) * 4 * H + j;
#pragma unroll
  for (int g = 0; g < 4; ++g) {
    in.gates[g] = load<V>(gates_x + g * H);
    add_biases<T, V>(s, d, g, j, in.gates[g]);
  }
  return in;
}

// Stores the results of a step: activated gates a, c before its zoneout, h before any projection and zoneout.
// For a row that lacks the step a and h are zero.
template <class T, int V>
FASTLSTM_HD void store_forward(const ForwardStep<T>& s, const StepCoord& m, int d, int64_t b, int64_t j,
                               bool valid, const VecN<Acc<T>, V>& c_prev, VecN<Acc<T>, V> c,
                               const VecN<Acc<T>, V>& h, const VecN<Acc<T>, V> (&a)[4]) {
  const int64_t B = s.steps.B, H = s.H;
  const int64_t at = (d * B + b) * H + j;  // in [D, B, H]
  if (!valid) {
    c = c_prev;
  } else if (s.zoneout.values) {
    zone<T, V>(s.zoneout, d, m.t, b, j, c_prev, c);
  }
  if (s.cells) store<V>(s.cells + ((m.t * B + b) * s.D + d) * H + j, valid ? c : zeros<Acc<T>, V>());
  if (s.gates) {
#pragma unroll
    for (int g = 0; g < 4; ++g) store<V>(s.gates + reserve_row(s, d, m.t, b) + g * H + j, a[g]);
  }
  if (m.last) {
    store<V>(s.c_n + at, c);
  } else {
    store<V>(s.c + at, c);
  }
  if (s.hidden) {
    store<V>(s.hidden + at, h);
  } else {
    store_h<T, V>(s.steps, s.state, s.D, m, d, b, j, h);
  }
}

template <class T, int V>
FASTLSTM_HD void forward_element(const ForwardStep<T>& s, int d, int64_t b, int64_t j) {
  using A = Acc<T>;
  const StepCoord m = {s.t[d], s.slot[d], s.first, s.c_n != nullptr};
  ForwardInput<A, V> in = forward_input<T, V>(s, m, d, b, j);
  VecN<A, V> c = in.c, h = zeros<A, V>();
  if (in.valid) {
#pragma unroll
    for (int g = 0; s.gates_h && g < 4; ++g)
      add(in.gates[g], load<V>(s.gates_h + (d * s.steps.B + b) * 4 * s.H + g * s.H + j));
    activate_gates(in.gates);
    c = next_c_of(in.gates, in.c);
    h = hidden_of(in.gates, c);
  }
  store_forward<T, V>(s, m, d, b, j, in.valid, in.c, c, h, in.gates);
}

template <class T, int V>
FASTLSTM_HD void projected_element(const ProjectedStep<T>& s, int d, int64_t b, int64_t k) {
  const int64_t at = (d * s.steps.B + b) * s.state.P + k;
  const StepCoord m = {s.t[d], 0, s.first, s.state.h_n != nullptr};
  store_h<T, V>(s.steps, s.state, s.D, m, d, b, k, load<V>(s.projected + at));
}

// The gradient of h_t from the next step in scan order, whose product is `dh`, and from h_n, without that of
// y.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> carried_dh(const Steps& steps, const HiddenGradient<T>& s, bool first, int d,
                                       int64_t t, int64_t b, int64_t k, VecN<Acc<T>, V> dh) {
  const int64_t at = (d * steps.B + b) * s.P + k, done = step_after(d, t);
  if (first) return load_or_zeros<V>(s.dh_n, at);
  if (!has_step(steps, done, b)) return load<V>(s.carry + at);
  if (starts_from_zero_state(steps, d, done, b)) return zeros<Acc<T>, V>();
  if (s.recurrent_mask.values) scale(dh, load_mask<T, V>(s.recurrent_mask, d, done, b, k));
  if (s.zoneout.values) add(dh, load<V>(s.carry + at));
  return dh;
}

// dh [D, B, P] from the GEMM of the step done before; zeros at the first.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> load_product_dh(const Steps& steps, const HiddenGradient<T>& s, bool first, int d,
                                            int64_t b, int64_t k) {
  return first ? zeros<Acc<T>, V>() : load<V>(s.dh + (d * steps.B + b) * s.P + k);
}

// The whole gradient of h_t before its zoneout; zero for a row that lacks the step. `carry` takes the part
// that passes the step. dy: that of y at t.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> total_dh(const Steps& steps, const HiddenGradient<T>& s, bool first, int d,
                                     int64_t t, int64_t b, int64_t k, const VecN<Acc<T>, V>& product,
                                     const VecN<Acc<T>, V>& dy) {
  VecN<Acc<T>, V> dh = carried_dh<T, V>(steps, s, first, d, t, b, k, product);
  if (!has_step(steps, t, b)) {
    store<V>(s.carry + (d * steps.B + b) * s.P + k, dh);
    return zeros<Acc<T>, V>();
  }
  add(dh, dy);
  if (s.zoneout.values)
    store<V>(s.carry + (d * steps.B + b) * s.P + k, take_share<T, V>(s.zoneout, d, t, b, k, dh));
  return dh;
}

template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> load_dy(const Steps& steps, const HiddenGradient<T>& s, int d, int64_t t,
                                    int64_t b, int64_t k) {
  if (!s.dy || !has_step(steps, t, b)) return zeros<Acc<T>, V>();
  return load<V>(s.dy + t * s.dy_t + b * s.dy_b + d * s.P + k);
}

// Backward's input other than dh. For a row that lacks the step all is zero but dc.
template <class A, int V>
struct BackwardInput {
  bool valid;                  // the row has the step
  VecN<A, V> dc, kept_dc, dy;  // dc: with dcells; kept_dc: the share of c_prev by zoneout, which dc lacks
  VecN<A, V> a[4], c, c_prev;  // c: before its zoneout
};

template <class T, int V>
FASTLSTM_HD BackwardInput<Acc<T>, V> backward_input(const BackwardStep<T>& s, const StepCoord& m, int d,
                                                    int64_t b, int64_t j) {
  using A = Acc<T>;
  const int64_t B = s.steps.B, H = s.H, t = m.t, at = (d * B + b) * H + j;
  BackwardInput<A, V> in = {has_step(s.steps, t, b)};
  in.dc = m.first ? load_or_zeros<V>(s.dc_n, at) : load<V>(s.dc + at);
  in.c = in.c_prev = in.dy = in.kept_dc = zeros<A, V>();
#pragma unroll
  for (int g = 0; g < 4; ++g) in.a[g] = zeros<A, V>();
  if (!in.valid) return in;
  if (!s.dhidden) in.dy = load_dy<T, V>(s.steps, s.gradient, d, t, b, j);
  if (s.dcells) add(in.dc, load<V>(s.dcells + t * s.dcells_t + b * s.dcells_b + d * H + j));
#pragma unroll
  for (int g = 0; g < 4; ++g) in.a[g] = load<V>(s.gates + reserve_row(s, d, t, b) + g * H + j);
  in.c = load<V>(s.cells + ((t * B + b) * s.D + d) * H + j);
  if (!starts_from_zero_state(s.steps, d, t, b)) {
    in.c_prev = starts_from_initial_state(s.steps, d, t, b)
                    ? load_or_zeros<V>(s.c0, at)
                    : load<V>(s.cells + ((step_before(d, t) * B + b) * s.D + d) * H + j);
  }
  if (s.zoneout.values) {
    in.kept_dc = take_share<T, V>(s.zoneout, d, t, b, j, in.dc);
    in.c = next_c_of(in.a, in.c_prev);
  }
  return in;
}

// in.dc, of c_prev through the step, becomes its whole gradient.
template <class A, int V>
FASTLSTM_HD void finish_dc(const Steps& steps, int d, int64_t t, int64_t b, BackwardInput<A, V>& in) {
  add(in.dc, in.kept_dc);
  if (starts_from_zero_state(steps, d, t, b)) in.dc = zeros<A, V>();
}

// The gradient of h_t before any projection and zoneout. Called once per element: it may change `carry`.
template <class T, int V>
FASTLSTM_HD VecN<Acc<T>, V> backward_dh(const BackwardStep<T>& s, const StepCoord& m, int d, int64_t b,
                                        int64_t j, const VecN<Acc<T>, V>& dy) {
  if (s.dhidden) return load<V>(s.dhidden + (d * s.steps.B + b) * s.H + j);
  return total_dh<T, V>(s.steps, s.gradient, m.first, d, m.t, b, j,
                        load_product_dh<T, V>(s.steps, s.gradient, m.first, d, b, j), dy);
}

// Stores in.dc, and in.c as the pre-projection hidden state.
template <class T, int V>
FASTLSTM_HD void store_state_gradient(const BackwardStep<T>& s, const StepCoord& m, int d, int64_t b,
                                      int64_t j, const BackwardInput<Acc<T>, V>& in) {
  const int64_t B = s.steps.B, H = s.H;
  if (s.hidden) store<V>(s.hidden + ((d * s.slots + m.slot) * B + b) * H + j, in.c);
  store<V>(s.dc + (d * B + b) * H + j, in.dc);
}

template <class T, int V>
FASTLSTM_HD void backward_element(const BackwardStep<T>& s, int d, int64_t b, int64_t j) {
  using A = Acc<T>;
  const StepCoord m = {s.t[d], s.slot[d], s.first, false};
  BackwardInput<A, V> in = backward_input<T, V>(s, m, d, b, j);
  const VecN<A, V> dh = backward_dh<T, V>(s, m, d, b, j, in.dy);
  if (in.valid) {
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const Gates<A> gate = gates_of(in.a, k);
      const A tanh_c = Exact<A>::tanh(in.c.v[k]);
      set_gates(in.a, k, cell_backward(gate, in.c_prev.v[k], tanh_c, dh.v[k], in.dc.v[k]));
      in.c.v[k] = gate.o * tanh_c;
    }
    finish_dc(s.steps, d, m.t, b, in);
  }
  // The gradients of the pre-activations, zero for a row that lacks the step.
  T* const dgates = s.dgates + ((d * s.slots + m.slot) * s.steps.B + b) * 4 * s.H + j;
#pragma unroll
  for (int g = 0; g < 4; ++g) store<V>(dgates + g * s.H, in.a[g]);
  store_state_gradient<T, V>(s, m, d, b, j, in);
}

template <class T, int V>
FASTLSTM_HD void projected_gradient_element(const ProjectedGradient<T>& s, int d, int64_t b, int64_t k) {
  const VecN<Acc<T>, V> dh = total_dh<T, V>(s.steps, s.gradient, s.first, d, s.t[d], b, k,
                                            load_product_dh<T, V>(s.steps, s.gradient, s.first, d, b, k),
                                            load_dy<T, V>(s.steps, s.gradient, d, s.t[d], b, k));
  store<V>(s.dprojected + ((d * s.slots + s.slot[d]) * s.steps.B + b) * s.gradient.P + k, dh);
}

template <class T, int V>
FASTLSTM_HD void initial_gradient_element(const InitialGradient<T>& s, int d, int64_t b, int64_t k) {
  const int64_t beyond = d == 0 ? -1 : s.steps.T;  // the step before the first, in scan order
  const VecN<Acc<T>, V> dh = carried_dh<T, V>(s.steps, s.gradient, false, d, beyond, b, k,
                                              load_product_dh<T, V>(s.steps, s.gradient, false, d, b, k));
  store<V>(s.dh0 + (d * s.steps.B + b) * s.gradient.P + k, dh);
}

// r: step of out.
template <class T, int V>
FASTLSTM_HD void ragged_row_element(const RaggedRows<T>& s, int64_t r, int64_t b, int64_t k) {
  const int64_t t = s.begin + r;
  VecN<Acc<T>, V> x = zeros<Acc<T>, V>();
  if (has_step(s.steps, t, b)) {
    if (!s.previous) {
      x = load<V>(s.source + t * s.source_t + b * s.source_b + k);
    } else if (starts_from_zero_state(s.steps, s.d, t, b)) {
      // stays zero
    } else if (starts_from_initial_state(s.steps, s.d, t, b)) {
      x = load_or_zeros<V>(s.initial, b * s.n + k);
    } else {
      x = load<V>(s.source + step_before(s.d, t) * s.source_t + b * s.source_b + k);
    }
    if (s.mask.values) scale(x, load_mask<T, V>(s.mask, s.d, t, b, k));
  }
  store<V>(s.out + (r * s.steps.B + b) * s.n + k, x);
}

}  // namespace fastlstm::cuda
