// Arithmetic shared by the memory-bound kernels: what a block scale is, how values become E4M3 and
// back, and how bad input is reported. The CPU reference computes the same bits.
//
// No system headers: NVRTC compiles this file alone in a fraction of a second.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// ---------------------------------------------------------------------------------------------
// Inputs, kept as raw bits: which of the three formats a kernel was built for.
struct Bf16 { typedef u16 Raw; static constexpr bool kIsBf16 = true; };
struct F16 { typedef u16 Raw; static constexpr bool kIsBf16 = false; };
struct F32 { typedef u32 Raw; static constexpr bool kIsBf16 = false; };

// The two halves of a packed pair: element 0 is the low half.
__device__ __forceinline__ float bf16_low(u32 pair) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float bf16_high(u32 pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}

__device__ __forceinline__ float f16_to_float(u32 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"((u16)bits));
  return value;
}

// Round two floats to bf16 (nearest even): `low` goes to element 0.
__device__ __forceinline__ u32 pack_bf16(float low, float high) {
  u32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// ---------------------------------------------------------------------------------------------
// Largest magnitude. Compared as unsigned bit patterns without the sign, so that
// NaN > Inf > finite; a floating-point maximum would drop a NaN.

__device__ __forceinline__ u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }

__device__ __forceinline__ u32 max_u16x2(u32 a, u32 b) {
  u32 result;
  asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ u32 abs_bits(float value) {
  return __float_as_uint(value) & 0x7FFFFFFFu;
}
__device__ __forceinline__ u32 abs_bits_16x2(u32 pair) { return pair & 0x7FFF7FFFu; }

// The larger of the two halves of a packed pair of magnitudes.
__device__ __forceinline__ u32 fold_max_16x2(u32 pair) {
  return max_u32(pair & 0xFFFFu, pair >> 16);
}

// A raw magnitude of the given input format as FP32 bits; keeps the order NaN > Inf > finite.
template <class In> __device__ __forceinline__ u32 magnitude_to_f32_bits(u32 raw);
template <> __device__ __forceinline__ u32 magnitude_to_f32_bits<Bf16>(u32 raw) {
  return raw << 16;
}
template <> __device__ __forceinline__ u32 magnitude_to_f32_bits<F16>(u32 raw) {
  return __float_as_uint(f16_to_float(raw));
}
template <> __device__ __forceinline__ u32 magnitude_to_f32_bits<F32>(u32 raw) { return raw; }

// ---------------------------------------------------------------------------------------------
// Block scale.

static constexpr u32 kAmaxFloorBits = 0x27800000u;    // 2^-48: a product of two scales stays normal
static constexpr u32 kInfBits = 0x7F800000u;
static constexpr u32 kNanBits = 0x7FC00000u;

struct BlockScale {
  float scale;   // what is stored: x ~= q * scale
  float inv;     // what x is multiplied with before rounding to E4M3
};

// a / b rounded to nearest even, for b in [1, 2) and a, a / b in the normal range: the usual Newton
// steps without the rare-case subroutine of div.rn, whose registers would spill in the casts.
// `reciprocal` is 1 / b to within one unit in the last place.
__device__ __forceinline__ float divide_from(float a, float b, float reciprocal) {
  float y = __fmaf_rn(reciprocal, __fmaf_rn(-b, reciprocal, 1.0f), reciprocal);
  float q = __fmul_rn(a, y);
  q = __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
  return __fmaf_rn(__fmaf_rn(-b, q, a), y, q);
}

// Multiplies a normal float by 2^n when the result is normal too.
__device__ __forceinline__ float scale_exponent(float value, int n) {
  return __uint_as_float(__float_as_uint(value) + ((u32)n << 23));
}

// scale = amax / 448, or that rounded up to a power of two.
// A NaN or Inf in the block makes scale and inv NaN: every q of the block becomes NaN (0x7F).
template <bool kPow2> __device__ __forceinline__ BlockScale block_scale(u32 amax_bits) {
  BlockScale s;
  if (amax_bits >= kInfBits) {
    s.scale = s.inv = __uint_as_float(kNanBits);
    return s;
  }
  amax_bits = max_u32(amax_bits, kAmaxFloorBits);
  if (kPow2) {
    // 448 = 1.75 * 2^8, so the exponent is that of amax less 8, plus one when the mantissa is
    // above 1.75. The carry of the addition is that comparison. This is the same n as rounding
    // the IEEE quotient amax / 448 up: a mantissa one step above 1.75 still divides to above 1.
    u32 exponent = ((amax_bits + 0x1FFFFFu) >> 23) - 8;
    s.scale = __uint_as_float(exponent << 23);
    s.inv = __uint_as_float((254 - exponent) << 23);
  } else {
    // Divide the mantissas, then put the exponents back: 448 = 1.75 * 2^8.
    int exponent = (int)(amax_bits >> 23) - 127;
    float mantissa = __uint_as_float((amax_bits & 0x7FFFFFu) | 0x3F800000u);
    float reciprocal;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(reciprocal) : "f"(mantissa));
    s.scale = scale_exponent(divide_from(mantissa, 1.75f, 1.0f / 1.75f), exponent - 8);
    s.inv = scale_exponent(divide_from(1.75f, mantissa, reciprocal), 8 - exponent);
  }
  return s;
}

// ---------------------------------------------------------------------------------------------
// E4M3. `low` is the byte at the lower address.

__device__ __forceinline__ u32 pack_e4m3x4(float v0, float v1, float v2, float v3) {
  // One block of PTX: joined outside it, the pairs cost three instructions more.
  u32 word;
  asm("{\n.reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "f"(v0), "f"(v1), "f"(v2), "f"(v3));
  return word;
}

// Two E4M3 values (the low 16 bits) as packed f16: exact.
__device__ __forceinline__ u32 e4m3x2_to_f16x2(u32 pair) {
  u32 halves;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"((u16)pair));
  return halves;
}
// Four of them as two packed pairs. One block of PTX spares the instructions that would split them.
__device__ __forceinline__ void e4m3x4_to_f16(u32 word, u32& low, u32& high) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}

// ---------------------------------------------------------------------------------------------
// Global memory. Guard loads with one branch around a whole tile's worth of them: a predicate on
// each makes the compiler wait for the first ones before it issues the last.

// 16 bytes that are read once: goes past L1.
__device__ __forceinline__ uint4 load_stream_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

// ---------------------------------------------------------------------------------------------
// Errors in device data: a small buffer in pinned host memory, read by the host at its next call.

enum StatusCode {
  kGroupEndsDecrease = 1,
  kGroupEndsExceedRows = 2,
  kExpertOutOfRange = 3,
  kGroupSizeOutOfRange = 4,
  kGroupEndUnaligned = 5,
};

// Words 1-3 are the details; word 0 is written last, so a host that sees it sees them too.
__device__ __forceinline__ void report(int* status, int code, int index, int value, int limit) {
  if (status == nullptr) return;
  volatile int* words = status;
  words[1] = index;
  words[2] = value;
  words[3] = limit;
  __threadfence_system();
  words[0] = code;
}
