// The plans of cpu/plan.h as Python reads them: fastlstm._C.cpu_plan and cpu_cell_plan, for any machine,
// without running anything. Private to fastlstm and its tests.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/plan.h"
#include "cpu/sequence.h"

namespace fastlstm {

namespace py = pybind11;

namespace {

Dtype dtype_of(const std::string& name) {
  TORCH_CHECK(name == "float32" || name == "float64" || name == "bfloat16",
              "dtype must be float32, float64 or bfloat16, got ", name);
  return name == "float64" ? Dtype::float64 : name == "bfloat16" ? Dtype::bfloat16 : Dtype::float32;
}

const char* name_of(WeightMode mode) {
  return mode == WeightMode::prepacked  ? "prepacked"
         : mode == WeightMode::unpacked ? "unpacked"
                                        : "pack_on_use";
}
const char* name_of(Driver driver) {
  return driver == Driver::float_panels  ? "float_panels"
         : driver == Driver::bf16_panels ? "bf16_panels"
                                         : "bf16_products";
}
const char* name_of(Gemm gemm) {
  return gemm == Gemm::small ? "small" : gemm == Gemm::skinny ? "skinny" : "blas";
}

void add(const ThreadPartition& p, py::dict& to) {
  to["threads"] = p.threads();
  to["members"] = p.members;
  to["split"] = p.members == 1 ? "none" : p.split_units ? "units" : "rows";
  to["concurrent"] = p.concurrent;
  to["copies"] = p.copies;
  to["reason"] = p.reason;
}

py::dict dict_of(const WgradPlan& p) {
  py::dict d;
  d["at_once"] = p.at_once, d["transposed"] = p.transposed, d["float64"] = p.float64,
  d["gemm"] = name_of(p.gemm);
  return d;
}

py::dict dict_of(const ForwardPlan& p, const LayerShape& s) {
  py::dict d;
  d["driver"] = name_of(p.driver);
  add(p.partition, d);
  d["w_ih"] = name_of(p.w_ih), d["w_hh"] = name_of(p.w_hh);
  if (s.proj()) d["w_hr"] = name_of(p.w_hr);
  d["hoisted_steps"] = p.hoisted_steps;
  d["alternate_block_order"] = p.alternate_block_order;
  d["text"] = describe(p, s);
  return d;
}

py::dict dict_of(const BackwardPlan& p, const LayerShape& s) {
  py::dict d;
  d["driver"] = name_of(p.driver);
  add(p.partition, d);
  d["pack_hh"] = p.pack_hh;
  d["alternate_block_order"] = p.alternate_block_order;
  d["chunk_steps"] = p.chunk_steps;
  d["dx"] = name_of(p.dx);
  d["dw_ih"] = dict_of(p.dw_ih), d["dw_hh"] = dict_of(p.dw_hh);
  if (s.proj()) d["dw_hr"] = dict_of(p.dw_hr);
  d["text"] = describe(p, s);
  return d;
}

// packed: the rows of x past the lengths are absent.
py::dict cpu_plan(const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t D,
                  const std::optional<std::vector<int64_t>>& lengths, bool packed, bool resets, bool h0,
                  int threads, int64_t l2_bytes, int64_t vector_bytes, bool bf16_kernels) {
  TORCH_CHECK(T > 0 && B > 0 && threads > 0 && vector_bytes >= 16,
              "T, B and threads must be at least 1, and vectors of 16 bytes or more");
  Rows rows{T, B, T * B, nullptr, nullptr, nullptr, nullptr, packed};
  std::vector<int64_t> count;
  if (lengths && std::any_of(lengths->begin(), lengths->end(), [&](int64_t n) { return n != T; })) {
    rows.N = 0;
    for (int64_t t = 0; t < T; ++t) {
      count.push_back(std::count_if(lengths->begin(), lengths->end(), [&](int64_t n) { return n > t; }));
      rows.N += count[t];
    }
    rows.count = count.data();
  }
  const LayerShape s{dtype_of(dtype),
                     T,
                     B,
                     rows.N,
                     packed ? rows.N : T * B,
                     mean_active_rows(rows),
                     I,
                     H,
                     P,
                     D,
                     h0 && !rows.count && !resets};
  const CpuPlan p = plan(s, {threads, l2_bytes, vector_bytes, bf16_kernels});
  py::dict d;
  d["forward"] = dict_of(p.forward, s), d["backward"] = dict_of(p.backward, s);
  return d;
}

py::dict cpu_cell_plan(const std::string& dtype, int64_t B, int64_t I, int64_t H, int threads,
                       int64_t l2_bytes, int64_t vector_bytes) {
  const CellPlan p = plan_cell(dtype_of(dtype), B, I, H, {threads, l2_bytes, vector_bytes, false});
  py::dict forward, backward, d;
  add(p.forward, forward);
  forward["weights"] = name_of(p.weights);
  forward["text"] = describe_forward(p);
  add(p.backward, backward);
  backward["layer"] = p.layer_backward;
  backward["pack_hh"] = p.pack_hh, backward["private_pack"] = p.private_pack;
  backward["text"] = describe_backward(p);
  d["forward"] = forward, d["backward"] = backward;
  return d;
}

// What of a machine a call finds, but its threads.
py::dict cpu_machine() {
  py::dict d;
  d["l2_bytes"] = l2_bytes();
  d["vector_bytes"] = kernels<float>().width * static_cast<int64_t>(sizeof(float));
  d["bf16_kernels"] = bf16::kernels() != nullptr;
  return d;
}

}  // namespace

void define_cpu_plan(py::module_& m) {
  using py::arg;
  m.def("cpu_plan", &cpu_plan, arg("dtype"), arg("T"), arg("B"), arg("I"), arg("H"), arg("P"), arg("D"),
        py::kw_only(), arg("lengths") = py::none(), arg("packed") = false, arg("resets") = false,
        arg("h0") = false, arg("threads"), arg("l2_bytes"), arg("vector_bytes"), arg("bf16_kernels"),
        "What the CPU code decides about a layer's call, as cpu/plan.h has it.");
  m.def("cpu_cell_plan", &cpu_cell_plan, arg("dtype"), arg("B"), arg("I"), arg("H"), py::kw_only(),
        arg("threads"), arg("l2_bytes"), arg("vector_bytes"),
        "The same for LSTMCell, in float32 and float64.");
  m.def("cpu_machine", &cpu_machine, "This machine as plans see it, without its threads.");
}

}  // namespace fastlstm
