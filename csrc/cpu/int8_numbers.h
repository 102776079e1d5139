// Vectors of int8 products of one instruction set, and rows quantized for them. Included by
// cpu/int8_products.h, inside the target region of its includer.
//
//   Factor      element of a quantized row: uint8_t holding q with VNNI, whose instruction takes one unsigned
//               operand, otherwise int16_t holding q - zero
//   kGroup      products that dot() sums
#pragma once

#include "cpu/int8.h"
#include "cpu/vec.h"

namespace fastlstm::FASTLSTM_ISA {

typedef int32_t Ints __attribute__((vector_size(FASTLSTM_VECTOR_BYTES)));
constexpr int64_t kLanes = FASTLSTM_VECTOR_BYTES / 4;

#if defined(FASTLSTM_VNNI)
using Factor = uint8_t;
constexpr int64_t kGroup = 4;
using WeightVector = Ints;
FASTLSTM_INLINE WeightVector load_weights(const int8_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
FASTLSTM_INLINE Ints dot(Ints sum, Ints factors, WeightVector weights) {
#if FASTLSTM_VECTOR_BYTES == 64
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)factors, (__m512i)weights);
#else
  return (Ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)factors, (__m256i)weights);
#endif
}
#else
using Factor = int16_t;
constexpr int64_t kGroup = 2;
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
// Words, because the instruction for bytes saturates.
using WeightVector = __m256i;
FASTLSTM_INLINE WeightVector load_weights(const int8_t* p) {
  return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
FASTLSTM_INLINE Ints dot(Ints sum, Ints factors, WeightVector weights) {
  return sum + (Ints)_mm256_madd_epi16((__m256i)factors, weights);
}
#else
struct WeightVector {
  Ints even, odd;
};
FASTLSTM_INLINE WeightVector load_weights(const int8_t* p) {
  WeightVector w;
  for (int64_t k = 0; k < kLanes; ++k) w.even[k] = p[2 * k], w.odd[k] = p[2 * k + 1];
  return w;
}
FASTLSTM_INLINE Ints dot(Ints sum, Ints factors, WeightVector weights) {
  return sum + (factors << 16 >> 16) * weights.even + (factors >> 16) * weights.odd;
}
#endif
#endif

FASTLSTM_INLINE Ints load_ints(const int32_t* p) {
  Ints v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// kGroup factors in every lane.
FASTLSTM_INLINE Ints broadcast(const Factor* p) {
  static_assert(kGroup * sizeof(Factor) == 4);
  int32_t group;
  std::memcpy(&group, p, sizeof(group));
  return Ints{} + group;
}

FASTLSTM_INLINE Vec<float> to_float(Ints v) {
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_cvtepi32_ps((__m512i)v);
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_cvtepi32_ps((__m256i)v);
#else
  return __builtin_convertvector(v, Vec<float>);
#endif
}
// a b + c rounded once where the instruction set can: the compiler's own choice differs from tile to tile,
// and results would depend on the number of threads.
FASTLSTM_INLINE Vec<float> multiply_add(Vec<float> a, Vec<float> b, Vec<float> c) {
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
  return (Vec<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
  return (Vec<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  Vec<float> sum;
  for (int64_t k = 0; k < kLanes; ++k) {
#if defined(__aarch64__)
    sum[k] = __builtin_fmaf(a[k], b[k], c[k]);
#else
    sum[k] = a[k] * b[k] + c[k];
#endif
  }
  return sum;
#endif
}
// To the nearest, to even between two: of a product that is rounded before, as on a CPU without FMA.
FASTLSTM_INLINE Ints to_nearest(Vec<float> v) {
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
  return (Ints)_mm512_cvtps_epi32((__m512)v);
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
  return (Ints)_mm256_cvtps_epi32((__m256)v);
#elif defined(__x86_64__)
  return (Ints)_mm_cvtps_epi32((__m128)v);
#else
  Ints n;
  for (int64_t k = 0; k < kLanes; ++k) n[k] = static_cast<int32_t>(__builtin_nearbyintf(v[k]));
  return n;
#endif
}

// Elements of a quantized row of depth K: whole vectors, of a multiple of kGroup. With AMX an odd multiple of
// a tile's 64 bytes, so that 16 rows fall into different sets of the L1.
#if defined(FASTLSTM_INT8_AMX)
inline int64_t factor_stride(int64_t K) { return (K + 63) / 64 * 64 | 64; }
#else
inline int64_t factor_stride(int64_t K) { return (K + kLanes - 1) / kLanes * kLanes; }
#endif

struct Min {
  template <class V>
  FASTLSTM_INLINE static V of(V a, V b) {
    return a < b ? a : b;
  }
};
struct Max {
  template <class V>
  FASTLSTM_INLINE static V of(V a, V b) {
    return a > b ? a : b;
  }
};
struct Sum {
  template <class V>
  FASTLSTM_INLINE static V of(V a, V b) {
    return a + b;
  }
};
// Of all lanes.
template <class F>
FASTLSTM_INLINE float reduced(Vec<float> v) {
  typedef float Quarter __attribute__((vector_size(16)));
  Quarter parts[FASTLSTM_VECTOR_BYTES / 16], all;
  std::memcpy(parts, &v, sizeof(v));
  all = parts[0];
  for (int k = 1; k < FASTLSTM_VECTOR_BYTES / 16; ++k) all = F::of(all, parts[k]);
  return F::of(F::of(all[0], all[1]), F::of(all[2], all[3]));
}

// v = scale (q - zero). Without VNNI q - zero is stored, and zero is 0.
struct Quantization {
  float scale;
  int32_t zero;
};

// Quantizes v [K] into q [factor_stride(K)]: q in [0, 255], between the least and the largest element, or
// zero. Behind the row q is that of 0; the packed weights there are 0.
inline Quantization quantize_row(const float* v, int64_t K, Factor* q) {
  const auto part = [&](int64_t k) {
    return k + kLanes <= K ? load(v + k) : load_part(v + k, static_cast<int>(K - k));
  };
  Vec<float> low = {}, high = {}, finite = {};  // x - x: zero, or NaN of an infinity or a NaN
  for (int64_t k = 0; k < K; k += kLanes) {
    const Vec<float> x = part(k);
    low = x < low ? x : low;
    high = x > high ? x : high;
    finite += x - x;
  }
  const float min = reduced<Min>(low);
  // Halves, because the difference of two large numbers overflows.
  const float scale = (0.5f * reduced<Max>(high) - 0.5f * min) * (2.0f / 255.0f);
  const bool is_finite = reduced<Sum>(finite) == 0;
  constexpr float kMinScale = 1e-30f;  // less counts as zero: its reciprocal would overflow
  if (!is_finite || scale < kMinScale) {
    std::fill_n(q, factor_stride(K), Factor(0));
    return {is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float inverse = 1.0f / scale;
  const int32_t zero = to_nearest(splat<float>(-min * inverse))[0];
  for (int64_t k = 0; k < K; k += kLanes) {
    Ints n = to_nearest(part(k) * inverse) + zero;
    n = n > 255 ? Ints{} + 255 : n;
#if !defined(FASTLSTM_VNNI)
    n -= zero;
#endif
#if defined(FASTLSTM_VNNI) && FASTLSTM_VECTOR_BYTES == 64
    _mm_storeu_si128(reinterpret_cast<__m128i*>(q + k), _mm512_cvtepi32_epi8((__m512i)n));
#else
    for (int64_t j = 0; j < kLanes; ++j) q[k + j] = static_cast<Factor>(n[j]);
#endif
  }
#if defined(FASTLSTM_VNNI)
  return {scale, zero};
#else
  return {scale, 0};
#endif
}

}  // namespace fastlstm::FASTLSTM_ISA
