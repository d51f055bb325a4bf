// The conversion of channel.cuh with one scale per 128 rows x 128 channels: BLOCK = 1.
//
// The block's scale is the largest of its row scales, so it is known before the elements are: no
// maxima, no exchange between lanes, 2.2 instructions for an element in packed f16.
//
// Packed f16 needs row scales that are powers of two and nothing else. An element of a row 2^k below
// the block's scale becomes q * 2^-k: exact in f16 (four significant bits) down to the smallest
// normal one, 2^-14. What lies below may be rounded in f16, or its factor may have become 0 (k > 24),
// but it is less than 2^-10, half of the smallest E4M3, before and after: a zero with the element's
// sign, as it is in FP32.
#pragma once
#include "channel.cuh"

static constexpr bool kBlockScales = BLOCK;

// The rows of one block. Two of them may lie side by side and are read 16 bytes at a time.
struct alignas(16) BlockRows {
  float row[kTileRows];        // their scales, 0 in padding
  u32 factor[kTileRows / 2];   // of two rows, relative to the block's scale, as f16
  float scale, inv;            // the block's
  int packed;                  // whether packed f16 will do
};

// Scale and inverse of a block whose largest row scale is `largest`: those of a block with the maximum
// 448 * largest, capped where that would overflow. Only FP32 scales can differ from `largest` for it
// (by one unit in the last place, a product and a quotient having been rounded): they are kept.
__device__ __forceinline__ BlockScale scale_of_rows(u32 largest) {
  u32 amax = largest;
  if (largest < kInfBits) {
    amax = __float_as_uint(448.0f * __uint_as_float(largest));
    if (amax >= kInfBits) amax = kInfBits - 1;
  }
  BlockScale s = block_scale<kPow2>(amax);
  if (!kPow2 && amax >= kAmaxFloorBits && amax < kInfBits) s.scale = __uint_as_float(largest);
  return s;
}

// One warp: everything but `row`, from the scales of each lane's four rows 4 * lane + i.
__device__ __forceinline__ void prepare_factors(BlockRows& s, const float (&row_scale)[4]) {
  int lane = threadIdx.x & 31;
  u32 bits[4];
  u32 largest = largest_scale(row_scale, bits);
  BlockScale block = scale_of_rows(largest);
  bool packed = false;
  if (kPow2) {
    u32 mantissas = (bits[0] | bits[1] | bits[2] | bits[3]) & 0x007FFFFFu;
    // Larger than kMaxLargest, an element in FP32 may overflow.
    packed = __all_sync(kFullWarp, mantissas == 0) && largest <= kMaxLargest;
    reinterpret_cast<uint2*>(s.factor)[lane] =
        make_uint2(pack_f16x2(row_scale[0] * block.inv, row_scale[1] * block.inv),
                   pack_f16x2(row_scale[2] * block.inv, row_scale[3] * block.inv));
  }
  if (lane == 0) {
    s.scale = block.scale;
    s.inv = block.inv;
    s.packed = packed;
  }
}

// Four rows of one column: e4m3(float(q) * row scale * inv), or the packed product.
__device__ __forceinline__ u32 cast_rows_f32(u32 low, u32 high, float4 row, float inv) {
  return pack_e4m3x4(f16_to_float(low) * row.x * inv, f16_to_float(low >> 16) * row.y * inv,
                     f16_to_float(high) * row.z * inv, f16_to_float(high >> 16) * row.w * inv);
}
__device__ __forceinline__ u32 cast_rows_f16(u32 low, u32 high, uint2 factor) {
  return f16_to_e4m3x4(multiply_f16x2(low, factor.x), multiply_f16x2(high, factor.y));
}

template <bool kPacked>
__device__ __forceinline__ void cast_block(const Share& in, const BlockRows& s, const Output& out) {
  int first = kRun * ((threadIdx.x & 31) >> 2);
  float inv = s.inv;
  u32 q[4][kRun / 4];   // [column][four rows]
#pragma unroll
  for (int i = 0; i < kRun / 4; ++i) {
    u32 v[4][2];   // [column][two rows]
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 a = in.word[4 * i + 2 * half], b = in.word[4 * i + 2 * half + 1];
      e4m3x4_to_f16(__byte_perm(a, b, 0x5140), v[0][half], v[1][half]);
      e4m3x4_to_f16(__byte_perm(a, b, 0x7362), v[2][half], v[3][half]);
    }
    if constexpr (kPacked) {
      uint2 factor = reinterpret_cast<const uint2*>(s.factor + first / 2)[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) q[j][i] = cast_rows_f16(v[j][0], v[j][1], factor);
    } else {
      float4 row = reinterpret_cast<const float4*>(s.row + first)[i];
#pragma unroll
      for (int j = 0; j < 4; ++j) q[j][i] = cast_rows_f32(v[j][0], v[j][1], row, inv);
    }
  }
#pragma unroll
  for (int j = 0; j < 4; ++j)
    store_stream(out.data + j * out.pitch, make_uint4(q[j][0], q[j][1], q[j][2], q[j][3]));
}

// One warp: 16 columns, chunk `chunk` of the tile's rows; `out.scale` points to the block's.
__device__ __forceinline__ void cast_chunk(const u8* tile, int chunk, const BlockRows& s,
                                           const Output& out) {
  Share share = load_share(tile, chunk);
  if (kPow2 && s.packed)
    cast_block<true>(share, s, out);
  else
    cast_block<false>(share, s, out);
  if ((chunk & 7) == 0 && (threadIdx.x & 31) == 0) store_stream(out.scale, s.scale);
}

// What BLOCK asks for: the rows' scales for either conversion, and where its scale of `column` goes.
template <bool kBlock> struct RowScales { typedef Scales Type; };
template <> struct RowScales<true> { typedef BlockRows Type; };
typedef RowScales<kBlockScales>::Type TileScales;

__device__ __forceinline__ float* scale_of_column(float* scale_t, i64 ld, i64 column) {
  return kBlockScales ? scale_t + column / 128 * ld + blockIdx.x
                      : scale_t + blockIdx.x * ld + column;
}
