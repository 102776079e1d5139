// A warp of a persistent CTA: its lanes, barriers, mma.sync, memory that other CTAs write, and launches. The
// persistent kernels use nothing of the GPU beyond plain C++ and this file, so the tests run them with a host
// thread per warp (tests/gpu/cuda_host/cuda/warp.cuh).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/plan.h"

#define FASTLSTM_DEVICE __device__ __forceinline__

namespace fastlstm::cuda {

constexpr uint32_t kMaxPolls = uint32_t{1} << 25;  // of a spin, some seconds; then trap_on_timeout

// One X per lane of a warp: a register here, an array on the host.
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

// Returns x as the result of a shuffle, which ptxas does not rematerialize: x stays in a register, and is not
// computed again in every step. Called by all lanes of a warp.
FASTLSTM_DEVICE int keep_in_register(int x) {
  return __shfl_sync(~0u, x, static_cast<int>(threadIdx.x % 32));
}

class Warp {
 public:
  FASTLSTM_DEVICE Warp()
      : index_(keep_in_register(static_cast<int>(threadIdx.x / 32))),
        shared_(keep_in_register(static_cast<int>(__cvta_generic_to_shared(dynamic())))) {}

  FASTLSTM_DEVICE int cta() const { return static_cast<int>(blockIdx.x); }
  FASTLSTM_DEVICE int index() const { return index_; }
  FASTLSTM_DEVICE Lanes lanes() const { return Lanes(static_cast<int>(threadIdx.x % 32)); }
  FASTLSTM_DEVICE uint4* shared() const {  // the CTA's shared memory
    return static_cast<uint4*>(__cvta_shared_to_generic(static_cast<uint32_t>(shared_)));
  }
  FASTLSTM_DEVICE void sync() const { __syncwarp(); }
  FASTLSTM_DEVICE void block_sync() const { __syncthreads(); }
  // Barrier of all CTAs of the cluster, with release and acquire semantics.
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
  int shared_;  // shared-memory address of the dynamic allocation, which depends on the CTA's cluster rank
};

// What the CTA wrote before its last barrier is visible to a thread that reads `value` by load_acquire.
FASTLSTM_DEVICE void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

FASTLSTM_DEVICE uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// Loads a word of the exchange from L2, never from this SM's L1.
FASTLSTM_DEVICE uint4 load_l2(const uint4* p) {
  uint4 x;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
               : "l"(p)
               : "memory");
  return x;
}

// Stores a word for the polls of other CTAs: in L2, in one piece, and ordered only by fence().
FASTLSTM_DEVICE void store_relaxed(uint32_t* p, uint32_t x) {
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(x) : "memory");
}

// Loads a word that other CTAs store by store_relaxed: each 32 bits of it in one piece.
FASTLSTM_DEVICE uint4 load_relaxed(const uint4* p) { return load_l2(p); }

// Orders the thread's earlier loads and stores before its later ones, as all CTAs of the device see them.
FASTLSTM_DEVICE void fence() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }

// The x of lane ^ 1. Called by all lanes of a warp.
FASTLSTM_DEVICE PerLane<uint32_t> swap_pairs(const PerLane<uint32_t>& x) {
  PerLane<uint32_t> y;
  y[0] = __shfl_xor_sync(~0u, x[0], 1);
  return y;
}

// Prefetches the line at p into L2.
FASTLSTM_DEVICE void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// An mbarrier with one expected arrival, in shared memory. A phase completes once mbarrier_expect_tx was
// called in it and remote stores have transferred the number of bytes of that call.
struct alignas(8) Mbarrier {
  uint64_t state;
};

FASTLSTM_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Called by one thread, before a cluster_sync.
FASTLSTM_DEVICE void mbarrier_init(Mbarrier* mbarrier) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n\t"
      "fence.mbarrier_init.release.cluster;" ::"r"(shared_address(mbarrier))
      : "memory");
}

// Called by one thread, once per phase; some of the bytes may have arrived before.
FASTLSTM_DEVICE void mbarrier_expect_tx(Mbarrier* mbarrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(mbarrier)),
      "r"(bytes)
      : "memory");
}

// Returns true if the phase of this parity has completed; called for the current phase or the previous one,
// whose parities differ. Not try_wait, which may suspend the thread: kMaxPolls would then bound no time.
FASTLSTM_DEVICE bool mbarrier_test_wait(const Mbarrier* mbarrier, uint32_t parity) {
  uint32_t yes;
  asm volatile(
      "{\n\t.reg .pred ended;\n\t"
      "mbarrier.test_wait.parity.relaxed.cluster.shared::cta.b64 ended, [%1], %2;\n\t"
      "selp.u32 %0, 1, 0, ended;\n\t}"
      : "=r"(yes)
      : "r"(shared_address(mbarrier)), "r"(parity)
      : "memory");
  return yes != 0;
}

// After it the remote stores of a completed phase can be read. It acquires shared memory only: an acquire of
// all memory would invalidate the SM's L1 in every step.
FASTLSTM_DEVICE void acquire_dsmem() {
  asm volatile("fence.acquire.sync_restrict::shared::cluster.cluster;" ::: "memory");
}

// Address, in the shared memory of CTA `peer` of the cluster, that corresponds to `local` in this CTA's.
FASTLSTM_DEVICE uint32_t peer_address(const void* local, int peer) {
  uint32_t address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(local)), "r"(peer));
  return address;
}

// st.async: stores x in the shared memory of CTA `peer` of the cluster, at the address that corresponds to
// `to` in this CTA's; the transfer completes its bytes on the peer's mbarrier. Does not wait.
FASTLSTM_DEVICE void remote_store(const Warp&, int peer, uint4* to, Mbarrier* mbarrier, uint4 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          peer_address(to, peer)),
      "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w), "r"(peer_address(mbarrier, peer))
      : "memory");
}
FASTLSTM_DEVICE void remote_store(const Warp&, int peer, float2* to, Mbarrier* mbarrier, float2 x) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
          peer_address(to, peer)),
      "f"(x.x), "f"(x.y), "r"(peer_address(mbarrier, peer))
      : "memory");
}

// Ends a spin after kMaxPolls as an error of the stream, like any invalid access, instead of a hang.
FASTLSTM_DEVICE void trap_on_timeout(uint32_t* fault, uint32_t epoch) {
  store_relaxed(fault, epoch);  // for a debugger
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

// acc [16, 8] += A [16, 64 bytes of T] B [64 bytes of T, 8]. Lane l holds 16 bytes, from byte 16 * (l % 4)
// on, of A's rows l / 4 (top) and l / 4 + 8 (bottom), and of B's column l / 4. K is summed in another order
// than the instruction's, the same in A and B.
// acc: x, y are row l / 4, columns 2 * (l % 4) and the next; z, w the same columns of row l / 4 + 8.
template <class T>
FASTLSTM_DEVICE void mma_k_slice(PerLane<float4>& acc, const PerLane<uint4>& top,
                                 const PerLane<uint4>& bottom, const PerLane<uint4>& b) {
  Mma<T>::run(acc[0], top[0].x, bottom[0].x, top[0].y, bottom[0].y, b[0].x, b[0].y);
  Mma<T>::run(acc[0], top[0].z, bottom[0].z, top[0].w, bottom[0].w, b[0].z, b[0].w);
}

// The minimum architecture of F; on older ones its kernel is empty.
template <class F>
constexpr int kMinArchitecture = F::kCluster ? 90 : 80;

template <class F, class S>
__global__ void __launch_bounds__(kWarps * 32, 1) persistent(const __grid_constant__ S s) {
#if defined(__CUDA_ARCH__)
  if constexpr (__CUDA_ARCH__ >= 10 * kMinArchitecture<F>) F::run(s, Warp());
#endif
}

// ctas: of the grid; cluster_dim: as Layout::cluster_dim.
struct LaunchConfig {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config;

  LaunchConfig(int ctas, int cluster_dim, int64_t shared_bytes, cudaStream_t stream) : attribute(), config() {
    config.gridDim = dim3(ctas), config.blockDim = dim3(kWarps * 32);
    config.dynamicSmemBytes = static_cast<size_t>(shared_bytes), config.stream = stream;
    config.attrs = &attribute, config.numAttrs = cluster_dim < 0 ? 0 : 1;
    if (cluster_dim > 0) {
      attribute.id = cudaLaunchAttributeClusterDimension;
      attribute.val.clusterDim.x = static_cast<unsigned>(cluster_dim);
      attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    } else {
      attribute.id = cudaLaunchAttributeCooperative, attribute.val.cooperative = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Allows launches with all the shared memory that the current device gives a CTA. Not with what this launch
// needs: the attribute is the kernel's, for all threads of the process, whose layers differ in size.
template <class Kernel>
cudaError_t set_kernel_attributes(Kernel kernel, int cluster_dim) {
  int device = 0, shared_bytes = 0;
  cudaError_t status = cudaGetDevice(&device);
  if (status == cudaSuccess)
    status = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status == cudaSuccess)
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (status != cudaSuccess || cluster_dim <= 8) return status;  // 8 is the portable size
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Max CTAs of this kernel that are resident on the current device at once; 0 if the runtime cannot tell.
template <class F, class S>
int max_resident_ctas(int cluster_dim, int64_t shared_bytes) {
  const auto kernel = persistent<F, S>;
  int device = 0, sms = 0, max_ctas = 0;
  cudaFuncAttributes attributes;
  bool known = cudaFuncGetAttributes(&attributes, kernel) == cudaSuccess &&
               attributes.ptxVersion >= kMinArchitecture<F> &&
               set_kernel_attributes(kernel, cluster_dim) == cudaSuccess;
  if (known && cluster_dim > 0) {
    const LaunchConfig launch(cluster_dim, cluster_dim, shared_bytes, nullptr);
    known = cudaOccupancyMaxActiveClusters(&max_ctas, kernel, &launch.config) == cudaSuccess;
    max_ctas *= cluster_dim;
  } else if (known) {
    known = cudaGetDevice(&device) == cudaSuccess &&
            cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device) == cudaSuccess &&
            cudaOccupancyMaxActiveBlocksPerMultiprocessor(&max_ctas, kernel, kWarps * 32,
                                                          static_cast<size_t>(shared_bytes)) == cudaSuccess;
    max_ctas *= sms;
  }
  if (!known) cudaGetLastError();
  return known ? max_ctas : 0;
}

// Launches F::run(s, warp) for all warps of a grid.
template <class F, class S>
cudaError_t launch_persistent(const S& s, int ctas, int cluster_dim, int64_t shared_bytes,
                              cudaStream_t stream) {
  const auto kernel = persistent<F, S>;
  const cudaError_t status = set_kernel_attributes(kernel, cluster_dim);
  if (status != cudaSuccess) return status;
  const LaunchConfig launch(ctas, cluster_dim, shared_bytes, stream);
  const cudaError_t launched = cudaLaunchKernelEx(&launch.config, kernel, s);
  // The caller handles the status; cudaGetLastError must not report it again elsewhere.
  if (launched != cudaSuccess) cudaGetLastError();
  return launched;
}

}  // namespace fastlstm::cuda
