// Lines: each run of `inner` elements has one statistic, and each of its elements a channel of its own (layer norm, RMS
// norm); or each `span` neighbouring ones (group norm).
//
// A line lies in the registers of the threads that share it from when it is read until it is written: some lanes of a
// warp, which then take several lines at once, the warps of a block, or a cluster's. A thread meets the same channels in
// every line. So their weights wait in shared memory, and their gradients are sums in registers: float32 over kChunk
// steps, then added up in the block and written to scratch memory, once for each team; another kernel adds the teams'.
//
// Lines that are too long for a cluster are cut among blocks that do not meet (Team::launches): their sums go to scratch
// memory, and what must wait for them is another launch, for which the statistics are given.
#pragma once

#include "cuda/passes.h"

namespace fusednorm::cuda {

// Packs that a thread has of a line. Backward has two tensors of them, and two sums for each element.
template <class T, class Pass>
constexpr int kLinePacks = std::is_same_v<Pass, BackwardPass> && sizeof(T) != 4 ? 2 : 4;
// Or short lines, of a pack each.
template <class T, class Pass>
constexpr int kLinesAtOnce = sizeof(T) == 8 ? 2 : kLinePacks<T, Pass>;

struct LineJob {
  LinePlan plan;
  bool vector;       // packs are aligned; else neighbouring lanes take neighbouring elements
  void* sums;        // out Sums [S][size], where a team's blocks do not meet; else null
  Divisor span;      // elements that share a channel
  double inverse_n;  // 1 / elements of a line
  Array columns;     // out [blocks][2][slots]: Σdy, Σdy·x̂ over a team's lines, of the channels that a block has part of
};

template <class T, class Pass>
LinePlan plan_of_lines(const Pass& pass, const Device& device) {
  constexpr int width = kWidth<T>;
  const Fold& f = pass.fold;
  return plan_lines({.lines = f.batch,
                     .groups = f.groups,
                     .packs = (f.inner + width - 1) / width,
                     .span = f.span > 0 ? f.span : 1,
                     .each = kLinePacks<T, Pass>,
                     .at_once = kLinesAtOnce<T, Pass>,
                     .merges = pass.takes_line_sums(),
                     .across = pass.takes_columns(),
                     .parameters = pass.line_parameters(),
                     .width = width,
                     .real = sizeof(Real<T>)},
                    device);
}

// Numbers about a pivot: s = Σ(x − pivot), q = Σ(x − pivot)². Backward: Σw·dy and Σw·dy·x̂, about 0.
template <class R>
struct LineSums {
  R pivot, s, q;
};
struct LinePart {
  LineSums<double> sums;
  double n;
};

// Adds over `lanes` neighbouring lanes of a warp, a power of two; all get the sum.
template <class V>
FN_DEVICE V sum_near(V v, uint32_t lanes) {
  for (uint32_t o = lanes / 2; o > 0; o /= 2) v += __shfl_xor_sync(kAllLanes, v, int(o));
  return v;
}

// Where a thread is, and its block's shared memory:
//
//     parameters [1 or 2][room] │ parts [2][warps], [2] │ columns [stacks][2][room]
//
// `room` elements are what the threads that share a line can hold of it. Lane l of them has pack l, l + sharers, …; where
// packs are not aligned, elements l, l + sharers, … instead.
template <class T, int kRows, int kPacks>
class Sharer {
 public:
  using R = Real<T>;
  static constexpr int width = kWidth<T>, some = kSome<T>, parts = width / some;
  static constexpr bool kSeveral = kRows > 1;
  using Own = LineSums<R>;                                          // of a warp
  using All = std::conditional_t<kSeveral, Own, LineSums<double>>;  // of all that share the line

  const LineJob& job;
  const Fold& fold;
  int lane, own;    // among those that share a line in this block; of the block's lines at once
  int team, group;  // of the group's teams
  int rank;         // of the block in its team
  R n;              // elements of the line that the warp has

  FN_DEVICE Sharer(const LineJob& j, const Fold& f, unsigned char* shared) : job(j), fold(f), shared_(shared) {
    const LinePlan& p = job.plan;
    lane = int(thread()) % p.sharers;
    own = int(thread()) / p.sharers;
    const int block = int(blockIdx.x), number = block / p.size, all = int(fold.groups);
    rank = block - number * p.size;
    team = number / all;
    group = number - team * all;
    const int64_t left = fold.inner - begin();
    limit_ = int(left < 0 ? 0 : left < p.each ? left : p.each);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (element(k, i, lane) < limit_) bits_ |= 1u << (k * width + i);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) whole_ += __all_sync(kAllLanes, whole_ == k && there(k) == kWhole<T>);
    n = sum_near(R(__popc(bits_)), near());
  }

  // Neighbouring lanes of a warp that share a line.
  FN_DEVICE uint32_t near() const { return kSeveral ? uint32_t(job.plan.sharers) : kWarp; }
  FN_DEVICE int64_t batch_entry(int64_t step, int row) const { return (step * kRows + row) * job.plan.lines + own; }
  FN_DEVICE bool is_line(int64_t entry) const { return entry < fold.batch; }
  FN_DEVICE int64_t statistic(int64_t entry) const { return entry * fold.groups + group; }
  // Of elements of a line, the block's.
  FN_DEVICE double number() const { return limit_; }
  // No register is spent on what only clusters must divide for.
  FN_DEVICE double inverse_number() const {
    if (job.plan.size == 1) return job.inverse_n;
    return limit_ > 0 ? 1 / double(limit_) : 0;
  }
  // Who writes down what is known of a line.
  FN_DEVICE bool speaks() const { return lane == 0 && rank == 0; }

  FN_DEVICE void load(const Array& tensor, int64_t entry, uint4 (&v)[kPacks]) const {
    const T* line = anew(tensor.as<const T>()) + (statistic(entry) * fold.inner + begin());
    const uint32_t bits = is_line(entry) ? bits_ : 0;
    if (job.vector) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k) {
        v[k] = {};
        if (bits >> (k * width) & 1) v[k] = __ldcs(reinterpret_cast<const uint4*>(line + element<true>(k, 0, lane)));
      }
      return;
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      apart();
      T one[width];
#pragma unroll
      for (int i = 0; i < width; ++i) one[i] = bits >> (k * width + i) & 1 ? line[element<false>(k, i, lane)] : T{};
      v[k] = bit_cast<uint4>(one);
    }
  }
  FN_DEVICE void store(const Array& tensor, int64_t entry, const uint4 (&v)[kPacks]) const {
    T* line = anew(tensor.as<T>()) + (statistic(entry) * fold.inner + begin());
    const uint32_t bits = is_line(entry) ? bits_ : 0;
    if (job.vector) {
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
        if (bits >> (k * width) & 1) __stcs(reinterpret_cast<uint4*>(line + element<true>(k, 0, lane)), v[k]);
      return;
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      T one[width];
      std::memcpy(one, &v[k], sizeof one);
#pragma unroll
      for (int i = 0; i < width; ++i)
        if (bits >> (k * width + i) & 1) line[element<false>(k, i, lane)] = one[i];
    }
  }

  // Calls body(k, kAll) for the packs that the warp has something of. kAll: every lane has all of it.
  template <class Body>
  FN_DEVICE void each_pack(Body&& body) const {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      if (k < whole_)
        body(k, std::true_type{});
      else if (__any_sync(kAllLanes, there(k) != 0))
        body(k, std::false_type{});
    }
  }
  // Of pack k.
  FN_DEVICE uint32_t there(int k) const { return bits_ >> (k * width) & kWhole<T>; }

  // One number for each channel of the block, and those of a part of a pack.
  FN_DEVICE void take_parameters(int which, const Array& from) const {
    switch (from.dtype) {
      case DType::f32: return take_parameters(which, from.as<const float>());
      case DType::f64: return take_parameters(which, from.as<const double>());
      case DType::f16: return take_parameters(which, from.as<const f16>());
      case DType::bf16: return take_parameters(which, from.as<const bf16>());
    }
  }
  FN_DEVICE void parameters(int which, int k, int part, R (&v)[some]) const {
    take_some(parameters(which) + place(k, part), v);
  }

  // x̂ of a part of pack k; 0 where nothing is there.
  template <bool kAll>
  FN_DEVICE void normalized(const uint4& x, int k, int part, const Affine<R>& a, R (&to)[some]) const {
    take(x, part, to, T{});
#pragma unroll
    for (int i = 0; i < some; ++i) {
      to[i] = fused(to[i] - a.hi, a.scale, a.shift);
      if (!kAll && !(there(k) >> (part * some + i) & 1)) to[i] = 0;
    }
  }

  // Of what its warps have of a line; all threads that share it call this, and get the same.
  template <bool kMoments>
  FN_DEVICE All meet(const Own& own_sums, bool center) {
    if constexpr (kSeveral) {
      return own_sums;
    } else {
      const int warps = job.plan.sharers / int(kWarp), l = int(thread() % kWarp);
      LinePart p{{double(own_sums.pivot), double(own_sums.s), double(own_sums.q)}, kMoments ? double(n) : 0};
      if (warps > 1) {
        LinePart* const all = line_parts() + parity_ * int(blockDim.x / kWarp);
        if (l == 0) all[thread() / kWarp] = p;
        __syncthreads();
        p = unite<kMoments>(l < warps ? all[own * warps + l] : LinePart{}, center, inverse_number(), kWarp);
      } else if (kMoments) {
        p = unite<kMoments>(p, center, inverse_number(), 1);
      }
      if (job.plan.team == Team::cluster) {
        LinePart* const mine = line_parts() + 2 * int(blockDim.x / kWarp) + parity_;
        if (thread() == 0) *mine = p;
        sync_cluster();
        p = unite<kMoments>(l < job.plan.size ? *map(mine, l) : LinePart{}, center, 1 / double(fold.inner), kWarp);
      }
      parity_ ^= 1;  // what others still read is not written before they have been at the next barrier
      return p.sums;
    }
  }
  // About its own mean, if there is to be one.
  FN_DEVICE LineSums<double> settled(const All& p, bool center) const {
    if constexpr (!kSeveral) return p;
    return unite<true>({{double(p.pivot), double(p.s), double(p.q)}, double(n)}, center, inverse_number(), 1).sums;
  }
  // Before a block of a cluster ends: others may still read its parts.
  FN_DEVICE void end() const {
    if (job.plan.team == Team::cluster) sync_cluster();
  }

  // The threads' sums down the columns into scratch memory, in place of what is there or (not `first`) onto it.
  FN_DEVICE void add_columns(const R (&u)[kPacks][width], const R (&ux)[kPacks][width], bool first) const {
    const int room = job.plan.room, stack = kSeveral ? int(thread() / kWarp) : own,
              stacks = kSeveral ? int(blockDim.x / kWarp) : job.plan.lines;
    R* const columns = reinterpret_cast<R*>(shared_ + job.plan.columns_at);
#pragma unroll
    for (int k = 0; k < kPacks; ++k)
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const R s = kSeveral ? sum_lanes(u[k][i], near()) : u[k][i],
                q = kSeveral ? sum_lanes(ux[k][i], near()) : ux[k][i];
        if (kSeveral && thread() % kWarp >= near()) continue;
        columns[2 * stack * room + place(k, i / some) + i % some] = s;
        columns[(2 * stack + 1) * room + place(k, i / some) + i % some] = q;
      }
    __syncthreads();
    const auto add = [&](int which, int slot, double sum) {
      const int64_t to = (int64_t(blockIdx.x) * 2 + which) * job.plan.slots + slot;
      job.columns.set(to, first ? sum : job.columns.get(to) + sum);
    };
    const auto stacked = [&](int which, int at) {
      double sum = 0;
      for (int s = 0; s < stacks; ++s) sum += double(columns[(2 * s + which) * room + at]);
      return sum;
    };
    if (job.span.by == 1) {
      for (int i = int(thread()); i < 2 * room; i += int(blockDim.x)) {
        const int which = i >= room, at = i - which * room, column = channel(at);
        if (column < limit_) add(which, column, stacked(which, at));
      }
    } else {  // a warp for each channel
      const int64_t span = job.span.by, before = job.span.divide(begin());
      const int channels = limit_ > 0 ? int(job.span.divide(begin() + limit_ - 1) - before) + 1 : 0;
      for (int i = int(thread() / kWarp); i < 2 * channels; i += int(blockDim.x / kWarp)) {
        const int which = i >= channels, slot = i - which * channels;
        const int64_t at = (before + slot) * span - begin();
        const int end = int(at + span < limit_ ? at + span : limit_);
        double sum = 0;
        for (int c = int(at > 0 ? at : 0) + int(thread() % kWarp); c < end; c += int(kWarp))
          sum += stacked(which, place_of(c));
        sum = sum_near(sum, kWarp);
        if (thread() % kWarp == 0) add(which, slot, sum);
      }
    }
    __syncthreads();
  }

 private:
  // The block's first element of a line.
  FN_DEVICE int64_t begin() const { return job.plan.each * rank; }
  // Of the block's part of a line.
  template <bool kVector>
  FN_DEVICE int element(int k, int i, int of) const {
    return kVector ? (k * job.plan.sharers + of) * width + i : (k * width + i) * job.plan.sharers + of;
  }
  FN_DEVICE int element(int k, int i, int of) const {
    return job.vector ? element<true>(k, i, of) : element<false>(k, i, of);
  }
  // Where the numbers for a part of a pack are, of all that the block has, and back.
  FN_DEVICE int place(int k, int part) const { return ((k * parts + part) * job.plan.sharers + lane) * some; }
  FN_DEVICE int channel(int place) const {
    const int i = place % some, rest = place / some, part = rest / job.plan.sharers;
    return element(part / parts, part % parts * some + i, rest - part * job.plan.sharers);
  }
  FN_DEVICE int place_of(int column) const {
    const int unit = job.vector ? column / width : column, rest = unit / job.plan.sharers,
              of = unit - rest * job.plan.sharers, k = job.vector ? rest : rest / width,
              i = job.vector ? column % width : rest % width;
    return ((k * parts + i / some) * job.plan.sharers + of) * some + i % some;
  }
  FN_DEVICE R* parameters(int which) const { return reinterpret_cast<R*>(shared_) + which * job.plan.room; }
  FN_DEVICE LinePart* line_parts() const { return reinterpret_cast<LinePart*>(shared_ + job.plan.parts_at); }
  // No array: 1 of the first kind, weights, and 0 of the second.
  template <class P>
  FN_DEVICE void take_parameters(int which, const P* from) const {
    R* const to = parameters(which);
    const int64_t span = job.span.by;
    for (int i = int(thread()) * some; i < job.plan.room; i += int(blockDim.x) * some) {
      const int first = channel(i), away = job.vector ? 1 : job.plan.sharers;
      int64_t c = 0, end = 0;  // of the channel
#pragma unroll
      for (int j = 0; j < some; ++j) {
        const int column = first + j * away;
        const int64_t element = group * fold.inner + begin() + column;
        if (element >= end) c = job.span.divide(element), end = (c + 1) * span;
        to[i + j] = !from || column >= limit_ ? R(which == 0) : R(to_real(from[c]));
      }
    }
  }

  // Of `lanes` lanes, 1/inverse numbers.
  template <bool kMoments>
  FN_DEVICE LinePart unite(const LinePart& p, bool center, double inverse, uint32_t lanes) const {
    if (!kMoments) return {{0, sum_near(p.sums.s, lanes), sum_near(p.sums.q, lanes)}, 0};
    const double s = sum_near(p.n * p.sums.pivot + p.sums.s, lanes), mean = center ? s * inverse : 0;
    const double d = p.sums.pivot - mean;
    return {{mean, center ? 0 : s, sum_near(p.sums.q + d * (2 * p.sums.s + p.n * d), lanes)}, double(limit_)};
  }

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  FN_DEVICE static void sync_cluster() { cooperative_groups::this_cluster().sync(); }
  FN_DEVICE static LinePart* map(LinePart* mine, int block) {
    return cooperative_groups::this_cluster().map_shared_rank(mine, uint32_t(block));
  }
#else
  FN_DEVICE static void sync_cluster() {}
  FN_DEVICE static LinePart* map(LinePart* mine, int) { return mine; }
#endif

  unsigned char* const shared_;
  int limit_;          // elements of a line that the block has
  uint32_t bits_ = 0;  // element i of pack k, is it there: bit k·width + i
  int whole_ = 0;      // packs that every lane of the warp has all of
  int parity_ = 0;
};

// A line's moments, at this scale.
template <class T, int kRows, int kPacks>
FN_DEVICE auto line_moments(Sharer<T, kRows, kPacks>& me, const uint4 (&v)[kPacks], Real<T> scale, bool center) {
  using R = Real<T>;
  constexpr int some = kSome<T>, parts = kWidth<T> / some;
  const R share = center && me.n > 0 ? scale * quotient(R(1), me.n) : R(0);
  R sum[some] = {}, s[some] = {}, q[some] = {};
  me.each_pack([&](int k, auto) {  // what is not there is 0
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      R value[some];
      take(v[k], part, value, T{});
#pragma unroll
      for (int i = 0; i < some; ++i) sum[i] = fused(value[i], share, sum[i]);
    }
  });
  const uint32_t lanes = me.near();
  const R pivot = sum_near(sum_of(sum), lanes);
  me.each_pack([&](int k, auto all) {
    constexpr bool kAll = decltype(all)::value;
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      R value[some];
      take(v[k], part, value, T{});
#pragma unroll
      for (int i = 0; i < some; ++i) {
        R d = fused(value[i], scale, -pivot);
        if (!kAll && !(me.there(k) >> (part * some + i) & 1)) d = 0;
        s[i] += d;
        q[i] = fused(d, d, q[i]);
      }
    }
  });
  return me.template meet<true>({pivot, sum_near(sum_of(s), lanes), sum_near(sum_of(q), lanes)}, center);
}

template <class T, int kRows, int kPacks>
__global__ void __launch_bounds__(ForwardPass::kLineThreads, 1)
    forward_lines(const __grid_constant__ ForwardPass pass, const __grid_constant__ LineJob job) {
  using R = Real<T>;
  using Total = Sums<R>;
  constexpr int some = kSome<T>, parts = kWidth<T> / some;
  FN_SHARED(unsigned char, shared);
  Sharer<T, kRows, kPacks> me(job, pass.fold, shared);
  if (pass.y) {
    me.take_parameters(0, pass.weight);
    me.take_parameters(1, pass.bias);
    __syncthreads();
  }
  for (int64_t step = me.team; step < job.plan.steps; step += job.plan.teams) {
    uint4 v[kRows][kPacks];
    typename Sharer<T, kRows, kPacks>::All found[kRows];
    R scale[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      me.load(pass.x, me.batch_entry(step, r), v[r]);
      scale[r] = 1;
    }
    if (pass.takes_statistics()) {
      bool fine = true;
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        found[r] = line_moments(me, v[r], R(1), pass.center);
        fine = fine && in_range<R>(found[r].s, found[r].q);
      }
      // Lines that are shared among warps are one a block: all of it, or of its cluster, finds the same.
      if (me.kSeveral ? !__all_sync(kAllLanes, fine) : !fine) {
#pragma unroll 1
        for (int attempt = 1; attempt < 3; ++attempt)
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            const bool again = !in_range<R>(found[r].s, found[r].q);
            if (!me.kSeveral && !again) break;
            const auto other = line_moments(me, v[r], scale_of<R>(attempt), pass.center);
            if (again) found[r] = other, scale[r] = scale_of<R>(attempt);
          }
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t entry = me.batch_entry(step, r), s = me.statistic(entry);
      const bool there = me.is_line(entry), writes = there && me.speaks();
      double mean = 0, rstd = 0;
      if (pass.takes_statistics()) {
        const LineSums<double> p = me.settled(found[r], pass.center);
        const double unit = inverse(double(scale[r])), squared = unit * unit;
        if (job.sums) {
          if (there && me.lane == 0)
            static_cast<Total*>(job.sums)[s * job.plan.size + me.rank] =
                Total::kScaled ? Total{me.number(), p.pivot * unit, p.s, p.q, double(scale[r])}
                               : Total{me.number(), p.pivot * unit, p.s * unit, p.q * squared, 1};
          continue;
        }
        const double variance = p.q > 0 ? p.q * job.inverse_n : 0;
        mean = p.pivot * unit;
        rstd = Total::kScaled
                   ? double(scale[r]) * inverse_root(variance + pass.eps * double(scale[r]) * double(scale[r]))
                   : inverse_root(variance * squared + pass.eps);
        if (writes && pass.count) pass.count[s] = double(pass.fold.inner);
        if (writes && pass.m2) pass.m2[s] = (p.q < 0 ? 0 : p.q) * squared;
      } else if (there) {
        mean = pass.given_mean ? pass.given_mean[s] : 0;
        rstd = pass.given_rstd[s];
      }
      if (writes && pass.mean) pass.mean[s] = mean;
      if (writes && pass.rstd) pass.rstd[s] = rstd;
      if (!pass.y) continue;
      const Affine<R> a = affine<R>(mean, rstd, 1, 0);
      me.each_pack([&](int k, auto) {
#pragma unroll
        for (int p = 0; p < parts; ++p) {
          R value[some], weight[some], bias[some];
          take(v[r][k], p, value, T{});
          me.parameters(0, k, p, weight);
          me.parameters(1, k, p, bias);
#pragma unroll
          for (int i = 0; i < some; ++i) value[i] = fused(fused(value[i] - a.hi, a.scale, a.shift), weight[i], bias[i]);
          put(v[r][k], p, value, T{});
        }
      });
      me.store(pass.y, entry, v[r]);
    }
  }
  me.end();
}

template <class T, int kRows, int kPacks>
__global__ void __launch_bounds__(BackwardPass::kLineThreads, 1)
    backward_lines(const __grid_constant__ BackwardPass pass, const __grid_constant__ LineJob job) {
  using R = Real<T>;
  constexpr int width = kWidth<T>, some = kSome<T>, parts = width / some;
  FN_SHARED(unsigned char, shared);
  Sharer<T, kRows, kPacks> me(job, pass.fold, shared);
  const double inverse_n = 1.0 / double(pass.fold.inner);
  me.take_parameters(0, pass.weight);
  __syncthreads();
  const bool merges = job.sums || pass.takes_line_sums();

  R u[kPacks][width] = {}, ux[kPacks][width] = {};
  int taken = 0;
  for (int64_t step = me.team; step < job.plan.steps; step += job.plan.teams) {
    uint4 v[kRows][kPacks], g[kRows][kPacks];
    Affine<R> a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t entry = me.batch_entry(step, r);
      me.load(pass.x, entry, v[r]);
      me.load(pass.dy, entry, g[r]);
      const bool there = me.is_line(entry);
      a[r] = affine<R>(there && pass.mean ? pass.mean[me.statistic(entry)] : 0,
                       there ? pass.rstd[me.statistic(entry)] : 1, 1, 0);
    }

    typename Sharer<T, kRows, kPacks>::All sums[kRows] = {};
    if (merges || pass.takes_columns()) {
      R s[kRows] = {}, q[kRows] = {};
      me.each_pack([&](int k, auto all) {
        constexpr bool kAll = decltype(all)::value;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          R weight[some], down[some] = {}, down_x[some] = {};
          me.parameters(0, k, part, weight);
#pragma unroll
          for (int r = 0; r < kRows; ++r) {
            R z[some], own[some];
            me.template normalized<kAll>(v[r][k], k, part, a[r], z);
            take(g[r][k], part, own, T{});
#pragma unroll
            for (int i = 0; i < some; ++i) {
              const R weighted = weight[i] * own[i];
              s[r] += weighted;
              q[r] = fused(weighted, z[i], q[r]);
              down[i] += own[i];
              down_x[i] = fused(own[i], z[i], down_x[i]);
            }
          }
#pragma unroll
          for (int i = 0; i < some; ++i) {
            u[k][part * some + i] += down[i];
            ux[k][part * some + i] += down_x[i];
          }
        }
      });
      if (merges) {
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          sums[r] = me.template meet<false>({0, sum_near(s[r], me.near()), sum_near(q[r], me.near())}, false);
      }
    }

#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t entry = me.batch_entry(step, r), s = me.statistic(entry);
      const bool there = me.is_line(entry);
      if (job.sums && there && me.lane == 0)
        static_cast<Sums<R>*>(job.sums)[s * job.plan.size + me.rank] = {0, 0, double(sums[r].s), double(sums[r].q), 1};
      if (!job.sums && there && me.speaks()) {
        if (pass.s1) pass.s1[s] = sums[r].s;
        if (pass.s2) pass.s2[s] = sums[r].q;
      }
      if (!pass.dx) continue;
      double cx = there && pass.cx ? pass.cx[s] : 0, c0 = there && pass.c0 ? pass.c0[s] : 0;
      if (!pass.known()) {
        cx = -double(sums[r].q) * inverse_n;
        c0 = pass.mean ? -double(sums[r].s) * inverse_n : 0;
      }
      const R slope = coefficient<R>(double(a[r].scale) * cx), shift = R(double(a[r].scale) * c0);
      me.each_pack([&](int k, auto all) {
        constexpr bool kAll = decltype(all)::value;
#pragma unroll
        for (int part = 0; part < parts; ++part) {
          R weight[some], z[some], own[some];
          me.parameters(0, k, part, weight);
          me.template normalized<kAll>(v[r][k], k, part, a[r], z);
          take(g[r][k], part, own, T{});
#pragma unroll
          for (int i = 0; i < some; ++i) z[i] = fused(a[r].scale, weight[i] * own[i], fused(slope, z[i], shift));
          put(v[r][k], part, z, T{});
        }
      });
      me.store(pass.dx, entry, v[r]);
    }
    if (pass.takes_columns() && ++taken % kChunk == 0) {
      me.add_columns(u, ux, taken == kChunk);
#pragma unroll
      for (int k = 0; k < kPacks; ++k)
#pragma unroll
        for (int i = 0; i < width; ++i) u[k][i] = ux[k][i] = 0;
    }
  }
  if (taken % kChunk != 0) me.add_columns(u, ux, taken < kChunk);
  me.end();
}

}  // namespace fusednorm::cuda
