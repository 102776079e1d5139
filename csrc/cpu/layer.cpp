// The native ops on CPU tensors: the big products through ATen, the time loop through cpu/forward.h and
// backward.h.
#include <ATen/ATen.h>
#include <ATen/ops/empty_native.h>
#include <torch/library.h>

#include "contract.h"
#include "cpu/ragged.h"
#include "cpu/sequence.h"
#include "cpu/team.h"

namespace fastlstm {
namespace {

// torch.empty below the dispatcher, which tiny layers would wait for.
at::Tensor new_empty(at::IntArrayRef sizes, const at::Tensor& like) {
  return at::native::empty_cpu(sizes, like.scalar_type());
}

// Row-major C [m, n] = A [m, k] B [k, n] (+ C if add), through ATen where that is worth a call. A and B are
// given by their rows' stride, or if transposed by that of the rows of A^T, B^T.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool transposed = false;
};
template <class T>
void product(int64_t m, int64_t n, int64_t k, Operand<T> a, Operand<T> b, bool add, T* c, int64_t ldc) {
  if (m * n * k <= (1 << 19)) {
    const Kernels<T>& kernel = kernels<T>();
    thread_local std::vector<T> scratch;
    scratch.resize(std::max<size_t>(scratch.size(), kernel.small_product_scratch(k)));
    return kernel.small_product(m, n, k, a.data, a.stride, a.transposed, b.data, b.transposed ? 1 : b.stride,
                                b.transposed ? b.stride : 1, add, c, ldc, scratch.data());
  }
  const auto view = [](const T* data, int64_t rows, int64_t columns, int64_t stride, bool transposed) {
    return at::from_blob(const_cast<T*>(data), {rows, columns},
                         {transposed ? 1 : stride, transposed ? stride : 1},
                         at::TensorOptions(c10::CppTypeToScalarType<T>::value));
  };
  at::Tensor out = view(c, m, n, ldc, false);
  const at::Tensor left = view(a.data, m, k, a.stride, a.transposed),
                   right = view(b.data, k, n, b.stride, b.transposed);
  if (add)
    at::addmm_out(out, out, left, right);
  else
    at::mm_out(out, left, right);
}

// One allocation cut into aligned parts: take() what is needed, then allocate(), then resolve with at().
template <class T>
class Workspace {
 public:
  int64_t take(int64_t elements) {
    const int64_t offset = total_;
    total_ += (elements + 15) / 16 * 16;
    return offset;
  }
  void allocate(const at::Tensor& like) {
    buffer_ = new_empty({total_}, like);
    data_ = buffer_.mutable_data_ptr<T>();
  }
  T* at(int64_t offset) const { return data_ + offset; }

 private:
  int64_t total_ = 0;
  at::Tensor buffer_;
  T* data_ = nullptr;
};

// Products of few rows cost less from the weights as stored than packing them does.
bool worth_packing(int64_t N, int64_t B) { return N > (B <= 2 ? 64 : 12); }

// state [D, B, n] of direction d into sorted rows of stride ld; zeros for none.
template <class T>
void gather_state(const OptionalTensor& state, int64_t d, const Rows& rows, int64_t n, T* out, int64_t ld) {
  const T* in = state ? state->const_data_ptr<T>() + d * rows.B * n : nullptr;
  for (int64_t r = 0; r < rows.B; ++r) {
    if (in)
      std::copy_n(in + rows.batch_row_at(r) * n, n, out + r * ld);
    else
      std::fill_n(out + r * ld, n, T(0));
  }
}

// bias_ih + bias_hh [4H], zeros without.
template <class T>
void sum_biases(const DirectionWeights& w, int64_t H, T* out) {
  if (!w.bias_ih.defined()) {
    std::fill_n(out, 4 * H, T(0));
    return;
  }
  const at::Tensor ih = w.bias_ih.contiguous(), hh = w.bias_hh.contiguous();
  std::transform(ih.const_data_ptr<T>(), ih.const_data_ptr<T>() + 4 * H, hh.const_data_ptr<T>(), out,
                 std::plus<T>());
}

OptionalTensor contiguous(const OptionalTensor& t) { return t ? OptionalTensor(t->contiguous()) : t; }

// x [T, B, I] as its N packed rows; the padding is never read.
template <class T>
at::Tensor packed_input(const at::Tensor& x, const LayerSizes& s, const Ragged& ragged) {
  const at::Tensor rows = x.contiguous().view({s.rows(), s.I});
  if (!ragged.ragged()) return rows;
  at::Tensor packed = new_empty({ragged.N(), s.I}, x);
  const T* from = rows.const_data_ptr<T>();
  T* to = packed.mutable_data_ptr<T>();
  ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
    std::copy_n(from + row * s.I, s.I, to + packed_row * s.I);
  });
  return packed;
}

// The packed rows [begin, end) of steps [first, first + steps) of direction d's own order, and the first of
// them in time.
struct Span {
  int64_t t0, begin, end;
  Span(const LayerSizes& s, const Ragged& ragged, int64_t d, int64_t first, int64_t steps)
      : t0(d == 1 ? s.T - first - steps : first),
        begin(ragged.rows(d).offset_at(t0)),
        end(t0 + steps == s.T ? ragged.N() : ragged.rows(d).offset_at(t0 + steps)) {}
  int64_t rows() const { return end - begin; }
};

// Steps whose gates [., 4H] go through a buffer at once: at least `rows` of them for efficient products, else
// as few as stay in cache between the products and the time loop. What is reused need not be fetched from the
// system, either.
int64_t chunk_steps(const LayerSizes& s, int64_t size, int64_t rows, int64_t bytes) {
  rows = std::max(rows, bytes / std::max<int64_t>(1, 4 * s.H * size));
  return std::clamp<int64_t>(rows / s.B, 1, s.T);
}

template <class T>
LayerResults forward(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                     at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                     bool keep_cells, bool keep_reserve) {
  const LayerSizes s(x, weights);
  s.check_inputs(x, h0, c0, lengths, reset_mask);
  const Ragged ragged(s, lengths, reset_mask);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t N = ragged.N(), H = s.H, P = s.P, B = s.B, D = s.D;
  keep_cells |= keep_reserve;

  const auto empty = [&](at::IntArrayRef sizes) { return new_empty(sizes, x); };
  // Rows past a length are zero, and written by nobody.
  const auto per_step = [&](int64_t n) {
    return ragged.ragged() ? at::zeros({s.T, B, D * n}, x.options()) : empty({s.T, B, D * n});
  };
  const at::Tensor y = per_step(P), h_n = empty({D, B, P}), c_n = empty({D, B, H});
  const at::Tensor cells = keep_cells ? per_step(H) : empty({0});
  // A ragged batch fills its first N rows only; the rest must not differ from run to run.
  const bool partial = keep_reserve && ragged.ragged();
  const at::Tensor reserve = partial        ? at::zeros({D, s.T, B, 4 * H}, x.options())
                             : keep_reserve ? empty({D, s.T, B, 4 * H})
                                            : empty({0});
  if (s.rows() == 0) return {y, h_n, c_n, cells, reserve};

  const at::Tensor input = packed_input<T>(x, s, ragged);  // [N, I]
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const Plan plan = make_plan(D, s.T, double(N) / s.T, H, P, sizeof(T), kernel.unit_block);
  const bool pack = s.proj() || worth_packing(N, B);
  const int64_t chunk = keep_reserve ? s.T : chunk_steps(s, sizeof(T), 256, int64_t{2} << 20);

  Workspace<T> space;
  std::vector<int64_t> h_at, c_at, bias_at, packed_at, hr_at, gates_at;
  for (int64_t d = 0; d < D; ++d) {
    h_at.push_back(space.take(2 * B * P));
    c_at.push_back(space.take(B * H));
    bias_at.push_back(space.take(4 * H));
    packed_at.push_back(space.take(pack ? kernel.forward_packed_size(H, P) : 0));
    hr_at.push_back(space.take(s.proj() ? kernel.columns_packed_size(H, P) : 0));
    gates_at.push_back(space.take(keep_reserve ? 0 : chunk * B * 4 * H));
  }
  const int64_t scratch_at = space.take(plan.threads() * kernel.forward_scratch(H, P));
  space.allocate(x);

  std::vector<ForwardArgs<T>> args;
  std::vector<at::Tensor> hold, w_ih;
  const OptionalTensor h0c = contiguous(h0), c0c = contiguous(c0);
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w(s, weights, d);
    const at::Tensor w_hh = w.hh.contiguous();
    hold.push_back(w_hh);
    w_ih.push_back(w.ih.contiguous());
    sum_biases<T>(w, H, space.at(bias_at[d]));
    T* h = space.at(h_at[d]);
    gather_state<T>(h0c, d, rows[d], P, h, P);
    if (rows[d].fresh) {  // steps clear the state for the next; the first has none before it
      const int64_t t = d == 1 ? s.T - 1 : 0;
      for (int64_t r = 0; r < rows[d].count_at(t); ++r)
        if (rows[d].fresh_at(t, r)) std::fill_n(h + r * P, P, T(0));
    }
    std::copy_n(h, B * P, h + B * P);  // a reverse row may begin at an odd step
    gather_state<T>(c0c, d, rows[d], H, space.at(c_at[d]), H);
    if (pack) kernel.pack_forward(w_hh.const_data_ptr<T>(), H, P, space.at(packed_at[d]));
    if (s.proj()) {
      const at::Tensor w_hr = w.hr.contiguous();  // [P, H], its transpose is packed
      kernel.pack_columns(w_hr.const_data_ptr<T>(), H, P, 1, H, space.at(hr_at[d]));
    }
    args.push_back(
        {rows[d], H, P, d == 1, 0, 0,
         keep_reserve ? reserve.mutable_data_ptr<T>() + d * s.rows() * 4 * H : space.at(gates_at[d]),
         keep_reserve, space.at(bias_at[d]), w_hh.const_data_ptr<T>(),
         pack ? space.at(packed_at[d]) : nullptr, s.proj() ? space.at(hr_at[d]) : nullptr, h,
         space.at(c_at[d]), y.mutable_data_ptr<T>() + d * P,
         keep_cells ? cells.mutable_data_ptr<T>() + d * H : nullptr, D * P, D * H, space.at(scratch_at)});
  }

  for (int64_t first = 0; first < s.T; first += chunk) {
    const int64_t steps = std::min(chunk, s.T - first);
    for (int64_t d = 0; d < D; ++d) {
      args[d].first = first;
      args[d].steps = steps;
      const Span span(s, ragged, d, first, steps);
      if (span.rows() == 0) continue;
      product<T>(span.rows(), 4 * H, s.I, {input.const_data_ptr<T>() + span.begin * s.I, s.I},
                 {w_ih[d].const_data_ptr<T>(), s.I, true}, false, args[d].gates, 4 * H);
    }
    run_plan(plan, rows, N, H, kernel.unit_block,
             [&](int64_t d, const Member& me) { kernel.forward(args[d], me); });
  }

  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < B; ++r) {
      const int64_t b = rows[d].batch_row_at(r);
      // The state a forward row ends with lies where its last step wrote it; reverse rows all end with the
      // last step.
      const int64_t parity = (d == 1 ? s.T : ragged.length(r)) % 2;
      const T* h = space.at(h_at[d]) + (parity * B + r) * P;
      std::copy_n(h, P, h_n.mutable_data_ptr<T>() + (d * B + b) * P);
      std::copy_n(space.at(c_at[d]) + r * H, H, c_n.mutable_data_ptr<T>() + (d * B + b) * H);
    }
  return {y, h_n, c_n, cells, reserve};
}

// The state [N, P] that enters each step, from y [T, B, D*P]: what dW_hh multiplies.
template <class T>
at::Tensor entering_states(const at::Tensor& y, const OptionalTensor& h0, const LayerSizes& s,
                           const Ragged& ragged, int64_t d) {
  at::Tensor states = new_empty({ragged.N(), s.P}, y);
  T* out = states.mutable_data_ptr<T>();
  const T* from = y.const_data_ptr<T>() + d * s.P;
  const T* initial = h0 ? h0->const_data_ptr<T>() + d * s.B * s.P : nullptr;
  const Rows rows = ragged.rows(d);
  ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t t, int64_t r) {
    const int64_t before = d == 1 ? t + 1 : t - 1;
    const bool held = before >= 0 && before < s.T && r < rows.count_at(before);
    T* to = out + packed_row * s.P;
    if (rows.fresh_at(t, r) || (!held && !initial))
      std::fill_n(to, s.P, T(0));
    else if (held)
      std::copy_n(from + (before * s.B + rows.batch_row_at(r)) * s.D * s.P, s.P, to);
    else
      std::copy_n(initial + rows.batch_row_at(r) * s.P, s.P, to);
  });
  return states;
}

// A weight's gradient dw [m, n] (+)= dgates [rows, m]^T times states [rows, n] with row stride ld.
template <class T>
void weight_gradient(int64_t rows, const T* dgates, const T* states, int64_t ld, bool add,
                     const at::Tensor& dw) {
  const int64_t m = dw.size(0), n = dw.size(1);
  if (rows > 0)
    product<T>(m, n, rows, {dgates, m, true}, {states, ld}, add, dw.mutable_data_ptr<T>(), n);
  else if (!add)
    std::fill_n(dw.mutable_data_ptr<T>(), m * n, T(0));
}

// dW_hh [4H, P] (+)= dgates^T times the states that entered the span's steps. In a plain batch these are y
// one step on, and h0, without a copy.
template <class T>
void recurrent_gradient(const Span& span, const T* dgates, const at::Tensor& y, const OptionalTensor& h0,
                        const LayerSizes& s, int64_t d, bool add, const at::Tensor& dw) {
  const int64_t ld = s.D * s.P, G = 4 * s.H;
  const T* states = y.const_data_ptr<T>() + d * s.P;
  const bool reverse = d == 1;
  const bool initial =
      reverse ? span.end == s.rows() : span.begin == 0;  // the direction's first step is among them
  const int64_t others = span.rows() - (initial ? s.B : 0);
  const int64_t from = reverse ? span.begin + s.B : span.begin - (initial ? 0 : s.B);
  weight_gradient<T>(others, dgates + (initial && !reverse ? s.B * G : 0), states + from * ld, ld, add, dw);
  if (initial && h0)
    weight_gradient<T>(s.B, dgates + (reverse ? others * G : 0), h0->const_data_ptr<T>() + d * s.B * s.P, s.P,
                       true, dw);
}

// db [G] (+)= the sum of the rows of dgates [rows, G].
template <class T>
void bias_gradient(int64_t rows, const T* dgates, bool add, const at::Tensor& db) {
  const int64_t G = db.size(0);
  T* out = db.mutable_data_ptr<T>();
  at::parallel_for(0, (G + 63) / 64, 4096 / (rows + 1) + 1, [&](int64_t begin, int64_t end) {
    for (int64_t j = begin * 64; j < std::min(G, end * 64); j += 64) {
      const int64_t n = std::min<int64_t>(64, G - j);
      T sums[64];
      kernels<T>().column_sums(dgates + j, rows, G, 0, n, sums);
      for (int64_t k = 0; k < n; ++k) out[j + k] = sums[k] + (add ? out[j + k] : T(0));
    }
  });
}

// h before the projection [N, H] = o * tanh(c).
template <class T>
at::Tensor unprojected(const at::Tensor& gates, const at::Tensor& cells, const LayerSizes& s,
                       const Ragged& ragged, int64_t d) {
  at::Tensor hidden = new_empty({ragged.N(), s.H}, gates);
  T* out = hidden.mutable_data_ptr<T>();
  const T* c = cells.const_data_ptr<T>() + d * s.H;
  const T* o = gates.const_data_ptr<T>() + 3 * s.H;
  ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
    T* h = out + packed_row * s.H;
    kernels<T>().tanh(c + row * s.D * s.H, h, s.H);
    for (int64_t u = 0; u < s.H; ++u) h[u] *= o[packed_row * 4 * s.H + u];
  });
  return hidden;
}

template <class T>
LayerGradients backward(const OptionalTensor& dy_in, const OptionalTensor& dh_n, const OptionalTensor& dc_n,
                        const OptionalTensor& dcells_in, const at::Tensor& x, const OptionalTensor& h0_in,
                        const OptionalTensor& c0, at::TensorList weights, const OptionalTensor& lengths,
                        const OptionalTensor& reset_mask, const at::Tensor& y_in, const at::Tensor& cells_in,
                        const at::Tensor& reserve_in, const c10::List<bool>& needs) {
  const LayerSizes s(x, weights);
  // A saved-tensor hook may give back other strides.
  const at::Tensor y = y_in.contiguous(), cells = cells_in.contiguous(), reserve = reserve_in.contiguous();
  s.check_inputs(x, h0_in, c0, lengths, reset_mask);
  TORCH_CHECK(reserve.numel() == s.D * s.rows() * 4 * s.H, "reserve must be kept by forward for a backward");
  TORCH_CHECK(needs.size() == 3 + weights.size(), "needs must have ", 3 + weights.size(), " flags, got ",
              needs.size());
  const int64_t H = s.H, P = s.P, B = s.B, D = s.D;
  const auto none = [&] { return new_empty({0}, x); };
  std::vector<at::Tensor> dweights;
  if (s.rows() == 0) {
    const auto zeros = [&](int64_t i, at::IntArrayRef sizes) {
      return needs[i] ? at::zeros(sizes, x.options()) : none();
    };
    for (size_t k = 0; k < weights.size(); ++k) dweights.push_back(zeros(3 + k, weights[k].sizes()));
    return {zeros(0, x.sizes()), zeros(1, {D, B, P}), zeros(2, {D, B, H}), dweights};
  }
  const Ragged ragged(s, lengths, reset_mask);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t N = ragged.N();
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const Plan plan = make_plan(D, s.T, double(N) / s.T, H, P, sizeof(T), kernel.unit_block);
  const bool pack = s.proj() || worth_packing(N, B);
  const int64_t ld = kernel.padded_columns(P);
  const OptionalTensor dy = contiguous(dy_in), dcells = contiguous(dcells_in), h0 = contiguous(h0_in);

  const int64_t chunk = chunk_steps(s, sizeof(T), 1024, int64_t{4} << 20);

  Workspace<T> space;
  std::vector<int64_t> dh_at, dc_at, c0_at, packed_at, hr_at, dgates_at, dr_at;
  for (int64_t d = 0; d < D; ++d) {
    dh_at.push_back(space.take(B * ld));
    dc_at.push_back(space.take(B * H));
    c0_at.push_back(space.take(B * H));
    packed_at.push_back(space.take(pack ? kernel.columns_packed_size(4 * H, P) : 0));
    hr_at.push_back(space.take(s.proj() ? kernel.columns_packed_size(P, H) : 0));
    dgates_at.push_back(space.take(chunk * B * 4 * H));
    dr_at.push_back(space.take(s.proj() ? chunk * B * P : 0));
  }
  const int64_t scratch_at = space.take(plan.threads() * kernel.backward_scratch(H, P));
  space.allocate(x);

  std::vector<BackwardArgs<T>> args;
  std::vector<at::Tensor> hold;
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w(s, weights, d);
    hold.push_back(w.hh.contiguous());
    const T* w_hh = hold.back().const_data_ptr<T>();
    gather_state<T>(contiguous(dh_n), d, rows[d], P, space.at(dh_at[d]), ld);
    gather_state<T>(contiguous(dc_n), d, rows[d], H, space.at(dc_at[d]), H);
    gather_state<T>(contiguous(c0), d, rows[d], H, space.at(c0_at[d]), H);
    if (pack) kernel.pack_columns(w_hh, 4 * H, P, P, 1, space.at(packed_at[d]));
    if (s.proj()) {
      const at::Tensor w_hr = w.hr.contiguous();
      kernel.pack_columns(w_hr.const_data_ptr<T>(), P, H, H, 1, space.at(hr_at[d]));
    }
    args.push_back({rows[d],
                    H,
                    P,
                    d == 1,
                    0,
                    0,
                    0,
                    reserve.const_data_ptr<T>() + d * s.rows() * 4 * H,
                    cells.const_data_ptr<T>() + d * H,
                    space.at(c0_at[d]),
                    dy ? dy->const_data_ptr<T>() + d * P : nullptr,
                    dcells ? dcells->const_data_ptr<T>() + d * H : nullptr,
                    D * H,
                    D * P,
                    D * H,
                    w_hh,
                    pack ? space.at(packed_at[d]) : nullptr,
                    s.proj() ? space.at(hr_at[d]) : nullptr,
                    space.at(dgates_at[d]),
                    s.proj() ? space.at(dr_at[d]) : nullptr,
                    space.at(dh_at[d]),
                    space.at(dc_at[d]),
                    space.at(scratch_at)});
  }
  const auto wanted = [&](int64_t i, at::IntArrayRef sizes) {
    return needs[i] ? new_empty(sizes, x) : none();
  };
  bool need_input = false;
  for (size_t k = 0; k < weights.size(); ++k) {
    dweights.push_back(wanted(3 + k, weights[k].sizes()));
    need_input |= needs[3 + k] && k % s.per_direction == 0;
  }
  const at::Tensor input = need_input ? packed_input<T>(x, s, ragged) : at::Tensor();
  // Both directions add to dx, each from its own end.
  const at::Tensor dx_rows = !needs[0] ? at::Tensor()
                             : D == 1  ? new_empty({N, s.I}, x)
                                       : at::zeros({N, s.I}, x.options());
  std::vector<at::Tensor> w_ih, states(D), hidden(D);
  for (int64_t d = 0; d < D; ++d) {
    const int64_t at = d * s.per_direction;
    w_ih.push_back(weights[at].contiguous());
    if (needs[3 + at + 1] && !ragged.plain()) states[d] = entering_states<T>(y, h0, s, ragged, d);
    if (s.proj() && needs[3 + at + s.per_direction - 1])
      hidden[d] = unprojected<T>(reserve.select(0, d), cells, s, ragged, d);
  }

  for (int64_t end = s.T; end > 0; end -= std::min(end, chunk)) {
    const int64_t first = std::max<int64_t>(0, end - chunk);
    const bool add = end < s.T;
    for (int64_t d = 0; d < D; ++d) {
      args[d].first = first;
      args[d].steps = end - first;
      args[d].base = Span(s, ragged, d, first, end - first).begin;
    }
    run_plan(plan, rows, N, H, kernel.unit_block,
             [&](int64_t d, const Member& me) { kernel.backward(args[d], me); });
    for (int64_t d = 0; d < D; ++d) {
      const Span span(s, ragged, d, first, end - first);
      const int64_t at = d * s.per_direction, n = span.rows();
      const T* dgates = args[d].dgates;
      const auto need = [&](int64_t k) { return needs[3 + at + k]; };
      if (needs[0] && n > 0)
        product<T>(n, s.I, 4 * H, {dgates, 4 * H}, {w_ih[d].const_data_ptr<T>(), s.I}, D > 1,
                   dx_rows.mutable_data_ptr<T>() + span.begin * s.I, s.I);
      if (need(0))
        weight_gradient<T>(n, dgates, input.const_data_ptr<T>() + span.begin * s.I, s.I, add, dweights[at]);
      if (need(1) && ragged.plain())
        recurrent_gradient<T>(span, dgates, y, h0, s, d, add, dweights[at + 1]);
      else if (need(1))
        weight_gradient<T>(n, dgates, states[d].const_data_ptr<T>() + span.begin * P, P, add,
                           dweights[at + 1]);
      if (s.bias && (need(2) || need(3))) bias_gradient<T>(n, dgates, add, dweights[at + (need(2) ? 2 : 3)]);
      if (s.proj() && need(s.per_direction - 1))
        weight_gradient<T>(n, args[d].dr, hidden[d].const_data_ptr<T>() + span.begin * H, H, add,
                           dweights[at + s.per_direction - 1]);
    }
  }
  for (int64_t at = 0; s.bias && at < D * s.per_direction; at += s.per_direction)
    if (needs[3 + at + 2] && needs[3 + at + 3]) dweights[at + 3].copy_(dweights[at + 2]);

  at::Tensor dx = none();
  if (needs[0]) {
    if (!ragged.ragged()) {
      dx = dx_rows.view({s.T, B, s.I});
    } else {
      dx = at::zeros({s.T, B, s.I}, x.options());
      const T* from = dx_rows.const_data_ptr<T>();
      T* to = dx.mutable_data_ptr<T>();
      ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
        std::copy_n(from + packed_row * s.I, s.I, to + row * s.I);
      });
    }
  }
  const auto state_gradient = [&](bool need, const std::vector<int64_t>& at, int64_t n, int64_t stride) {
    if (!need) return none();
    at::Tensor grad = new_empty({D, B, n}, x);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t r = 0; r < B; ++r)
        std::copy_n(space.at(at[d]) + r * stride, n,
                    grad.mutable_data_ptr<T>() + (d * B + rows[d].batch_row_at(r)) * n);
    return grad;
  };
  const at::Tensor dh0 = state_gradient(needs[1], dh_at, P, ld), dc0 = state_gradient(needs[2], dc_at, H, H);
  return {dx, dh0, dc0, dweights};
}

// float16 and bfloat16 run in float32, c and h included, and are rounded once, on the way out.
OptionalTensor to_float(const OptionalTensor& t) { return t ? OptionalTensor(t->to(at::kFloat)) : t; }

std::vector<at::Tensor> to(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(t.to(dtype));
  return out;
}

LayerResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                   at::TensorList weights, const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                   bool keep_cells, bool keep_reserve) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype == at::kFloat)
    return forward<float>(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  if (dtype == at::kDouble)
    return forward<double>(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x must be floating point, got ", dtype);
  LayerSizes(x, weights).check_inputs(x, h0, c0, lengths, reset_mask);  // before all become float32
  auto [y, h_n, c_n, cells, reserve] =
      forward<float>(x.to(at::kFloat), to_float(h0), to_float(c0), to(weights, at::kFloat), lengths,
                     reset_mask, keep_cells, keep_reserve);
  return {y.to(dtype), h_n.to(dtype), c_n.to(dtype), cells.to(dtype), reserve.to(dtype)};
}

LayerGradients layer_backward(const OptionalTensor& dy, const OptionalTensor& dh_n,
                              const OptionalTensor& dc_n, const OptionalTensor& dcells, const at::Tensor& x,
                              const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                              const OptionalTensor& lengths, const OptionalTensor& reset_mask,
                              const at::Tensor& y, const at::Tensor& cells, const at::Tensor& reserve,
                              c10::List<bool> needs) {
  const at::ScalarType dtype = x.scalar_type();
  if (dtype == at::kFloat)
    return backward<float>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, cells, reserve,
                           needs);
  if (dtype == at::kDouble)
    return backward<double>(dy, dh_n, dc_n, dcells, x, h0, c0, weights, lengths, reset_mask, y, cells,
                            reserve, needs);
  TORCH_CHECK(dtype == at::kHalf || dtype == at::kBFloat16, "x must be floating point, got ", dtype);
  auto [dx, dh0, dc0, dweights] =
      backward<float>(to_float(dy), to_float(dh_n), to_float(dc_n), to_float(dcells), x.to(at::kFloat),
                      to_float(h0), to_float(c0), to(weights, at::kFloat), lengths, reset_mask,
                      y.to(at::kFloat), cells.to(at::kFloat), reserve.to(at::kFloat), needs);
  return {dx.to(dtype), dh0.to(dtype), dc0.to(dtype), to(dweights, dtype)};
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("native_layer", layer);
  m.impl("native_layer_backward", layer_backward);
}

}  // namespace fastlstm
