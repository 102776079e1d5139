// The Engine of the kernels of cpu/int8.h, for frozen layers; it has no Backward.
#pragma once

#include "cpu/engine.h"
#include "cpu/int8.h"

namespace fastlstm {

class Int8Forward {
 public:
  Int8Forward(const LayerInputs& in, const LayerSizes& s, const Ragged& ragged, const ForwardPlan& plan,
              const PackedView* packed)
      : s_(s), plan_(plan), packed_(*packed), x_(packed_input<float>(in.x, s, ragged)) {}

  static int64_t state_stride(int64_t P) { return P; }
  static int64_t state_rows(int64_t B) { return B; }

  void reserve(Workspace& space) {
    for (int64_t d = 0; d < s_.D; ++d) hidden_offset_[d] = space.take<float>(s_.proj() ? s_.B * s_.H : 0);
    scratch_offset_ =
        space.take<uint8_t>(plan_.partition.threads() * kernel_.forward_scratch(s_.B, s_.I, s_.H, s_.P));
  }

  void prepare(const Workspace& space, int64_t d, const DirectionWeights&,
               const ForwardBuffers<float, float>& b) {
    fastlstm::ForwardArgs<float> layer{};
    layer.rows = b.rows;
    layer.I = s_.I, layer.H = s_.H, layer.P = s_.P, layer.reverse = b.reverse;
    layer.x = x_.const_data_ptr<float>();
    layer.bias = b.bias;
    layer.hidden = s_.proj() ? space.at<float>(hidden_offset_[d]) : nullptr;
    layer.h[0] = b.h, layer.h[1] = b.h + s_.B * s_.P;
    layer.c0 = b.c, layer.c = b.c;
    layer.y = b.y, layer.cells = b.cells, layer.y_stride = b.y_stride, layer.cells_stride = b.cells_stride;
    const auto weight = [&](PackedWeight w) { return packed_.int8_weight(w, d); };
    args_[d] = {layer, weight(PackedWeight::ih), weight(PackedWeight::hh),
                s_.proj() ? weight(PackedWeight::hr) : int8::Weight{}, space.at<uint8_t>(scratch_offset_)};
  }

  void run(int64_t d, const Member& me) const { kernel_.forward(args_[d], me); }

 private:
  const int8::Kernels& kernel_ = int8::kernels();
  const LayerSizes& s_;
  const ForwardPlan& plan_;
  const PackedView& packed_;
  const at::Tensor x_;  // [N, I]
  PerDirection hidden_offset_;
  int64_t scratch_offset_ = 0;
  int8::ForwardArgs args_[2];
};

struct Int8Engine {
  using Number = float;
  using State = float;
  using Forward = Int8Forward;

  static int64_t unit_block() { return int8::kernels().layout.width; }
};

}  // namespace fastlstm
