// Replaces csrc/cuda/warp.cuh on the include path: the persistent kernels with a host thread per warp. The
// lanes of a warp run one after the other. Barriers, flags, remote stores and races between warps and CTAs
// are real, so ThreadSanitizer reports what would be a race on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <barrier>
#include <bit>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <random>
#include <thread>
#include <vector>

#include "cuda/memory.h"
#include "cuda/plan.h"

#define FASTLSTM_DEVICE inline

namespace fastlstm::cuda {

template <class X>
class PerLane {
 public:
  X& operator[](int lane) { return x_[lane]; }
  const X& operator[](int lane) const { return x_[lane]; }

 private:
  X x_[32];
};

class Lanes {
 public:
  struct Iterator {
    int lane;
    int operator*() const { return lane; }
    void operator++() { ++lane; }
    bool operator!=(const Iterator& end) const { return lane != end.lane; }
  };
  Iterator begin() const { return {0}; }
  Iterator end() const { return {32}; }
};

inline void deliver(bool all);

// Barrier of a cluster's warps. Remote stores are delivered while a warp waits: they are not ordered by it.
class ClusterBarrier {
 public:
  explicit ClusterBarrier(int warps) : warps_(warps) {}
  void wait() {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == warps_) {
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
    }
    while (round_.load(std::memory_order_acquire) == round) {
      deliver(false);
      std::this_thread::yield();
    }
  }

 private:
  const int warps_;
  std::atomic<int> arrived_{0}, round_{0};
};

struct Block {
  Block(int index, int rank, int64_t bytes, std::vector<Block*>& cluster, ClusterBarrier& all)
      : index(index),
        rank(rank),
        shared(bytes / 16, {~0u, ~0u, ~0u, ~0u}),
        cluster(cluster),
        all(all) {}  // NaN
  int index, rank;   // rank: in the cluster
  std::vector<uint4> shared;
  std::barrier<> barrier{kWarps};
  std::vector<Block*>& cluster;  // by rank
  ClusterBarrier& all;           // of the cluster's warps
  std::atomic<int> running{kWarps};
};

class Warp {
 public:
  Warp(Block& block, int index) : block_(&block), index_(index) {}
  int cta() const { return block_->index; }
  int index() const { return index_; }
  Lanes lanes() const { return {}; }
  uint4* shared() const { return block_->shared.data(); }
  void sync() const {}
  void block_sync() const {
    random_delay();
    block_->barrier.arrive_and_wait();
  }
  void cluster_sync() const {
    random_delay();
    block_->all.wait();
  }
  // The address in a peer's shared memory that corresponds to `local`.
  template <class X>
  X* peer_address(int peer, X* local) const {
    const auto offset = reinterpret_cast<char*>(local) - reinterpret_cast<char*>(shared());
    return reinterpret_cast<X*>(reinterpret_cast<char*>(block_->cluster[peer]->shared.data()) + offset);
  }
  Block* peer(int rank) const { return block_->cluster[rank]; }

 private:
  Block* block_;
  int index_;
};

inline int keep_in_register(int x) { return x; }

inline PerLane<uint32_t> swap_pairs(const PerLane<uint32_t>& x) {
  PerLane<uint32_t> y;
  for (int lane = 0; lane < 32; ++lane) y[lane] = x[lane ^ 1];
  return y;
}

// Reads, so that the sanitizer reports an invalid address.
inline void prefetch(const void* p) { static_cast<void>(*static_cast<const volatile char*>(p)); }

[[noreturn]] inline void trap_on_timeout(uint32_t*, uint32_t epoch) {
  // It waits for its own words, too, which says nothing of the others.
  while (this_block == silent_block) std::this_thread::sleep_for(std::chrono::seconds(1));
  std::fprintf(stderr, "CTA %d timed out waiting for epoch %u\n", this_block, epoch);
  std::_Exit(3);
}

[[noreturn]] inline void misuse(const char* what) {
  std::fprintf(stderr, "CTA %d %s\n", this_block, what);
  std::_Exit(4);
}

// An mbarrier in 8 bytes of shared memory, as in the PTX ISA: a phase completes when no arrival is pending
// and the expected bytes have arrived; only the parity of the current phase can be tested.
struct alignas(8) Mbarrier {
  uint64_t state;
};
struct Phases {  // what `state` holds
  uint16_t valid, count;
  int32_t pending : 2, bytes : 30;  // bytes: expected minus arrived
};
static_assert(sizeof(Phases) == sizeof(Mbarrier));
constexpr uint16_t kValid = 0x5a17;

inline void mbarrier_init(Mbarrier* mbarrier) {
  // Not atomic: use without a cluster barrier in between is a race.
  mbarrier->state = std::bit_cast<uint64_t>(Phases{kValid, 0, 1, 0});
}

inline void arrive(Mbarrier* mbarrier, int arriving, int bytes) {
  std::atomic_ref<uint64_t> state(mbarrier->state);
  uint64_t seen = state.load(std::memory_order_acquire), next;
  do {
    Phases p = std::bit_cast<Phases>(seen);
    if (p.valid != kValid) misuse("uses an mbarrier that was not initialized");
    if (arriving > p.pending) misuse("expects the bytes of a phase twice");
    p.pending -= arriving, p.bytes += bytes;
    if (p.pending == 0 && p.bytes < 0) misuse("receives more than it expects in a phase");
    if (p.pending == 0 && p.bytes == 0) p.pending = 1, ++p.count;
    next = std::bit_cast<uint64_t>(p);
  } while (!state.compare_exchange_weak(seen, next, std::memory_order_acq_rel, std::memory_order_acquire));
}

// Remote stores of a thread that have not arrived: they do so in any order, at any time until the thread
// ends.
struct RemoteStore {
  Block* to;
  Mbarrier* mbarrier;
  void* at;
  int bytes;
  uint4 data;
};
inline thread_local std::vector<RemoteStore> in_flight;
inline thread_local std::minstd_rand shuffle(1);

inline void deliver(bool all) {
  while (!in_flight.empty() && (all || shuffle() % 8 != 0)) {
    std::swap(in_flight[shuffle() % in_flight.size()], in_flight.back());
    const RemoteStore store = in_flight.back();
    in_flight.pop_back();
    if (store.to->running == 0) misuse("sent a remote store to a CTA that has exited");
    std::memcpy(store.at, &store.data, store.bytes);
    arrive(store.mbarrier, 0, -store.bytes);
    random_delay();
  }
}

template <class X>
void remote_store(const Warp& warp, int peer, X* to, Mbarrier* mbarrier, X x) {
  if (this_block == silent_block) return;
  RemoteStore sent = {
      warp.peer(peer), warp.peer_address(peer, mbarrier), warp.peer_address(peer, to), sizeof(X), {}};
  std::memcpy(&sent.data, &x, sizeof(X));
  in_flight.push_back(sent);
}

inline void mbarrier_expect_tx(Mbarrier* mbarrier, uint32_t bytes) {
  random_delay();
  arrive(mbarrier, 1, static_cast<int>(bytes));
}

inline bool mbarrier_test_wait(const Mbarrier* mbarrier, uint32_t parity) {
  deliver(false);
  std::this_thread::yield();
  const uint64_t seen =
      std::atomic_ref<uint64_t>(const_cast<Mbarrier*>(mbarrier)->state).load(std::memory_order_acquire);
  const Phases p = std::bit_cast<Phases>(seen);
  if (p.valid != kValid) misuse("tests an mbarrier that was not initialized");
  return p.count % 2 != parity;
}

inline void acquire_dsmem() {}  // mbarrier_test_wait has acquired

inline uint32_t to_tf32(uint32_t x) {
  const bool finite = (x & 0x7f800000u) != 0x7f800000u;
  return finite ? (x + 0x1000u) & 0xffffe000u : x;
}

// The elements of T in a register of a fragment.
inline void unpack(uint32_t word, float (&x)[1], float) {
  word &= 0xffffe000u;  // the tensor cores see no more of a float
  std::memcpy(x, &word, 4);
}
template <class T>
inline void unpack(uint32_t word, float (&x)[2], T) {
  T both[2];
  std::memcpy(static_cast<void*>(both), &word, 4);
  for (int e = 0; e < 2; ++e) x[e] = static_cast<float>(both[e]);
}

// mma.sync.m16n8k16 of float16 or bfloat16, and m16n8k8 of TF32: which lane holds what is the PTX ISA's,
// sections "Matrix Fragments for mma.m16n8k16" and "... for mma.m16n8k8".
template <class T>
inline void mma(PerLane<float4>& acc, const PerLane<uint32_t> (&a)[4], const PerLane<uint32_t> (&b)[2]) {
  constexpr int E = 4 / sizeof(T);  // elements of a register
  float A[16][8 * E], B[8 * E][8];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, within = lane % 4;
    float x[E];
    for (int r = 0; r < 4; ++r) {
      unpack(a[r][lane], x, T());
      for (int e = 0; e < E; ++e) A[group + r % 2 * 8][within * E + r / 2 * 4 * E + e] = x[e];
    }
    for (int r = 0; r < 2; ++r) {
      unpack(b[r][lane], x, T());
      for (int e = 0; e < E; ++e) B[within * E + r * 4 * E + e][group] = x[e];
    }
  }
  float C[16][8] = {};
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 8 * E; ++k)
      for (int n = 0; n < 8; ++n) C[m][n] += A[m][k] * B[k][n];
  for (int lane = 0; lane < 32; ++lane) {
    const int group = lane / 4, n = lane % 4 * 2;
    float4& c = acc[lane];
    c.x += C[group][n], c.y += C[group][n + 1], c.z += C[group + 8][n], c.w += C[group + 8][n + 1];
  }
}

template <class T>
inline void mma_k_slice(PerLane<float4>& acc, const PerLane<uint4>& top, const PerLane<uint4>& bottom,
                        const PerLane<uint4>& b) {
  PerLane<uint32_t> first[4], second[4], b_first[2], b_second[2];
  for (int lane = 0; lane < 32; ++lane) {
    first[0][lane] = top[lane].x, first[1][lane] = bottom[lane].x;
    first[2][lane] = top[lane].y, first[3][lane] = bottom[lane].y;
    second[0][lane] = top[lane].z, second[1][lane] = bottom[lane].z;
    second[2][lane] = top[lane].w, second[3][lane] = bottom[lane].w;
    b_first[0][lane] = b[lane].x, b_first[1][lane] = b[lane].y;
    b_second[0][lane] = b[lane].z, b_second[1][lane] = b[lane].w;
  }
  mma<T>(acc, first, b_first);
  mma<T>(acc, second, b_second);
}

inline int max_cluster_ctas = 16;
inline int launches_left =
    -1;  // then launches find no room, as in a green context; below zero: there always is
inline int occupancy_queries = 0;

template <class F, class S>
int max_resident_ctas(int cluster_dim, int64_t) {
  ++occupancy_queries;
  return cluster_dim > max_cluster_ctas ? 0 : 1 << 20;
}

// Runs F with a thread per warp; clusters one after the other, as on a device that fits only one.
template <class F, class S>
cudaError_t launch_persistent(const S& s, int ctas, int cluster_dim, int64_t shared_bytes, cudaStream_t) {
  const int at_once = cluster_dim > 0 ? cluster_dim : cluster_dim == 0 ? ctas : 1;
  if (ctas % at_once != 0 || F::kCluster != (cluster_dim > 0)) return cudaErrorInvalidConfiguration;
  if (launches_left == 0)
    return cluster_dim > 0 ? cudaErrorInvalidClusterSize : cudaErrorCooperativeLaunchTooLarge;
  if (launches_left > 0) --launches_left;
  for (int first = 0; first < ctas; first += at_once) {
    std::deque<Block> all;
    std::vector<Block*> by_rank;
    ClusterBarrier together(at_once * kWarps);
    for (int rank = 0; rank < at_once; ++rank) {
      by_rank.push_back(&all.emplace_back(first + rank, rank, shared_bytes, by_rank, together));
    }
    std::vector<std::thread> warps;
    for (Block& block : all) {
      for (int w = 0; w < kWarps; ++w) {
        warps.emplace_back([&s, &block, w] {
          this_block = block.index;
          shuffle.seed(static_cast<unsigned>(block.index * kWarps + w + 1));
          store_order.seed(static_cast<unsigned>(block.index * kWarps + w + 1));
          F::run(s, Warp(block, w));
          deliver(true);
          drain_stores(true);
          --block.running;
        });
      }
    }
    for (std::thread& warp : warps) warp.join();
  }
  return cudaSuccess;
}

}  // namespace fastlstm::cuda
