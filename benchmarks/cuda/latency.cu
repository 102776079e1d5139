// Latency of an exchange between CTAs, a lower bound of a persistent kernel's step.
//   nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/latency.cu -o latency && ./latency
// Prints CSV: what, CTAs, bytes sent by each CTA, ns per round (median of 20 launches of 2,000 rounds).
//
//   flags    the grid variant's exchange: every CTA writes its bytes, raises its flag (st.release), waits for
//   all
//            flags (ld.acquire), and reads all bytes from L2
//   push     the cluster variant's (sm_90 and later): every CTA stores its bytes into its peers' shared
//   memory
//            (st.async), waits for the bytes sent to it (mbarrier), and reads them there
//   cluster  barrier.cluster alone, and after every CTA has stored its bytes into its peers' shared memory
//            without an mbarrier
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
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

// words: 16-byte words per CTA and round.
__global__ void __launch_bounds__(kThreads) flags_round(uint32_t* flags, uint32_t* fault, uint4* exchange,
                                                        int words, uint32_t epoch, uint32_t* sink) {
  const Warp warp;
  const int ctas = static_cast<int>(gridDim.x), all = ctas * words;
  uint32_t sum = 0;
#pragma unroll 1
  for (int round = 1; round <= kRounds; ++round) {
    uint4* const slot = exchange + (epoch + round) % 2 * all;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
      slot[blockIdx.x * words + i] = {sum, epoch, static_cast<uint32_t>(round), 0};
    }
    warp.block_sync();
    raise_flag(warp, flags + warp.cta(), epoch + round);
    // As in a step, each warp waits for its share of the CTAs and reads their words.
    const int share = (ctas + kWarps - 1) / kWarps, first = warp.index() * share;
    const int last = min(first + share, ctas);
    PerLane<const uint32_t*> flag;
    for (const int lane : warp.lanes()) flag[lane] = first + lane < last ? flags + first + lane : nullptr;
    wait_for_flags(warp, flag, epoch + round, fault);
    for (const int lane : warp.lanes()) {
#pragma unroll 4
      for (int i = first * words + lane; i < last * words; i += 32) sum += load_l2(slot + i).z;
    }
    warp.block_sync();
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;  // rounds * (rounds + 1) / 2 for each word read
}

__global__ void __launch_bounds__(kThreads) cluster_round(int words, int ctas, uint32_t*, uint32_t* sink) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const Warp warp;
  uint4* const received = warp.shared();  // [2, ctas, words]
  const int rank = warp.cta(), all = ctas * words;
  uint32_t sum = 0;
  warp.cluster_sync();
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    uint4* const slot = received + round % 2 * all;
    for (int peer = 0; peer < ctas; ++peer) {
      for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
        asm volatile("st.shared::cluster.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(
                         peer_address(slot + rank * words + i, peer)),
                     "r"(sum), "r"(0), "r"(round + 1), "r"(0)
                     : "memory");
      }
    }
    warp.cluster_sync();
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) sum += slot[i].z;
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
#endif
}

__global__ void __launch_bounds__(kThreads)
    dsmem_round(int words, int ctas, uint32_t* fault, uint32_t* sink) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  const Warp warp;
  DsmemExchange* const exchange = reinterpret_cast<DsmemExchange*>(warp.shared());
  uint4* const received = warp.shared() + 1;  // [2, ctas, words]
  const int rank = warp.cta(), all = ctas * words;
  uint32_t sum = 0;
  DsmemExchange::init(warp, exchange);
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    uint4* const slot = received + round % 2 * all;
    for (int i = static_cast<int>(threadIdx.x); i < words; i += kThreads) {
      slot[rank * words + i] = {sum, 0, static_cast<uint32_t>(round) + 1, 0};
    }
    warp.block_sync();
    DsmemExchange::expect_bytes(warp, &exchange->slots[round % 2], (ctas - 1) * words * 16);
    for (int i = 1 + warp.index(); i < ctas; i += kWarps) {
      for (const int lane : warp.lanes()) {
        for (int word = lane; word < words; word += 32) {
          uint4* const from = slot + rank * words + word;
          remote_store(warp, (rank + i) % ctas, from, &exchange->slots[round % 2], *from);
        }
      }
    }
    DsmemExchange::wait(warp, exchange, round, static_cast<uint32_t>(round) + 1, fault);
    for (int i = static_cast<int>(threadIdx.x); i < all; i += kThreads) sum += slot[i].z;
    warp.block_sync();
  }
  sink[blockIdx.x * kThreads + threadIdx.x] = sum;
  warp.cluster_sync();
#endif
}

template <class Launch>
double nanoseconds(Launch launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < kLaunches + 2; ++i) {
    check(cudaEventRecord(begin), "record");
    launch(i);
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "a launch");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e6 / kRounds;
}

// Checks the sums of the rounds' numbers: `readers` CTAs read `words` words of each of `ctas`.
void check_sums(const char* what, const uint32_t* sink, int words, int readers, int ctas) {
  std::vector<uint32_t> sums(readers * kThreads);
  check(cudaMemcpy(sums.data(), sink, sums.size() * sizeof(uint32_t), cudaMemcpyDeviceToHost), "copy");
  uint64_t total = 0;
  for (uint32_t sum : sums) total += sum;
  const uint64_t expected = uint64_t{kRounds} * (kRounds + 1) / 2 * words * readers * ctas;
  if (total == expected) return;
  std::fprintf(stderr, "%s, %d CTAs, %d words: read %llu, expected %llu\n", what, ctas, words,
               static_cast<unsigned long long>(total), static_cast<unsigned long long>(expected));
  std::exit(1);
}

using ClusterKernel = void (*)(int, int, uint32_t*, uint32_t*);

// Rows of the CSV for clusters of 2 to 16 CTAs that fit the device.
void measure_clusters(const char* what, ClusterKernel kernel, std::initializer_list<int> sizes,
                      uint32_t* fault, uint32_t* sink) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster size");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             (1 + 2 * 16 * std::max(sizes)) * static_cast<int>(sizeof(uint4))),
        "shared memory");
  for (int ctas : {2, 4, 8, 12, 16}) {
    for (int words : sizes) {
      cudaLaunchAttribute attribute;
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim = {static_cast<unsigned>(ctas), 1, 1};
      cudaLaunchConfig_t config = {};
      config.gridDim = dim3(ctas), config.blockDim = dim3(kThreads);
      config.dynamicSmemBytes = (1 + 2 * ctas * words) * sizeof(uint4);
      config.attrs = &attribute, config.numAttrs = 1;
      int most = 0;
      if (cudaOccupancyMaxActiveClusters(&most, kernel, &config) != cudaSuccess || most < 1) {
        cudaGetLastError();
        std::fprintf(stderr, "%s: no cluster of %d CTAs fits\n", what, ctas);
        break;
      }
      const double ns = nanoseconds(
          [&](int) { check(cudaLaunchKernelEx(&config, kernel, words, ctas, fault, sink), what); });
      check_sums(what, sink, words, ctas, ctas);
      std::printf("%s,%d,%d,%.1f\n", what, ctas, words * 16, ns);
    }
  }
}

}  // namespace

int main() {
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "no GPU");
  std::fprintf(stderr, "%s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
  constexpr int kMaxWords = 256;
  uint32_t *flags, *sink;
  uint4* exchange;
  const int sms = gpu.multiProcessorCount;
  check(cudaMalloc(&flags, (sms + 1) * sizeof(uint32_t)), "memory");
  check(cudaMalloc(&sink, sms * kThreads * sizeof(uint32_t)), "memory");
  check(cudaMalloc(&exchange, 2 * sms * kMaxWords * sizeof(uint4)), "memory");
  std::printf("what,blocks,bytes,nanoseconds\n");
  for (int ctas : {4, 8, 16, 32, 64, 128}) {
    for (int words : {0, 32, 64, kMaxWords}) {
      if (ctas > sms) continue;
      check(cudaMemset(flags, 0, (sms + 1) * sizeof(uint32_t)), "memset");
      const double ns = nanoseconds([&](int launch) {
        uint32_t epoch = launch * kRounds;
        uint32_t* fault = flags + sms;
        void* arguments[] = {&flags, &fault, &exchange, &words, &epoch, &sink};
        check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(flags_round), dim3(ctas),
                                          dim3(kThreads), arguments, 0, nullptr),
              "flags");
      });
      check_sums("flags", sink, words, ctas, ctas);
      std::printf("flags,%d,%d,%.1f\n", ctas, words * 16, ns);
    }
  }
  if (gpu.major < 9) return 0;
  measure_clusters("push", dsmem_round, {8, 32, 64, kMaxWords}, flags + sms, sink);
  measure_clusters("cluster", cluster_round, {0, 32, 64, kMaxWords}, flags + sms, sink);
  return 0;
}
