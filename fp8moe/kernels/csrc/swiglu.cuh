// aw = bf16(p * silu(g) * u), cast with one scale per row and 128 columns. h = [g | u].
//
// Built for POW2 = 0 | 1, and for WITH_H = 0 | 1: also h itself, cast likewise, from the same read.
// A CTA takes 64 rows x 128 columns of the activation: 16 lanes share a row, a thread has eight columns
// of four consecutive rows, whose eight loads are issued together.
#include "activation.cuh"

static constexpr bool kPow2 = POW2;
static constexpr bool kWithH = WITH_H;
static constexpr int kThreads = 256;
static constexpr int kRows = 64;

// data [capacity, columns], scale[(column / 128) * scale_ld + row]. WITH_H: h_data [capacity, 2 *
// columns], h_scale[(column / 128) * h_scale_ld + row]. Padding is zero with the floor scale.
// `rounded`, if not null, receives aw itself.
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    swiglu_cast(const u16* __restrict__ h, const float* __restrict__ topk_weights,
                const int* __restrict__ slot_of_row, int columns, u8* __restrict__ data,
                float* __restrict__ scale, int scale_ld, u8* __restrict__ h_data,
                float* __restrict__ h_scale, int h_scale_ld, u16* __restrict__ rounded) {
  int row0 = blockIdx.y * kRows + (threadIdx.x >> 4) * 4;
  int column = blockIdx.x * 128 + (threadIdx.x & 15) * 8;
  // Four consecutive rows are used or unused together.
  int4 slots = __ldg(reinterpret_cast<const int4*>(slot_of_row + row0));
  if (slots.x == kUnused) return;

  // The h of a padding row is garbage, and garbage times 0 may be NaN: it is read as zeros.
  uint4 g[4], u[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const u16* source = h + (i64)(row0 + i) * (2 * (i64)columns) + column;
    bool used = element_of(slots, i) >= 0;
    g[i] = load_stream_16_if(source, used);
    u[i] = load_stream_16_if(source + columns, used);
  }
  float weights = load_weight(topk_weights, slot_of_row, row0 & ~7);

  if constexpr (kWithH) {
    // Lane i of a half-warp keeps the scale that it will write: row i's gate block, or row i - 4's up.
    int lane = threadIdx.x & 15;
    float own = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 gate[4] = {g[i].x, g[i].y, g[i].z, g[i].w}, up[4] = {u[i].x, u[i].y, u[i].z, u[i].w};
      u32 maxima = reduce_row_max(amax_bf16x8(gate) | amax_bf16x8(up) << 16);
      BlockScale gate_block = block_scale<kPow2>(maxima << 16);
      BlockScale up_block = block_scale<kPow2>(maxima & 0xFFFF0000u);
      u8* target = h_data + (i64)(row0 + i) * (2 * (i64)columns) + column;
      *reinterpret_cast<uint2*>(target) = cast_bf16x8(gate, gate_block.inv);
      *reinterpret_cast<uint2*>(target + columns) = cast_bf16x8(up, up_block.inv);
      if (lane == i) own = gate_block.scale;
      if (lane == 4 + i) own = up_block.scale;
    }
    i64 block = blockIdx.x + (lane < 4 ? 0 : gridDim.x);
    if (lane < 8) h_scale[block * h_scale_ld + row0 + (lane & 3)] = own;
  }

  u32 aw[4][4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float p = weight_of_row(weights, i);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      u32 gj = word_of(g[i], j), uj = word_of(u[i], j);
      aw[i][j] = pack_bf16(p * swiglu(bf16_low(gj), bf16_low(uj)),
                           p * swiglu(bf16_high(gj), bf16_high(uj)));
    }
  }
  u32 max01 = amax_bf16x8(aw[0]) | amax_bf16x8(aw[1]) << 16;
  u32 max23 = amax_bf16x8(aw[2]) | amax_bf16x8(aw[3]) << 16;
  max01 = reduce_row_max(max01);
  max23 = reduce_row_max(max23);
  BlockScale s[4] = {block_scale<kPow2>(max01 << 16), block_scale<kPow2>(max01 & 0xFFFF0000u),
                     block_scale<kPow2>(max23 << 16), block_scale<kPow2>(max23 & 0xFFFF0000u)};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    i64 at = (i64)(row0 + i) * columns + column;
    *reinterpret_cast<uint2*>(data + at) = cast_bf16x8(aw[i], s[i].inv);
    if (rounded != nullptr)
      *reinterpret_cast<uint4*>(rounded + at) = make_uint4(aw[i][0], aw[i][1], aw[i][2], aw[i][3]);
  }
  // The two half-warps write eight neighbouring rows: one 32-byte sector.
  if ((threadIdx.x & 15) == 0)
    *reinterpret_cast<float4*>(scale + (i64)blockIdx.x * scale_ld + row0) =
        make_float4(s[0].scale, s[1].scale, s[2].scale, s[3].scale);
}
