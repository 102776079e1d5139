// The intrinsics of AVX-512 that csrc/cpu uses, lane by lane in plain C++, in place of the instructions: so
// that kernels written for AVX-512, AVX512_BF16 and the VNNIs run on a CPU without them. Included before
// anything else (-include), with -Wno-psabi. Where an instruction reads or writes part of a vector, only that
// part is touched.
#pragma once

#include <cpuid.h>
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

// All regions of csrc/cpu/target.h, whatever they ask for, and what stands here: one convention for vectors
// as arguments.
#define FASTLSTM_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define FASTLSTM_BEGIN_TARGET(features) \
  FASTLSTM_PRAGMA(clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function))
#define FASTLSTM_END_TARGET _Pragma("clang attribute pop")
#else
#pragma GCC diagnostic ignored "-Wignored-attributes"  // of vectors as template arguments, which need none
#define FASTLSTM_BEGIN_TARGET(features) _Pragma("GCC push_options") _Pragma("GCC target(\"avx2,fma\")")
#define FASTLSTM_END_TARGET _Pragma("GCC pop_options")
#endif

FASTLSTM_BEGIN_TARGET("")
namespace emulated {

// The lanes of a vector as numbers of type E.
template <class E, class Vector>
struct Lanes {
  static constexpr int kCount = sizeof(Vector) / sizeof(E);
  E lane[kCount];
  Lanes() : lane{} {}
  explicit Lanes(const Vector& v) { std::memcpy(lane, &v, sizeof(v)); }
  operator Vector() const {
    Vector v;
    std::memcpy(&v, lane, sizeof(v));
    return v;
  }
};
template <class E>
using L512 = Lanes<E, __m512i>;

// A vector whose lane k is f(k).
template <class E, class Vector, class F>
Vector each(F&& f) {
  Lanes<E, Vector> out;
  for (int k = 0; k < out.kCount; ++k) out.lane[k] = static_cast<E>(f(k));
  return out;
}
inline bool set(uint64_t mask, int k) { return mask >> k & 1; }

template <class E, class Vector>
Vector load(uint64_t mask, const void* from) {
  return each<E, Vector>([&](int k) {
    E x = 0;
    if (set(mask, k)) std::memcpy(&x, static_cast<const E*>(from) + k, sizeof(x));
    return x;
  });
}
template <class E, class Vector>
void store(void* to, uint64_t mask, const Vector& v) {
  const Lanes<E, Vector> from(v);
  for (int k = 0; k < from.kCount; ++k)
    if (set(mask, k)) std::memcpy(static_cast<E*>(to) + k, from.lane + k, sizeof(E));
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
// To the nearest, to even between two; denormal numbers are zero, as the instruction takes them.
inline uint16_t to_bf16(float x) {
  const uint32_t b = bits<uint32_t>(x);
  if (std::isnan(x)) return static_cast<uint16_t>(b >> 16 | 0x40);
  if (std::fpclassify(x) == FP_SUBNORMAL) return static_cast<uint16_t>(b >> 31 << 15);
  return static_cast<uint16_t>((b + 0x7fff + (b >> 16 & 1)) >> 16);
}
inline float from_bf16(uint16_t x) { return bits<float>(uint32_t{x} << 16); }
// With the 14 bits of a reciprocal that the instruction promises, and no more.
inline float reciprocal14(float x) {
  const float exact = 1.0f / x;
  return std::isfinite(exact) ? bits<float>((bits<uint32_t>(exact) + 0x100) & ~0x1ffu) : exact;
}

inline __m512 add_products_bf16(__m512 sums, __m512bh a, __m512bh b) {
  const Lanes<float, __m512> sum(sums);
  const Lanes<uint16_t, __m512bh> x(a), y(b);
  return each<float, __m512>([&](int k) {
    const float odd = std::fma(from_bf16(x.lane[2 * k + 1]), from_bf16(y.lane[2 * k + 1]), sum.lane[k]);
    return std::fma(from_bf16(x.lane[2 * k]), from_bf16(y.lane[2 * k]), odd);
  });
}
// Four products of uint8 and int8 to each sum.
template <class Vector>
Vector add_products_int8(const Vector& sums, const Vector& a, const Vector& b) {
  const Lanes<int32_t, Vector> sum(sums);
  const Lanes<uint8_t, Vector> x(a);
  const Lanes<int8_t, Vector> y(b);
  return each<int32_t, Vector>([&](int k) {
    int32_t s = sum.lane[k];
    for (int j = 4 * k; j < 4 * k + 4; ++j) s += int32_t{x.lane[j]} * y.lane[j];
    return s;
  });
}

inline __m256i narrow_words(__m512i v) {
  const L512<uint32_t> from(v);
  return each<uint16_t, __m256i>([&](int k) { return from.lane[k]; });
}
inline __m128i narrow_bytes(__m512i v) {
  const L512<uint32_t> from(v);
  return each<uint8_t, __m128i>([&](int k) { return from.lane[k]; });
}
inline __m512i widen_words(__m256i v) {
  const Lanes<uint16_t, __m256i> from(v);
  return each<uint32_t, __m512i>([&](int k) { return from.lane[k]; });
}
inline __m512i widen_bytes(uint64_t mask, __m128i v) {
  const Lanes<uint8_t, __m128i> from(v);
  return each<uint32_t, __m512i>([&](int k) { return set(mask, k) ? from.lane[k] : 0; });
}
inline __m512 floats_of(uint64_t mask, __m512i v) {
  const L512<int32_t> from(v);
  return each<float, __m512>([&](int k) { return set(mask, k) ? from.lane[k] : 0; });
}
inline __m512d doubles_of(uint64_t mask, __m256i v) {
  const Lanes<int32_t, __m256i> from(v);
  return each<double, __m512d>([&](int k) { return set(mask, k) ? from.lane[k] : 0; });
}
inline __m512i nearest_integers(__m512 v) {
  const Lanes<float, __m512> from(v);
  return each<int32_t, __m512i>([&](int k) { return std::nearbyint(from.lane[k]); });
}
inline __m256bh rounded16(__m512 v) {
  const Lanes<float, __m512> from(v);
  return each<uint16_t, __m256bh>([&](int k) { return to_bf16(from.lane[k]); });
}
inline __m512bh rounded32(__m512 high, __m512 low) {
  const Lanes<float, __m512> upper(high), lower(low);
  return each<uint16_t, __m512bh>(
      [&](int k) { return to_bf16(k < 16 ? lower.lane[k] : upper.lane[k - 16]); });
}
inline __m512i shifted_left(__m512i v, int count) {
  const L512<uint32_t> from(v);
  return each<uint32_t, __m512i>([&](int k) { return from.lane[k] << count; });
}
inline __m512i either(__m512i a, __m512i b) {
  const L512<uint64_t> x(a), y(b);
  return each<uint64_t, __m512i>([&](int k) { return x.lane[k] | y.lane[k]; });
}
inline __mmask16 not_less(__m512 a, __m512 b) {  // true where one is NaN
  const Lanes<float, __m512> x(a), y(b);
  uint16_t mask = 0;
  for (int k = 0; k < 16; ++k) mask = static_cast<uint16_t>(mask | !(x.lane[k] < y.lane[k]) << k);
  return mask;
}
inline __m512 product(uint64_t mask, __m512 a, __m512 b) {
  const Lanes<float, __m512> x(a), y(b);
  return each<float, __m512>([&](int k) { return set(mask, k) ? x.lane[k] * y.lane[k] : 0; });
}
inline __m512 product_sum(__m512 a, __m512 b, __m512 c) {
  const Lanes<float, __m512> x(a), y(b), z(c);
  return each<float, __m512>([&](int k) { return std::fma(x.lane[k], y.lane[k], z.lane[k]); });
}
inline __m512 reciprocals14(__m512 v) {
  const Lanes<float, __m512> from(v);
  return each<float, __m512>([&](int k) { return reciprocal14(from.lane[k]); });
}

// A CPU that has everything.
inline int all_features(unsigned* a, unsigned* b, unsigned* c, unsigned* d) {
  *a = *b = *c = *d = ~0u;
  return 1;
}

}  // namespace emulated
FASTLSTM_END_TARGET

// clang-format off
#define __builtin_cpu_supports(feature) 1
#define __get_cpuid_count(leaf, subleaf, a, b, c, d) emulated::all_features(a, b, c, d)
#undef _mm512_slli_epi32
#undef _mm512_cmp_ps_mask
#undef _mm256_dpbusd_epi32
#undef _mm256_dpbusd_avx_epi32
#define _mm512_loadu_si512(p) emulated::load<uint64_t, __m512i>(~0ull, p)
#define _mm512_storeu_si512(p, v) emulated::store<uint64_t, __m512i>(p, ~0ull, v)
#define _mm512_storeu_ps(p, v) emulated::store<float, __m512>(p, ~0ull, v)
#define _mm512_maskz_loadu_ps(m, p) emulated::load<float, __m512>(m, p)
#define _mm512_maskz_loadu_pd(m, p) emulated::load<double, __m512d>(m, p)
#define _mm512_mask_storeu_ps(p, m, v) emulated::store<float, __m512>(p, m, v)
#define _mm512_mask_storeu_pd(p, m, v) emulated::store<double, __m512d>(p, m, v)
#define _mm512_maskz_loadu_epi16(m, p) emulated::load<uint16_t, __m512i>(m, p)
#define _mm512_mask_storeu_epi16(p, m, v) emulated::store<uint16_t, __m512i>(p, m, v)
#define _mm256_maskz_loadu_epi16(m, p) emulated::load<uint16_t, __m256i>(m, p)
#define _mm256_mask_storeu_epi16(p, m, v) emulated::store<uint16_t, __m256i>(p, m, v)
#define _mm512_set1_epi32(x) ([](int32_t each_lane) { return emulated::each<int32_t, __m512i>([&](int) { return each_lane; }); }(x))
#define _mm512_set1_ps(x) ([](float each_lane) { return emulated::each<float, __m512>([&](int) { return each_lane; }); }(x))
#define _mm512_cvtepi32_epi16(v) emulated::narrow_words(v)
#define _mm512_cvtepi32_epi8(v) emulated::narrow_bytes(v)
#define _mm512_cvtepu16_epi32(v) emulated::widen_words(v)
#define _mm512_maskz_cvtepu8_epi32(m, v) emulated::widen_bytes(m, v)
#define _mm512_cvtepi32_ps(v) emulated::floats_of(~0ull, v)
#define _mm512_maskz_cvtepi32_ps(m, v) emulated::floats_of(m, v)
#define _mm512_maskz_cvtepi32_pd(m, v) emulated::doubles_of(m, v)
#define _mm512_cvtps_epi32(v) emulated::nearest_integers(v)
#define _mm512_cvtneps_pbh(v) emulated::rounded16(v)
#define _mm512_cvtne2ps_pbh(high, low) emulated::rounded32(high, low)
#define _mm512_slli_epi32(v, n) emulated::shifted_left(v, n)
#define _mm512_or_si512(a, b) emulated::either(a, b)
#define _mm512_cmp_ps_mask(a, b, predicate) emulated::not_less(a, b) // _CMP_NLT_UQ, the only one in use
#define _mm512_maskz_mul_ps(m, a, b) emulated::product(m, a, b)
#define _mm512_fmadd_ps(a, b, c) emulated::product_sum(a, b, c)
#define _mm512_rcp14_ps(v) emulated::reciprocals14(v)
#define _mm512_dpbf16_ps(sums, a, b) emulated::add_products_bf16(sums, a, b)
#define _mm512_dpbusd_epi32(sums, a, b) emulated::add_products_int8<__m512i>(sums, a, b)
#define _mm256_dpbusd_epi32(sums, a, b) emulated::add_products_int8<__m256i>(sums, a, b)
#define _mm256_dpbusd_avx_epi32(sums, a, b) emulated::add_products_int8<__m256i>(sums, a, b)
// clang-format on
