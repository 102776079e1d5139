// Whole calls of frozen modules on plain CPU tensors, below the dispatcher: of a single small step most of
// the time would pass there. A caller may give the tensors that the results are written into (`out`); the
// rules are those of fastlstm/out.py, which raises where a call is refused here.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/grad_mode.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <torch/csrc/Exceptions.h>

#include <array>
#include <optional>

#include "cell_step.h"
#include "frozen.h"
#include "python_call.h"

namespace fastlstm {
namespace {

// A call of fewer multiply-adds takes a few microseconds and keeps the GIL.
constexpr int64_t kGilReleaseMinMacs = 1 << 17;

// A view of t's memory without a history: an argument of run_frozen, never a result of Python's.
at::Tensor view_of(const at::Tensor& t, at::IntArrayRef sizes, at::IntArrayRef strides, int64_t offset = 0) {
  at::Tensor view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(t.storage()),
                                                             t.key_set(), t.dtype());
  view.unsafeGetTensorImpl()->set_storage_offset(t.storage_offset() + offset);
  view.unsafeGetTensorImpl()->set_sizes_and_strides(sizes, strides);
  return view;
}
// [b, a, n] of [a, b, n]
at::Tensor time_first(const at::Tensor& t) {
  return view_of(t, {t.size(1), t.size(0), t.size(2)}, {t.stride(1), t.stride(0), t.stride(2)});
}
// [1, B, n] of [B, n]
at::Tensor as_step(const at::Tensor& t) {
  if (!t.defined()) return t;
  return view_of(t, {1, t.size(0), t.size(1)}, {t.size(0) * t.stride(0), t.stride(0), t.stride(1)});
}
// [n, B, .]: states of the layer whose first is `first`.
at::Tensor states_from(const at::Tensor& t, int64_t first, int64_t n) {
  return view_of(t, {n, t.size(1), t.size(2)}, t.strides(), first * t.stride(0));
}

// The bytes from the first element of t to its last.
struct Span {
  uintptr_t begin, end;
  explicit Span(const at::Tensor& t) : begin(reinterpret_cast<uintptr_t>(t.const_data_ptr())), end(begin) {
    if (t.numel() == 0) return;
    int64_t last = 0;
    for (int64_t k = 0; k < t.dim(); ++k) last += (t.size(k) - 1) * t.stride(k);
    end += (last + 1) * t.element_size();
  }
  bool overlaps(const Span& other) const { return begin < other.end && other.begin < end; }
};

// Of Python's tensors: views of them have no history.
template <class... Tensor>
bool wants_gradient(const Tensor&... t) {
  return at::GradMode::is_enabled() && ((t.defined() && t.requires_grad()) || ...);
}

// A call of all layers: x [T, B, I], the states [L * D, B, .] or none, and where the results go: tensors that
// are undefined are made.
struct FrozenCall {
  at::Tensor x, h0, c0;
  GivenResults results;
  c10::SmallVector<PackedView, 2> layers;

  const PackedHeader& header() const { return layers[0].header(); }
  int64_t macs() const {
    const PackedHeader& h = header();
    const auto n = static_cast<int64_t>(layers.size());
    return x.size(0) * x.size(1) * n * h.D * 4 * h.H * (std::max(h.I, h.D * h.P) + h.P);
  }

  // Returns true if run() may be called: sizes and types fit, and no mode is to see ops.
  bool fits() const {
    const PackedHeader& h = header();
    const auto n = static_cast<int64_t>(layers.size());
    for (int64_t k = 0; k < n; ++k) {
      const PackedHeader& layer = layers[k].header();
      if (!is_native(layer) || layer.dtype != h.dtype || layer.H != h.H || layer.P != h.P || layer.D != h.D ||
          (k > 0 && layer.I != h.D * h.P))
        return false;
    }
    const auto state_fits = [&](const at::Tensor& t, int64_t features) {
      return of_type(t) && t.dim() == 3 && t.size(0) == n * h.D && t.size(1) == x.size(1) &&
             t.size(2) == features;
    };
    return !dispatch_mode_active() && of_type(x) && x.size(0) > 0 && x.size(1) > 0 && x.size(2) == h.I &&
           h0.defined() == c0.defined() && (!h0.defined() || (state_fits(h0, h.P) && state_fits(c0, h.H)));
  }

  // Returns true if run() may write into the given y, h_n and c_n: sizes and types fit, and they overlap
  // nothing but the states that they replace.
  bool given_fit(const Tensors& packed) const {
    const PackedHeader& h = header();
    const auto n = static_cast<int64_t>(layers.size());
    const auto writable = [&](const at::Tensor& t, at::IntArrayRef sizes) {
      return of_type(t) && t.sizes() == sizes && t.is_contiguous() &&
             (!t.is_inference() || c10::InferenceMode::is_enabled());
    };
    const auto& [y, h_n, c_n] = results;
    const int64_t T = x.size(0), B = x.size(1);
    if (!writable(y, {T, B, h.D * h.P}) || !writable(h_n, {n * h.D, B, h.P}) ||
        !writable(c_n, {n * h.D, B, h.H}))
      return false;
    const Span spans[] = {Span(y), Span(h_n), Span(c_n)};
    const auto clear_of = [&](const at::Tensor& input, int same) {
      const Span span(input);
      for (int k = same_step ? 1 : 0; k < 3; ++k)
        if (spans[k].overlaps(span) && !(k == same && spans[k].begin == span.begin && input.is_contiguous()))
          return false;
      return true;
    };
    for (const at::Tensor& layer : packed)
      if (!clear_of(layer, -1)) return false;
    return clear_of(x, -1) && (!h0.defined() || (clear_of(h0, 1) && clear_of(c0, 2))) &&
           !spans[1].overlaps(spans[2]) && (same_step || !spans[0].overlaps(spans[1])) &&
           !spans[0].overlaps(spans[2]);
  }

  void run() {
    RECORD_FUNCTION("fastlstm::frozen_layer", {});
    at::AutoDispatchBelowADInplaceOrView below;
    const PackedHeader& h = header();
    const auto n = static_cast<int64_t>(layers.size());
    const int64_t B = x.size(1);
    const bool one_step = h.D == 1 && x.size(0) == 1;  // y of a layer is its h_n
    auto& [y, h_n, c_n] = results;
    if (n > 1 && !h_n.defined()) h_n = new_empty({n * h.D, B, h.P}, x), c_n = new_empty({n * h.D, B, h.H}, x);
    at::Tensor input = x;
    for (int64_t k = 0; k < n; ++k) {
      const auto of_layer = [&](const at::Tensor& t) {
        return !t.defined() || n == 1 ? t : states_from(t, k * h.D, h.D);
      };
      GivenResults given{at::Tensor(), of_layer(h_n), of_layer(c_n)};
      if (k + 1 == n)
        given.y = y;
      else if (one_step)
        given.y = given.h_n;
      const OptionalTensor h_in = h0.defined() ? OptionalTensor(of_layer(h0)) : OptionalTensor(),
                           c_in = c0.defined() ? OptionalTensor(of_layer(c0)) : OptionalTensor();
      auto [output, h_out, c_out, cells, reserve] =
          run_frozen({input, h_in, c_in, {}, kNoTensor, kNoTensor}, layers[k], /*keep_cells=*/false, given);
      input = std::move(output);
      if (n == 1) h_n = std::move(h_out), c_n = std::move(c_out);
    }
    y = std::move(input);
  }

  bool same_step = false;  // y is h_n: of a cell

 private:
  bool of_type(const at::Tensor& t) const {
    return is_plain_tensor(t) && t.scalar_type() == header().scalar_type();
  }
};

// Runs the call, without the GIL if it is worth it.
void run(FrozenCall& call) {
  std::optional<py::gil_scoped_release> release;
  if (call.macs() >= kGilReleaseMinMacs) release.emplace();
  call.run();
}

// Tensors of a tuple; plain turns false where it is none of this size.
template <size_t N>
std::array<at::Tensor, N> tensors_of(PyObject* tuple, Plain& tensor) {
  std::array<at::Tensor, N> tensors;
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != N) {
    tensor.plain = false;
    return tensors;
  }
  for (size_t k = 0; k < N; ++k) tensors[k] = tensor(PyTuple_GET_ITEM(tuple, k));
  return tensors;
}

// Counts the writes of a call for autograd, as an in-place op does.
void bump_version(const at::Tensor& t) { t.unsafeGetTensorImpl()->bump_version(); }

PyObject* new_reference(PyObject* object) {
  Py_INCREF(object);
  return object;
}

// (module, input, hx, out) of a FrozenLSTM -> (output, (h_n, c_n)), which is `out` if it is not None; or
// None.
PyObject* frozen_lstm_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "frozen_lstm_call takes 4 arguments, got ", count);
  Plain tensor;
  const at::Tensor input = tensor(args[1]);
  if (!tensor.plain || !input.is_cpu() || input.dim() != 3) return none();
  FrozenCall call;
  std::tie(call.h0, call.c0) = tensor.states(args[2]);
  PyObject* const out = args[3];
  GivenResults given;
  if (out != Py_None) {
    if (!PyTuple_Check(out) || PyTuple_GET_SIZE(out) != 2) return none();
    given.y = tensor(PyTuple_GET_ITEM(out, 0));
    auto [h_n, c_n] = tensors_of<2>(PyTuple_GET_ITEM(out, 1), tensor);
    given.h_n = std::move(h_n), given.c_n = std::move(c_n);
  }
  if (!tensor.plain) return none();
  Attributes module(args[0]);
  const bool batch_first = module.flag(keys().batch_first);
  const Tensors packed = packed_layers(module, module.size(keys().num_layers), tensor);
  if (!module.complete() || !tensor.plain || packed.empty()) return none();
  for (const at::Tensor& layer : packed) call.layers.emplace_back(layer);
  // A tensor of one row or one step has the same memory with the two swapped.
  const bool in_order = !batch_first || input.size(0) == 1 || input.size(1) == 1;
  call.x = batch_first ? time_first(input) : input;
  if (wants_gradient(input, call.h0, call.c0) || !call.fits()) return none();
  if (out != Py_None) {
    if (!in_order || given.y.dim() != 3) return none();
    call.results = {batch_first ? time_first(given.y) : given.y, given.h_n, given.c_n};
    if (given.y.requires_grad() || given.h_n.requires_grad() || given.c_n.requires_grad() ||
        !given.y.is_contiguous() || !call.given_fit(packed))
      return none();
    for (const at::Tensor& t : {given.y, given.h_n, given.c_n}) bump_version(t);
    run(call);
    return new_reference(out);
  }
  at::Tensor y;
  if (batch_first && in_order) {
    const PackedHeader& h = call.header();
    y = new_empty({input.size(0), input.size(1), h.D * h.P}, input);
    call.results.y = time_first(y);
  }
  run(call);
  if (!y.defined()) y = batch_first ? call.results.y.transpose(0, 1) : std::move(call.results.y);
  return py::make_tuple(wrap(std::move(y)),
                        py::make_tuple(wrap(std::move(call.results.h_n)), wrap(std::move(call.results.c_n))))
      .release()
      .ptr();
  END_HANDLE_TH_ERRORS
}

// (module, input, hx, out) of a FrozenLSTMCell -> (h, c), which is `out` if it is not None; or None.
PyObject* frozen_cell_call(PyObject*, PyObject* const* args, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 4, "frozen_cell_call takes 4 arguments, got ", count);
  Plain tensor;
  const at::Tensor input = tensor(args[1]);
  if (!tensor.plain || !input.is_cpu() || input.dim() != 2) return none();
  const auto [h0, c0] = tensor.states(args[2]);
  if (h0.defined() && (h0.dim() != 2 || c0.dim() != 2)) return none();
  PyObject* const out = args[3];
  std::array<at::Tensor, 2> results;
  if (out != Py_None) {
    results = tensors_of<2>(out, tensor);
    if (!tensor.plain || results[0].dim() != 2 || results[1].dim() != 2) return none();
  }
  Attributes module(args[0]);
  const Tensors packed = packed_layers(module, 1, tensor);
  if (!module.complete() || !tensor.plain || packed.empty()) return none();
  FrozenCall call;
  call.layers.emplace_back(packed[0]);
  call.x = as_step(input), call.h0 = as_step(h0), call.c0 = as_step(c0);
  if (wants_gradient(input, h0, c0) || !call.fits()) return none();
  if (out == Py_None)
    for (at::Tensor& t : results) t = new_empty({input.size(0), call.header().H}, input);
  call.results.h_n = call.results.y = as_step(results[0]), call.results.c_n = as_step(results[1]);
  call.same_step = true;
  if (out != Py_None) {
    if (!call.given_fit(packed) || results[0].requires_grad() || results[1].requires_grad()) return none();
    for (const at::Tensor& t : results) bump_version(t);
  }
  run(call);
  if (out != Py_None) return new_reference(out);
  return py::make_tuple(wrap(std::move(results[0])), wrap(std::move(results[1]))).release().ptr();
  END_HANDLE_TH_ERRORS
}

// PyCFunction_New keeps a pointer to these.
PyMethodDef methods[] = {
    {"frozen_lstm_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(frozen_lstm_call)),
     METH_FASTCALL,
     "Run a call of a FrozenLSTM below the dispatcher: (module, input, hx, out) -> (output, (h_n, c_n)), or "
     "None if another path must run it."},
    {"frozen_cell_call", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(frozen_cell_call)),
     METH_FASTCALL,
     "Run a call of a FrozenLSTMCell below the dispatcher: (module, input, hx, out) -> (h, c), or None if "
     "another path must run it."}};

}  // namespace

void define_frozen_path(py::module_& m) {
  for (PyMethodDef& method : methods)
    m.attr(method.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&method, nullptr));
}

}  // namespace fastlstm
