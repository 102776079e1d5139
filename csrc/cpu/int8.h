// int8 kernels of a frozen layer (cpu/packed.h): products of int8 summed in int32; everything else is float.
// One direction of one layer over the whole sequence; no torch here. Names and the order of rows as in
// cpu/sequence.h.
//
// Weights: int8 with one scale per row, packed when the layer was frozen. A row v [K] of x, h and, with
// projection, of h before it is quantized in the step that multiplies it, between its least and largest
// element: s = (max(v, 0) - min(v, 0)) / 255, zero = round(-min / s), q = round(v / s) + zero in [0, 255]. A
// sum of (q - zero) w is exact, so every instruction set has the same. A row with an infinity or a NaN
// becomes NaN.
#pragma once

#include "cpu/sequence.h"

// Whether the compiler knows AVX512_VNNI and AVX_VNNI.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTLSTM_VNNI_KERNELS 1
#endif

namespace fastlstm::int8 {

// A row of a weight has at most this many elements: sums of more products of 255 and 127 could overflow.
constexpr int64_t kMaxDepth = 65536;

// How an instruction set reads a weight [rows, K]: in blocks of four vectors of `width` rows; `group`
// neighbours in depth are multiplied and summed by one instruction.
struct Layout {
  int64_t width, group;
};
inline int64_t groups(int64_t K, int64_t group) { return (K + group - 1) / group; }
// Elements of a block.
inline int64_t block_size(int64_t K, const Layout& layout) {
  return groups(K, layout.group) * 4 * layout.width * layout.group;
}

struct Weight {
  const int8_t* packed;   // [blocks][groups(K)][4][width][group], zeros where there is no row
  const float* scale;     // [blocks][4][width]
  const int32_t* offset;  // [blocks][4][width]  sums of the rows, which zero is multiplied by
};

struct ForwardArgs {
  // Its ih, hh, hr and scratch are not used, and it has no gates.
  fastlstm::ForwardArgs<float> layer;
  Weight ih, hh;     // a block: the units of one vector, in the order i, f, g, o
  Weight hr;         // a block: four vectors of features; without projection none
  uint8_t* scratch;  // per member, forward_scratch(B, I, H, P) bytes
};

inline int64_t sums_scratch(int64_t K) { return 16 * (K + 128); }

struct Kernels {
  const char* name;
  Layout layout;
  int64_t (*forward_scratch)(int64_t B, int64_t I, int64_t H, int64_t P);
  void (*forward)(const ForwardArgs&, const Member&);
  // The sums of a row x [K] with one block of weights, [4 width], and the row's scale; for tests. scratch:
  // sums_scratch(K) bytes.
  void (*block_sums)(int64_t K, const float* x, const Weight& weight, uint8_t* scratch, int32_t* sums,
                     float* scale);
};

// Of the best instruction set that this CPU has and ATEN_CPU_CAPABILITY allows.
const Kernels& kernels();

}  // namespace fastlstm::int8
