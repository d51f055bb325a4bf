// Casts to E4M3 with one scale per 1x128 or 128x128 block, and the byte transpose. See rows.cuh for
// what they are built for.
//
// Every kernel issues all the loads of its tile before the first use (32 KB per CTA and several
// CTAs per SM keep HBM busy), and every row or column segment it reads or writes is at least 128
// bytes long, because shorter ones run far below copy bandwidth.
#include "rows.cuh"

// ---------------------------------------------------------------------------------------------
// data[m, k] = e4m3(x[m, k] / scale[m, k / 128]), scale MN-major: scale[(k / 128) * scale_ld + m].
// A CTA casts 64 rows x 256 columns. A warp reads one row of it at once, half a warp per block, and
// a thread keeps its eight columns of eight rows.

extern "C" __global__ void __launch_bounds__(kThreads, ctas_per_sm(4, 2))
cast_per_token(const Raw* x, u8* data, float* scale, int rows, int columns, int scale_ld) {
  __shared__ float tile_scale[2][64];

  const int tiles_across = (columns + 255) / 256;
  const int row0 = blockIdx.x / tiles_across * 64;
  const int column0 = blockIdx.x % tiles_across * 256;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int column = column0 + lane * 8;
  const i64 corner = (i64)(row0 + warp * 8) * columns + column;
  const int left = inside_row(columns - column);
  const int rows_left = column < columns ? rows - row0 - warp * 8 : 0;

  Vec8 v[8];
  load_rows(v, x + corner, columns, rows_left, left);

  // Eight maxima over 16 lanes: each step halves the rows a lane still cares for.
  u32 amax[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) amax[i] = raw_amax(v[i]);
#pragma unroll
  for (int half = 4; half > 0; half >>= 1) {
    bool upper = lane & (2 * half);
#pragma unroll
    for (int i = 0; i < half; ++i) {
      u32 kept = upper ? amax[half + i] : amax[i];
      u32 sent = upper ? amax[i] : amax[half + i];
      amax[i] = max_u32(kept, __shfl_xor_sync(0xFFFFFFFFu, sent, 2 * half));
    }
  }
  amax[0] = max_u32(amax[0], __shfl_xor_sync(0xFFFFFFFFu, amax[0], 1));

  // This lane now holds the maximum of row (lane / 2) % 8 of its half-warp's block.
  BlockScale own = block_scale<kPow2>(magnitude_to_f32_bits<Input>(amax[0]));
  if (!(lane & 1)) tile_scale[lane / 16][warp * 8 + lane / 2 % 8] = own.scale;

#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float inv = __shfl_sync(0xFFFFFFFFu, own.inv, (lane & 16) | (2 * i));
    u32 q[2];
    cast8(v[i], inv, q);
    store8(data + corner + (i64)i * columns, q, i < rows_left ? left : 0);
  }

  __syncthreads();
  if (threadIdx.x < 128) {
    int row = row0 + threadIdx.x % 64, side = threadIdx.x / 64;
    if (row < rows && column0 + side * kBlock < columns)
      scale[(i64)(column0 / kBlock + side) * scale_ld + row] = tile_scale[side][threadIdx.x % 64];
  }
}

// ---------------------------------------------------------------------------------------------
// data[e, n, k] = e4m3(w[e, n, k] / scale[e, n / 128, k / 128]), and with kBoth also the transpose
// data_t[e, k, n], scale_t[e, k / 128, n / 128]. A CTA casts one 128 x 128 block; thread (c, g)
// keeps columns 8c..8c+7 of rows 8g..8g+7.

struct PerBlockArgs {
  const Raw* w;
  u8* data;
  float* scale;
  u8* data_t;
  float* scale_t;
  int n, k;
};

template <bool kBoth> __device__ __forceinline__ void cast_block(const PerBlockArgs& a) {
  __shared__ u32 warp_amax[kThreads / 32];
  __shared__ alignas(16) u8 tile[kBoth ? kBlock * kBlock : 16];

  const int n_blocks = (a.n + 127) / 128, k_blocks = (a.k + 127) / 128;
  const int k_block = blockIdx.x % k_blocks;
  const int rest = blockIdx.x / k_blocks;
  const int n_block = rest % n_blocks, expert = rest / n_blocks;
  const int n0 = n_block * kBlock, k0 = k_block * kBlock;
  const int c = threadIdx.x % 16, g = threadIdx.x / 16;
  const i64 origin = (i64)expert * a.n * a.k;
  const i64 corner = origin + (i64)(n0 + 8 * g) * a.k + k0 + 8 * c;
  const int left = inside_row(a.k - k0 - 8 * c);
  const int rows_left = k0 + 8 * c < a.k ? a.n - n0 - 8 * g : 0;

  Vec8 v[8];
  load_rows(v, a.w + corner, a.k, rows_left, left);

  u32 amax = 0;
#pragma unroll
  for (int r = 0; r < 8; ++r) amax = max_u32(amax, raw_amax(v[r]));
  amax = __reduce_max_sync(0xFFFFFFFFu, amax);
  if (threadIdx.x % 32 == 0) warp_amax[threadIdx.x / 32] = amax;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) amax = max_u32(amax, warp_amax[i]);
  const BlockScale s = block_scale<kPow2>(magnitude_to_f32_bits<Input>(amax));
  if (threadIdx.x == 0) {
    a.scale[((i64)expert * n_blocks + n_block) * k_blocks + k_block] = s.scale;
    if (kBoth) a.scale_t[((i64)expert * k_blocks + k_block) * n_blocks + n_block] = s.scale;
  }

  u32 q[8][2];
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    cast8(v[r], s.inv, q[r]);
    store8(a.data + corner + (i64)r * a.k, q[r], r < rows_left ? left : 0);
  }
  if (kBoth) {
    transpose_bytes_8x8(q);
#pragma unroll
    for (int i = 0; i < 8; ++i) stage(tile, 8 * c + i, c, g, q[i]);
    __syncthreads();
    store_staged<kBlock, kAligned>(tile, a.data_t + origin + (i64)k0 * a.n + n0, a.n, a.n - n0,
                                   a.k - k0);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, ctas_per_sm(4, 2))
cast_per_block(const Raw* w, u8* data, float* scale, int n, int k) {
  cast_block<false>({w, data, scale, nullptr, nullptr, n, k});
}

extern "C" __global__ void __launch_bounds__(kThreads, ctas_per_sm(3, 2))
cast_per_block_both(const Raw* w, u8* data, float* scale, u8* data_t, float* scale_t, int n,
                    int k) {
  cast_block<true>({w, data, scale, data_t, scale_t, n, k});
}

// ---------------------------------------------------------------------------------------------
// data_t[e, k, n] = data[e, n, k], scale_t[e, k / 128, n / 128] = scale[e, n / 128, k / 128].
// A CTA moves 128 rows x 256 columns, so that it reads 256-byte and writes 128-byte segments.

__device__ __forceinline__ void load_byte_rows(uint4 (&v)[8], const u8* p, int pitch, int rows_left,
                                               int left) {
  if (kAligned && rows_left >= 8) {
#pragma unroll
    for (int r = 0; r < 8; ++r) v[r] = load_stream_16(p + (i64)r * pitch);
    return;
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    v[r] = make_uint4(0, 0, 0, 0);
    if (r >= rows_left) continue;
    if constexpr (kAligned) {
      v[r] = load_stream_16(p + (i64)r * pitch);
    } else {
      u32 words[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < 16; ++i)
        if (i < left) words[i / 4] |= (u32)__ldg(p + (i64)r * pitch + i) << (8 * (i % 4));
      v[r] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, ctas_per_sm(4, 4))
transpose_per_block(const u8* data, const float* scale, u8* data_t, float* scale_t, int n, int k) {
  __shared__ alignas(16) u8 tile[2 * kBlock * kBlock];

  const int n_blocks = (n + 127) / 128, k_blocks = (k + 127) / 128;
  const int tiles_across = (k + 255) / 256;
  const int k0 = blockIdx.x % tiles_across * 256;
  const int rest = blockIdx.x / tiles_across;
  const int n_block = rest % n_blocks, expert = rest / n_blocks;
  const int n0 = n_block * kBlock;
  const int c = threadIdx.x % 16, g = threadIdx.x / 16;
  const i64 origin = (i64)expert * n * k;
  const u8* corner = data + origin + (i64)(n0 + 8 * g) * k + k0 + 16 * c;
  const int left = inside_row(k - k0 - 16 * c);
  const int rows_left = k0 + 16 * c < k ? n - n0 - 8 * g : 0;

  uint4 v[8];
  load_byte_rows(v, corner, k, rows_left, left);

  if (threadIdx.x < 2) {
    int k_block = k0 / kBlock + threadIdx.x;
    if (k_block < k_blocks)
      scale_t[((i64)expert * k_blocks + k_block) * n_blocks + n_block] =
          scale[((i64)expert * n_blocks + n_block) * k_blocks + k_block];
  }

#pragma unroll
  for (int h = 0; h < 2; ++h) {
    u32 q[8][2];
#pragma unroll
    for (int r = 0; r < 8; ++r) {
      q[r][0] = h ? v[r].z : v[r].x;
      q[r][1] = h ? v[r].w : v[r].y;
    }
    transpose_bytes_8x8(q);
#pragma unroll
    for (int i = 0; i < 8; ++i) stage(tile, 16 * c + 8 * h + i, c, g, q[i]);
  }
  __syncthreads();
  store_staged<2 * kBlock, kAligned>(tile, data_t + origin + (i64)k0 * n + n0, n, n - n0, k - k0);
}
