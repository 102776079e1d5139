// Cluster variant: a group is a thread-block cluster, whose CTAs store into each other's shared memory
// (DSMEM). A cluster processes one batch tile, so clusters need not be resident together. The interface of a
// group is described in group_flags.h; the protocol is DsmemExchange in exchange.h.
#pragma once

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

// Beginning of shared memory in both passes: the DsmemExchange, in one 16-byte word, then two states of
// `words` words each, initially zero because padding is multiplied too.
class ClusterGroup {
 public:
  static constexpr bool kCluster = true, kDataFlag = false;

  // No CTA exits before its peers' remote stores have arrived.
  FASTLSTM_DEVICE void leave(const Warp& warp) const { warp.cluster_sync(); }

 protected:
  FASTLSTM_DEVICE ClusterGroup(const Persistent& s, const Warp& warp, const CtaCoord& cta, int words)
      : s_(s), cta_(cta), words_(words) {
    for (const int lane : warp.lanes()) {
#pragma unroll 1
      for (int i = warp.index() * 32 + lane; i < 2 * words; i += kWarps * 32) {
        warp.shared()[state(0) + i] = {0, 0, 0, 0};
      }
    }
    DsmemExchange::init(warp, exchange(warp));
  }

  FASTLSTM_DEVICE static DsmemExchange* exchange(const Warp& warp) {
    return reinterpret_cast<DsmemExchange*>(warp.shared());
  }
  // First word of the slot of state n in shared memory.
  FASTLSTM_DEVICE int state(unsigned n) const { return 1 + (n % 2 == 0 ? 0 : words_); }
  FASTLSTM_DEVICE int end() const { return 1 + 2 * words_; }

  FASTLSTM_DEVICE void wait(const Warp& warp) const {
    DsmemExchange::wait(warp, exchange(warp), n_, s_.epoch + 1 + static_cast<uint32_t>(n_), s_.fault);
  }

  // Moves to state n and computes the offsets that sending state n + 1 needs.
  FASTLSTM_DEVICE void set(int n) {
    n_ = n;
    parity_ = keep_in_register(static_cast<int>((static_cast<unsigned>(n) + 1) % 2));
    next_state_ = keep_in_register(state(static_cast<unsigned>(n) + 1));
  }
  FASTLSTM_DEVICE Mbarrier* mbarrier(const Warp& warp) const { return &exchange(warp)->slots[parity_]; }

  const Persistent& s_;
  const CtaCoord cta_;
  int n_ = 0;
  int parity_ = 0;      // of state n + 1
  int next_state_ = 0;  // its first word in shared memory

 private:
  const int words_;
};

// Forward: the state is h, [n tiles, K slices, 8 rows, 64 bytes]. Each CTA sends its part to all peers.
template <class T, int UNITS, int REGISTER_ITERS, int N_TILES>
class AllGatherCluster : public ClusterGroup {
 public:
  static constexpr int kUnits = UNITS, kBatchTileRows = 8 * N_TILES;
  using Elements = ElementMap<UNITS, 8 * N_TILES>;
  using StateAddress = int;  // index of an element in shared memory

  FASTLSTM_DEVICE AllGatherCluster(const Persistent& s, const Warp& warp, const CtaCoord& cta)
      : ClusterGroup(s, warp, cta, static_cast<int>(s.layout.state_words)),
        product_(warp, s.packed_weights, cta.global_rank(s.layout), s.layout.iters, end()) {
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int i = 0; i < kWords / 32; ++i) {
        const int word = 32 * i + lane;
        own_words_[i][lane] =
            element(word % kBatchTileRows, word / kBatchTileRows * kWordElements) / kWordElements;
      }
    }
  }

  FASTLSTM_DEVICE void bind(const Warp& warp, int, int n) {
    set(n);
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        from_[c][lane] = state(static_cast<unsigned>(n)) + product_.first_word(warp, lane, c);
      }
    }
  }
  FASTLSTM_DEVICE void advance(const Warp& warp) { bind(warp, 0, n_ + 1); }

  FASTLSTM_DEVICE StateAddress address(const Warp&, int row, int k) const {
    return next_state_ * kWordElements + element(row, k);
  }
  FASTLSTM_DEVICE static T* pointer(const Warp& warp, StateAddress address) {
    return reinterpret_cast<T*>(warp.shared()) + address;
  }
  FASTLSTM_DEVICE StateAddress previous(StateAddress address) const {
    return address - (next_state_ - state(static_cast<unsigned>(n_))) * kWordElements;
  }
  FASTLSTM_DEVICE StateAddress next(StateAddress address) const { return previous(address); }

  FASTLSTM_DEVICE void send(const Warp& warp) const {
    const int ctas = s_.layout.ctas_per_group;
    DsmemExchange::expect_bytes(warp, mbarrier(warp), (ctas - 1) * kWords * 16);
    // Each CTA begins with the next rank, so that stores are spread over the peers.
#pragma unroll 1
    for (int i = 1 + warp.index(); i < ctas; i += kWarps) {
      const int next = cta_.rank + i, peer = next < ctas ? next : next - ctas;  // % is slow
      for (const int lane : warp.lanes()) {
#pragma unroll
        for (int k = 0; k < kWords / 32; ++k) {
          uint4* const from = warp.shared() + next_state_ + own_words_[k][lane];
          remote_store(warp, peer, from, mbarrier(warp), *from);
        }
      }
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp) {
    PerLane<const uint4*> from[N_TILES];
#pragma unroll
    for (int c = 0; c < N_TILES; ++c) {
      for (const int lane : warp.lanes()) from[c][lane] = warp.shared() + from_[c][lane];
    }
    wait(warp);
    product_.multiply(warp, from, LoadShared());
    warp.block_sync();
  }

  FASTLSTM_DEVICE int sum_offset(int row, int column) const { return product_.sum_offset(row, column); }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int at) const { return product_.sum(warp, at); }
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int, int, int at) const { return product_.sum4(warp, at); }

 protected:  // benchmarks/cuda/steps.cu derives variants without a stage
  static constexpr int kWordElements = 16 / static_cast<int>(sizeof(T)),
                       kWords = UNITS * kBatchTileRows / kWordElements;

  // Index, within a state, of element k of the CTA's part.
  FASTLSTM_DEVICE int element(int row, int k) const {
    return state_offset<T>(product_.k_slices(), row, cta_.rank * UNITS + k);
  }

  StateGemm<T, UNITS / 16, REGISTER_ITERS, N_TILES, kClusterSplitK, true> product_;
  PerLane<int> from_[N_TILES];           // the lane's first word of state n
  PerLane<int> own_words_[kWords / 32];  // the words that it sends, within a state
};

// Backward: the state is the CTA's own dgates, [n tiles, K slices, 8 rows, 64 bytes]. A CTA multiplies it by
// all columns of its rows of W_hh and sends to each peer the terms of the peer's units, in float32. The
// receiver adds them in the order of ranks, so results are bitwise deterministic. Traffic: half that of an
// all-gather of dgates in 16 bits, a quarter in TF32.
template <class T, int UNITS, int REGISTER_ITERS, int N_TILES>
class ReduceScatterCluster : public ClusterGroup {
 public:
  static constexpr int kUnits = UNITS, kBatchTileRows = 8 * N_TILES;
  using Elements = ElementMap<UNITS, 8 * N_TILES>;
  using StateAddress = int;  // index of an element in shared memory

  FASTLSTM_DEVICE ReduceScatterCluster(const Persistent& s, const Warp& warp, const CtaCoord& cta)
      : ClusterGroup(s, warp, cta, N_TILES * kKSlices * 32),
        a_(warp, s.packed_weights, cta.global_rank(s.layout), s.layout.iters,
           end() + 2 * s.layout.ctas_per_group * kInboxWords) {
#pragma unroll
    for (int i = 0; i < REGISTER_ITERS; ++i) register_tiles_[i] = keep_in_register(tile(warp, i));
  }

  FASTLSTM_DEVICE void bind(const Warp& warp, int, int n) {
    set(n);
    for (const int lane : warp.lanes()) {
      to_[lane] =
          keep_in_register(4 * (end() + (parity_ * s_.layout.ctas_per_group + cta_.rank) * kInboxWords) +
                           lane / 4 * kInboxStride + lane % 4 * 2);
    }
  }
  FASTLSTM_DEVICE void advance(const Warp& warp) { bind(warp, 0, n_ + 1); }

  FASTLSTM_DEVICE StateAddress address(const Warp&, int row, int k) const {
    return next_state_ * (16 / static_cast<int>(sizeof(T))) + state_offset<T>(kKSlices, row, k);
  }
  FASTLSTM_DEVICE static T* pointer(const Warp& warp, StateAddress address) {
    return reinterpret_cast<T*>(warp.shared()) + address;
  }
  FASTLSTM_DEVICE StateAddress next(StateAddress address) const {
    return address - (next_state_ - state(static_cast<unsigned>(n_))) * (16 / static_cast<int>(sizeof(T)));
  }

  FASTLSTM_DEVICE void send(const Warp& warp) const {
    DsmemExchange::expect_bytes(warp, mbarrier(warp), s_.layout.ctas_per_group * UNITS * kBatchTileRows * 4);
    PerLane<float4> acc[REGISTER_ITERS][N_TILES];
#pragma unroll
    for (int i = 0; i < REGISTER_ITERS; ++i) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        for (const int lane : warp.lanes()) acc[i][c][lane] = {0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int k = 0; k < kKSlices; ++k) {
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        const PerLane<uint4> b = k_slice(warp, c, k);
#pragma unroll
        for (int i = 0; i < REGISTER_ITERS; ++i) {
          mma_k_slice<T>(acc[i][c], a_.fragments[i][2 * k], a_.fragments[i][2 * k + 1], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < REGISTER_ITERS; ++i) store_tile_to_peer(warp, register_tiles_[i], acc[i]);
#pragma unroll 1
    for (int i = REGISTER_ITERS; i < a_.iters(); ++i) {
      PerLane<float4> sum[N_TILES];
#pragma unroll
      for (int c = 0; c < N_TILES; ++c) {
        for (const int lane : warp.lanes()) sum[c][lane] = {0, 0, 0, 0};
      }
#pragma unroll
      for (int k = 0; k < kKSlices; ++k) {
        PerLane<uint4> a[2];
        a_.load(warp, i, 2 * k, 2 * k + 2, a);
#pragma unroll
        for (int c = 0; c < N_TILES; ++c) mma_k_slice<T>(sum[c], a[0], a[1], k_slice(warp, c, k));
      }
      store_tile_to_peer(warp, tile(warp, i), sum);
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp) const { wait(warp); }

  FASTLSTM_DEVICE int sum_offset(int row, int column) const {
    return 4 * end() + row * kInboxStride + column;
  }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int at) const {
    const int ctas = s_.layout.ctas_per_group,
              slot = static_cast<unsigned>(n_) % 2 == 0 ? 0 : ctas * kInboxWords;
    const float* const from = reinterpret_cast<float*>(warp.shared()) + at + 4 * slot;
    float total = 0;
#pragma unroll 4  // four loads in flight, in the order of ranks
    for (int rank = 0; rank < ctas; ++rank) total += from[rank * 4 * kInboxWords];
    return total;
  }

 private:
  static constexpr int kKSlices = 4 * UNITS / kKSliceElements<T>, kCtaMTiles = UNITS / 16;
  // Floats from unit to unit of an inbox: a warp's reads, 32 units of one row, use 16 banks, and pairs of
  // rows stay adjacent.
  static constexpr int kInboxStride = inbox_stride(N_TILES);
  static constexpr int kInboxWords = UNITS * kInboxStride / 4;

  FASTLSTM_DEVICE PerLane<uint4> k_slice(const Warp& warp, int column, int k) const {
    PerLane<uint4> b;
    for (const int lane : warp.lanes())
      b[lane] = operand(warp.shared()[next_state_ + (column * kKSlices + k) * 32 + lane], T());
    return b;
  }

  // The m tile that the warp multiplies in iteration i; -1: none. W_hh is packed so that each CTA begins with
  // its own units, so that stores are spread over the peers.
  FASTLSTM_DEVICE int tile(const Warp& warp, int i) const {
    const int all = s_.layout.ctas_per_group * kCtaMTiles, at = i * kWarps + warp.index();
    const int next = at + cta_.rank * kCtaMTiles;
    return at >= all ? -1 : next < all ? next : next - all;  // % is slow
  }

  // Sends the terms of an m tile to the CTA of its units.
  FASTLSTM_DEVICE void store_tile_to_peer(const Warp& warp, int tile,
                                          const PerLane<float4> (&acc)[N_TILES]) const {
    if (tile < 0) return;
    const int peer = static_cast<int>(static_cast<unsigned>(tile) / kCtaMTiles),
              half = static_cast<int>(static_cast<unsigned>(tile) % kCtaMTiles);
#pragma unroll
    for (int c = 0; c < N_TILES; ++c) {
      for (const int lane : warp.lanes()) {
        float* const to =
            reinterpret_cast<float*>(warp.shared()) + to_[lane] + half * 16 * kInboxStride + 8 * c;
        const float4 x = acc[c][lane];
        remote_store(warp, peer, reinterpret_cast<float2*>(to), mbarrier(warp), {x.x, x.y});
        remote_store(warp, peer, reinterpret_cast<float2*>(to + 8 * kInboxStride), mbarrier(warp),
                     {x.z, x.w});
      }
    }
  }

  ResidentWeights<kKSlices, REGISTER_ITERS> a_;
  int register_tiles_[REGISTER_ITERS];
  PerLane<int> to_;  // float of unit lane / 4 in a peer's inbox [CTAs, units, rows + 2]
};

}  // namespace fastlstm::cuda
