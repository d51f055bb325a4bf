// SwiGLU on pairs of bf16 columns, in FP32.
#pragma once
#include "tile.cuh"

// 1 / (1 + exp(-g)) with the hardware's exponential and reciprocal: relative error about 2^-21, and
// 0 below g = -87. The results are rounded to bf16 (2^-9) afterwards. g = -Inf gives 0, and then
// g * 0 = NaN, as it should.
__device__ __forceinline__ float sigmoid(float g) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(g * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// The routing weights of a warp's eight consecutive rows: lane L loads that of row L % 8, others ask
// for it by shuffle. One load in flight from the start; four a thread would be put off until each is
// needed, to save registers. Padding has weight 0.
__device__ __forceinline__ float load_weight(const float* topk_weights, const int* slot_of_row,
                                             int warp_row0) {
  int slot = __ldg(slot_of_row + warp_row0 + (threadIdx.x & 7));
  return slot < 0 ? 0.0f : __ldg(topk_weights + slot);
}
// That of row i of the four rows of this half-warp.
__device__ __forceinline__ float weight_of_row(float loaded, int i) {
  return __shfl_sync(kFullWarp, loaded, (threadIdx.x & 16) / 4 + i);
}

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
