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

// Two neighbouring columns.
struct Pair {
  float value[2];
};
__device__ __forceinline__ Pair pair_of_f16(u32 halves, float scale) {
  return {f16_to_float(halves) * scale, f16_to_float(halves >> 16) * scale};
}

// Pairs of columns: dg, du and aw as packed bf16, and da * a summed into dprob.
__device__ __forceinline__ void backward_pair(const Pair& g, const Pair& u, u32 da, float p, u32& dg,
                                              u32& du, u32& aw, float& dprob) {
  float value[3][2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float gi = g.value[i];
    float ui = u.value[i];
    float di = i ? bf16_high(da) : bf16_low(da);
    float s = sigmoid(gi);
    float silu = gi * s;
    float a = silu * ui;
    float weighted = p * di;
    dprob += di * a;
    value[0][i] = weighted * ui * (silu * (1.0f - s) + s);   // s * (1 + g * (1 - s))
    value[1][i] = weighted * silu;
    value[2][i] = p * a;
  }
  dg = pack_bf16(value[0][0], value[0][1]);
  du = pack_bf16(value[1][0], value[1][1]);
  aw = pack_bf16(value[2][0], value[2][1]);
}
