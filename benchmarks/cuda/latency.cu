// What a step of a persistent kernel cannot go below: how long blocks take to tell each other something.
//   nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/latency.cu -o latency && ./latency
// Prints CSV: what, blocks, bytes handed on by each block, nanoseconds a round (median of 20 launches of
// 2,000 rounds).
//
//   flags    the exchange of csrc/cuda/exchange.h: every block writes its bytes, raises its flag
//   (st.release), waits for
//            all flags (ld.acquire), and reads everybody's bytes from L2
//   cluster  barrier.cluster alone, and with each block pushing its bytes into all others' shared memory
//   before it
//            (sm_90 and later)
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/exchange.h"

namespace {

using namespace fastlstm::cuda;

constexpr int kRounds = 2000, kLaunches = 20, kThreads = kWarps * 32;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

// words: of 16 bytes, per block and round.
__global__ void __launch_bounds__(kThreads) flags_round(uint32_t* flags, uint32_t* fault, uint4* exchange,
                                                        int words, uint32_t epoch, uint32_t* sink) {
  const Warp warp;
  const int members = static_cast<int>(gridDim.x), all = members * words;
  uint32_t sum = 0;
#pragma unroll 1
  for (int round = 1; round <= kRounds; ++round) {
    uint4* const slot = exchange + (epoch + round) % 2 * all;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
      slot[blockIdx.x * words + i] = {sum, epoch, static_cast<uint32_t>(round), 0};
    }
    publish(warp, flags, warp.block(), epoch + round);
    // As in a step, each warp waits for its share of the members and reads that.
    const int share = (members + kWarps - 1) / kWarps, first = warp.index() * share;
    const int last = min(first + share, members);
    await(warp, flags, first, last, epoch + round, fault);
    for (const int lane : warp.lanes()) {
#pragma unroll 4
      for (int i = first * words + lane; i < last * words; i += 32) sum += load_published(slot + i).z;
    }
    warp.block_sync();
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;  // rounds * (rounds + 1) / 2 for each word read
}

__global__ void __launch_bounds__(kThreads) cluster_round(int words, int members, uint32_t* sink) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ uint4 received[];  // [2, members, words]
  uint32_t rank, sum = 0;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    const int slot = round % 2 * members * words;
    for (int peer = 0; words > 0 && peer < members; ++peer) {
      for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
        const uint32_t own =
            static_cast<uint32_t>(__cvta_generic_to_shared(received + slot + rank * words + i));
        uint32_t there;
        asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(own), "r"(peer));
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(there), "r"(sum), "r"(round),
                     "r"(i), "r"(rank)
                     : "memory");
      }
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                     : "memory");
    for (int i = static_cast<int>(threadIdx.x); i < members * words; i += kThreads)
      sum += received[slot + i].y;
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}

template <class Launch>
double nanoseconds(Launch launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> found;
  for (int i = 0; i < kLaunches + 2; ++i) {
    check(cudaEventRecord(begin), "record");
    launch(i);
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "a launch");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) found.push_back(ms);
  }
  std::sort(found.begin(), found.end());
  return found[found.size() / 2] * 1e6 / kRounds;
}

}  // namespace

int main() {
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "no GPU");
  std::fprintf(stderr, "%s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
  constexpr int kMostWords = 256;
  uint32_t *flags, *sink;
  uint4* exchange;
  const int sms = gpu.multiProcessorCount;
  check(cudaMalloc(&flags, (sms + 1) * sizeof(uint32_t)), "memory");
  check(cudaMalloc(&sink, sms * kThreads * sizeof(uint32_t)), "memory");
  check(cudaMalloc(&exchange, 2 * sms * kMostWords * sizeof(uint4)), "memory");
  std::printf("what,blocks,bytes,nanoseconds\n");
  for (int blocks : {4, 8, 16, 32, 64, 128}) {
    for (int words : {0, 32, 64, kMostWords}) {
      if (blocks > sms) continue;
      check(cudaMemset(flags, 0, (sms + 1) * sizeof(uint32_t)), "memset");
      const double ns = nanoseconds([&](int launch) {
        uint32_t epoch = launch * kRounds;
        uint32_t* fault = flags + sms;
        void* arguments[] = {&flags, &fault, &exchange, &words, &epoch, &sink};
        check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(flags_round), dim3(blocks),
                                          dim3(kThreads), arguments, 0, nullptr),
              "flags");
      });
      std::vector<uint32_t> sums(blocks * kThreads);
      check(cudaMemcpy(sums.data(), sink, sums.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost), "copy");
      uint64_t total = 0;
      for (uint32_t sum : sums) total += sum;
      const uint64_t expected = uint64_t{kRounds} * (kRounds + 1) / 2 * words * blocks * blocks;
      if (total != expected) {
        std::fprintf(stderr, "flags, %d blocks, %d words: read %llu, expected %llu\n", blocks, words,
                     static_cast<unsigned long long>(total), static_cast<unsigned long long>(expected));
        return 1;
      }
      std::printf("flags,%d,%d,%.1f\n", blocks, words * 16, ns);
    }
  }
  if (gpu.major < 9) return 0;
  check(cudaFuncSetAttribute(cluster_round, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "cluster size");
  check(cudaFuncSetAttribute(cluster_round, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             2 * 16 * kMostWords * 16),
        "shared memory");
  for (int blocks : {2, 4, 8, 16}) {
    for (int words : {0, 32, 64, kMostWords}) {
      cudaLaunchAttribute attribute;
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(blocks), config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = 2 * blocks * words * sizeof(uint4);
      config.attrs = &attribute, config.numAttrs = 1;
      const double ns = nanoseconds(
          [&](int) { check(cudaLaunchKernelEx(&config, cluster_round, words, blocks, sink), "cluster"); });
      std::printf("cluster,%d,%d,%.1f\n", blocks, words * 16, ns);
    }
  }
  return 0;
}
