// W_hh in the order of the persistent kernels' products, once per call: a thread takes the 16 bytes of one
// lane.
#include "cuda/launch.cuh"
#include "cuda/persistent.h"

namespace fastlstm::cuda {
namespace {

// To nearest, ties away from zero, as cvt.rna.tf32 rounds: what the tensor cores read of a float.
FASTLSTM_HD float rounded(float x) {
  union {
    float value;
    uint32_t bits;
  } u = {x};
  if (x - x == 0) u.bits = (u.bits + 0x1000u) & 0xffffe000u;
  if (x != x) u.bits |= 0x400000u;  // a NaN of low bits alone would read as infinity
  return u.value;
}
FASTLSTM_HD __half rounded(__half x) { return x; }
FASTLSTM_HD __nv_bfloat16 rounded(__nv_bfloat16 x) { return x; }

template <class T>
struct Pack {
  // `half` counts the [rounds, 8 warps, width, 2] of a member, `lane` its lanes.
  template <int V>
  static __device__ __forceinline__ void run(const PackWeights<T>& s, int d, int64_t half, int64_t lane) {
    constexpr int E = 16 / sizeof(T);  // elements of a lane
    const Layout& p = s.layout;
    const int64_t per_member = int64_t{p.rounds} * kPlanWarps * p.width * 2;
    const int member = static_cast<int>(half / per_member);
    const int64_t of_warp = half % per_member / (2 * p.width);
    const int warp = static_cast<int>(of_warp % kPlanWarps);
    const int64_t round = of_warp / kPlanWarps, within = half % (2 * p.width) / 2;
    // Where the fragment lies in A, in 16 rows and 64 bytes of K.
    int64_t tile, chunk;
    if (p.scatters) {
      const int64_t at = round * kPlanWarps + warp, all = p.members * p.units / 16;
      tile = at < all ? (at + member * p.units / 16) % all : at, chunk = within;
    } else {
      tile = warp / p.parts * p.width + within, chunk = warp % p.parts * p.rounds + round;
    }
    const int64_t m = tile * 16 + half % 2 * 8 + lane / 4;
    Packed<T, E> word;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int64_t k = (chunk * 4 + lane % 4) * E + e;
      // (gate, unit) of the row and the column of W_hh
      int64_t gate, unit, column;
      if (s.phase == Phase::forward && p.single) {
        gate = m / 16 % 4, unit = m / 64 * 16 + m % 16, column = k;
      } else if (s.phase == Phase::forward) {
        gate = m % 4, unit = int64_t{member} * p.units + m / 4, column = k;
      } else if (p.scatters) {
        gate = k / p.units, unit = int64_t{member} * p.units + k % p.units, column = m;
      } else {
        const int64_t part = 4 * p.units;
        gate = k % part / p.units, unit = k / part * p.units + k % p.units;
        column = int64_t{member} * p.units + m;
      }
      T x;
      narrow(0.0f, x);
      if (unit < s.H && column < s.H) {
        x = rounded(s.w_hh[d][(gate * s.H + unit) * s.row[d] + column * s.column[d]]);
      }
      word.v[e] = x;
    }
    reinterpret_cast<Packed<T, E>*>(s.packed)[(d * p.members * per_member + half) * 32 + lane] = word;
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
