// Tier A: a group is a thread-block cluster, whose blocks push into each other's shared memory. Each cluster
// has one slice of the batch, so clusters need not be on the device together. What a group gives to a block's
// loop is written in group_flags.h; the protocol is Mailbox, in exchange.h.
#pragma once

#include "cuda/exchange.h"
#include "cuda/resident.h"

namespace fastlstm::cuda {

FASTLSTM_DEVICE uint4 load_received(const uint4* p) { return *p; }

// What both passes have at the beginning of shared memory: the mailbox, in one word, and behind it two states
// of `words` each, zero at first, since padding is multiplied as well.
class ClusterMember {
 public:
  static constexpr bool kCluster = true;

  // No block ends before its peers, although all that was pushed to it has been received.
  FASTLSTM_DEVICE void leave(const Warp& warp) const { warp.cluster_sync(); }

 protected:
  FASTLSTM_DEVICE ClusterMember(const Persistent& s, const Warp& warp, const Member& member, int words)
      : s_(s), member_(member), words_(words) {
    for (const int lane : warp.lanes()) {
#pragma unroll 1
      for (int i = warp.index() * 32 + lane; i < 2 * words; i += kWarps * 32) {
        warp.shared()[state(0) + i] = {0, 0, 0, 0};
      }
    }
    Mailbox::open(warp, box(warp));
  }

  FASTLSTM_DEVICE static Mailbox* box(const Warp& warp) { return reinterpret_cast<Mailbox*>(warp.shared()); }
  // Word of shared memory at which state n, or one of its parity, begins.
  FASTLSTM_DEVICE int state(unsigned n) const { return 1 + (n % 2 == 0 ? 0 : words_); }
  FASTLSTM_DEVICE int end() const { return 1 + 2 * words_; }

  FASTLSTM_DEVICE void await(const Warp& warp) const {
    Mailbox::await(warp, box(warp), n_, s_.epoch + 1 + static_cast<uint32_t>(n_), s_.fault);
  }

  // To state n. What the sending of state n + 1 addresses is computed here, and kept.
  FASTLSTM_DEVICE void set(int n) {
    n_ = n;
    parity_ = keep(static_cast<int>((static_cast<unsigned>(n) + 1) % 2));
    made_ = keep(state(static_cast<unsigned>(n) + 1));
  }
  FASTLSTM_DEVICE Arrivals* arrivals(const Warp& warp) const { return &box(warp)->slots[parity_]; }

  const Persistent& s_;
  const Member member_;
  int n_ = 0;
  int parity_ = 0;  // of state n + 1
  int made_ = 0;    // where it begins, in words of shared memory

 private:
  const int words_;
};

// Forward: the state is h, [COLUMNS, chunks, 8 rows, 64 bytes]. Every member has all of it and pushes its own
// part to the others.
template <class T, int UNITS, int HELD, int COLUMNS>
class GatherCluster : public ClusterMember {
 public:
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;
  using Elements = Deal<UNITS, 8 * COLUMNS>;
  using Place = int;  // an element of shared memory

  FASTLSTM_DEVICE GatherCluster(const Persistent& s, const Warp& warp, const Member& member)
      : ClusterMember(s, warp, member, static_cast<int>(s.layout.state)),
        product_(warp, s.packed, member.of_all(s.layout), s.layout.rounds, end()) {
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int i = 0; i < kWords / 32; ++i) {
        const int word = 32 * i + lane;
        part_[i][lane] = element(word % kSliceRows, word / kSliceRows * kOfWord) / kOfWord;
      }
    }
  }

  FASTLSTM_DEVICE void bind(const Warp& warp, int, int n) {
    set(n);
    for (const int lane : warp.lanes()) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        from_[c][lane] = state(static_cast<unsigned>(n)) + product_.first_word(warp, lane, c);
      }
    }
  }
  FASTLSTM_DEVICE void advance(const Warp& warp) { bind(warp, 0, n_ + 1); }

  FASTLSTM_DEVICE Place place(const Warp&, int row, int k) const { return made_ * kOfWord + element(row, k); }
  FASTLSTM_DEVICE static T* own(const Warp& warp, Place place) {
    return reinterpret_cast<T*>(warp.shared()) + place;
  }
  FASTLSTM_DEVICE Place before(Place place) const {
    return place - (made_ - state(static_cast<unsigned>(n_))) * kOfWord;
  }
  FASTLSTM_DEVICE Place flip(Place place) const { return before(place); }

  FASTLSTM_DEVICE void send(const Warp& warp) const {
    const int members = s_.layout.members;
    Mailbox::prepare(warp, arrivals(warp), (members - 1) * kWords * 16);
    // Each block begins with the peer after itself, so that no peer is everybody's first.
#pragma unroll 1
    for (int i = 1 + warp.index(); i < members; i += kWarps) {
      const int next = member_.index + i, peer = next < members ? next : next - members;  // % is slow
      for (const int lane : warp.lanes()) {
#pragma unroll
        for (int k = 0; k < kWords / 32; ++k) {
          uint4* const from = warp.shared() + made_ + part_[k][lane];
          push(warp, peer, from, arrivals(warp), *from);
        }
      }
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp) {
    PerLane<const uint4*> from[COLUMNS];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) from[c][lane] = warp.shared() + from_[c][lane];
    }
    await(warp);
    product_.multiply(warp, from);
    warp.block_sync();
  }

  FASTLSTM_DEVICE int sum_at(int row, int column) const { return product_.sum_at(row, column); }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int at) const { return product_.sum(warp, at); }
  FASTLSTM_DEVICE float4 sum4(const Warp& warp, int, int, int at) const { return product_.sum4(warp, at); }

 protected:  // benchmarks/cuda/steps.cu leaves out stages
  static constexpr int kOfWord = 16 / static_cast<int>(sizeof(T)), kWords = UNITS * kSliceRows / kOfWord;

  // Element k of the block's own part, from the beginning of a state.
  FASTLSTM_DEVICE int element(int row, int k) const {
    return state_offset<T>(product_.chunks(), row, member_.index * UNITS + k);
  }

  Gathered<T, UNITS / 16, HELD, COLUMNS, kClusterParts, true, load_received> product_;
  PerLane<int> from_[COLUMNS];      // the first word that the lane reads of state n
  PerLane<int> part_[kWords / 32];  // the words that it pushes, within a state
};

// Backward: the state is the block's own gradients of the gates alone, [COLUMNS, chunks, 8 rows, 64 bytes]. A
// member multiplies it by all columns of its rows of W_hh and pushes to each member the terms of that one's
// units; they are added in the members' order, so that results are the same bits every time. In 16 bits that
// is half the traffic of handing on the gradients, in TF32 a quarter.
template <class T, int UNITS, int HELD, int COLUMNS>
class ScatterCluster : public ClusterMember {
 public:
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;
  using Elements = Deal<UNITS, 8 * COLUMNS>;
  using Place = int;  // an element of shared memory

  FASTLSTM_DEVICE ScatterCluster(const Persistent& s, const Warp& warp, const Member& member)
      : ClusterMember(s, warp, member, COLUMNS * kChunks * 32),
        a_(warp, s.packed, member.of_all(s.layout), s.layout.rounds,
           end() + 2 * s.layout.members * kInboxWords) {
#pragma unroll
    for (int i = 0; i < HELD; ++i) held_tiles_[i] = keep(tile(warp, i));
  }

  FASTLSTM_DEVICE void bind(const Warp& warp, int, int n) {
    set(n);
    for (const int lane : warp.lanes()) {
      to_[lane] = keep(4 * (end() + (parity_ * s_.layout.members + member_.index) * kInboxWords) +
                       lane / 4 * kStride + lane % 4 * 2);
    }
  }
  FASTLSTM_DEVICE void advance(const Warp& warp) { bind(warp, 0, n_ + 1); }

  FASTLSTM_DEVICE Place place(const Warp&, int row, int k) const {
    return made_ * (16 / static_cast<int>(sizeof(T))) + state_offset<T>(kChunks, row, k);
  }
  FASTLSTM_DEVICE static T* own(const Warp& warp, Place place) {
    return reinterpret_cast<T*>(warp.shared()) + place;
  }
  FASTLSTM_DEVICE Place flip(Place place) const {
    return place - (made_ - state(static_cast<unsigned>(n_))) * (16 / static_cast<int>(sizeof(T)));
  }

  FASTLSTM_DEVICE void send(const Warp& warp) const {
    Mailbox::prepare(warp, arrivals(warp), s_.layout.members * UNITS * kSliceRows * 4);
    PerLane<float4> acc[HELD][COLUMNS];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) acc[i][c][lane] = {0, 0, 0, 0};
      }
    }
#pragma unroll
    for (int k = 0; k < kChunks; ++k) {
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        const PerLane<uint4> b = chunk(warp, c, k);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
          multiply_chunk<T>(acc[i][c], a_.held[i][2 * k], a_.held[i][2 * k + 1], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) push_tile(warp, held_tiles_[i], acc[i]);
#pragma unroll 1
    for (int i = HELD; i < a_.rounds(); ++i) {
      PerLane<float4> sum[COLUMNS];
#pragma unroll
      for (int c = 0; c < COLUMNS; ++c) {
        for (const int lane : warp.lanes()) sum[c][lane] = {0, 0, 0, 0};
      }
#pragma unroll
      for (int k = 0; k < kChunks; ++k) {
        PerLane<uint4> a[2];
        a_.load(warp, i, 2 * k, 2 * k + 2, a);
#pragma unroll
        for (int c = 0; c < COLUMNS; ++c) multiply_chunk<T>(sum[c], a[0], a[1], chunk(warp, c, k));
      }
      push_tile(warp, tile(warp, i), sum);
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp) const { await(warp); }

  FASTLSTM_DEVICE int sum_at(int row, int column) const { return 4 * end() + row * kStride + column; }
  FASTLSTM_DEVICE float sum(const Warp& warp, int, int, int at) const {
    const int members = s_.layout.members,
              slot = static_cast<unsigned>(n_) % 2 == 0 ? 0 : members * kInboxWords;
    const float* const from = reinterpret_cast<float*>(warp.shared()) + at + 4 * slot;
    float total = 0;
#pragma unroll 4  // four loads in flight; the order of the sum stays
    for (int member = 0; member < members; ++member) total += from[member * 4 * kInboxWords];
    return total;
  }

 private:
  static constexpr int kChunks = 4 * UNITS / kChunkOf<T>, kTiles = UNITS / 16;
  // Floats from unit to unit of an inbox: a warp's reads, 32 units of one row, fall in 16 banks, and pairs of
  // rows stay together.
  static constexpr int kStride = inbox_stride(COLUMNS);
  static constexpr int kInboxWords = UNITS * kStride / 4;

  FASTLSTM_DEVICE PerLane<uint4> chunk(const Warp& warp, int column, int k) const {
    PerLane<uint4> b;
    for (const int lane : warp.lanes())
      b[lane] = operand(warp.shared()[made_ + (column * kChunks + k) * 32 + lane], T());
    return b;
  }

  // Which 16 rows of all the warp multiplies in round i; -1: none. W_hh is packed so that each block begins
  // with its own, and no member is everybody's first to be pushed to.
  FASTLSTM_DEVICE int tile(const Warp& warp, int i) const {
    const int all = s_.layout.members * kTiles, at = i * kWarps + warp.index();
    const int next = at + member_.index * kTiles;
    return at >= all ? -1 : next < all ? next : next - all;  // % is slow
  }

  // The terms of a tile go to the member whose units they are.
  FASTLSTM_DEVICE void push_tile(const Warp& warp, int tile, const PerLane<float4> (&acc)[COLUMNS]) const {
    if (tile < 0) return;
    const int peer = static_cast<int>(static_cast<unsigned>(tile) / kTiles),
              half = static_cast<int>(static_cast<unsigned>(tile) % kTiles);
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) {
        float* const to = reinterpret_cast<float*>(warp.shared()) + to_[lane] + half * 16 * kStride + 8 * c;
        const float4 x = acc[c][lane];
        push(warp, peer, reinterpret_cast<float2*>(to), arrivals(warp), {x.x, x.y});
        push(warp, peer, reinterpret_cast<float2*>(to + 8 * kStride), arrivals(warp), {x.z, x.w});
      }
    }
  }

  Resident<kChunks, HELD> a_;
  int held_tiles_[HELD];
  PerLane<int> to_;  // of unit lane / 4, where a peer takes in the block's terms: [members, units, rows + 2]
};

}  // namespace fastlstm::cuda
