// Accumulators to global memory. Each warp works alone: it turns a panel of 16 rows x 128 bytes around in its own 2 KB
// of shared memory (swizzled, conflict-free) and writes whole 128-byte row segments, guarded by row and by column. So
// full tiles, the ragged last tile of a group and the edge in N take one path, and no warp waits for another.
//
//   OUTPUT_BF16   D = bf16(sum)     OUTPUT_F32   D = sum     OUTPUT_ADD   D += sum (each element has one owner)
#pragma once
#include "scheduler.cuh"

enum { OUTPUT_BF16 = 0, OUTPUT_F32 = 1, OUTPUT_ADD = 2 };

constexpr int ELEMENT = OUTPUT == OUTPUT_BF16 ? 2 : 4;  // bytes
constexpr int PANEL_BYTES = 16 * 128;

// columns: of this accumulator; row and column: this warp's first ones within the tile.
template <int REGISTERS>
DEVICE void store(const float (&sum)[REGISTERS], u32 panel, const char* panel_ptr, void* d, const Problem& p,
                  const Tile& t, int row, int column) {
    constexpr int COLUMNS = REGISTERS * 2;
    constexpr int FULL = 128 / ELEMENT;
    constexpr int WIDTH = COLUMNS % FULL == 0 ? FULL : COLUMNS % 32 == 0 ? 32 : COLUMNS;  // columns of a panel
    static_assert(COLUMNS % WIDTH == 0 && WIDTH <= FULL, "panels tile the accumulator");
    constexpr int CHUNKS = WIDTH * ELEMENT / 16;                              // 16-byte chunks of a panel's row
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int first = 0; first < COLUMNS; first += WIDTH) {
        __syncwarp();
        if (OUTPUT == OUTPUT_BF16) {
#pragma unroll
            for (int j = 0; j < WIDTH / 16; ++j) {
                const float* s = sum + first / 2 + 8 * j;
                const int r = lane % 16, chunk = 2 * j + lane / 16;
                store_matrix_x4(panel + r * 128 + ((chunk ^ (r % 8)) << 4), pack_bf16(s[0], s[1]),
                                pack_bf16(s[2], s[3]), pack_bf16(s[4], s[5]), pack_bf16(s[6], s[7]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < WIDTH / 8; ++i) {
                const float* s = sum + first / 2 + 4 * i;
                const int r = lane / 4;  // rows r and r + 8 share r % 4, hence the swizzle
                char* at = const_cast<char*>(panel_ptr) + r * 128 + ((i ^ (r % 4)) << 5) + lane % 4 * 8;
                *reinterpret_cast<float2*>(at) = make_float2(s[0], s[1]);
                *reinterpret_cast<float2*>(at + 8 * 128) = make_float2(s[2], s[3]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < 16 * CHUNKS; i += 32) {
            const int r = i / CHUNKS, chunk = i % CHUNKS;
            const int swizzled = OUTPUT == OUTPUT_BF16 ? chunk ^ (r % 8) : (((chunk >> 1) ^ (r % 4)) << 1) + chunk % 2;
            const float4 v = *reinterpret_cast<const float4*>(panel_ptr + r * 128 + (swizzled << 4));
            const int n = t.column + column + first + chunk * (16 / ELEMENT);
            if (row + r < t.rows && n < p.n) {
                char* dst = static_cast<char*>(d) + ((t.d_row + row + r) * p.n + n) * ELEMENT;
                if (OUTPUT == OUTPUT_ADD)
                    reduce_add_v4(reinterpret_cast<float*>(dst), v);
                else
                    *reinterpret_cast<float4*>(dst) = v;
            }
        }
    }
}
