// The asynchronous half of Hopper for the emulator: mbarriers, TMA and wgmma, each done at once when
// it is issued. It shows that counts, bytes, boxes, swizzles and descriptors fit together; not what a
// missing fence or wait would spoil. Included by emulator.h.
#pragma once

namespace emulator {

// A phase ends when its arrivals and its bytes are complete.
struct Barrier {
  int count, pending, bytes;
  unsigned phase;
};
inline std::map<std::pair<Block*, unsigned>, Barrier> barriers;  // of the running cluster, by shared address

inline void start_cluster() { barriers.clear(); }

inline void barrier_init(unsigned address, int count) { barriers[{here, address}] = {count, count, 0, 0}; }

inline void barrier_update(unsigned address, int arrivals, int bytes) {
  auto found = barriers.find({here, address});
  if (found == barriers.end()) fail("no barrier here", nullptr, address);
  Barrier& b = found->second;
  ++progress;
  b.pending -= arrivals;
  b.bytes += bytes;
  if (b.pending < 0) fail("too many arrivals", nullptr, address);
  if (b.pending == 0 && b.bytes == 0) b.pending = b.count, b.phase ^= 1;
}

inline void barrier_wait(unsigned address, unsigned parity) {
  if (!barriers.count({here, address})) fail("no barrier here", nullptr, address);
  while (barriers[{here, address}].phase == parity) yield();
}

// What `fake_tensor_map` of conftest.py packs into the 128 bytes of a descriptor.
struct FakeMap {
  uint64_t pointer;
  int64_t rows, columns, row_bytes, box_rows, box_columns, element, swizzle;
  struct { int extent, stride; } axes[3];  // row_order of tma.tensor_map, or extents of 1
};

// Calls move(shared, global or null, bytes) for each 16 bytes of the box at (x, y), y a group of rows.
template <class Move> void walk_box(const void* map, unsigned shared, int x, int y, Move move) {
  FakeMap m;
  memcpy(&m, map, sizeof m);
  if (m.swizzle != 128 || m.box_columns * m.element != 128 || shared % 1024)
    fail("only whole swizzled rows are emulated", nullptr, shared);
  int group = 1;
  for (const auto& axis : m.axes) group *= axis.extent;
  for (int r = 0; r < m.box_rows; ++r) {
    int64_t row = (y + r / group) * (int64_t)group;
    for (int i = 0, rest = r % group; i < 3; rest /= m.axes[i++].extent) row += rest % m.axes[i].extent * m.axes[i].stride;
    for (int chunk = 0; chunk < 8; ++chunk) {
      char* at = (char*)here->shared + shared + r * 128 + ((chunk ^ (r % 8)) << 4);
      int64_t column = x * m.element + chunk * 16, left = m.columns * m.element - column;
      bool inside = row >= 0 && row < m.rows && left > 0;
      char* global = inside ? (char*)m.pointer + row * m.row_bytes + column : nullptr;
      move(at, global, (int)min<int64_t>(left, 16));
    }
  }
}

inline void tma_load(unsigned shared, const void* map, int x, int y, unsigned barrier) {
  int bytes = 0;
  walk_box(map, shared, x, y, [&](char* at, const char* global, int size) {
    memset(at, 0, 16);
    if (global) memcpy(at, global, size);
    bytes += 16;
  });
  barrier_update(barrier, 0, -bytes);
}

inline void tma_store(const void* map, unsigned shared, int x, int y) {
  walk_box(map, shared, x, y, [&](const char* at, char* global, int size) {
    if (global) memcpy(global, at, size);
  });
}

inline void tma_add(const void* map, unsigned shared, int x, int y) {
  walk_box(map, shared, x, y, [&](const char* at, char* global, int size) {
    for (int i = 0; global && i < size / 4; ++i) ((float*)global)[i] += ((const float*)at)[i];
  });
}

// Byte k of row r of the operand that a descriptor of 128-byte swizzled rows stands for.
inline uint8_t operand(uint64_t descriptor, int r, int k) {
  if (descriptor >> 32 != 0x40000040u) fail("descriptor", nullptr, descriptor >> 32);
  unsigned at = ((unsigned)descriptor & 0x3FFF) * 16 + r * 128 + k;
  return here->shared[at ^ (at >> 3 & 0x70)];
}

// This thread's accumulators of d[64 x N] (+)= a[64 x 32] b[N x 32]^T.
template <int REGISTERS>
void wgmma(float (&d)[REGISTERS], uint64_t a, uint64_t b, int accumulate) {
  static const std::vector<float> value = [] {
    std::vector<float> all;
    for (int i = 0; i < 256; ++i) all.push_back(from_e4m3((uint8_t)i));
    return all;
  }();
  const int lane = current % 32, row = current / 32 % 4 * 16 + lane / 4;
  float rows[2][32];
  for (int r = 0; r < 2; ++r)
    for (int k = 0; k < 32; ++k) rows[r][k] = value[operand(a, row + 8 * r, k)];
  for (int i = 0; i < REGISTERS; i += 4)
    for (int c = 0; c < 2; ++c) {
      float sum[2] = {};
      for (int k = 0; k < 32; ++k) {
        const float w = value[operand(b, i * 2 + lane % 4 * 2 + c, k)];
        sum[0] += rows[0][k] * w, sum[1] += rows[1][k] * w;
      }
      for (int r = 0; r < 2; ++r)
        d[i + 2 * r + c] = accumulate ? d[i + 2 * r + c] + sum[r] : sum[r];
    }
}

}  // namespace emulator
