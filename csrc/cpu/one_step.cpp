#include "cpu/one_step.h"

#include "cpu/layer.h"

namespace fastlstm {
namespace {

template <class T>
constexpr Dtype kDtype = std::is_same_v<T, double> ? Dtype::float64 : Dtype::float32;

Rows rows_of(int64_t B) { return {1, B, B, nullptr, nullptr, nullptr, nullptr, false}; }

StepInputs contiguous(const StepInputs& in) {
  const auto of = [](const at::Tensor& t) { return t.defined() ? t.contiguous() : t; };
  return {of(in.x), of(in.h0), of(in.c0), of(in.w_ih), of(in.w_hh), of(in.bias_ih), of(in.bias_hh)};
}

template <class T>
const T* data(const at::Tensor& t) {
  return t.defined() ? t.const_data_ptr<T>() : nullptr;
}

template <class T>
void copy_or_zero(const T* from, int64_t n, T* to) {
  if (from)
    std::copy_n(from, n, to);
  else
    std::fill_n(to, n, T(0));
}

template <class T>
StepResults forward_of(const StepInputs& given, bool keep_reserve) {
  const StepInputs in = contiguous(given);
  const Kernels<T>& kernel = kernels<T>();
  const int64_t B = in.B(), I = in.I(), H = in.H();
  const auto state = [&] { return in.x.dim() == 2 ? new_empty({B, H}, in.x) : new_empty({H}, in.x); };
  StepResults out{state(), state(), at::Tensor()};
  if (keep_reserve) out.reserve = new_empty({5 * B * H}, in.x);
  T* const gates = keep_reserve ? out.reserve.mutable_data_ptr<T>() : nullptr;

  const std::vector<Rows> rows = {rows_of(B)};
  const CellPlan plan = plan_cell(kDtype<T>, B, I, H, this_machine());

  Workspace space;
  const int64_t bias_offset = space.take<T>(4 * H), h_offset = space.take<T>(in.h0.defined() ? 0 : B * H),
                scratch_offset = space.take<T>(plan.forward.threads() * kernel.forward_scratch(B, I, H, H));
  space.allocate();
  T* bias = space.at<T>(bias_offset);
  sum_biases<T>(in.bias_ih, in.bias_hh, H, bias);
  const T* h0 = data<T>(in.h0);
  if (!h0) copy_or_zero<T>(nullptr, B * H, space.at<T>(h_offset)), h0 = space.at<T>(h_offset);
  T *h = out.h.mutable_data_ptr<T>(), *c = out.c.mutable_data_ptr<T>();
  const T* c0 = in.c0.defined() ? data<T>(in.c0) : h0;  // zeros, both
  const ForwardArgs<T> args = {rows[0],
                               I,
                               H,
                               H,
                               false,
                               data<T>(in.x),
                               gates,
                               bias,
                               {data<T>(in.w_ih), nullptr, plan.weights},
                               {data<T>(in.w_hh), nullptr, plan.weights},
                               {},
                               nullptr,
                               {const_cast<T*>(h0), h},  // the only step reads the first, and y is the second
                               c0,
                               c,
                               h,
                               gates ? gates + 4 * B * H : nullptr,
                               H,
                               H,
                               space.at<T>(scratch_offset)};
  run_partition(plan.forward, rows, H, H, kernel.unit_block,
                [&](int64_t, const Member& me) { kernel.forward(args, me); });
  return out;
}

template <class T>
StepGradients backward_of(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& given,
                          const at::Tensor& reserve, const std::array<bool, 7>& needs) {
  const int64_t B = given.B(), I = given.I(), H = given.H(), G = 4 * H;
  const CellPlan plan = plan_cell(kDtype<T>, B, I, H, this_machine());
  if (plan.layer_backward) {
    const at::Tensor gates = reserve.narrow(0, 0, B * G).view({1, 1, B, G});
    const at::Tensor cells = reserve.narrow(0, B * G, B * H).view({1, B, H});
    // y, of which one step reads nothing, has the shape of cells.
    return through_layer(dh, dc, given, needs,
                         [&](const OptionalTensor& dh_n, const OptionalTensor& dc_n, const at::Tensor& x,
                             const OptionalTensor& h0, const OptionalTensor& c0, at::TensorList weights,
                             const c10::List<bool>& flags) {
                           const OptionalTensor none;
                           return backward<T>({none, dh_n, dc_n, none}, {x, h0, c0, weights, none, none},
                                              {cells, cells, gates}, flags, /*bf16_requested=*/false);
                         });
  }
  const StepInputs in = contiguous(given);
  const Kernels<T>& kernel = kernels<T>();
  const std::array<const at::Tensor*, 7> inputs = {&in.x,    &in.h0,      &in.c0,     &in.w_ih,
                                                   &in.w_hh, &in.bias_ih, &in.bias_hh};
  StepGradients out;
  std::array<T*, 7> to = {};
  for (size_t k = 0; k < 7; ++k)
    if (needs[k]) {
      out[k] = new_empty(inputs[k]->sizes(), in.x);
      to[k] = out[k].mutable_data_ptr<T>();
    }

  const std::vector<Rows> rows = {rows_of(B)};
  const ThreadPartition& threads = plan.backward;
  const bool pack = plan.pack_hh;
  const int64_t ld = kernel.padded_columns(H), widest = std::max(B, G);
  Workspace space;
  const int64_t packed_size = pack ? kernel.columns_packed_size(G, H) : 0,
                scratch_size = kernel.small_product_scratch(widest);
  const int64_t dh_offset = space.take<T>(B * ld), dc_offset = space.take<T>(B * H),
                c0_offset = space.take<T>(in.c0.defined() ? 0 : B * H), dgates_offset = space.take<T>(B * G),
                packed_offset = space.take<T>((plan.private_pack ? threads.threads() : 1) * packed_size),
                scratch_offset = space.take<T>(threads.threads() * scratch_size);
  space.allocate();
  const at::Tensor dh_in = dh.defined() ? dh.contiguous() : dh, dc_in = dc.defined() ? dc.contiguous() : dc;
  copy_or_zero(data<T>(dc_in), B * H, space.at<T>(dc_offset));
  std::fill_n(space.at<T>(dh_offset), B * ld, T(0));
  const T* c0 = data<T>(in.c0);
  if (!c0) copy_or_zero<T>(nullptr, B * H, space.at<T>(c0_offset)), c0 = space.at<T>(c0_offset);
  T* dgates = space.at<T>(dgates_offset);
  const BackwardArgs<T> args = {rows[0],
                                H,
                                H,
                                false,
                                0,
                                1,
                                0,
                                data<T>(reserve),
                                data<T>(reserve) + 4 * B * H,
                                c0,
                                data<T>(dh_in),
                                nullptr,
                                H,
                                H,
                                H,
                                data<T>(in.w_hh),
                                pack ? space.at<T>(packed_offset) : nullptr,
                                nullptr,
                                dgates,
                                nullptr,
                                nullptr,
                                space.at<T>(dh_offset),
                                space.at<T>(dc_offset),
                                nullptr};
  if (pack && !plan.private_pack) kernel.pack_columns(args.w_hh, G, H, 1, 0, H, args.packed);
  Barrier barrier(threads.members);
  run_partition(threads, rows, H, H, kernel.unit_block, [&](int64_t, const Member& me) {
    T* scratch = space.at<T>(scratch_offset) + me.index * scratch_size;
    const int64_t r0 = me.row_begin, own = me.row_end - r0;
    BackwardArgs<T> mine = args;
    if (plan.private_pack) {
      mine.packed += me.index * packed_size;
      kernel.pack_columns(mine.w_hh, G, H, 1, 0, H, mine.packed);
    }
    kernel.backward(mine, me);
    if (to[0])
      kernel.small_product(
          {own, I, G, dgates + r0 * G, G, false, data<T>(in.w_ih), I, false, to[0] + r0 * I, I, scratch});
    for (int64_t r = r0; to[1] && r < me.row_end; ++r)
      std::copy_n(space.at<T>(dh_offset) + r * ld, H, to[1] + r * H);
    if (to[2]) std::copy_n(space.at<T>(dc_offset) + r0 * H, own * H, to[2] + r0 * H);
    // All rows from here on, of a member's share of the gates.
    const bool alone = own == B;
    if (!alone) barrier.wait();
    const int64_t share = (G / 16 + threads.members - 1) / threads.members * 16;
    const int64_t g0 = alone ? 0 : std::min(G, me.index * share),
                  g1 = alone || me.row_end == B ? G : std::min(G, g0 + share);
    if (to[3])
      kernel.small_product(
          {g1 - g0, I, B, dgates + g0, G, true, data<T>(in.x), I, false, to[3] + g0 * I, I, scratch});
    if (to[4] && in.h0.defined())
      kernel.small_product(
          {g1 - g0, H, B, dgates + g0, G, true, data<T>(in.h0), H, false, to[4] + g0 * H, H, scratch});
    else if (to[4])
      std::fill(to[4] + g0 * H, to[4] + g1 * H, T(0));
    T* const db = to[5] ? to[5] : to[6];
    if (db) kernel.column_sums(dgates, B, G, g0, g1, db);
    if (to[5] && to[6]) std::copy(db + g0, db + g1, to[6] + g0);
  });
  return out;
}

}  // namespace

StepResults step_forward(const StepInputs& in, bool keep_reserve) {
  return in.x.scalar_type() == at::kDouble ? forward_of<double>(in, keep_reserve)
                                           : forward_of<float>(in, keep_reserve);
}

StepGradients step_backward(const at::Tensor& dh, const at::Tensor& dc, const StepInputs& in,
                            const at::Tensor& reserve, const std::array<bool, 7>& needs) {
  return in.x.scalar_type() == at::kDouble ? backward_of<double>(dh, dc, in, reserve, needs)
                                           : backward_of<float>(dh, dc, in, reserve, needs);
}

}  // namespace fastlstm
