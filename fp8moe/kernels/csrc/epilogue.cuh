// Accumulators to global memory. Each warp works alone, in shared memory of its own, so no warp waits for another.
//
//   OUTPUT_BF16   D = bf16(sum)     OUTPUT_F32   D = sum     OUTPUT_ADD   D += sum (each element has one owner)
//
// A panel is 16 rows x 128 bytes. ASYNC_STORE: the warp turns its panels around in two buffers, and TMA writes (or adds) them
// while it fills the other or is busy with the next tile. Otherwise it copies one panel after the other in 16-byte stores.
// Both write only rows of the tile's group and columns below N: TMA clips at N, and 16 rows that a group ends within are
// written by plain stores.
#pragma once
#include "scheduler.cuh"

typedef void* Destination;

constexpr int ELEMENT = OUTPUT == OUTPUT_BF16 ? 2 : 4;  // bytes
constexpr int PANEL_COLUMNS = 128 / ELEMENT;
constexpr int STAGING_BYTES = (ASYNC_STORE ? 2 : 1) * PANEL_BYTES;  // a consumer warp's
static_assert(ASYNC_STORE || OUTPUT == OUTPUT_BF16, "tiles with FP32 outputs are wide enough for TMA");

// WIDTH columns of the accumulator, starting at `sum`, into a panel.
template <int WIDTH>
DEVICE void write_panel(const float* sum, char* panel) {
    const int lane = threadIdx.x % 32;
    if constexpr (OUTPUT == OUTPUT_BF16) {
        const u32 base = smem_address(panel);
#pragma unroll
        for (int j = 0; j < WIDTH / 16; ++j) {
            const float* s = sum + 8 * j;
            store_matrix_x4(base + swizzle(lane % 16, 2 * j + lane / 16), pack_bf16(s[0], s[1]), pack_bf16(s[2], s[3]),
                            pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]));
        }
    } else {
        // Eight columns of rows r and r + 8 at a time. Odd rows are 16 columns ahead, so that the four rows of half a warp
        // meet all banks.
        static_assert(WIDTH == 32, "a whole panel");
        const int r = lane / 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const float *left = sum + 4 * i, *right = left + 8;
#pragma unroll
            for (int turn = 0; turn < 2; ++turn) {
                const bool far = r % 2 != turn;
                char* to = panel + swizzle(r, 2 * (far ? i + 2 : i) + lane % 4 / 2) + lane % 2 * 8;
                *reinterpret_cast<float2*>(to) = make_float2(far ? right[0] : left[0], far ? right[1] : left[1]);
                *reinterpret_cast<float2*>(to + 8 * 128) = make_float2(far ? right[2] : left[2], far ? right[3] : left[3]);
            }
        }
    }
}

// WIDTH columns of a panel to D with 16-byte accesses; row, column: the panel's first ones in the tile.
template <int WIDTH>
DEVICE void copy_panel(const char* panel, void* d, const Problem& p, const Tile& t, int row, int column) {
    constexpr int CHUNKS = WIDTH * ELEMENT / 16;
#pragma unroll
    for (int i = threadIdx.x % 32; i < 16 * CHUNKS; i += 32) {
        const int r = i / CHUNKS, chunk = i % CHUNKS;
        const float4 v = *reinterpret_cast<const float4*>(panel + swizzle(r, chunk));
        const int n = t.column + column + chunk * (16 / ELEMENT);
        if (row + r < t.rows && n < p.n) {
            char* dst = static_cast<char*>(d) + ((t.d_row + row + r) * p.n + n) * ELEMENT;
            if (OUTPUT == OUTPUT_ADD)
                reduce_add_v4(reinterpret_cast<float*>(dst), v);
            else
                *reinterpret_cast<float4*>(dst) = v;
        }
    }
}

// The warp's 16 rows of HALVES accumulators. row, column: its first ones within the tile; staging: its own memory.
template <int HALVES, int REGISTERS>
DEVICE void store(const float (&sum)[HALVES][REGISTERS], char* staging, const TensorMap* map_d, void* d,
                  const Problem& p, const Tile& t, int row, int column) {
    constexpr int COLUMNS = REGISTERS * 2;
    const int lane = threadIdx.x % 32;
    if constexpr (ASYNC_STORE) {
        constexpr int PANELS = HALVES * COLUMNS / PANEL_COLUMNS;
#pragma unroll
        for (int i = 0; i < PANELS; ++i) {
            const int c = i * PANEL_COLUMNS;
            char* panel = staging + i % 2 * PANEL_BYTES;
            // The panel before the last was here; with an odd number of them, the last tile's last one was.
            if (lane == 0) i == 0 && PANELS % 2 ? bulk_wait_read<0>() : bulk_wait_read<1>();
            __syncwarp();
            write_panel<PANEL_COLUMNS>(&sum[c / COLUMNS][c % COLUMNS / 2], panel);
            fence_async_proxy();
            __syncwarp();
            const int n = t.column + column + c;
            if (t.rows - row < 16)
                copy_panel<PANEL_COLUMNS>(panel, d, p, t, row, column + c);
            else if (lane == 0 && n < p.n)
                OUTPUT == OUTPUT_ADD ? tma_add(map_d, smem_address(panel), n, (int)t.d_row + row)
                                     : tma_store(map_d, smem_address(panel), n, (int)t.d_row + row);
            if (lane == 0) bulk_commit();  // an empty group where nothing was stored, so that the count stays right
        }
    } else {
        constexpr int WIDTH = COLUMNS < PANEL_COLUMNS ? COLUMNS : PANEL_COLUMNS;
#pragma unroll
        for (int c = 0; c < HALVES * COLUMNS; c += WIDTH) {
            __syncwarp();
            write_panel<WIDTH>(&sum[c / COLUMNS][c % COLUMNS / 2], staging);
            __syncwarp();
            copy_panel<WIDTH>(staging, d, p, t, row, column + c);
        }
    }
}
