// The FP8 GEMM: D = A B^T with E4M3 operands, block scales and FP32 accumulation, for every grouping of the scheduler.
//
// One CTA per SM stays resident and walks over tiles. Its warpgroups have fixed roles:
//
//   first warpgroups      consumers, two or three: wgmma on a stage, promotion of the partial sums, epilogue
//   last one, warp 0      TMA producer: one lane copies the A and B blocks of the next k-block into a ring of STAGES
//   last one, warp 1      scale producer: 32 lanes copy the scales of the same stage with cp.async, 16 bytes at a time
//                         where all are aligned, else 4 (groups may start at any row)
//
// A stage is handed over by two mbarriers: `full` (the TMA bytes and 32 scale lanes have arrived) and `empty` (every
// consumer warp is done with it). The ring runs on across tiles, so the next tile's operands are already on their way
// while the consumers store this one. README.md one folder up draws it.
//
// Constants rendered before this file: GROUPING, OUTPUT, BLOCK_M (64 | 128 | 192), BLOCK_N, SPLITS (CTAs that share a
// tile, see split_k.cuh), STAGES, ASYNC_STORE, for the SwiGLU outputs also POW2. Shapes are arguments, so some dozens of
// compiled kernels serve every model.
#include "ptx.cuh"
#include "scheduler.cuh"
#include "promote.cuh"
#include "split_k.cuh"
#if OUTPUT >= 3  // a header is rendered where it is first included, which must hold for both
#include "activation.cuh"
#include "pairs.cuh"
#endif
#if OUTPUT == 3  // OUTPUT_SWIGLU
#include "epilogue_swiglu.cuh"
#elif OUTPUT == 4  // OUTPUT_SWIGLU_BACKWARD
#include "epilogue_swiglu_backward.cuh"
#else
#include "epilogue.cuh"
#endif

constexpr int BLOCK_K = 128;  // bytes of a swizzled row, and the extent of a scale
// Consumer warpgroups take 64 rows of the tile each; two share the columns of a tile that has only 64 rows.
constexpr int CONSUMERS = BLOCK_M == 192 ? 3 : 2;
constexpr int CONSUMER_WARPS = CONSUMERS * 4, TMA_WARP = CONSUMER_WARPS, SCALE_WARP = CONSUMER_WARPS + 1;
constexpr int THREADS = CONSUMERS * 128 + 128;
// The registers of the SM, moved from the producers to the consumers: 40 + 2 x 232 or 32 + 3 x 160 for each thread.
constexpr int PRODUCER_REGISTERS = CONSUMERS == 3 ? 32 : 40, CONSUMER_REGISTERS = CONSUMERS == 3 ? 160 : 232;
constexpr int GROUP_N = BLOCK_M > 64 ? BLOCK_N : BLOCK_N / 2;
// N of one wgmma. The widest tile is computed in halves, so that its sums and one set of partial sums fit the 232
// registers of a thread.
constexpr int WGMMA_N = GROUP_N <= 192 ? GROUP_N : GROUP_N / 2;
constexpr int HALVES = GROUP_N / WGMMA_N;

// The k-blocks of a small tile are so short that each instruction which delays a wgmma shows, and its sums leave registers
// free. So the scales are loaded last there, where the compiler cannot put them between two wgmma, and descriptors are made
// such that it keeps them in uniform registers, where wgmma takes them: computed from the stage, which is enough for most
// tiles, and passed through `uniform`, which 64 x 128 and split tiles need. Both make larger tiles spill or run slower.
constexpr bool SMALL_TILE = BLOCK_M * BLOCK_N <= 128 * 128;

constexpr int A_BYTES = BLOCK_M * BLOCK_K;
constexpr int B_BYTES = BLOCK_N * BLOCK_K;
constexpr int STAGE_BYTES = A_BYTES + B_BYTES;
constexpr int STAGING_AT = STAGES * STAGE_BYTES;
constexpr int SCALES_AT = STAGING_AT + CONSUMER_WARPS * STAGING_BYTES;
constexpr int BARRIERS_AT = SCALES_AT + STAGES * SCALE_STAGE * 4;
constexpr int TABLE_AT = BARRIERS_AT + 2 * STAGES * 8;
static_assert(BLOCK_M == 64 || BLOCK_M == 128 || BLOCK_M == 192, "a consumer warpgroup computes 64 rows");
static_assert(A_BYTES % 1024 == 0 && B_BYTES % 1024 == 0, "the swizzle repeats every 1024 bytes");
static_assert(HALVES * WGMMA_N == GROUP_N, "whole wgmma tiles");
static_assert(SPLITS == 1 || BLOCK_M * BLOCK_N * 4 <= STAGING_AT, "split sums lie where the stages were");
static_assert(SPLITS == 1 || (GROUPING == DENSE && CONSUMER_WARPS % SPLITS == 0), "an owner for each warp's sums");

#if SPLITS > 1
#define CLUSTER __cluster_dims__(SPLITS, 1, 1)
#else
#define CLUSTER
#endif
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, 1)
gemm(const __grid_constant__ TensorMap map_a, const __grid_constant__ TensorMap map_b,
     const __grid_constant__ TensorMap map_d, const float* __restrict__ scale_a, const float* __restrict__ scale_b,
     const Destination d, const int* __restrict__ groups, int* status, int m, int n, int k, int num_groups, int band,
     int a_rows, int scale_a_stride, int scale_b_stride) {
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
            mbarrier_init(empty(stage), CONSUMER_WARPS);
        }
        mbarrier_init_fence();
    }
    __syncthreads();

    Scheduler scheduler(problem, table);
    // Split tiles: a cluster computes one and ends, so that its stages are free for the sums.
    const int first_tile = blockIdx.x / SPLITS, step = gridDim.x;
    int stage = 0;
    u32 phase = 0;
    const auto advance = [&] {
        if (++stage == STAGES) stage = 0, phase ^= 1;
    };

    if (warp >= CONSUMER_WARPS) {
        release_registers<PRODUCER_REGISTERS>();
        if (warp == TMA_WARP && lane == 0) {
            for (int index = first_tile; index < scheduler.num_tiles; index += step) {
                const Tile t = scheduler.tile(index);
#pragma unroll 1  // the producers have few registers
                for (int kb = t.k_block; kb < t.k_block + t.num_k_blocks; ++kb, advance()) {
                    mbarrier_wait(empty(stage), phase ^ 1);
                    mbarrier_arrive_expect_tx(full(stage), STAGE_BYTES);
                    const u32 a = base + stage * STAGE_BYTES;
                    if (OUTPUT == OUTPUT_SWIGLU_BACKWARD) {  // rows in the order that its epilogue wants
                        tma_load_groups_4d(a, &map_a, kb * BLOCK_K, t.a_row / 16, full(stage));
                        tma_load_groups_5d(a + A_BYTES, &map_b, kb * BLOCK_K, t.b_row / 64, full(stage));
                    } else {
                        tma_load(a, &map_a, kb * BLOCK_K, t.a_row, full(stage));
                        tma_load(a + A_BYTES, &map_b, kb * BLOCK_K, t.b_row, full(stage));
                    }
                    if (OUTPUT == OUTPUT_SWIGLU)  // boxes of half the rows: the gate's, then up's
                        tma_load(a + A_BYTES + B_BYTES / 2, &map_b, kb * BLOCK_K, t.b_row + n / 2, full(stage));
                }
            }
        } else if (warp == SCALE_WARP) {
            for (int index = first_tile; index < scheduler.num_tiles; index += step) {
                const Tile t = scheduler.tile(index);
                // Scales of B: a row for each of its 128-row blocks, of all groups; those of K_GROUPED lie along K. Columns
                // past N exist in the tile but not in D: any scale will do.
                const int n_blocks = ceil_div(n, 128);
                const int next = OUTPUT == OUTPUT_SWIGLU ? lane * (n_blocks / 2) : lane;
                const int block = min(t.column / 128 + next, n_blocks - 1) +
                                  (GROUPING == K_GROUPED ? 0 : scheduler.group * n_blocks);
                const float* source_a = scale_a + (i64)t.k_block * scale_a_stride;
                const float* source_b = scale_b + (i64)block * scale_b_stride + t.k_block;
#pragma unroll 1  // the producers have few registers
                for (int kb = 0; kb < t.num_k_blocks; ++kb, advance()) {
                    mbarrier_wait(empty(stage), phase ^ 1);
                    const u32 to = base + SCALES_AT + stage * SCALE_STAGE * 4;
                    copy_scales(to, source_a, scale_a_stride, t.a_row, a_rows);
                    if (lane < NUM_B_SCALES) cp_async_4(to + (BLOCK_M + lane) * 4, source_b, true);
                    source_a += scale_a_stride;
                    ++source_b;
                    cp_async_arrive(full(stage));
                }
            }
        }
    } else {
        take_registers<CONSUMER_REGISTERS>();
        const int warpgroup = warp / 4;
        const int warp_row = (BLOCK_M > 64 ? warpgroup * 64 : 0) + warp % 4 * 16;
        const int group_column = BLOCK_M > 64 ? 0 : warpgroup * GROUP_N;
        // Matrix descriptors of stage 0; warp-uniform, so that they live in uniform registers.
        const u32 first_a = __shfl_sync(~0u, matrix_address(base + (BLOCK_M > 64 ? warpgroup * 64 * BLOCK_K : 0)), 0);
        const u32 first_b = __shfl_sync(~0u, matrix_address(base + A_BYTES + group_column * BLOCK_K), 0);
        // Those of the current stage are carried along: after a promotion nothing is left to compute before the next
        // wgmma, and what is computed there is time in which the tensor cores may run dry.
        u32 stage_a = first_a, stage_b = first_b;

        Tile next = first_tile < scheduler.num_tiles ? scheduler.tile(first_tile) : Tile{};
        for (int index = first_tile; index < scheduler.num_tiles; index += step) {
            const Tile t = next;
            const auto look_ahead = [&] {
                if (index + step < scheduler.num_tiles) next = scheduler.tile(index + step);
            };
            if (t.num_k_blocks == 0) look_ahead();
            if (OUTPUT == OUTPUT_ADD && t.num_k_blocks == 0) continue;
            float sum[HALVES][WGMMA_N / 2] = {};
#if OUTPUT == 4
            int slot;
#endif
            const int offset = t.column % 128;
            if (t.num_k_blocks > 0) mbarrier_wait(full(stage), phase);
#pragma unroll 1
            for (int kb = 0; kb < t.num_k_blocks; ++kb) {
                const float* scales_a = reinterpret_cast<const float*>(smem + SCALES_AT) + stage * SCALE_STAGE;
                const float* scales_b = scales_a + BLOCK_M;
#pragma unroll
                for (int half = 0; half < HALVES; ++half) {
                    const int column = group_column + half * WGMMA_N;
                    float part[WGMMA_N / 2];
                    wgmma_fence();
#pragma unroll
                    for (int i = 0; i < BLOCK_K / 32; ++i)
                        wgmma(part, matrix_descriptor(stage_a + i * 2),
                              matrix_descriptor(stage_b + half * (WGMMA_N * BLOCK_K >> 4) + i * 2), i != 0);
                    wgmma_commit();
                    // While the tensor cores work: the scales, the next tile, the next stage.
                    Scales<WGMMA_N> scales;
                    const int row = warp_row + first_row_of(lane);
                    if (!SMALL_TILE) scales.load(scales_a, scales_b, row, column, offset);
                    const bool last = half == HALVES - 1;
                    const int used = stage;
                    if (half == 0 && kb == 0) look_ahead();
#if OUTPUT == 4
                    if (half == 0 && kb == 0) slot = load_slot(d, t, warp_row);
                    if (half == 1 && kb == 0) prefetch(smem + STAGING_AT, d, problem, t, warp_row, slot);
#endif
                    if (last) {
                        advance();
                        if (SMALL_TILE) {
                            stage_a = uniform(first_a + stage * (STAGE_BYTES >> 4));
                            stage_b = uniform(first_b + stage * (STAGE_BYTES >> 4));
                        } else {
                            stage_a = stage == 0 ? first_a : stage_a + (STAGE_BYTES >> 4);
                            stage_b = stage == 0 ? first_b : stage_b + (STAGE_BYTES >> 4);
                        }
                        if (kb + 1 < t.num_k_blocks) mbarrier_wait(full(stage), phase);
                    }
                    if (SMALL_TILE) scales.load(scales_a, scales_b, row, column, offset);
                    wgmma_wait();
                    if (last) {
                        __syncwarp();
                        if (lane == 0) mbarrier_arrive(empty(used));
                    }
                    promote(sum[half], part, scales);
                }
            }
            if (SPLITS > 1 && !add_parts<CONSUMER_WARPS * 32>(sum, base)) continue;
#if OUTPUT == 4
            store(sum, smem + STAGING_AT, d, problem, t, warp_row);
#else
            store(sum, smem + STAGING_AT + warp * STAGING_BYTES, &map_d, d, problem, t, warp_row, group_column);
#endif
        }
        if (ASYNC_STORE && lane == 0) bulk_wait_read<0>();  // shared memory must outlive the stores
    }
}
