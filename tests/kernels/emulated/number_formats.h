// FP16, BF16 and E4M3 on the CPU, and the instructions on pairs of them. Included by emulator.h.
#pragma once

namespace emulator {

template <class T> uint64_t raw(T value) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T> T cooked(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

inline bool is_nan(float value) { return value != value; }

inline uint16_t to_f16(float value) {
  if (is_nan(value)) return 0x7FFF;
  uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  float size = std::fabs(value);
  if (size >= 65520.0f) return sign | 0x7C00;
  if (size < 0x1p-14f) return sign | (uint16_t)std::lrintf(std::ldexp(size, 24));
  int exponent = std::ilogb(size);
  int mantissa = (int)std::lrintf(std::ldexp(size, 10 - exponent));   // 1024..2048
  return sign | (uint16_t)(((exponent + 15) << 10) + (mantissa - 1024));
}
inline float from_f16(uint16_t bits) {
  int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  float size = exponent == 31 ? (mantissa ? NAN : INFINITY)
               : exponent ? std::ldexp(1024.0f + mantissa, exponent - 25)
                          : std::ldexp((float)mantissa, -24);
  return bits & 0x8000 ? -size : size;
}

inline uint16_t to_bf16(float value) {
  if (is_nan(value)) return 0x7FFF;
  uint32_t bits = (uint32_t)raw(value);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
inline float from_bf16(uint16_t bits) { return cooked<float>((uint64_t)bits << 16); }

inline uint8_t to_e4m3(float value) {
  if (is_nan(value)) return 0x7F;
  uint8_t sign = std::signbit(value) ? 0x80 : 0;
  float size = std::fabs(value);
  if (size >= 448.0f) return sign | 0x7E;
  if (size < 0x1p-6f) return sign | (uint8_t)std::lrintf(std::ldexp(size, 9));
  int exponent = std::ilogb(size);
  int mantissa = (int)std::lrintf(std::ldexp(size, 3 - exponent));   // 8..16
  return sign | (uint8_t)(((exponent + 7) << 3) + (mantissa - 8));
}
inline float from_e4m3(uint8_t byte) {
  int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  float size = (byte & 0x7F) == 0x7F ? NAN
               : exponent ? std::ldexp(8.0f + mantissa, exponent - 10)
                          : std::ldexp((float)mantissa, -9);
  return byte & 0x80 ? -size : size;
}

// ---- instructions on them -----------------------------------------------------------------------

inline uint32_t pair16(uint16_t low, uint16_t high) { return low | (uint32_t)high << 16; }
template <class F> uint32_t each16(uint32_t a, uint32_t b, F f) {
  return pair16(f((uint16_t)a, (uint16_t)b), f((uint16_t)(a >> 16), (uint16_t)(b >> 16)));
}
inline uint16_t e4m3x2(float low, float high) { return to_e4m3(low) | to_e4m3(high) << 8; }
inline uint32_t f16x2_of_e4m3x2(uint16_t bytes) {
  return pair16(to_f16(from_e4m3((uint8_t)bytes)), to_f16(from_e4m3(bytes >> 8)));
}
inline uint16_t e4m3x2_of_f16x2(uint32_t pair) {
  return e4m3x2(from_f16((uint16_t)pair), from_f16(pair >> 16));
}
inline uint32_t max_u16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) { return max(x, y); });
}
inline uint32_t mul_f16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) {
    return to_f16(from_f16(x) * from_f16(y));   // the product is exact in FP32
  });
}
inline uint32_t mul_bf16x2(uint32_t a, uint32_t b) {
  return each16(a, b, [](uint16_t x, uint16_t y) {
    return to_bf16(from_bf16(x) * from_bf16(y));   // the product is exact in FP32
  });
}
// max.NaN of magnitudes: the larger one, or the canonical NaN; the sign is left out.
inline uint32_t max_abs_16x2(uint32_t a, uint32_t b, uint16_t inf) {
  return each16(a, b, [=](uint16_t x, uint16_t y) {
    uint16_t larger = max<uint16_t>(x & 0x7FFF, y & 0x7FFF);
    return larger > inf ? (uint16_t)0x7FFF : larger;
  });
}
inline uint32_t max_xorsign_abs_bf16x2(uint32_t a, uint32_t b) {
  return max_abs_16x2(a, b, 0x7F80) | ((a ^ b) & 0x80008000u);
}

}  // namespace emulator
