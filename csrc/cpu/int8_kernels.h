// Forward of a frozen int8 layer on the products of cpu/int8_products.h or cpu/int8_tiles_amx.h. Included by
// cpu/int8_*.cpp.
#pragma once

#include "cpu/forward.h"
#if defined(FASTLSTM_INT8_AMX)
#include "cpu/int8_tiles_amx.h"
#else
#include "cpu/int8_products.h"
#endif

namespace fastlstm::FASTLSTM_ISA {

// A member's scratch: quantized rows of x, of h or, with projection, of h before it, and pre-activations or
// projected rows.
struct Int8Scratch {
  static int64_t up(int64_t bytes) { return round_up(bytes, 64); }
  int64_t ahead;  // rows of x that are quantized at once: those of a step, or kInt8HoistRows of several
  int64_t x, x_scale, h, h_scale, pre, size;

  Int8Scratch(int64_t B, int64_t I, int64_t H, int64_t P) : ahead(std::max(B, kInt8HoistRows)) {
    const int64_t state = factor_stride(std::max(H, P)), units = (H + kLanes - 1) / kLanes * kLanes;
    x = 0;
    x_scale = up(x + (ahead + kInt8SpareRows) * factor_stride(I) * static_cast<int64_t>(sizeof(Factor)));
    h = up(x_scale + ahead * static_cast<int64_t>(sizeof(Quantization)));
    h_scale = up(h + (B + kInt8SpareRows) * state * static_cast<int64_t>(sizeof(Factor)));
    pre = up(h_scale + B * static_cast<int64_t>(sizeof(Quantization)));
    size = up(pre + std::max(kInt8HoistRows * 4 * units, kRowBlockRows * kInt8Block) * 4);
  }
};
inline int64_t int8_forward_scratch(int64_t B, int64_t I, int64_t H, int64_t P) {
  return Int8Scratch(B, I, H, P).size;
}

class Int8TimeLoop {
 public:
  Int8TimeLoop(const int8::ForwardArgs& args, const Member& me)
      : args_(args), a_(args.layer), me_(me), parts_(a_.rows.B, a_.I, a_.H, a_.P) {
    uint8_t* scratch = args.scratch + me.index * parts_.size;
    x_ = {reinterpret_cast<Factor*>(scratch + parts_.x),
          reinterpret_cast<Quantization*>(scratch + parts_.x_scale), a_.I};
    h_ = {reinterpret_cast<Factor*>(scratch + parts_.h),
          reinterpret_cast<Quantization*>(scratch + parts_.h_scale), a_.P};
    hidden_ = {h_.q, h_.of_row, a_.H};
    pre_ = reinterpret_cast<float*>(scratch + parts_.pre);
  }

  void run() {
    const int64_t steps = a_.rows.T;
    const ProductScope scope((me_.row_end - me_.row_begin) * steps >= kInt8AmxMinRows);
    for (int64_t s = 0; s < steps; ++s) {
      if (s == end_s_) take_x(s);
      step(s);
      if (me_.barrier) me_.barrier->wait();
      if (!a_.hidden) continue;
      project(s);
      if (me_.barrier) me_.barrier->wait();
    }
  }

 private:
  int64_t time(int64_t s) const { return a_.reverse ? a_.rows.T - 1 - s : s; }
  int64_t rows_at(int64_t s) const {
    return std::max<int64_t>(0, std::min(me_.row_end, a_.rows.count_at(time(s))) - me_.row_begin);
  }
  int64_t first_block() const { return me_.unit_begin / kLanes; }
  int64_t end_block() const { return (me_.unit_end + kLanes - 1) / kLanes; }

  // Quantizes x of step s, and of the next steps while they have few rows: then their products are made as
  // well, so that W_ih is read once for all.
  void take_x(int64_t s) {
    int64_t total = 0;
    end_s_ = s;
    do {
      const int64_t rows = rows_at(end_s_);
      if (end_s_ > s && total + rows > kInt8HoistRows) break;
      const float* x = a_.x + (a_.rows.offset_at(time(end_s_)) + me_.row_begin) * a_.I;
      for (int64_t r = 0; r < rows; ++r) x_.quantize(total + r, x + r * a_.I);
      total += rows;
      ++end_s_;
    } while (end_s_ < a_.rows.T);
    hoisted_ = total <= kInt8HoistRows;
    next_row_ = 0;
    for (int64_t b = first_block(); hoisted_ && b < end_block(); ++b)
      block_products(total, x_, block_of(args_.ih, a_.I, b), hoisted_block(b), false);
  }
  float* hoisted_block(int64_t b) const { return pre_ + (b - first_block()) * kInt8HoistRows * kInt8Block; }

  void step(int64_t s) {
    const int64_t t = time(s), rows = rows_at(s), begin = me_.row_begin;
    const float* h_in = a_.h[s % 2];
    for (int64_t r = 0; r < rows; ++r) h_.quantize(r, h_in + (begin + r) * a_.P);
    const ForwardStep<float, float> cells{a_,
                                          t,
                                          nullptr,
                                          h_in,
                                          s == 0 ? a_.c0 : a_.c,
                                          a_.h[(s + 1) % 2],
                                          nullptr,
                                          s + 1 < a_.rows.T ? time(s + 1) : -1,
                                          nullptr,
                                          nullptr,
                                          nullptr,
                                          0};
    for (int64_t r0 = 0; r0 < rows; r0 += kRowBlockRows) {
      const int64_t n = std::min(kRowBlockRows, rows - r0);
      const int64_t blocks = end_block() - first_block();
      const bool reverse_blocks = s % 2 == 1 && alternate_block_order(4.0 * a_.P * kLanes * blocks);
      for (int64_t k = 0; k < blocks; ++k) {
        const int64_t b = first_block() + (reverse_blocks ? blocks - 1 - k : k);
        float* pre = pre_;
        if (hoisted_)
          pre = hoisted_block(b) + next_row_ * kInt8Block;
        else
          block_products(n, x_.from(r0), block_of(args_.ih, a_.I, b), pre, false);
        block_products(n, h_.from(r0), block_of(args_.hh, a_.P, b), pre, true);
        finish_units(cells, begin + r0, n, b * kLanes, pre);
      }
    }
    next_row_ += rows;
  }

  // Gates and cells of n rows from `row` on, whose pre-activations but for the bias are at pre.
  void finish_units(const ForwardStep<float, float>& cells, int64_t row, int64_t n, int64_t u0,
                    float* pre) const {
    const int units = static_cast<int>(std::min(kLanes, a_.H - u0));
    Vec<float> bias[4];
    for (int gate = 0; gate < 4; ++gate) bias[gate] = load_part(a_.bias + gate * a_.H + u0, units);
    for (float* p = pre; p < pre + n * kInt8Block; p += kInt8Block) {
      const Gates<Vec<float>> g = activate<Activation<Bf16>>(
          Gates<Vec<float>>{load(p) + bias[0], load(p + kLanes) + bias[1], load(p + 2 * kLanes) + bias[2],
                            load(p + 3 * kLanes) + bias[3]});
      store(p, g.i);
      store(p + kLanes, g.f);
      store(p + 2 * kLanes, g.g);
      store(p + 3 * kLanes, g.o);
    }
    for (int64_t r = 0; r < n; ++r)
      cells.template cell<Activation<Bf16>>(row + r, u0, units, pre + r * kInt8Block);
  }

  // The member's features of h = hidden W_hr^T, to the state and to y.
  void project(int64_t s) {
    const int64_t t = time(s), rows = rows_at(s), begin = me_.row_begin;
    const int64_t next_t = s + 1 < a_.rows.T ? time(s + 1) : -1;
    for (int64_t r = 0; r < rows; ++r) hidden_.quantize(r, a_.hidden + (begin + r) * a_.H);
    const int64_t first = me_.barrier ? me_.feature_begin : 0, end = me_.barrier ? me_.feature_end : a_.P;
    // hoisted pre-activations of later steps lie in pre_
    alignas(64) float out[kInt8ProductRows * kInt8Block];
    for (int64_t p0 = first / kInt8Block * kInt8Block; p0 < end; p0 += kInt8Block)
      for_product_rows(rows, [&](int64_t r0, int64_t n) {
        block_products(n, hidden_.from(r0), block_of(args_.hr, a_.H, p0 / kInt8Block), out, false);
        for (int64_t m = 0; m < n; ++m) {
          const int64_t r = begin + r0 + m;
          float* y = a_.y + a_.rows.row_at(t, r) * a_.y_stride;
          float* h = a_.h[(s + 1) % 2] + r * a_.P;
          const bool cleared =
              a_.rows.fresh && next_t >= 0 && r < a_.rows.count_at(next_t) && a_.rows.fresh_at(next_t, r);
          for (int64_t p = std::max(p0, first); p < std::min(end, p0 + kInt8Block); ++p) {
            y[p] = out[m * kInt8Block + p - p0];
            h[p] = cleared ? 0.0f : y[p];
          }
        }
      });
  }

  const int8::ForwardArgs& args_;
  const fastlstm::ForwardArgs<float>& a_;
  const Member& me_;
  const Int8Scratch parts_;
  FactorRows x_, h_, hidden_;
  float* pre_;
  bool hoisted_ = false;
  int64_t end_s_ = 0;     // x of the steps before it is quantized
  int64_t next_row_ = 0;  // of the hoisted products, where those of the next step begin
};

inline void int8_forward(const int8::ForwardArgs& args, const Member& me) { Int8TimeLoop(args, me).run(); }

inline void block_sums(int64_t K, const float* x, const Weight& weight, uint8_t* scratch, int32_t* sums,
                       float* scale) {
  Quantization quantization;
  const FactorRows row{reinterpret_cast<Factor*>(scratch), &quantization, K};
  row.quantize(0, x);
  *scale = quantization.scale;
  Ints of_row[4];
  const ProductScope scope(true);
  row_sums(row, weight, of_row);
  std::memcpy(sums, of_row, sizeof(of_row));
}

inline constexpr int8::Kernels kInt8Table = {
    FASTLSTM_INT8_NAME, {kLanes, kGroup}, int8_forward_scratch, int8_forward, block_sums};

}  // namespace fastlstm::FASTLSTM_ISA
