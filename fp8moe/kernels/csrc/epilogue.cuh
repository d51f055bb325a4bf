// Accumulators to global memory. Each warp works alone, in shared memory of its own, so no warp waits for another.
//
//   OUTPUT_BF16   D = bf16(sum)     OUTPUT_F32   D = sum     OUTPUT_ADD   D += sum (each element has one owner)
//
// A panel is 16 rows x 128 bytes. ASYNC_STORE: the warp turns its panels around in two buffers, and TMA writes them while it
// fills the other or is busy with the next tile. Otherwise it copies one panel after the other in 16-byte stores. Both
// write only rows of the tile's group and columns below N: TMA clips at N, and 16 rows that a group ends within are
// written by plain stores.
#pragma once
#include "scheduler.cuh"

typedef void* Destination;

constexpr int ELEMENT = OUTPUT == OUTPUT_BF16 ? 2 : 4;  // bytes
constexpr int PANEL_BYTES = 16 * 128;
constexpr int STAGING_BYTES = (ASYNC_STORE ? 2 : 1) * PANEL_BYTES;  // a consumer warp's
static_assert(!ASYNC_STORE || OUTPUT == OUTPUT_BF16, "the panels of TMA are BF16");

// Where 16-byte chunk c of row r lies in a panel; the 128-byte swizzle of TMA for BF16, a wider one for FP32 pairs.
DEVICE int swizzle(int r, int c) {
    return r * 128 + (OUTPUT == OUTPUT_BF16 ? (c ^ (r % 8)) << 4 : (((c >> 1) ^ (r % 4)) << 5) + ((c & 1) << 4));
}

// WIDTH columns of the accumulator, from register `first` on, into a panel at column `at` (BF16: 16 at a time).
template <int WIDTH>
DEVICE void write_panel(const float* sum, char* panel, int at) {
    const int lane = threadIdx.x % 32;
    if (OUTPUT == OUTPUT_BF16) {
        const u32 base = smem_address(panel);
#pragma unroll
        for (int j = 0; j < WIDTH / 16; ++j) {
            const float* s = sum + 8 * j;
            store_matrix_x4(base + swizzle(lane % 16, at / 8 + 2 * j + lane / 16), pack_bf16(s[0], s[1]),
                            pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]));
        }
    } else {
#pragma unroll
        for (int i = 0; i < WIDTH / 8; ++i) {
            const float* s = sum + 4 * i;
            const int r = lane / 4;  // rows r and r + 8 share r % 4, hence the swizzle
            char* to = panel + swizzle(r, 2 * i) + lane % 4 * 8;
            *reinterpret_cast<float2*>(to) = make_float2(s[0], s[1]);
            *reinterpret_cast<float2*>(to + 8 * 128) = make_float2(s[2], s[3]);
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
    constexpr int COLUMNS = REGISTERS * 2, FULL = 128 / ELEMENT;
    const int lane = threadIdx.x % 32;
    if constexpr (ASYNC_STORE) {
#pragma unroll
        for (int c = 0; c < HALVES * COLUMNS; c += FULL) {
            char* panel = staging + c / FULL % 2 * PANEL_BYTES;
            // The panel before the last was here; with an odd number of them, the last tile's last one was.
            if (lane == 0) c == 0 && HALVES * COLUMNS / FULL % 2 ? bulk_wait_read<0>() : bulk_wait_read<1>();
            __syncwarp();
#pragma unroll
            for (int i = 0; i < FULL; i += 16)
                write_panel<16>(&sum[(c + i) / COLUMNS][(c + i) % COLUMNS / 2], panel, i);
            fence_async_proxy();
            __syncwarp();
            const int n = t.column + column + c;
            if (t.rows - row < 16)
                copy_panel<FULL>(panel, d, p, t, row, column + c);
            else if (lane == 0 && n < p.n)
                tma_store(map_d, smem_address(panel), n, (int)t.d_row + row);
            if (lane == 0) bulk_commit();  // an empty group where nothing was stored, so that the count stays right
        }
    } else {
        constexpr int WIDTH = COLUMNS % FULL == 0 ? FULL : COLUMNS % 32 == 0 ? 32 : COLUMNS;
        static_assert(COLUMNS % WIDTH == 0 && WIDTH <= FULL, "panels tile the accumulator");
#pragma unroll
        for (int c = 0; c < HALVES * COLUMNS; c += WIDTH) {
            __syncwarp();
            write_panel<WIDTH>(&sum[c / COLUMNS][c % COLUMNS / 2], staging, 0);
            __syncwarp();
            copy_panel<WIDTH>(staging, d, p, t, row, column + c);
        }
    }
}
