// A 128-row tile of E4M3 with per_token scales, cast again with one scale per channel and 128 rows and
// transposed. Shared by the kernel that gathers E4M3 rows and the one that gathers bf16 rows and casts
// them first.
//
// Memory is not the only limit: at the copy bandwidth of an H200 a thread has eight instructions for
// each element of E4M3 it reads. So a lane takes 16 rows x 4 columns (six instructions an element; four
// rows x 16 columns take nine): 16 rows of a column are one 16-byte store, and a column's maximum needs
// three shuffles.
//
// The value of an element is v = float(q) * scale_of_row, its cast e4m3(v * inv_of_column). When all
// these factors are powers of two and the rows' exponents lie close together, both products are exact
// in packed f16, relative to the largest row scale: half the instructions. Each warp decides for its
// 16 columns; whatever does not fit takes the FP32 path, so the bytes are the same either way.
#pragma once
#include "tile.cuh"

static constexpr bool kPow2 = POW2;
static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kRun = 16;                 // consecutive rows of a lane
static constexpr u32 kMaxShift = 15u << 23;     // 2^-9 (smallest E4M3) * 2^-15: smallest f16
static constexpr u32 kMinLargest = 86u << 23;   // 2^-41: column scales stay above the floor's 2^-56
static constexpr u32 kMaxLargest = 245u << 23;  // 2^118: times 448 it is still finite

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
// One block of PTX spares the instructions that would join the 16-bit halves.
__device__ __forceinline__ u32 f16_to_e4m3x4(u32 low, u32 high) {
  u32 word;
  asm("{\n.reg .b16 low, high;\ncvt.rn.satfinite.e4m3x2.f16x2 low, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f16x2 high, %2;\nmov.b32 %0, {low, high};\n}"
      : "=r"(word)
      : "r"(low), "r"(high));
  return word;
}

// Byte offset of 16-byte chunk `chunk` (0..15) of row `row`. Both walks are free of bank conflicts: 16
// lanes along a row (the xor permutes the chunks of one row), and lanes kRun rows apart, four words of
// a chunk each (the xor sends eight such rows to the eight 16-byte columns of the banks).
__device__ __forceinline__ int run_offset(int row, int chunk) {
  return row * kTilePitch + ((chunk ^ ((row / kRun) & 7)) << 4);
}

// The row scales of 128 columns. Two of them may lie side by side and are read 16 bytes at a time.
struct alignas(16) Scales {
  float row[kTileRows];            // 0 in padding
  u32 factor[kTileRows / 2];       // of two rows, relative to `unit`, as f16; 0 where too small
  float unit;                      // the largest, if packed f16 will do, else 0
  int quiet;                       // rows that are not padding have a factor of 0
};

// One warp: the bits of each lane's four scales, and of the largest of all.
__device__ __forceinline__ u32 largest_scale(const float (&row_scale)[4], u32 (&bits)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) bits[i] = __float_as_uint(row_scale[i]);
  return __reduce_max_sync(
      kFullWarp, max_u32(max_u32(bits[0], bits[1]), max_u32(bits[2], bits[3])));
}

// One warp: what packed f16 needs, from the scales of each lane's four rows 4 * lane + i.
__device__ __forceinline__ void prepare_factors(Scales& s, const float (&row_scale)[4]) {
  int lane = threadIdx.x & 31;
  u32 bits[4];
  u32 largest = largest_scale(row_scale, bits);
  u32 mantissas = (bits[0] | bits[1] | bits[2] | bits[3]) & 0x007FFFFFu;
  bool fits = mantissas == 0 && largest >= kMinLargest && largest <= kMaxLargest;
  float down = __uint_as_float((254u << 23) - largest);   // 1 / largest
  bool quiet = false;
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    bool small = bits[i] < largest - kMaxShift;
    quiet = quiet || (small && bits[i] != 0);
    value[i] = small ? 0.0f : row_scale[i] * down;
  }
  reinterpret_cast<uint2*>(s.factor)[lane] =
      make_uint2(pack_f16x2(value[0], value[1]), pack_f16x2(value[2], value[3]));
  fits = __all_sync(kFullWarp, fits);
  quiet = __any_sync(kFullWarp, quiet);
  if (lane == 0) {
    s.unit = fits ? __uint_as_float(largest) : 0.0f;
    s.quiet = quiet;
  }
}

// A lane's share: rows kRun * (lane / 4) + i, columns 4 * (lane % 4) .. + 3 of a chunk.
struct Share {
  u32 word[kRun];
};
__device__ __forceinline__ Share load_share(const u8* tile, int chunk) {
  int lane = threadIdx.x & 31;
  const u8* from = tile + run_offset(kRun * (lane >> 2), chunk) + 4 * (lane & 3);
  Share share;
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    share.word[i] = *reinterpret_cast<const u32*>(from + i * kTilePitch);
  return share;
}

struct Output {
  u8* data;       // the first of the four columns, at the lane's rows
  i64 pitch;      // bytes from one column to the next
  float* scale;   // of the first of the four columns
};

// Maximum over the eight lanes that share columns.
template <class Max> __device__ __forceinline__ u32 reduce_runs(u32 v, Max max_of) {
#pragma unroll
  for (int step = 4; step < 32; step <<= 1)
    v = max_of(v, __shfl_xor_sync(kFullWarp, v, step));
  return v;
}

// Any row scales, column by column.
__device__ __forceinline__ void cast_f32(const Share& in, const float* row_scale,
                                         const Output& out) {
  int run = (threadIdx.x & 31) >> 2;
  float scale[kRun];
#pragma unroll
  for (int i = 0; i < kRun / 4; ++i) {
    float4 four = reinterpret_cast<const float4*>(row_scale + kRun * run)[i];
    scale[4 * i] = four.x, scale[4 * i + 1] = four.y;
    scale[4 * i + 2] = four.z, scale[4 * i + 3] = four.w;
  }
#pragma unroll 1
  for (int j = 0; j < 4; ++j) {
    u32 bytes = j | (j + 4) << 4;   // byte j of two words
    float v[kRun];
    u32 amax = 0;
#pragma unroll
    for (int i = 0; i < kRun; i += 2) {
      u32 two = e4m3x2_to_f16x2(__byte_perm(in.word[i], in.word[i + 1], bytes));
      v[i] = f16_to_float(two) * scale[i];
      v[i + 1] = f16_to_float(two >> 16) * scale[i + 1];
      amax = max_u32(amax, max_u32(abs_bits(v[i]), abs_bits(v[i + 1])));
    }
    BlockScale s = block_scale<kPow2>(reduce_runs(amax, MaxU32()));
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q[i] = pack_e4m3x4(v[4 * i] * s.inv, v[4 * i + 1] * s.inv, v[4 * i + 2] * s.inv,
                         v[4 * i + 3] * s.inv);
    store_stream(out.data + j * out.pitch, make_uint4(q[0], q[1], q[2], q[3]));
    if (run == 0) store_stream(out.scale + j, s.scale);
  }
}

// Row scales that fit packed f16. False, and nothing written, when a column is too quiet for it, all
// zero, or not finite.
__device__ __forceinline__ bool cast_f16(const Share& in, const Scales& s, const Output& out) {
  int run = (threadIdx.x & 31) >> 2;
  u32 v[4][kRun / 2];   // [column][two rows]
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint4 four = reinterpret_cast<const uint4*>(s.factor + kRun / 2 * run)[half];
    u32 factor[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      int pair = 4 * half + i;
      u32 a = in.word[2 * pair], b = in.word[2 * pair + 1];
      e4m3x4_to_f16(__byte_perm(a, b, 0x5140), v[0][pair], v[1][pair]);
      e4m3x4_to_f16(__byte_perm(a, b, 0x7362), v[2][pair], v[3][pair]);
#pragma unroll
      for (int j = 0; j < 4; ++j) v[j][pair] = multiply_f16x2(v[j][pair], factor[i]);
    }
  }
  // Two columns in the halves of a word from here on.
  u32 amax[2], top[2], factor[2], bad = 0;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    u32 both[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const u32(&column)[kRun / 2] = v[2 * j + i];
      both[i] = max_abs_f16x2(
          max_abs_f16x2(max_abs_f16x2(column[0], column[1]), max_abs_f16x2(column[2], column[3])),
          max_abs_f16x2(max_abs_f16x2(column[4], column[5]), max_abs_f16x2(column[6], column[7])));
    }
    u32 joined = max_u16x2(join_halves(both[0], both[1]), __byte_perm(both[0], both[1], 0x7632));
    amax[j] = reduce_runs(joined, MaxU16x2());
    // The exponent of the smallest power of two not below amax / 1.75 (448 is 1.75 * 2^8), and the
    // factor that takes that power to 2^8: the rule of block_scale in 16 bits.
    top[j] = (amax[j] + 0x00FF00FFu) & 0xFC00FC00u;
    factor[j] = 0x98009800u - top[j];   // (15 + 15 + 8) << 10 less the exponent: at least 1
    bad |= (factor[j] + 0x04000400u) | (amax[j] + 0x04000400u);   // Inf or more, either of them
  }
  if (__any_sync(kFullWarp, (bad & 0x80008000u) != 0)) return false;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    u32 f = __byte_perm(factor[j / 2], 0, j & 1 ? 0x3232 : 0x1010);
    u32 q[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      q[i] = f16_to_e4m3x4(multiply_f16x2(v[j][2 * i], f), multiply_f16x2(v[j][2 * i + 1], f));
    store_stream(out.data + j * out.pitch, make_uint4(q[0], q[1], q[2], q[3]));
  }
  if (run < 4) {   // the lanes of run j write the scales of the columns j
    u32 exponent = (run & 2 ? top[1] : top[0]) >> (run & 1 ? 26 : 10) & 31;
    store_stream(out.scale + run, __uint_as_float(__float_as_uint(s.unit) + ((exponent - 23) << 23)));
  }
  return true;
}

// Whether every row with a factor of 0 is all zero here: padding, and rows too quiet for f16. Rows of
// zeros are common (masked tokens have no gradient) and must not cost the warp its fast path.
__device__ __forceinline__ bool quiet_rows_are_zero(const Share& in, const Scales& s) {
  const u16* factor = reinterpret_cast<const u16*>(s.factor) + kRun * ((threadIdx.x & 31) >> 2);
  bool zero = true;
#pragma unroll
  for (int i = 0; i < kRun; ++i)
    if (factor[i] == 0 && (in.word[i] & 0x7F7F7F7Fu) != 0) zero = false;
  return __all_sync(kFullWarp, zero);
}

// One warp: 16 columns, chunk `chunk` of the tile's rows; `out` points to the lane's first column.
__device__ __forceinline__ void cast_chunk(const u8* tile, int chunk, const Scales& s,
                                           const Output& out) {
  Share share = load_share(tile, chunk);
  bool fits = kPow2 && s.unit != 0.0f && (!s.quiet || quiet_rows_are_zero(share, s));
  if (!fits || !cast_f16(share, s, out)) cast_f32(share, s.row, out);
}
