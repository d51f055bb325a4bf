// SwiGLU on pairs of bf16 columns, in FP32.
#pragma once
#include "bf16.cuh"

// 1 / (1 + exp(-g)) with the hardware's exponential and reciprocal: relative error about 2^-21, and
// 0 below g = -87. The results are rounded to bf16 (2^-9) afterwards. g = -Inf gives 0, and then
// g * 0 = NaN, as it should.
__device__ __forceinline__ float sigmoid(float g) {
  float e, s;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(g * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(s) : "f"(1.0f + e));
  return s;
}

// silu(g) * u
__device__ __forceinline__ float swiglu(float g, float u) { return g * sigmoid(g) * u; }

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
