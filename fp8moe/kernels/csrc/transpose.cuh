// Gathered per_token E4M3 rows to per_channel: dequantize, transpose, cast again with one scale per
// channel and 128 rows. Also the gathered rows themselves, from the same read.
//
// Built for POW2 = 0 | 1 (the new scales) and WITH_ROWS = 0 | 1. A CTA takes 128 rows x 256 columns;
// the grid walks all rows of one column strip before the next, see permute.cuh.
//
// The value of an element is v = float(q) * scale_of_row, its cast e4m3(v * inv_of_column). When all
// these factors are powers of two and the rows' exponents lie close together, both products are exact
// in packed f16, relative to the largest row scale: half the instructions. Each warp decides for its
// 16 columns; whatever does not fit takes the FP32 path, so the bytes are the same either way.
#include "tile.cuh"

static constexpr bool kPow2 = POW2;
static constexpr bool kWithRows = WITH_ROWS;
static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kColumns = 256;
static constexpr int kMaxShift = 15;       // 2^-9 (smallest E4M3) * 2^-15 is the smallest f16
static constexpr int kMinExponent = 71;    // of the largest row scale: 2^-56, the smallest that casts make

__device__ __forceinline__ u32 multiply_f16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
__device__ __forceinline__ u32 f16x2_to_e4m3x2(u32 pair) {
  u16 bytes;
  asm("cvt.rn.satfinite.e4m3x2.f16x2 %0, %1;" : "=h"(bytes) : "r"(pair));
  return bytes;
}

// 2^exponent as f16 in both halves, -15 <= exponent <= 15.
__device__ __forceinline__ u32 power_f16x2(int exponent) {
  u32 half = exponent == -15 ? 0x0200u : (u32)(15 + exponent) << 10;
  return half | (half << 16);
}

// One warp's share: 16 columns x 128 rows; a lane has rows 4 * lane .. 4 * lane + 3.
struct Share {
  u32 word[4][4];   // [row][four columns]
  float scale[4];   // of the four rows; 0 in padding

  // Rows (0, 1) or (2, 3) of column j as two E4M3 values.
  __device__ __forceinline__ u32 rows_of_column(int pair, int j) const {
    u32 a = word[2 * pair][j / 4], b = word[2 * pair + 1][j / 4];
    return __byte_perm(a, b, j % 4 == 0 ? 0x0040 : j % 4 == 1 ? 0x0051 : j % 4 == 2 ? 0x0062 : 0x0073);
  }
};

struct Output {
  u8* data;          // first column of the warp, at the lane's rows
  i64 pitch;         // bytes from one column to the next
  float* scale;      // of the warp's first column
};

// Writes the scale of this lane's column (lane / 2) and shares its multiplier with the warp.
__device__ __forceinline__ void publish(u32* factors, u32 factor, const Output& out, float scale) {
  int lane = threadIdx.x & 31;
  if ((lane & 1) == 0) {
    factors[lane / 2] = factor;
    store_stream(out.scale + lane / 2, scale);
  }
  __syncwarp();
}

__device__ __forceinline__ void load_factors(const u32* factors, u32 (&f)[16]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 four = reinterpret_cast<const uint4*>(factors)[i];
    f[4 * i] = four.x, f[4 * i + 1] = four.y, f[4 * i + 2] = four.z, f[4 * i + 3] = four.w;
  }
}

// Any row scales.
__device__ __forceinline__ void cast_share_f32(const Share& in, u32* factors, const Output& out) {
  u32 amax[16];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    u32 a = e4m3x2_to_f16x2(in.rows_of_column(0, j)), b = e4m3x2_to_f16x2(in.rows_of_column(1, j));
    amax[j] = max_u32(max_u32(abs_bits(f16_to_float(a) * in.scale[0]),
                              abs_bits(f16_to_float(a >> 16) * in.scale[1])),
                      max_u32(abs_bits(f16_to_float(b) * in.scale[2]),
                              abs_bits(f16_to_float(b >> 16) * in.scale[3])));
  }
  BlockScale s = block_scale<kPow2>(reduce_columns(amax, MaxU32()));
  publish(factors, __float_as_uint(s.inv), out, s.scale);
  u32 inv[16];
  load_factors(factors, inv);
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    u32 a = e4m3x2_to_f16x2(in.rows_of_column(0, j)), b = e4m3x2_to_f16x2(in.rows_of_column(1, j));
    float f = __uint_as_float(inv[j]);
    store_stream(out.data + j * out.pitch,
                 pack_e4m3x4(__fmul_rn(f16_to_float(a) * in.scale[0], f),
                             __fmul_rn(f16_to_float(a >> 16) * in.scale[1], f),
                             __fmul_rn(f16_to_float(b) * in.scale[2], f),
                             __fmul_rn(f16_to_float(b >> 16) * in.scale[3], f)));
  }
}

// Power-of-two scales, when they fit; false (and nothing written) when they do not.
__device__ __forceinline__ bool cast_share_f16(const Share& in, u32* factors, const Output& out) {
  int exponent[4], largest = 0;
  bool fits = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 bits = __float_as_uint(in.scale[i]);
    exponent[i] = bits >> 23;
    fits = fits && (bits & 0x007FFFFFu) == 0 && exponent[i] < 255;
    largest = max(largest, exponent[i]);
  }
  largest = __reduce_max_sync(kFullWarp, largest);
  fits = fits && largest >= kMinExponent;
  u32 row_factor[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    int shift = largest - exponent[i];
    row_factor[i] = shift <= kMaxShift ? power_f16x2(-shift) : 0;
    // A row further down would vanish; that is exact only if it holds nothing (then a zero token
    // among loud ones does not cost the warp its fast path).
    u32 any = (in.word[i][0] | in.word[i][1] | in.word[i][2] | in.word[i][3]) & 0x7F7F7F7Fu;
    if (shift > kMaxShift && any != 0 && exponent[i] != 0) fits = false;
  }
  if (!__all_sync(kFullWarp, fits)) return false;
  u32 rows01 = __byte_perm(row_factor[0], row_factor[1], 0x5410);
  u32 rows23 = __byte_perm(row_factor[2], row_factor[3], 0x5410);

  u32 v[16][2], amax[8];
#pragma unroll
  for (int j = 0; j < 16; ++j) {
    v[j][0] = multiply_f16x2(e4m3x2_to_f16x2(in.rows_of_column(0, j)), rows01);
    v[j][1] = multiply_f16x2(e4m3x2_to_f16x2(in.rows_of_column(1, j)), rows23);
  }
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    u32 a = max_u16x2(abs_bits_16x2(v[2 * j][0]), abs_bits_16x2(v[2 * j][1]));
    u32 b = max_u16x2(abs_bits_16x2(v[2 * j + 1][0]), abs_bits_16x2(v[2 * j + 1][1]));
    amax[j] = max_u16x2(__byte_perm(a, b, 0x5410), __byte_perm(a, b, 0x7632));
  }
  u32 pair = reduce_columns(amax, MaxU16x2());   // lanes 4p .. 4p + 3: columns 2p and 2p + 1
  u32 own = threadIdx.x & 2 ? pair >> 16 : pair & 0xFFFFu;
  // Exact: at least 2^-24 * 2^-56; above the largest float it is Inf, as the FP32 products are.
  float relative = f16_to_float(own);
  BlockScale s =
      block_scale<true>(__float_as_uint(relative * __uint_as_float((u32)largest << 23)));
  int up = largest - (int)(__float_as_uint(s.scale) >> 23);
  u32 factor;
  if (own == 0) {
    factor = power_f16x2(0);
  } else if (__float_as_uint(s.scale) == kNanBits) {
    factor = 0x7FFF7FFFu;
  } else {
    fits = up <= 15;
    factor = power_f16x2(up <= 15 ? up : 0);
  }
  if (!__all_sync(kFullWarp, fits)) return false;
  publish(factors, factor, out, s.scale);
  u32 f[16];
  load_factors(factors, f);
#pragma unroll
  for (int j = 0; j < 16; ++j)
    store_stream(out.data + j * out.pitch,
                 join_halves(f16x2_to_e4m3x2(multiply_f16x2(v[j][0], f[j])),
                             f16x2_to_e4m3x2(multiply_f16x2(v[j][1], f[j]))));
  return true;
}

// data [T, columns] with scale[(column / 128) * scale_ld + token] is gathered by
// token = slot_of_row[r] / topk. Outputs: rows_out [capacity, columns] with rows_scale (WITH_ROWS);
// data_t [columns, capacity] with scale_t[(r / 128) * scale_t_ld + column].
extern "C" __global__ void __launch_bounds__(kThreads, 3)
    permute_to_channel(const u8* __restrict__ data, const float* __restrict__ scale, int scale_ld,
                       const int* __restrict__ slot_of_row, u32 multiplier, int shift, int columns,
                       int capacity, u8* __restrict__ rows_out, float* __restrict__ rows_scale,
                       int rows_scale_ld, u8* __restrict__ data_t, float* __restrict__ scale_t,
                       int scale_t_ld) {
  __shared__ alignas(128) u8 tile[kTileRows * kTilePitch];
  __shared__ alignas(16) float row_scale[kColumns / 128][kTileRows];
  __shared__ alignas(16) u32 factors[kWarps][16];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int row0 = blockIdx.x * kTileRows;
  int column0 = blockIdx.y * kColumns;
  int width = min(kColumns, columns - column0);   // 128 or 256
  if (tile_unused(slot_of_row, row0)) return;

  // 16 lanes read 256 bytes of a row; each thread has eight consecutive rows.
  int chunk = threadIdx.x & 15;
  int first = (threadIdx.x >> 4) * 8;
  bool inside = chunk * 16 < width;
  {
    const int4* slots = reinterpret_cast<const int4*>(slot_of_row + row0 + first);
    int4 low = __ldg(slots), high = __ldg(slots + 1);
    const u8* source = data + column0 + (inside ? chunk * 16 : 0);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      int slot = element_of(i < 4 ? low : high, i & 3);
      i64 token = slot < 0 ? 0 : divide(slot, multiplier, shift);
      copy_async_16(tile + tile_offset(first + i, chunk), source + token * columns,
                    slot < 0 || !inside);
    }
    copy_async_commit();
  }
  {
    int half = threadIdx.x >> 7, row = threadIdx.x & 127;
    if (half * 128 < width) {
      int slot = __ldg(slot_of_row + row0 + row);
      i64 block = column0 / 128 + half;
      float value = 0.0f;
      if (slot >= 0) value = __ldg(scale + block * scale_ld + divide(slot, multiplier, shift));
      row_scale[half][row] = value;
      if (kWithRows)
        store_stream(rows_scale + block * rows_scale_ld + row0 + row, slot < 0 ? kPadScale : value);
    }
  }
  copy_async_wait<0>();
  if (kWithRows && inside) {
    // What this thread copied itself, so no barrier is needed yet.
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      uint4 v = *reinterpret_cast<const uint4*>(tile + tile_offset(first + i, chunk));
      store_stream(rows_out + (i64)(row0 + first + i) * columns + column0 + chunk * 16, v);
    }
  }
  __syncthreads();

  for (int c = warp; c * 16 < width; c += kWarps) {
    Share share;
    float4 scales = *reinterpret_cast<const float4*>(&row_scale[c >> 3][4 * lane]);
    share.scale[0] = scales.x, share.scale[1] = scales.y;
    share.scale[2] = scales.z, share.scale[3] = scales.w;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 v = *reinterpret_cast<const uint4*>(tile + tile_offset(4 * lane + i, c));
      share.word[i][0] = v.x, share.word[i][1] = v.y, share.word[i][2] = v.z, share.word[i][3] = v.w;
    }
    int column = column0 + c * 16;
    Output out = {data_t + (i64)column * capacity + row0 + 4 * lane, capacity,
                  scale_t + (i64)blockIdx.x * scale_t_ld + column};
    if (!kPow2 || !cast_share_f16(share, factors[warp], out))
      cast_share_f32(share, factors[warp], out);
    __syncwarp();   // the factors of this round have been read
  }
}
