// A matrix that stays in a block, in registers and shared memory, and its product with a state that all
// blocks of the group made; and how the elements of a slice are dealt to threads.
#pragma once

#include "cuda/persistent.h"
#include "cuda/warp.cuh"

namespace fastlstm::cuda {

static_assert(kWarps == kPlanWarps, "the planner and the kernels must agree on the size of a block");

// Elements of T in 64 bytes, a chunk's share of one row.
template <class T>
constexpr int kChunkOf = kChunkBytesOfK / static_cast<int>(sizeof(T));

// Index of element k of row n in a slice's state, stored in the order the lanes load it: [columns, chunks, 8
// rows, 64 bytes].
template <class T>
FASTLSTM_DEVICE int state_offset(int chunks, int n, int k) {
  constexpr int E = kChunkOf<T>;
  return ((n / 8 * chunks + k / E) * 8 + n % 8) * E + k % E;
}

FASTLSTM_DEVICE uint4 operand(uint4 x, float) {
  return {to_tf32(x.x), to_tf32(x.y), to_tf32(x.z), to_tf32(x.w)};
}
template <class T>
FASTLSTM_DEVICE uint4 operand(uint4 x, T) {
  return x;
}

// The block's part of W_hh as the operand A: fragments of 16 rows and 64 bytes of K. In each of its rounds a
// warp multiplies WIDTH of them; those of its first HELD rounds are in its registers.
template <int WIDTH, int HELD>
class Resident {
 public:
  // packed: [members, rounds, kWarps, WIDTH, 2, 32]. The rounds that are not held go to the block's shared
  // memory, from word `at` on: [rounds - HELD, kWarps, WIDTH, 2, 32].
  FASTLSTM_DEVICE Resident(const Warp& warp, const uint4* packed, int64_t member, int rounds, int at)
      : rounds_(rounds), at_(at) {
    const uint4* const own = packed + (member * rounds * kWarps + warp.index()) * kWords;
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
#pragma unroll
        for (int r = 0; r < 2 * WIDTH; ++r) {
          held[i][r][lane] = i < rounds ? own[i * kWarps * kWords + r * 32 + lane] : uint4{};
        }
      }
#pragma unroll 1
      for (int i = HELD; i < rounds; ++i) {
#pragma unroll 1
        for (int r = 0; r < 2 * WIDTH; ++r) {
          // A lane reads only what it wrote itself, so no barrier is needed.
          rest(warp, i)[r * 32 + lane] = own[i * kWarps * kWords + r * 32 + lane];
        }
      }
    }
  }

  FASTLSTM_DEVICE int rounds() const { return rounds_; }
  // The first word of shared memory behind.
  FASTLSTM_DEVICE int end() const { return at_ + (rounds_ > HELD ? rounds_ - HELD : 0) * kWarps * kWords; }

  // The halves first ... last - 1 of the fragments of a round that is not held.
  FASTLSTM_DEVICE void load(const Warp& warp, int i, int first, int last, PerLane<uint4>* a) const {
    const uint4* const own = rest(warp, i);
#pragma unroll
    for (int r = first; r < last; ++r) {
      for (const int lane : warp.lanes()) a[r - first][lane] = own[r * 32 + lane];
    }
  }

  PerLane<uint4> held[HELD][2 * WIDTH];  // [.][2 r] the fragment's upper eight rows, [2 r + 1] the lower

 private:
  static constexpr int kWords = WIDTH * 2 * 32;  // of a warp's round

  FASTLSTM_DEVICE uint4* rest(const Warp& warp, int i) const {
    return warp.shared() + at_ + ((i - HELD) * kWarps + warp.index()) * kWords;
  }

  int rounds_, at_;
};

// A [kRows, K] times a whole state [K, 8 * COLUMNS]. The warps cut K into PARTS and the rows among the warps
// of a part, TILES of 16 to each; a warp's round is 64 bytes of K. LOAD reads a word of the state. TIGHT:
// the kernel has no registers to spare.
template <class T, int TILES, int HELD, int COLUMNS, int PARTS, bool TIGHT, uint4 (*LOAD)(const uint4*)>
class Gathered {
 public:
  static constexpr int kRows = 16 * TILES * kWarps / PARTS, kColumns = 8 * COLUMNS;
  // Stored with stride kRows + 4, a warp's accumulators and a warp's reads each fall in banks of their own.
  static constexpr int kStride = kRows + 4;

  // Shared memory from word `at` on: Resident's, then the warps' products, [PARTS, kColumns, kStride].
  FASTLSTM_DEVICE Gathered(const Warp& warp, const uint4* packed, int64_t member, int rounds, int at)
      : a_(warp, packed, member, rounds, at) {
    for (const int lane : warp.lanes()) {
      own_[lane] = keep(4 * a_.end() + (warp.index() % PARTS * kColumns + lane % 4 * 2) * kStride +
                        warp.index() / PARTS * 16 * TILES + lane / 4);
    }
  }

  // The chunks of a whole state's row.
  FASTLSTM_DEVICE int chunks() const { return PARTS * a_.rounds(); }

  // Index, within a state, of the first word that a lane loads for 8 columns; the others follow at 32 words.
  FASTLSTM_DEVICE int first_word(const Warp& warp, int lane, int column) const {
    return (column * PARTS + warp.index() % PARTS) * a_.rounds() * 32 + lane;
  }

  // The warp's share of A times a state, into its part of the sums; sum() after a block_sync. from: the
  // lanes' first words of the state.
  FASTLSTM_DEVICE void multiply(const Warp& warp, const PerLane<const uint4*> (&from)[COLUMNS]) {
    PerLane<float4> acc[TILES][COLUMNS];
    PerLane<uint4> b[kAhead][COLUMNS];
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) acc[r][c][lane] = {0, 0, 0, 0};
      }
    }
    if (a_.rounds() >= kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) load(warp, from, k, b[k]);
    } else {
#pragma unroll
      for (int k = 0; k < kAhead - 1; ++k) fetch(warp, from, k, k, b[k]);
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      if (i < a_.rounds()) take(warp, a_.held[i], b[i % kAhead], acc);
      fetch(warp, from, i + kAhead, i + kAhead, b[i % kAhead]);
    }
    PerLane<const uint4*> later[COLUMNS];  // those of the rounds first + kAhead and on
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) later[c][lane] = from[c][lane] + (HELD + kAhead) * 32;
    }
#pragma unroll 1
    for (int first = HELD; first < a_.rounds(); first += kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = first + k;
        if (i < a_.rounds()) {
          PerLane<uint4> a[2 * TILES];
          a_.load(warp, i, 0, 2 * TILES, a);
          take(warp, a, b[(HELD + k) % kAhead], acc);
          fetch(warp, later, i + kAhead, k, b[(HELD + k) % kAhead]);
        }
      }
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) later[c][lane] += kAhead * 32;
      }
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) {
          float* const to = floats(warp) + own_[lane] + 8 * c * kStride + 16 * r;
          const float4 x = acc[r][c][lane];
          to[0] = x.x, to[kStride] = x.y, to[8] = x.z, to[kStride + 8] = x.w;
        }
      }
    }
  }

  // Where sum() finds element (row, column) of the product; those of further rows follow.
  FASTLSTM_DEVICE int sum_at(int row, int column) const { return 4 * a_.end() + column * kStride + row; }
  // The warps' shares, always added in the same order: pairwise, for the fewest additions that wait for
  // another.
  FASTLSTM_DEVICE float sum(const Warp& warp, int at) const {
    const float* const own = floats(warp) + at;
    return add<PARTS>([&](int part) { return own[part * kColumns * kStride]; });
  }
  // Those of four rows, the first a multiple of four: one load of 16 bytes a share.
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int at) const {
    const float4* const own = reinterpret_cast<const float4*>(floats(warp) + at);
    return add<PARTS>([&](int part) { return own[part * (kColumns * kStride / 4)]; });
  }

 private:
  // Chunks of the state on their way at once. Eight warps then have 16 KiB in flight, which is about the
  // bandwidth of an SM's path to L2 times its latency; more of them make ptxas spill, in TF32 sooner.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  static constexpr bool kTight = TIGHT;
#else
  static constexpr bool kTight = true;
#endif
  static constexpr bool kWideTf32 = sizeof(T) == 4 && TILES == 8;
  static constexpr int kAhead = !kWideTf32 ? 4 / COLUMNS : COLUMNS == 2 ? 1 : kTight ? 2 : 4;

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

  // Round i of the warp's K, which is `ahead` rounds from where `from` points.
  FASTLSTM_DEVICE void fetch(const Warp& warp, const PerLane<const uint4*> (&from)[COLUMNS], int i, int ahead,
                             PerLane<uint4> (&b)[COLUMNS]) const {
    if (i < a_.rounds()) load(warp, from, ahead, b);
  }
  FASTLSTM_DEVICE static void load(const Warp& warp, const PerLane<const uint4*> (&from)[COLUMNS], int ahead,
                                   PerLane<uint4> (&b)[COLUMNS]) {
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) b[c][lane] = LOAD(from[c][lane] + ahead * 32);
    }
  }

  FASTLSTM_DEVICE static void take(const Warp& warp, const PerLane<uint4> (&a)[2 * TILES],
                                   const PerLane<uint4> (&fetched)[COLUMNS],
                                   PerLane<float4> (&acc)[TILES][COLUMNS]) {
    PerLane<uint4> b[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) b[c][lane] = operand(fetched[c][lane], T());
    }
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) multiply_chunk<T>(acc[r][c], a[2 * r], a[2 * r + 1], b[c]);
    }
  }

  Resident<TILES, HELD> a_;
  PerLane<int> own_;  // where the lane's accumulators go
};

// Which part of the layer a block has.
struct Member {
  int d, group, index;
  FASTLSTM_DEVICE Member(const Layout& p, const Warp& warp) {
    const int per_direction = p.groups * p.members;
    d = warp.block() / per_direction;
    group = warp.block() % per_direction / p.members;
    index = warp.block() % p.members;
  }
  FASTLSTM_DEVICE int64_t of_all(const Layout& p) const { return int64_t{d} * p.members + index; }
};

// So many steps ahead a block begins to fetch what its steps read of memory, which takes about one of them.
constexpr int kStepsAhead = 3;

// Elements from that of unit u to that of unit u + k * UNITS in a row of a state, for u < UNITS: a constant,
// where chunks and UNITS divide one another.
template <class T, int UNITS, int K>
constexpr int kGateOffset = K * UNITS / kChunkOf<T> * 8 * kChunkOf<T> + K * UNITS % kChunkOf<T>;

// Lines of 128 bytes that a row of a block's units takes in a matrix of X.
template <class X, int UNITS>
constexpr int kLines =
    UNITS * static_cast<int>(sizeof(X)) > 128 ? UNITS * static_cast<int>(sizeof(X)) / 128 : 1;

// An element (unit, row) of a slice.
struct Element {
  int unit, row;  // in the slice
  int j, b;       // in the layer; a launch has no 2^31 rows, nor W_hh 2^31 units
  bool exists;

  FASTLSTM_DEVICE Element(int unit, int row, int units, int rows, int member, int slice, int64_t H, int64_t B)
      : unit(unit),
        row(row),
        j(member * units + unit),
        b(slice * rows + row),
        exists(row < rows && j < H && b < B) {}
};

// Which elements of a slice a thread has, always the same ones: neighbouring units to neighbouring lanes.
template <int UNITS, int ROWS>
struct Deal {
  static constexpr int kElements = (UNITS * ROWS + kWarps * 32 - 1) / (kWarps * 32);  // of a thread

  // Its element q.
  static FASTLSTM_DEVICE Element element(const Warp& warp, int lane, int q, int member, int slice, int64_t H,
                                         int64_t B) {
    const unsigned e = static_cast<unsigned>((q * kWarps + warp.index()) * 32 + lane);
    return {static_cast<int>(e % UNITS), static_cast<int>(e / UNITS), UNITS, ROWS, member, slice, H, B};
  }
};

}  // namespace fastlstm::cuda
