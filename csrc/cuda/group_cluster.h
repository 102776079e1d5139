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
        state(warp, 0)[i] = {0, 0, 0, 0};
      }
    }
    Mailbox::open(warp, box(warp));
  }

  FASTLSTM_DEVICE static Mailbox* box(const Warp& warp) { return reinterpret_cast<Mailbox*>(warp.shared()); }
  FASTLSTM_DEVICE uint4* state(const Warp& warp, int n) const { return warp.shared() + 1 + n % 2 * words_; }
  FASTLSTM_DEVICE int end() const { return 1 + 2 * words_; }

  FASTLSTM_DEVICE void await(const Warp& warp, int n) const {
    Mailbox::await(warp, box(warp), n, s_.epoch + 1 + static_cast<uint32_t>(n), s_.fault);
  }

  const Persistent& s_;
  const Member member_;

 private:
  const int words_;
};

// Forward: the state is h, [COLUMNS, chunks, 8 rows, 64 bytes]. Every member has all of it and pushes its own
// part to the others.
template <class T, int UNITS, int HELD, int COLUMNS>
class GatherCluster : public ClusterMember {
 public:
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;

  FASTLSTM_DEVICE GatherCluster(const Persistent& s, const Warp& warp, const Member& member)
      : ClusterMember(s, warp, member, static_cast<int>(s.layout.state)),
        product_(warp, s.packed, member.of_all(s.layout), s.layout.rounds, end()) {}

  FASTLSTM_DEVICE T* own(const Warp& warp, int, int n, int row, int k) const {
    return state_element<T>(state(warp, n), product_.chunks(), row, member_.index * UNITS + k);
  }

  FASTLSTM_DEVICE void send(const Warp& warp, int slice, int n) const {
    constexpr int kOfWord = 16 / static_cast<int>(sizeof(T)), kWords = UNITS * kSliceRows / kOfWord;
    const int members = s_.layout.members;
    warp.block_sync();
    Mailbox::prepare(warp, box(warp), n, (members - 1) * kWords * 16);
    // Each block begins with the peer after itself, so that no peer is everybody's first.
#pragma unroll 1
    for (int i = 1 + warp.index(); i < members; i += kWarps) {
      const int next = member_.index + i, peer = next < members ? next : next - members;  // % is slow
      for (const int lane : warp.lanes()) {
#pragma unroll
        for (int word = lane; word < kWords; word += 32) {
          uint4* const from =
              reinterpret_cast<uint4*>(own(warp, slice, n, word % kSliceRows, word / kSliceRows * kOfWord));
          push(warp, peer, from, &box(warp)->slots[n % 2], *from);
        }
      }
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp, int, int n) {
    await(warp, n);
    product_.multiply(warp, state(warp, n));
    warp.block_sync();
  }

  FASTLSTM_DEVICE float sum(const Warp& warp, int, int row, int column) const {
    return product_.sum(warp, row, column);
  }

 private:
  Gathered<T, UNITS / 16, HELD, COLUMNS, kClusterParts, load_received> product_;
};

// Backward: the state is the block's own gradients of the gates alone, [COLUMNS, chunks, 8 rows, 64 bytes]. A
// member multiplies it by all columns of its rows of W_hh and pushes to each member the terms of that one's
// units; they are added in the members' order, so that results are the same bits every time. In 16 bits that
// is half the traffic of handing on the gradients, in TF32 a quarter.
template <class T, int UNITS, int HELD, int COLUMNS>
class ScatterCluster : public ClusterMember {
 public:
  static constexpr int kUnits = UNITS, kSliceRows = 8 * COLUMNS;

  FASTLSTM_DEVICE ScatterCluster(const Persistent& s, const Warp& warp, const Member& member)
      : ClusterMember(s, warp, member, COLUMNS * kChunks * 32),
        a_(warp, s.packed, member.of_all(s.layout), s.layout.rounds,
           end() + 2 * s.layout.members * kInboxWords) {}

  FASTLSTM_DEVICE T* own(const Warp& warp, int, int n, int row, int k) const {
    return state_element<T>(state(warp, n), kChunks, row, k);
  }

  FASTLSTM_DEVICE void send(const Warp& warp, int, int n) const {
    warp.block_sync();
    Mailbox::prepare(warp, box(warp), n, s_.layout.members * UNITS * kSliceRows * 4);
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
        const PerLane<uint4> b = chunk(warp, n, c, k);
#pragma unroll
        for (int i = 0; i < HELD; ++i) {
          multiply_chunk<T>(acc[i][c], a_.held[i][2 * k], a_.held[i][2 * k + 1], b);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < HELD; ++i) push_tile(warp, n, i, acc[i]);
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
        for (int c = 0; c < COLUMNS; ++c) multiply_chunk<T>(sum[c], a[0], a[1], chunk(warp, n, c, k));
      }
      push_tile(warp, n, i, sum);
    }
  }

  FASTLSTM_DEVICE void receive(const Warp& warp, int, int n) const { await(warp, n); }

  FASTLSTM_DEVICE float sum(const Warp& warp, int n, int row, int column) const {
    float total = 0;
#pragma unroll 4  // four loads in flight; the order of the sum stays
    for (int member = 0; member < s_.layout.members; ++member) total += inbox(warp, n, member, row)[column];
    return total;
  }

 private:
  static constexpr int kChunks = 4 * UNITS / kChunkOf<T>, kTiles = UNITS / 16;
  // Floats from unit to unit of an inbox: a warp's reads, 32 units of one row, fall in 16 banks, and pairs of
  // rows stay together.
  static constexpr int kStride = inbox_stride(COLUMNS);
  static constexpr int kInboxWords = UNITS * kStride / 4;

  FASTLSTM_DEVICE PerLane<uint4> chunk(const Warp& warp, int n, int column, int k) const {
    PerLane<uint4> b;
    for (const int lane : warp.lanes())
      b[lane] = operand(state(warp, n)[(column * kChunks + k) * 32 + lane], T());
    return b;
  }

  // What a member pushed for one of the block's units, [kSliceRows].
  FASTLSTM_DEVICE float* inbox(const Warp& warp, int n, int member, int unit) const {
    return reinterpret_cast<float*>(warp.shared() + end() +
                                    (n % 2 * s_.layout.members + member) * kInboxWords) +
           unit * kStride;
  }

  // The 16 terms of each row that the warp's round i made go to the member whose units they are. W_hh is
  // packed so that each block begins with its own, and no member is everybody's first.
  FASTLSTM_DEVICE void push_tile(const Warp& warp, int n, int i,
                                 const PerLane<float4> (&acc)[COLUMNS]) const {
    const int all = s_.layout.members * kTiles, at = i * kWarps + warp.index();
    if (at >= all) return;
    const int next = at + member_.index * kTiles, tile = next < all ? next : next - all;  // % is slow
    const int peer = tile / kTiles;
    Arrivals* const arrivals = &box(warp)->slots[n % 2];
#pragma unroll
    for (int c = 0; c < COLUMNS; ++c) {
      for (const int lane : warp.lanes()) {
        float* const to = inbox(warp, n, member_.index, tile % kTiles * 16 + lane / 4) + 8 * c + lane % 4 * 2;
        const float4 x = acc[c][lane];
        push(warp, peer, reinterpret_cast<float2*>(to), arrivals, {x.x, x.y});
        push(warp, peer, reinterpret_cast<float2*>(to + 8 * kStride), arrivals, {x.z, x.w});
      }
    }
  }

  Resident<kChunks, HELD> a_;
};

}  // namespace fastlstm::cuda
