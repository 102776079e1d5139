// bfloat16 kernels for CPUs that multiply bfloat16: products of bfloat16 summed in float32, in AMX tiles or
// by AVX512_BF16. c, dc, dh and pre-activations are float32. T is the type of x, weights and results: Bf16,
// or float, of which only the factors of products are rounded. One direction of one layer over the whole
// sequence; no torch here. Names and the order of rows as in cpu/sequence.h; `padded` is a multiple of
// kTileDepth.
#pragma once

#include "cpu/sequence.h"

// Defined if the compiler supports the instructions.
#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 11)
#define FASTLSTM_BF16_KERNELS 1
#endif

namespace fastlstm::bf16 {

using fastlstm::Bf16;

constexpr int64_t kTileRows = 16;   // of a tile
constexpr int64_t kTileDepth = 32;  // bfloat16 numbers in a row of a tile
constexpr int64_t kBlock = 16;      // units of a block, and of the saved gates
constexpr int64_t kUnits = 32;      // members own multiples of this many units

inline int64_t padded(int64_t n) { return (n + kTileDepth - 1) / kTileDepth * kTileDepth; }
// Elements from row to row of a left operand of depth n: an odd multiple of 64 bytes, so that 16 rows fall
// into different sets of the L1.
inline int64_t row_stride(int64_t n) { return padded(n) | kTileDepth; }

inline int64_t packed_gates_size(int64_t H, int64_t K) {
  return (H + kBlock - 1) / kBlock * 4 * kBlock * padded(K);
}
inline int64_t packed_columns_size(int64_t K, int64_t N) { return padded(K) * padded(N); }
inline int64_t forward_scratch(int64_t I) { return kBf16RowBlockRows * row_stride(I); }

// Rows of h as a factor, of which tiles read more than there are.
inline int64_t factor_rows(int64_t B) { return B + kTileRows; }

template <class T>
struct ForwardArgs {
  Rows rows;
  int64_t I, H, P;
  bool reverse;
  const T* x;         // the caller's rows, as y, cells and their gradients are
  const float* bias;  // [4H]  bias_ih + bias_hh
  const Bf16* w_ih;   // pack_gates of weight_ih
  const Bf16* w_hh;   // pack_gates of weight_hh
  const Bf16* w_hr;   // pack_rows of weight_hr, or null
  T* gates;           // [N, 4H]  out: the activated gates as they are saved, or null
  // [2, factor_rows(B), row_stride(P)]  h as a factor, and the state where T is Bf16; sorted rows, zeros in
  // the padding; see cpu/sequence.h. Tiles read up to 15 rows past the last; the results are discarded. Other
  // members may be writing these rows.
  Bf16* h;
  T* h_state;    // [2, B, P]  state where T is float, in two slots as h; otherwise null
  Bf16* hidden;  // [factor_rows(B), row_stride(H)]  with w_hr: h before its projection, as a factor
  float* c;      // [B, H]  state
  T* y;          // out
  T* cells;      // out, or null
  int64_t y_stride, cells_stride;
  Bf16* scratch;  // per member, forward_scratch(I) elements
  RowMasks<float> masks = {};
  const float* h0 = nullptr;  // [B, P]  h that enters the first step, sorted; with a zoneout of h only
};

template <class T>
struct BackwardArgs {
  Rows rows;
  int64_t H, P;
  bool reverse;
  int64_t first, steps;  // which steps of the direction's own order this call runs, last to first
  int64_t base;          // packed row that row 0 of dgates is
  const T* gates;        // [N, 4H]
  const T* cells;
  const float* c0;  // [B, H] sorted rows
  const T* dy;      // or null
  const T* dcells;  // or null
  int64_t cells_stride, dy_stride, dcells_stride;
  const Bf16* w_hh;  // pack_columns of weight_hh
  const Bf16* w_hr;  // pack_columns of weight_hr, or null
  Bf16* dgates;      // [. + 16, row_stride(4H)]  out for these steps; zeros in columns [4H, padded(4H))
  Bf16* dr;          // [. + 16, row_stride(P)]  with w_hr, out: gradients of h; zeros in [P, padded(P))
  Bf16* hidden;      // [., H]  with w_hr, out: h before its projection; or null
  float* dh;         // [B, padded P]  in: of h_n, out: of h0; sorted rows
  float* dhidden;    // [B, padded H]  with w_hr: of h before its projection, of one step
  float* dc;         // [B, H]  in: of c_n, out: of c0
  float* db;         // [members, 4H]  sums of dgates over the rows of each member, added to
  RowMasks<float> masks = {};
  float* kept_h = nullptr;  // [B, padded P]  what a zoneout of h adds to the gradient of the state before
};

// C [m, n] (+)= A [m, k] B [k, n] on one thread, summed in float32, kGemmDepth terms at a time.
struct GemmArgs {
  int64_t m, n, k;
  // [m, k] of any row stride, zeros in columns [k, padded(k)), kTileRows rows more than m; or, if
  // transposed_a, [k, m] without padding.
  const Bf16* a;
  int64_t lda;
  bool transposed_a;
  const Bf16* b;  // pack_columns of B
  bool add;
  float* c;
  int64_t ldc;
  Bf16* scratch;  // kGemmScratch elements if transposed_a
};
constexpr int64_t kGemmRows = 128, kGemmDepth = 1024;  // of a block of A
constexpr int64_t kGemmScratch = kGemmRows * (kGemmDepth | kTileDepth);

template <class T>
struct Kernels {
  const char* name;
  // Units [begin, end) of a weight [4H, K]; begin is a multiple of kBlock.
  void (*pack_gates)(const T* weight, int64_t H, int64_t K, int64_t begin, int64_t end, Bf16* packed);
  // Columns [begin, end) of B = weight^T, laid out as by pack_columns; begin is a multiple of kUnits.
  // weight: row-major [N, K].
  void (*pack_rows)(const T* weight, int64_t N, int64_t K, int64_t begin, int64_t end, Bf16* packed);
  // Columns [begin, end) of a row-major B [K, N] with row stride ldb; begin is a multiple of kUnits.
  void (*pack_columns)(const T* b, int64_t K, int64_t N, int64_t ldb, int64_t begin, int64_t end,
                       Bf16* packed);
  void (*forward)(const ForwardArgs<T>&, const Member&);
  void (*backward)(const BackwardArgs<T>&, const Member&);
  void (*gemm)(const GemmArgs&);
};

// Returns true if the CPU has AVX512_BF16 and ATEN_CPU_CAPABILITY allows AVX-512.
bool has_instructions();

// The best that CPU and system have for T = float or Bf16, or null where the kernels of cpu/forward.h, which
// multiply float32, are faster. Where ATEN_CPU_CAPABILITY is set: AVX512_BF16 at "avx512", whether faster or
// not, and never AMX, since no level names it.
template <class T>
const Kernels<T>* kernels();

}  // namespace fastlstm::bf16
