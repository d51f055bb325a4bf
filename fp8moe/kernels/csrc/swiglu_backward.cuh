// The backward pass of SwiGLU and every cast of its results, from one read of h and da:
//   dh = [dg | du] per_token and per_channel, aw transposed with one scale per 128 x 128 block, and the
//   routing weight's gradient.
//
// Built for POW2 = 0 | 1, and for H_FP8 = 0 | 1: h in bf16, or in E4M3 with one scale per row and 128
// columns, multiplied out in FP32. A CTA takes a 128 x 128 tile of the activation. Its 96 KB of input
// (64 with E4M3) go to shared memory by asynchronous copies, so they cost no registers while in flight,
// and two CTAs share an SM: one computes while the other's copies arrive.
//   Pass 1, by rows: 16 lanes share a row, a thread has eight columns of four rows and reads only
//   what it copied itself. It computes dg, du and aw, rounds them to bf16, writes them over g, u and
//   da in shared memory, and finishes the row casts and the row sums from registers. The tile is one
//   block of aw: each warp leaves the largest magnitude that it rounded.
//   Pass 2, by columns, after the only barrier: see tile.cuh. aw needs no column maxima.
#include "activation.cuh"

static constexpr bool kPow2 = POW2;
static constexpr bool kFp8H = H_FP8;
static constexpr int kThreads = 512;
static constexpr int kWarps = kThreads / 32;
static constexpr int kMatrixBytes = kTileRows * kTilePitch;

enum Matrix { kGate = 0, kUp = 1, kDown = 2 };   // g, u, da; then dg, du, aw

struct RowResults {
  float gate_scale[kTileRows];
  float up_scale[kTileRows];
  float dprob[kTileRows];
  u32 aw_max[kWarps];   // of a warp's eight rows, a bf16 pattern
};

// Columns 2j and 2j + 1 of eight columns of h: bf16, or E4M3 in the first eight bytes.
__device__ __forceinline__ Pair pair_of(const uint4& eight, int j, float scale) {
  if constexpr (kFp8H) {
    return pair_of_f16(e4m3x2_to_f16x2(word_of(eight, j / 2) >> (16 * (j & 1))), scale);
  } else {
    return {bf16_low(word_of(eight, j)), bf16_high(word_of(eight, j))};
  }
}

__device__ __forceinline__ uint4* chunk_at(u8* tile, int matrix, int row, int chunk) {
  return reinterpret_cast<uint4*>(tile + matrix * kMatrixBytes + tile_offset(row, chunk));
}

// Eight columns x 128 rows of one matrix of the tile: pairs of columns [j] of a lane's four rows [i].
struct Columns {
  u32 pair[4][4];
};
__device__ __forceinline__ Columns load_columns(u8* tile, int matrix, int chunk) {
  int lane = threadIdx.x & 31;
  Columns c;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    uint4 v = *chunk_at(tile, matrix, 4 * lane + i, chunk);
    c.pair[i][0] = v.x, c.pair[i][1] = v.y, c.pair[i][2] = v.z, c.pair[i][3] = v.w;
  }
  return c;
}
// Cast with each column's inverse scale; `out` is the first column's first row.
__device__ __forceinline__ void store_columns(const Columns& c, const float (&inv)[8], u8* out,
                                              i64 pitch) {
  out += 4 * (threadIdx.x & 31);
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    float v[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      v[i] = (j & 1 ? bf16_high(c.pair[i][j >> 1]) : bf16_low(c.pair[i][j >> 1])) * inv[j];
    store_stream(out + j * pitch, pack_e4m3x4(v[0], v[1], v[2], v[3]));
  }
}

// One warp casts eight columns with a scale each; `scale` is the first column's.
__device__ __forceinline__ void cast_columns(u8* tile, int matrix, int chunk, u8* out, i64 pitch,
                                             float* scale, float* inverses) {
  int lane = threadIdx.x & 31;
  Columns c = load_columns(tile, matrix, chunk);
  u32 amax[4];
#pragma unroll
  for (int j = 0; j < 4; ++j)
    amax[j] = amax_bf16x2(c.pair[0][j], c.pair[1][j], c.pair[2][j], c.pair[3][j]);
  u32 pair = reduce_columns(amax, MaxU16x2());   // lanes 8p .. 8p + 7: columns 2p and 2p + 1
  BlockScale s = block_scale<kPow2>(lane & 4 ? pair & 0xFFFF0000u : pair << 16);
  if ((lane & 3) == 0) {
    scale[lane >> 2] = s.scale;
    inverses[lane >> 2] = s.inv;
  }
  __syncwarp();
  float inv[8];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    float4 four = reinterpret_cast<const float4*>(inverses)[i];
    inv[4 * i] = four.x, inv[4 * i + 1] = four.y, inv[4 * i + 2] = four.z, inv[4 * i + 3] = four.w;
  }
  store_columns(c, inv, out, pitch);
  __syncwarp();   // `inverses` may be written again
}

// The sum over the 16 lanes that share a row, in an order that a GEMM's epilogue can keep: its threads
// have the columns of lanes 0, 1, 8 and 9, or 2, 3, 10 and 11, and so on.
__device__ __forceinline__ float reduce_row_sum(float sum) {
  sum += __shfl_xor_sync(kFullWarp, sum, 8);
  sum += __shfl_xor_sync(kFullWarp, sum, 1);
  sum += __shfl_xor_sync(kFullWarp, sum, 4);
  return sum + __shfl_xor_sync(kFullWarp, sum, 2);
}

// What belongs to a warp's eight consecutive rows: lanes 0-7 get the routing weights, and with E4M3
// lanes 8-15 and 16-23 the scales of the gate and up blocks; 0 in padding, whose scales are not read.
__device__ __forceinline__ float load_row_values(const float* topk_weights, const int* slot_of_row,
                                                 int warp_row0, const float* gate_scale,
                                                 const float* up_scale) {
  if constexpr (!kFp8H) return load_weight(topk_weights, slot_of_row, warp_row0);
  int row = warp_row0 + (threadIdx.x & 7), kind = (threadIdx.x >> 3) & 3;
  int slot = __ldg(slot_of_row + row);
  const float* at = kind == 1 ? gate_scale + row : kind == 2 ? up_scale + row : topk_weights + slot;
  return slot < 0 ? 0.0f : __ldg(at);
}

// h [capacity, 2 * columns], with E4M3 h_scale[(column / 128) * h_scale_ld + row]; da [capacity,
// columns]. dh [capacity, 2 * columns] with
// dh_scale[(column / 128) * dh_scale_ld + row]; dh_t [2 * columns, capacity] with
// dh_t_scale[(row / 128) * dh_t_scale_ld + column]; aw_t [columns, capacity] with aw_t_scale [columns /
// 128, capacity / 128]; dprob_partial [columns / 128, capacity]. dh_rounded and aw_rounded, if not
// null, receive dh and aw before the casts.
//
// The grid walks panels of gridDim.x row blocks (z), in a panel the column blocks (y), row block (x)
// fastest: rows of h are read, and columns of the transposed outputs written, in neighbouring
// segments at nearly the same time.
extern "C" __global__ void __launch_bounds__(kThreads, 2)
    swiglu_backward_cast(const u8* __restrict__ h, const float* __restrict__ h_scale,
                         int h_scale_ld, const u16* __restrict__ da,
                         const float* __restrict__ topk_weights,
                         const int* __restrict__ slot_of_row, int columns, int capacity,
                         u8* __restrict__ dh, float* __restrict__ dh_scale, int dh_scale_ld,
                         u8* __restrict__ dh_t, float* __restrict__ dh_t_scale, int dh_t_scale_ld,
                         u8* __restrict__ aw_t, float* __restrict__ aw_t_scale,
                         float* __restrict__ dprob_partial, u16* __restrict__ dh_rounded,
                         u16* __restrict__ aw_rounded) {
  extern __shared__ __align__(128) u8 tile[];
  __shared__ RowResults results;
  alignas(16) __shared__ float inverses[kWarps][8];
  int column_blocks = columns / 128;
  int column_block = blockIdx.y;
  int row_block = blockIdx.z * gridDim.x + blockIdx.x;
  int row0 = row_block * kTileRows;
  if (row0 >= capacity) return;

  // Four consecutive rows, eight columns. The h and da of a padding row are garbage, and garbage
  // times 0 may be NaN: they are read as zeros, from which all results are zero.
  int chunk = threadIdx.x & 15;
  int first = (threadIdx.x >> 4) * 4;
  int column = column_block * 128 + chunk * 8;
  int4 slots = __ldg(reinterpret_cast<const int4*>(slot_of_row + row0 + first));
  if (slots.x == kUnused) return;
  float row_values = load_row_values(topk_weights, slot_of_row, row0 + (first & ~7),
                                     h_scale + (i64)column_block * h_scale_ld,
                                     h_scale + (i64)(column_blocks + column_block) * h_scale_ld);
  constexpr int kCopy = kFp8H ? 8 : 16;   // bytes of eight columns of h
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    i64 row = row0 + first + i;
    const u8* gate = h + (row * (2 * (i64)columns) + column) * (kCopy / 8);
    bool pad = element_of(slots, i) < 0;
    copy_async<kCopy>(chunk_at(tile, kGate, first + i, chunk), gate, pad);
    copy_async<kCopy>(chunk_at(tile, kUp, first + i, chunk), gate + columns * (kCopy / 8), pad);
    copy_async_16(chunk_at(tile, kDown, first + i, chunk), da + row * columns + column, pad);
    copy_async_commit();
  }
  u32 aw_max = 0;   // in each half of a word
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float weight = weight_of_row(row_values, i);
    float gate_factor = kFp8H ? weight_of_row(row_values, 8 + i) : 1.0f;
    float up_factor = kFp8H ? weight_of_row(row_values, 16 + i) : 1.0f;
    if (i == 0) copy_async_wait<3>();
    if (i == 1) copy_async_wait<2>();
    if (i == 2) copy_async_wait<1>();
    if (i == 3) copy_async_wait<0>();
    int local = first + i;
    uint4 g = *chunk_at(tile, kGate, local, chunk);
    uint4 u = *chunk_at(tile, kUp, local, chunk);
    uint4 d = *chunk_at(tile, kDown, local, chunk);
    u32 dg[4], du[4], aw[4];
    float dprob = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j)
      backward_pair(pair_of(g, j, gate_factor), pair_of(u, j, up_factor), word_of(d, j), weight,
                    dg[j], du[j], aw[j], dprob);
    *chunk_at(tile, kGate, local, chunk) = make_uint4(dg[0], dg[1], dg[2], dg[3]);
    *chunk_at(tile, kUp, local, chunk) = make_uint4(du[0], du[1], du[2], du[3]);
    *chunk_at(tile, kDown, local, chunk) = make_uint4(aw[0], aw[1], aw[2], aw[3]);
    aw_max = max_u16x2(aw_max, amax_bf16x2(aw[0], aw[1], aw[2], aw[3]));

    u32 maxima = reduce_row_max(amax_bf16x8(dg) | amax_bf16x8(du) << 16);
    dprob = reduce_row_sum(dprob);
    BlockScale gate_scale = block_scale<kPow2>(maxima << 16);
    BlockScale up_scale = block_scale<kPow2>(maxima & 0xFFFF0000u);
    i64 at = (i64)(row0 + local) * (2 * (i64)columns) + column;
    *reinterpret_cast<uint2*>(dh + at) = cast_bf16x8(dg, gate_scale.inv);
    *reinterpret_cast<uint2*>(dh + at + columns) = cast_bf16x8(du, up_scale.inv);
    if (chunk == 0) {
      results.gate_scale[local] = gate_scale.scale;
      results.up_scale[local] = up_scale.scale;
      results.dprob[local] = dprob;
    }
    if (dh_rounded != nullptr) {
      *reinterpret_cast<uint4*>(dh_rounded + at) = make_uint4(dg[0], dg[1], dg[2], dg[3]);
      *reinterpret_cast<uint4*>(dh_rounded + at + columns) = make_uint4(du[0], du[1], du[2], du[3]);
    }
    if (aw_rounded != nullptr)
      *reinterpret_cast<uint4*>(aw_rounded + (i64)(row0 + local) * columns + column) =
          make_uint4(aw[0], aw[1], aw[2], aw[3]);
  }
  int warp = threadIdx.x / 32, lane = threadIdx.x & 31;
  aw_max = __reduce_max_sync(kFullWarp, fold_max_16x2(aw_max));
  if (lane == 0) results.aw_max[warp] = aw_max;
  __syncthreads();

  {
    int which = threadIdx.x >> 7, row = threadIdx.x & 127;
    i64 at = row0 + row;
    if (which == 0) dh_scale[(i64)column_block * dh_scale_ld + at] = results.gate_scale[row];
    if (which == 1)
      dh_scale[(i64)(column_blocks + column_block) * dh_scale_ld + at] = results.up_scale[row];
    if (which == 2) dprob_partial[(i64)column_block * capacity + at] = results.dprob[row];
  }
  // Each warp takes one run of eight columns in each of the three matrices.
  i64 channel = (i64)column_block * 128 + warp * 8;
  u8* out = dh_t + channel * capacity + row0;
  float* scale = dh_t_scale + (i64)row_block * dh_t_scale_ld + channel;
  cast_columns(tile, kGate, warp, out, capacity, scale, inverses[warp]);
  cast_columns(tile, kUp, warp, out + (i64)columns * capacity, capacity, scale + columns,
               inverses[warp]);
  aw_max = __reduce_max_sync(kFullWarp, results.aw_max[lane % kWarps]);
  BlockScale aw_scale = block_scale<kPow2>(aw_max << 16);
  if (threadIdx.x == 0)
    aw_t_scale[(i64)column_block * (capacity / kTileRows) + row_block] = aw_scale.scale;
  float inv[8];
#pragma unroll
  for (int j = 0; j < 8; ++j) inv[j] = aw_scale.inv;
  store_columns(load_columns(tile, kDown, warp), inv, aw_t + channel * capacity + row0, capacity);
}
