// bf16 rows in token order cast to E4M3 with one scale per row and 128 columns, and copied into expert
// order: each token is read and cast once and written to its K rows.
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
// row * scale_row_step + block * scale_block_step. Padding rows are not written.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    cast_permute(const u16* __restrict__ x, const int* __restrict__ row_of_slot, int tokens, int topk,
                 int columns, u8* __restrict__ data, int pitch, float* __restrict__ scale,
                 int scale_row_step, int scale_block_step) {
  int lane = threadIdx.x & 31;
  i64 token = (i64)blockIdx.x * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  int first = blockIdx.y * (kRuns * kRunColumns);   // of the warp

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
      if (writes_scale) scale[block * (i64)scale_block_step + row * scale_row_step] = own;
    }
  }
}
