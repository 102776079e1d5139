// A block of the persistent forward kernel.
#pragma once

#include "cuda/resident.h"
#include "cuda/step.h"

namespace fastlstm::cuda {

// h between the steps: from the slot that entered the step to the one that enters the next.
template <class T>
struct Exchanged {
  const T* from;
  T* to;
  FASTLSTM_HD Vec<Acc<T>, 1> load() const { return cuda::load<1>(from); }
  FASTLSTM_HD void store(const Vec<Acc<T>, 1>& x) const { cuda::store<1>(to, x); }
};

template <class T, int UNITS, int HELD, int COLUMNS>
struct ForwardBlock {
  static constexpr int kSliceRows = 8 * COLUMNS;
  static constexpr int kElements = (UNITS * kSliceRows + kWarps * 32 - 1) / (kWarps * 32);  // of a thread
  using Product = Resident<T, 4 * UNITS / 16, HELD, COLUMNS>;

  static FASTLSTM_DEVICE void run(const PersistentForward<T>& s, const Warp& warp) {
    const Layout& p = s.layout;
    const Member member(p, warp);
    Product product(
        warp, s.packed + (int64_t{member.d} * p.members + member.index) * p.chunks * kWarps * UNITS * 16,
        p.chunks);
    for (int slice = member.group; slice < p.slices; slice += p.groups) enter(s, warp, member, slice);
#pragma unroll 1
    for (int i = 0; i < s.count; ++i) {
#pragma unroll 1
      for (int slice = member.group; slice < p.slices; slice += p.groups) {
        step(s, warp, member, slice, i, product);
      }
    }
  }

  static FASTLSTM_DEVICE Moment moment(const PersistentForward<T>& s, int d, int i) {
    const int64_t at = s.begin + i, t = d == 0 ? at : s.step.steps.T - 1 - at;
    return {t, t - s.slot_t[d], at == 0, at == s.step.steps.T - 1};
  }

  // Publishes the h that enters the launch's first step.
  static FASTLSTM_DEVICE void enter(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                    int slice) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    const Slice exchange = Slice::of(s.layout, warp, member.d, slice, UNITS, T());
    const Moment m = moment(s, member.d, 0);
#pragma unroll 1
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        const int64_t at = (member.d * B + e.b) * H + e.j;
        Vec<Acc<T>, 1> h = m.first ? load_or_zeros<1>(s.step.state.h0, at) : load<1>(s.step.state.h + at);
        if (m.first && enters_fresh(s.step.steps, member.d, m.t, e.b)) h = zeros<Acc<T>, 1>();
        store<1>(state_element<T>(exchange.slot(s, s.epoch + 1), s.layout.chunks * kWarps, e.row, e.j), h);
      }
    }
    publish(warp, exchange.flags(s), member.index, s.epoch + 1);
  }

  static FASTLSTM_DEVICE void step(const PersistentForward<T>& s, const Warp& warp, const Member& member,
                                   int slice, int i, Product& product) {
    const int64_t B = s.step.steps.B, H = s.step.H;
    const Slice exchange = Slice::of(s.layout, warp, member.d, slice, UNITS, T());
    const Moment m = moment(s, member.d, i);
    const uint32_t epoch = s.epoch + 1 + static_cast<uint32_t>(i);
    const bool last = i == s.count - 1;

    PerLane<ForwardInput<Acc<T>, 1>> in[kElements];
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (e.exists) in[q][lane] = forward_input<T, 1>(s.step, m, member.d, e.b, e.j);
      }
    }
    await(warp, exchange.flags(s), exchange.first, exchange.last, epoch, s.fault);
    product.multiply(warp, exchange.slot(s, epoch));
    warp.block_sync();
#pragma unroll
    for (int q = 0; q < kElements; ++q) {
      for (const int lane : warp.lanes()) {
        const auto e = Element::of<UNITS, kSliceRows>(warp, lane, q, member.index, slice, H, B);
        if (!e.exists) continue;
        ForwardInput<Acc<T>, 1>& x = in[q][lane];
#pragma unroll
        for (int g = 0; g < 4; ++g) x.gates[g].v[0] += product.sum(warp, g * UNITS + e.unit, e.row);
        const int all = s.layout.chunks * kWarps;
        const Exchanged<T> kept = {state_element<T>(exchange.slot(s, epoch), all, e.row, e.j),
                                   last ? s.step.state.h + (member.d * B + e.b) * H + e.j
                                        : state_element<T>(exchange.slot(s, epoch + 1), all, e.row, e.j)};
        forward_output<T, 1>(s.step, m, member.d, e.b, e.j, x.valid, x.c, x.gates, kept);
      }
    }
    if (last) {
      warp.block_sync();  // the sums have been read
    } else {
      publish(warp, exchange.flags(s), member.index, epoch + 1);
    }
  }
};

}  // namespace fastlstm::cuda
