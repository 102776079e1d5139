// Arguments and attributes of a METH_FASTCALL function, read without pybind11's conversions.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <string>
#include <utility>
#include <vector>

namespace fastlstm {

using Tensors = c10::SmallVector<at::Tensor, 8>;

// Returns true if autocast, a transform of torch.func or a __torch_function__ mode is active.
inline bool interposed() {
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
           *buffers = intern("_buffers"), *batch_first = intern("batch_first"),
           *training = intern("training"), *dropout = intern("dropout"), *weight_ih = intern("weight_ih"),
           *weight_hh = intern("weight_hh"), *bias_ih = intern("bias_ih"), *bias_hh = intern("bias_hh"),
           *variant = intern("_variant");
};
inline const Keys& keys() {
  static const Keys k;
  return k;
}

inline bool refers_to(PyObject* reference, PyObject* object) {
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
class __attribute__((visibility("hidden"))) Attributes {
 public:
  explicit Attributes(PyObject* module) : module_(module) {}

  bool complete() const { return complete_; }
  py::object operator[](PyObject* name) {
    PyObject* value = complete_ ? PyObject_GetAttr(module_, name) : nullptr;
    check(value != nullptr);
    return py::reinterpret_steal<py::object>(value);
  }
  bool is_none(PyObject* name) { return (*this)[name].ptr() == Py_None; }
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
class __attribute__((visibility("hidden"))) Parameters {
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

// The packed layers of a frozen module, its buffers packed_l0, packed_l1, ...; none where one is missing or
// not on CPU.
inline Tensors packed_layers(Attributes& module, int64_t layers, Plain& tensor) {
  static std::vector<PyObject*> names;  // interned and never freed, as Keys; guarded by the GIL
  while (static_cast<int64_t>(names.size()) < layers)
    names.push_back(Keys::intern(("packed_l" + std::to_string(names.size())).c_str()));
  const py::object buffers = module[keys().buffers];
  Tensors packed;
  if (!module.complete() || !PyDict_CheckExact(buffers.ptr())) return packed;
  for (int64_t k = 0; k < layers; ++k) {
    PyObject* value = PyDict_GetItemWithError(buffers.ptr(), names[k]);
    const at::Tensor layer = value ? tensor(value) : at::Tensor();
    if (!layer.defined() || !layer.is_cpu()) return {};
    packed.push_back(layer);
  }
  return packed;
}

inline py::object wrap(at::Tensor t) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(std::move(t)));
}

inline PyObject* none() { return py::none().release().ptr(); }  // the general path must run the call
inline PyObject* not_recorded() {                               // asks the caller for the weights
  return py::reinterpret_borrow<py::object>(Py_NotImplemented).release().ptr();
}

}  // namespace fastlstm
