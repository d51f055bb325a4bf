// Which output tile comes next. One policy per GROUPING; nothing here knows how a tile is computed.
//
//   DENSE      D[M,N]    = A[M,K] B[N,K]^T
//   M_GROUPED  rows of A and D split into groups at group_ends; group g multiplies B[g] (N x K)
//   MASKED     A is [G, M, K], D is [G, M, N]; of each group only the first group_sizes[g] rows count
//   K_GROUPED  D[g] = A[:, K_g] B[:, K_g]^T; group g owns a 128-aligned range K_g of the contraction axis
#pragma once
#include "ptx.cuh"

enum { DENSE = 0, M_GROUPED = 1, MASKED = 2, K_GROUPED = 3 };
// What becomes of a tile. OUTPUT_SWIGLU: B[g] is [gate | up], and a tile has BLOCK_N / 2 columns of each.
// OUTPUT_SWIGLU_BACKWARD: groups end at multiples of 128.
enum { OUTPUT_BF16 = 0, OUTPUT_F32 = 1, OUTPUT_ADD = 2, OUTPUT_SWIGLU = 3, OUTPUT_SWIGLU_BACKWARD = 4 };

// What an epilogue stages at a time: 16 rows x 128 bytes. swizzle: where 16-byte chunk c of row r lies in it, the 128-byte
// swizzle of TMA, free of bank conflicts down a column of chunks and along a row.
constexpr int PANEL_BYTES = 16 * 128;
DEVICE int swizzle(int r, int c) { return r * 128 + ((c ^ (r % 8)) << 4); }

DEVICE int ceil_div(int a, int b) { return (a + b - 1) / b; }

struct Problem {
    int m, n, k;            // K_GROUPED: k is the capacity of the padded contraction axis
    int num_groups;
    int band;               // tiles along m that are walked together, for reuse in L2
    const int* groups;      // group_ends, or group_sizes when MASKED
};

struct Tile {
    int a_row, b_row;       // first row of each operand
    int column;             // first output column; OUTPUT_SWIGLU: of the gate, and of up n / 2 further on
    i64 d_row;              // first output row
    int rows;               // output rows of the tile that exist; may be zero or negative
    int k_block;            // first 128-block along the contraction
    int num_k_blocks;
};

// [start, end) of group g in rows. Clamped, so that bad group_ends (reported by fill_group_table) stay in bounds.
DEVICE void group_rows(const Problem& p, int limit, int g, int& start, int& end) {
    if (GROUPING == MASKED) {
        start = 0;
        end = min(max(__ldg(p.groups + g), 0), limit);
    } else {
        start = g == 0 ? 0 : min(max(__ldg(p.groups + g - 1), 0), limit);
        end = min(max(__ldg(p.groups + g), start), limit);
    }
}

// Inclusive prefix sums over groups, by one warp: of tiles along m (M_GROUPED, MASKED) or of 128-blocks (K_GROUPED).
DEVICE void fill_group_table(const Problem& p, int* table, int* status) {
    const int lane = threadIdx.x % 32;
    const int limit = GROUPING == K_GROUPED ? p.k : p.m;
    int carry = 0;
    for (int base = 0; base < p.num_groups; base += 32) {
        const int g = base + lane;
        int count = 0;
        if (g < p.num_groups) {
            int start, end;
            group_rows(p, limit, g, start, end);
            count = ceil_div(end - start, GROUPING == K_GROUPED ? 128 : BLOCK_M);
            const int given = __ldg(p.groups + g);
            const int before = GROUPING == MASKED || g == 0 ? 0 : __ldg(p.groups + g - 1);
            if (blockIdx.x == 0 && given != end) {
                const int code = GROUPING == MASKED ? 4 : given < before ? 1 : 2;
                report(status, code, g, given, code == 1 ? before : limit);
            } else if (OUTPUT == OUTPUT_SWIGLU_BACKWARD && blockIdx.x == 0 && given % 128 != 0) {
                report(status, 5, g, given, 128);
            }
        }
        for (int offset = 1; offset < 32; offset *= 2) {
            const int other = __shfl_up_sync(~0u, count, offset);
            if (lane >= offset) count += other;
        }
        // Bad ends could ask for more padded blocks than the operands hold.
        if (g < p.num_groups) table[g] = GROUPING == K_GROUPED ? min(carry + count, p.k / 128) : carry + count;
        carry += __shfl_sync(~0u, count, 31);
    }
}

struct Scheduler {
    const Problem& p;
    const int* table;
    int tiles_n, num_tiles, group = 0;

    DEVICE Scheduler(const Problem& p, const int* table) : p(p), table(table) {
        tiles_n = ceil_div(p.n, BLOCK_N);
        if (GROUPING == DENSE) num_tiles = ceil_div(p.m, BLOCK_M) * tiles_n;
        if (GROUPING == M_GROUPED || GROUPING == MASKED) num_tiles = table[p.num_groups - 1] * tiles_n;
        if (GROUPING == K_GROUPED) num_tiles = p.num_groups * ceil_div(p.m, BLOCK_M) * tiles_n;
    }

    // Tiles must be asked for in increasing order: the group only moves forward.
    DEVICE Tile tile(int index) {
        int first = 0, tiles_m, start = 0, end = p.m;
        if (GROUPING == DENSE) {
            tiles_m = ceil_div(p.m, BLOCK_M);
        } else if (GROUPING == K_GROUPED) {
            tiles_m = ceil_div(p.m, BLOCK_M);
            group = index / (tiles_m * tiles_n);
            first = group * tiles_m;
        } else {
            while (index >= table[group] * tiles_n) ++group;
            first = group == 0 ? 0 : table[group - 1];
            tiles_m = table[group] - first;
            group_rows(p, p.m, group, start, end);
        }
        // Bands of `band` tiles along m, swept along n: one wave of CTAs then shares few rows of A and of B.
        const int local = index - first * tiles_n;
        const int band_start = local / (p.band * tiles_n) * p.band;
        const int band_width = min(p.band, tiles_m - band_start);
        const int in_band = local - band_start * tiles_n;
        const int m0 = (band_start + in_band % band_width) * BLOCK_M;
        const int n0 = in_band / band_width * (OUTPUT == OUTPUT_SWIGLU ? BLOCK_N / 2 : BLOCK_N);

        Tile t;
        t.column = n0;
        t.rows = end - start - m0;
        t.k_block = 0;
        t.num_k_blocks = ceil_div(p.k, 128);
        if (GROUPING == K_GROUPED) {
            t.a_row = m0;
            t.b_row = n0;
            t.d_row = (i64)group * p.m + m0;
            t.k_block = group == 0 ? 0 : table[group - 1];
            t.num_k_blocks = table[group] - t.k_block;
        } else {
            if (SPLITS > 1) {
                const int rank = cluster_rank(), blocks = t.num_k_blocks;
                t.k_block = blocks * rank / SPLITS;
                t.num_k_blocks = blocks * (rank + 1) / SPLITS - t.k_block;
            }
            t.a_row = (GROUPING == MASKED ? group * p.m : start) + m0;
            t.b_row = group * p.n + n0;
            t.d_row = t.a_row;
        }
        return t;
    }
};
