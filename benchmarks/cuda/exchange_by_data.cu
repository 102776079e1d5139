// Latency of an exchange through L2 whose data are their own flag, compared with one flag per CTA. Compiled,
// not run on a GPU yet.
//   nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/exchange_by_data.cu -o exchange && ./exchange
// Prints CSV: how, CTAs per group, concurrent groups, bytes per CTA, stores per thread after sending, ns per
// round.
//
//   data            csrc/cuda/exchange.h's data flags, as csrc/cuda/group_data_flag.h: no fence before the
//                   data, no flag, no second round trip
//   flags           as csrc/cuda/group_flags.h: two slots, st.release after a barrier, ld.acquire
//   flags_relaxed   the same with relaxed polls and one fence
//
// In each, a thread stores 32 bits at a time. In "data" all threads execute the fence, because all of them
// poll.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/exchange.h"

namespace {

using namespace fastlstm::cuda;

constexpr int kThreads = kWarps * 32, kRounds = 4000, kLaunches = 5, kMaxWords = 128;
enum class How { data, flags, flags_relaxed };
constexpr const char* kNames[] = {"data", "flags", "flags_relaxed"};

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

struct Exchange {
  uint4* slots;  // [groups, 2 or 4, ctas * words]
  uint32_t* flags;
  uint32_t *fault, *wrong;
  uint4* out;  // [CTAs, trailing, threads]
  int ctas, words, trailing;
};

// Stores `value` in each 32 bits of the CTA's part of a slot.
__device__ void store_part(const Exchange& s, uint4* slot, int rank, uint32_t value) {
  uint32_t* const part = reinterpret_cast<uint32_t*>(slot + rank * s.words);
  for (int i = threadIdx.x; i < 4 * s.words; i += kThreads) store_relaxed(part + i, value);
}

__device__ uint32_t load_relaxed(const uint32_t* p) {
  uint32_t x;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(p) : "memory");
  return x;
}

// Sum of one 32-bit word of each of the warp's 16-byte words, as they arrive.
__device__ uint32_t sum_words(const Exchange& s, const uint4* slot, int begin, int end, int lane, bool poll) {
  uint32_t sum = 0;
  for (int i = begin + lane; i < end; i += 32 * 4) {
    uint4 x[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + 32 * k < end) x[k] = fastlstm::cuda::load_relaxed(slot + i + 32 * k);
    }
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (i + 32 * k >= end) continue;
      for (uint32_t polls = 0; poll && !is_complete(x[k]); ++polls) {
        if (polls == kMaxPolls) trap_on_timeout(s.fault, 1);
        x[k] = fastlstm::cuda::load_relaxed(slot + i + 32 * k);
      }
      sum += x[k].x;
    }
  }
  return __reduce_add_sync(~0u, sum);
}

// Each CTA's data of a round are a function of all it has read; a stale word is reported in s.wrong.
template <How HOW>
__global__ void __launch_bounds__(kThreads, 1) rounds(const __grid_constant__ Exchange s) {
  __shared__ uint32_t partial[kWarps];
  constexpr int kSlots = HOW == How::data ? kDataFlagSlots : 2;
  const int group = blockIdx.x / s.ctas, rank = blockIdx.x % s.ctas, all = s.ctas * s.words;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x;
  uint4* const base = s.slots + int64_t{group} * kSlots * all;
  uint32_t* const flags = s.flags + group * s.ctas;
  const int share = (s.ctas + kWarps - 1) / kWarps, first = min(warp * share, s.ctas);
  const int last = min(first + share, s.ctas);
  uint32_t value = 1;
#pragma unroll 1
  for (int round = 0; round < kRounds; ++round) {
    uint4* const slot = base + round % kSlots * all;
    store_part(s, slot, rank, value);
    if constexpr (HOW == How::data) {
      store_part(s, base + (round + 2) % kSlots * all, rank, kEmptyWord);
      // Of every thread, since every thread polls. It also waits for the stores above.
      fence();
    } else {
      __syncthreads();
      if (thread == 0) store_release(flags + rank, round + 1);
    }
    for (int k = 0; k < s.trailing; ++k) {
      s.out[(int64_t{blockIdx.x} * s.trailing + k) * kThreads + thread] = {value, 0, 0, 0};
    }
    if constexpr (HOW != How::data) {
      if (first + lane < last) {
        const uint32_t* const flag = flags + first + lane;
        for (uint32_t polls = 0;; ++polls) {
          const uint32_t seen = HOW == How::flags ? load_acquire(flag) : load_relaxed(flag);
          if (seen > static_cast<uint32_t>(round)) break;
          if (polls == kMaxPolls) trap_on_timeout(s.fault, 1);
        }
      }
      if constexpr (HOW == How::flags_relaxed) __threadfence();
      __syncwarp();
    }
    const uint32_t sum = sum_words(s, slot, first * s.words, last * s.words, lane, HOW == How::data);
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    uint32_t total = 0;
    for (int k = 0; k < kWarps; ++k) total += partial[k];
    __syncthreads();
    if (total != static_cast<uint32_t>(all) * value) *s.wrong = round + 1;
    value = value % 1000 + 1;
  }
}

template <How HOW>
double nanoseconds(Exchange s, int groups, size_t bytes, size_t flag_bytes) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<float> times;
  for (int i = 0; i < kLaunches; ++i) {
    check(cudaMemset(s.slots, HOW == How::data ? kEmptyWord & 0xFF : 0, bytes), "memset");
    check(cudaMemset(s.flags, 0, flag_bytes), "memset");
    void* arguments[] = {&s};
    check(cudaEventRecord(begin), "record");
    check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(rounds<HOW>), dim3(groups * s.ctas),
                                      dim3(kThreads), arguments, 0, nullptr),
          kNames[static_cast<int>(HOW)]);
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "a launch");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    times.push_back(ms);
  }
  std::sort(times.begin(), times.end());
  return times[times.size() / 2] * 1e6 / kRounds;
}

}  // namespace

int main() {
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "no GPU");
  const int sms = gpu.multiProcessorCount;
  std::fprintf(stderr, "%s, %d SMs\n", gpu.name, sms);
  const size_t bytes = size_t{4} * sms * kMaxWords * sizeof(uint4), flag_bytes = size_t{4} * (sms + 2);
  Exchange s = {};
  check(cudaMalloc(&s.slots, bytes), "memory");
  check(cudaMalloc(&s.flags, flag_bytes), "memory");
  check(cudaMalloc(&s.wrong, sizeof(uint32_t)), "memory");
  check(cudaMemset(s.wrong, 0, sizeof(uint32_t)), "memset");
  check(cudaMalloc(&s.out, size_t{2} * sms * kThreads * sizeof(uint4)), "memory");
  s.fault = s.flags + sms + 1;
  std::printf("how,ctas_per_group,groups,bytes,trailing,ns\n");
  bool right = true;
  for (const int ctas : {4, 8, 16, 24, 32, 64, 128}) {
    if (ctas > sms) continue;
    for (const int groups : {1, sms / ctas}) {
      for (const int words : {32, 64, kMaxWords}) {
        for (const int trailing : {0, 2}) {
          s.ctas = ctas, s.words = words, s.trailing = trailing;
          const double times[] = {nanoseconds<How::data>(s, groups, bytes, flag_bytes),
                                  nanoseconds<How::flags>(s, groups, bytes, flag_bytes),
                                  nanoseconds<How::flags_relaxed>(s, groups, bytes, flag_bytes)};
          for (int how = 0; how < 3; ++how) {
            std::printf("%s,%d,%d,%d,%d,%.0f\n", kNames[how], ctas, groups, words * 16, trailing, times[how]);
          }
          uint32_t wrong = 0;
          check(cudaMemcpy(&wrong, s.wrong, sizeof wrong, cudaMemcpyDeviceToHost), "copy");
          if (wrong != 0 && right) std::fprintf(stderr, "a stale word in round %u, %d CTAs\n", wrong, ctas);
          right = right && wrong == 0;
        }
      }
    }
  }
  return right ? 0 : 1;
}
