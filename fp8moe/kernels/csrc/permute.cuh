// Rows copied from token order into expert order, with their per_token scales.
//
// Built for WITH_SCALE = 0 | 1. A warp reads a run of one token's row once and writes it to each of the
// token's K rows. Gathering instead, row by row of the output, would read each token K times: DRAM
// does not notice while L2 holds the tokens, but L2 then moves 2 bytes for each byte written and
// becomes the limit.
//
// The first CTAs do what belongs to whole 128-row blocks: padding rows, and scales, which are stored
// by column and so are gathered to be written as whole lines.
#include "tile.cuh"

static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kChunks = 4;   // of 16 bytes: what a lane has in flight
static constexpr int kRunBytes = 32 * 16 * kChunks;
static constexpr bool kWithScale = WITH_SCALE;

struct Scales {
  const float* source;   // [column / 128][token], pitch source_ld
  int source_ld;
  float* out;            // [column / 128][row], pitch out_ld
  int out_ld;
};

// Padding rows of one 128-row block become zero; its scales are gathered.
__device__ __forceinline__ void finish_block(int row0, const int* slot_of_row, u8* out,
                                             int row_bytes, u32 multiplier, int shift,
                                             const Scales& scales) {
  if (kWithScale) {
    int row = row0 + (threadIdx.x & 127);
    int slot = __ldg(slot_of_row + row);
    if (slot == kUnused) return;
    const float* source = scales.source + (slot < 0 ? 0 : divide(slot, multiplier, shift));
#pragma unroll 8
    for (int b = threadIdx.x >> 7; b < row_bytes / 128; b += kThreads / 128)
      scales.out[(i64)b * scales.out_ld + row] =
          slot < 0 ? kPadScale : __ldg(source + (i64)b * scales.source_ld);
  }
  // The padding of a block is consecutive, so the warps take its rows in turn.
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  constexpr int kShare = kTileRows / kWarps;
  bool pad = lane < kShare && __ldg(slot_of_row + row0 + warp + kWarps * lane) == kPad;
  for (u32 pads = __ballot_sync(kFullWarp, pad); pads != 0; pads &= pads - 1) {
    u8* to = out + (i64)(row0 + warp + kWarps * (__ffs(pads) - 1)) * row_bytes;
    for (int c = lane * 16; c < row_bytes; c += 512)
      *reinterpret_cast<uint4*>(to + c) = make_uint4(0, 0, 0, 0);
  }
}

// out[row_of_slot[t, k]] = source[t] for every k; rows of row_bytes (a multiple of 16) bytes.
// With scales (rows are then E4M3) these move along; padding has zero data and kPadScale.
extern "C" __global__ void __launch_bounds__(kThreads)
    permute_rows(const u8* __restrict__ source, u8* __restrict__ out,
                 const int* __restrict__ row_of_slot, const int* __restrict__ slot_of_row,
                 int tokens, int topk, int row_bytes, int row_blocks, u32 multiplier, int shift,
                 const float* __restrict__ scale, int scale_ld, float* __restrict__ scale_out,
                 int scale_out_ld) {
  if ((int)blockIdx.x < row_blocks) {
    if (blockIdx.y != 0) return;
    finish_block(blockIdx.x * kTileRows, slot_of_row, out, row_bytes, multiplier, shift,
                 {scale, scale_ld, scale_out, scale_out_ld});
    return;
  }
  int lane = threadIdx.x & 31;
  i64 token = (i64)(blockIdx.x - row_blocks) * kWarps + threadIdx.x / 32;
  if (token >= tokens) return;
  int first = blockIdx.y * kRunBytes + lane * 16;

  const u8* from = source + token * row_bytes + first;
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
      u8* to = out + (i64)row * row_bytes + first;
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        if (first + 512 * c < row_bytes) *reinterpret_cast<uint4*>(to + 512 * c) = v[c];
    }
  }
}
