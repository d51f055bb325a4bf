// Enough of a GPU to run the kernels on the CPU: one thread block at a time, or the blocks of one
// cluster, every CUDA thread a coroutine that runs until it meets a barrier or a warp-wide exchange.
// Of a cluster a block runs until all its threads wait, before the next block does: each is as far
// ahead of the others as it can get.
//
// What it shows: that indices, masks, exchanges and arithmetic are right, and that no read checked
// below leaves its tensor. What it cannot show: races that need threads to run at the same time,
// missing waits for asynchronous copies, and speed.
#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __align__(n) alignas(n)

using std::max;
using std::min;

struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) int2 { int x, y; };
struct alignas(16) int4 { int x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

#include "number_formats.h"

namespace emulator {

struct Dim3 { unsigned x, y, z; };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  bool done;
};

// Meeting point of some threads; a second round cannot overwrite what is still being read.
struct Meeting {
  int present = 0;
  unsigned round = 0;
  uint64_t value[2][32];
};

constexpr int kSharedBytes = 232448, kMaxCluster = 8;

struct Block {
  Dim3 index;
  unsigned char* shared;
  std::vector<Fiber> fibers;
  int running;  // threads that have not ended
  Meeting warps[32], all, named[16];
};

alignas(1024) inline unsigned char shared_memory[kMaxCluster][kSharedBytes];
inline Block blocks[kMaxCluster];
inline Block* here;  // that of the running thread
inline int cluster_size;
inline Meeting cluster_meeting;
inline ucontext_t scheduler;
inline unsigned progress;  // arrivals so far: when a pass over all threads adds none, none will ever come
void start_cluster();
inline std::function<void()> body;
inline int current, threads;
inline Dim3 thread_index, grid_size, block_size;
inline std::vector<std::pair<uintptr_t, uintptr_t>> readable;
inline bool failed;
inline char message[256];

// Ends the run at the next switch to the scheduler; this thread never continues.
[[noreturn]] inline void fail(const char* what, const void* address, size_t bytes) {
  failed = true;
  snprintf(message, sizeof message, "%s: %zu bytes at %p, block (%u, %u, %u), thread %u", what, bytes,
           address, here->index.x, here->index.y, here->index.z, thread_index.x);
  for (;;) swapcontext(&here->fibers[current].context, &scheduler);
}

inline void check_read(const void* address, size_t bytes) {
  uintptr_t at = (uintptr_t)address;
  if (at % bytes) fail("misaligned read", address, bytes);
  for (auto& range : readable)
    if (at >= range.first && at + bytes <= range.second) return;
  fail("read outside the arguments", address, bytes);
}

// Called by code compiled with -fsanitize=alignment for an access whose address is not a multiple of its size: the GPU
// faults there.
extern "C" __attribute__((weak, visibility("hidden"))) void __ubsan_handle_type_mismatch_v1_abort(
    void*, const void* address) {
  fail("misaligned access", address, 0);
}

inline void yield() { swapcontext(&here->fibers[current].context, &scheduler); }

inline void meet(Meeting& m, int expected) {
  ++progress;
  unsigned round = m.round;
  if (++m.present == expected) {
    m.present = 0;
    ++m.round;
  } else {
    while (m.round == round) yield();
  }
}

// Every lane of the warp gives a value; returns all 32 of them.
inline const uint64_t* exchange(uint64_t value) {
  Meeting& m = here->warps[current / 32];
  uint64_t* values = m.value[m.round & 1];
  values[current % 32] = value;
  meet(m, 32);
  return values;
}

inline void thread_main() {
  body();
  here->fibers[current].done = true;
  --here->running;
  ++progress;
  for (;;) swapcontext(&here->fibers[current].context, &scheduler);
}

inline void start(Block& block, Dim3 index, unsigned char* shared) {
  block.index = index;
  block.shared = shared;
  block.running = threads;
  block.all = Meeting();
  for (auto& warp : block.warps) warp = Meeting();
  for (auto& barrier : block.named) barrier = Meeting();
  memset(shared, 0xA5, kSharedBytes);
  block.fibers.resize(threads);
  for (auto& fiber : block.fibers) {
    if (!fiber.stack) fiber.stack.reset(new char[65536]);
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = 65536;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, thread_main, 0);
  }
}

// Lets the threads of a block run until they have ended or all wait; false when one has failed.
inline bool advance(Block& block) {
  here = &block;
  for (unsigned before = progress - 1; block.running > 0 && progress != before;) {
    before = progress;
    for (current = 0; current < threads; ++current) {
      if (block.fibers[current].done) continue;
      thread_index = {(unsigned)current, 0, 0};
      swapcontext(&scheduler, &block.fibers[current].context);
      if (failed) return false;
    }
  }
  return true;
}

inline bool run_cluster() {
  for (;;) {
    unsigned before = progress;
    int running = 0;
    for (int rank = 0; rank < cluster_size; ++rank) {
      if (!advance(blocks[rank])) return false;
      running += blocks[rank].running;
    }
    if (running == 0) return true;
    if (progress == before) {
      const Dim3& at = blocks[0].index;
      snprintf(message, sizeof message, "deadlock in block (%u, %u, %u)", at.x, at.y, at.z);
      return false;
    }
  }
}

// True, or false with `message` when a thread failed or the threads wait for each other for ever.
inline bool launch(Dim3 grid, int num_threads, int cluster, std::function<void()> kernel) {
  body = std::move(kernel);
  threads = num_threads;
  cluster_size = cluster;
  grid_size = grid;
  block_size = {(unsigned)num_threads, 1, 1};
  failed = false;
  if (cluster > kMaxCluster || grid.x % cluster) {
    snprintf(message, sizeof message, "a grid of %u blocks has no clusters of %d", grid.x, cluster);
    return false;
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; x += cluster) {
        start_cluster();
        cluster_meeting = Meeting();
        for (int rank = 0; rank < cluster; ++rank)
          start(blocks[rank], {x + rank, y, z}, shared_memory[rank]);
        if (!run_cluster()) return false;
      }
  return true;
}

template <class T> T load(const void* from) {  // aligned for the driver, which may be less than T
  T value;
  memcpy(&value, from, sizeof value);
  return value;
}
// Calls a kernel with arguments given as the driver takes them: an array of addresses.
template <class... Args, size_t... I>
bool call(void (*kernel)(Args...), void** args, Dim3 grid, int num_threads, int cluster,
          std::index_sequence<I...>) {
  auto values = std::make_tuple(load<std::remove_cv_t<Args>>(args[I])...);
  return launch(grid, num_threads, cluster, [=] { std::apply(kernel, values); });
}
template <class... Args>
bool run(void (*kernel)(Args...), void** args, Dim3 grid, int num_threads, int cluster) {
  return call(kernel, args, grid, num_threads, cluster, std::index_sequence_for<Args...>());
}
template <class... Args> int parameter_sizes(void (*)(Args...), int* sizes) {
  int all[] = {(int)sizeof(Args)...};
  std::copy(std::begin(all), std::end(all), sizes);
  return sizeof...(Args);
}

// ---- instructions: what the PTX in the kernels means ------------------------------------------

template <class T> T read(const void* address) {
  check_read(address, sizeof(T));
  return *(const T*)address;
}
template <class T> void write(void* address, T value) {
  if ((uintptr_t)address % sizeof(T)) fail("misaligned write", address, sizeof(T));
  *(T*)address = value;
}
inline uint4 read_if(const void* address, int wanted) {
  return wanted ? read<uint4>(address) : uint4{0, 0, 0, 0};
}
// Shared addresses have 32 bits and count from the block's own memory: static arrays lie within 2 GiB of it.
inline unsigned shared_address(const void* p) {
  return (unsigned)((intptr_t)p - (intptr_t)here->shared);
}
// Those that other blocks of the cluster can use: the block's rank, above the bits of an address in its memory.
constexpr int kRankShift = 24;
inline int cluster_rank() { return (int)(here - blocks); }
inline unsigned cluster_address(unsigned address, int rank) {
  if (address >= kSharedBytes || rank < 0 || rank >= cluster_size) fail("not in the cluster", nullptr, address);
  return address | (unsigned)(rank + 1) << kRankShift;
}
// The block of such an address, which becomes an address there.
inline Block& block_of(unsigned& address) {
  const int rank = (int)(address >> kRankShift) - 1;
  if (rank < 0 || rank >= cluster_size) fail("not an address of a cluster", nullptr, address);
  address &= (1u << kRankShift) - 1;
  if (blocks[rank].running == 0) fail("that block has ended", nullptr, address);
  return blocks[rank];
}
inline float4 load_cluster(unsigned address) {
  Block& block = block_of(address);
  if (address % 16 || address + 16 > kSharedBytes) fail("bad shared address", nullptr, address);
  return *(float4*)(block.shared + address);
}
// barrier.cluster: threads that have ended are not waited for.
inline void meet_cluster() {
  Meeting& m = cluster_meeting;
  const unsigned round = m.round;
  ++m.present, ++progress;
  while (m.round == round) {
    int running = 0;
    for (int rank = 0; rank < cluster_size; ++rank) running += blocks[rank].running;
    if (m.present == running)
      m.present = 0, ++m.round, ++progress;
    else
      yield();
  }
}
// Four 8 x 8 matrices of 16-bit values: lane 8 i + r has the address of row r of matrix i, and each
// lane two neighbouring values of row lane / 4 of all four.
inline void store_matrix(unsigned address, const std::array<unsigned, 4>& values) {
  const uint64_t* rows = exchange(address);
  int lane = current % 32;
  for (int i = 0; i < 4; ++i) {
    unsigned row = (unsigned)rows[8 * i + lane / 4];
    if (row % 16) fail("misaligned row of a matrix", nullptr, row);
    write((char*)here->shared + (int)row + lane % 4 * 4, values[i]);
  }
}
// The same with each matrix transposed: lane 8 i + r has the address of column r.
inline void store_matrix_transposed(unsigned address, const std::array<unsigned, 4>& values) {
  const uint64_t* columns = exchange(address);
  int lane = current % 32;
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 2; ++j) {
      unsigned column = (unsigned)columns[8 * i + lane % 4 * 2 + j];
      if (column % 16) fail("misaligned column of a matrix", nullptr, column);
      write((char*)here->shared + (int)column + lane / 4 * 2, (uint16_t)(values[i] >> 16 * j));
    }
}
template <class T> void copy_async(unsigned shared, const void* global, int bytes) {
  T value = bytes ? read<T>(global) : T{};
  write((char*)here->shared + (int)shared, value);
}

}  // namespace emulator

#include "tensor_core.h"

#define threadIdx emulator::thread_index
#define blockIdx emulator::here->index
#define blockDim emulator::block_size
#define gridDim emulator::grid_size

inline void __syncthreads() { emulator::meet(emulator::here->all, emulator::threads); }
inline void __syncwarp(unsigned = ~0u) { emulator::exchange(0); }
inline void __threadfence_system() {}
template <class T> T __ldg(const T* p) { return emulator::read<T>(p); }

template <class T> T shuffle(T value, int source) {
  return emulator::cooked<T>(emulator::exchange(emulator::raw(value))[source & 31]);
}
template <class T> T __shfl_sync(unsigned, T value, int lane) { return shuffle(value, lane); }
template <class T> T __shfl_xor_sync(unsigned, T value, int mask) {
  return shuffle(value, (emulator::current & 31) ^ mask);
}
template <class T> T __shfl_up_sync(unsigned, T value, int delta) {
  int lane = emulator::current & 31;
  return shuffle(value, lane >= delta ? lane - delta : lane);
}
template <class F> unsigned lanes_where(uint64_t value, F f) {
  const uint64_t* values = emulator::exchange(value);
  unsigned mask = 0;
  for (int i = 0; i < 32; ++i) mask |= (unsigned)f(values[i]) << i;
  return mask;
}
inline unsigned __ballot_sync(unsigned, bool vote) {
  return lanes_where(vote, [](uint64_t v) { return v != 0; });
}
inline bool __all_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) == ~0u; }
inline bool __any_sync(unsigned mask, bool vote) { return __ballot_sync(mask, vote) != 0; }
template <class T> unsigned __match_any_sync(unsigned, T value) {
  uint64_t own = emulator::raw(value);
  return lanes_where(own, [=](uint64_t v) { return v == own; });
}
template <class T> T __reduce_max_sync(unsigned, T value) {
  const uint64_t* values = emulator::exchange(emulator::raw(value));
  T result = value;
  for (int i = 0; i < 32; ++i) result = max(result, emulator::cooked<T>(values[i]));
  return result;
}
template <class T> T atomicAdd(T* p, T value) { return std::exchange(*p, *p + value); }
template <class T> T atomicMin(T* p, T value) { return std::exchange(*p, min(*p, value)); }

inline int __ffs(unsigned v) { return __builtin_ffs((int)v); }
inline int __popc(unsigned v) { return __builtin_popcount(v); }
inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((uint64_t)a * b >> 32); }
inline float __uint_as_float(unsigned u) { return emulator::cooked<float>(u); }
inline unsigned __float_as_uint(float f) { return (unsigned)emulator::raw(f); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i)
    result |= (unsigned)(bytes >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  return result;
}
inline unsigned __cvta_generic_to_shared(const void* p) { return emulator::shared_address(p); }
