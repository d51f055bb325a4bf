// Where groups lie, read from group_ends on the device. A padded layout gives every group a whole
// number of 128-row blocks.
#pragma once
#include "numerics.cuh"

// Group g holds rows [end(g-1), end(g)). Ends outside [0, rows] are clamped and a decreasing end
// makes an empty group, so that any content of group_ends is safe to follow.
__device__ __forceinline__ int group_end(const int* group_ends, int g, int rows) {
  return min(max(__ldg(group_ends + g), 0), rows);
}
__device__ __forceinline__ int group_begin(const int* group_ends, int g, int rows) {
  return g == 0 ? 0 : group_end(group_ends, g - 1, rows);
}

__device__ __forceinline__ int group_blocks(int begin, int end) {
  return end > begin ? (int)(((u32)(end - begin) + 127u) >> 7) : 0;
}

struct GroupBlock {
  int group;       // which group the 128-row block belongs to
  int block;       // which block of that group
  int first_row;   // unpadded row where the block begins
  int rows;        // rows of the group in this block: 1..128, the rest is padding
};

// How many padded 128-row blocks groups first..last-1 have. Kept to 2^25, so that sums over a warp
// cannot overflow whatever group_ends holds.
__device__ __forceinline__ int count_group_blocks(const int* group_ends, int first, int last,
                                                  int rows) {
  if (first >= last) return 0;
  int sum = 0;
  int begin = group_begin(group_ends, first, rows);
#pragma unroll 4
  for (int g = first; g < last; ++g) {
    int end = group_end(group_ends, g, rows);
    sum = min(sum + group_blocks(begin, end), 1 << 25);
    begin = end;
  }
  return sum;
}

// Which group holds block `block` of the padded layout? One whole warp calls this; false when the
// block lies past the last group. Cost: one pass over group_ends and one warp scan.
__device__ __forceinline__ bool find_group_block(const int* group_ends, int num_groups, int rows,
                                                 int block, GroupBlock& found) {
  // Each lane counts an equal share of the groups; the scan then says which lane's share it is in.
  const int lane = threadIdx.x & 31;
  const int share = (num_groups + 31) >> 5;
  const int first = lane * share, last = min(first + share, num_groups);
  const int own = count_group_blocks(group_ends, first, last, rows);
  int through = own;
#pragma unroll
  for (int d = 1; d < 32; d <<= 1) {
    int other = __shfl_up_sync(0xFFFFFFFFu, through, d);
    if (lane >= d) through += other;
  }
  const int before = through - own;
  const u32 holders = __ballot_sync(0xFFFFFFFFu, block >= before && block < through);
  if (holders == 0) return false;
  const int source = __ffs(holders) - 1;
  found = {0, 0, 0, 0};
  if (lane == source) {
    int position = before;
    int begin = group_begin(group_ends, first, rows);
    for (int g = first; g < last; ++g) {
      int end = group_end(group_ends, g, rows);
      int next = position + group_blocks(begin, end);
      if (block < next) {
        found.group = g;
        found.block = block - position;
        found.first_row = begin + found.block * 128;
        found.rows = min(128, end - found.first_row);
        break;
      }
      position = next;
      begin = end;
    }
  }
  found.group = __shfl_sync(0xFFFFFFFFu, found.group, source);
  found.block = __shfl_sync(0xFFFFFFFFu, found.block, source);
  found.first_row = __shfl_sync(0xFFFFFFFFu, found.first_row, source);
  found.rows = __shfl_sync(0xFFFFFFFFu, found.rows, source);
  return true;
}

// Reports the first bad group end. One whole warp of one CTA calls this.
__device__ __forceinline__ void check_group_ends(const int* group_ends, int num_groups, int rows,
                                                 int* status) {
  int lane = threadIdx.x & 31;
  for (int base = 0; base < num_groups; base += 32) {
    int g = base + lane;
    bool inside = g < num_groups;
    int end = inside ? __ldg(group_ends + g) : 0;
    int begin = inside && g > 0 ? __ldg(group_ends + g - 1) : 0;
    bool bad = inside && (end < begin || end > rows);
    u32 voters = __ballot_sync(0xFFFFFFFFu, bad);
    if (voters == 0) continue;
    if (lane == __ffs(voters) - 1) {
      if (end < begin) report(status, kGroupEndsDecrease, g, end, begin);
      else report(status, kGroupEndsExceedRows, g, end, rows);
    }
    return;
  }
}
