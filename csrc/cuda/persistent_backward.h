// A block of the persistent backward kernel.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

template <class T, int UNITS, int HELD, int COLUMNS>
struct BackwardBlock {
  static constexpr int kSliceRows = 8 * COLUMNS;
  static constexpr int kElements = (UNITS * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread
  static constexpr int kPart = 4 * UNITS;  // a member's part of the state: [gate, unit]
  using Product = Resident<T, UNITS / 16, HELD, COLUMNS>;

  static FASTLSTM_DEVICE void run(const PersistentBackward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Product product(warp,
                    s.packed + (int64_t{member.d} * p.members + member.index) * p.chunks * kWarps * UNITS * 4,
                    p.chunks);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        step(s, warp, member, slice, i, product);
      }
    }
    if (!s.dh) return;
#pragma unroll 1
    for (int slice = member.group; slice < p.slices; slice += p.groups)
      leave(s, warp, member, slice, product);
  }

  static FASTLSTM_DEVICE Moment moment(const PersistentBackward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? s.step.steps.T - 1 - at : at;
    return {t, t - s.slot_t[d], at == 0, false};
  }

  static FASTLSTM_DEVICE void step(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Product& product) {
    const Steps& steps = s.step.steps;
    const int64_t B = steps.B, H = s.step.H;
    const Slice exchange = Slice::of(s.layout, warp, member.d, slice, kPart, T());
    const Moment m = moment(s, member.d, i);
    const uint32_t epoch = s.epoch + static_cast<uint32_t>(i);  // of the step before

    PerLane<BackwardInput<Acc<T>, 1>> in[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) in[q][lane] = backward_input<T, 1>(s.step, m, member.d, e.b, e.j);
      }
    }
    if (i > 0) {
      await(warp, exchange.flags(s), exchange.first, exchange.last, epoch, s.fault);
      product.multiply(warp, exchange.slot(s, epoch));
      warp.block_sync();
    }
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        BackwardInput<Acc<T>, 1>& x = in[q][lane];
        Vec<Acc<T>, 1> dh;
        if (i > 0) {
          dh.v[0] = product.sum(warp, e.unit, e.row);
        } else {
          dh = product_dh<T, 1>(steps, s.step.gradient, m.first, member.d, e.b, e.j);
        }
        dh = take_dh<T, 1>(steps, s.step.gradient, m.first, member.d, m.t, e.b, e.j, dh, x.dy);
        backward_output<T, 1>(s.step, m, member.d, e.b, e.j, x, dh);
#pragma unroll
        for (int g = 0; g < 4; ++g) {
          const int64_t k = int64_t{member.index} * kPart + g * UNITS + e.unit;
          store<1>(state_element<T>(exchange.slot(s, epoch + 1), s.layout.chunks * kWarps, e.row, k), x.a[g]);
        }
      }
    }
    publish(warp, exchange.flags(s), member.index, epoch + 1);
  }

  // dh of the step that follows the launch.
  static FASTLSTM_DEVICE void leave(const PersistentBackward<T>& s, const Warp& warp, const Member& member,
                                    int slice, Product& product) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    const Slice exchange = Slice::of(s.layout, warp, member.d, slice, kPart, T());
    const uint32_t epoch = s.epoch + static_cast<uint32_t>(s.count);
    await(warp, exchange.flags(s), exchange.first, exchange.last, epoch, s.fault);
    product.multiply(warp, exchange.slot(s, epoch));
    warp.block_sync();
#pragma unroll 1
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) s.dh[(member.d * B + e.b) * H + e.j] = product.sum(warp, e.unit, e.row);
      }
    }
    warp.block_sync();  // the sums have been read
  }
};

}  // namespace fastlstm::cuda
