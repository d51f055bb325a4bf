// Eight bf16 values in four words: the largest magnitude, and the cast to E4M3.
#pragma once
#include "tile.cuh"

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// The larger magnitude in each half, with any sign: one instruction for what the bit patterns take
// three for. NaN wins here too.
__device__ __forceinline__ u32 max_magnitude_bf16x2(u32 a, u32 b) {
  u32 result;
  asm("max.NaN.xorsign.abs.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Two products, each rounded to bf16: exact by a power of two.
__device__ __forceinline__ u32 multiply_bf16x2(u32 a, u32 b) {
  u32 result;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// Largest magnitude in each half of four pairs of bf16.
__device__ __forceinline__ u32 amax_bf16x2(u32 a, u32 b, u32 c, u32 d) {
  return abs_bits_16x2(max_magnitude_bf16x2(max_magnitude_bf16x2(a, b), max_magnitude_bf16x2(c, d)));
}

// Largest magnitude of eight bf16 values, as a 16-bit pattern.
__device__ __forceinline__ u32 amax_bf16x8(const u32 (&w)[4]) {
  return fold_max_16x2(amax_bf16x2(w[0], w[1], w[2], w[3]));
}

// Maxima over the 16 lanes that share a row, two of them at once.
__device__ __forceinline__ u32 reduce_row_max(u32 pair) {
#pragma unroll
  for (int step = 8; step > 0; step >>= 1)
    pair = max_u16x2(pair, __shfl_xor_sync(kFullWarp, pair, step));
  return pair;
}

// Eight bf16 values to E4M3.
__device__ __forceinline__ uint2 cast_bf16x8(const u32 (&w)[4], float inv) {
  return make_uint2(pack_e4m3x4(bf16_low(w[0]) * inv, bf16_high(w[0]) * inv, bf16_low(w[1]) * inv,
                                bf16_high(w[1]) * inv),
                    pack_e4m3x4(bf16_low(w[2]) * inv, bf16_high(w[2]) * inv, bf16_low(w[3]) * inv,
                                bf16_high(w[3]) * inv));
}
