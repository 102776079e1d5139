// The native ops on CPU tensors: a layer and its backward by dtype, native_gates, grouped_products,
// random_flags. In one file, because torch's headers are most of what is compiled.
#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <cmath>

#include "cpu/layer.h"
#include "cpu/memory.h"
#include "cpu/product.h"

namespace fastlstm {
namespace {

// float16 runs in float32, c and h included, and is rounded once, on the way out.
// Flags and integers stay as they are.
OptionalTensor to_float(const OptionalTensor& t) {
  return t && t->is_floating_point() ? OptionalTensor(t->to(at::kFloat)) : t;
}

std::vector<at::Tensor> to(at::TensorList tensors, at::ScalarType dtype) {
  std::vector<at::Tensor> out;
  for (const at::Tensor& t : tensors) out.push_back(t.to(dtype));
  return out;
}

class FloatInputs {
 public:
  explicit FloatInputs(const LayerInputs& in)
      : x_(in.x.to(at::kFloat)),
        h0_(to_float(in.h0)),
        c0_(to_float(in.c0)),
        weights_(to(in.weights, at::kFloat)) {
    for (size_t k = 0; k < options_.size(); ++k) options_[k] = to_float(*in.options()[k]);
  }
  LayerInputs inputs() const { return LayerInputs::with_options(x_, h0_, c0_, weights_, options_); }

 private:
  at::Tensor x_;
  OptionalTensor h0_, c0_;
  std::vector<at::Tensor> weights_;
  LayerInputs::Options options_;
};

// Returns true if products of float32 may round their factors to bfloat16: where nn.LSTM's may, which runs on
// oneDNN (docs/numerics.md). Read at every call, of backward too, where there are kernels for it.
bool bf16_requested(const at::Tensor& x) {
  const at::Context& context = at::globalContext();
  return x.scalar_type() == at::kFloat && bf16::kernels<float>() && context.userEnabledMkldnn() &&
         context.float32Precision(at::Float32Backend::MKLDNN, at::Float32Op::RNN) ==
             at::Float32Precision::BF16;
}

// f(T{}) for the type that x's kernels store.
template <class F>
auto for_dtype(const at::Tensor& x, F&& f) {
  switch (x.scalar_type()) {
    case at::kFloat:
      return f(float{});
    case at::kDouble:
      return f(double{});
    case at::kBFloat16:
      return f(Bf16{});
    default:
      TORCH_CHECK(false, "x must be floating point, got ", x.scalar_type());
  }
}

LayerResults layer(const LayerInputs& in, bool keep_cells, bool keep_reserve) {
  if (in.x.scalar_type() != at::kHalf)
    return for_dtype(in.x, [&](auto t) {
      return forward<decltype(t)>(in, keep_cells, keep_reserve, bf16_requested(in.x));
    });
  const LayerSizes checked(in);  // before all become float32
  auto [y, h_n, c_n, cells, reserve] =
      forward<float>(FloatInputs(in).inputs(), keep_cells, keep_reserve, /*bf16_requested=*/false);
  return {y.to(at::kHalf), h_n.to(at::kHalf), c_n.to(at::kHalf), cells.to(at::kHalf), reserve.to(at::kHalf)};
}

LayerGradients layer_backward(const ResultGradients& grads, const LayerInputs& in, const SavedResults& saved,
                              const c10::List<bool>& needs) {
  if (in.x.scalar_type() != at::kHalf)
    return for_dtype(
        in.x, [&](auto t) { return backward<decltype(t)>(grads, in, saved, needs, bf16_requested(in.x)); });
  LayerSizes(in).check_backward(in.x, grads, saved, needs);
  auto [dx, dh0, dc0, dweights] = backward<float>(
      {to_float(grads.dy), to_float(grads.dh_n), to_float(grads.dc_n), to_float(grads.dcells)},
      FloatInputs(in).inputs(),
      {saved.y.to(at::kFloat), saved.cells.to(at::kFloat), saved.reserve.to(at::kFloat)}, needs,
      /*bf16_requested=*/false);
  return {dx.to(at::kHalf), dh0.to(at::kHalf), dc0.to(at::kHalf), to(dweights, at::kHalf)};
}

// native_gates: the activated gates of a reserve in the order of nn.LSTM.

// T: any type of the size of a gate.
template <class T>
void unblock(const LayerSizes& s, const Ragged& ragged, const at::Tensor& reserve, int64_t block,
             const at::Tensor& gates) {
  const int64_t H = s.H;
  for (int64_t d = 0; d < s.D; ++d) {
    const T* from = static_cast<const T*>(reserve.const_data_ptr()) + d * s.rows() * 4 * H;
    T* to = static_cast<T*>(gates.mutable_data_ptr()) + d * s.rows() * 4 * H;
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      for (int64_t u = 0; u < H; u += block) {
        const int64_t n = std::min(block, H - u);
        for (int64_t gate = 0; gate < 4; ++gate)
          std::copy_n(from + packed_row * 4 * H + 4 * u + gate * n, n, to + row * 4 * H + gate * H + u);
      }
    });
  }
}

at::Tensor gates(const at::Tensor& reserve_in, const at::Tensor& x, at::TensorList weights,
                 const OptionalTensor& lengths) {
  const OptionalTensor none;
  const LayerSizes s({x, none, none, weights, lengths, none});
  const at::Tensor reserve = reserve_in.contiguous();
  TORCH_CHECK(reserve.sizes() == s.reserve() && reserve.scalar_type() == x.scalar_type(), "reserve must be ",
              x.scalar_type(), " ", s.reserve(), ", got ", reserve.scalar_type(), " ", reserve.sizes());
  const Ragged ragged(s, lengths, none);
  const at::Tensor out = at::zeros(s.reserve(), reserve.options());  // past a length as well
  const int64_t block = x.scalar_type() == at::kDouble ? saved_block<double>() : saved_block<float>();
  switch (reserve.element_size()) {
    case 2:
      unblock<uint16_t>(s, ragged, reserve, block, out);
      break;
    case 4:
      unblock<float>(s, ragged, reserve, block, out);
      break;
    default:
      unblock<double>(s, ragged, reserve, block, out);
  }
  return out;
}
static_assert(std::is_same_v<decltype(gates), SavedGates>);

// grouped_products: weight gradients of many groups of rows at once (fastlstm/ops/register.py).

template <class T>
at::Tensor products(const at::Tensor& a, const at::Tensor& b, int64_t groups) {
  const int64_t steps = a.size(0), m = a.size(2), n = b.size(2), rows = a.size(1) / groups;
  at::Tensor out = new_empty({groups, m, n}, a);
  if (steps * rows == 0) return out.zero_();
  T* to = out.mutable_data_ptr<T>();
  const T *pa = a.const_data_ptr<T>(), *pb = b.const_data_ptr<T>();
  at::parallel_for(
      0, groups, 1 + kGroupedWgradTaskMinMacs / (steps * rows * m * n + 1), [&](int64_t begin, int64_t end) {
        for (int64_t g = begin; g < end; ++g)
          for (int64_t r = g * rows; r < (g + 1) * rows; ++r)
            multiply<T>({m, n, steps, pa + r * a.stride(1), a.stride(0), true, pb + r * b.stride(1),
                         b.stride(0), r > g * rows, to + g * m * n, n, nullptr});
      });
  return out;
}

at::Tensor grouped_products(const at::Tensor& a, const at::Tensor& b, int64_t groups) {
  TORCH_CHECK(a.dim() == 3 && b.dim() == 3 && a.size(0) == b.size(0) && a.size(1) == b.size(1),
              "a and b must be [T, B, m] and [T, B, n], got ", a.sizes(), " and ", b.sizes());
  TORCH_CHECK(groups > 0 && a.size(1) % groups == 0, "groups must divide the ", a.size(1), " rows, got ",
              groups);
  TORCH_CHECK(
      a.scalar_type() == b.scalar_type() && (a.scalar_type() == at::kFloat || a.scalar_type() == at::kDouble),
      "a and b must both be float32 or float64, got ", a.scalar_type(), " and ", b.scalar_type());
  const auto rows_of = [](const at::Tensor& t) { return t.stride(2) == 1 ? t : t.contiguous(); };
  return a.scalar_type() == at::kFloat ? products<float>(rows_of(a), rows_of(b), groups)
                                       : products<double>(rows_of(a), rows_of(b), groups);
}

// random_flags: for each element 32 bits of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable
// pseudorandom number generators") at a counter, so that threads need no order. torch's generator on CPU
// takes 7 ns an element, as long as a small layer's training step.
uint64_t split_mix(uint64_t seed, uint64_t counter) {
  uint64_t z = seed + (counter + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

at::Tensor random_flags(const at::Tensor& seed, c10::SymIntArrayRef size, double p) {
  TORCH_CHECK(seed.numel() == 1 && seed.scalar_type() == at::kLong, "seed must be one int64, got ",
              seed.scalar_type(), " ", seed.sizes());
  TORCH_CHECK(p >= 0 && p <= 1, "p must lie in [0, 1], got ", p);
  const at::Tensor flags = at::empty(C10_AS_INTARRAYREF_SLOW(size), at::kBool);
  bool* out = flags.mutable_data_ptr<bool>();
  const uint64_t first = *seed.const_data_ptr<int64_t>(), limit = std::llround(std::ldexp(p, 32));
  const int64_t n = flags.numel();
  at::parallel_for(0, (n + 1) / 2, kRandomFlagsTaskMinPairs, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const uint64_t bits = split_mix(first, k);
      out[2 * k] = (bits & 0xffffffff) < limit;
      if (2 * k + 1 < n) out[2 * k + 1] = bits >> 32 < limit;
    }
  });
  return flags;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) {
  m.impl("native_layer", forward_kernel<layer>);
  m.impl("native_layer_backward", backward_kernel<layer_backward>);
  m.impl("native_gates", gates);
  m.impl("grouped_products", grouped_products);
  m.impl("random_flags", random_flags);
}

}  // namespace fastlstm
