// Gathered per_token E4M3 rows to per_channel: dequantize, transpose, cast again with one scale per
// channel and 128 rows. Also the gathered rows themselves, from the same read.
//
// Built for POW2 = 0 | 1 (the new scales) and WITH_ROWS = 0 | 1. A CTA takes 128 rows x 256 columns.
// The grid walks all rows of one column strip before the next: the strip of every token then stays in
// L2 while the K rows of a token read it, so DRAM delivers each token once.
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
static constexpr u32 kMaxShift = 15u << 23;   // 2^-9 (smallest E4M3) * 2^-15: smallest f16
static constexpr u32 kMinLargest = 71u << 23;   // 2^-56, the smallest scale that casts make
static constexpr u32 kMaxLargest = 253u << 23;  // 2^126: its reciprocal is still normal

__device__ __forceinline__ u32 multiply_f16x2(u32 a, u32 b) {
  u32 product;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(product) : "r"(a), "r"(b));
  return product;
}
// The larger magnitude in each half; NaN wins.
__device__ __forceinline__ u32 max_abs_f16x2(u32 a, u32 b) {
  u32 result;
  asm("{\n.reg .b32 x, y;\nabs.f16x2 x, %1;\nabs.f16x2 y, %2;\nmax.NaN.f16x2 %0, x, y;\n}"
      : "=r"(result)
      : "r"(a), "r"(b));
  return result;
}
__device__ __forceinline__ u32 pack_f16x2(float low, float high) {
  u32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
// Four E4M3 values as two packed pairs of f16: exact. One block of PTX, as below, spares the
// instructions that would split (or join) the 16-bit halves.
__device__ __forceinline__ void e4m3x4_to_f16(u32 word, u32& low, u32& high) {
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\ncvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(low), "=r"(high)
      : "r"(word));
}
__device__ __forceinline__ u32 f16_to_e4m3x4(u32 low, u32 high) {
  u32 word;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\nmov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "r"(low), "r"(high));
  return word;
}

// One warp's share: 16 columns x 128 rows; a lane has rows 4 * lane .. 4 * lane + 3. It is cast in two
// halves of eight columns: all sixteen at once would not leave room for four CTAs on an SM.
struct Share {
  u32 word[4][4];   // [row][four columns]
  float scale[4];   // of the four rows; 0 in padding

  // Columns j and j + 1 (j even) of rows (0, 1) or (2, 3) as packed f16: exact.
  __device__ __forceinline__ void columns(int pair, int j, u32& first, u32& second) const {
    u32 a = word[2 * pair][j / 4], b = word[2 * pair + 1][j / 4];
    e4m3x4_to_f16(__byte_perm(a, b, j & 2 ? 0x7362 : 0x5140), first, second);
  }
};

static constexpr int kHalf = 8;

struct Output {
  u8* data;       // first column of the half, at the lane's rows
  i64 pitch;      // bytes from one column to the next
  float* scale;   // of the half's first column
  u32* factors;   // the warp's: one per column
};

// Writes the scale of this lane's column (lane / 4) and gives its multiplier to the whole warp.
__device__ __forceinline__ void share_factors(const Output& out, float scale, u32 factor,
                                              u32 (&f)[kHalf]) {
  int lane = threadIdx.x & 31;
  if ((lane & 3) == 0) {
    out.factors[lane >> 2] = factor;
    store_stream(out.scale + (lane >> 2), scale);
  }
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kHalf / 4; ++i) {
    uint4 four = reinterpret_cast<const uint4*>(out.factors)[i];
    f[4 * i] = four.x, f[4 * i + 1] = four.y, f[4 * i + 2] = four.z, f[4 * i + 3] = four.w;
  }
}

// Any row scales.
__device__ __forceinline__ void cast_f32(const Share& in, int first, const Output& out) {
  u32 amax[kHalf];
#pragma unroll
  for (int j = 0; j < kHalf; j += 2) {
    u32 v[2][2];   // [column][rows]
    in.columns(0, first + j, v[0][0], v[1][0]);
    in.columns(1, first + j, v[0][1], v[1][1]);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      amax[j + i] = max_u32(max_u32(abs_bits(f16_to_float(v[i][0]) * in.scale[0]),
                                    abs_bits(f16_to_float(v[i][0] >> 16) * in.scale[1])),
                            max_u32(abs_bits(f16_to_float(v[i][1]) * in.scale[2]),
                                    abs_bits(f16_to_float(v[i][1] >> 16) * in.scale[3])));
  }
  BlockScale s = block_scale<kPow2>(reduce_columns(amax, MaxU32()));
  u32 inv[kHalf];
  share_factors(out, s.scale, __float_as_uint(s.inv), inv);
#pragma unroll
  for (int j = 0; j < kHalf; j += 2) {
    u32 v[2][2];
    in.columns(0, first + j, v[0][0], v[1][0]);
    in.columns(1, first + j, v[0][1], v[1][1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float f = __uint_as_float(inv[j + i]);
      store_stream(out.data + (j + i) * out.pitch,
                   pack_e4m3x4(f16_to_float(v[i][0]) * in.scale[0] * f,
                               f16_to_float(v[i][0] >> 16) * in.scale[1] * f,
                               f16_to_float(v[i][1]) * in.scale[2] * f,
                               f16_to_float(v[i][1] >> 16) * in.scale[3] * f));
    }
  }
}

// The rows' scales for packed f16, relative to the largest of the warp's 128 rows.
struct RowFactors {
  u32 pair[2];   // rows (0, 1) and (2, 3): powers of two
  float unit;    // the largest scale
  bool fits;     // the same in all lanes
};

__device__ __forceinline__ RowFactors row_factors(const Share& in) {
  u32 bits[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(in.scale[i]);
  u32 largest = __reduce_max_sync(
      kFullWarp, max_u32(max_u32(bits[0], bits[1]), max_u32(bits[2], bits[3])));
  u32 mantissas = (bits[0] | bits[1] | bits[2] | bits[3]) & 0x007FFFFFu;
  bool fits = mantissas == 0 && largest >= kMinLargest && largest <= kMaxLargest;
  // Scales further down do not fit. A row of zeros does not need to: such rows are common (masked
  // tokens have no gradient) and must not cost the warp its fast path. Scale 0 is padding.
  u32 quiet = largest - kMaxShift;
  u32 smallest = min(min(bits[0] - 1, bits[1] - 1), min(bits[2] - 1, bits[3] - 1));
  if (smallest < quiet - 1) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      u32 any = (in.word[i][0] | in.word[i][1] | in.word[i][2] | in.word[i][3]) & 0x7F7F7F7Fu;
      if (bits[i] - 1 < quiet - 1 && any != 0) fits = false;
    }
  }
  float down = __uint_as_float((254u << 23) - largest);   // 1 / largest
  return {{pack_f16x2(in.scale[0] * down, in.scale[1] * down),
           pack_f16x2(in.scale[2] * down, in.scale[3] * down)},
          __uint_as_float(largest),
          (bool)__all_sync(kFullWarp, fits)};
}

// Power-of-two scales that fit; false, and nothing written, when a column is too quiet for f16.
__device__ __forceinline__ bool cast_f16(const Share& in, const RowFactors& rows, int first,
                                         const Output& out) {
  u32 v[kHalf][2], amax[kHalf / 2];
#pragma unroll
  for (int pair = 0; pair < 2; ++pair)
#pragma unroll
    for (int j = 0; j < kHalf; j += 2) {
      u32 two[2];
      in.columns(pair, first + j, two[0], two[1]);
#pragma unroll
      for (int i = 0; i < 2; ++i) v[j + i][pair] = multiply_f16x2(two[i], rows.pair[pair]);
    }
#pragma unroll
  for (int j = 0; j < kHalf / 2; ++j) {
    u32 a = max_abs_f16x2(v[2 * j][0], v[2 * j][1]);
    u32 b = max_abs_f16x2(v[2 * j + 1][0], v[2 * j + 1][1]);
    amax[j] = max_u16x2(join_halves(a, b), __byte_perm(a, b, 0x7632));
  }
  u32 two = reduce_columns(amax, MaxU16x2());   // lanes 8p .. 8p + 7: columns 2p and 2p + 1
  u32 own = threadIdx.x & 4 ? two >> 16 : two & 0xFFFFu;
  // Exact: not below 2^-24 * 2^-56; above the largest float it is Inf, as the FP32 products are.
  BlockScale s = block_scale<true>(__float_as_uint(f16_to_float(own) * rows.unit));
  float factor = s.inv * rows.unit;   // 1 to 2^32, or NaN
  if (own == 0) factor = 1.0f;
  if (__any_sync(kFullWarp, factor > 32768.0f)) return false;
  u32 f[kHalf];
  share_factors(out, s.scale, pack_f16x2(factor, factor), f);
#pragma unroll
  for (int j = 0; j < kHalf; ++j)
    store_stream(out.data + j * out.pitch,
                 f16_to_e4m3x4(multiply_f16x2(v[j][0], f[j]), multiply_f16x2(v[j][1], f[j])));
  return true;
}

// data [T, columns] with scale[(column / 128) * scale_ld + token] is gathered by
// token = slot_of_row[r] / topk. Outputs: rows_out [capacity, columns] with rows_scale (WITH_ROWS);
// data_t [columns, capacity] with scale_t[(r / 128) * scale_t_ld + column].
extern "C" __global__ void __launch_bounds__(kThreads, 4)
    permute_to_channel(const u8* __restrict__ data, const float* __restrict__ scale, int scale_ld,
                       const int* __restrict__ slot_of_row, u32 multiplier, int shift, int columns,
                       int capacity, u8* __restrict__ rows_out, float* __restrict__ rows_scale,
                       int rows_scale_ld, u8* __restrict__ data_t, float* __restrict__ scale_t,
                       int scale_t_ld) {
  alignas(128) __shared__ u8 tile[kTileRows * kTilePitch];
  alignas(16) __shared__ float row_scale[kColumns / 128][kTileRows];
  alignas(16) __shared__ u32 factors[kWarps][kHalf];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int row0 = blockIdx.x * kTileRows;
  int column0 = blockIdx.y * kColumns;
  int width = min(kColumns, columns - column0);   // 128 or 256

  // 16 lanes read 256 bytes of a row; each thread has eight consecutive rows.
  int chunk = threadIdx.x & 15;
  int first = (threadIdx.x >> 4) * 8;
  bool inside = chunk * 16 < width;
  {
    const int4* slots = reinterpret_cast<const int4*>(slot_of_row + row0 + first);
    int4 low = __ldg(slots), high = __ldg(slots + 1);
    if (low.x == kUnused) return;
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
    RowFactors rows;
    if (kPow2) rows = row_factors(share);
#pragma unroll
    for (int first_column = 0; first_column < 16; first_column += kHalf) {
      i64 column = column0 + c * 16 + first_column;
      Output out = {data_t + column * capacity + row0 + 4 * lane, capacity,
                    scale_t + (i64)blockIdx.x * scale_t_ld + column, factors[warp]};
      if (!kPow2 || !rows.fits || !cast_f16(share, rows, first_column, out))
        cast_f32(share, first_column, out);
      __syncwarp();   // the factors have been read
    }
  }
}
