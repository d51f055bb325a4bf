// The FP8 GEMM: D = A B^T with E4M3 operands, block scales and FP32 accumulation, for every grouping of the scheduler.
//
// One CTA per SM stays resident and walks over tiles. Its warpgroups have fixed roles:
//
//   first warpgroups      consumers, two or three: wgmma on a stage, promotion of the partial sums, epilogue
//   last one, warp 0      TMA producer: one lane copies the A and B blocks of the next k-block into a ring of STAGES
//   last one, warp 1      scale producer: 32 lanes copy the scales of the same stage with 4-byte cp.async (any
//                         alignment, so groups may start at any row)
//
// A stage is handed over by two mbarriers: `full` (the TMA bytes and 32 scale lanes have arrived) and `empty` (every
// consumer warp of the cluster is done with it). The ring runs on across tiles, so the next tile's operands are
// already on their way while the consumers store this one. README.md one folder up draws it.
//
// Constants rendered before this file: GROUPING, SCALE_B_BLOCK, OUTPUT, BLOCK_M (64 | 128 | 192), BLOCK_N, STAGES,
// CLUSTER_M, CLUSTER_N, OVERLAP_PROMOTION, ASYNC_STORE, A_REGISTERS. Shapes are arguments, so some dozens of compiled
// kernels serve every model.
#include "ptx.cuh"
#include "scheduler.cuh"
#include "promote.cuh"
#include "epilogue.cuh"

constexpr int BLOCK_K = 128;  // bytes of a swizzled row, and the extent of a scale
// Consumer warpgroups take 64 rows of the tile each; two share the columns of a tile that has only 64 rows.
constexpr int CONSUMERS = BLOCK_M == 192 ? 3 : 2;
constexpr int CONSUMER_WARPS = CONSUMERS * 4, TMA_WARP = CONSUMER_WARPS, SCALE_WARP = CONSUMER_WARPS + 1;
constexpr int THREADS = CONSUMERS * 128 + 128;
// The registers of the SM, moved from the producers to the consumers: 40 + 2 x 232 or 32 + 3 x 160 for each thread.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
constexpr int GROUP_N = BLOCK_M > 64 ? BLOCK_N : BLOCK_N / 2;
// N of one wgmma. A wider tile is computed in halves, so that sums and partial sums fit the 232 registers of a thread.
constexpr int WGMMA_N = GROUP_N <= 128 ? GROUP_N : GROUP_N / 2;
constexpr int HALVES = GROUP_N / WGMMA_N;
// Two sets of partial sums, where they fit, let a warpgroup multiply while it promotes. The compiler serialises wgmma
// that is in flight across a loop's back edge, so the pipeline is unrolled over UNROLL k-blocks and drained there.
constexpr bool OVERLAP = OVERLAP_PROMOTION != 0;
constexpr int UNROLL = 4;

constexpr int A_BYTES = BLOCK_M * BLOCK_K;
constexpr int B_BYTES = BLOCK_N * BLOCK_K;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int STAGING_AT = STAGES * STAGE_BYTES;
constexpr int SCALES_AT = STAGING_AT + CONSUMER_WARPS * STAGING_BYTES;
constexpr int BARRIERS_AT = SCALES_AT + STAGES * SCALE_STAGE * 4;
constexpr int TABLE_AT = BARRIERS_AT + 2 * STAGES * 8;
static_assert(BLOCK_M == 64 || BLOCK_M == 128 || BLOCK_M == 192, "a consumer warpgroup computes 64 rows");
static_assert(CLUSTER <= 2, "multicast pairs two CTAs; larger clusters strand SMs");
static_assert(B_BYTES / CLUSTER_M % 1024 == 0 && A_BYTES / CLUSTER_N % 1024 == 0, "a multicast half keeps the swizzle");
static_assert(!A_REGISTERS || (BLOCK_M > 64 && HALVES == 2 && !OVERLAP_PROMOTION), "A is shared by two halves");
static_assert(HALVES * WGMMA_N == GROUP_N, "whole wgmma tiles");

extern "C" __global__ void __launch_bounds__(THREADS, 1)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
     const __grid_constant__ TensorMap map_d, const float* __restrict__ scale_a, const float* __restrict__ scale_b,
     void* d, const int* __restrict__ groups, int* status, int m, int n, int k, int num_groups, int band, int a_rows,
     int b_rows, int scale_a_stride, int scale_b_stride) {
    extern __shared__ __align__(1024) char smem[];
    const u32 base = smem_address(smem);
    int* table = reinterpret_cast<int*>(smem + TABLE_AT);
    const auto full = [&](int stage) { return base + BARRIERS_AT + stage * 8; };
    const auto empty = [&](int stage) { return base + BARRIERS_AT + (STAGES + stage) * 8; };

    const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32;
    const Problem problem{m, n, k, num_groups, band, groups};
    if (warp == 0) {
        if (GROUPING != DENSE) fill_group_table(problem, table, status);
    } else if (warp == 1 && lane == 0) {
        prefetch_tensor_map(&map_a);
        prefetch_tensor_map(&map_b);
        for (int stage = 0; stage < STAGES; ++stage) {
            mbarrier_init(full(stage), 1 + 32);
            mbarrier_init(empty(stage), CONSUMER_WARPS * CLUSTER);
        }
        mbarrier_init_fence();
    }
    __syncthreads();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();  // a peer's copies must not meet uninitialised barriers

    Scheduler scheduler(problem, table);
    const int first_item = blockIdx.x / CLUSTER, step = gridDim.x / CLUSTER;
    int stage = 0;
    u32 phase = 0;
    const auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (warp >= CONSUMER_WARPS) {
        release_registers<PRODUCER_REGISTERS>();
        if (warp == TMA_WARP && lane == 0) {
            for (int item = first_item; item < scheduler.num_items; item += step) {
                const Tile t = scheduler.tile(item);
#pragma unroll 1  // the producers have few registers
                for (int kb = t.k_block; kb < t.k_block + t.num_k_blocks; ++kb, advance()) {
                    mbarrier_wait(empty(stage), phase ^ 1);
                    mbarrier_arrive_expect_tx(full(stage), STAGE_BYTES);
                    const u32 a = base + stage * STAGE_BYTES, b = a + A_BYTES;
                    // A multicast operand is loaded half by each CTA of the pair, for both.
                    if (CLUSTER_N == 2)
                        tma_load_multicast(a + scheduler.rank_n * (A_BYTES / 2), &map_a, kb * BLOCK_K,
                                           t.a_row + scheduler.rank_n * (BLOCK_M / 2), full(stage), 3);
                    else
                        tma_load(a, &map_a, kb * BLOCK_K, t.a_row, full(stage));
                    if (CLUSTER_M == 2)
                        tma_load_multicast(b + scheduler.rank_m * (B_BYTES / 2), &map_b, kb * BLOCK_K,
                                           t.b_row + scheduler.rank_m * (BLOCK_N / 2), full(stage), 3);
                    else
                        tma_load(b, &map_b, kb * BLOCK_K, t.b_row, full(stage));
                }
            }
        } else if (warp == SCALE_WARP) {
            for (int item = first_item; item < scheduler.num_items; item += step) {
                const Tile t = scheduler.tile(item);
                const int n_blocks = ceil_div(n, 128);
#pragma unroll 1  // the producers have few registers
                for (int kb = t.k_block; kb < t.k_block + t.num_k_blocks; ++kb, advance()) {
                    mbarrier_wait(empty(stage), phase ^ 1);
                    const u32 sa = base + SCALES_AT + stage * SCALE_STAGE * 4, sb = sa + BLOCK_M * 4;
#pragma unroll 2
                    for (int i = lane; i < BLOCK_M; i += 32)
                        cp_async_4(sa + i * 4, scale_a + (i64)kb * scale_a_stride + t.a_row + i, t.a_row + i < a_rows);
                    if (SCALE_B_BLOCK) {
                        // Halves past N exist in the tile but not in D: any scale of the group will do.
                        const int block = min(t.column / 128 + lane, n_blocks - 1) + scheduler.group * n_blocks;
                        const float* source = scale_b + (i64)block * scale_b_stride + kb;
                        if (lane < NUM_B_SCALES) cp_async_4(sb + lane * 4, source, true);
                    } else {
                        const float* source = scale_b + (i64)kb * scale_b_stride + t.b_row;
#pragma unroll 2
                        for (int i = lane; i < BLOCK_N; i += 32)
                            cp_async_4(sb + i * 4, source + i, t.b_row + i < b_rows);
                    }
                    cp_async_arrive(full(stage));
                }
            }
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int warpgroup = warp / 4;
        const int warp_row = (BLOCK_M > 64 ? warpgroup * 64 : 0) + warp % 4 * 16;
        const int group_column = BLOCK_M > 64 ? 0 : warpgroup * GROUP_N;
        // Matrix descriptors of stage 0, in 16-byte units; warp-uniform, so that they live in uniform registers.
        const u32 descriptor_a = __shfl_sync(~0u, (base + (BLOCK_M > 64 ? warpgroup * 64 * BLOCK_K : 0)) >> 4, 0);
        const u32 descriptor_b = __shfl_sync(~0u, (base + A_BYTES + group_column * BLOCK_K) >> 4, 0);

        for (int item = first_item; item < scheduler.num_items; item += step) {
            const Tile t = scheduler.tile(item);
            float sum[HALVES][WGMMA_N / 2] = {};
            const int offset = t.column % 128;
            const auto release = [&](int stage) {
                __syncwarp();
                if (CLUSTER == 1) {
                    if (lane == 0) mbarrier_arrive(empty(stage));
                } else if (lane < CLUSTER) {
                    mbarrier_arrive_remote(empty(stage), lane);
                }
            };
            // Generic, so that only the form in use is compiled. a: the warp's k-block of A, where it goes by registers.
            const auto multiply = [&](auto& part, const auto& a, int stage, int half) {
                const u32 from_a = descriptor_a + stage * (STAGE_BYTES >> 4);
                const u32 from_b = descriptor_b + stage * (STAGE_BYTES >> 4) + half * (WGMMA_N * BLOCK_K >> 4);
                wgmma_fence();
#pragma unroll
                for (int i = 0; i < BLOCK_K / 32; ++i) {
                    const u64 b = matrix_descriptor(from_b + i * 2);
                    if constexpr (A_REGISTERS)
                        wgmma(part, a[i], b, i != 0);
                    else
                        wgmma(part, matrix_descriptor(from_a + i * 2), b, i != 0);
                }
                wgmma_commit();
            };
            const auto scales_at = [&](int stage) {
                return reinterpret_cast<const float*>(smem + SCALES_AT) + stage * SCALE_STAGE;
            };
            const auto load = [&](Scales<WGMMA_N>& scales, int stage, int half) {
                const float* sa = scales_at(stage);
                scales.load(sa, sa + BLOCK_M, warp_row + lane / 4, group_column + half * WGMMA_N, offset);
            };

            int kb = 0;
            if constexpr (OVERLAP) {
#pragma unroll 1
                for (; kb + UNROLL <= t.num_k_blocks; kb += UNROLL) {
                    constexpr int STEPS = UNROLL * HALVES;
                    float part[2][WGMMA_N / 2];
                    Scales<WGMMA_N> scales[2];
                    const u32 unused[BLOCK_K / 32][4] = {};
                    int previous = stage;
#pragma unroll
                    for (int step = 0; step <= STEPS; ++step) {
                        if (step < STEPS) {
                            if (step % HALVES == 0) mbarrier_wait(full(stage), phase);
                            multiply(part[step % 2], unused, stage, step % HALVES);
                            load(scales[step % 2], stage, step % HALVES);
                        }
                        if (step > 0) {
                            const int done = step - 1;
                            step < STEPS ? wgmma_wait<1>() : wgmma_wait<0>();
                            if (done % HALVES == HALVES - 1) release(previous);
                            promote(sum[done % HALVES], part[done % 2], scales[done % 2], nullptr, 0);
                        }
                        if (step < STEPS && step % HALVES == HALVES - 1) previous = stage, advance();
                    }
                }
            }
#pragma unroll 1
            for (; kb < t.num_k_blocks; ++kb, advance()) {
                mbarrier_wait(full(stage), phase);
                u32 a[BLOCK_K / 32][4];
                if (A_REGISTERS) {  // the warp's 16 rows, read once for both halves
                    const int r = warp_row + lane % 16;
#pragma unroll
                    for (int i = 0; i < BLOCK_K / 32; ++i) {
                        const int chunk = (2 * i + lane / 16) ^ (r % 8);  // the swizzle of TMA
                        load_matrix_x4(a[i], base + stage * STAGE_BYTES + r * BLOCK_K + chunk * 16);
                    }
                }
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    float part[WGMMA_N / 2];
                    Scales<WGMMA_N> scales;
                    multiply(part, a, stage, half);
                    load(scales, stage, half);
                    wgmma_wait<0>();
                    // The stage may go once nothing reads it: the promotion may still read scales of B.
                    constexpr bool READS = !SCALE_B_BLOCK && !Scales<WGMMA_N>::AHEAD;
                    if (!READS && half == HALVES - 1) release(stage);
                    promote(sum[half], part, scales, scales_at(stage) + BLOCK_M, group_column + half * WGMMA_N);
                    if (READS && half == HALVES - 1) release(stage);
                }
            }
            if (OUTPUT == OUTPUT_ADD && t.num_k_blocks == 0) continue;
            store(sum, smem + STAGING_AT + warp * STAGING_BYTES, &map_d, d, problem, t, warp_row, group_column);
        }
        if (ASYNC_STORE && lane == 0) bulk_wait_read();  // shared memory must outlive the stores
    }
    __syncwarp();
    if (CLUSTER > 1) cluster_arrive(), cluster_wait();  // no CTA leaves while its peer still copies or arrives here
}
