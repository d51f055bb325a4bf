// SPLITS CTAs, a cluster, share a tile where a problem has too few tiles for the SMs: each computes its part of the
// contraction, then a warp of one of them adds what the same warps of the others have left in their shared memory. The
// order of the additions is fixed. Warps take turns as owner, so every CTA stores a part of the tile.
#pragma once
#include "scheduler.cuh"

// Leaves this warp's sums in `memory`, that of the stages, whose operands all consumers must be done with; or, for its
// owner, adds those of the others. True for the owner, which stores the tile.
template <int THREADS, int HALVES, int REGISTERS>
DEVICE bool add_parts(float (&sum)[HALVES][REGISTERS], u32 memory) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rank = cluster_rank();
    const bool owner = warp % SPLITS == rank;
    const u32 first = memory + (warp * HALVES * REGISTERS * 32 + lane * 4) * 4;
    named_barrier<THREADS>(1);
    if (!owner) {
#pragma unroll
        for (int half = 0; half < HALVES; ++half)
#pragma unroll
            for (int i = 0; i < REGISTERS; i += 4) {
                const float* s = &sum[half][i];
                store_shared_v4(first + (half * REGISTERS + i) * 128, make_float4(s[0], s[1], s[2], s[3]));
            }
    }
    cluster_barrier();
    if (owner) {
#pragma unroll 1
        for (int next = 1; next < SPLITS; ++next) {
            const u32 theirs = cluster_address(first, (rank + next) % SPLITS);
#pragma unroll
            for (int half = 0; half < HALVES; ++half)
#pragma unroll
                for (int i = 0; i < REGISTERS; i += 4) {
                    const float4 v = load_cluster_v4(theirs + (half * REGISTERS + i) * 128);
                    float* s = &sum[half][i];
                    s[0] += v.x, s[1] += v.y, s[2] += v.z, s[3] += v.w;
                }
        }
    }
    cluster_barrier();  // shared memory must outlive its readers
    return owner;
}
