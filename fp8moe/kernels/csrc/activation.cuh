// SwiGLU on pairs of bf16 columns, in FP32.
#pragma once
#include "tile.cuh"

// 1 / (1 + exp(-g)) with the hardware's exponential and reciprocal: relative error about 2^-21. The
// results are rounded to bf16 (2^-9) afterwards. g = -Inf gives 0, and then g * 0 = NaN, as it should.
__device__ __forceinline__ float sigmoid(float g) {
  float e, s;
  asm("ex2.approx.f32 %0, %1;" : "=f"(e) : "f"(g * -1.4426950408889634f));
  asm("rcp.approx.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// What the kernel multiplies a row with: the routing weight of its slot. Padding has none.
__device__ __forceinline__ float weight_of(const float* topk_weights, int slot) {
  return slot < 0 ? 0.0f : __ldg(topk_weights + slot);
}

__device__ __forceinline__ u32 word_of(const uint4& v, int i) {
  return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Largest magnitude of eight bf16 values, as a 16-bit pattern.
__device__ __forceinline__ u32 amax_bf16x8(const u32 (&w)[4]) {
  return fold_max_16x2(max_u16x2(max_u16x2(abs_bits_16x2(w[0]), abs_bits_16x2(w[1])),
                                 max_u16x2(abs_bits_16x2(w[2]), abs_bits_16x2(w[3]))));
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
