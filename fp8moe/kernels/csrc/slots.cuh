// Slots of (token, choice) pairs counted and placed in order, by two launches without a sort or an
// ordering atomic: what route.cuh and dispatch.cuh share.
//
// Slot i = t * K + k is one choice of one token. CTA c owns a contiguous slice of slots, each of its
// warps a contiguous part of it, and each warp walks its part in order. The first launch leaves the
// counts of each CTA. In the second, the place of a slot is
//   start of its group + slots of that group in earlier CTAs, in earlier warps, earlier in the warp
// whatever the timing.
//
// Built for ID_BITS = 32 | 64.
#pragma once
#include "numerics.cuh"

#if ID_BITS == 64
typedef i64 Id;
#else
typedef int Id;
#endif

static constexpr int kThreads = 256;
static constexpr int kWarps = kThreads / 32;
static constexpr int kBatch = 4;   // ids loaded ahead by a lane
static constexpr int kUnused = -2;
static constexpr int kDropped = -1;
static constexpr u32 kFullWarp = 0xFFFFFFFFu;

// Calls visit(slot, id, inside) for the slots of this warp, 32 at a time and in order; past the last
// slot of the warp with the id num_experts. Every lane makes every call.
template <class Visit>
__device__ __forceinline__ void walk_slots(const Id* ids, int num_slots, int slots_per_warp,
                                           int num_experts, Visit visit) {
  int lane = threadIdx.x & 31;
  i64 begin = ((i64)blockIdx.x * kWarps + threadIdx.x / 32) * slots_per_warp;
  i64 end = min(begin + slots_per_warp, (i64)num_slots);
  for (i64 base = begin; base < end; base += 32 * kBatch) {
    Id id[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      i64 slot = base + 32 * j + lane;
      id[j] = slot < end ? ids[slot] : (Id)num_experts;
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      i64 slot = base + 32 * j + lane;
      visit((int)slot, id[j], slot < end);
    }
  }
}

__device__ __forceinline__ u32 lanes_before() { return (1u << (threadIdx.x & 31)) - 1; }

// Adds to total[i] and earlier[i], both zero before, the counts i of all CTAs and of those before
// this one. Each thread takes one count and every parts-th CTA; integers, so their order is free.
__device__ __forceinline__ void sum_ctas(const int* partial, int counts, int* total, int* earlier) {
  int width = 1;
  while (width < counts && width < kThreads) width <<= 1;
  int parts = kThreads / width;
  for (int i = threadIdx.x & (width - 1); i < counts; i += width) {
    int sum = 0, before = 0;
#pragma unroll 8
    for (int c = threadIdx.x / width; c < (int)gridDim.x; c += parts) {
      int n = partial[(i64)c * counts + i];
      sum += n;
      if (c < (int)blockIdx.x) before += n;
    }
    atomicAdd(&total[i], sum);
    atomicAdd(&earlier[i], before);
  }
}

// Exclusive scan of one value per thread over the CTA; `total` gets the sum.
__device__ __forceinline__ int scan_threads(int value, int* warp_sums, int& total) {
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    int other = __shfl_up_sync(kFullWarp, inclusive, d);
    if (lane >= d) inclusive += other;
  }
  if (lane == 31) warp_sums[warp] = inclusive;
  __syncthreads();
  int before = 0;
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before + inclusive - value;
}
