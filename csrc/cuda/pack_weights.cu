// Packs W_hh in the order of the persistent kernels' operands, once per call; a thread writes one lane's 16
// bytes.
#include "cuda/launch.cuh"
#include "cuda/persistent.h"

namespace fastlstm::cuda {
namespace {

// Rounds to TF32, to nearest, ties away from zero, as cvt.rna.tf32 does.
FASTLSTM_HD float rounded(float x) {
  union {
    float value;
    uint32_t bits;
  } u = {x};
  if (x - x == 0) u.bits = (u.bits + 0x1000u) & 0xffffe000u;
  if (x != x) u.bits |= 0x400000u;  // a NaN with payload in the low bits only would become infinity
  return u.value;
}
FASTLSTM_HD __half rounded(__half x) { return x; }
FASTLSTM_HD __nv_bfloat16 rounded(__nv_bfloat16 x) { return x; }

template <class T>
struct Pack {
  // half: index in [iters, 8 warps, m_tiles, 2] of a CTA.
  template <int V>
  static __device__ __forceinline__ void run(const PackWeights<T>& s, int d, int64_t half, int64_t lane) {
    constexpr int E = 16 / sizeof(T);  // elements per lane
    const Layout& p = s.layout;
    const int64_t per_cta = int64_t{p.iters} * kWarps * p.m_tiles * 2;
    const int cta = static_cast<int>(half / per_cta);
    const int64_t warp_iter = half % per_cta / (2 * p.m_tiles);
    const int warp = static_cast<int>(warp_iter % kWarps);
    const int64_t iter = warp_iter / kWarps, within = half % (2 * p.m_tiles) / 2;
    // The fragment's m tile and K slice in A.
    int64_t m_tile, k_slice;
    if (p.reduce_scatter) {
      const int64_t at = iter * kWarps + warp, all = p.ctas_per_group * p.units / 16;
      m_tile = at < all ? (at + cta * p.units / 16) % all : at, k_slice = within;
    } else {
      m_tile = warp / p.split_k * p.m_tiles + within, k_slice = warp % p.split_k * p.iters + iter;
    }
    const int64_t m = m_tile * 16 + half % 2 * 8 + lane / 4;
    AlignedVecN<T, E> word;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int64_t k = (k_slice * 4 + lane % 4) * E + e;
      // (gate, unit): row of W_hh
      int64_t gate, unit, column;
      if (s.phase == Phase::forward && p.single) {
        gate = m / 16 % 4, unit = m / 64 * 16 + m % 16, column = k;
      } else if (s.phase == Phase::forward) {
        gate = m % 4, unit = int64_t{cta} * p.units + m / 4, column = k;
      } else if (p.reduce_scatter) {
        gate = k / p.units, unit = int64_t{cta} * p.units + k % p.units, column = m;
      } else {
        const int64_t part = 4 * p.units;
        gate = k % part / p.units, unit = k / part * p.units + k % p.units;
        column = int64_t{cta} * p.units + m;
      }
      T x;
      narrow(0.0f, x);
      if (unit < s.H && column < s.H) {
        x = rounded(s.w_hh[d][(gate * s.H + unit) * s.row_stride[d] + column * s.column_stride[d]]);
      }
      word.v[e] = x;
    }
    reinterpret_cast<AlignedVecN<T, E>*>(
        s.packed_weights)[(d * p.ctas_per_group * per_cta + half) * 32 + lane] = word;
  }
};

}  // namespace

template <class T>
cudaError_t launch_pack_weights(const PackWeights<T>& s, cudaStream_t stream) {
  return launch<Pack<T>, 1>(s, {32, s.words() / s.D / 32, s.D}, stream);
}

template cudaError_t launch_pack_weights<float>(const PackWeights<float>&, cudaStream_t);
template cudaError_t launch_pack_weights<__half>(const PackWeights<__half>&, cudaStream_t);
template cudaError_t launch_pack_weights<__nv_bfloat16>(const PackWeights<__nv_bfloat16>&, cudaStream_t);

}  // namespace fastlstm::cuda
