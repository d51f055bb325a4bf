// Rows copied from token order into expert order, with their per_token scales.
//
// Built for WITH_SCALE = 0 | 1. A warp reads a run of one token's row once and writes it to each of the
// token's K rows. Gathering instead, row by row of the output, would read each token K times: DRAM
// does not notice while L2 holds the tokens, but L2 then moves 2 bytes for each byte written and
// becomes the limit.
//
// The first CTAs do what belongs to whole 128-row blocks: padding rows, and scales, which the GEMM
// wants by column and so are gathered to be written as whole lines.
#include "tile.cuh"

static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kChunks = 4;   // of 16 bytes: what a lane has in flight
static constexpr int kRunBytes = 32 * 16 * kChunks;
static constexpr bool kWithScale = WITH_SCALE;

// Element (row, block) of a matrix of scales is at row * row_step + block * block_step.
struct Scales {
  float* data;
  int row_step, block_step;
};

// Padding rows of one 128-row block become zero; its scales are gathered.
__device__ __forceinline__ void finish_block(int row0, const int* slot_of_row, u8* out,
                                             int out_pitch, int row_bytes, u32 multiplier,
                                             int shift, Scales source, Scales scales) {
  if (kWithScale) {
    int row = row0 + (threadIdx.x & 127);
    int slot = __ldg(slot_of_row + row);
    if (slot == kUnused) return;
    i64 token = slot < 0 ? 0 : divide(slot, multiplier, shift);
    const float* from = source.data + token * source.row_step;
    float* to = scales.data + (i64)row * scales.row_step;
#pragma unroll 8
    for (int b = threadIdx.x >> 7; b < row_bytes / 128; b += kThreads / 128)
      to[(i64)b * scales.block_step] =
          slot < 0 ? kPadScale : __ldg(from + (i64)b * source.block_step);
  }
  // The padding of a block is consecutive, so the warps take its rows in turn.
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  constexpr int kShare = kTileRows / kWarps;
  bool pad = lane < kShare && __ldg(slot_of_row + row0 + warp + kWarps * lane) == kPad;
  for (u32 pads = __ballot_sync(kFullWarp, pad); pads != 0; pads &= pads - 1) {
    u8* to = out + (i64)(row0 + warp + kWarps * (__ffs(pads) - 1)) * out_pitch;
    for (int c = lane * 16; c < row_bytes; c += 512)
      *reinterpret_cast<uint4*>(to + c) = make_uint4(0, 0, 0, 0);
  }
}

// out[row_of_slot[t, k]] = source[t] for every k; rows of row_bytes (a multiple of 16) bytes, a pitch
// apart. With scales (rows are then E4M3) these move along; padding has zero data and kPadScale.
extern "C" __global__ void __launch_bounds__(kThreads)
    permute_rows(const u8* __restrict__ source, int source_pitch, u8* __restrict__ out,
                 int out_pitch, const int* __restrict__ row_of_slot,
                 const int* __restrict__ slot_of_row, int tokens, int topk, int row_bytes,
                 int row_blocks, u32 multiplier, int shift, float* __restrict__ scale,
                 int scale_row_step, int scale_block_step, float* __restrict__ scale_out,
                 int scale_out_row_step, int scale_out_block_step) {
  if ((int)blockIdx.x < row_blocks) {
    if (blockIdx.y != 0) return;
    finish_block(blockIdx.x * kTileRows, slot_of_row, out, out_pitch, row_bytes, multiplier, shift,
                 {scale, scale_row_step, scale_block_step},
                 {scale_out, scale_out_row_step, scale_out_block_step});
    return;
  }
  int lane = threadIdx.x & 31;
  i64 token = (i64)(blockIdx.x - row_blocks) * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  int first = blockIdx.y * kRunBytes + lane * 16;

  const u8* from = source + token * source_pitch + first;
  uint4 v[kChunks];
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
    v[c] = load_stream_16_if(from + 512 * c, first + 512 * c < row_bytes);
  for (int k0 = 0; k0 < topk; k0 += 32) {
    int own = k0 + lane < topk ? __ldg(row_of_slot + token * topk + k0 + lane) : -1;
    int count = min(32, topk - k0);
    for (int k = 0; k < count; ++k) {
      int row = __shfl_sync(kFullWarp, own, k);
      if (row < 0) continue;
      u8* to = out + (i64)row * out_pitch + first;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (first + 512 * c < row_bytes) *reinterpret_cast<uint4*>(to + 512 * c) = v[c];
    }
  }
}
