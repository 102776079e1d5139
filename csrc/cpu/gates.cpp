// The activated gates of a CPU layer's reserve in the order of nn.LSTM: fastlstm::native_gates.
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "cpu/engines.h"

namespace fastlstm {
namespace {

// The units of a block of the reserve (cpu/sequence.h), by the Engine that wrote it.
int64_t block_of(const LayerSizes& s, const Ragged& ragged, at::ScalarType dtype) {
  if (dtype == at::kDouble) return kernels<double>().width;
  if (dtype != at::kBFloat16) return kernels<float>().width;
  const ForwardPlan plan = plan_forward(layer_shape<Bf16>(s, ragged, {}), this_machine());
  return with_engine<Bf16>(plan.engine, [](auto engine) { return decltype(engine)::saved_block(); });
}

// T: any type of the size of a gate.
template <class T>
void unblock(const LayerSizes& s, const Ragged& ragged, const at::Tensor& reserve, int64_t block,
             const at::Tensor& gates) {
  const int64_t H = s.H;
  for (int64_t d = 0; d < s.D; ++d) {
    const T* from = static_cast<const T*>(reserve.const_data_ptr()) + d * s.rows() * 4 * H;
    T* to = static_cast<T*>(gates.mutable_data_ptr()) + d * s.rows() * 4 * H;
    ragged.for_each_row([&](int64_t packed_row, int64_t row, int64_t, int64_t) {
      for (int64_t u = 0; u < H; u += block) {
        const int64_t n = std::min(block, H - u);
        for (int64_t gate = 0; gate < 4; ++gate)
          std::copy_n(from + packed_row * 4 * H + 4 * u + gate * n, n, to + row * 4 * H + gate * H + u);
      }
    });
  }
}

at::Tensor gates(const at::Tensor& reserve_in, const at::Tensor& x, at::TensorList weights,
                 const OptionalTensor& lengths) {
  const OptionalTensor none;
  const LayerSizes s({x, none, none, weights, lengths, none});
  const at::Tensor reserve = reserve_in.contiguous();
  TORCH_CHECK(reserve.sizes() == s.reserve() && reserve.scalar_type() == x.scalar_type(), "reserve must be ",
              x.scalar_type(), " ", s.reserve(), ", got ", reserve.scalar_type(), " ", reserve.sizes());
  const Ragged ragged(s, lengths, none);
  const at::Tensor out = at::zeros(s.reserve(), reserve.options());  // past a length as well
  const int64_t block = block_of(s, ragged, x.scalar_type());
  switch (reserve.element_size()) {
    case 2:
      unblock<uint16_t>(s, ragged, reserve, block, out);
      break;
    case 4:
      unblock<float>(s, ragged, reserve, block, out);
      break;
    default:
      unblock<double>(s, ragged, reserve, block, out);
  }
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(fastlstm, CPU, m) { m.impl("native_gates", gates); }

}  // namespace fastlstm
