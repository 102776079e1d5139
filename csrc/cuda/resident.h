// A matrix that stays in a block, in registers and shared memory, and its product with a state that all
// blocks of the group made: the two halves of a persistent step that depend on how lanes hold matrices.
#pragma once

#include "cuda/exchange.h"
#include "cuda/persistent.h"

namespace fastlstm::cuda {

static_assert(kWarps == kPlanWarps, "the planner and the kernels must agree on the size of a block");

// Elements of T in 64 bytes, a chunk's share of one row.
template <class T>
constexpr int kChunkOf = kChunkBytesOfK / static_cast<int>(sizeof(T));

// Element k of row n of a slice's state, which lies as the lanes load it: [columns, chunks, 8 rows, 64
// bytes].
template <class T>
FASTLSTM_DEVICE T* state_element(uint4* state, int chunks, int n, int64_t k) {
  constexpr int E = kChunkOf<T>;
  return reinterpret_cast<T*>(state) + ((n / 8 * int64_t{chunks} + k / E) * 8 + n % 8) * E + k % E;
}

FASTLSTM_DEVICE uint4 operand(uint4 x, float) {
  return {to_tf32(x.x), to_tf32(x.y), to_tf32(x.z), to_tf32(x.w)};
}
template <class T>
FASTLSTM_DEVICE uint4 operand(uint4 x, T) {
  return x;
}

// A [16 * ROWS, K], K divided among the warps, for products with [K, 8 * COLUMNS]. The first HELD chunks of a
// warp are in its registers.
template <class T, int ROWS, int HELD, int COLUMNS>
class Resident {
 public:
  static constexpr int kRows = 16 * ROWS, kColumns = 8 * COLUMNS;
  // Stored with stride kRows + 4, a warp's accumulators and a warp's reads each fall in banks of their own.
  static constexpr int kStride = kRows + 4;

  // packed: [chunks, kWarps, ROWS, 2, 32], the block's part of W_hh.
  FASTLSTM_DEVICE Resident(const Warp& warp, const uint4* packed, int chunks) : chunks_(chunks) {
    const uint4* const own = packed + warp.index() * kPerWarp;
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int i = 0; i < HELD; ++i) {
#pragma unroll
        for (int r = 0; r < 2 * ROWS; ++r) held_[i][r][lane] = own[i * kWarps * kPerWarp + r * 32 + lane];
      }
#pragma unroll 1
      for (int i = HELD; i < chunks; ++i) {
#pragma unroll 1
        for (int r = 0; r < 2 * ROWS; ++r) {
          // A lane reads only what it wrote itself, so no barrier is needed.
          rest(warp, i)[r * 32 + lane] = own[i * kWarps * kPerWarp + r * 32 + lane];
        }
      }
    }
  }

  // The warp's share of A times `state`, into its part of the sums; sum() after a block_sync.
  FASTLSTM_DEVICE void multiply(const Warp& warp, const uint4* state) {
    PerLane<float4> acc[ROWS][COLUMNS];
    PerLane<uint4> b[kAhead][COLUMNS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) acc[r][c][lane] = {0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int k = 0; k < kAhead; ++k) fetch(warp, state, k, b[k]);
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      take(warp, held_[i], b[i % kAhead], acc);
      fetch(warp, state, i + kAhead, b[i % kAhead]);
    }
#pragma unroll 1
    for (int first = HELD; first < chunks_; first += kAhead) {
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = first + k;
        if (i < chunks_) {
          take_shared(warp, rest(warp, i), b[(HELD + k) % kAhead], acc);
          fetch(warp, state, i + kAhead, b[(HELD + k) % kAhead]);
        }
      }
    }
    float* const own = sums(warp) + warp.index() * kColumns * kStride;
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
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
    for (int w = 1; w < kWarps; ++w) total += at[w * kColumns * kStride];
    return total;
  }

 private:
  static constexpr int kPerWarp = ROWS * 2 * 32;  // words of a chunk
  // Chunks of the state on their way at once. Eight warps then have 16 KiB in flight, which is about the
  // bandwidth of an SM's path to L2 times its latency; more of them make ptxas spill.
  static constexpr int kAhead = sizeof(T) == 4 && ROWS * COLUMNS == 16 ? 1 : 4 / COLUMNS;

  // Shared memory: the chunks that are not held, [chunks - HELD, kWarps, ROWS, 2, 32], of which this is the
  // warp's own part of chunk i; then the warps' products, [kWarps, kColumns, kStride].
  FASTLSTM_DEVICE uint4* rest(const Warp& warp, int i) const {
    return warp.shared() + ((i - HELD) * kWarps + warp.index()) * kPerWarp;
  }
  FASTLSTM_DEVICE float* sums(const Warp& warp) const {
    return reinterpret_cast<float*>(warp.shared() + (chunks_ - HELD) * kWarps * kPerWarp);
  }

  FASTLSTM_DEVICE void fetch(const Warp& warp, const uint4* state, int i,
                             PerLane<uint4> (&b)[COLUMNS]) const {
    if (i >= chunks_) return;
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) {
        b[c][lane] = load_published(state + ((c * kWarps + warp.index()) * int64_t{chunks_} + i) * 32 + lane);
      }
    }
  }

  FASTLSTM_DEVICE static void take(const Warp& warp, const PerLane<uint4> (&a)[2 * ROWS],
                                   const PerLane<uint4> (&fetched)[COLUMNS],
                                   PerLane<float4> (&acc)[ROWS][COLUMNS]) {
    PerLane<uint4> b[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) b[c][lane] = operand(fetched[c][lane], T());
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) multiply_chunk<T>(acc[r][c], a[2 * r], a[2 * r + 1], b[c]);
    }
  }

  FASTLSTM_DEVICE static void take_shared(const Warp& warp, const uint4* chunk,
                                          const PerLane<uint4> (&fetched)[COLUMNS],
                                          PerLane<float4> (&acc)[ROWS][COLUMNS]) {
    PerLane<uint4> a[2 * ROWS];
#pragma unroll
    for (int r = 0; r < 2 * ROWS; ++r) {
      for (const int lane : warp.lanes()) a[r][lane] = chunk[r * 32 + lane];
    }
    take(warp, a, fetched, acc);
  }

  PerLane<uint4> held_[HELD][2 * ROWS];
  int chunks_;
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
};

// A slice's exchange as one warp sees it. Each member's part is `part` elements of K.
struct Slice {
  int at;           // in [D, slices]
  int first, last;  // the members whose parts the warp multiplies

  template <class T>
  static FASTLSTM_DEVICE Slice of(const Layout& p, const Warp& warp, int d, int slice, int part, T) {
    const int share = p.chunks * kChunkOf<T>, begin = warp.index() * share;
    const int last = (begin + share + part - 1) / part;
    return {d * p.slices + slice, begin / part, last < p.members ? last : p.members};
  }
  FASTLSTM_DEVICE uint4* slot(const Persistent& s, uint32_t epoch) const {
    return s.exchange + (int64_t{2} * at + epoch % 2) * s.layout.state;
  }
  FASTLSTM_DEVICE uint32_t* flags(const Persistent& s) const {
    return s.flags + int64_t{at} * s.layout.members;
  }
};

// The elements (unit, row) of a slice, dealt to the block's threads: always the same ones to the same thread.
struct Element {
  int unit, row;
  int64_t j, b;
  bool exists;

  template <int UNITS, int ROWS>
  static FASTLSTM_DEVICE Element of(const Warp& warp, int lane, int q, int member, int slice, int64_t H,
                                    int64_t B) {
    const int e = (q * kWarps + warp.index()) * 32 + lane;
    Element x = {e % UNITS, e / UNITS};
    x.j = int64_t{member} * UNITS + x.unit, x.b = int64_t{slice} * ROWS + x.row;
    x.exists = x.row < ROWS && x.j < H && x.b < B;
    return x;
  }
};

}  // namespace fastlstm::cuda
