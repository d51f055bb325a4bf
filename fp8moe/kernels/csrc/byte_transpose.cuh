// Transposing bytes: 8 x 8 in registers, 128 rows x 128 or 256 columns through shared memory.
#pragma once
#include "numerics.cuh"

static constexpr int kThreads = 256;   // of every kernel that stages a tile

// 4 x 4 bytes: word i byte j -> word j byte i.
__device__ __forceinline__ void transpose_bytes_4x4(u32& w0, u32& w1, u32& w2, u32& w3) {
  u32 a = __byte_perm(w0, w1, 0x5140), b = __byte_perm(w2, w3, 0x5140);   // bytes 0,1 interleaved
  u32 c = __byte_perm(w0, w1, 0x7362), d = __byte_perm(w2, w3, 0x7362);   // bytes 2,3 interleaved
  w0 = __byte_perm(a, b, 0x5410);
  w1 = __byte_perm(a, b, 0x7632);
  w2 = __byte_perm(c, d, 0x5410);
  w3 = __byte_perm(c, d, 0x7632);
}

// 8 rows of 8 bytes (rows[r][0] holds columns 0-3): rows[k] becomes the 8 bytes of column k.
__device__ __forceinline__ void transpose_bytes_8x8(u32 (&rows)[8][2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    transpose_bytes_4x4(rows[0][half], rows[1][half], rows[2][half], rows[3][half]);
    transpose_bytes_4x4(rows[4][half], rows[5][half], rows[6][half], rows[7][half]);
  }
  // Now rows[i][half] holds column 4*half+i of rows 0-3, rows[4+i][half] that of rows 4-7.
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    u32 swapped = rows[i][1];
    rows[i][1] = rows[4 + i][0];
    rows[4 + i][0] = swapped;
  }
}

// A transposed 128-row byte tile in shared memory, free of bank conflicts on both sides.
// Column j is 128 bytes; its 16 chunks of 8 rows are permuted by xor with `c`, the number of the
// thread that wrote the column (columns 8c..8c+7, or 16c..16c+15), 0 <= c < 16.

// Puts the 8 bytes of rows 8g..8g+7 of column j; c is the thread's column group.
__device__ __forceinline__ void stage(u8* tile, int j, int c, int g, const u32 (&bytes)[2]) {
  *reinterpret_cast<uint2*>(tile + j * 128 + 8 * (g ^ c)) = make_uint2(bytes[0], bytes[1]);
}

// Rows 16m..16m+15 of column j, in order.
__device__ __forceinline__ uint4 read_staged(const u8* tile, int j, int c, int m) {
  uint4 unit = *reinterpret_cast<const uint4*>(tile + j * 128 + 16 * (m ^ (c >> 1)));
  if (c & 1) return make_uint4(unit.z, unit.w, unit.x, unit.y);
  return unit;
}

// The first `count` of 16 bytes. kWhole: count is <= 0 or all.
template <bool kWhole> __device__ __forceinline__ void store16(u8* p, uint4 v, int count) {
  if (kWhole) {
    if (count > 0) *reinterpret_cast<uint4*>(p) = v;
  } else {
    u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 16; ++i)
      if (i < count) p[i] = (u8)(words[i / 4] >> (8 * (i % 4)));
  }
}

// Writes the staged tile of 128 rows x `kColumns` columns to out[column][row]: 128 bytes a column.
// `rows` and `columns` are what exists of the tile; ld is the length of a column in bytes. kWhole:
// columns hold whole 16-byte units and start on their boundaries.
template <int kColumns, bool kWhole>
__device__ __forceinline__ void store_staged(const u8* tile, u8* out, i64 ld, int rows,
                                             int columns) {
  constexpr int kGroup = kColumns / 16;   // columns that one thread staged
  constexpr int kUnits = kColumns * 8 / kThreads;
  constexpr int kUnroll = kWhole ? kUnits : 1;   // stores of single bytes: rather small than fast
#pragma unroll kUnroll
  for (int i = 0; i < kUnits; ++i) {
    int unit = i * kThreads + threadIdx.x;
    int j = unit >> 3, m = unit & 7;
    uint4 v = read_staged(tile, j, j / kGroup, m);
    if (j < columns) store16<kWhole>(out + j * ld + 16 * m, v, rows - 16 * m);
  }
}
