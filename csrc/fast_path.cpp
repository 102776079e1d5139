// Whole calls of LSTM and LSTMCell on plain CPU tensors. In Python their checks and conversions would take
// three times as long as a tiny layer, and pybind11 converts a dozen arguments in each call. So these
// functions are METH_FASTCALL and read the module's attributes themselves. They rely on the GIL, which the
// module does not give up in free-threaded builds.
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cell_step.h"
#include "contract.h"
#include "cpu/packed.h"
#include "frozen.h"
#include "python_call.h"

namespace fastlstm {
namespace {

// LSTM's weights where its attributes are still the parameters that it recorded, the common case of
// LSTM._current_weights. Returns false if that method must find them.
bool recorded_weights(Attributes& module, Plain& tensor, Tensors& weights) {
  const Parameters parameters(module);
  const py::object names = module[keys().flat_weights_names], flat = module[keys().flat_weights],
                   references = module[keys().flat_weight_refs];
  if (!module.complete() || !PyList_Check(names.ptr()) || !PyList_Check(flat.ptr()) ||
      !PyList_Check(references.ptr()))
    return false;
  const Py_ssize_t n = PyList_GET_SIZE(names.ptr());
  if (PyList_GET_SIZE(flat.ptr()) != n || PyList_GET_SIZE(references.ptr()) != n) return false;
  for (Py_ssize_t k = 0; k < n; ++k) {
    PyObject* weight = PyList_GET_ITEM(flat.ptr(), k);
    if (parameters[PyList_GET_ITEM(names.ptr(), k)] != weight ||
        !refers_to(PyList_GET_ITEM(references.ptr(), k), weight))
      return false;
    weights.push_back(tensor(weight));
  }
  return true;
}

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

struct Stack {
  int64_t layers = 0, D = 1, I = 0, H = 0, P = 0;
  bool batch_first = false;
  double dropout = 0;  // between the layers
};

Stack stack_of(Attributes& module, bool packed) {
  Stack s;
  s.layers = module.size(keys().num_layers);
  s.D = module.flag(keys().bidirectional) ? 2 : 1;
  s.I = module.size(keys().input_size), s.H = module.size(keys().hidden_size);
  const int64_t projected = module.size(keys().proj_size);
  s.P = projected ? projected : s.H;
  s.batch_first = !packed && module.flag(keys().batch_first);
  s.dropout = module.flag(keys().training) && s.layers > 1 ? module.number(keys().dropout) : 0;
  return s;
}

struct StackResults {
  at::Tensor output, h_n, c_n;
};

// y, h_n, c_n
using OneLayer = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// Weights of a stack's layers. run(): one layer, nothing where the arguments do not fit together; `known`
// are the lengths as numbers, `lengths` as a trace has them.
class StoredWeights {
 public:
  StoredWeights(const Stack& s, at::TensorList weights)
      : weights_(weights), n_(s.layers > 0 ? static_cast<int64_t>(weights.size()) / s.layers : 0) {}

  bool fit(const Stack& s, at::ScalarType type) const {
    const auto fits = [&](const at::Tensor& t) {
      return t.device().is_cpu() && t.scalar_type() == type && t.dim() == 2;
    };
    return n_ >= 2 && fits(weights_[0]) && fits(weights_[1]) && weights_[0].size(0) == 4 * s.H &&
           weights_[0].size(1) == s.I && weights_[1].size(1) == s.P &&
           n_ == s.D * LayerSizes::weights_per_direction(weights_, s.P != s.H);
  }
  std::optional<OneLayer> run(int64_t k, const at::Tensor& x, const OptionalTensor& h0,
                              const OptionalTensor& c0, const OptionalTensor& known,
                              const OptionalTensor& lengths) const {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::native_layer", "").typed<LayerForward>();
    const OptionalTensor no_resets;
    const at::TensorList own = weights_.slice(k * n_, n_);
    if (!LayerSizes::fit({x, h0, c0, own, known, no_resets})) return {};
    auto [y, h_n, c_n, cells, reserve] =
        call(op, {x, h0, c0, own, lengths, no_resets}, /*keep_cells=*/false, /*keep_reserve=*/false);
    return OneLayer{std::move(y), std::move(h_n), std::move(c_n)};
  }

 private:
  at::TensorList weights_;
  int64_t n_;
};

class PackedWeights {
 public:
  PackedWeights(const Stack& s, at::TensorList packed) : packed_(packed), sizes_{s.H, s.P, s.D} {}

  bool fit(const Stack& s, at::ScalarType) const { return static_cast<int64_t>(packed_.size()) == s.layers; }
  std::optional<OneLayer> run(int64_t k, const at::Tensor& x, const OptionalTensor& h0,
                              const OptionalTensor& c0, const OptionalTensor& known,
                              const OptionalTensor& lengths) const {
    const OptionalTensor no_resets;
    if (!LayerSizes::fit({x, h0, c0, {}, known, no_resets}, PackedView(packed_[k]).header().known()))
      return {};
    auto [y, h_n, c_n, cells] =
        frozen_op().call(x, h0, c0, packed_[k], sizes_, lengths, no_resets, /*keep_cells=*/false);
    return OneLayer{std::move(y), std::move(h_n), std::move(c_n)};
  }

 private:
  at::TensorList packed_;
  std::array<int64_t, 3> sizes_;
};

// A stack of layers without resets, run layer by layer; nothing where the arguments do not fit together,
// which is for the checks in Python to say. batch_sizes: of a PackedSequence, whose data `input` is then.
template <class Weights>
std::optional<StackResults> run_stack(const Stack& s, const at::Tensor& input, const at::Tensor& h0,
                                      const at::Tensor& c0, const Weights& weights,
                                      const at::Tensor& batch_sizes) {
  const bool packed = batch_sizes.defined();
  const at::ScalarType type = input.scalar_type();
  const auto fits = [&](const at::Tensor& t, int64_t dim) {
    return t.device().is_cpu() && t.scalar_type() == type && t.dim() == dim;
  };
  if (s.layers < 1 || !fits(input, packed ? 2 : 3) || input.size(-1) != s.I ||
      input.size(s.batch_first) == 0 || !(s.dropout >= 0 && s.dropout <= 1) || !weights.fit(s, type) ||
      !(type == at::kFloat || type == at::kDouble || type == at::kBFloat16 || type == at::kHalf))
    return {};
  OptionalTensor lengths;
  if (packed) lengths = lengths_of(batch_sizes, input.size(0));
  if (lengths && !lengths->defined()) return {};
  const int64_t B = packed ? lengths->size(0) : input.size(!s.batch_first);
  const auto states_fit = [&](const at::Tensor& t, int64_t features) {
    return fits(t, 3) && t.size(0) == s.layers * s.D && t.size(1) == B && t.size(2) == features;
  };
  if (h0.defined() && !(states_fit(h0, s.P) && states_fit(c0, s.H))) return {};

  const OptionalTensor known = lengths;
  if (packed && dispatch_mode_active()) {  // by an op, so that a trace holds where the lengths come from
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("fastlstm::packed_lengths", "")
                               .typed<at::Tensor(const at::Tensor&)>();
    lengths = op.call(batch_sizes);
  }
  at::Tensor x = s.batch_first ? input.transpose(0, 1) : input;
  Tensors h_n, c_n;
  for (int64_t k = 0; k < s.layers; ++k) {
    const auto part = [&](const at::Tensor& t) {
      return !t.defined() ? OptionalTensor() : s.layers == 1 ? t : t.narrow(0, k * s.D, s.D);
    };
    auto results = weights.run(k, x, part(h0), part(c0), known, lengths);
    if (!results) return {};
    auto& [y, h_last, c_last] = *results;
    x = s.dropout > 0 && k + 1 < s.layers ? at::dropout(y, s.dropout, /*train=*/true) : std::move(y);
    h_n.push_back(std::move(h_last));
    c_n.push_back(std::move(c_last));
  }
  return StackResults{s.batch_first ? x.transpose(0, 1) : std::move(x),
                      s.layers == 1 ? std::move(h_n[0]) : at::cat(h_n),
                      s.layers == 1 ? std::move(c_n[0]) : at::cat(c_n)};
}

// (module, weights, input, hx, batch_sizes) -> (output, (h_n, c_n)), None or NotImplemented. Weights is
// StoredWeights or PackedWeights. read(module, stack, tensor, weights) fills weights and returns null, or
// returns the result of a call that must not run here.
template <class Weights, class Read>
PyObject* run_lstm(PyObject* const* args, Py_ssize_t count, Read&& read) {
  TORCH_CHECK(count == 5, "a call of LSTM has 5 arguments, got ", count);
  Plain tensor;
  const at::Tensor input = tensor(args[2]);
  if (!tensor.plain || !input.device().is_cpu()) return none();  // before all weights are looked at
  const bool packed = args[4] != Py_None;
  const at::Tensor batch_sizes = packed ? tensor(args[4]) : at::Tensor();
  const auto [h0, c0] = tensor.states(args[3]);
  Attributes module(args[0]);
  Stack s = stack_of(module, packed);
  Tensors weights;
  if (PyObject* refusal = read(module, s, tensor, weights)) return refusal;
  if (!module.complete() || !tensor.plain) return none();
  std::optional<StackResults> results;
  {
    py::gil_scoped_release release;
    results = run_stack(s, input, h0, c0, Weights(s, weights), batch_sizes);
  }
  if (!results) return none();
  return py::make_tuple(wrap(std::move(results->output)),
                        py::make_tuple(wrap(std::move(results->h_n)), wrap(std::move(results->c_n))))
      .release()
      .ptr();
}

PyObject* lstm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return run_lstm<StoredWeights>(
      args, count, [&](Attributes& module, Stack&, Plain& tensor, Tensors& weights) -> PyObject* {
        if (!module.is_none(keys().variant) || !tensor.plain) return none();
        if (args[1] == Py_None) return recorded_weights(module, tensor, weights) ? nullptr : not_recorded();
        if (!PyList_Check(args[1])) return none();
        for (Py_ssize_t k = 0; k < PyList_GET_SIZE(args[1]); ++k)
          weights.push_back(tensor(PyList_GET_ITEM(args[1], k)));
        return nullptr;
      });
  END_HANDLE_TH_ERRORS
}

// Of a FrozenLSTM; the weights argument is not read.
PyObject* frozen_lstm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  return run_lstm<PackedWeights>(
      args, count, [](Attributes& module, Stack& s, Plain& tensor, Tensors& weights) -> PyObject* {
        s.dropout = 0;
        weights = packed_layers(module, s.layers, tensor);
        return nullptr;
      });
  END_HANDLE_TH_ERRORS
}

// (module, weights, input, hx) -> (h, c), None or NotImplemented.
PyObject* lstm_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "a call of LSTMCell has 4 arguments, got ", count);
  Plain tensor;
  StepInputs in;
  in.x = tensor(args[2]);
  if (!tensor.plain || !in.x.device().is_cpu()) return none();
  std::tie(in.h0, in.c0) = tensor.states(args[3]);
  Attributes module(args[0]);
  if (!module.is_none(keys().variant)) return none();
  std::array<PyObject*, 4> weights;
  if (args[1] == Py_None) {
    const Parameters parameters(module);
    weights = {parameters[keys().weight_ih], parameters[keys().weight_hh], parameters[keys().bias_ih],
               parameters[keys().bias_hh]};
    if (std::count(weights.begin(), weights.end(), nullptr) > 0) return not_recorded();
  } else {
    if (!PyTuple_Check(args[1]) || PyTuple_GET_SIZE(args[1]) != 4) return none();
    for (int k = 0; k < 4; ++k) weights[k] = PyTuple_GET_ITEM(args[1], k);
  }
  in.w_ih = tensor(weights[0]), in.w_hh = tensor(weights[1]);
  if (weights[2] != Py_None || weights[3] != Py_None)
    in.bias_ih = tensor(weights[2]), in.bias_hh = tensor(weights[3]);
  if (!tensor.plain) return none();
  at::Tensor h, c;
  bool fits = true;
  {
    py::gil_scoped_release release;
    fits = cell_step(in, h, c);
  }
  return fits ? py::make_tuple(wrap(std::move(h)), wrap(std::move(c))).release().ptr() : none();
  END_HANDLE_TH_ERRORS
}

// PyCFunction_New keeps a pointer to these.
PyMethodDef methods[] = {
    {"lstm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lstm)), METH_FASTCALL,
     "Run a whole LSTM call: (module, weights, input, hx, batch_sizes) -> (output, (h_n, c_n)). None if the "
     "general path must run it; NotImplemented if weights is None and the recorded weights are stale."},
    {"lstm_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lstm_cell)), METH_FASTCALL,
     "Run a whole LSTMCell call: (module, weights, input, hx) -> (h, c), None or NotImplemented as lstm()."},
    {"frozen_lstm", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(frozen_lstm)), METH_FASTCALL,
     "lstm() of a FrozenLSTM, which ignores the weights argument."}};

}  // namespace

void define_fast_path(py::module_& m) {
  for (PyMethodDef& method : methods)
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlstm
