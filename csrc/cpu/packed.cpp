// Packing and unpacking of cpu/packed.h: by element, from the position that each has in its layout.
#include "cpu/packed.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <cstring>

#include "cpu/bf16.h"
#include "cpu/run_partition.h"

namespace fastlstm {
namespace {

constexpr int64_t kMagic = 0x316e7a72666c7466;  // "ftlfrzn1"

int64_t element_bytes(const PackedHeader& h) {
  return h.layout == PackedLayout::panels ? h.real_bytes() : h.layout == PackedLayout::int8_blocks ? 1 : 2;
}

// Calls f(E{}) for the type of the matrices' elements as they are stored.
template <class F>
auto with_element(const PackedHeader& h, F&& f) {
  if (h.layout == PackedLayout::int8_blocks) return f(int8_t{});
  if (h.layout != PackedLayout::panels) return f(at::BFloat16{});
  if (h.scalar_type() == at::kDouble) return f(double{});
  return f(float{});
}
at::ScalarType matrix_dtype(const PackedHeader& h) {
  return with_element(h, [](auto e) { return c10::CppTypeToScalarType<decltype(e)>::value; });
}

constexpr PackedWeight kWeights[] = {PackedWeight::ih, PackedWeight::hh, PackedWeight::hr};

// Calls f(weight, direction) for each matrix, in the contract's order.
template <class F>
void for_matrices(const PackedView& view, F&& f) {
  for (int64_t d = 0; d < view.header().D; ++d)
    for (int64_t k = 0; k < view.weights(); ++k) f(kWeights[k], d);
}

// Where in the contract's list of a direction a matrix is.
int64_t index_of(PackedWeight w, const PackedHeader& h) {
  return w == PackedWeight::ih ? 0 : w == PackedWeight::hh ? 1 : h.bias ? 4 : 2;
}
int64_t per_direction(const PackedHeader& h) { return 2 + 2 * h.bias + h.proj(); }

// Returns true if form, dtype and layout fit together, so that every position is within its part, and if no
// product of the sizes overflows.
bool is_valid(const PackedHeader& h) {
  constexpr int64_t kMaxSize = int64_t{1} << 24;
  const auto size = [](int64_t n) { return n >= 0 && n <= kMaxSize; };
  const auto form = static_cast<Frozen>(h.frozen);
  const bool is_float = h.dtype == int64_t(at::kFloat), is_bf16 = h.dtype == int64_t(at::kBFloat16);
  const bool stored = form == Frozen::stored;
  bool fits = false;
  switch (h.layout) {
    case PackedLayout::panels:
      fits = stored && (is_float || h.dtype == int64_t(at::kDouble));
      break;
    case PackedLayout::bf16_panels:
      fits = (stored && is_bf16) || (form == Frozen::bfloat16 && is_float);
      break;
    case PackedLayout::bf16_tiles:
      fits = ((stored && is_bf16) || (form == Frozen::bfloat16 && is_float)) && h.width == bf16::kBlock &&
             h.H > 0 && h.I > 0;
      break;
    case PackedLayout::int8_blocks:
      fits = form == Frozen::int8 && is_float && std::max({h.I, h.H, h.P}) <= int8::kMaxDepth;
      break;
  }
  return fits && h.magic == kMagic && size(h.I) && size(h.H) && size(h.P) && (h.D == 1 || h.D == 2) &&
         h.width > 0 && h.width <= 64 && h.group > 0 && h.group <= 64 && (h.bias == 0 || h.bias == 1);
}

}  // namespace

PackedView::PackedView(const at::Tensor& buffer) {
  const bool bytes_of_cpu =
      buffer.scalar_type() == at::kByte && buffer.is_cpu() && buffer.dim() == 1 && buffer.is_contiguous();
  TORCH_CHECK(bytes_of_cpu && buffer.numel() >= int64_t(sizeof(PackedHeader)),
              "packed must be the bytes of a frozen layer on cpu, got ", buffer.scalar_type(), " ",
              buffer.sizes(), " on ", buffer.device());
  data_ = const_cast<uint8_t*>(buffer.const_data_ptr<uint8_t>());
  std::memcpy(&header_, data_, sizeof(header_));
  const bool valid = is_valid(header_);
  if (valid) place();
  TORCH_CHECK(valid && bytes() == buffer.numel(), "packed must be the bytes of a frozen layer, got ",
              buffer.numel(), " bytes of something else");
}

PackedView::PackedView(const PackedHeader& header, uint8_t* data) : header_(header), data_(data) { place(); }

int64_t PackedView::elements(PackedWeight w) const {
  const int64_t rows = this->rows(w), K = depth(w), W = header_.width;
  switch (header_.layout) {
    case PackedLayout::panels:
    case PackedLayout::bf16_panels:
      return w == PackedWeight::hr ? round_up(rows, 2 * W) * K : round_up(header_.H, W) * 4 * K;
    case PackedLayout::bf16_tiles:
      return w == PackedWeight::hr ? bf16::packed_columns_size(K, rows)
                                   : bf16::packed_gates_size(header_.H, K);
    default: {
      const int64_t blocks = (w == PackedWeight::hr ? round_up(rows, 4 * W) / 4 : round_up(header_.H, W)) / W;
      return blocks * int8::block_size(K, {W, header_.group});
    }
  }
}

int64_t PackedView::position(PackedWeight w, int64_t r, int64_t k) const {
  const int64_t H = header_.H, K = depth(w), W = header_.width, gate = r / std::max<int64_t>(1, H),
                u = r % std::max<int64_t>(1, H);
  switch (header_.layout) {
    case PackedLayout::panels:
    case PackedLayout::bf16_panels: {
      // A row of a panel: two vectors, whose elements alternate where they are bfloat16.
      const auto in_panel = [&](int64_t column) {
        const int64_t c = column % (2 * W);
        return header_.layout == PackedLayout::panels ? c : 2 * (c % W) + c / W;
      };
      if (w == PackedWeight::hr) return (r / (2 * W) * K + k) * 2 * W + in_panel(r);
      const int64_t u0 = u / W * W, gap = gate_gap(H, u0, W);
      const int64_t column = gate * gap + u - u0;
      return u0 * 4 * K + (column / (2 * W) * K + k) * 2 * W + in_panel(column);
    }
    case PackedLayout::bf16_tiles: {
      constexpr int64_t kTile = bf16::kTileRows * bf16::kTileDepth;
      const int64_t depth = bf16::padded(K) / bf16::kTileDepth, n = w == PackedWeight::hr ? r : u,
                    block = n / bf16::kBlock;
      const int64_t panel = w == PackedWeight::hr ? block / 2 * 2 : block * 4 + gate / 2 * 2,
                    half = w == PackedWeight::hr ? block % 2 : gate % 2;
      return (panel * depth + half + k / bf16::kTileDepth * 2) * kTile +
             k % bf16::kTileDepth / 2 * 2 * bf16::kBlock + n % bf16::kBlock * 2 + k % 2;
    }
    default: {
      const int64_t G = header_.group, at = row_position(w, r), block = at / (4 * W), lane = at % (4 * W);
      return block * int8::block_size(K, {W, G}) + (k / G * 4 * W + lane) * G + k % G;
    }
  }
}

int64_t PackedView::row_position(PackedWeight w, int64_t r) const {
  if (w == PackedWeight::hr) return r;
  const int64_t W = header_.width, gate = r / header_.H, u = r % header_.H;
  return (u / W * 4 + gate) * W + u % W;
}

int64_t PackedView::part_bytes(int part) const {
  const int64_t H = header_.H, W = header_.width;
  if (part < 2)
    return header_.bias ? 4 * H * static_cast<int64_t>(c10::elementSize(header_.scalar_type())) : 0;
  if (part == 2) return 4 * H * header_.real_bytes();
  const PackedWeight w = kWeights[(part - 3) / 3];
  if (w == PackedWeight::hr && !header_.proj()) return 0;
  if (part % 3 == 0) return elements(w) * element_bytes(header_);
  if (header_.layout != PackedLayout::int8_blocks) return 0;
  return (w == PackedWeight::hr ? round_up(header_.P, 4 * W) : 4 * round_up(H, W)) * 4;  // float or int32
}
void PackedView::place() {
  begin_[0] = 0;
  for (int part = 0; part < kParts; ++part) begin_[part + 1] = begin_[part] + round_up(part_bytes(part), 64);
}

PackedHeader packed_header(at::ScalarType dtype, Frozen frozen, int64_t I, int64_t H, int64_t P, int64_t D,
                           bool bias) {
  const Dtype of_plan = dtype == at::kDouble     ? Dtype::float64
                        : dtype == at::kBFloat16 ? Dtype::bfloat16
                                                 : Dtype::float32;
  const LayerShape shape{of_plan, 1, 1, 1, 1, 1, I, H, P, D, false, frozen};
  PackedHeader h{kMagic, int64_t(dtype), int64_t(frozen), PackedLayout::panels, 0, 1, I, H, P, D, bias, {}};
  switch (frozen_engine(shape, this_machine())) {
    case EngineKind::int8_products:
      h.layout = PackedLayout::int8_blocks;
      h.width = int8::kernels().layout.width, h.group = int8::kernels().layout.group;
      break;
    case EngineKind::bf16_products:
      h.layout = PackedLayout::bf16_tiles, h.width = bf16::kBlock;
      break;
    case EngineKind::bf16_panels:
      h.layout = PackedLayout::bf16_panels, h.width = kernels<float>().width;
      break;
    default:
      h.width = dtype == at::kDouble ? kernels<double>().width : kernels<float>().width;
  }
  return h;
}

bool is_native(const PackedHeader& h) {
  const PackedHeader here =
      packed_header(h.scalar_type(), static_cast<Frozen>(h.frozen), h.I, h.H, h.P, h.D, h.bias);
  return std::memcmp(&h, &here, sizeof(h)) == 0;
}

at::Tensor pack_layer(at::ScalarType dtype, Frozen frozen, at::TensorList weights, at::TensorList scales) {
  TORCH_CHECK(weights.size() >= 2 && weights[0].dim() == 2 && weights[1].dim() == 2,
              "weights must begin with weight_ih [4H, I] and weight_hh [4H, P]");
  const int64_t I = weights[0].size(1), H = weights[0].size(0) / 4, P = weights[1].size(1);
  const bool bias = weights.size() > 2 && weights[2].dim() == 1;
  const int64_t n = 2 + 2 * bias + (P != H), D = static_cast<int64_t>(weights.size()) / n;
  TORCH_CHECK(D * n == static_cast<int64_t>(weights.size()) && (D == 1 || D == 2), "weights must be ", n,
              " tensors for each of 1 or 2 directions, got ", weights.size());
  const PackedHeader header = packed_header(dtype, frozen, I, H, P, D, bias);
  TORCH_CHECK(frozen != Frozen::int8 || std::max({I, H, P}) <= int8::kMaxDepth,
              "int8 weights must have at most ", int8::kMaxDepth, " columns, got ", std::max({I, H, P}));
  TORCH_CHECK(frozen != Frozen::int8 || static_cast<int64_t>(scales.size()) == D * (2 + header.proj()),
              "int8 weights must have a scale for each matrix, got ", scales.size());
  at::Tensor packed = at::zeros({PackedView(header, nullptr).bytes()}, at::kByte);
  const PackedView view(header, packed.mutable_data_ptr<uint8_t>());
  std::memcpy(packed.mutable_data_ptr<uint8_t>(), &header, sizeof(header));

  const auto checked = [&](const at::Tensor& t, at::IntArrayRef sizes, at::ScalarType type) {
    TORCH_CHECK(t.sizes() == sizes && t.scalar_type() == type && t.is_cpu(), "a weight must be ", type, " ",
                sizes, " on cpu, got ", t.scalar_type(), " ", t.sizes(), " on ", t.device());
    return t.contiguous();
  };
  int64_t matrices = 0;
  for_matrices(view, [&](PackedWeight w, int64_t d) {
    const int64_t rows = view.rows(w), K = view.depth(w);
    const at::Tensor weight = checked(weights[d * n + index_of(w, header)], {rows, K}, matrix_dtype(header));
    with_element(header, [&](auto e) {
      using E = decltype(e);
      const E* from = weight.const_data_ptr<E>();
      E* to = view.weight<E>(w, d);
      at::parallel_for(0, rows, 1 + kPackTaskMinElements / (K + 1), [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r)
          for (int64_t k = 0; k < K; ++k) to[view.position(w, r, k)] = from[r * K + k];
      });
    });
    if (frozen != Frozen::int8) return;
    const at::Tensor scale = checked(scales[matrices++], {rows}, at::kFloat);
    const int8_t* from = weight.const_data_ptr<int8_t>();
    for (int64_t r = 0; r < rows; ++r) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += from[r * K + k];
      view.scale(w, d)[view.row_position(w, r)] = scale.const_data_ptr<float>()[r];
      view.row_sums(w, d)[view.row_position(w, r)] = sum;
    }
  });
  for (int64_t d = 0; bias && d < D; ++d) {
    const at::ScalarType real = dtype == at::kDouble ? at::kDouble : at::kFloat;
    at::Tensor b[2];
    for (int k = 0; k < 2; ++k) {
      b[k] = checked(weights[d * n + 2 + k], {4 * H}, dtype);
      std::memcpy(view.bias<uint8_t>(k, d), b[k].const_data_ptr(), b[k].nbytes());
    }
    const at::Tensor sum = b[0].to(real).add(b[1].to(real));
    std::memcpy(view.bias_sum<uint8_t>(d), sum.const_data_ptr(), sum.nbytes());
  }
  return packed;
}

std::tuple<std::vector<at::Tensor>, std::vector<at::Tensor>> unpack_layer(const at::Tensor& packed) {
  const PackedView view(packed);
  const PackedHeader& header = view.header();
  const int64_t n = per_direction(header);
  std::vector<at::Tensor> weights(header.D * n), scales;
  for_matrices(view, [&](PackedWeight w, int64_t d) {
    const int64_t rows = view.rows(w), K = view.depth(w);
    at::Tensor& weight = weights[d * n + index_of(w, header)];
    weight = at::empty({rows, K}, matrix_dtype(header));
    with_element(header, [&](auto e) {
      using E = decltype(e);
      const E* from = view.weight<E>(w, d);
      E* to = weight.mutable_data_ptr<E>();
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < K; ++k) to[r * K + k] = from[view.position(w, r, k)];
    });
    if (header.layout != PackedLayout::int8_blocks) return;
    scales.push_back(at::empty({rows}, at::kFloat));
    for (int64_t r = 0; r < rows; ++r)
      scales.back().mutable_data_ptr<float>()[r] = view.scale(w, d)[view.row_position(w, r)];
  });
  for (int64_t d = 0; header.bias && d < header.D; ++d)
    for (int k = 0; k < 2; ++k) {
      at::Tensor& bias = weights[d * n + 2 + k];
      bias = at::empty({4 * header.H}, header.scalar_type());
      std::memcpy(bias.mutable_data_ptr(), view.bias<uint8_t>(k, d), bias.nbytes());
    }
  return {weights, scales};
}

at::Tensor packed_here(const at::Tensor& packed) {
  const PackedHeader header = PackedView(packed).header();
  const auto [weights, scales] = unpack_layer(packed);
  return pack_layer(header.scalar_type(), static_cast<Frozen>(header.frozen), weights, scales);
}

}  // namespace fastlstm
