// Backward: Σu and Σu·z with u = dy·act'(pre), z = (x − hi)·rstd, then dx = scale·u + slope·z + shift, for a slab at a
// time. The first sweep sums and keeps x and u in shared memory, the second writes. Coefficients that do not wait for
// the sums let the first one write.
#pragma once

#include "cuda/passes.h"

namespace fusednorm::cuda {

template <class T, bool kGeneral>
constexpr int kBackwardBatch = kGeneral || sizeof(T) == 2 ? 2 : 3;  // packs of each tensor that a thread loads at once

// Rows of Member::coefficients.
enum GradRow { kHi, kRstd, kPreScale, kPreShift, kScale, kSlope, kShift };

// What the owner of a column finds out about it, and writes down; its coefficients follow from that. Before the sums
// are known, those that the sums need.
template <class T, bool kColumns>
FN_DEVICE void settle(const BackwardPass& pass, const Member<T, kColumns>& me, const Column& column, bool summed,
                      const Sums<Real<T>>& sums) {
  using R = Real<T>;
  const int64_t s = column.statistic, c = column.channel, shared = pass.share.divide(s);
  const double mean = pass.mean ? pass.mean[shared] : 0, rstd = pass.rstd[shared], w = pass.weight.get_or(c, 1);
  double x_hat = pass.cx ? pass.cx[shared] : 0, one = pass.c0 ? pass.c0[shared] : 0;
  if (summed) {
    const double unit = sums.unit(), lo = mean - double(pivot<R>(mean, rstd));
    const double u = sums.s * unit, ux = GradSums{u, sums.q * unit * unit}.ux(lo, rstd);
    if (me.rank() == 0 && column.first) {
      if (pass.s1) pass.s1[s] = w * u;
      if (pass.s2) pass.s2[s] = w * ux;
      if (pass.u) pass.u[s] = u;
      if (pass.ux) pass.ux[s] = ux;
      if (pass.dweight) pass.dweight.set(c, ux);
      if (pass.dbias) pass.dbias.set(c, u);
    }
    const double n = pass.mask ? sums.n : pass.n;
    if (!pass.known() && n > 0) {
      x_hat = -w * ux / n;
      one = pass.mean ? -w * u / n : 0;
      if (pass.own_cx && me.rank() == 0 && column.first) pass.own_cx[s] = x_hat, pass.own_c0[s] = one;
    }
  }
  const Affine<R> a = affine<R>(mean, rstd, w, pass.bias.get_or(c, 0));
  const GradAffine<R> g = grad_affine<R>(mean, rstd, w, x_hat, one);
  const R all[] = {g.hi, g.rstd, a.scale, a.shift, g.scale, g.slope, g.shift};
  R* to = me.coefficients + thread();
#pragma unroll
  for (int i = 0; i < 7; ++i) to[i * me.job.layout.columns] = all[i];
}

// A sweep that does one thing needs half the registers.
enum class Doing { sums, writes, either };

template <class T, bool kColumns, bool kGeneral, Doing kDoing>
FN_DEVICE void sweep(const BackwardPass& pass, Member<T, kColumns>& me, bool to_sums) {
  using R = Real<T>;
  constexpr int batch = kBackwardBatch<T, kGeneral>, some = kSome<T>, parts = kWidth<T> / some;
  const Slab<T, kColumns> slab(me.job.layout, me.job.plan, me.slab, me.rank());
  [[maybe_unused]] const int64_t run = kGeneral ? slab.first_run(me.job.layout, me.job.plan, me.slab, me.rank()) : 0;
  const T *x = pass.x.template as<const T>() + slab.first, *dy = pass.dy.template as<const T>() + slab.first,
          *residual = pass.epilogue.residual.template as<const T>();
  T *dx = pass.dx.template as<T>(), *dresidual = pass.dresidual.template as<T>();
  const Activation activation = pass.epilogue.activation;
  const bool first = kDoing == Doing::either ? to_sums : kDoing == Doing::sums;
  const bool sums = first && (kDoing == Doing::sums || pass.sums);
  const bool writes = kDoing == Doing::either ? dx && pass.known() == first : kDoing == Doing::writes;
  if (writes) dx += slab.first;
  if (!kGeneral) x = anew(x), dy = anew(dy), dx = anew(dx);
  const bool vector = me.job.layout.vector;
  const bool active = activation != Activation::identity, constant = kGeneral && pass.constant,
             needs_x = sums || active || !constant;
  // u is kept in place of dy, unless it would be rounded.
  const bool exact = sizeof(T) == sizeof(R) || activation <= Activation::relu;
  const int kept = pass.known() ? 0 : me.job.plan.kept, row = me.job.layout.columns;
  const int batches = (slab.steps + batch - 1) / batch, column = me.column();

  Tally<R, Member<T, kColumns>::kOwn> t;
  // kAll: `batch` packs that are all there, and kept all or none.
  const auto take_batch = [&](int i, auto all) {
    constexpr bool kAll = decltype(all)::value;
    constexpr int together = kAll ? batch : 1;  // packs that go the same ways
    uint4 v[batch], g[batch], added[kGeneral ? batch : 1], *const base = me.kept(i, 0, 2);
    uint32_t there[batch], counted[kGeneral ? batch : 1];
    const auto place = [&](int k, int tensor) {
      return kAll ? base + (2 * k + tensor) * int(blockDim.x) : me.kept(i + k, tensor, 2);
    };
    const auto is_kept = [&](int k) { return i + (kAll ? 0 : k) < kept; };
    const auto is_dy = [&](int k) { return first || !exact || !is_kept(k); };  // not u yet
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      const auto at = slab.template at<kAll>(i + k);
      there[k] = at.there;
      if (!first && is_kept(k)) {
        v[k] = *place(k, 0);
        g[k] = *place(k, 1);
      } else {
        v[k] = load(at.in(x), needs_x ? at.there : 0, kAll || vector, !first);
        g[k] = load(at.in(dy), at.there, kAll || vector, !first);
      }
      if constexpr (kGeneral) {
        if (residual && active && is_dy(k))
          added[k] = load(at.in(residual + slab.first), at.there, kAll || vector, !first);
        counted[k] = pass.mask ? slab.counted(pass.mask, run, i + k, at) : kWhole<T>;
      }
      if (kColumns)
        t.n += kGeneral ? (counted[k] & at.there) != 0 : at.there != 0;
      else
        t.n += uint32_t(__popc(kGeneral ? counted[k] & at.there : at.there));
    }
    if (first) {
#pragma unroll
      for (int k = 0; k < batch; ++k)
        if (is_kept(k)) {
          *place(k, 0) = v[k];
          if (!exact || !active) *place(k, 1) = g[k];
        }
    }
#pragma unroll
    for (int part = 0; part < parts; ++part) {
      const auto coefficient = [&](GradRow which, R(&to_)[some]) {
        // In general registers are short: each pack reads its coefficients anew.
        const int from = kGeneral && kColumns ? int(anew(uint32_t(column))) : column;
        take_coefficients<kColumns>(me.coefficients + which * row, from + part * some, to_);
      };
      R hi[some], rstd[some], s[some] = {}, q[some] = {};
      coefficient(kHi, hi);
      coefficient(kRstd, rstd);
#pragma unroll
      for (int c = 0; c < batch; c += together) {
        R z[together][some], u[together][some];
#pragma unroll
        for (int k = 0; k < together; ++k) {
          take(v[c + k], part, z[k], T{});
          take(g[c + k], part, u[k], T{});
#pragma unroll
          for (int j = 0; j < some; ++j) z[k][j] = z[k][j] - hi[j];
        }
        if (active && is_dy(c)) {
          R scale[some], shift[some], more[some];
          coefficient(kPreScale, scale);
          coefficient(kPreShift, shift);
#pragma unroll
          for (int k = 0; k < together; ++k) {
            if (kGeneral && residual) take(added[c + k], part, more, T{});
#pragma unroll
            for (int j = 0; j < some; ++j) {
              R pre = fused(z[k][j], scale[j], shift[j]);
              if (kGeneral && residual) pre += more[j];
              if (kGeneral)
                u[k][j] = activation_gradient<Math>(activation, R(pass.epilogue.slope), u[k][j], pre);
              else
                u[k][j] = relu_gradient<Math>(u[k][j], pre);
            }
            put(g[c + k], part, u[k], T{});
          }
        }
#pragma unroll
        for (int k = 0; k < together; ++k)
#pragma unroll
          for (int j = 0; j < some; ++j) {
            z[k][j] = z[k][j] * rstd[j];
            if (there[c + k] != kWhole<T> && !(there[c + k] >> (part * some + j) & 1)) z[k][j] = 0;  // 0 times infinity
            s[j] += u[k][j];
            q[j] = fused(u[k][j], z[k][j], q[j]);
          }
        if (writes) {
          R scale[some], slope[some], shift[some];
          coefficient(kScale, scale);
          coefficient(kSlope, slope);
          coefficient(kShift, shift);
#pragma unroll
          for (int k = 0; k < together; ++k) {
#pragma unroll
            for (int j = 0; j < some; ++j) {
              const R own = fused(slope[j], z[k][j], shift[j]);
              const bool corrected =
                  !constant && (!kGeneral || (counted[kGeneral ? c + k : 0] >> (part * some + j) & 1));
              z[k][j] = corrected ? fused(scale[j], u[k][j], own) : scale[j] * u[k][j];
            }
            put(v[c + k], part, z[k], T{});
          }
        }
      }
      t.add(part * some, s, q);
    }
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if (first && exact && active && is_kept(k)) *place(k, 1) = g[k];
      if (writes) {
        const auto at = slab.template at<kAll>(i + k);
        store(at.in(dx), v[k], at.there, kAll || vector, true);
        if (kGeneral && dresidual) store(at.in(dresidual + slab.first), g[k], at.there, kAll || vector, true);
      }
    }
  };
  for (int from = 0; from < batches; from += kChunk / batch) {
    const int to = from + kChunk / batch < batches ? from + kChunk / batch : batches;
    t = {};
    for (int b = from; b < to; ++b) {
      const int i = (first ? b : batches - 1 - b) * batch;
      // Of columns in general it would save little, and registers are short.
      if (!(kGeneral && kColumns) && i + batch <= slab.whole && (i + batch <= kept || i >= kept) && needs_x)
        take_batch(i, std::integral_constant<bool, !(kGeneral && kColumns)>{});
      else
        take_batch(i, std::false_type{});
    }
    if (sums) {
      const auto all = me.block_sums(t, R(1), false);
      if (me.owner()) me.add(all);
    }
  }
}

template <class T, bool kColumns, bool kGeneral>
__global__ void __launch_bounds__(BackwardPass::resident(kGeneral), 1)
    backward(const __grid_constant__ BackwardPass pass, const __grid_constant__ Job job) {
  FN_SHARED(unsigned char, shared);
  Member<T, kColumns> me(job, shared);
  for (; me.slab - me.team() < job.layout.slabs; me.slab += job.plan.teams) {
    const bool mine = me.slab < job.layout.slabs;
    me.begin();
    // Once to the sums, and once on from there.
    for (int turn = 0; turn < 2; ++turn) {
      const bool first = turn == 0;
      if (!first && job.phase == Phase::sums) break;
      if (mine && (first || pass.sums)) {
        const auto sums = first ? Sums<Real<T>>::none() : me.gather();
        const Column column = Column::of<kColumns>(job.layout, me.slab);
        if (column.there) settle(pass, me, column, !first, sums);
        __syncthreads();
      }
      if (kGeneral) {
        if (mine && (first ? job.phase != Phase::rest : pass.dx && !pass.known()))
          sweep<T, kColumns, kGeneral, Doing::either>(pass, me, first);
      } else if (first) {
        if (mine && pass.sums && job.phase != Phase::rest) sweep<T, kColumns, kGeneral, Doing::sums>(pass, me, true);
      } else {
        if (mine && pass.dx) sweep<T, kColumns, kGeneral, Doing::writes>(pass, me, false);
      }
      if (first && pass.sums && job.phase != Phase::rest) {
        if (mine) me.publish();
        me.sync();
      }
    }
    __syncthreads();  // coefficients and stage are free again
  }
  me.end();
}

}  // namespace fusednorm::cuda
