// Forward and backward of a bfloat16 layer without projection on the kernels of cpu/bf16.h.
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include "cpu/bf16.h"
#include "cpu/chunks.h"
#include "cpu/layer.h"

namespace fastlstm {
namespace {

using at::BFloat16;

const Bf16* bits(const BFloat16* p) { return reinterpret_cast<const Bf16*>(p); }
Bf16* bits(BFloat16* p) { return reinterpret_cast<Bf16*>(p); }
const Bf16* bits(const at::Tensor& t) { return bits(t.const_data_ptr<BFloat16>()); }
Bf16* writable_bits(const at::Tensor& t) { return bits(t.mutable_data_ptr<BFloat16>()); }

at::Tensor float_like() {
  static const at::Tensor empty = at::empty({0}, at::kFloat);
  return empty;
}

void pack_gates(int threads, const bf16::Kernels& kernel, const at::Tensor& weight, int64_t H, Bf16* packed) {
  const int64_t K = weight.size(1);
  for_blocks(threads, H, bf16::kBlock, K * bf16::kBlock,
             [&](int64_t begin, int64_t end) { kernel.pack_gates(bits(weight), H, K, begin, end, packed); });
}

// state [D, B, n] of direction d into sorted rows of stride ld, the rest of them untouched; zeros for none.
template <class T>
void gather(const OptionalTensor& state, int64_t d, const Rows& rows, int64_t n, T* out, int64_t ld) {
  for (int64_t r = 0; r < rows.B; ++r) {
    if (state)
      std::copy_n(state->const_data_ptr<BFloat16>() + (d * rows.B + rows.batch_row_at(r)) * n, n,
                  out + r * ld);
    else
      std::fill_n(out + r * ld, n, T(0));
  }
}

// A weight's gradient: a product for each piece of the rows, summed in float32.
class PiecewiseGradient {
 public:
  PiecewiseGradient() = default;
  PiecewiseGradient(at::Tensor out, bool one_piece) : out_(std::move(out)), one_piece_(one_piece) {}
  // dgates [rows, 4H], states [rows, n]
  void add(const at::Tensor& dgates, const at::Tensor& states) {
    if (one_piece_) {
      at::mm_out(out_, dgates.t(), states);
    } else if (sum_.defined()) {
      sum_.add_(at::mm(dgates.t(), states));
    } else {
      sum_ = at::mm(dgates.t(), states).to(at::kFloat);
    }
  }
  void finish() {
    if (sum_.defined()) out_.copy_(sum_);
  }

 private:
  at::Tensor out_, sum_;
  bool one_piece_ = true;
};

}  // namespace

LayerResults forward_bf16(const LayerSizes& s, const Ragged& ragged, const ForwardPlan& plan,
                          const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                          at::TensorList weights, bool keep_cells, bool keep_reserve) {
  const bf16::Kernels& kernel = *bf16::kernels();
  const int64_t N = ragged.N(), H = s.H, B = s.B, D = s.D;
  keep_cells |= keep_reserve;

  const auto empty = [&](at::IntArrayRef sizes) { return new_empty(sizes, x); };
  // Rows past a length are zero, and written by nobody.
  const auto per_step = [&](int64_t n) {
    return ragged.padded() ? new_zeros(s.per_row(D * n), x) : empty(s.per_row(D * n));
  };
  const at::Tensor y = per_step(H), h_n = empty({D, B, H}), c_n = empty({D, B, H});
  const at::Tensor cells = keep_cells ? per_step(H) : empty({0});
  const at::Tensor reserve = keep_reserve ? empty(s.reserve()) : empty({0});
  if (s.rows() == 0) return {y, h_n, c_n, cells, reserve};
  // A padded batch fills its first N rows only; the rest must not differ from run to run.
  for (int64_t d = 0; keep_reserve && N < s.rows() && d < D; ++d)
    std::fill_n(writable_bits(reserve) + (d * s.rows() + N) * 4 * H, (s.rows() - N) * 4 * H, Bf16(0));

  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const int64_t ld = bf16::row_stride(H), h_size = (B + bf16::kTileRows) * ld;

  Workspace<BFloat16> space;
  Workspace<float> floats;
  std::vector<int64_t> h_at, c_at, bias_at, ih_at, hh_at;
  for (int64_t d = 0; d < D; ++d) {
    h_at.push_back(space.take(2 * h_size));
    ih_at.push_back(space.take(bf16::packed_gates_size(H, s.I)));
    hh_at.push_back(space.take(bf16::packed_gates_size(H, H)));
    c_at.push_back(floats.take(B * H));
    bias_at.push_back(floats.take(4 * H));
  }
  const int64_t scratch_at = space.take(plan.partition.threads() * bf16::forward_scratch(s.I));
  space.allocate(x);
  floats.allocate(float_like());

  std::vector<bf16::ForwardArgs> args;
  const at::Tensor input = x.contiguous();
  const OptionalTensor h0c = contiguous(h0), c0c = contiguous(c0);
  for (int64_t d = 0; d < D; ++d) {
    const DirectionWeights w(s, weights, d);
    float* bias = floats.at(bias_at[d]);
    std::fill_n(bias, 4 * H, 0.0f);
    if (s.bias)
      for (const at::Tensor& given : {w.bias_ih.contiguous(), w.bias_hh.contiguous()})
        for (int64_t k = 0; k < 4 * H; ++k) bias[k] += float(given.const_data_ptr<BFloat16>()[k]);
    BFloat16* h = space.at(h_at[d]);
    std::fill_n(h, h_size, BFloat16(0));
    gather(h0c, d, rows[d], H, h, ld);
    if (rows[d].fresh) {  // steps clear the state for the next; the first has none before it
      const int64_t t = d == 1 ? s.T - 1 : 0;
      for (int64_t r = 0; r < rows[d].count_at(t); ++r)
        if (rows[d].fresh_at(t, r)) std::fill_n(h + r * ld, H, BFloat16(0));
    }
    std::copy_n(h, h_size, h + h_size);  // a reverse row may begin at an odd step
    gather(c0c, d, rows[d], H, floats.at(c_at[d]), H);
    pack_gates(plan.partition.threads(), kernel, w.ih.contiguous(), H, bits(space.at(ih_at[d])));
    pack_gates(plan.partition.threads(), kernel, w.hh.contiguous(), H, bits(space.at(hh_at[d])));
    args.push_back(
        {rows[d], s.I, H, d == 1, bits(input), bias, bits(space.at(ih_at[d])), bits(space.at(hh_at[d])),
         keep_reserve ? writable_bits(reserve) + d * s.rows() * 4 * H : nullptr, bits(h), floats.at(c_at[d]),
         writable_bits(y) + d * H, keep_cells ? writable_bits(cells) + d * H : nullptr, D * H, D * H,
         bits(space.at(scratch_at))});
  }
  run_partition(plan.partition, rows, H, H, bf16::kUnits,
                [&](int64_t d, const Member& me) { kernel.forward(args[d], me); });

  for (int64_t d = 0; d < D; ++d)
    for (int64_t r = 0; r < B; ++r) {
      const int64_t to = (d * B + rows[d].batch_row_at(r)) * H;
      // Where the last step of a forward row wrote its state; reverse rows all end with the last step.
      const int64_t parity = (d == 1 ? s.T : ragged.length(r)) % 2;
      std::copy_n(space.at(h_at[d]) + parity * h_size + r * ld, H, h_n.mutable_data_ptr<BFloat16>() + to);
      std::copy_n(floats.at(c_at[d]) + r * H, H, c_n.mutable_data_ptr<BFloat16>() + to);
    }
  return {y, h_n, c_n, cells, reserve};
}

LayerGradients backward_bf16(const BackwardCall& call, const BackwardPlan& plan) {
  const LayerSizes& s = call.s;
  const Ragged& ragged = call.ragged;
  const at::Tensor &x = call.x, &cells = call.cells, &reserve = call.reserve;
  const at::TensorList weights = call.weights;
  const c10::List<bool>& needs = call.needs;
  const int64_t H = s.H, G = 4 * H, B = s.B, D = s.D, chunk = plan.chunk_steps;
  const auto wanted = [&](int64_t i, at::IntArrayRef sizes, bool zeros = false) {
    return !needs[i] ? new_empty({0}, x) : zeros ? new_zeros(sizes, x) : new_empty(sizes, x);
  };
  std::vector<at::Tensor> dweights;
  for (size_t k = 0; k < weights.size(); ++k) dweights.push_back(wanted(3 + k, weights[k].sizes()));

  const bf16::Kernels& kernel = *bf16::kernels();
  const int64_t N = ragged.N();
  std::vector<Rows> rows;
  for (int64_t d = 0; d < D; ++d) rows.push_back(ragged.rows(d));
  const at::Tensor y = lacks_output(call.y)
                           ? output_again<BFloat16, float>(s, ragged, weights, cells, reserve, bf16::kBlock)
                           : call.y.contiguous();
  const OptionalTensor dy = contiguous(call.dy), dcells = contiguous(call.dcells), h0 = contiguous(call.h0);
  const int64_t ld = bf16::padded(H), ldg = bf16::row_stride(G);

  Workspace<BFloat16> space;
  Workspace<float> floats;
  std::vector<int64_t> dh_at, dc_at, c0_at, db_at, packed_at;
  for (int64_t d = 0; d < D; ++d) {
    dh_at.push_back(floats.take(B * ld));
    dc_at.push_back(floats.take(B * H));
    c0_at.push_back(floats.take(B * H));
    db_at.push_back(floats.take(plan.partition.threads() * G));
    packed_at.push_back(space.take(bf16::packed_columns_size(G, H)));
  }
  space.allocate(x);
  floats.allocate(float_like());

  std::vector<bf16::BackwardArgs> args;
  std::vector<at::Tensor> dgates, states(D), w_ih;
  std::vector<PiecewiseGradient> d_ih, d_hh;
  bool need_input = false;
  for (int64_t d = 0; d < D; ++d) {
    const int64_t at = d * s.per_direction;
    const DirectionWeights w(s, weights, d);
    const at::Tensor w_hh = w.hh.contiguous();
    w_ih.push_back(w.ih);
    Bf16* packed = bits(space.at(packed_at[d]));
    for_blocks(plan.partition.threads(), H, bf16::kUnits, G * bf16::kUnits, [&](int64_t begin, int64_t end) {
      kernel.pack_columns(bits(w_hh), G, H, begin, end, packed);
    });
    gather(contiguous(call.dh_n), d, rows[d], H, floats.at(dh_at[d]), ld);
    gather(contiguous(call.dc_n), d, rows[d], H, floats.at(dc_at[d]), H);
    gather(contiguous(call.c0), d, rows[d], H, floats.at(c0_at[d]), H);
    std::fill_n(floats.at(db_at[d]), plan.partition.threads() * G, 0.0f);
    dgates.push_back(new_empty({chunk * B + bf16::kTileRows, ldg}, x));
    dgates[d].narrow(1, G, ldg - G).zero_();
    d_ih.emplace_back(dweights[at], plan.dw_ih.at_once);
    d_hh.emplace_back(dweights[at + 1], plan.dw_hh.at_once);
    need_input |= needs[3 + at];
    if (needs[3 + at + 1] && !ragged.plain()) states[d] = entering_states<BFloat16>(y, h0, s, ragged, d);
    args.push_back({rows[d], H, d == 1, 0, 0, 0, bits(reserve) + d * s.rows() * G, bits(cells) + d * H,
                    floats.at(c0_at[d]), dy ? bits(*dy) + d * H : nullptr,
                    dcells ? bits(*dcells) + d * H : nullptr, D * H, D * H, D * H, packed,
                    writable_bits(dgates[d]), floats.at(dh_at[d]), floats.at(dc_at[d]), floats.at(db_at[d])});
  }
  const at::Tensor input = need_input ? packed_input<BFloat16>(x, s, ragged).view({N, s.I}) : at::Tensor();
  const at::Tensor y_rows = y.view({s.rows(), D * H});
  // Both directions add to dx, each from its own end.
  at::Tensor dx = wanted(0, {N, s.I}, D == 2);

  for (int64_t end = s.T; end > 0; end -= std::min(end, chunk)) {
    const int64_t first = std::max<int64_t>(0, end - chunk);
    for (int64_t d = 0; d < D; ++d) {
      args[d].first = first;
      args[d].steps = end - first;
      args[d].base = Span(s, ragged, d, first, end - first).begin;
    }
    run_partition(plan.partition, rows, H, H, bf16::kUnits,
                  [&](int64_t d, const Member& me) { kernel.backward(args[d], me); });
    for (int64_t d = 0; d < D; ++d) {
      const Span span(s, ragged, d, first, end - first);
      const int64_t at = d * s.per_direction, n = span.rows();
      const at::Tensor dg = dgates[d].narrow(0, 0, n).narrow(1, 0, G);
      if (needs[0] && n > 0) {
        at::Tensor out = dx.narrow(0, span.begin, n);
        if (D == 2)
          at::addmm_out(out, out, dg, w_ih[d]);
        else
          at::mm_out(out, dg, w_ih[d]);
      }
      if (needs[3 + at]) d_ih[d].add(dg, input.narrow(0, span.begin, n));
      if (!needs[3 + at + 1]) continue;
      if (!ragged.plain()) {
        d_hh[d].add(dg, states[d].narrow(0, span.begin, n));
        continue;
      }
      // In a plain batch the states that entered are y one step on, and h0, without a copy.
      const bool reverse = d == 1, initial = first == 0;
      const int64_t others = n - (initial ? B : 0);
      const int64_t from = reverse ? span.begin + B : span.begin - (initial ? 0 : B);
      d_hh[d].add(dg.narrow(0, initial && !reverse ? B : 0, others),
                  y_rows.narrow(0, others > 0 ? from : 0, others).narrow(1, d * H, H));
      if (initial && h0) d_hh[d].add(dg.narrow(0, reverse ? others : 0, B), h0->select(0, d));
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    const int64_t at = d * s.per_direction;
    d_ih[d].finish();
    d_hh[d].finish();
    for (int64_t k = 2; s.bias && k < 4; ++k)
      for (int64_t j = 0; needs[3 + at + k] && j < G; ++j) {
        float sum = 0;
        for (int m = 0; m < plan.partition.threads(); ++m) sum += floats.at(db_at[d])[m * G + j];
        dweights[at + k].mutable_data_ptr<BFloat16>()[j] = sum;
      }
  }
  if (needs[0] && ragged.padded()) {
    const at::Tensor packed = dx;
    dx = new_zeros(x.sizes(), x);
    const BFloat16* from = packed.const_data_ptr<BFloat16>();
    BFloat16* to = dx.mutable_data_ptr<BFloat16>();
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      std::copy_n(from + packed_row * s.I, s.I, to + row * s.I);
    });
  } else if (needs[0]) {
    dx = dx.view(x.sizes());
  }
  const auto state_gradient = [&](int64_t need, const std::vector<int64_t>& from, int64_t stride) {
    const at::Tensor grad = wanted(need, {D, B, H});
    for (int64_t d = 0; needs[need] && d < D; ++d)
      for (int64_t r = 0; r < B; ++r)
        std::copy_n(floats.at(from[d]) + r * stride, H,
                    grad.mutable_data_ptr<BFloat16>() + (d * B + rows[d].batch_row_at(r)) * H);
    return grad;
  };
  return {dx, state_gradient(1, dh_at, ld), state_gradient(2, dc_at, H), dweights};
}

}  // namespace fastlstm
