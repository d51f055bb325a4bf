// Gathered per_token E4M3 rows to per_channel (see channel.cuh) or to 128 x 128 scales (see
// channel_block.cuh); also the gathered rows themselves, from the same read.
//
// Built for POW2 = 0 | 1 (the new scales), BLOCK = 0 | 1 and, without BLOCK, WITH_ROWS = 0 | 1. A CTA
// takes 128 rows x 256 columns. The grid walks all rows of one column strip before the next: the strip
// of every token then stays in L2 while the K rows of a token read it, so DRAM delivers each token once.
#include "channel_block.cuh"

static constexpr bool kWithRows = WITH_ROWS;
static constexpr int kColumns = 256;

// One warp: reads the scales of the tile's rows, for `block` of 128 columns.
__device__ __forceinline__ void gather_scales(TileScales& s, const int* slots, const float* scale,
                                              int step, u32 multiplier, int shift,
                                              float* rows_out) {
  int lane = threadIdx.x & 31;
  int4 four = __ldg(reinterpret_cast<const int4*>(slots) + lane);
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int slot = element_of(four, i);
    value[i] = slot < 0 ? 0.0f : __ldg(scale + (i64)divide(slot, multiplier, shift) * step);
  }
  reinterpret_cast<float4*>(s.row)[lane] = make_float4(value[0], value[1], value[2], value[3]);
  if (kWithRows) {
    float out[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = element_of(four, i) < 0 ? kPadScale : value[i];
    reinterpret_cast<float4*>(rows_out)[lane] = make_float4(out[0], out[1], out[2], out[3]);
  }
  if (kPow2 || kBlockScales) prepare_factors(s, value);
}

// data [T, columns], rows a pitch apart, with the scale of (token, block of 128 columns) at
// token * scale_row_step + block * scale_block_step, is gathered by token = slot_of_row[r] / topk.
// Outputs: rows_out [capacity, columns] with rows_scale (WITH_ROWS); data_t [columns, capacity] with
// scale_t[(r / 128) * scale_t_ld + column], or with BLOCK scale_t[(column / 128) * scale_t_ld + r / 128].
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    permute_to_channel(const u8* __restrict__ data, int pitch, const float* __restrict__ scale,
                       int scale_row_step, int scale_block_step,
                       const int* __restrict__ slot_of_row, u32 multiplier, int shift, int columns,
                       int capacity, u8* __restrict__ rows_out, float* __restrict__ rows_scale,
                       int rows_scale_ld, u8* __restrict__ data_t, float* __restrict__ scale_t,
                       int scale_t_ld) {
  alignas(128) __shared__ u8 tile[kTileRows * kTilePitch];
  alignas(16) __shared__ TileScales scales[kColumns / 128];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int row0 = blockIdx.x * kTileRows;
  int column0 = blockIdx.y * kColumns;
  int width = min(kColumns, columns - column0);   // 128 or 256
  const int* slots = slot_of_row + row0;

  // 16 lanes read 256 bytes of a row; each thread has eight consecutive rows.
  int chunk = threadIdx.x & 15;
  int first = (threadIdx.x >> 4) * 8;
  bool inside = chunk * 16 < width;
  u8* own = tile + run_offset(first, chunk);
  {
    const int4* eight = reinterpret_cast<const int4*>(slots + first);
    int4 low = __ldg(eight), high = __ldg(eight + 1);
    if (low.x == kUnused) return;
    const u8* source = data + column0 + (inside ? chunk * 16 : 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int slot = element_of(i < 4 ? low : high, i & 3);
      i64 token = divide(max(slot, 0), multiplier, shift);
      copy_async_16(own + i * kTilePitch, source + token * pitch, slot < 0 || !inside);
    }
    copy_async_commit();
  }
  if (warp * 128 < width) {
    i64 block = column0 / 128 + warp;
    gather_scales(scales[warp], slots, scale + block * scale_block_step, scale_row_step, multiplier,
                  shift, kWithRows ? rows_scale + block * rows_scale_ld + row0 : nullptr);
  }
  copy_async_wait<0>();
  if (kWithRows && inside) {
    // What this thread copied itself, so no barrier is needed yet.
    u8* to = rows_out + (i64)(row0 + first) * columns + column0 + chunk * 16;
#pragma unroll
    for (int i = 0; i < 8; ++i, to += columns)
      store_stream(to, *reinterpret_cast<const uint4*>(own + i * kTilePitch));
  }
  __syncthreads();

  for (int c = warp; c * 16 < width; c += kWarps) {
    i64 column = column0 + c * 16 + 4 * (lane & 3);
    Output out = {data_t + column * capacity + row0 + kRun * (lane >> 2), capacity,
                  scale_of_column(scale_t, scale_t_ld, column)};
    cast_chunk(tile, c, scales[c >> 3], out);
  }
}
