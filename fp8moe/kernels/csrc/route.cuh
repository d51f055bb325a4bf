// The routing map, in two launches and without the host (see slots.cuh). The row of a slot is the
// position that a stable sort by expert would give, with every expert's rows padded to 128.
//
// Expert num_experts drops the slot; any other id out of range is dropped and reported. kept_row, if
// there is one, gets the rows of the slots that are not dropped, in slot order.
#include "slots.cuh"

static constexpr int kMaxExperts = 1024;
static constexpr int kExpertsPerThread = kMaxExperts / kThreads;
static constexpr int kPad = -1;

// The expert of a slot, num_experts if it is dropped. `bad` when the id is not even that.
__device__ __forceinline__ int expert_of(Id id, int num_experts, bool& bad) {
  bad = id < 0 || id > (Id)num_experts;
  return bad ? num_experts : (int)id;
}

// Calls visit(slot, expert, peers, leader, inside) for the slots of this warp, 32 at a time and in
// order. `peers` are the lanes with the same expert; `leader` is true in the highest of them.
// Every lane makes every call.
template <class Visit>
__device__ __forceinline__ void walk(const Id* ids, int num_slots, int slots_per_warp,
                                     int num_experts, int& first_bad, Visit visit) {
  int lane = threadIdx.x & 31;
  walk_slots(ids, num_slots, slots_per_warp, num_experts, [&](int slot, Id id, bool inside) {
    bool bad;
    int expert = expert_of(id, num_experts, bad);
    if (bad) first_bad = min(first_bad, slot);
    u32 peers = __match_any_sync(kFullWarp, expert);
    bool leader = (peers >> lane) == 1;
    visit(slot, expert, peers, leader, inside);
  });
}

// Counts per warp: each cell of count[warp] is only touched by the leader lanes of that warp. Returns
// how many of the warp's slots are kept.
__device__ __forceinline__ int count_slots(const Id* ids, int num_slots, int slots_per_warp,
                                           int num_experts, int* warp_count, int& first_bad) {
  int kept = 0;
  walk(ids, num_slots, slots_per_warp, num_experts, first_bad,
       [&](int, int expert, u32 peers, bool leader, bool) {
         if (leader && expert < num_experts) warp_count[expert] += __popc(peers);
         kept += __popc(__ballot_sync(kFullWarp, expert < num_experts));
         __syncwarp();
       });
  return kept;
}

// partial[cta] = [slots of each expert, slots kept] of the CTA's slice; first_bad[cta] = first bad slot
// or -1.
extern "C" __global__ void __launch_bounds__(kThreads)
    route_count(const Id* __restrict__ ids, int num_slots, int num_experts, int slots_per_warp,
                int* __restrict__ partial, int* __restrict__ first_bad) {
  __shared__ int count[kWarps][kMaxExperts];
  __shared__ int bad, kept;
  for (int e = threadIdx.x; e < num_experts; e += kThreads)
#pragma unroll
    for (int w = 0; w < kWarps; ++w) count[w][e] = 0;
  if (threadIdx.x == 0) bad = 0x7FFFFFFF, kept = 0;
  __syncthreads();

  int lane_bad = 0x7FFFFFFF;
  int warp_kept = count_slots(ids, num_slots, slots_per_warp, num_experts, count[threadIdx.x / 32],
                              lane_bad);
  if ((threadIdx.x & 31) == 0) atomicAdd(&kept, warp_kept);
  if (lane_bad != 0x7FFFFFFF) atomicMin(&bad, lane_bad);
  __syncthreads();

  int* out = partial + (i64)blockIdx.x * (num_experts + 1);
  for (int e = threadIdx.x; e < num_experts; e += kThreads) {
    int sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += count[w][e];
    out[e] = sum;
  }
  if (threadIdx.x == 0) {
    out[num_experts] = kept;
    first_bad[blockIdx.x] = bad == 0x7FFFFFFF ? -1 : bad;
  }
}

// One CTA: the first bad slot of all, if there is one.
__device__ __forceinline__ void report_bad_ids(const Id* ids, const int* first_bad,
                                               int num_experts, int* status) {
  int lane = threadIdx.x & 31;
  for (int base = 0; base < (int)gridDim.x; base += 32) {
    int slot = base + lane < (int)gridDim.x ? first_bad[base + lane] : -1;
    u32 voters = __ballot_sync(kFullWarp, slot >= 0);
    if (voters == 0) continue;
    if (lane == __ffs(voters) - 1) {
      i64 id = ids[slot];
      int shown = id < -0x7FFFFFFF ? -0x7FFFFFFF : id > 0x7FFFFFFF ? 0x7FFFFFFF : (int)id;
      report(status, kExpertOutOfRange, slot, shown, num_experts);
    }
    return;
  }
}

extern "C" __global__ void __launch_bounds__(kThreads)
    route_place(const Id* __restrict__ ids, int num_slots, int num_experts, int slots_per_warp,
                const int* __restrict__ partial, const int* __restrict__ first_bad, int capacity,
                int* __restrict__ row_of_slot, int* __restrict__ slot_of_row,
                int* __restrict__ group_ends, int* __restrict__ counts, int* __restrict__ kept_row,
                int* status) {
  __shared__ int next_row[kWarps][kMaxExperts];   // first a count, then the next free row
  __shared__ int total[kMaxExperts + 1];
  __shared__ int earlier[kMaxExperts + 1];   // its slots in the CTAs before this one, then its start
  __shared__ int warp_sums[kWarps];
  __shared__ int warp_kept[kWarps];
  int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
  for (int e = threadIdx.x; e <= kMaxExperts; e += kThreads) {
    total[e] = earlier[e] = 0;
    if (e < num_experts)
#pragma unroll
      for (int w = 0; w < kWarps; ++w) next_row[w][e] = 0;
  }
  __syncthreads();

  sum_ctas(partial, num_experts + 1, total, earlier);
  int ignored = 0x7FFFFFFF;
  int own_kept = count_slots(ids, num_slots, slots_per_warp, num_experts, next_row[warp], ignored);
  if (lane == 0) warp_kept[warp] = own_kept;
  __syncthreads();
  int next_kept = earlier[num_experts];
  for (int w = 0; w < warp; ++w) next_kept += warp_kept[w];

  // Where each expert starts: a scan of the padded totals, kExpertsPerThread neighbours a thread.
  int first = threadIdx.x * kExpertsPerThread;
  int padded[kExpertsPerThread], own = 0;
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i) {
    padded[i] = first + i < num_experts ? (total[first + i] + 127) & ~127 : 0;
    own += padded[i];
  }
  int used;
  int start = scan_threads(own, warp_sums, used);
#pragma unroll
  for (int i = 0; i < kExpertsPerThread; ++i) {
    int e = first + i;
    if (e < num_experts) {
      if (blockIdx.x == 0) {
        counts[e] = total[e];
        group_ends[e] = start + padded[i];
      }
      int row = start + earlier[e];
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        int n = next_row[w][e];
        next_row[w][e] = row;
        row += n;
      }
      earlier[e] = start;
    }
    start += padded[i];
  }
  __syncthreads();

  int* next = next_row[warp];
  walk(ids, num_slots, slots_per_warp, num_experts, ignored,
       [&](int slot, int expert, u32 peers, bool leader, bool inside) {
         bool kept = expert < num_experts;
         int row = kDropped;
         if (kept) row = next[expert] + __popc(peers & lanes_before());
         __syncwarp();
         if (kept && leader) next[expert] = row + 1;
         __syncwarp();
         if (inside) row_of_slot[slot] = row;
         if (kept) slot_of_row[row] = slot;
         if (kept_row != nullptr) {
           u32 all = __ballot_sync(kFullWarp, kept);
           if (kept) kept_row[next_kept + __popc(all & lanes_before())] = row;
           next_kept += __popc(all);
         }
       });

  // The padding rows: expert by expert over all warps.
  for (int e = blockIdx.x + gridDim.x * warp; e < num_experts; e += gridDim.x * kWarps) {
    int row = earlier[e] + total[e];
    int end = (row + 127) & ~127;
    for (int r = row + lane; r < end; r += 32) slot_of_row[r] = kPad;
  }
  for (i64 r = used + (i64)blockIdx.x * kThreads + threadIdx.x; r < capacity;
       r += (i64)gridDim.x * kThreads)
    slot_of_row[r] = kUnused;
  if (blockIdx.x == 0 && warp == 0) report_bad_ids(ids, first_bad, num_experts, status);
}
