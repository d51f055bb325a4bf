// Gathered bf16 rows, cast to E4M3 with one scale per row and 128 columns, then to per_channel (see
// channel.cuh) or to 128 x 128 scales (see channel_block.cuh); also the rows themselves. Bit for bit
// the cast per token followed by the conversion of its gathered rows, without the tensor in between.
//
// Built for POW2 = 0 | 1, BLOCK = 0 | 1 and, without BLOCK, WITH_ROWS = 0 | 1. A CTA takes 128 rows x
// 128 columns. The grid walks all rows of one column strip before the next, so that L2 serves the K
// rows of a token.
#include "bf16.cuh"
#include "channel_block.cuh"

static constexpr bool kWithRows = WITH_ROWS;

// The scale of each lane's row: lane l of a half-warp holds row (l >> 2) + 4 * ((l >> 1) & 1) of eight.
__device__ __forceinline__ int row_of_lane(int lane) {
  return ((lane & 15) >> 2) + 4 * ((lane >> 1) & 1);
}
__device__ __forceinline__ int lane_of_row(int row) { return (row & 3) * 4 + (row >> 2) * 2; }

// x [T, columns] is gathered by token = slot_of_row[r] / topk. Outputs as of permute_to_channel.
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    cast_permute_to_channel(const u16* __restrict__ x, const int* __restrict__ slot_of_row,
                            u32 multiplier, int shift, int columns, int capacity,
                            u8* __restrict__ rows_out, float* __restrict__ rows_scale,
                            int rows_scale_ld, u8* __restrict__ data_t,
                            float* __restrict__ scale_t, int scale_t_ld) {
  alignas(128) __shared__ u8 tile[kTileRows * kTilePitch];   // bf16, then E4M3 in half of each row
  alignas(16) __shared__ TileScales scales;
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int row0 = blockIdx.x * kTileRows;
  int column0 = blockIdx.y * 128;
  const int* slots = slot_of_row + row0;

  // 16 lanes read 256 bytes of a row; each thread has eight columns of eight consecutive rows.
  int chunk = threadIdx.x & 15;
  int first = (threadIdx.x >> 4) * 8;
  const int4* eight = reinterpret_cast<const int4*>(slots + first);
  int4 low = __ldg(eight), high = __ldg(eight + 1);
  if (low.x == kUnused) return;
  {
    u8* own = tile + run_offset(first, chunk);
    const u16* source = x + column0 + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int slot = element_of(i < 4 ? low : high, i & 3);
      i64 token = divide(max(slot, 0), multiplier, shift);
      copy_async_16(own + i * kTilePitch, source + token * columns, slot < 0);
    }
    copy_async_commit();
    copy_async_wait<0>();
  }

  u32 v[8][4];
  {
    const u8* own = tile + run_offset(first, chunk);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint4 four = *reinterpret_cast<const uint4*>(own + i * kTilePitch);
      v[i][0] = four.x, v[i][1] = four.y, v[i][2] = four.z, v[i][3] = four.w;
    }
  }
  u32 amax[4];   // rows i and i + 4
#pragma unroll
  for (int i = 0; i < 4; ++i) amax[i] = amax_bf16x8(v[i]) | amax_bf16x8(v[i + 4]) << 16;
  u32 pair = reduce_columns<8>(amax, MaxU16x2());   // over the 16 lanes of a row
  BlockScale s = block_scale<kPow2>(lane & 2 ? pair & 0xFFFF0000u : pair << 16);
  if ((lane & 1) == 0) {
    int row = row_of_lane(lane);
    bool pad = element_of(row < 4 ? low : high, row & 3) < 0;
    scales.row[first + row] = pad ? 0.0f : s.scale;
  }
  __syncwarp();   // the bf16 rows of this warp have been read: E4M3 may take their place
  {
    u8* staged = tile + run_offset(first, chunk >> 1) + 8 * (chunk & 1);
    u8* to = rows_out + (i64)(row0 + first) * columns + column0 + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint2 q = cast_bf16x8(v[i], __shfl_sync(kFullWarp, s.inv, (lane & 16) | lane_of_row(i)));
      *reinterpret_cast<uint2*>(staged + i * kTilePitch) = q;
      if (kWithRows) *reinterpret_cast<uint2*>(to + (i64)i * columns) = q;
    }
  }
  __syncthreads();
  if (kWithRows && threadIdx.x >= 128) {
    float scale = scales.row[threadIdx.x - 128];   // 0 in padding
    rows_scale[(i64)blockIdx.y * rows_scale_ld + row0 + threadIdx.x - 128] =
        scale == 0.0f ? kPadScale : scale;
  }
  if (kPow2 || kBlockScales) {
    if (warp == 0) {
      float4 four = reinterpret_cast<const float4*>(scales.row)[lane];
      float value[4] = {four.x, four.y, four.z, four.w};
      prepare_factors(scales, value);
    }
    __syncthreads();
  }

  i64 column = column0 + warp * 16 + 4 * (lane & 3);
  Output out = {data_t + column * capacity + row0 + kRun * (lane >> 2), capacity,
                scale_of_column(scale_t, scale_t_ld, column)};
  cast_chunk(tile, warp, scales, out);
}
