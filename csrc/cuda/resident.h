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

// Element k of row n of a slice's state, which lies as the lanes load it: [columns, chunks, 8 rows, 64
// bytes].
template <class T>
FASTLSTM_DEVICE T* state_element(uint4* state, int chunks, int n, int k) {
  constexpr int E = kChunkOf<T>;
  return reinterpret_cast<T*>(state) + ((n / 8 * chunks + k / E) * 8 + n % 8) * E + k % E;
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
// of a part, TILES of 16 to each; a warp's round is 64 bytes of K. LOAD reads a word of the state.
template <class T, int TILES, int HELD, int COLUMNS, int PARTS, uint4 (*LOAD)(const uint4*)>
class Gathered {
 public:
  static constexpr int kRows = 16 * TILES * kWarps / PARTS, kColumns = 8 * COLUMNS;
  // Stored with stride kRows + 4, a warp's accumulators and a warp's reads each fall in banks of their own.
  static constexpr int kStride = kRows + 4;

  // Shared memory from word `at` on: Resident's, then the warps' products, [PARTS, kColumns, kStride].
  FASTLSTM_DEVICE Gathered(const Warp& warp, const uint4* packed, int64_t member, int rounds, int at)
      : a_(warp, packed, member, rounds, at) {}

  // The chunks of a whole state's row.
  FASTLSTM_DEVICE int chunks() const { return PARTS * a_.rounds(); }

  // The warp's share of A times `state`, into its part of the sums; sum() after a block_sync.
  FASTLSTM_DEVICE void multiply(const Warp& warp, const uint4* state) {
    PerLane<float4> acc[TILES][COLUMNS];
    PerLane<uint4> b[kAhead][COLUMNS];
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) acc[r][c][lane] = {0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) fetch(warp, state, k, b[k]);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      if (i < a_.rounds()) take(warp, a_.held[i], b[i % kAhead], acc);
      fetch(warp, state, i + kAhead, b[i % kAhead]);
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
          fetch(warp, state, i + kAhead, b[(HELD + k) % kAhead]);
        }
      }
    }
    float* const own =
        sums(warp) + warp.index() % PARTS * kColumns * kStride + warp.index() / PARTS * 16 * TILES;
#pragma unroll
    for (int r = 0; r < TILES; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) {
          float* const to = own + (8 * c + lane % 4 * 2) * kStride + 16 * r + lane / 4;
          const float4 x = acc[r][c][lane];
          to[0] = x.x, to[kStride] = x.y, to[8] = x.z, to[kStride + 8] = x.w;
        }
      }
    }
  }

  // Element (row, column) of the product: the warps' shares, always added in the same order.
  FASTLSTM_DEVICE float sum(const Warp& warp, int row, int column) const {
    const float* const at = sums(warp) + column * kStride + row;
    float total = at[0];
#pragma unroll
    for (int part = 1; part < PARTS; ++part) total += at[part * kColumns * kStride];
    return total;
  }

 private:
  // Chunks of the state on their way at once. Eight warps then have 16 KiB in flight, which is about the
  // bandwidth of an SM's path to L2 times its latency; more of them make ptxas spill.
  static constexpr int kAhead = sizeof(T) == 4 && TILES * COLUMNS == 16 ? 1 : 4 / COLUMNS;

  FASTLSTM_DEVICE float* sums(const Warp& warp) const {
    return reinterpret_cast<float*>(warp.shared() + a_.end());
  }

  FASTLSTM_DEVICE void fetch(const Warp& warp, const uint4* state, int i,
                             PerLane<uint4> (&b)[COLUMNS]) const {
    if (i >= a_.rounds()) return;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) {
        const int64_t part = c * PARTS + warp.index() % PARTS;
        b[c][lane] = LOAD(state + (part * a_.rounds() + i) * 32 + lane);
      }
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

// The elements (unit, row) of a slice, dealt to the block's threads: always the same ones to the same thread.
struct Element {
  int unit, row;  // in the slice
  int j, b;       // in the layer; a launch has no 2^31 rows, nor W_hh 2^31 units
  bool exists;

  template <int UNITS, int ROWS>
  static FASTLSTM_DEVICE Element of(const Warp& warp, int lane, int q, int member, int slice, int64_t H,
                                    int64_t B) {
    const int e = (q * kWarps + warp.index()) * 32 + lane;
    Element x = {e % UNITS, e / UNITS};
    x.j = member * UNITS + x.unit, x.b = slice * ROWS + x.row;
    x.exists = x.row < ROWS && x.j < H && x.b < B;
    return x;
  }
};

}  // namespace fastlstm::cuda
