// The plans of cpu/plan.h in words.
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <vector>

#include "cpu/plan.h"

namespace fastlstm {
namespace {

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text += (text.empty() ? "" : ", ") + part;
  return text;
}

std::string counted(int64_t n, const char* noun) {
  return std::to_string(n) + " " + noun + (n == 1 ? "" : "s");
}

std::string in_words(const ThreadPartition& p) {
  std::string text = counted(p.threads(), "thread");
  if (p.concurrent) text += ", " + std::to_string(p.members) + " per direction";
  if (p.row_groups > 1)
    text += " by rows and units, " + std::to_string(p.row_groups) + " x " + std::to_string(p.shares());
  else if (p.members > 1)
    text += p.split_units ? " by units" : " by rows";
  if (p.copies > 1) text += " with a copy of the weights each";
  return text;
}

std::string in_words(const char* weight, WeightMode mode) {
  return std::string(weight) + (mode == WeightMode::prepacked     ? " packed"
                                : mode == WeightMode::pack_on_use ? " packed on use"
                                                                  : " unpacked");
}

const char* by(Gemm gemm) {
  switch (gemm) {
    case Gemm::blas:
      return " by BLAS";
    case Gemm::aligned_blas:
      return " by BLAS into aligned rows";
    case Gemm::small:
    case Gemm::skinny:
    case Gemm::bf16:
      return " by microkernels";
  }
  return "";
}

std::string in_words(const char* product, const WgradPlan& p) {
  std::string text = product;
  if (p.transposed) text += " transposed";
  if (p.float64) text += " summed in float64";
  return text + by(p.gemm);
}

const char* in_words(Bf16Refusal refusal) {
  switch (refusal) {
    case Bf16Refusal::no_kernels:
      return "this CPU has no bfloat16 instructions that are faster than those of float32";
    case Bf16Refusal::frozen:
      return "frozen weights are multiplied as they were packed";
    case Bf16Refusal::layer_norm:
      return "the bfloat16 kernels do not support layer normalization";
    case Bf16Refusal::no_features:
      return "the bfloat16 kernels require at least one input feature";
    case Bf16Refusal::one_step:
      return "a single step has float32 products, as LSTMCell has";
    case Bf16Refusal::few_rows:
      return "rounding takes longer than the products of so few rows save";
    case Bf16Refusal::few_units:
      return "rounding takes longer than the products of so few units or features of h save";
    default:
      return "";
  }
}

void add_engine(EngineKind engine, std::vector<std::string>& parts) {
  if (engine == EngineKind::bf16_panels) parts.push_back("panels of bfloat16");
  if (engine == EngineKind::bf16_products) parts.push_back("products of bfloat16");
  if (engine == EngineKind::int8_products) parts.push_back("products of int8");
}

std::string us(double time) {
  char text[32];
  std::snprintf(text, sizeof(text), time < 10 ? "%.1f us" : "%.0f us", time);
  return text;
}

void add_norm(const LayerShape& s, std::vector<std::string>& parts) {
  if (s.norm) parts.push_back("layer normalization by whole rows, since a row's statistics need all units");
}

std::string because(const ThreadPartition& p) { return ", because " + reason(p); }

}  // namespace

Frozen frozen_named(const std::string& name) {
  if (name == "no") return Frozen::no;
  if (name == "stored") return Frozen::stored;
  if (name == "bfloat16") return Frozen::bfloat16;
  if (name == "int8") return Frozen::int8;
  throw std::invalid_argument("frozen must be no, stored, bfloat16 or int8, got " + name);
}

std::string reason(const ThreadPartition& p) {
  if (p.one_available) return "one thread is available";
  const auto none = [](double time) { return std::isinf(time); };
  if (none(p.directions_us) && none(p.rows_us) && none(p.units_us))
    return "neither rows nor units can be divided";
  std::string others;
  const auto add = [&](const char* kind, double time, bool chosen) {
    if (chosen || none(time)) return;
    others += (others.empty() ? "; " : ", ") + (kind + us(time));
    if (time < p.predicted_us)
      others += " (gain below " + std::to_string(std::lround(100 * kPartitionMinGain)) + " %)";
  };
  add("by rows ", p.rows_us, p.members > 1 && !p.split_units);
  add("by units ", p.units_us, p.split_units && p.row_groups == 1);
  add("by rows and units ", p.grid_us, p.row_groups > 1);
  add("a thread per direction ", p.directions_us, p.members == 1 && p.concurrent);
  add("on one thread ", p.one_thread_us, p.threads() == 1);
  return "predicted " + us(p.predicted_us) + others;
}

std::string describe(const ForwardPlan& plan, const LayerShape& s) {
  std::vector<std::string> parts = {in_words(plan.partition)};
  add_engine(plan.engine, parts);
  if (plan.bf16_refusal != Bf16Refusal::none)
    parts.push_back("bfloat16 products requested but not used (" + std::string(in_words(plan.bf16_refusal)) +
                    ")");
  if (s.frozen != Frozen::no) {
    parts.push_back("weights packed when frozen");
  } else {
    parts.push_back(in_words("W_ih", plan.w_ih));
    parts.push_back(in_words("W_hh", plan.w_hh));
    if (s.proj()) parts.push_back(in_words("W_hr", plan.w_hr));
  }
  if (plan.hoisted_steps > 0)
    parts.push_back("input projection hoisted " + counted(plan.hoisted_steps, "step"));
  if (plan.alternate_block_order) parts.push_back("alternating block order");
  add_norm(s, parts);
  return joined(parts) + because(plan.partition);
}

std::string describe(const BackwardPlan& plan, const LayerShape& s) {
  std::vector<std::string> parts = {in_words(plan.partition)};
  add_engine(plan.engine, parts);
  parts.push_back(plan.pack_hh ? "W_hh packed" : "W_hh unpacked");
  if (plan.alternate_block_order) parts.push_back("alternating block order");
  add_norm(s, parts);
  parts.push_back(plan.chunk_steps >= s.T ? "all steps in one chunk"
                                          : "chunks of " + counted(plan.chunk_steps, "step"));
  parts.push_back("dx" + std::string(by(plan.dx)));
  parts.push_back(in_words("dW_ih", plan.dw_ih));
  parts.push_back(in_words("dW_hh", plan.dw_hh));
  if (s.proj()) parts.push_back(in_words("dW_hr", plan.dw_hr));
  return joined(parts) + because(plan.partition);
}

std::string describe_forward(const CellPlan& plan) {
  return in_words(plan.forward) + ", " + in_words("weights", plan.weights) + because(plan.forward);
}

std::string describe_backward(const CellPlan& plan) {
  if (plan.layer_backward)
    return "that of a layer of one step, because a BLAS makes its weight gradients faster";
  std::string text = in_words(plan.backward) + (plan.pack_hh ? ", W_hh packed" : ", W_hh unpacked");
  if (plan.private_pack && plan.backward.members > 1) text += " by each thread";
  return text + because(plan.backward);
}

}  // namespace fastlstm
