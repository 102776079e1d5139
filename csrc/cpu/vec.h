// Vectors of one ISA and the activation functions on them. Included once by each isa_*.cpp, which first sets
//   FASTLSTM_ISA           the namespace, so that code compiled for several ISAs never merges at link time
//   FASTLSTM_VECTOR_BYTES  the register width
// GCC and Clang vector extensions only, so that one source compiles for x86-64 and aarch64.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__x86_64__)
// Intrinsics whose pass-through register is undefined read it in GCC 12's headers (gcc.gnu.org/PR105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "cell.h"
#include "cpu/sequence.h"

#define FASTLSTM_INLINE inline __attribute__((always_inline))

namespace fastlstm::FASTLSTM_ISA {

template <class T>
struct VecOf;
// Bits are unsigned: those of a NaN may overflow, and what becomes of them is of no matter.
template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(FASTLSTM_VECTOR_BYTES)));
  typedef uint32_t bits __attribute__((vector_size(FASTLSTM_VECTOR_BYTES)));
};
template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(FASTLSTM_VECTOR_BYTES)));
  typedef uint64_t bits __attribute__((vector_size(FASTLSTM_VECTOR_BYTES)));
};
// Numbers stored as T are computed with as Real<T>.
template <class T>
using Vec = typename VecOf<Real<T>>::type;
template <class T>
using Bits = typename VecOf<Real<T>>::bits;
template <class T>
constexpr int kWidth = FASTLSTM_VECTOR_BYTES / sizeof(Real<T>);

// Between vectors, and between scalars, of the same size.
template <class To, class From>
FASTLSTM_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// bfloat16 is the upper half of a float.
typedef uint16_t Halves __attribute__((vector_size(FASTLSTM_VECTOR_BYTES / 2)));
// From and to words below 2^16; GCC takes __builtin_convertvector apart into scalars.
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
FASTLSTM_INLINE Bits<float> words_of(Halves x) { return (Bits<float>)_mm512_cvtepu16_epi32((__m256i)x); }
FASTLSTM_INLINE Halves halves_of(Bits<float> x) { return (Halves)_mm512_cvtepi32_epi16((__m512i)x); }
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
FASTLSTM_INLINE Bits<float> words_of(Halves x) { return (Bits<float>)_mm256_cvtepu16_epi32((__m128i)x); }
FASTLSTM_INLINE Halves halves_of(Bits<float> x) {
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // of each half of the register
  return (Halves)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
#else
FASTLSTM_INLINE Bits<float> words_of(Halves x) { return __builtin_convertvector(x, Bits<float>); }
FASTLSTM_INLINE Halves halves_of(Bits<float> x) { return __builtin_convertvector(x, Halves); }
#endif
FASTLSTM_INLINE Vec<float> widen(Halves x) { return bit_cast<Vec<float>>(words_of(x) << 16); }
// To the nearest, to even between two; a NaN stays one.
FASTLSTM_INLINE Halves narrow(Vec<float> v) {
#if defined(FASTLSTM_ROUNDS_BF16)
  return (Halves)_mm512_cvtneps_pbh((__m512)v);
#else
  const Bits<float> bits = bit_cast<Bits<float>>(v);
  const Bits<float> rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  return halves_of(v == v ? rounded : Bits<float>{} + 0x7fc0u);
#endif
}

template <class T>
FASTLSTM_INLINE Vec<T> load(const T* p) {
  std::conditional_t<std::is_same_v<T, Bf16>, Halves, Vec<T>> v;
  std::memcpy(&v, p, sizeof(v));
  if constexpr (std::is_same_v<T, Bf16>)
    return widen(v);
  else
    return v;
}
template <class T>
FASTLSTM_INLINE void store(T* p, Vec<T> v) {
  if constexpr (std::is_same_v<T, Bf16>) {
    const Halves halves = narrow(v);
    std::memcpy(p, &halves, sizeof(halves));
  } else {
    std::memcpy(p, &v, sizeof(v));
  }
}
template <class T>
FASTLSTM_INLINE Real<T> real(T x) {
  if constexpr (std::is_same_v<T, Bf16>)
    return bit_cast<float>(uint32_t{x} << 16);
  else
    return x;
}
// One number, 0 or 1, for each of n flags, n <= width; the rest are 0.
template <class T>
FASTLSTM_INLINE Vec<T> load_flags(const uint8_t* p, int n) {
  constexpr int W = kWidth<T>;
  uint8_t part[W] = {};
  if (n < W) {
    std::memcpy(part, p, n);
    p = part;
  }
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
  // maskz, because GCC 12 warns of the undefined register that the plain intrinsics begin with.
  if constexpr (W == 16)
    return (Vec<T>)_mm512_maskz_cvtepi32_ps(
        0xffff, _mm512_maskz_cvtepu8_epi32(0xffff, _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
  else
    return (Vec<T>)_mm512_maskz_cvtepi32_pd(
        0xff, _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
  if constexpr (W == 8) {
    return (Vec<T>)_mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
  } else {
    int four;
    std::memcpy(&four, p, sizeof(four));
    return (Vec<T>)_mm256_cvtepi32_pd(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four)));
  }
#else
  Vec<T> v;
  for (int k = 0; k < W; ++k) v[k] = p[k];
  return v;
#endif
}
// What reading back a number stored as T gives.
template <class T>
FASTLSTM_INLINE Vec<T> rounded(Vec<T> v) {
  if constexpr (std::is_same_v<T, Bf16>)
    return widen(narrow(v));
  else
    return v;
}
// The first n <= width elements only, nothing beyond them touched; the rest read as zero.
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
FASTLSTM_INLINE Vec<float> load_part(const float* p, int n) {
  return _mm512_maskz_loadu_ps((1u << n) - 1, p);
}
FASTLSTM_INLINE Vec<double> load_part(const double* p, int n) {
  return _mm512_maskz_loadu_pd((1u << n) - 1, p);
}
FASTLSTM_INLINE void store_part(float* p, Vec<float> v, int n) { _mm512_mask_storeu_ps(p, (1u << n) - 1, v); }
FASTLSTM_INLINE void store_part(double* p, Vec<double> v, int n) {
  _mm512_mask_storeu_pd(p, (1u << n) - 1, v);
}
#elif defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 32
inline const int32_t kPartMask[16] = {-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0};
FASTLSTM_INLINE __m256i part_mask(int words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kPartMask + 8 - words));
}
FASTLSTM_INLINE Vec<float> load_part(const float* p, int n) { return _mm256_maskload_ps(p, part_mask(n)); }
FASTLSTM_INLINE Vec<double> load_part(const double* p, int n) {
  return _mm256_maskload_pd(p, part_mask(2 * n));
}
FASTLSTM_INLINE void store_part(float* p, Vec<float> v, int n) { _mm256_maskstore_ps(p, part_mask(n), v); }
FASTLSTM_INLINE void store_part(double* p, Vec<double> v, int n) {
  _mm256_maskstore_pd(p, part_mask(2 * n), v);
}
#else
template <class T>
FASTLSTM_INLINE Vec<T> load_part(const T* p, int n) {
  Vec<T> v = {};
  for (int k = 0; k < n; ++k) v[k] = p[k];
  return v;
}
template <class T>
FASTLSTM_INLINE void store_part(T* p, Vec<T> v, int n) {
  for (int k = 0; k < n; ++k) p[k] = v[k];
}
#endif
#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
FASTLSTM_INLINE Vec<float> load_part(const Bf16* p, int n) {
  return widen((Halves)_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), p));
}
FASTLSTM_INLINE void store_part(Bf16* p, Vec<float> v, int n) {
  _mm256_mask_storeu_epi16(p, static_cast<__mmask16>((1u << n) - 1), (__m256i)narrow(v));
}
#else
FASTLSTM_INLINE Vec<float> load_part(const Bf16* p, int n) {
  Halves halves = {};
  std::memcpy(&halves, p, n * sizeof(Bf16));
  return widen(halves);
}
FASTLSTM_INLINE void store_part(Bf16* p, Vec<float> v, int n) {
  const Halves halves = narrow(v);
  std::memcpy(p, &halves, n * sizeof(Bf16));
}
#endif
template <class T>
FASTLSTM_INLINE Vec<T> splat(T x) {
  return Vec<T>{} + x;
}

// Rows a and b of a matrix with their off-diagonal blocks of d x d elements swapped: the halves of a step of
// transpose().
template <class T, int d, std::size_t... lane>
FASTLSTM_INLINE void swap_blocks(Vec<T>& a, Vec<T>& b, std::index_sequence<lane...>) {
  constexpr int W = kWidth<T>;
#if defined(__clang__)
  const Vec<T> low = __builtin_shufflevector(a, b, (lane & d ? W + lane - d : lane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, (lane & d ? W + lane : lane + d)...);
#else
  const Vec<T> low = __builtin_shuffle(a, b, Bits<T>{(lane & d ? W + lane - d : lane)...});
  const Vec<T> high = __builtin_shuffle(a, b, Bits<T>{(lane & d ? W + lane : lane + d)...});
#endif
  a = low;
  b = high;
}

// The transpose of W rows of W elements.
template <class T, int d = kWidth<T> / 2>
FASTLSTM_INLINE void transpose(Vec<T>* rows) {
  if constexpr (d > 0) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth<T>; ++i)
      if (!(i & d)) swap_blocks<T, d>(rows[i], rows[i + d], std::make_index_sequence<kWidth<T>>());
    transpose<T, d / 2>(rows);
  }
}

// The sums of W vectors, one a lane.
template <class T, int d = kWidth<T> / 2>
FASTLSTM_INLINE Vec<T> sums(Vec<T>* v) {
  if constexpr (d == 0) {
    return v[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < d; ++i) {
      swap_blocks<T, d>(v[i], v[i + d], std::make_index_sequence<kWidth<T>>());
      v[i] += v[i + d];
    }
    return sums<T, d / 2>(v);
  }
}

// Per type: exp's argument limits, 2^n through the exponent field, ln 2 in two parts, and q of
//   expm1(r) = r + r^2 q(r),  |r| <= ln(2)/2,
// a Chebyshev fit whose error is below 0.2 ulp of expm1(r), summed in pairs because a chain of multiply-adds
// is slower.
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  // From kMax on 2^n is infinite and expm1(r) positive; from kMin on 2^n stays normal.
  static constexpr float kMax = 89.0f, kMin = -87.0f;
  static constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float kLog2e = 1.44269504f, kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr int kMantissa = 23, kBias = 127;
  template <class V>
  static FASTLSTM_INLINE V q(V r, V r2) {
    return (0.5f + 1.66665770e-1f * r) + r2 * ((4.16665546e-2f + 8.36317905e-3f * r) + r2 * 1.39261837e-3f);
  }
};
template <>
struct ExpConstants<double> {
  static constexpr double kMax = 710.0, kMin = -708.0;
  static constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLog2e = 1.442695040888963407, kLn2Hi = 6.93147180369123816490e-01,
                          kLn2Lo = 1.90821492927058781614e-10;
  static constexpr int kMantissa = 52, kBias = 1023;
  template <class V>
  static FASTLSTM_INLINE V q(V r, V r2) {
    const V r4 = r2 * r2;
    const V low =
        (0.5 + 1.6666666666666671e-1 * r) + r2 * (4.1666666666666670e-2 + 8.3333333333261351e-3 * r);
    const V middle = (1.3888888888883749e-3 + 1.9841269874820625e-4 * r) +
                     r2 * (2.4801587325547742e-5 + 2.7557255400206424e-6 * r);
    const V high = (2.7557273643110295e-7 + 2.5105217004720745e-8 * r) + r2 * 2.0914686968086877e-9;
    return low + r4 * (middle + r4 * high);
  }
};

// x = n ln 2 + r: scale = 2^n and p = expm1(r). NaN passes through p.
template <class T>
FASTLSTM_INLINE void reduce_exp(Vec<T> x, Vec<T>& scale, Vec<T>& p) {
  using C = ExpConstants<T>;
  const Vec<T> shifted = x * C::kLog2e + C::kRound;
  const Vec<T> n = shifted - C::kRound;
  const Vec<T> r = (x - n * C::kLn2Hi) - n * C::kLn2Lo;
  const Vec<T> r2 = r * r;
  p = r + r2 * C::q(r, r2);
  Bits<T> i;
  std::memcpy(&i, &shifted, sizeof(i));
  // The low bits of `shifted` hold n; what its own exponent adds is shifted out.
  const Bits<T> s = (i + C::kBias) << C::kMantissa;
  std::memcpy(&scale, &s, sizeof(scale));
}

// The activations; max error and range as tested by tests/cpu/test_activations.py: 2.5 ulp for every
// finite argument, down to results of 1.2e-38 (float) and 3e-308 (double), below which sigmoid is 0 where
// exp(-x) has no finite value.
template <class T>
struct Activation {
  using V = Vec<T>;
  // 1 / (1 + exp(-x))
  static FASTLSTM_INLINE V sigmoid(V x) {
    using C = ExpConstants<T>;
    V z = -x;
    z = z > C::kMax ? splat<T>(C::kMax) : z;  // comparisons are false for NaN, which so survives
    z = z < C::kMin ? splat<T>(C::kMin) : z;
    V scale, p;
    reduce_exp<T>(z, scale, p);
    // scale may be infinite, and scale + scale * p would then be NaN for a negative p.
    return T(1) / (T(1) + scale * (T(1) + p));
  }
  // expm1(2x) / (expm1(2x) + 2): no cancellation near 0; on |x|, where an error of expm1 cancels in the
  // quotient
  static FASTLSTM_INLINE V tanh(V x) {
    constexpr T kLimit = sizeof(T) == 4 ? 10 : 20;  // tanh is 1 to the last bit from 9.02 and 19.07 on
    Bits<T> bits;
    std::memcpy(&bits, &x, sizeof(bits));
    const Bits<T> sign = bits >> (8 * sizeof(T) - 1) << (8 * sizeof(T) - 1);
    bits ^= sign;
    V z;
    std::memcpy(&z, &bits, sizeof(z));
    z = z + z;
    z = z > 2 * kLimit ? splat<T>(2 * kLimit) : z;
    V scale, p;
    reduce_exp<T>(z, scale, p);
    const V em1 = scale * p + (scale - T(1));
    const V positive = em1 / (em1 + T(2));
    std::memcpy(&bits, &positive, sizeof(bits));
    bits |= sign;
    std::memcpy(&z, &bits, sizeof(z));
    return z;
  }
};

#if defined(__x86_64__) && FASTLSTM_VECTOR_BYTES == 64
// For results of bfloat16, which keeps 2^-9: an estimated reciprocal with one step of Newton's method, 2^-22,
// in a third of the division's time.
struct FastActivation {
  using V = Vec<float>;
  static FASTLSTM_INLINE V sigmoid(V x) {
    // NaN passes: a comparison with it is false. Below -80 the reciprocal would lose its exponent: zero.
    const __mmask16 nonzero = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-80.0f), _CMP_NLT_UQ);
    V z = -x;
    z = z < -80.0f ? splat<float>(-80.0f) : z;
    V scale, p;
    reduce_exp<float>(z, scale, p);
    const V d = 1.0f + (scale + scale * p), r = (V)_mm512_rcp14_ps((__m512)d);
    return (V)_mm512_maskz_mul_ps(nonzero, (__m512)r, (__m512)(2.0f - d * r));
  }
  static FASTLSTM_INLINE V tanh(V x) {
    V z = x + x;
    z = z > 20.0f ? splat<float>(20.0f) : z;
    z = z < -20.0f ? splat<float>(-20.0f) : z;
    V scale, p;
    reduce_exp<float>(z, scale, p);
    const V em1 = scale * p + (scale - 1.0f), d = em1 + 2.0f, r = (V)_mm512_rcp14_ps((__m512)d);
    return em1 * (r * (2.0f - d * r));
  }
};
template <>
struct Activation<Bf16> : FastActivation {};
#else
template <>
struct Activation<Bf16> : Activation<float> {};
#endif

}  // namespace fastlstm::FASTLSTM_ISA
