// The plans of cpu/plan.h as Python reads them: fastlstm._C.cpu_plan and cpu_cell_plan, for any machine,
// without running anything. Private to fastlstm and its tests.
#include <c10/util/Exception.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "cpu/bf16.h"
#include "cpu/cost.h"
#include "cpu/run_partition.h"
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
const char* name_of(EngineKind engine) {
  return engine == EngineKind::float_panels    ? "float_panels"
         : engine == EngineKind::bf16_panels   ? "bf16_panels"
         : engine == EngineKind::bf16_products ? "bf16_products"
                                               : "int8_products";
}
const char* name_of(Gemm gemm) {
  switch (gemm) {
    case Gemm::small:
      return "small";
    case Gemm::skinny:
      return "skinny";
    case Gemm::blas:
      return "blas";
    case Gemm::aligned_blas:
      return "aligned_blas";
    case Gemm::bf16:
      return "bf16";
  }
  return "";
}

const char* split_of(const ThreadPartition& p) {
  return p.members == 1 ? "none" : !p.split_units ? "rows" : p.row_groups == 1 ? "units" : "grid";
}

void add(const ThreadPartition& p, py::dict& to) {
  to["threads"] = p.threads();
  to["members"] = p.members, to["row_groups"] = p.row_groups;
  to["split"] = split_of(p);
  to["concurrent"] = p.concurrent;
  to["copies"] = p.copies;
  to["reason"] = reason(p);
  to["predicted_us"] = p.predicted_us;
}

py::dict dict_of(const WgradPlan& p) {
  py::dict d;
  d["at_once"] = p.at_once, d["transposed"] = p.transposed, d["float64"] = p.float64,
  d["gemm"] = name_of(p.gemm);
  return d;
}

py::dict dict_of(const ForwardPlan& p, const LayerShape& s) {
  py::dict d;
  d["engine"] = name_of(p.engine);
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
  d["engine"] = name_of(p.engine);
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
LayerShape shape_of(const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                    int64_t D, const std::optional<std::vector<int64_t>>& lengths, bool packed, bool resets,
                    bool h0, const std::string& frozen, bool norm, bool bf16_requested) {
  TORCH_CHECK(T > 0 && B > 0, "T and B must be at least 1");
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
  return {dtype_of(dtype),
          T,
          B,
          rows.N,
          packed ? rows.N : T * B,
          mean_active_rows(rows),
          I,
          H,
          P,
          D,
          h0 && !rows.count && !resets,
          frozen_named(frozen),
          norm,
          bf16_requested};
}

struct Figure {
  const char* name;
  double CostFigures::* at;
};
constexpr Figure kFigures[] = {
    {"vector_fmas_per_us", &CostFigures::vector_fmas_per_us},
    {"gate_cost_macs", &CostFigures::gate_cost_macs},
    {"gate_cost_min_rows", &CostFigures::gate_cost_min_rows},
    {"l2_read_rows", &CostFigures::l2_read_rows},
    {"l3_read_rows", &CostFigures::l3_read_rows},
    {"l3_hidden_min_rows", &CostFigures::l3_hidden_min_rows},
    {"l3_full_speed_max_threads", &CostFigures::l3_full_speed_max_threads},
    {"l3_two_directions", &CostFigures::l3_two_directions},
    {"fork_join_us", &CostFigures::fork_join_us},
    {"fork_join_thread_us", &CostFigures::fork_join_thread_us},
    {"barrier_us", &CostFigures::barrier_us},
    {"barrier_thread_us", &CostFigures::barrier_thread_us},
    {"core_to_core_bytes_per_us", &CostFigures::core_to_core_bytes_per_us},
    {"pack_bytes_per_us", &CostFigures::pack_bytes_per_us},
    {"row_boundary_us", &CostFigures::row_boundary_us},
    {"whole_line_row_boundary_us", &CostFigures::whole_line_row_boundary_us},
    {"bf16_macs_per_us", &CostFigures::bf16_macs_per_us},
    {"bf16_gate_cost_macs", &CostFigures::bf16_gate_cost_macs},
    {"bf16_l2_read_rows", &CostFigures::bf16_l2_read_rows},
    {"bf16_l3_read_rows", &CostFigures::bf16_l3_read_rows},
    {"bf16_l3_hidden_min_rows", &CostFigures::bf16_l3_hidden_min_rows},
    {"int8_vector_macs_per_us", &CostFigures::int8_vector_macs_per_us},
    {"int8_gate_cost_macs", &CostFigures::int8_gate_cost_macs},
    {"int8_l2_read_rows", &CostFigures::int8_l2_read_rows},
    {"int8_l3_read_rows", &CostFigures::int8_l3_read_rows},
    {"int8_l3_hidden_min_rows", &CostFigures::int8_l3_hidden_min_rows},
};
static_assert(sizeof(CostFigures) == std::size(kFigures) * sizeof(double));

py::dict cost_figures() {
  py::dict d;
  for (const Figure& figure : kFigures) d[figure.name] = kCostFigures.*figure.at;
  return d;
}

CostFigures figures_of(const std::map<std::string, double>& given) {
  CostFigures figures;
  for (const auto& [name, value] : given) {
    // Clang 15 cannot capture a structured binding by [&].
    const auto* found = std::find_if(std::begin(kFigures), std::end(kFigures),
                                     [&name = name](const auto& f) { return name == f.name; });
    TORCH_CHECK(found != std::end(kFigures), "there is no figure ", name);
    TORCH_CHECK(value > 0, name, " must be positive, got ", value);
    figures.*found->at = value;
  }
  return figures;
}

Machine machine_of(int threads, int64_t l2_bytes, int64_t vector_bytes, bool bf16_kernels,
                   bool blas_is_slow_at_unaligned_rows, const CostFigures& figures) {
  TORCH_CHECK(threads > 0 && vector_bytes >= 16,
              "threads must be at least 1, and vectors of 16 bytes or more");
  return {.threads = threads,
          .l2_bytes = l2_bytes,
          .vector_bytes = vector_bytes,
          .bf16_kernels = bf16_kernels,
          .figures = &figures,
          .blas_is_slow_at_unaligned_rows = blas_is_slow_at_unaligned_rows};
}

py::dict cpu_plan(const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P, int64_t D,
                  const std::optional<std::vector<int64_t>>& lengths, bool packed, bool resets, bool h0,
                  const std::string& frozen, bool norm, bool bf16_requested, int threads, int64_t l2_bytes,
                  int64_t vector_bytes, bool bf16_kernels, bool blas_is_slow_at_unaligned_rows,
                  const std::map<std::string, double>& figures) {
  const LayerShape s =
      shape_of(dtype, T, B, I, H, P, D, lengths, packed, resets, h0, frozen, norm, bf16_requested);
  const CostFigures of_machine = figures_of(figures);
  const Machine machine =
      machine_of(threads, l2_bytes, vector_bytes, bf16_kernels, blas_is_slow_at_unaligned_rows, of_machine);
  py::dict d;
  d["forward"] = dict_of(plan_forward(s, machine), s);
  if (s.frozen == Frozen::no) d["backward"] = dict_of(plan_backward(s, machine), s);
  return d;
}

// The partitions that cpu_plan chooses from, as (members, row groups, split, concurrent, predicted us).
py::dict cpu_plan_candidates(const std::string& dtype, int64_t T, int64_t B, int64_t I, int64_t H, int64_t P,
                             int64_t D, const std::optional<std::vector<int64_t>>& lengths, bool packed,
                             bool resets, bool h0, const std::string& frozen, bool norm, bool bf16_requested,
                             int threads, int64_t l2_bytes, int64_t vector_bytes, bool bf16_kernels,
                             bool blas_is_slow_at_unaligned_rows,
                             const std::map<std::string, double>& figures) {
  const LayerShape s =
      shape_of(dtype, T, B, I, H, P, D, lengths, packed, resets, h0, frozen, norm, bf16_requested);
  const CostFigures of_machine = figures_of(figures);
  const Machine machine =
      machine_of(threads, l2_bytes, vector_bytes, bf16_kernels, blas_is_slow_at_unaligned_rows, of_machine);
  const auto list = [&](const Loop& loop) {
    py::list all;
    for (const ThreadPartition& p : partition_candidates(loop, machine))
      all.append(py::make_tuple(p.members, p.row_groups, split_of(p), p.concurrent, p.predicted_us));
    return all;
  };
  py::dict d;
  d["forward"] = list(forward_loop(s, machine));
  if (s.frozen == Frozen::no) d["backward"] = list(backward_loop(s, machine));
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

void force_cpu_partition(int members, int row_groups, const std::string& split, bool concurrent) {
  TORCH_CHECK(members >= 0 && row_groups >= 1 && (members == 0 || members % row_groups == 0),
              "members must be a multiple of row_groups, got ", members, " and ", row_groups);
  if (members == 0) return forced_partition.reset();
  TORCH_CHECK(split == "none" || split == "rows" || split == "units" || split == "grid",
              "split must be none, rows, units or grid, got ", split);
  forced_partition = PartitionChoice{members, row_groups, split == "units" || split == "grid", concurrent};
}

void force_blas_is_slow_at_unaligned_rows(std::optional<bool> slow) {
  forced_blas_is_slow_at_unaligned_rows = slow;
}

double team_us(int threads, int barriers, int repeats) {
  TORCH_CHECK(threads > 0 && barriers >= 0 && repeats > 0, "threads and repeats must be at least 1");
  ThreadPartition partition;
  partition.members = threads, partition.split_units = true;
  const std::vector<Rows> rows{Rows{1, 1, 1, nullptr, nullptr, nullptr, nullptr, false}};
  std::vector<double> us;
  for (int k = 0; k < repeats; ++k) {
    const auto begin = std::chrono::steady_clock::now();
    run_partition(partition, rows, 1, 1, 1, [&](int64_t, const Member& me) {
      for (int b = 0; b < barriers && me.barrier; ++b) me.barrier->wait();
    });
    us.push_back(std::chrono::duration<double, std::micro>(std::chrono::steady_clock::now() - begin).count());
  }
  std::nth_element(us.begin(), us.begin() + us.size() / 2, us.end());
  return us[us.size() / 2];
}

// What of a machine a call finds, but its threads.
py::dict cpu_machine() {
  py::dict d;
  d["l2_bytes"] = l2_bytes();
  d["vector_bytes"] = kernels<float>().width * static_cast<int64_t>(sizeof(float));
  d["bf16_kernels"] = bf16::kernels<float>() != nullptr;
  d["blas_is_slow_at_unaligned_rows"] = blas_is_slow_at_unaligned_rows();
  return d;
}

}  // namespace

void define_cpu_plan(py::module_& m) {
  using py::arg;
  const auto def = [&](const char* name, auto f, const char* doc) {
    m.def(name, f, arg("dtype"), arg("T"), arg("B"), arg("I"), arg("H"), arg("P"), arg("D"), py::kw_only(),
          arg("lengths") = py::none(), arg("packed") = false, arg("resets") = false, arg("h0") = false,
          arg("frozen") = "no", arg("norm") = false, arg("bf16_requested") = false, arg("threads"),
          arg("l2_bytes"), arg("vector_bytes"), arg("bf16_kernels"), arg("blas_is_slow_at_unaligned_rows"),
          arg("figures") = std::map<std::string, double>(), doc);
  };
  def("cpu_plan", &cpu_plan, "What the CPU code decides about a layer's call, as cpu/plan.h has it.");
  def("cpu_plan_candidates", &cpu_plan_candidates,
      "The thread partitions that cpu_plan chooses from: (members, row groups, split, concurrent, predicted "
      "us).");
  m.def("cpu_cell_plan", &cpu_cell_plan, arg("dtype"), arg("B"), arg("I"), arg("H"), py::kw_only(),
        arg("threads"), arg("l2_bytes"), arg("vector_bytes"),
        "The same for LSTMCell, in float32 and float64.");
  m.def("cost_figures", &cost_figures, "The figures of the cost model, by name (cpu/tuning.h).");
  m.def("force_cpu_partition", &force_cpu_partition, arg("members"), arg("row_groups") = 1, arg("split") = "",
        arg("concurrent") = false,
        "Divides every later call's layers in this way, whatever is predicted; members=0 ends it. For "
        "benchmarks and tests, while no other thread calls.");
  m.def("force_blas_is_slow_at_unaligned_rows", &force_blas_is_slow_at_unaligned_rows, arg("slow"),
        "Overrides whether the BLAS is slow at unaligned rows; None restores the detection. For tests, while "
        "no other thread calls.");
  m.def("team_us", &team_us, arg("threads"), arg("barriers"), arg("repeats"),
        "Median time in microseconds of an empty partition whose threads meet at `barriers` barriers.");
  m.def("cpu_machine", &cpu_machine, "This machine as plans see it, without its threads.");
}

}  // namespace fastlstm
