// Slab: the part of a tensor that a team works on at once. Rows: all of one statistic. Columns: a strip of neighbouring
// columns, 128 bytes wide or less, each with a statistic of its own. Both are `runs` of memory a `stride` apart:
//
//       ┌────┐ ◀─ length ─▶          rows      a run is `inner` elements, all of one channel
//       │////│                       columns   a run is a strip of one row of the matrix
//       │////│ ◀─ stride to the next run
//       └────┘ ◀─ pitch to the neighbouring slab
//
// Packs are taken in that order, run after run; `at` says where one lies and which of its elements are the slab's.
//
// Rows of the matrix that are no whole number of packs (3 channels) are taken `repeat` at a time, as one row that is:
// the matrix is contiguous. Copies of a column then have sums of their own, which are merged with those of the team.
// Runs of rows may begin anywhere (49 elements): their packs are the aligned 16 bytes of memory that the run touches.
//
// An H200's memory moves 18 bytes for each clock of each SM: a warp's pack in 28 clocks, in which the SM's schedulers
// issue 110 instructions at most, of all sweeps together. So packs that every thread has whole are told from the others
// once for a batch (`whole`), and take no tests of their own.
#pragma once

#include "core/fold.h"
#include "cuda/pack.h"
#include "cuda/plan.h"

namespace fusednorm::cuda {

// Division without a division.
struct Divisor {
  uint32_t by = 1, factor = 0, shift = 0;  // factor = ⌈2^(32 + shift)/by⌉; 0 for by = 1
  uint64_t reciprocal = 0;                 // ⌈2⁶⁴/by⌉

  Divisor() = default;
  explicit Divisor(int64_t d) : by(uint32_t(d)) {
    while (int64_t(2) << shift < d) ++shift;
    if (d > 1) factor = uint32_t(((uint64_t(1) << (32 + shift)) + by - 1) / by), reciprocal = ~uint64_t(0) / by + 1;
  }
  // Of a number below 2³¹.
  FN_INLINE uint32_t divide(uint32_t n) const { return factor ? uint32_t(uint64_t(n) * factor >> 32) >> shift : n; }
  // Of any, as long as the number times `by` is below 2⁶⁴.
  FN_INLINE int64_t divide(int64_t n) const {
    return factor ? int64_t(static_cast<unsigned __int128>(reciprocal) * uint64_t(n) >> 64) : n;
  }
};

struct Layout {
  int32_t slabs = 0;             // of the tensor
  Divisor per_entry;             // of a batch entry
  int64_t entry = 0, pitch = 0;  // elements from a batch entry to the next, from a slab to the next
  int64_t runs = 0, stride = 0, length = 0;
  Divisor packs;                // of a run
  int64_t row = 0, groups = 0;  // elements of a row as it is taken (repeat·groups); the fold's groups
  int columns = 1, repeat = 1;  // columns: at least as many as a strip has, a power of two
  int anchor = 0;               // elements from the 16 bytes' border to x
  bool vector = false;          // packs are aligned in all tensors

  FN_INLINE bool together() const { return repeat > 1 && per_entry.by > 1; }
};

// `alike`: all tensors lie `anchor` elements behind a border. `most`: slabs that can be in flight.
template <class T>
Layout row_layout(const Fold& f, int anchor, bool alike) {
  constexpr int64_t width = kWidth<T>;
  Layout l;
  l.slabs = int32_t(f.statistics());
  l.per_entry = Divisor(f.groups);
  l.entry = f.outer * f.groups * f.inner;
  l.pitch = l.length = f.inner;
  l.runs = f.size() > 0 ? f.outer : 0;
  l.stride = f.groups * f.inner;
  const bool whole = anchor == 0 && f.inner % width == 0;
  l.packs = Divisor(f.inner == 0 ? 1 : whole ? f.inner / width : (f.inner + 2 * width - 2) / width);
  l.groups = f.groups;
  l.anchor = anchor;
  l.vector = alike;
  return l;
}

template <class T>
Layout column_layout(const Fold& f, bool aligned, bool masked, int64_t most) {
  constexpr int64_t width = kWidth<T>, widest = 8;  // packs
  Layout l;
  // Only rows of the tensor can be masked.
  while (aligned && !masked && l.repeat < width && f.groups * l.repeat % width != 0) l.repeat *= 2;
  const auto strips = [&] { return (f.groups * l.repeat + widest * width - 1) / (widest * width); };
  if (f.outer % l.repeat != 0 || (strips() > 1 && f.batch * strips() > most)) l.repeat = 1;
  l.row = f.groups * l.repeat;
  l.per_entry = Divisor(strips());
  l.slabs = int32_t(f.batch * strips());
  l.entry = f.outer * f.groups;
  const int64_t packs = (l.row + width - 1) / width, each = packs > 0 ? (packs + strips() - 1) / strips() : 1;
  int64_t walked = 1;
  while (walked < each) walked *= 2;
  l.pitch = each * width;
  l.runs = f.size() > 0 ? f.outer / l.repeat : 0;
  l.stride = l.row;
  l.packs = Divisor(walked);
  l.groups = f.groups;
  l.columns = int(walked * width);
  l.vector = aligned && l.row % width == 0;
  return l;
}

// What a block does of a slab, as one of its threads sees it.
template <class T, bool kColumns>
struct Slab {
  static constexpr uint32_t width = kWidth<T>;
  struct At {
    int64_t bytes;   // from `first` to the pack
    uint32_t there;  // a bit for each of its elements that is the slab's

    template <class U>
    FN_DEVICE U* in(U* tensor) const {
      using Byte = std::conditional_t<std::is_const_v<U>, const char, char>;
      return reinterpret_cast<U*>(reinterpret_cast<Byte*>(tensor) + bytes);
    }
  };

  const Layout& layout;
  int64_t first;        // element: that the block's first run begins at; columns: of the thread's first pack
  int64_t skip;         // rows: packs between a run and the next; columns: bytes from a step to the next
  uint32_t full, rest;  // rows: packs and elements of a run that begins at a border
  uint32_t there;       // columns: At::there of each of the thread's packs
  uint32_t begin, end;  // packs from the first run's beginning on: the thread's first, the block's last
  int steps;            // packs of a thread, at most
  int whole;            // of which so many, from the first on, are all there and aligned, for every thread

  FN_DEVICE Slab(const Layout& l, const Plan& plan, int number, int rank) : layout(l) {
    const int slab = int(anew(uint32_t(number)));
    const int64_t entry = l.per_entry.divide(uint32_t(slab)), s = slab - entry * l.per_entry.by;
    const int64_t from = plan.share * rank, own = l.packs.divide(from);
    const int64_t all = l.runs * l.packs.by - from, left = all < plan.share ? all : plan.share;
    const int64_t length = kColumns && l.row - s * l.pitch < l.pitch ? l.row - s * l.pitch : l.pitch;
    first = entry * l.entry + s * l.pitch + own * l.stride;
    full = uint32_t(length / width);
    rest = uint32_t(length % width);
    begin = uint32_t(from - own * l.packs.by) + thread();
    end = left > 0 ? begin - thread() + uint32_t(left) : 0;
    steps = left > 0 ? int((uint32_t(left) + blockDim.x - 1) / blockDim.x) : 0;
    whole = left > 0 && l.vector && full == l.packs.by ? int(uint32_t(left) / blockDim.x) : 0;
    skip = l.stride / width - l.packs.by;
    if (kColumns) {
      // Shares and blocks are whole rows of the strip: a thread stays in its columns.
      const uint32_t row = l.packs.divide(begin), k = begin - row * l.packs.by;
      there = elements(k, rest);
      first += int64_t(row) * l.stride + k * width;
      skip = int64_t(l.packs.divide(blockDim.x)) * l.stride * int64_t(sizeof(T));
    }
  }

  // The thread's i-th pack. kAll: it is one of the first `whole`.
  template <bool kAll = false>
  FN_DEVICE At at(int i) const {
    const uint32_t index = begin + uint32_t(i) * blockDim.x;
    if (kColumns) return {i * skip, kAll ? kWhole<T> : index < end ? there : 0};
    const uint32_t r = layout.packs.divide(index);
    if (kAll) return {(index + r * skip) * kPackBytes, kWhole<T>};
    const uint32_t k = index - r * layout.packs.by;
    const int64_t here = int64_t(r) * layout.stride;
    const uint32_t shift = uint32_t(first + here + layout.anchor) % width;
    uint32_t bits = elements(k, rest + shift);
    if (k == 0) bits &= ~0u << shift;
    return {(here + int64_t(k) * width - shift) * int64_t(sizeof(T)), index < end ? bits : 0};
  }

  // Those of the thread's i-th pack whose position the mask counts. `run`: the block's first, counted over the tensor.
  FN_DEVICE uint32_t counted(const uint8_t* mask, int64_t run, int i, const At& a) const {
    const uint32_t r = layout.packs.divide(begin + uint32_t(i) * blockDim.x);
    if (a.there == 0) return 0;
    if (kColumns) return mask[run + r] ? a.there : 0;
    const int64_t position = (run + r) * layout.length + (a.bytes / int64_t(sizeof(T)) - int64_t(r) * layout.stride);
    uint32_t bits = 0;
#pragma unroll
    for (uint32_t j = 0; j < width; ++j)
      if ((a.there >> j & 1) && mask[position + j]) bits |= 1u << j;
    return bits;
  }
  FN_DEVICE static int64_t first_run(const Layout& l, const Plan& plan, int slab, int rank) {
    return l.per_entry.divide(uint32_t(slab)) * l.runs + l.packs.divide(plan.share * rank);
  }

 private:
  // Bits of pack k of a run of `full` packs and `over` elements.
  FN_DEVICE uint32_t elements(uint32_t k, uint32_t over) const {
    const int packs = k < full ? 1 : -int(k - full), n = packs * int(width) + int(over);
    return ~(~0u << (n < 0 ? 0 : n > int(width) ? int(width) : n));
  }
};

}  // namespace fusednorm::cuda
