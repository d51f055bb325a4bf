// The cast with one scale per 128x1 block of a group, or per 128x128 block (BLOCK = 1), and the
// transpose that wgrad needs with it. Built for BLOCK = 0 | 1 and for what rows.cuh says.
//
// A CTA casts 128 padded rows x 128 columns. It finds its rows on the device, from group_ends; CTAs
// past the last group leave at once.
#include "groups.cuh"
#include "rows.cuh"

static constexpr bool kBlockScales = BLOCK;

// data[n, c] = e4m3(x[r, n] / scale[n, c / 128]): column c of the padded layout is row r of x, each
// group starting at a multiple of 128; pad columns are zero. scale[(c / 128) * scale_ld + n], or with
// BLOCK scale[(n / 128) * scale_ld + c / 128].
extern "C" __global__ void __launch_bounds__(kThreads, ctas_per_sm(4, 2))
cast_per_channel(const Raw* x, const int* group_ends, u8* data, float* scale, int* status, int rows,
                 int columns, int num_groups, int capacity, int scale_ld) {
  __shared__ alignas(16) float column_inv[kBlock];
  __shared__ alignas(16) u8 tile[kBlock * kBlock];

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (blockIdx.x == 0 && warp == 0) check_group_ends(group_ends, num_groups, rows, status);

  const int tiles_across = (columns + 127) / 128;
  const int block = blockIdx.x / tiles_across;
  const int column0 = blockIdx.x % tiles_across * kBlock;
  // Every warp searches for itself: cheaper than a barrier in front of the loads.
  GroupBlock source;
  if (!find_group_block(group_ends, num_groups, rows, block, source)) return;

  const int c = threadIdx.x % 16, g = threadIdx.x / 16;
  const int column = column0 + 8 * c;
  const Raw* corner = x + (i64)(source.first_row + 8 * g) * columns + column;
  const int left = inside_row(columns - column);
  const int rows_left = column < columns ? source.rows - 8 * g : 0;
  Vec8 v[8];
  load_rows(v, corner, columns, rows_left, left);

  // Column maxima over the thread's rows.
  Vec8 amax;
#pragma unroll
  for (int i = 0; i < 2 * (int)sizeof(Raw); ++i) {
    u32 m = magnitude_word(v[0].words[i]);
#pragma unroll
    for (int r = 1; r < 8; ++r) m = max_word(m, magnitude_word(v[r].words[i]));
    amax.words[i] = m;
  }
  float block_inv;
  if constexpr (kBlockScales) {
    // Over the warps, each thread for itself: one barrier, and none behind the scale.
    __shared__ u32 warp_amax[kThreads / 32];
    u32 m = __reduce_max_sync(0xFFFFFFFFu, raw_amax(amax));
    if (lane == 0) warp_amax[warp] = m;
    __syncthreads();
    m = 0;
#pragma unroll
    for (int i = 0; i < kThreads / 32; ++i) m = max_u32(m, warp_amax[i]);
    BlockScale s = block_scale<kPow2>(magnitude_to_f32_bits<Input>(m));
    block_inv = s.inv;
    if (threadIdx.x == 0) scale[(i64)(column0 / kBlock) * scale_ld + block] = s.scale;
  } else {
    // Over the two row groups of the warp, then over the warps.
    __shared__ alignas(16) Raw warp_amax[kThreads / 32][kBlock];
#pragma unroll
    for (int i = 0; i < 2 * (int)sizeof(Raw); ++i)
      amax.words[i] =
          max_word(amax.words[i], __shfl_xor_sync(0xFFFFFFFFu, amax.words[i], 16));
    if (lane < 16) {
#pragma unroll
      for (int i = 0; i < (int)sizeof(Raw) / 2; ++i)
        reinterpret_cast<uint4*>(&warp_amax[warp][8 * c])[i] =
            make_uint4(amax.words[4 * i], amax.words[4 * i + 1], amax.words[4 * i + 2],
                       amax.words[4 * i + 3]);
    }
    __syncthreads();
    if (threadIdx.x < kBlock) {
      u32 m = 0;
#pragma unroll
      for (int i = 0; i < kThreads / 32; ++i) m = max_u32(m, warp_amax[i][threadIdx.x]);
      BlockScale s = block_scale<kPow2>(magnitude_to_f32_bits<Input>(m));
      column_inv[threadIdx.x] = s.inv;
      if (column0 + threadIdx.x < columns)
        scale[(i64)block * scale_ld + column0 + threadIdx.x] = s.scale;
    }
    __syncthreads();
  }

#pragma unroll
  for (int k = 0; k < 8; ++k) {
    u32 q[2];
    cast_column8(v, k, kBlockScales ? block_inv : column_inv[8 * c + k], q);
    stage(tile, 8 * c + k, c, g, q);
  }
  __syncthreads();
  // The padded layout has whole blocks of rows, so columns of the output are always aligned.
  store_staged<kBlock, true>(tile, data + (i64)column0 * capacity + (i64)block * kBlock, capacity,
                             kBlock, columns - column0);
}
