// Whole calls of LSTM and LSTMCell on plain CPU tensors. In Python their checks and conversions would cost
// three times what a tiny layer does; so would pybind11's conversion of a dozen arguments, which is why these
// functions are METH_FASTCALL and read the module's attributes themselves.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/dropout.h>
#include <ATen/ops/empty.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <utility>

#include "cell_step.h"
#include "contract.h"

namespace fastlstm {
namespace {

using Tensors = c10::SmallVector<at::Tensor, 8>;

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

bool refers_to(PyObject* reference, PyObject* object) {
  if (!PyWeakref_Check(reference)) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* found = nullptr;
  if (PyWeakref_GetRef(reference, &found) < 0) PyErr_Clear();
  Py_XDECREF(found);
  return found == object;
#else
  return PyWeakref_GetObject(reference) == object;
#endif
}

// A module's attributes, from its __dict__. `found` turns false where one is missing or of another kind.
class Attributes {
 public:
  explicit Attributes(PyObject* dict) : dict_(dict), found_(PyDict_Check(dict)) {}

  bool found() const { return found_; }
  // Borrowed.
  PyObject* operator[](PyObject* name) {
    PyObject* value = found_ ? PyDict_GetItemWithError(dict_, name) : nullptr;
    found_ &= value != nullptr;
    return value;
  }
  bool flag(PyObject* name) {
    PyObject* value = (*this)[name];
    const int is_true = value ? PyObject_IsTrue(value) : 0;
    return checked(is_true >= 0) && is_true == 1;
  }
  int64_t size(PyObject* name) {
    PyObject* value = (*this)[name];
    const Py_ssize_t n = value ? PyNumber_AsSsize_t(value, PyExc_OverflowError) : 0;
    return checked(!PyErr_Occurred()) ? n : 0;
  }
  double number(PyObject* name) {
    PyObject* value = (*this)[name];
    if (!checked(value && (PyFloat_Check(value) || PyLong_Check(value)))) return 0;
    const double x = PyFloat_AsDouble(value);
    return checked(!PyErr_Occurred()) ? x : 0;
  }
  // A parameter that no attribute of its name hides; nullptr where there is none. Borrowed.
  PyObject* parameter(PyObject* name) {
    static PyObject* const of = PyUnicode_InternFromString("_parameters");
    PyObject* parameters = (*this)[of];
    if (!parameters || !PyDict_Check(parameters) || PyDict_Contains(dict_, name) != 0) return nullptr;
    return PyDict_GetItemWithError(parameters, name);
  }

 private:
  bool checked(bool good) {
    if (!good) PyErr_Clear();
    found_ &= good;
    return good;
  }

  PyObject* dict_;
  bool found_;
};

// LSTM's weights where its attributes are still the parameters that it recorded, the common case of
// LSTM.current_weights; otherwise false, for that rule to find them.
bool recorded_weights(Attributes& module, Plain& tensor, Tensors& weights) {
  static PyObject *const of_names = PyUnicode_InternFromString("_flat_weights_names"),
                         *const of_flat = PyUnicode_InternFromString("_flat_weights"),
                         *const of_refs = PyUnicode_InternFromString("_flat_weight_refs");
  PyObject *names = module[of_names], *flat = module[of_flat], *refs = module[of_refs];
  if (!module.found() || !PyList_Check(names) || !PyList_Check(flat) || !PyList_Check(refs)) return false;
  const Py_ssize_t n = PyList_GET_SIZE(names);
  if (PyList_GET_SIZE(flat) != n || PyList_GET_SIZE(refs) != n) return false;
  for (Py_ssize_t k = 0; k < n; ++k) {
    PyObject* weight = PyList_GET_ITEM(flat, k);
    if (module.parameter(PyList_GET_ITEM(names, k)) != weight || !refers_to(PyList_GET_ITEM(refs, k), weight))
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
  static PyObject *const layers = PyUnicode_InternFromString("num_layers"),
                         *const bidirectional = PyUnicode_InternFromString("bidirectional"),
                         *const input_size = PyUnicode_InternFromString("input_size"),
                         *const hidden_size = PyUnicode_InternFromString("hidden_size"),
                         *const proj_size = PyUnicode_InternFromString("proj_size"),
                         *const batch_first = PyUnicode_InternFromString("batch_first"),
                         *const training = PyUnicode_InternFromString("training"),
                         *const dropout = PyUnicode_InternFromString("dropout");
  Stack s;
  s.layers = module.size(layers);
  s.D = module.flag(bidirectional) ? 2 : 1;
  s.I = module.size(input_size), s.H = module.size(hidden_size);
  const int64_t projected = module.size(proj_size);
  s.P = projected ? projected : s.H;
  s.batch_first = !packed && module.flag(batch_first);
  s.dropout = module.flag(training) && s.layers > 1 ? module.number(dropout) : 0;
  return s;
}

struct StackResults {
  at::Tensor output, h_n, c_n;
};

// A stack of layers without resets, run layer by layer; nothing where the arguments do not fit together,
// which is for the checks in Python to say. batch_sizes: of a PackedSequence, whose data `input` is then.
std::optional<StackResults> run_stack(const Stack& s, const at::Tensor& input, const at::Tensor& h0,
                                      const at::Tensor& c0, at::TensorList weights,
                                      const at::Tensor& batch_sizes) {
  const bool packed = batch_sizes.defined();
  const int64_t n = s.layers > 0 ? static_cast<int64_t>(weights.size()) / s.layers : 0;
  if (n < 2) return {};
  const at::ScalarType type = input.scalar_type();
  const auto fits = [&](const at::Tensor& t, int64_t dim) {
    return t.device().is_cpu() && t.scalar_type() == type && t.dim() == dim;
  };
  if (!fits(input, packed ? 2 : 3) || !fits(weights[0], 2) || !fits(weights[1], 2) || input.size(-1) != s.I ||
      input.size(s.batch_first) == 0 || weights[0].size(0) != 4 * s.H || weights[0].size(1) != s.I ||
      weights[1].size(1) != s.P || !(s.dropout >= 0 && s.dropout <= 1) ||
      n != s.D * LayerSizes::weights_per_direction(weights, s.P != s.H) ||
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
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::native_layer", "").typed<LayerForward>();
  StackResults results;
  at::Tensor x = s.batch_first ? input.transpose(0, 1) : input;
  Tensors h_n, c_n;
  for (int64_t k = 0; k < s.layers; ++k) {
    const auto own = weights.slice(k * n, n);
    const auto part = [&](const at::Tensor& t) {
      return !t.defined() ? OptionalTensor() : s.layers == 1 ? t : t.narrow(0, k * s.D, s.D);
    };
    const OptionalTensor h = part(h0), c = part(c0);
    if (!LayerSizes::fit(x, h, c, own, known, {})) return {};
    auto [y, h_last, c_last, cells, reserve] =
        op.call(x, h, c, own, lengths, {}, /*keep_cells=*/false, /*keep_reserve=*/false);
    x = s.dropout > 0 && k + 1 < s.layers ? at::dropout(y, s.dropout, /*train=*/true) : std::move(y);
    h_n.push_back(std::move(h_last));
    c_n.push_back(std::move(c_last));
  }
  return StackResults{s.batch_first ? x.transpose(0, 1) : std::move(x),
                      s.layers == 1 ? std::move(h_n[0]) : at::cat(h_n),
                      s.layers == 1 ? std::move(c_n[0]) : at::cat(c_n)};
}

py::object wrap(at::Tensor t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))); }

// Leaves the call to the general path; no lookup's error stays.
PyObject* none() {
  PyErr_Clear();
  return py::none().release().ptr();
}
// Asks the caller for the weights.
PyObject* not_recorded() {
  PyErr_Clear();
  return py::reinterpret_borrow<py::object>(Py_NotImplemented).release().ptr();
}

// (attributes, weights, input, hx, batch_sizes) -> (output, (h_n, c_n)), None or NotImplemented.
PyObject* lstm(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 5, "lstm takes 5 arguments, got ", count);
  Plain tensor;
  const at::Tensor input = tensor(args[2]);
  if (!tensor.plain || !input.device().is_cpu()) return none();  // before all weights are looked at
  const bool packed = args[4] != Py_None;
  const at::Tensor batch_sizes = packed ? tensor(args[4]) : at::Tensor();
  const auto [h0, c0] = tensor.states(args[3]);
  Attributes module(args[0]);
  const Stack s = stack_of(module, packed);
  if (!module.found() || !tensor.plain) return none();
  Tensors weights;
  if (args[1] == Py_None) {
    if (!recorded_weights(module, tensor, weights)) return not_recorded();
  } else {
    if (!PyList_Check(args[1])) return none();
    for (Py_ssize_t k = 0; k < PyList_GET_SIZE(args[1]); ++k)
      weights.push_back(tensor(PyList_GET_ITEM(args[1], k)));
  }
  if (!tensor.plain) return none();
  std::optional<StackResults> results;
  {
    py::gil_scoped_release release;
    results = run_stack(s, input, h0, c0, weights, batch_sizes);
  }
  if (!results) return none();
  return py::make_tuple(wrap(std::move(results->output)),
                        py::make_tuple(wrap(std::move(results->h_n)), wrap(std::move(results->c_n))))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// (attributes, weights, input, hx) -> (h, c), None or NotImplemented.
PyObject* lstm_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "lstm_cell takes 4 arguments, got ", count);
  static PyObject* const names[] = {
      PyUnicode_InternFromString("weight_ih"), PyUnicode_InternFromString("weight_hh"),
      PyUnicode_InternFromString("bias_ih"), PyUnicode_InternFromString("bias_hh")};
  Plain tensor;
  StepInputs in;
  in.x = tensor(args[2]);
  if (!tensor.plain || !in.x.device().is_cpu()) return none();
  std::tie(in.h0, in.c0) = tensor.states(args[3]);
  PyObject* weights[4];
  Attributes module(args[0]);
  if (args[1] != Py_None && !(PyTuple_Check(args[1]) && PyTuple_GET_SIZE(args[1]) == 4)) return none();
  for (int k = 0; k < 4; ++k) {
    weights[k] = args[1] == Py_None ? module.parameter(names[k]) : PyTuple_GET_ITEM(args[1], k);
    if (!weights[k]) return not_recorded();
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
     "A call of torch.nn.LSTM: (attributes, weights, input, hx, batch_sizes) -> (output, (h_n, c_n)). None "
     "where the general path must run it; NotImplemented where weights is None and those that the module "
     "recorded are not its own any more."},
    {"lstm_cell", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(lstm_cell)), METH_FASTCALL,
     "The same of torch.nn.LSTMCell: (attributes, weights, input, hx) -> (h, c)."}};

}  // namespace

void define_fast_path(py::module_& m) {
  for (PyMethodDef& method : methods)
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlstm
