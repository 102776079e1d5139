// bfloat16 kernels for CPUs that multiply bfloat16: products of bfloat16 summed in float32, in AMX tiles or
// by AVX512_BF16. c, dc, dh and pre-activations are float32; h is rounded to bfloat16, as torch.nn.LSTM's own
// kernels do. One direction of one layer without projection over the whole sequence; no torch here. Names and
// the order of rows as in cpu/sequence.h; `padded` is a multiple of kTileDepth.
#pragma once

#include "cpu/sequence.h"

// Whether the compiler knows the instructions.
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

struct ForwardArgs {
  Rows rows;
  int64_t I, H;
  bool reverse;
  const Bf16* x;      // the caller's rows, likewise y, cells and their gradients
  const float* bias;  // [4H]  bias_ih + bias_hh
  const Bf16* w_ih;   // pack_gates of weight_ih
  const Bf16* w_hh;   // pack_gates of weight_hh
  Bf16* gates;        // [N, 4H]  out: the activated gates as they are saved, or null
  // [2, B + 16, row_stride(H)]  state, sorted rows, zeros in the padding; see cpu/sequence.h. Tiles read rows
  // behind a member's last, which others may be writing, and drop what they make of them.
  Bf16* h;
  float* c;     // [B, H]  state
  Bf16* y;      // out
  Bf16* cells;  // out, or null
  int64_t y_stride, cells_stride;
  Bf16* scratch;  // per member, forward_scratch(I) elements
};

struct BackwardArgs {
  Rows rows;
  int64_t H;
  bool reverse;
  int64_t first, steps;  // which steps of the direction's own order this call runs, last to first
  int64_t base;          // packed row that row 0 of dgates is
  const Bf16* gates;     // [N, 4H]
  const Bf16* cells;
  const float* c0;     // [B, H] sorted rows
  const Bf16* dy;      // or null
  const Bf16* dcells;  // or null
  int64_t cells_stride, dy_stride, dcells_stride;
  const Bf16* w_hh;  // pack_columns of weight_hh
  Bf16* dgates;      // [. + 16, row_stride(4H)]  out for these steps; zeros in columns [4H, padded(4H))
  float* dh;         // [B, padded H]  in: of h_n, out: of h0; sorted rows
  float* dc;         // [B, H]  in: of c_n, out: of c0
  float* db;         // [members, 4H]  sums of dgates over the rows of each member, added to
};

struct Kernels {
  const char* name;
  // Units [begin, end) of a weight [4H, K]; begin is a multiple of kBlock.
  void (*pack_gates)(const Bf16* weight, int64_t H, int64_t K, int64_t begin, int64_t end, Bf16* packed);
  // Columns [begin, end) of a row-major B [K, N]; begin is a multiple of kUnits.
  void (*pack_columns)(const Bf16* b, int64_t K, int64_t N, int64_t begin, int64_t end, Bf16* packed);
  void (*forward)(const ForwardArgs&, const Member&);
  void (*backward)(const BackwardArgs&, const Member&);
};

// Whether the CPU has AVX512_BF16 and ATEN_CPU_CAPABILITY allows AVX-512.
bool has_instructions();

// The best that CPU and system have, or null where the kernels of cpu/forward.h, which widen bfloat16, are
// faster. Where ATEN_CPU_CAPABILITY is set: AVX512_BF16 at "avx512", whether faster or not, and never AMX,
// since no level names it.
const Kernels* kernels();

}  // namespace fastlstm::bf16
