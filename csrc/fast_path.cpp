// Whole calls of LSTM and LSTMCell on plain CPU tensors. In Python their checks and conversions would take
// three times as long as a tiny layer, and pybind11 converts a dozen arguments in each call. So these
// functions are METH_FASTCALL and read the module's attributes themselves. They rely on the GIL, which the
// module does not give up in free-threaded builds.
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
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
#include <tuple>
#include <utility>

#include "cell_step.h"
#include "contract.h"

namespace fastlstm {
namespace {

using Tensors = c10::SmallVector<at::Tensor, 8>;

// Returns true if autocast, a transform of torch.func or a __torch_function__ mode is active.
bool interposed() {
  return at::autocast::is_autocast_enabled(at::kCPU) || at::impl::torch_function_mode_enabled() ||
         c10::impl::tls_local_dispatch_key_set().included_.has(
             c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Tensors of a Python call, as long as each is a torch.Tensor or Parameter itself, no subclass, and has no
// tangent of forward-mode AD; otherwise `plain` turns false, and the tensor is undefined.
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

// Names of attributes, interned and never freed.
struct Keys {
  static PyObject* intern(const char* name) { return PyUnicode_InternFromString(name); }
  PyObject *dict = intern("__dict__"), *parameters = intern("_parameters"),
           *flat_weights_names = intern("_flat_weights_names"), *flat_weights = intern("_flat_weights"),
           *flat_weight_refs = intern("_flat_weight_refs"), *num_layers = intern("num_layers"),
           *bidirectional = intern("bidirectional"), *input_size = intern("input_size"),
           *hidden_size = intern("hidden_size"), *proj_size = intern("proj_size"),
           *batch_first = intern("batch_first"), *training = intern("training"), *dropout = intern("dropout"),
           *weight_ih = intern("weight_ih"), *weight_hh = intern("weight_hh"), *bias_ih = intern("bias_ih"),
           *bias_hh = intern("bias_hh");
};
const Keys& keys() {
  static const Keys k;
  return k;
}

bool refers_to(PyObject* reference, PyObject* object) {
  if (!PyWeakref_Check(reference)) return false;
#if PY_VERSION_HEX >= 0x030D0000
  PyObject* referent = nullptr;
  if (PyWeakref_GetRef(reference, &referent) < 0) PyErr_Clear();
  Py_XDECREF(referent);
  return referent == object;
#else
  return PyWeakref_GetObject(reference) == object;
#endif
}

// A module's attributes, as Python reads them. `complete` turns false where one is missing or of another
// kind.
class Attributes {
 public:
  explicit Attributes(PyObject* module) : module_(module) {}

  bool complete() const { return complete_; }
  py::object operator[](PyObject* name) {
    PyObject* value = complete_ ? PyObject_GetAttr(module_, name) : nullptr;
    check(value != nullptr);
    return py::reinterpret_steal<py::object>(value);
  }
  bool flag(PyObject* name) {
    const py::object value = (*this)[name];
    const int is_true = complete_ ? PyObject_IsTrue(value.ptr()) : 0;
    return check(is_true >= 0) && is_true == 1;
  }
  int64_t size(PyObject* name) {
    const py::object value = (*this)[name];
    const Py_ssize_t n = complete_ ? PyNumber_AsSsize_t(value.ptr(), PyExc_OverflowError) : 0;
    return check(!PyErr_Occurred()) ? n : 0;
  }
  double number(PyObject* name) {
    const py::object value = (*this)[name];
    if (!check(complete_ && (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())))) return 0;
    const double x = PyFloat_AsDouble(value.ptr());
    return check(!PyErr_Occurred()) ? x : 0;
  }

 private:
  // An exception that Python code would raise again stays for the general path to meet; KeyboardInterrupt and
  // the like are passed on.
  bool check(bool good) {
    if (PyErr_Occurred()) {
      if (!PyErr_ExceptionMatches(PyExc_Exception)) throw py::error_already_set();
      PyErr_Clear();
      good = false;
    }
    complete_ &= good;
    return good;
  }

  PyObject* module_;
  bool complete_ = true;
};

// The module's parameters by name, where no instance attribute hides one. With other kinds of dict, whose
// __getitem__ may do more, there are none. Names are exact strings: looking them up runs no Python code, so
// borrowed references stay valid.
class Parameters {
 public:
  explicit Parameters(Attributes& module)
      : attributes_(module[keys().dict]), parameters_(module[keys().parameters]) {
    readable_ = module.complete() && PyDict_CheckExact(attributes_.ptr()) &&
                (PyDict_CheckExact(parameters_.ptr()) || PyODict_CheckExact(parameters_.ptr()));
  }
  // Borrowed, or nullptr.
  PyObject* operator[](PyObject* name) const {
    if (!readable_ || !PyUnicode_CheckExact(name) || PyDict_Contains(attributes_.ptr(), name) != 0)
      return nullptr;
    return PyDict_GetItemWithError(parameters_.ptr(), name);
  }

 private:
  py::object attributes_, parameters_;
  bool readable_;
};

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

  const OptionalTensor known = lengths, no_resets;
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
    const auto layer_weights = weights.slice(k * n, n);
    const auto part = [&](const at::Tensor& t) {
      return !t.defined() ? OptionalTensor() : s.layers == 1 ? t : t.narrow(0, k * s.D, s.D);
    };
    const OptionalTensor h = part(h0), c = part(c0);
    if (!LayerSizes::fit({x, h, c, layer_weights, known, no_resets})) return {};
    auto [y, h_last, c_last, cells, reserve] =
        op.call(x, h, c, layer_weights, lengths, {}, /*keep_cells=*/false, /*keep_reserve=*/false);
    x = s.dropout > 0 && k + 1 < s.layers ? at::dropout(y, s.dropout, /*train=*/true) : std::move(y);
    h_n.push_back(std::move(h_last));
    c_n.push_back(std::move(c_last));
  }
  return StackResults{s.batch_first ? x.transpose(0, 1) : std::move(x),
                      s.layers == 1 ? std::move(h_n[0]) : at::cat(h_n),
                      s.layers == 1 ? std::move(c_n[0]) : at::cat(c_n)};
}

py::object wrap(at::Tensor t) { return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t))); }

PyObject* none() { return py::none().release().ptr(); }  // the general path must run the call
PyObject* not_recorded() {                               // asks the caller for the weights
  return py::reinterpret_borrow<py::object>(Py_NotImplemented).release().ptr();
}

// (module, weights, input, hx, batch_sizes) -> (output, (h_n, c_n)), None or NotImplemented.
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
  if (!module.complete() || !tensor.plain) return none();
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

// (module, weights, input, hx) -> (h, c), None or NotImplemented.
PyObject* lstm_cell(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "lstm_cell takes 4 arguments, got ", count);
  Plain tensor;
  StepInputs in;
  in.x = tensor(args[2]);
  if (!tensor.plain || !in.x.device().is_cpu()) return none();
  std::tie(in.h0, in.c0) = tensor.states(args[3]);
  Attributes module(args[0]);
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
     "Run a whole LSTMCell call: (module, weights, input, hx) -> (h, c), None or NotImplemented as lstm()."}};

}  // namespace

void define_fast_path(py::module_& m) {
  for (PyMethodDef& method : methods)
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlstm
