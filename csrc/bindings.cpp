// The module fastlstm._C. Its ops attach to the schemas that fastlstm/ops/register.py declares; what stands
// here is for Python to ask what was built.
#include <torch/extension.h>

#include "contract.h"
#include "cpu/sequence.h"

namespace fastlstm {
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

// torch.ops.fastlstm.native_layer without the boxed call, which costs more than a tiny layer.
LayerResults layer(const at::Tensor& x, const OptionalTensor& h0, const OptionalTensor& c0,
                   const std::vector<at::Tensor>& weights, const OptionalTensor& lengths,
                   const OptionalTensor& reset_mask, bool keep_cells, bool keep_reserve) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("fastlstm::native_layer", "").typed<LayerForward>();
  py::gil_scoped_release release;
  return op.call(x, h0, c0, weights, lengths, reset_mask, keep_cells, keep_reserve);
}

}  // namespace
}  // namespace fastlstm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("devices", &fastlstm::devices, "Device types the extension was built for.");
  m.def("isa", &fastlstm::isa_name, "The instruction set the CPU kernels run on: baseline, avx2 or avx512.");
  m.def("layer", &fastlstm::layer, "Calls the op fastlstm::native_layer.");
  m.def("activation", &fastlstm::activation, "The CPU kernels' sigmoid or tanh of a tensor, for tests.");
}
