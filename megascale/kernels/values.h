// Values of bf16 and fp32, and e^x, for the passes of kernels.cpp and attention.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

struct bf16 {
  uint16_t bits;
};

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float widen(float value) { return value; }
inline float widen(bf16 value) { return bits_to_float(uint32_t(value.bits) << 16); }

inline void put(float& place, float value) { place = value; }

// Round to nearest even. NaN stays NaN: those that arithmetic makes, or that were bf16 before, have
// no low bits that could carry over into the sign.
inline void put(bf16& place, float value) {
  const uint32_t bits = float_to_bits(value);
  place.bits = uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// ---- 16 numbers at a time; every operation on them is one of a float, too

constexpr int64_t LANES = 16;
typedef float Lanes __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

template <typename V>
inline V all_of(float value) {
  return V{} + value;
}

inline void load(Lanes& to, const float* from) { std::memcpy(&to, from, sizeof to); }
inline void load(float& to, const float* from) { to = *from; }
inline void load(float& to, const bf16* from) { to = widen(*from); }
inline void load(Lanes& to, const bf16* from) {
#ifdef __AVX512F__
  const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  to = (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16);
#else
  for (int64_t i = 0; i < LANES; ++i) to[i] = widen(from[i]);
#endif
}

inline void store(float* to, const Lanes& from) { std::memcpy(to, &from, sizeof from); }
inline void store(float* to, float from) { *to = from; }
inline void store(bf16* to, float from) { put(*to, from); }
// As `put`, but that the instruction leaves no denormal numbers.
inline void store(bf16* to, const Lanes& from) {
#ifdef __AVX512BF16__
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh((__m512)from));
#else
  for (int64_t i = 0; i < LANES; ++i) put(to[i], from[i]);
#endif
}

inline uint32_t word_of(float value) { return float_to_bits(value); }
inline Words word_of(const Lanes& value) { return (Words)value; }
inline float number_of(uint32_t word) { return bits_to_float(word); }
inline Lanes number_of(const Words& word) { return (Lanes)word; }

// The larger one; the second where one is NaN.
inline float larger(float a, float b) { return a > b ? a : b; }
inline Lanes larger(const Lanes& a, const Lanes& b) {
#ifdef __AVX512F__
  return (Lanes)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

template <typename V>
inline V at_least(float bound, const V& value) {
  return larger(all_of<V>(bound), value);
}

inline float root(float value) { return std::sqrt(value); }
inline Lanes root(const Lanes& value) {
#ifdef __AVX512F__
  return (Lanes)_mm512_sqrt_ps((__m512)value);
#else
  Lanes found;
  for (int64_t i = 0; i < LANES; ++i) found[i] = std::sqrt(value[i]);
  return found;
#endif
}

inline float reciprocal(float value) { return 1.0f / value; }
inline Lanes reciprocal(const Lanes& value) {
#ifdef __AVX512F__  // a step of Newton's from 14 bits; dividing takes ten times as long as this
  const Lanes guess = (Lanes)_mm512_rcp14_ps((__m512)value);
  return guess * (2.0f - value * guess);
#else
  return 1.0f / value;
#endif
}

// Calls f(i, what) for the numbers of a row: with a Lanes for 16 from i on, with a float for one.
template <typename F>
inline void along(int64_t begin, int64_t end, F f) {
  int64_t i = begin;
  for (; i + LANES <= end; i += LANES) f(i, Lanes{});
  for (; i < end; ++i) f(i, 0.0f);
}

struct Sum {
  Lanes lanes = {};
  float rest = 0.0f;
  void add(const Lanes& some) { lanes += some; }
  void add(float one) { rest += one; }
  float total() const {
    float sum = rest;
    for (int64_t i = 0; i < LANES; ++i) sum += lanes[i];
    return sum;
  }
};

// 2^x of x at most 127; 0 from -126.5 down, where the exponent becomes that of zero. Polynomials
// are the best of their degree between -1/2 and 1/2 that are 1 at 0.
constexpr float LEAST_POWER = -127.0f;

// Puts the whole number next to x, and the bias of the exponent, into the lowest bits of a number.
constexpr float TO_LOW_BITS = 12582912.0f + 127.0f;

template <typename V>
inline V times_power(const V& number, const V& low_bits) {
  return number * number_of(word_of(low_bits) << 23);
}

// To 2.9e-6, for what becomes bf16.
template <typename V>
inline V short_power_of_two(const V& x) {
  const V bounded = at_least(LEAST_POWER, x);
  const V whole = bounded + TO_LOW_BITS;
  const V rest = bounded - (whole - TO_LOW_BITS);
  V sum = rest * 9.5828530939e-03f + 5.5906424599e-02f;
  sum = sum * rest + 2.4024098610e-01f;
  sum = sum * rest + 6.9312419342e-01f;
  return times_power(sum * rest + 1.0f, whole);
}

// e^x to 3 ulp, of x at most 88; 0 below -87.7.
template <typename V>
inline V exponential(const V& x) {
  constexpr float log2_e = 1.44269502162933f, log2_e_low = 1.9259629911266e-8f;
  const V bounded = at_least(-88.0f, x);
  const V whole = bounded * log2_e + TO_LOW_BITS;
  const V rest = bounded * log2_e_low + (bounded * log2_e - (whole - TO_LOW_BITS));
  V sum = rest * 1.3264727196e-03f + 9.6715126398e-03f;
  sum = sum * rest + 5.5507337433e-02f;
  sum = sum * rest + 2.4022242085e-01f;
  sum = sum * rest + 6.9314697760e-01f;
  return times_power(sum * rest + 1.0f, whole);
}

}  // namespace
