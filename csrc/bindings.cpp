// The module fastlstm._C. Its ops attach to the schemas that fastlstm/ops/register.py declares; what stands
// here is for Python to ask what was built, and to call the forward op at less cost than a boxed call.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>

#include "cell_step.h"
#include "contract.h"
#include "cpu/sequence.h"
#include "cuda/plan.h"

namespace fastlstm {

void define_cpu_plan(py::module_& m);  // python_plan.cpp

namespace {

std::vector<std::string> devices() {
#ifdef FASTLSTM_CUDA
  return {"cpu", "cuda"};
#else
  return {"cpu"};
#endif
}

template <class T>
at::Tensor apply(const at::Tensor& x, bool tanh) {
  at::Tensor y = at::empty_like(x);
  const Kernels<T>& k = kernels<T>();
  (tanh ? k.tanh : k.sigmoid)(x.const_data_ptr<T>(), y.mutable_data_ptr<T>(), x.numel());
  return y;
}

at::Tensor activation(const at::Tensor& x, const std::string& name) {
  TORCH_CHECK(x.is_cpu() && x.is_contiguous(), "x must be a contiguous CPU tensor");
  TORCH_CHECK(name == "sigmoid" || name == "tanh", "name must be sigmoid or tanh, got ", name);
  TORCH_CHECK(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble,
              "x must be float32 or float64, got ", x.scalar_type());
  return x.scalar_type() == at::kFloat ? apply<float>(x, name == "tanh") : apply<double>(x, name == "tanh");
}

const c10::TypedOperatorHandle<LayerForward>& forward_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::native_layer", "").typed<LayerForward>();
  return op;
}

// Sizes that are symbols, of a FakeTensor: to ask for a number fixes them for the whole graph.
bool symbolic(const OptionalTensor& t) {
  return t && t->defined() && t->unsafeGetTensorImpl()->has_symbolic_sizes_strides();
}

// torch.ops.fastlstm.native_layer without the boxed call, which costs more than a tiny layer; nothing where
// the arguments do not fit together, which is for the checks in Python to say, or are the fake kernel's.
std::optional<LayerResults> layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                                  const std::vector<at::Tensor>& weights, const OptionalTensor& lengths,
                                  const OptionalTensor& reset_mask, bool keep_cells) {
  if (x.dim() != 3 || symbolic(x) || symbolic(h0) || symbolic(c0) || symbolic(lengths) ||
      symbolic(reset_mask) || std::any_of(weights.begin(), weights.end(), symbolic) ||
      !LayerSizes::fit(x, h0, c0, weights, lengths, reset_mask))
    return {};
  const auto& op = forward_op();
  py::gil_scoped_release release;
  return op.call(x, h0, c0, weights, lengths, reset_mask, keep_cells, /*keep_reserve=*/false);
}

// Whether something stands between a call and its tensors that only Python knows of, or that changes what the
// op is given: autocast, a transform of torch.func, a __torch_function__ mode.
bool interposed() {
  return at::autocast::is_autocast_enabled(at::kCPU) || at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Tensors of a Python call, as long as each is a torch.Tensor or Parameter itself, no subclass, and has no
// tangent of forward-mode AD; else `plain` turns false, and the tensor is undefined.
struct Plain {
  bool plain = !interposed();

  at::Tensor operator()(PyObject* object) {
    if (!THPVariable_CheckTypeExact(Py_TYPE(object))) {
      plain = false;
      return {};
    }
    const at::Tensor& t = THPVariable_Unpack(object);
    plain &= !t._fw_grad(/*level=*/0).defined();
    return t;
  }
  // (h_0, c_0), both undefined for None.
  std::pair<at::Tensor, at::Tensor> states(PyObject* hx) {
    if (hx == Py_None) return {};
    if (!PyTuple_Check(hx) || PyTuple_GET_SIZE(hx) != 2) {
      plain = false;
      return {};
    }
    return {(*this)(PyTuple_GET_ITEM(hx, 0)), (*this)(PyTuple_GET_ITEM(hx, 1))};
  }
};

// The lengths [B] of a PackedSequence's N rows, of which step t has batch_sizes[t]; undefined where these do
// not fit together.
at::Tensor lengths_of(const at::Tensor& batch_sizes, int64_t N) {
  if (!batch_sizes.device().is_cpu() || batch_sizes.scalar_type() != at::kLong || batch_sizes.dim() != 1 ||
      batch_sizes.numel() == 0 || !batch_sizes.is_contiguous())
    return {};
  const int64_t *rows = batch_sizes.const_data_ptr<int64_t>(), T = batch_sizes.numel();
  for (int64_t t = 0; t < T; ++t) {
    if (rows[t] < 1 || rows[t] > N || (t > 0 && rows[t] > rows[t - 1])) return {};
    N -= rows[t];
  }
  if (N != 0) return {};
  at::Tensor lengths = at::empty({rows[0]}, at::kLong);
  int64_t* of_row = lengths.mutable_data_ptr<int64_t>();
  for (int64_t t = T, b = 0; t > 0; --t)
    for (; b < rows[t - 1]; ++b) of_row[b] = t;
  return lengths;
}

// What torch.nn.LSTM returns, for a stack of layers with no lengths or resets; nothing where the arguments do
// not fit together, which is for the checks in Python to say, or are not plain CPU tensors. In Python these
// steps cost three times what a tiny layer does. hx: (h_0, c_0) or None; I, H, P: the module's sizes;
// dropout: between the layers; batch_sizes: of a PackedSequence, whose data `given` is then, or None.
std::optional<std::tuple<at::Tensor, std::pair<at::Tensor, at::Tensor>>> stack(
    const py::handle& given, const py::handle& hx, const py::list& given_weights, int64_t layers, int64_t D,
    bool batch_first, int64_t I, int64_t H, int64_t P, const py::handle& given_dropout,
    const py::handle& batch_sizes) {
  Plain tensor;
  const at::Tensor input = tensor(given.ptr());
  const bool packed = !batch_sizes.is_none();
  if (!PyFloat_Check(given_dropout.ptr()) && !PyLong_Check(given_dropout.ptr())) return {};
  const double dropout = given_dropout.cast<double>();
  const at::Tensor steps = packed ? tensor(batch_sizes.ptr()) : at::Tensor();
  const auto [h0, c0] = tensor.states(hx.ptr());
  std::vector<at::Tensor> weights;
  weights.reserve(given_weights.size());
  for (const py::handle& w : given_weights) weights.push_back(tensor(w.ptr()));
  const int64_t n = layers > 0 ? static_cast<int64_t>(weights.size()) / layers : 0;
  if (!tensor.plain || n < 2) return {};
  const auto fits = [&](const at::Tensor& t, int64_t dim) {
    return t.device().is_cpu() && t.scalar_type() == input.scalar_type() && t.dim() == dim;
  };
  const at::ScalarType type = input.scalar_type();
  if (!fits(input, packed ? 2 : 3) || !fits(weights[0], 2) || !fits(weights[1], 2) || input.size(-1) != I ||
      input.size(batch_first) == 0 || weights[0].size(0) != 4 * H || weights[0].size(1) != I ||
      weights[1].size(1) != P || !(dropout >= 0 && dropout <= 1) ||
      n != D * LayerSizes::weights_per_direction(at::TensorList(weights), P != H) ||
      !(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf))
    return {};
  OptionalTensor lengths;
  if (packed) lengths = lengths_of(steps, input.size(0));
  if (lengths && !lengths->defined()) return {};
  const int64_t B = packed ? lengths->size(0) : input.size(!batch_first);
  const auto states_fit = [&](const at::Tensor& t, int64_t features) {
    return fits(t, 3) && t.size(0) == layers * D && t.size(1) == B && t.size(2) == features;
  };
  if (h0.defined() && !(states_fit(h0, P) && states_fit(c0, H))) return {};

  const OptionalTensor known = lengths;
  if (packed && dispatch_mode_active()) {  // by an op, so that a trace holds where the lengths come from
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastlstm::packed_lengths", "")
                               .typed<at::Tensor(const at::Tensor&)>();
    lengths = op.call(steps);
  }
  const auto& op = forward_op();
  py::gil_scoped_release release;
  at::Tensor x = batch_first ? input.transpose(0, 1) : input;
  std::vector<at::Tensor> h_n, c_n;
  for (int64_t k = 0; k < layers; ++k) {
    const auto own = at::TensorList(weights).slice(k * n, n);
    const auto part = [&](const at::Tensor& t) {
      return !t.defined() ? OptionalTensor() : layers == 1 ? t : t.narrow(0, k * D, D);
    };
    const OptionalTensor h = part(h0), c = part(c0);
    if (!LayerSizes::fit(x, h, c, own, known, {})) return {};
    auto [y, h_last, c_last, cells, reserve] =
        op.call(x, h, c, own, lengths, {}, /*keep_cells=*/false, /*keep_reserve=*/false);
    x = dropout > 0 && k + 1 < layers ? at::dropout(y, dropout, /*train=*/true) : std::move(y);
    h_n.push_back(std::move(h_last));
    c_n.push_back(std::move(c_last));
  }
  return {{batch_first ? x.transpose(0, 1) : x,
           layers == 1 ? std::pair(h_n[0], c_n[0]) : std::pair(at::cat(h_n), at::cat(c_n))}};
}

// (h, c) of an LSTMCell, or None where its arguments are for the checks in Python to look at: plain tensors,
// hx a tuple of two or None, the biases both given or None.
py::object cell(const py::handle& input, const py::handle& hx, const py::handle& w_ih, const py::handle& w_hh,
                const py::handle& bias_ih, const py::handle& bias_hh) {
  Plain tensor;
  StepInputs in;
  in.x = tensor(input.ptr()), in.w_ih = tensor(w_ih.ptr()), in.w_hh = tensor(w_hh.ptr());
  if (!bias_ih.is_none() || !bias_hh.is_none())
    in.bias_ih = tensor(bias_ih.ptr()), in.bias_hh = tensor(bias_hh.ptr());
  std::tie(in.h0, in.c0) = tensor.states(hx.ptr());
  if (!tensor.plain) return py::none();
  at::Tensor h, c;
  bool fits = true;
  {
    py::gil_scoped_release release;
    fits = cell_step(in, h, c);
  }
  return fits ? py::object(py::make_tuple(std::move(h), std::move(c))) : py::none();
}

// The plan of csrc/cuda/plan.h: (why not, or "", the layout's numbers by name, and its tier in words).
std::tuple<std::string, std::map<std::string, int64_t>, std::string> persistent_plan(
    const std::string& phase, int64_t H, int64_t P, int64_t B, int D, int element, int sms, int64_t shared,
    int cluster, const std::string& tier) {
  TORCH_CHECK(phase == "forward" || phase == "backward", "phase must be forward or backward, got ", phase);
  const cuda::Plan found = cuda::plan(phase == "forward" ? cuda::Phase::forward : cuda::Phase::backward,
                                      {H, P, B, D, element}, {sms, shared, cluster}, tier.c_str()[0]);
  const cuda::Layout& l = found.layout;
  return {found.reason,
          {{"cluster", l.cluster},
           {"single", l.single},
           {"units", l.units},
           {"width", l.width},
           {"rounds", l.rounds},
           {"held", l.held},
           {"parts", l.parts},
           {"columns", l.columns},
           {"members", l.members},
           {"groups", l.groups},
           {"slices", l.slices},
           {"shared", l.shared},
           {"blocks", l.blocks(D)}},
          found.tier};
}

}  // namespace
}  // namespace fastlstm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("devices", &fastlstm::devices, "Device types the extension was built for.");
  m.def("isa", &fastlstm::isa_name, "The instruction set the CPU kernels run on: baseline, avx2 or avx512.");
  m.def("bfloat16_isa", &fastlstm::bfloat16_isa_name,
        "The instructions bfloat16 layers without projection multiply with, beyond a few rows of all steps: "
        "amx or "
        "avx512_bf16. Otherwise isa(), whose kernels compute in float32.");
  m.def("layer", &fastlstm::layer, "Calls the op fastlstm::native_layer, or None.");
  m.def("stack", &fastlstm::stack, "A stack of layers as torch.nn.LSTM runs it, or None.");
  m.def("cell", &fastlstm::cell, "A step as torch.nn.LSTMCell runs it, or None.");
  fastlstm::define_cpu_plan(m);
  m.def("persistent_plan", &fastlstm::persistent_plan,
        "How the persistent CUDA kernels lay out a layer, or why not.");
  m.def("persistent_enabled", [] { return fastlstm::cuda::persistent_enabled.load(); });
  m.def("persistent_tier", [] {
    const char tier = fastlstm::cuda::persistent_tier;
    return tier ? std::string(1, tier) : std::string();
  });
  m.def("enable_persistent", [](bool on, const std::string& tier) {
    TORCH_CHECK(tier.empty() || tier == "A" || tier == "B" || tier == "S",
                "tier must be A, B, S or empty, got ", tier);
    fastlstm::cuda::persistent_enabled = on, fastlstm::cuda::persistent_tier = tier.c_str()[0];
  });
  m.def("activation", &fastlstm::activation, "The CPU kernels' sigmoid or tanh of a tensor, for tests.");
}
