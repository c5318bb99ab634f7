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
  const int64_t s = column.statistic, c = column.channel;
  const double mean = pass.mean[s], rstd = pass.rstd[s], w = pass.weight.get_or(c, 1);
  double x_hat = pass.cx ? pass.cx[s] : 0, one = pass.c0 ? pass.c0[s] : 0;
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
      one = -w * u / n;
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
  const int64_t run = kGeneral ? slab.first_run(me.job.layout, me.job.plan, me.slab, me.rank()) : 0;
  const T *x = pass.x.template as<const T>(), *dy = pass.dy.template as<const T>(),
          *residual = pass.epilogue.residual.template as<const T>();
  T *dx = pass.dx.template as<T>(), *dresidual = pass.dresidual.template as<T>();
  const Activation activation = pass.epilogue.activation;
  const bool first = kDoing == Doing::either ? to_sums : kDoing == Doing::sums;
  const bool sums = first && (kDoing == Doing::sums || pass.sums);
  const bool writes = kDoing == Doing::either ? dx && pass.known() == first : kDoing == Doing::writes;
  const bool vector = me.job.layout.vector;
  const bool active = activation != Activation::identity, needs_x = sums || active || !pass.constant;
  // u is kept in place of dy, unless it would be rounded.
  const bool exact = sizeof(T) == sizeof(R) || activation <= Activation::relu;
  const int kept = pass.known() ? 0 : me.job.plan.kept, row = me.job.layout.columns;
  const int batches = (slab.steps + batch - 1) / batch, column = me.column();

  for (int from = 0; from < batches; from += kChunk / batch) {
    const int to = from + kChunk / batch < batches ? from + kChunk / batch : batches;
    Tally<R, Member<T, kColumns>::kOwn> t;
    for (int b = from; b < to; ++b) {
      const int i = (first ? b : batches - 1 - b) * batch;
      uint4 v[batch], g[batch], added[kGeneral ? batch : 1];
      uint32_t there[batch], counted[kGeneral ? batch : 1];
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        const auto at = slab.at(i + k);
        there[k] = at.there;
        if (!first && i + k < kept) {
          v[k] = *me.kept(i + k, 0, 2);
          g[k] = *me.kept(i + k, 1, 2);
        } else {
          v[k] = load(x + at.element, needs_x ? at.there : 0, vector, !first);
          g[k] = load(dy + at.element, at.there, vector, !first);
        }
        if constexpr (kGeneral) {
          if (residual && active && (first || !exact || i + k >= kept))
            added[k] = load(residual + at.element, at.there, vector, !first);
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
          if (i + k < kept) {
            *me.kept(i + k, 0, 2) = v[k];
            if (!exact || !active) *me.kept(i + k, 1, 2) = g[k];
          }
      }
#pragma unroll
      for (int part = 0; part < parts; ++part) {
        const auto coefficient = [&](GradRow which, R(&to_)[some]) {
          take_coefficients<kColumns>(me.coefficients + which * row, column + part * some, to_);
        };
        R hi[some], rstd[some], s[some] = {}, q[some] = {};
        coefficient(kHi, hi);
        coefficient(kRstd, rstd);
#pragma unroll
        for (int k = 0; k < batch; ++k) {
          R z[some], u[some];
          take(v[k], part, z, T{});
          take(g[k], part, u, T{});
#pragma unroll
          for (int j = 0; j < some; ++j) z[j] = z[j] - hi[j];
          if (active && (first || !exact || i + k >= kept)) {
            R scale[some], shift[some], more[some];
            coefficient(kPreScale, scale);
            coefficient(kPreShift, shift);
            if (kGeneral && residual) take(added[k], part, more, T{});
#pragma unroll
            for (int j = 0; j < some; ++j) {
              R pre = fused(z[j], scale[j], shift[j]);
              if (kGeneral && residual) pre += more[j];
              if (kGeneral)
                u[j] = activation_gradient<Math>(activation, R(pass.epilogue.slope), u[j], pre);
              else
                u[j] = relu_gradient<Math>(u[j], pre);
            }
            put(g[k], part, u, T{});
          }
#pragma unroll
          for (int j = 0; j < some; ++j) {
            z[j] = z[j] * rstd[j];
            if (there[k] != kWhole<T> && !(there[k] >> (part * some + j) & 1)) z[j] = 0;  // 0 times infinity
            s[j] += u[j];
            q[j] = fused(u[j], z[j], q[j]);
          }
          if (writes) {
            R scale[some], slope[some], shift[some];
            coefficient(kScale, scale);
            coefficient(kSlope, slope);
            coefficient(kShift, shift);
#pragma unroll
            for (int j = 0; j < some; ++j) {
              const R own = fused(slope[j], z[j], shift[j]);
              const bool corrected =
                  !pass.constant && (!kGeneral || (counted[kGeneral ? k : 0] >> (part * some + j) & 1));
              z[j] = corrected ? fused(scale[j], u[j], own) : scale[j] * u[j];
            }
            put(v[k], part, z, T{});
          }
        }
        t.add(part * some, s, q);
      }
#pragma unroll
      for (int k = 0; k < batch; ++k) {
        if (first && exact && active && i + k < kept) *me.kept(i + k, 1, 2) = g[k];
        if (writes) {
          const auto at = slab.at(i + k);
          store(dx + at.element, v[k], at.there, vector, true);
          if (kGeneral && dresidual) store(dresidual + at.element, g[k], at.there, vector, true);
        }
      }
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
