// The CPU kernels as the binding sees them: one direction of one layer over the whole sequence. No torch, no
// ISA.
//
// Rows. Ragged batches are run as PackedSequence stores them: rows sorted by falling length, step t holding
// the first count[t] of them at packed rows offset[t] ... of every [N, .] array. A dense batch has count B
// and offset t * B. x, y and cells, and their gradients, hold the caller's rows, padded or packed as x is.
// Sizes: T steps, B rows, N = sum of lengths, H units, P features of h (H without
// projection). Gates i, f, g, o.
//
// Saved gates. A row of the activated gates [N, 4H] that forward keeps lies in blocks of one vector of units:
// in a block its units of i, then of f, g, o, so that it is one piece of memory. The last block is as wide as
// is left.
#pragma once

#include <atomic>
#include <cstdint>
#include <thread>

#include "cpu/plan.h"

namespace fastlstm {

// A bfloat16 number's bits.
using Bf16 = uint16_t;
// The type of sums and states where x, weights and results are stored as T.
template <class T>
struct RealOf {
  using type = T;
};
template <>
struct RealOf<Bf16> {
  using type = float;
};
template <class T>
using Real = typename RealOf<T>::type;
// A number of a packed panel of bfloat16: half the bytes of a panel of floats, which takes less time to
// multiply where an L2 holds it. In a row, column c of the first vector and column c of the second are
// neighbours.
struct PanelBf16 {
  uint16_t bits;
};

struct Rows {
  int64_t T, B, N;
  const int64_t* count;      // [T]  rows that have step t, or null: B
  const int64_t* offset;     // [T]  first packed row of step t, or null: t * B
  const int64_t* batch_row;  // [B]  row of the caller's batch a sorted row is, or null: itself
  const uint8_t* fresh;      // [N]  nonzero: this direction enters the step with zero state; or null
  bool packed;               // the caller's rows

  int64_t count_at(int64_t t) const { return count ? count[t] : B; }
  int64_t offset_at(int64_t t) const { return offset ? offset[t] : t * B; }
  int64_t batch_row_at(int64_t r) const { return batch_row ? batch_row[r] : r; }
  // The caller's row that is step t of sorted row r.
  int64_t row_at(int64_t t, int64_t r) const { return (packed ? offset_at(t) : t * B) + batch_row_at(r); }
  bool fresh_at(int64_t t, int64_t r) const { return fresh && fresh[offset_at(t) + r]; }

  // The step before t in a direction's order; -1 or T before its first.
  static int64_t step_before(bool reverse, int64_t t) { return reverse ? t + 1 : t - 1; }
  // Where the state that enters step t of sorted row r comes from: the caller's row of the previous step, or
  // one of these two.
  static constexpr int64_t kInitialState = -1, kZeroState = -2;
  int64_t previous_row(bool reverse, int64_t t, int64_t r) const {
    if (fresh_at(t, r)) return kZeroState;
    const int64_t before = step_before(reverse, t);
    return before >= 0 && before < T && r < count_at(before) ? row_at(before, r) : kInitialState;
  }
};

// The number of rows of a row's own step, in the mean over all rows: above N / T where rows end one by one.
inline double mean_active_rows(const Rows& rows) {
  if (!rows.count) return rows.B;
  double sum = 0;
  for (int64_t t = 0; t < rows.T; ++t) sum += double(rows.count[t]) * rows.count[t];
  return sum / std::max<int64_t>(1, rows.N);
}

// A mask [T, B, n] of one direction by the caller's steps and rows, of flags or numbers with strides of 0
// where it repeats; or none.
template <class R>
struct RowMask {
  const uint8_t* flags = nullptr;
  const R* numbers = nullptr;
  int64_t step_stride = 0, row_stride = 0;

  explicit operator bool() const { return flags || numbers; }
};
template <class R>
struct RowMasks {
  RowMask<R> recurrent;             // n = P: what h is multiplied by where it enters the step's product
  RowMask<R> zoneout_h, zoneout_c;  // n = P, H: the share of the state before the step in that after it
  explicit operator bool() const { return recurrent || zoneout_h || zoneout_c; }
};

// Layer normalization of a direction (cpu/norm.h); null without. The biases of W_ih x and W_hh h are added
// with those of the gates: ForwardArgs::bias.
template <class R>
struct NormWeights {
  const R* gain_ih = nullptr;                    // [4H]
  const R* gain_hh = nullptr;                    // [4H]
  const R *gain_c = nullptr, *bias_c = nullptr;  // [H]
};

// A weight of forward, [4H, K] but for weight_hr, and how its kernel reads it. S is the type of panels.
template <class T, class S = Real<T>>
struct GateWeight {
  const T* stored = nullptr;  // as torch.nn.LSTM stores it
  S* packed = nullptr;        // by pack_forward, with layer normalization by pack_columns, if prepacked
  WeightMode mode = WeightMode::prepacked;
};

template <class T, class S = Real<T>>
struct ForwardArgs {
  Rows rows;
  int64_t I, H, P;
  bool reverse;
  const Real<T>* x;         // [N, I]
  T* gates;                 // [N, 4H]  out: the activated gates as they are saved, or null
  const Real<T>* bias;      // [4H]  bias_ih + bias_hh
  GateWeight<T, S> ih, hh;  // K = I, K = P
  GateWeight<T, S> hr;      // weight_hr [P, H], packed by pack_columns as [H, P]; without projection none
  Real<T>* hidden;          // [B, H]  with projection, h before it; sorted rows
  // [B, P]  state as rounded to T and masked for the step that reads it, sorted rows; step s of the order
  // reads h[s % 2], writes h[(s + 1) % 2]
  Real<T>* h[2];
  const Real<T>* c0;  // [B, H]  c that enters the first step, sorted; rows that begin later find it in `c`
  Real<T>* c;         // [B, H]     state
  T* y;               // out, the caller's row at y + row * y_stride
  T* cells;           // out, the caller's row at cells + row * cells_stride, or null
  int64_t y_stride, cells_stride;
  Real<T>* scratch;  // per member, forward_scratch(N, I, H, P) elements
  RowMasks<Real<T>> masks = {};
  const Real<T>* h0 = nullptr;  // [B, P]  h that enters the first step, sorted; with a zoneout of h only
  NormWeights<Real<T>> norm = {};
  T *saved_ih = nullptr,
    *saved_hh = nullptr;  // [N, 4H]  out: W_ih x and W_hh h before normalization, or null
};

template <class T, class S = Real<T>>
struct BackwardArgs {
  Rows rows;
  int64_t H, P;
  bool reverse;
  int64_t first, steps;  // which steps of the direction's own order this call runs, last to first
  int64_t base;          // packed row that row 0 of dgates, dr and hidden is
  const T* gates;        // [N, 4H]  activated, as forward saved them
  const T* cells;        // c of the caller's rows, as forward stored it
  const Real<T>* c0;     // [B, H] sorted rows
  const T* dy;           // the caller's rows, or null
  const T* dcells;       // the caller's rows, or null
  int64_t cells_stride, dy_stride, dcells_stride;
  const T* w_hh;     // [4H, P]
  S* packed;         // pack_columns of w_hh, or null: run from w_hh itself
  const S* w_hr;     // pack_columns of weight_hr [P, H], or null without projection
  Real<T>* dgates;   // [., 4H]  out for these steps, gradients of the pre-activations; with layer
                     // normalization of W_ih x
  Real<T>* dr;       // [., P]   with projection, out for these steps: gradients of h in full
  Real<T>* hidden;   // [., H]   with projection, out for these steps: h before it; or null
  Real<T>* dh;       // [B, padded P]  in: of h_n, out: of h0; sorted rows
  Real<T>* dc;       // [B, H]         in: of c_n, out: of c0
  Real<T>* scratch;  // per member, backward_scratch(H, P) elements
  RowMasks<Real<T>> masks = {};
  Real<T>* kept_h = nullptr;  // [B, padded P]  what a zoneout of h adds to the gradient of the state before
  NormWeights<Real<T>> norm = {};
  const T *saved_ih = nullptr, *saved_hh = nullptr;  // [N, 4H]  as forward saved them
  Real<T>* dhh = nullptr;                            // [., 4H]  out, gradients of W_hh h, as dgates
  // Per member, norm_sums(H) elements: sums over its rows of the terms of NormTerms (cell.h), to which this
  // call adds.
  Real<T>* norm_sums = nullptr;
};

// A barrier for threads that all run: spins briefly, since a step lasts microseconds, then yields.
class Barrier {
 public:
  explicit Barrier(int members) : members_(members) {}
  void wait() {
    const int phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int spins = 0; phase_.load(std::memory_order_acquire) == phase; ++spins) {
      if (spins < kBarrierYieldMinPolls) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }
  }

 private:
  const int members_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> phase_{0};
};

// One thread's part of a direction: sorted rows [row_begin, row_end) and units [unit_begin, unit_end).
// Members of the same rows split the units and the features of h, and meet at the barrier in every step, with
// projection twice; otherwise barrier is null.
struct Member {
  int64_t row_begin, row_end;
  int64_t unit_begin, unit_end;  // multiples of unit_block, or H at the end
  int64_t feature_begin,
      feature_end;  // multiples of unit_block, or P at the end; without projection the units
  int index;        // which scratch is mine
  Barrier* barrier;
};

// C [m, n] (+)= A [m, k] B [k, n], row-major with strides; A is given as A^T [k, m] if transposed_a.
template <class T, class B = T>
struct Product {
  int64_t m, n, k;
  const T* a;
  int64_t lda;
  bool transposed_a;
  const B* b;
  int64_t ldb;
  bool add;
  T* c;
  int64_t ldc;
  T* scratch;
};

// One ISA's kernels for numbers stored as T = float, double or Bf16 and panels of S.
template <class T, class S = Real<T>>
struct Kernels {
  int64_t width;       // elements of a vector
  int64_t unit_block;  // units are split among members in multiples of this
  // Units [begin, end) of a weight [4H, K] into panels: forward_packed_size(H, K) elements for all.
  int64_t (*forward_packed_size)(int64_t H, int64_t K);
  void (*pack_forward)(const T* weight, int64_t H, int64_t K, int64_t begin, int64_t end, S* packed);
  // Columns [begin, end) of B [K, N] with row and column strides into panels: columns_packed_size(K, N)
  // elements for all. begin is a multiple of unit_block here, and of width in pack_forward.
  int64_t (*columns_packed_size)(int64_t K, int64_t N);
  void (*pack_columns)(const T* b, int64_t K, int64_t row_stride, int64_t column_stride, int64_t begin,
                       int64_t end, S* packed);
  int64_t (*padded_columns)(int64_t N);
  int64_t (*forward_scratch)(int64_t N, int64_t I, int64_t H, int64_t P);
  int64_t (*backward_scratch)(int64_t H, int64_t P);
  void (*forward)(const ForwardArgs<T, S>&, const Member&);
  void (*backward)(const BackwardArgs<T, S>&, const Member&);
  // The same with layer normalization, of members that own whole rows.
  int64_t (*norm_forward_scratch)(int64_t N, int64_t I, int64_t H, int64_t P);
  int64_t (*norm_backward_scratch)(int64_t H, int64_t P);
  int64_t (*norm_sums)(int64_t H);
  void (*norm_forward)(const ForwardArgs<T, S>&, const Member&);
  void (*norm_backward)(const BackwardArgs<T, S>&, const Member&);
  // A row v [n] normalized, in place.
  void (*normalize)(Real<T>* v, int64_t n, const Real<T>* gain, const Real<T>* bias);
  // On this thread, for products too small to be worth a BLAS call. scratch holds small_product_scratch(k)
  // elements.
  void (*small_product)(const Product<Real<T>, T>&);
  int64_t (*small_product_scratch)(int64_t k);
  // out[j] = sum over the N rows of x[.][j], for columns [begin, end) of x [N, columns].
  void (*column_sums)(const Real<T>* x, int64_t N, int64_t columns, int64_t begin, int64_t end, Real<T>* out);
  // Rounds n numbers.
  void (*round)(const Real<T>* x, int64_t n, T* y);
  void (*sigmoid)(const T* x, T* y, int64_t n);
  void (*tanh)(const T* x, T* y, int64_t n);
};

// The types T, S that the kernels are compiled for.
#define FASTLSTM_FOR_EACH_BF16_KERNELS(f) f(Bf16, float) f(Bf16, PanelBf16)
#define FASTLSTM_FOR_EACH_KERNELS(f) \
  f(float, float) f(double, double) f(float, PanelBf16) FASTLSTM_FOR_EACH_BF16_KERNELS(f)

// Columns from gate to gate of the packed unit block at u0, of vectors of W: those of the last block lie side
// by side where they fit fewer than four vectors (cpu/pack_forward.h).
inline int64_t gate_gap(int64_t H, int64_t u0, int64_t W) { return H - u0 <= 3 * W / 4 ? H - u0 : W; }

// Returns true on an AMD CPU with AVX2 and without AVX-512, whatever ATEN_CPU_CAPABILITY allows.
bool is_amd_with_avx2();
// Of one core's L2 cache; 1 MiB where the system does not tell.
int64_t l2_bytes();
// Returns true if odd steps should sweep the weight blocks in reverse order. bytes: weights that a thread
// reads in each step; where its L2 does not hold them all, it still holds the blocks read last.
inline bool alternate_block_order(double bytes) { return !stays_in_l2(bytes, l2_bytes()); }

// The best ISA that this CPU has and ATEN_CPU_CAPABILITY ("default", "avx2", "avx512") allows.
const char* isa_name();
const char* bfloat16_isa_name();  // "amx" or "avx512_bf16" (cpu/bf16.h), or isa_name()
template <class T, class S = Real<T>>
const Kernels<T, S>& kernels();

}  // namespace fastlstm
