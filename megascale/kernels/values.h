// Values of bf16 and fp32, and e^x, for the passes of kernels.cpp and attention.cpp.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

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

// e^x to 2 ulp; 0 below -87.6, where the power's exponent becomes that of zero, and at most e^88.
inline float exponential(float x) {
  const float bounded = x < -88.0f ? -88.0f : (x > 88.0f ? 88.0f : x);
  const float whole = std::nearbyint(bounded * 1.44269504089f);
  const float rest = (bounded - whole * 0.693145751953125f) - whole * 1.42860682030941723e-6f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  return sum * bits_to_float(uint32_t(int32_t(whole) + 127) << 23);
}

}  // namespace
