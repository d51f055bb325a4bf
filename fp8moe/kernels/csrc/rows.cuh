// Eight rows of eight elements: what a thread of a cast kernel loads, casts and stores.
//
// Built for INPUT = Bf16 | F16 | F32, POW2 = 0 | 1, ALIGNED = 0 | 1. Sizes are arbitrary. ALIGNED
// says that rows, of the input and of every output, hold whole vectors and start on vector
// boundaries; otherwise elements are moved one by one.
#pragma once
#include "byte_transpose.cuh"

typedef INPUT Input;
typedef Input::Raw Raw;

static constexpr bool kPow2 = POW2;
static constexpr bool kAligned = ALIGNED;
static constexpr int kBlock = 128;
// A thread holds 64 inputs: 32 registers of 16-bit values, 64 of 32-bit ones.
static constexpr bool kWide = sizeof(Raw) == 4;
// Element-wise accesses need more registers than bandwidth.
static constexpr int ctas_per_sm(int narrow, int wide) {
  return !kAligned ? 1 : kWide ? wide : narrow;
}

// ---------------------------------------------------------------------------------------------
// Eight consecutive elements of one row: what a thread loads at once.

struct Vec8 {
  u32 words[2 * sizeof(Raw)];
};

// How many elements of a vector lie inside a row of which `left` > 0 remain: all, when rows hold
// whole vectors.
__device__ __forceinline__ int inside_row(int left) { return kAligned ? 16 : left; }

__device__ __forceinline__ void load8(Vec8& v, const Raw* p) {
  if constexpr (kWide) {
    // 32 bytes a lane, through L1: the second load finds its sectors there.
    uint4 a = __ldg(reinterpret_cast<const uint4*>(p));
    uint4 b = __ldg(reinterpret_cast<const uint4*>(p) + 1);
    v.words[0] = a.x, v.words[1] = a.y, v.words[2] = a.z, v.words[3] = a.w;
    v.words[4] = b.x, v.words[5] = b.y, v.words[6] = b.z, v.words[7] = b.w;
  } else {
    uint4 a = load_stream_16(p);
    v.words[0] = a.x, v.words[1] = a.y, v.words[2] = a.z, v.words[3] = a.w;
  }
}

// Eight rows of eight elements, `pitch` apart. The first `rows_left` rows exist, and in each the
// first `left` elements; all others become zero.
__device__ __forceinline__ void load_rows(Vec8 (&v)[8], const Raw* p, int pitch, int rows_left,
                                          int left) {
  if (kAligned && rows_left >= 8) {
#pragma unroll
    for (int r = 0; r < 8; ++r) load8(v[r], p + (i64)r * pitch);
    return;
  }
#pragma unroll
  for (int r = 0; r < 8; ++r) {
#pragma unroll
    for (int i = 0; i < 2 * (int)sizeof(Raw); ++i) v[r].words[i] = 0;
    if (r >= rows_left) continue;
    if constexpr (kAligned) {
      load8(v[r], p + (i64)r * pitch);
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (i < left)
          v[r].words[i * sizeof(Raw) / 4] |= (u32)__ldg(p + (i64)r * pitch + i)
                                             << (i * 8 * sizeof(Raw) % 32);
    }
  }
}

__device__ __forceinline__ u32 magnitude_word(u32 word) {
  return kWide ? word & 0x7FFFFFFFu : abs_bits_16x2(word);
}
__device__ __forceinline__ u32 max_word(u32 a, u32 b) {
  return kWide ? max_u32(a, b) : max_u16x2(a, b);
}

// Largest magnitude of the eight, as raw bits of the input format.
__device__ __forceinline__ u32 raw_amax(const Vec8& v) {
  u32 m = magnitude_word(v.words[0]);
#pragma unroll
  for (int i = 1; i < 2 * (int)sizeof(Raw); ++i) m = max_word(m, magnitude_word(v.words[i]));
  return kWide ? m : fold_max_16x2(m);
}

__device__ __forceinline__ float element(const Vec8& v, int i) {
  u32 word = v.words[i * sizeof(Raw) / 4];
  if (kWide) return __uint_as_float(word);
  if (Input::kIsBf16) return i & 1 ? bf16_high(word) : bf16_low(word);
  return f16_to_float(i & 1 ? word >> 16 : word);
}

// q = e4m3(v * inv).
__device__ __forceinline__ void cast8(const Vec8& v, float inv, u32 (&q)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
    q[h] = pack_e4m3x4(element(v, 4 * h) * inv, element(v, 4 * h + 1) * inv,
                       element(v, 4 * h + 2) * inv, element(v, 4 * h + 3) * inv);
}

// The same down column k of eight rows: packing four rows into a word is the transpose.
__device__ __forceinline__ void cast_column8(const Vec8 (&v)[8], int k, float inv, u32 (&q)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h)
    q[h] = pack_e4m3x4(element(v[4 * h], k) * inv, element(v[4 * h + 1], k) * inv,
                       element(v[4 * h + 2], k) * inv, element(v[4 * h + 3], k) * inv);
}

// The first `count` of the bytes. When aligned, count is <= 0 or all.
__device__ __forceinline__ void store8(u8* p, u32 (&q)[2], int count) {
  if (kAligned) {
    if (count > 0) *reinterpret_cast<uint2*>(p) = make_uint2(q[0], q[1]);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i)
      if (i < count) p[i] = (u8)(q[i / 4] >> (8 * (i % 4)));
  }
}
