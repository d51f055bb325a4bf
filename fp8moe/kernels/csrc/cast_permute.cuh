// bf16 rows in token order cast to E4M3 with one scale per row and 128 columns, and copied into expert
// order: each token is read and cast once and written to its K rows.
//
// Where scales are MN-major, those of a row are 4 bytes in each of columns / 128 lines. To write them
// with the row takes a fifth of the time at eight rows a token. So cast_permute then leaves them in
// token order, and permute_scales gathers them to write whole lines.
//
// Built for POW2 = 0 | 1. A warp takes 1024 columns of a token, four runs of 256: eight columns a lane,
// half a warp per scale. Neighbouring lanes then trade, so that a store has 16 bytes a lane.
#include "bf16.cuh"

static constexpr bool kPow2 = POW2;
static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kRuns = 4;
static constexpr int kRunColumns = 256;

// data [rows, columns], rows a pitch apart; the scale of (row, block of 128 columns) at
// row * scale_row_step + block * scale_block_step, or, if scale_of_token, that of (token, block) at
// token * scale_row_step + ... Padding rows are not written.
//
// Neighbouring CTAs take the parts of the same tokens' rows.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    cast_permute(const u16* __restrict__ x, const int* __restrict__ row_of_slot, int tokens, int topk,
                 int columns, u8* __restrict__ data, int pitch, float* __restrict__ scale,
                 int scale_row_step, int scale_block_step, int scale_of_token) {
  int lane = threadIdx.x & 31;
  int parts = (columns + kRuns * kRunColumns - 1) / (kRuns * kRunColumns);
  i64 token = (i64)(blockIdx.x / parts) * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  int first = blockIdx.x % parts * (kRuns * kRunColumns);   // of the warp

  uint4 v[kRuns];
  const u16* from = x + token * columns + first + lane * 8;
#pragma unroll
  for (int r = 0; r < kRuns; ++r)
    v[r] = load_stream_16_if(from + r * kRunColumns, first + r * kRunColumns + lane * 8 < columns);

  uint2 q[kRuns];
  float own = 0.0f;   // lane i of a half-warp keeps the scale of run i, to write it
#pragma unroll
  for (int r = 0; r < kRuns; r += 2) {
    u32 low[4] = {v[r].x, v[r].y, v[r].z, v[r].w};
    u32 high[4] = {v[r + 1].x, v[r + 1].y, v[r + 1].z, v[r + 1].w};
    u32 maxima = reduce_row_max(amax_bf16x8(low) | amax_bf16x8(high) << 16);
    BlockScale s[2] = {block_scale<kPow2>(maxima << 16), block_scale<kPow2>(maxima & 0xFFFF0000u)};
    q[r] = cast_bf16x8(low, s[0].inv);
    q[r + 1] = cast_bf16x8(high, s[1].inv);
    if ((lane & 15) == r) own = s[0].scale;
    if ((lane & 15) == r + 1) own = s[1].scale;
  }
  // Even lanes take 16 columns of an even run, odd lanes of the run after it.
  bool odd = lane & 1;
  uint4 packed[kRuns / 2];
#pragma unroll
  for (int r = 0; r < kRuns; r += 2) {
    uint2 keep = odd ? q[r + 1] : q[r], give = odd ? q[r] : q[r + 1];
    uint2 got = {__shfl_xor_sync(kFullWarp, give.x, 1), __shfl_xor_sync(kFullWarp, give.y, 1)};
    packed[r / 2] = odd ? make_uint4(got.x, got.y, keep.x, keep.y)
                        : make_uint4(keep.x, keep.y, got.x, got.y);
  }
  int column = first + (odd ? kRunColumns : 0) + (lane >> 1) * 16;
  int block = first / 128 + 2 * (lane & 15) + (lane >> 4);
  bool writes_scale = (lane & 15) < kRuns && block < columns / 128;
  float* to_scale = scale + block * (i64)scale_block_step;
  if (scale_of_token && writes_scale) to_scale[token * scale_row_step] = own;
  for (int k0 = 0; k0 < topk; k0 += 32) {
    int mine = k0 + lane < topk ? __ldg(row_of_slot + token * topk + k0 + lane) : -1;
    int count = min(32, topk - k0);
    for (int k = 0; k < count; ++k) {
      i64 row = __shfl_sync(kFullWarp, mine, k);
      if (row < 0) continue;
#pragma unroll
      for (int r = 0; r < kRuns / 2; ++r)
        if (column + 2 * r * kRunColumns < columns)
          *reinterpret_cast<uint4*>(data + row * pitch + column + 2 * r * kRunColumns) = packed[r];
      if (writes_scale && !scale_of_token) to_scale[row * scale_row_step] = own;
    }
  }
}

static constexpr int kBlocks = 4;   // scales of a row that a thread moves

// scale[row, b] = token_scale[slot_of_row[row] / topk, b] for the blocks b of a row, kPadScale in
// padding; MN-major, scale_pitch from one block to the next. Rows of token_scale are 16-byte aligned.
extern "C" __global__ void __launch_bounds__(kThreads)
    permute_scales(const float* __restrict__ token_scale, int token_pitch,
                   const int* __restrict__ slot_of_row, u32 multiplier, int shift, int blocks,
                   float* __restrict__ scale, int scale_pitch) {
  int row = blockIdx.x * kTileRows + threadIdx.x % kTileRows;
  int slot = __ldg(slot_of_row + row);
  if (slot == kUnused) return;
  int first = (blockIdx.y * (kThreads / kTileRows) + threadIdx.x / kTileRows) * kBlocks;
  if (first >= blocks) return;
  i64 token = slot < 0 ? 0 : divide(slot, multiplier, shift);
  uint4 v = __ldg(reinterpret_cast<const uint4*>(token_scale + token * token_pitch + first));
  u32 bits[kBlocks] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < kBlocks; ++i)
    if (first + i < blocks)
      scale[(first + i) * (i64)scale_pitch + row] = slot < 0 ? kPadScale : __uint_as_float(bits[i]);
}
