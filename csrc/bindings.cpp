// The module fastlstm._C. Its ops attach to the schemas that fastlstm/ops/register.py declares; what stands
// here is for Python to ask what was built, and to call the forward op at less cost than a boxed call.
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <map>

#include "contract.h"
#include "cpu/sequence.h"
#include "cuda/plan.h"

namespace fastlstm {

void define_cpu_plan(py::module_& m);     // python_plan.cpp
void define_fast_path(py::module_& m);    // fast_path.cpp
void define_frozen(py::module_& m);       // frozen.cpp
void define_frozen_path(py::module_& m);  // frozen_path.cpp

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
                                  const OptionalTensor& reset_mask, const OptionalTensor& recurrent_mask,
                                  const OptionalTensor& zoneout_h, const OptionalTensor& zoneout_c,
                                  bool keep_cells) {
  const LayerInputs in{x, h0, c0, weights, lengths, reset_mask, recurrent_mask, zoneout_h, zoneout_c};
  const auto options = in.options();
  if (x.dim() != 3 || symbolic(x) || symbolic(h0) || symbolic(c0) ||
      std::any_of(options.begin(), options.end(), [](const OptionalTensor* t) { return symbolic(*t); }) ||
      std::any_of(weights.begin(), weights.end(), symbolic) || !LayerSizes::fit(in))
    return {};
  const auto& op = forward_op();
  py::gil_scoped_release release;
  return call(op, in, keep_cells, /*keep_reserve=*/false);
}

// The plan of csrc/cuda/plan.h: (reason there is none or "", the layout's numbers by name, the variant and
// why).
std::tuple<std::string, std::map<std::string, int64_t>, std::string> persistent_plan(
    const std::string& phase, int64_t H, int64_t P, int64_t B, int D, int element_bytes, int sms,
    int64_t shared, int cluster, const std::string& tier) {
  TORCH_CHECK(phase == "forward" || phase == "backward", "phase must be forward or backward, got ", phase);
  const cuda::PersistentPlan plan =
      cuda::plan(phase == "forward" ? cuda::Phase::forward : cuda::Phase::backward,
                 {H, P, B, D, element_bytes}, {sms, shared, cluster}, tier.c_str()[0]);
  const cuda::Layout& l = plan.layout;
  return {plan.reason,
          {{"cluster", l.cluster},
           {"single", l.single},
           {"data_flag", l.data_flag},
           {"units", l.units},
           {"m_tiles", l.m_tiles},
           {"iters", l.iters},
           {"register_iters", l.register_iters},
           {"split_k", l.split_k},
           {"n_tiles", l.n_tiles},
           {"ctas_per_group", l.ctas_per_group},
           {"groups", l.groups},
           {"batch_tiles", l.batch_tiles},
           {"shared_bytes", l.shared_bytes},
           {"ctas", l.ctas(D)}},
          plan.description};
}

}  // namespace
}  // namespace fastlstm

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("devices", &fastlstm::devices, "Device types the extension was built for.");
  m.def("isa", &fastlstm::isa_name, "The instruction set the CPU kernels run on: baseline, avx2 or avx512.");
  m.def("bfloat16_isa", &fastlstm::bfloat16_isa_name,
        "The instructions bfloat16 layers multiply with, beyond a few rows of all steps: "
        "amx or "
        "avx512_bf16. Otherwise isa(), whose kernels compute in float32.");
  m.def("layer", &fastlstm::layer, "Calls the op fastlstm::native_layer, or None.");
  fastlstm::define_fast_path(m);
  fastlstm::define_cpu_plan(m);
  fastlstm::define_frozen(m);
  fastlstm::define_frozen_path(m);
  m.def("persistent_plan", &fastlstm::persistent_plan,
        "How the persistent CUDA kernels lay out a layer, or why not.");
  m.def("persistent_enabled", [] { return fastlstm::cuda::persistent_enabled.load(); });
  m.def("persistent_tier", [] {
    const char tier = fastlstm::cuda::persistent_tier;
    return tier ? std::string(1, tier) : std::string();
  });
  m.def("enable_persistent", [](bool on, const std::string& tier) {
    TORCH_CHECK(tier.empty() || tier == "A" || tier == "B" || tier == "D" || tier == "S",
                "tier must be A, B, D, S or empty, got ", tier);
    fastlstm::cuda::persistent_enabled = on, fastlstm::cuda::persistent_tier = tier.c_str()[0];
  });
  m.def("activation", &fastlstm::activation, "The CPU kernels' sigmoid or tanh of a tensor, for tests.");
}
