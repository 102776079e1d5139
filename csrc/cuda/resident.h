// W_hh in a CTA's registers and shared memory, its GEMM with a state of the whole group, and the mapping of a
// batch tile's elements to threads.
#pragma once

#include "cuda/exchange.h"
#include "cuda/persistent.h"

namespace fastlstm::cuda {

// Elements of T in a row of a K slice.
template <class T>
constexpr int kKSliceElements = kKSliceBytes / static_cast<int>(sizeof(T));

// Index of element k of row n in a batch tile's state, [n tiles, K slices, 8 rows, 64 bytes]: the order in
// which the lanes load it.
template <class T>
FASTLSTM_DEVICE int state_offset(int k_slices, int n, int k) {
  constexpr int E = kKSliceElements<T>;
  return ((n / 8 * k_slices + k / E) * 8 + n % 8) * E + k % E;
}

// How a StateGemm loads the words of a state that its caller has waited for.
struct LoadL2 {
  static constexpr bool kPolls = false;
  FASTLSTM_DEVICE static uint4 load(const uint4* p) { return load_l2(p); }
};
struct LoadShared {
  static constexpr bool kPolls = false;
  FASTLSTM_DEVICE static uint4 load(const uint4* p) { return *p; }
};

FASTLSTM_DEVICE uint4 operand(uint4 x, float) {
  return {to_tf32(x.x), to_tf32(x.y), to_tf32(x.z), to_tf32(x.w)};
}
template <class T>
FASTLSTM_DEVICE uint4 operand(uint4 x, T) {
  return x;
}

// The CTA's part of W_hh as operand A, in fragments of 16 rows and 64 bytes of K. A warp multiplies M_TILES
// fragments per iteration; those of its first REGISTER_ITERS iterations are in registers, the others in
// shared memory.
template <int M_TILES, int REGISTER_ITERS>
class ResidentWeights {
 public:
  // packed_weights: [CTAs, iters, kWarps, M_TILES, 2, 32]. In shared memory, from word `shared_begin` on:
  // [iters - REGISTER_ITERS, kWarps, M_TILES, 2, 32].
  FASTLSTM_DEVICE ResidentWeights(const Warp& warp, const uint4* packed_weights, int64_t cta, int iters,
                                  int shared_begin)
      : iters_(iters), shared_begin_(shared_begin) {
    const uint4* const source = packed_weights + (cta * iters * kWarps + warp.index()) * kWarpWords;
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int i = 0; i < REGISTER_ITERS; ++i) {
#pragma unroll
        for (int r = 0; r < 2 * M_TILES; ++r) {
          fragments[i][r][lane] = i < iters ? source[i * kWarps * kWarpWords + r * 32 + lane] : uint4{};
        }
      }
#pragma unroll 1
      for (int i = REGISTER_ITERS; i < iters; ++i) {
#pragma unroll 1
        for (int r = 0; r < 2 * M_TILES; ++r) {
          // A lane reads only what it wrote, so no barrier is needed.
          shared_fragments(warp, i)[r * 32 + lane] = source[i * kWarps * kWarpWords + r * 32 + lane];
        }
      }
    }
  }

  FASTLSTM_DEVICE int iters() const { return iters_; }
  // The first word of shared memory after the fragments.
  FASTLSTM_DEVICE int end() const {
    return shared_begin_ + (iters_ > REGISTER_ITERS ? iters_ - REGISTER_ITERS : 0) * kWarps * kWarpWords;
  }

  // Loads halves first ... last - 1 of the fragments of an iteration in shared memory.
  FASTLSTM_DEVICE void load(const Warp& warp, int i, int first, int last, PerLane<uint4>* a) const {
    const uint4* const source = shared_fragments(warp, i);
#pragma unroll
    for (int r = first; r < last; ++r) {
      for (const int lane : warp.lanes()) a[r - first][lane] = source[r * 32 + lane];
    }
  }

  PerLane<uint4> fragments[REGISTER_ITERS][2 * M_TILES];  // [.][2 r]: rows 0 to 7, [2 r + 1]: rows 8 to 15

 private:
  static constexpr int kWarpWords = M_TILES * 2 * 32;  // of a warp and iteration

  FASTLSTM_DEVICE uint4* shared_fragments(const Warp& warp, int i) const {
    return warp.shared() + shared_begin_ + ((i - REGISTER_ITERS) * kWarps + warp.index()) * kWarpWords;
  }

  int iters_, shared_begin_;
};

// A [kRows, K] times a state [K, 8 * N_TILES]. Split-K: the warps divide K into SPLIT_K parts; the warps of a
// part divide the rows, M_TILES m tiles each. A warp's iteration is one K slice.
// FEW_REGISTERS: the kernel has no registers for more loads in flight. POLLS: used with PollWords.
template <class T, int M_TILES, int REGISTER_ITERS, int N_TILES, int SPLIT_K, bool FEW_REGISTERS,
          bool POLLS = false>
class StateGemm {
 public:
  static constexpr int kRows = 16 * M_TILES * kWarps / SPLIT_K, kSumColumns = 8 * N_TILES;
  // With a stride of kRows + 4 neither a warp's stores of accumulators nor its reads have bank conflicts.
  static constexpr int kSumStride = kRows + 4;

  // Shared memory from word `shared_begin` on: fragments, then partial sums [SPLIT_K, kSumColumns,
  // kSumStride].
  FASTLSTM_DEVICE StateGemm(const Warp& warp, const uint4* packed_weights, int64_t cta, int iters,
                            int shared_begin)
      : a_(warp, packed_weights, cta, iters, shared_begin) {
    for (const int lane : warp.lanes()) {
      acc_offset_[lane] =
          keep_in_register(4 * a_.end() + (warp.index() % SPLIT_K * kSumColumns + lane % 4 * 2) * kSumStride +
                           warp.index() / SPLIT_K * 16 * M_TILES + lane / 4);
    }
  }

  // K slices of a state.
  FASTLSTM_DEVICE int k_slices() const { return SPLIT_K * a_.iters(); }

  // Index, within a state, of the lane's first word of an n tile; the next ones follow at a stride of 32
  // words.
  FASTLSTM_DEVICE int first_word(const Warp& warp, int lane, int n_tile) const {
    return (n_tile * SPLIT_K + warp.index() % SPLIT_K) * a_.iters() * 32 + lane;
  }

  // Multiplies the warp's share of A by a state and stores the partial sums; call sum() after a block_sync.
  // from: the lanes' first words of the state. Loader: LoadL2, LoadShared, or PollWords (group_data_flag.h),
  // which loads words that may not be there yet.
  template <class Loader>
  FASTLSTM_DEVICE void multiply(const Warp& warp, const PerLane<const uint4*> (&from)[N_TILES],
                                const Loader& loader) {
    PerLane<uint4> b[kLoadsInFlight][N_TILES];
    if (a_.iters() >= kLoadsInFlight) {
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) load(warp, loader, from, k, b[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kLoadsInFlight - 1; ++k) fetch(warp, loader, from, k, k, b[k]);
    }
    if constexpr (Loader::kPolls) poll_first(warp, loader, from, b);
    PerLane<float4> acc[M_TILES][N_TILES];
#pragma unroll
    for (int r = 0; r < M_TILES; ++r) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        for (const int lane : warp.lanes()) acc[r][c][lane] = {0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int i = 0; i < REGISTER_ITERS; ++i) {
      if constexpr (Loader::kPolls) {
        if (i >= kLoadsInFlight && i < a_.iters()) poll(warp, loader, from, i, b[i % kLoadsInFlight]);
      }
      if (i < a_.iters()) mma_iter(warp, a_.fragments[i], b[i % kLoadsInFlight], acc);
      fetch(warp, loader, from, i + kLoadsInFlight, i + kLoadsInFlight, b[i % kLoadsInFlight]);
    }
    PerLane<const uint4*> later[N_TILES];  // words of iteration first + kLoadsInFlight
#pragma unroll
    for (int c = 0; c < N_TILES; ++c) {
      for (const int lane : warp.lanes())
        later[c][lane] = from[c][lane] + (REGISTER_ITERS + kLoadsInFlight) * 32;
    }
#pragma unroll 1
    for (int first = REGISTER_ITERS; first < a_.iters(); first += kLoadsInFlight) {
#pragma unroll
      for (int k = 0; k < kLoadsInFlight; ++k) {
        const int i = first + k;
        if (i < a_.iters()) {
          if constexpr (Loader::kPolls) {
            poll(warp, loader, later, k - kLoadsInFlight, b[(REGISTER_ITERS + k) % kLoadsInFlight]);
          }
          PerLane<uint4> a[2 * M_TILES];
          a_.load(warp, i, 0, 2 * M_TILES, a);
          mma_iter(warp, a, b[(REGISTER_ITERS + k) % kLoadsInFlight], acc);
          fetch(warp, loader, later, i + kLoadsInFlight, k, b[(REGISTER_ITERS + k) % kLoadsInFlight]);
        }
      }
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        for (const int lane : warp.lanes()) later[c][lane] += kLoadsInFlight * 32;
      }
    }
#pragma unroll
    for (int r = 0; r < M_TILES; ++r) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        for (const int lane : warp.lanes()) {
          float* const to = floats(warp) + acc_offset_[lane] + 8 * c * kSumStride + 16 * r;
          const float4 x = acc[r][c][lane];
          to[0] = x.x, to[kSumStride] = x.y, to[8] = x.z, to[kSumStride + 8] = x.w;
        }
      }
    }
  }

  // Offset of element (row, column) for sum(); further rows are contiguous.
  FASTLSTM_DEVICE int sum_offset(int row, int column) const {
    return 4 * a_.end() + column * kSumStride + row;
  }
  // Adds the partial sums in a fixed order, pairwise for a short dependency chain.
  FASTLSTM_DEVICE float sum(const Warp& warp, int offset) const {
    const float* const sums = floats(warp) + offset;
    return add<SPLIT_K>([&](int part) { return sums[part * kSumColumns * kSumStride]; });
  }
  // The same for four rows, the first a multiple of four: one 16-byte load per part.
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int offset) const {
    const float4* const sums = reinterpret_cast<const float4*>(floats(warp) + offset);
    return add<SPLIT_K>([&](int part) { return sums[part * (kSumColumns * kSumStride / 4)]; });
  }

 private:
  // K slices per n tile. Eight warps then have 16 KiB in flight, about bandwidth times latency of an SM's
  // path to L2; with more ptxas spills, in TF32 sooner, and on sm_80 with POLLS.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kFewRegisters = FEW_REGISTERS, kFewPolls = false;
#else
  static constexpr bool kFewRegisters = true, kFewPolls = POLLS && M_TILES == 8;
#endif
  static constexpr bool kWideTf32 = sizeof(T) == 4 && M_TILES == 8;
  static constexpr int kLoadsInFlight = !kWideTf32      ? (kFewPolls ? 2 : 4 / N_TILES)
                                        : N_TILES == 2  ? 1
                                        : kFewRegisters ? 2
                                                        : 4;

  FASTLSTM_DEVICE static float* floats(const Warp& warp) { return reinterpret_cast<float*>(warp.shared()); }

  template <int N, class Share>
  FASTLSTM_DEVICE static auto add(Share share, int first = 0) {
    if constexpr (N == 1) {
      return share(first);
    } else {
      return plus(add<N / 2>(share, first), add<N / 2>(share, first + N / 2));
    }
  }
  FASTLSTM_DEVICE static float plus(float a, float b) { return a + b; }
  FASTLSTM_DEVICE static float4 plus(float4 a, float4 b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
  }

  // Loads iteration i of the warp, if it exists; `ahead`: iterations from where `from` points.
  template <class Loader>
  FASTLSTM_DEVICE void fetch(const Warp& warp, const Loader& loader,
                             const PerLane<const uint4*> (&from)[N_TILES], int i, int ahead,
                             PerLane<uint4> (&b)[N_TILES]) const {
    if (i < a_.iters()) load(warp, loader, from, ahead, b);
  }
  template <class Loader>
  FASTLSTM_DEVICE static void load(const Warp& warp, const Loader&,
                                   const PerLane<const uint4*> (&from)[N_TILES], int ahead,
                                   PerLane<uint4> (&b)[N_TILES]) {
#pragma unroll
    for (int c = 0; c < N_TILES; ++c) {
      for (const int lane : warp.lanes()) b[c][lane] = Loader::load(from[c][lane] + ahead * 32);
    }
  }

  // Polls the first iterations' words until all are complete. If a lane lacks one, it loads all of them
  // again, in one round trip.
  template <class Loader>
  FASTLSTM_DEVICE void poll_first(const Warp& warp, const Loader& loader,
                                  const PerLane<const uint4*> (&from)[N_TILES],
                                  PerLane<uint4> (&b)[kLoadsInFlight][N_TILES]) const {
    for (const int lane : warp.lanes()) {
#pragma unroll 1
      for (uint32_t polls = 0;; ++polls) {
        bool complete = true;
#pragma unroll
        for (int k = 0; k < kLoadsInFlight; ++k) {
#pragma unroll
          for (int c = 0; c < N_TILES; ++c) {
            if (k < a_.iters()) complete = complete && is_complete(b[k][c][lane]);
          }
        }
        if (complete) break;
        loader.check(polls);
#pragma unroll
        for (int k = 0; k < kLoadsInFlight; ++k) {
#pragma unroll
          for (int c = 0; c < N_TILES; ++c) {
            if (k < a_.iters()) b[k][c][lane] = Loader::load(from[c][lane] + k * 32);
          }
        }
      }
    }
    warp.sync();  // mma.sync of the whole warp follows
  }
  // The same for the words of one later iteration.
  template <class Loader>
  FASTLSTM_DEVICE static void poll(const Warp& warp, const Loader& loader,
                                   const PerLane<const uint4*> (&from)[N_TILES], int ahead,
                                   PerLane<uint4> (&b)[N_TILES]) {
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
#pragma unroll 1
        for (uint32_t polls = 0; !is_complete(b[c][lane]); ++polls) {
          loader.check(polls);
          b[c][lane] = Loader::load(from[c][lane] + ahead * 32);
        }
      }
    }
    warp.sync();
  }

  FASTLSTM_DEVICE static void mma_iter(const Warp& warp, const PerLane<uint4> (&a)[2 * M_TILES],
                                       const PerLane<uint4> (&loaded)[N_TILES],
                                       PerLane<float4> (&acc)[M_TILES][N_TILES]) {
    PerLane<uint4> b[N_TILES];
#pragma unroll
    for (int c = 0; c < N_TILES; ++c) {
      for (const int lane : warp.lanes()) b[c][lane] = operand(loaded[c][lane], T());
    }
#pragma unroll
    for (int r = 0; r < M_TILES; ++r) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) mma_k_slice<T>(acc[r][c], a[2 * r], a[2 * r + 1], b[c]);
    }
  }

  ResidentWeights<M_TILES, REGISTER_ITERS> a_;
  PerLane<int> acc_offset_;  // of the lane's accumulators in the partial sums
};

// A CTA's part of the layer.
struct CtaCoord {
  int d, group, rank;  // rank: in the group
  FASTLSTM_DEVICE CtaCoord(const Layout& p, const Warp& warp) {
    const int per_direction = p.groups * p.ctas_per_group;
    d = warp.cta() / per_direction;
    group = warp.cta() % per_direction / p.ctas_per_group;
    rank = warp.cta() % p.ctas_per_group;
  }
  FASTLSTM_DEVICE int64_t global_rank(const Layout& p) const { return int64_t{d} * p.ctas_per_group + rank; }
};

// Distance, in a row of a state, from the element of unit u to that of unit u + K * UNITS, for u < UNITS: a
// constant, because UNITS is a multiple or a divisor of kKSliceElements.
template <class T, int UNITS, int K>
constexpr int kGateOffset =
    K * UNITS / kKSliceElements<T> * 8 * kKSliceElements<T> + K * UNITS % kKSliceElements<T>;

// 128-byte cache lines of a row of a CTA's units in a matrix of X.
template <class X, int UNITS>
constexpr int kCacheLines =
    UNITS * static_cast<int>(sizeof(X)) > 128 ? UNITS * static_cast<int>(sizeof(X)) / 128 : 1;

// An element (unit, row) of a batch tile.
struct Element {
  int unit, row;  // in the batch tile
  int j, b;       // in the layer; a launch has fewer than 2^31 rows, and W_hh fewer than 2^31 units
  bool exists;

  FASTLSTM_DEVICE Element(int unit, int row, int units, int rows, int cta_rank, int batch_tile, int64_t H,
                          int64_t B)
      : unit(unit),
        row(row),
        j(cta_rank * units + unit),
        b(batch_tile * rows + row),
        exists(row < rows && j < H && b < B) {}
};

// Maps threads to the elements of a batch tile, the same in every step: adjacent lanes have adjacent units.
template <int UNITS, int ROWS>
struct ElementMap {
  static constexpr int kElements = (UNITS * ROWS + kWarps * 32 - 1) / (kWarps * 32);  // per thread

  // Element q of a thread.
  static FASTLSTM_DEVICE Element element(const Warp& warp, int lane, int q, int cta_rank, int batch_tile,
                                         int64_t H, int64_t B) {
    const unsigned e = static_cast<unsigned>((q * kWarps + warp.index()) * 32 + lane);
    return {
        static_cast<int>(e % UNITS), static_cast<int>(e / UNITS), UNITS, ROWS, cta_rank, batch_tile, H, B};
  }
};

}  // namespace fastlstm::cuda
