// A warp of a persistent block: its lanes, the block's barrier, the tensor cores, and memory that other
// blocks write. All that the persistent kernels ask of a GPU beyond plain C++ is in this file, so that the
// tests can run the same kernels with host threads in the place of warps (tests/gpu/cuda_host/cuda/warp.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#define FASTLSTM_DEVICE __device__ __forceinline__

namespace fastlstm::cuda {

constexpr int kWarps = 8;                          // in a persistent block
constexpr uint32_t kMaxPolls = uint32_t{1} << 25;  // of a spin: seconds, and then it is a fault

// One X for every lane of a warp: a register of its own here, an array on the host.
template <class X>
class PerLane {
 public:
  FASTLSTM_DEVICE X& operator[](int) { return x_; }
  FASTLSTM_DEVICE const X& operator[](int) const { return x_; }

 private:
  X x_;
};

// `for (const int lane : warp.lanes())` runs once, with the thread's own lane.
class Lanes {
 public:
  struct Iterator {
    int lane;
    FASTLSTM_DEVICE int operator*() const { return lane; }
    FASTLSTM_DEVICE void operator++() { ++lane; }
    FASTLSTM_DEVICE bool operator!=(const Iterator& end) const { return lane != end.lane; }
  };
  FASTLSTM_DEVICE explicit Lanes(int lane) : lane_(lane) {}
  FASTLSTM_DEVICE Iterator begin() const { return {lane_}; }
  FASTLSTM_DEVICE Iterator end() const { return {lane_ + 1}; }

 private:
  int lane_;
};

// x, as the result of an instruction that ptxas does not repeat: it stays in a register, where ptxas would
// otherwise compute it again in every step. By all lanes of a warp.
FASTLSTM_DEVICE int keep(int x) { return __shfl_sync(~0u, x, static_cast<int>(threadIdx.x % 32)); }

class Warp {
 public:
  FASTLSTM_DEVICE Warp()
      : index_(keep(static_cast<int>(threadIdx.x / 32))),
        shared_(keep(static_cast<int>(__cvta_generic_to_shared(dynamic())))) {}

  FASTLSTM_DEVICE int block() const { return static_cast<int>(blockIdx.x); }
  FASTLSTM_DEVICE int index() const { return index_; }
  FASTLSTM_DEVICE Lanes lanes() const { return Lanes(static_cast<int>(threadIdx.x % 32)); }
  FASTLSTM_DEVICE uint4* shared() const {  // the block's
    return static_cast<uint4*>(__cvta_shared_to_generic(static_cast<uint32_t>(shared_)));
  }
  FASTLSTM_DEVICE void sync() const { __syncwarp(); }
  FASTLSTM_DEVICE void block_sync() const { __syncthreads(); }
  // Of all blocks of the cluster: what each did before is visible to the others after.
  FASTLSTM_DEVICE void cluster_sync() const {
    asm volatile(
        "barrier.cluster.arrive.release;\n\t"
        "barrier.cluster.wait.acquire;" ::
            : "memory");
  }

 private:
  FASTLSTM_DEVICE static uint4* dynamic() {
    extern __shared__ uint4 memory[];
    return memory;
  }

  int index_;
  int shared_;  // where shared memory begins, which depends on the block's place in its cluster
};

// Everything the block did before its last barrier is visible to whoever reads `value` with load_acquire.
FASTLSTM_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

FASTLSTM_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// A word of the exchange: from L2, never from this SM's L1.
FASTLSTM_DEVICE uint4 load_published(const uint4* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}

// Begins to bring the line at p from memory into L2.
FASTLSTM_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Counts what arrives in the shared memory it lies in, an mbarrier of one expected arrival. Each of its
// phases ends once expect() was called in it and as many bytes were pushed as that call said.
struct alignas(8) Arrivals {
  uint64_t state;
};

FASTLSTM_DEVICE uint32_t in_shared(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// By one thread, before a cluster_sync.
FASTLSTM_DEVICE void start(Arrivals* arrivals) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;" ::"r"(in_shared(arrivals))
      : "memory");
}

// By one thread, once in each phase; some of the bytes may have come before.
FASTLSTM_DEVICE void expect(Arrivals* arrivals, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(in_shared(arrivals)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of this parity has ended. It is asked of the current phase or the one before, whose
// parities differ. Not try_wait: that may sleep for as long as it likes, and a bound on the number of polls
// would bound no time.
FASTLSTM_DEVICE bool ended(const Arrivals* arrivals, uint32_t parity) {
  uint32_t yes;
  asm volatile(
      "{\n\t.reg .pred ended;\n\t"
      "mbarrier.test_wait.parity.relaxed.cluster.shared::cta.b64 ended, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, ended;\n\t}"
      : "=r"(yes)
      : "r"(in_shared(arrivals)), "r"(parity)
      : "memory");
  return yes != 0;
}

// After it, what was pushed in a phase that has ended can be read. Of shared memory alone: an acquire of all
// memory would throw away what the SM's L1 holds, in every step.
FASTLSTM_DEVICE void acquire_pushed() {
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

FASTLSTM_DEVICE uint32_t of_peer(const void* own, int peer) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(in_shared(own)), "r"(peer));
  return there;
}

// Stores x in the shared memory of another block of the cluster, or this one, at the place and with the
// arrivals that are `to` and `arrivals` in this one. Nobody waits here; the arrivals tell when it is done.
FASTLSTM_DEVICE void push(const Warp&, int peer, uint4* to, Arrivals* arrivals, uint4 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          of_peer(to, peer)),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(of_peer(arrivals, peer))
      : "memory");
}
FASTLSTM_DEVICE void push(const Warp&, int peer, float2* to, Arrivals* arrivals, float2 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          of_peer(to, peer)),
      "f"(x.x), "f"(x.y), "r"(of_peer(arrivals, peer))
      : "memory");
}

// A spin that came to its end: an error of the launch, as any invalid access is; never a hang.
FASTLSTM_DEVICE void trap_on_timeout(uint32_t* fault, uint32_t epoch) {
  store_release(fault, epoch);
  __trap();
}

FASTLSTM_DEVICE uint32_t to_tf32(uint32_t x) {
  uint32_t rounded;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(rounded) : "f"(__uint_as_float(x)));
  return rounded;
}

template <class T>
struct Mma;  // acc += A B, for A [16, 32 bytes of T] and B [32 bytes of T, 8]; layouts as in the PTX ISA

#define FASTLSTM_MMA(T, INSTRUCTION)                                                               \
  template <>                                                                                      \
  struct Mma<T> {                                                                                  \
    static FASTLSTM_DEVICE void run(float4& c, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, \
                                    uint32_t b0, uint32_t b1) {                                    \
      asm("mma.sync.aligned." INSTRUCTION                                                          \
          " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "                           \
          "%3};"                                                                                   \
          : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w)                                             \
          : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                 \
    }                                                                                              \
  };
FASTLSTM_MMA(__half, "m16n8k16.row.col.f32.f16.f16.f32")
FASTLSTM_MMA(__nv_bfloat16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTLSTM_MMA(float, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTLSTM_MMA

// acc [16, 8] += A [16, 64 bytes of T] B [64 bytes of T, 8]. Lane l holds 16 bytes of each row it has to do
// with, those from byte 16 * (l % 4) on: of A's rows l / 4 (top) and l / 4 + 8 (bottom), and of B's column
// l / 4. That is another order of the sum's terms than the instruction's own, the same one in A and B.
// acc: x, y are row l / 4, columns 2 * (l % 4) and the next; z, w the same columns of row l / 4 + 8.
template <class T>
FASTLSTM_DEVICE void multiply_chunk(PerLane<float4>& acc, const PerLane<uint4>& top,
                                    const PerLane<uint4>& bottom, const PerLane<uint4>& b) {
  Mma<T>::run(acc[0], top[0].x, bottom[0].x, top[0].y, bottom[0].y, b[0].x, b[0].y);
  Mma<T>::run(acc[0], top[0].z, bottom[0].z, top[0].w, bottom[0].w, b[0].z, b[0].w);
}

// What F needs of the architecture it is compiled for; on older ones its kernel is empty.
template <class F>
constexpr int kLeastArchitecture = F::kCluster ? 90 : 80;

template <class F, class S>
__global__ void __launch_bounds__(kWarps * 32, 1) persistent(const __grid_constant__ S s) {
#if defined(__CUDA_ARCH__)
  if constexpr (__CUDA_ARCH__ >= 10 * kLeastArchitecture<F>) F::run(s, Warp());
#endif
}

// `blocks` blocks; in clusters of `cluster`, or, if that is 0, all on the device at once or not at all; -1:
// at any time.
struct LaunchConfig {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config;

  LaunchConfig(int blocks, int cluster, int64_t shared_bytes, cudaStream_t stream) : attribute(), config() {
    config.gridDim = dim3(blocks), config.blockDim = dim3(kWarps * 32);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = cluster < 0 ? 0 : 1;
    if (cluster > 0) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Lets a kernel be launched with all the shared memory that the current device gives one block. Not with what
// a launch needs: the attribute is the kernel's, for all threads of the process, whose layers differ in size.
template <class Kernel>
cudaError_t allow(Kernel kernel, int cluster) {
  int device = 0, shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess || cluster <= 8) return status;  // 8 are allowed everywhere
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// The most blocks of this kernel that can be on the current device at once; 0 where that cannot be asked.
template <class F, class S>
int blocks_together(int cluster, int64_t shared_bytes) {
  const auto kernel = persistent<F, S>;
  int device = 0, sms = 0, most = 0;
  cudaFuncAttributes attributes;
  bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
               attributes.ptxVersion >= kLeastArchitecture<F> && allow(kernel, cluster) == cudaSuccess;
  if (known && cluster > 0) {
    const LaunchConfig launch(cluster, cluster, shared_bytes, nullptr);
    known = cudaOccupancyMaxActiveClusters(&most, kernel, &launch.config) == cudaSuccess;
    most *= cluster;
  } else if (known) {
    known = cudaGetDevice(&device) == cudaSuccess &&
            cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&most, kernel, kWarps * 32,
                                                          static_cast<size_t>(shared_bytes)) == cudaSuccess;
    most *= sms;
  }
  if (!known) cudaGetLastError();
  return known ? most : 0;
}

// F::run(s, warp) in all warps of these blocks.
template <class F, class S>
cudaError_t launch_together(const S& s, int blocks, int cluster, int64_t shared_bytes, cudaStream_t stream) {
  const auto kernel = persistent<F, S>;
  const cudaError_t status = allow(kernel, cluster);
  if (status != cudaSuccess) return status;
  const LaunchConfig launch(blocks, cluster, shared_bytes, stream);
  const cudaError_t launched = cudaLaunchKernelEx(&launch.config, kernel, s);
  // The caller answers to it, so it must not come up again in somebody's cudaGetLastError().
  if (launched != cudaSuccess) cudaGetLastError();
  return launched;
}

}  // namespace fastlstm::cuda
