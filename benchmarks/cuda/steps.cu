// The persistent kernels without torch, on constant buffers: time per step, whole and with a stage left out.
//   nvcc -std=c++17 -O3 -arch=native -I csrc benchmarks/cuda/steps.cu -o steps && ./steps [T]
// Prints CSV: pass, kernels, H, B, CTAs per group, CTAs, variant, us per step (median and minimum of 9
// launches of T steps, 256 by default). The difference between two rows of a size is the stage's time, less
// what it overlaps with:
//
//   all         the whole kernel
//   no product  waits for the state and does not multiply it: the exchange, the cell, the barriers
//   no wait     multiplies the state without waiting (grid variant): no exchange
//   no fence    data flags without the fences that follow the sending: how long they delay the next poll. Not
//               sound: a poll may take a word of an earlier state, and a CTA may then wait forever for one
//               that was cleared. That ends the program, so these rows come last
//   an eighth   of the steps per launch: cost of a launch and of loading W_hh
//
// Results of the variants that leave something out are meaningless, and no number is checked: the tests do
// that.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/launch_persistent_backward.cuh"
#include "cuda/launch_persistent_forward.cuh"
#include "cuda/pack_weights.cu"

// Named, as a nameless one beside those of the headers confuses nvcc.
namespace steps {

using namespace fastlstm::cuda;
using T = __nv_bfloat16;

constexpr int kLaunches = 9;

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(status));
  std::exit(1);
}

template <class Group>
struct NoWait : Group {
  using Group::Group;
  FASTLSTM_DEVICE void receive(const Warp& warp) {
    this->product_.multiply(warp, this->from_, LoadL2());
    warp.block_sync();
  }
};
template <class Group>
struct NoProduct : Group {
  using Group::Group;
  FASTLSTM_DEVICE void receive(const Warp& warp) {
    if constexpr (Group::kCluster) {
      this->wait(warp);
    } else if constexpr (Group::kDataFlag) {
      wait_for_words(warp);
    } else {
      wait_for_flags(warp, this->flag_, this->epoch_, this->s_.fault);
    }
    warp.block_sync();
  }

 private:
  // Data flags: polls the words that multiply() would, four at a time.
  FASTLSTM_DEVICE void wait_for_words(const Warp& warp) const {
    const PollWords poll = {this->epoch_, this->s_.fault};
    for (const int lane : warp.lanes()) {
#pragma unroll 1
      for (int first = 0; first < this->s_.layout.iters; first += 4) {
        const int count = this->s_.layout.iters - first;
        const uint4* const from = this->from_[0][lane] + first * 32;
        bool complete = false;
#pragma unroll 1
        for (uint32_t polls = 0; !complete; ++polls) {
          poll.check(polls);
          uint4 x[4];
#pragma unroll
          for (int k = 0; k < 4; ++k) x[k] = k < count ? PollWords::load(from + k * 32) : uint4{};
          complete = is_complete(x[0]) && is_complete(x[1]) && is_complete(x[2]) && is_complete(x[3]);
        }
      }
    }
  }
};

template <class Group>
struct NoFence : Group {
  using Group::Group;
  FASTLSTM_DEVICE static void fence(const Warp&) {}
};

// A block with another group.
template <class Block, template <class> class Without>
struct Variant;
template <class T, class Group, bool RAGGED, template <class> class Without>
struct Variant<ForwardBlock<T, Group, RAGGED>, Without> {
  using type = ForwardBlock<T, Without<Group>, RAGGED>;
};
template <class T, class Group, bool RAGGED, template <class> class Without>
struct Variant<BackwardBlock<T, Group, RAGGED>, Without> {
  using type = BackwardBlock<T, Without<Group>, RAGGED>;
};

// The single-block variant, which does not wait.
template <class Block>
constexpr bool kSingle = false;
template <class T, int M_TILES, int ITERS, int CHAINS, bool RAGGED>
constexpr bool kSingle<ForwardBlock<T, SingleGroup<T, M_TILES, ITERS, CHAINS>, RAGGED>> = true;
template <class T, int M_TILES, int ITERS, int CHAINS, bool RAGGED>
constexpr bool kSingle<BackwardBlock<T, SingleGroup<T, M_TILES, ITERS, CHAINS>, RAGGED>> = true;

// Backward of the cluster variant, which has no GEMM after the wait.
template <class Block>
constexpr bool kMultipliesToSend = false;
template <class T, int UNITS, int REGISTER_ITERS, int N_TILES, bool RAGGED>
constexpr bool
    kMultipliesToSend<BackwardBlock<T, ReduceScatterCluster<T, UNITS, REGISTER_ITERS, N_TILES>, RAGGED>> =
        true;

template <class X>
X* constant(int64_t n, int byte = 0x3c) {  // 0x3c: about 0.01 in bfloat16 and float32
  X* p;
  check(cudaMalloc(&p, n * sizeof(X)), "memory");
  check(cudaMemset(p, byte, n * sizeof(X)), "memset");
  return p;
}

struct Time {
  double median, min;
};

template <class Launch>
Time microseconds(int steps, Launch launch) {
  cudaEvent_t begin, end;
  check(cudaEventCreate(&begin), "event");
  check(cudaEventCreate(&end), "event");
  std::vector<double> times;
  for (int i = 0; i < kLaunches + 2; ++i) {
    check(cudaEventRecord(begin), "record");
    check(launch(), "launch");
    check(cudaEventRecord(end), "record");
    check(cudaEventSynchronize(end), "a launch");
    float ms = 0;
    check(cudaEventElapsedTime(&ms, begin, end), "time");
    if (i >= 2) times.push_back(ms * 1e3 / steps);
  }
  std::sort(times.begin(), times.end());
  return {times[times.size() / 2], times[0]};
}

// The buffers of a size, freed when the program ends.
struct Problem {
  int64_t steps, B, H;
  DeviceLimits limits;
  Persistent s = {};
  ForwardStep<T> forward = {};
  BackwardStep<T> backward = {};
  float* dh;

  Problem(int64_t steps, int64_t B, int64_t H, const DeviceLimits& limits)
      : steps(steps), B(B), H(H), limits(limits) {
    const int64_t state = B * H, all = steps * state;
    forward.steps = backward.steps = {steps, B, nullptr, nullptr};
    forward.H = backward.H = H, forward.D = backward.D = 1;
    forward.gates_x = constant<float>(4 * all), forward.slots = backward.slots = steps;
    forward.bias_ih[0] = forward.bias_hh[0] = constant<T>(4 * H);
    forward.c = constant<float>(state), forward.c_n = constant<T>(state), forward.cells = constant<T>(all);
    forward.gates = constant<T>(4 * all);
    forward.state = {H, nullptr, constant<T>(state), constant<T>(all), constant<T>(state)};
    dh = constant<float>(state);
    backward.gradient = {H, forward.state.y, B * H, H, nullptr, dh, nullptr};
    backward.gates = forward.gates, backward.cells = forward.cells, backward.dc = constant<float>(state);
    backward.dgates = constant<T>(4 * all);
  }

  void run(Phase phase, char tier, bool fences = true) {
    const PersistentPlan chosen = plan(phase, {H, H, B, 1, sizeof(T)}, limits, tier);
    const Layout& p = chosen.layout;
    if (!chosen.reason.empty() || p.cluster != (tier == 'A') || p.single != (tier == 'S') ||
        p.data_flag != (tier == 'D'))
      return;
    const int max_ctas = phase == Phase::forward ? max_resident_fwd_ctas<T>(p) : max_resident_bwd_ctas<T>(p);
    if (max_ctas < (p.cluster_dim() == 0 ? p.ctas(1) : p.ctas_per_group)) return;
    PackWeights<T> pack = {p, phase, H, 1, {constant<T>(4 * H * H), nullptr}, {H, 0}, {1, 0}, nullptr};
    pack.packed_weights = constant<uint4>(pack.words());
    check(launch_pack_weights(pack, nullptr), "pack");
    const int64_t flags = int64_t{p.batch_tiles} * p.ctas_per_group;
    s = {}, s.layout = p, s.packed_weights = pack.packed_weights, s.count = static_cast<int>(steps);
    const int64_t words = int64_t{p.exchange_slots()} * p.batch_tiles * p.state_words;
    if (p.cluster_dim() == 0) s.exchange = constant<uint4>(words, p.data_flag ? 0xff : 0x3c);
    s.flags = constant<uint32_t>(flags + 1), s.fault = s.flags + flags;
    check(cudaMemset(s.flags, 0, 4 * (flags + 1)), "memset");
    if (phase == Phase::forward) {
      with_forward_block<T, false>(
          p, [&](auto block) { return measure(block, PersistentForward<T>{s, forward}, fences); });
    } else {
      with_backward_block<T, false>(
          p, [&](auto block) { return measure(block, PersistentBackward<T>{s, backward, dh}, fences); });
    }
    check(cudaFree(pack.packed_weights), "free");
    check(cudaFree(const_cast<T*>(pack.w_hh[0])), "free");
    check(cudaFree(s.flags), "free");
    if (s.exchange) check(cudaFree(s.exchange), "free");
  }

  template <class Block, class Arguments>
  int measure(Block, Arguments arguments, bool fences) {
    if (!fences) {
      if constexpr (Block::kDataFlag)
        one<typename Variant<Block, NoFence>::type>("no fence", arguments, static_cast<int>(steps));
      return 0;
    }
    one<Block>("all", arguments, static_cast<int>(steps));
    one<Block>("an eighth", arguments, static_cast<int>(steps / 8));
    if constexpr (!kMultipliesToSend<Block> && !kSingle<Block>) {
      one<typename Variant<Block, NoProduct>::type>("no product", arguments, static_cast<int>(steps));
      if constexpr (!Block::kCluster) {
        one<typename Variant<Block, NoWait>::type>("no wait", arguments, static_cast<int>(steps));
      }
    }
    return 0;
  }

  template <class Block, class Arguments>
  void one(const char* variant, Arguments& arguments, int count) {
    const Layout& p = arguments.layout;
    arguments.count = count;
    const Time time = microseconds(count, [&] {
      const cudaError_t status = launch_persistent<Block, Arguments>(
          arguments, static_cast<int>(p.ctas(1)), p.cluster_dim(), p.shared_bytes, nullptr);
      arguments.epoch += static_cast<uint32_t>(count);
      return status;
    });
    std::printf("%s,%s,%d,%d,%d,%d,%s,%.3f,%.3f\n",
                std::is_same_v<Arguments, PersistentForward<T>> ? "forward" : "backward",
                p.cluster     ? "clusters"
                : p.single    ? "single"
                : p.data_flag ? "data_flags"
                              : "flags",
                static_cast<int>(H), static_cast<int>(B), p.ctas_per_group, static_cast<int>(p.ctas(1)),
                variant, time.median, time.min);
    std::fflush(stdout);
  }
};

}  // namespace steps

int main(int argc, char** argv) {
  using namespace steps;
  cudaDeviceProp gpu;
  check(cudaGetDeviceProperties(&gpu, 0), "no GPU");
  std::fprintf(stderr, "%s, %d SMs\n", gpu.name, gpu.multiProcessorCount);
  const DeviceLimits limits = {gpu.multiProcessorCount, static_cast<int64_t>(gpu.sharedMemPerBlockOptin),
                               gpu.major >= 9 ? 16 : 0};
  const int64_t count = argc > 1 ? std::atoi(argv[1]) : 256;
  std::printf("pass,kernels,H,B,ctas_per_group,ctas,variant,median_us,min_us\n");
  const int64_t sizes[][2] = {{128, 16}, {256, 16},  {256, 64},  {512, 16}, {512, 64},
                              {768, 16}, {1024, 16}, {1024, 64}, {2048, 64}};
  std::vector<Problem> problems;
  for (const auto& [H, B] : sizes) {
    Problem& problem = problems.emplace_back(count, B, H, limits);
    for (const Phase phase : {Phase::forward, Phase::backward}) {
      for (const char tier : {'A', 'B', 'D', 'S'}) problem.run(phase, tier);
    }
  }
  for (Problem& problem : problems) {
    for (const Phase phase : {Phase::forward, Phase::backward}) problem.run(phase, 'D', false);
  }
  return 0;
}
