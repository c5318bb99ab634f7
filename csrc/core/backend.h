// A backend is a table of verbs over Folds. Every pointer in the arguments lies on the backend's device; statistics are
// float64 [S], coefficients float64 [S]; `count` too is kept as float64. Callers have checked sizes, types and aliasing
// (bind/ does); verbs check nothing and touch only their outputs.
//
// A mask holds one byte for each position (core/fold.h), nonzero where the elements there count; null: all count.
// Statistics are over the counted elements; outputs are written everywhere.
#pragma once

#include <cstdint>

#include "core/array.h"
#include "core/epilogue.h"
#include "core/fold.h"
#include "core/moments.h"

namespace fusednorm {

// Where a verb of a GPU runs: the caller's device, in the order of the caller's stream; nothing waits. `scratch` holds
// the bytes that Backend::scratch asked for, uninitialized, and is free again when the stream has passed the call. The
// CPU's verbs run at once and look at none of it.
struct Queue {
  int device = kCpu;
  void* stream = nullptr;
  void* scratch = nullptr;
};

struct EpilogueArgs {
  Activation activation = Activation::identity;
  double slope = 0;
  Array residual;
};

// Running statistics [C], changed in place.
struct RunningArgs {
  Array mean, var;
  double momentum = 0;    // weight of the new value
  int64_t counted = -1;   // ≥ 0: new values so far; the k-th further one weighs 1/(counted + k), a cumulative average
  bool averaged = false;  // the batch entries' average is the new value (instance norm), not each in turn (ghosts)
  double correction = 1;  // of the new variance: m2/(n − correction)

  FN_INLINE double weight(int64_t entry) const { return counted < 0 ? momentum : 1.0 / double(counted + entry + 1); }
  // New running value: old + weight·(new − old), rounded to its type.
  FN_INLINE void update(int64_t c, double weight, double new_mean, double new_var) const {
    mean.set(c, (1 - weight) * mean.get(c) + weight * new_mean);
    var.set(c, (1 - weight) * var.get(c) + weight * new_var);
  }
  // By the moments `of(b)` of channel c's batch entries. Those that a mask leaves fewer than two numbers say nothing.
  template <class Of>
  FN_INLINE void update_by_entries(int64_t c, int64_t entries, Of&& of) const {
    double means = 0, variances = 0;
    int64_t some = 0;
    for (int64_t b = 0; b < entries; ++b) {
      const Moments m = of(b);
      if (m.n < 2) continue;
      if (!averaged) {
        update(c, weight(b), m.mean, m.m2 / (m.n - correction));
        continue;
      }
      means += m.mean;
      variances += m.m2 / (m.n - correction);
      ++some;
    }
    if (some > 0) update(c, weight(0), means / double(some), variances / double(some));
  }
};

struct MomentsArgs {
  Fold fold;
  Array x;
  const uint8_t* mask;
  bool center;  // false: mean = 0, m2 = Σx²
  double *count, *mean, *m2;
  Queue queue = {};
};

struct NormalizeArgs {
  Fold fold;
  Array x;
  const double *mean, *rstd;  // the mean may be missing, here and below: it is 0
  Array weight, bias;
  EpilogueArgs epilogue;
  Array y;
  Queue queue = {};
};

struct ForwardArgs {
  Fold fold;
  Array x, weight, bias;
  EpilogueArgs epilogue;
  const uint8_t* mask;
  double eps;
  bool training = true;  // false: the running statistics are the statistics, and stay as they are
  RunningArgs running;
  double *mean, *rstd;  // out; no mean: it is taken as 0 (RMS norm)
  Array y;              // out
  Queue queue = {};
};

struct GradSumsArgs {
  Fold fold;
  Array dy, x;
  const double *mean, *rstd;
  Array weight, bias;
  EpilogueArgs epilogue;
  double *s1, *s2;       // out [S]: Σw·u, Σw·u·x̂
  Array dweight, dbias;  // out [C]: Σu·x̂, Σu
  Queue queue = {};
};

struct GradInputArgs {
  Fold fold;
  Array dy, x;
  const double *mean, *rstd;
  Array weight, bias;
  EpilogueArgs epilogue;
  const double *cx, *c0;  // [S]; null: 0, the statistics were constants
  const uint8_t* mask;    // where cx and c0 apply
  Array dx, dresidual;    // out
  Queue queue = {};
};

struct BackwardArgs {
  Fold fold;
  Array dy, x;
  const double *mean, *rstd;
  Array weight, bias;
  EpilogueArgs epilogue;
  const uint8_t* mask;                  // the forward's
  bool constant;                        // the statistics were constants (evaluation, frozen)
  Array dx, dresidual, dweight, dbias;  // out
  Queue queue = {};
};

// Moments [before, axis, after] → [before, after], merged along the axis in order.
struct MergeArgs {
  int64_t before, axis, after;
  const double *count, *mean, *m2;
  double *merged_count, *merged_mean, *merged_m2;
  Queue queue = {};
};

// A plain copy past the caches: the ceiling that benchmarks measure the verbs against.
struct CopyArgs {
  void* to;
  const void* from;
  int64_t bytes;
  Queue queue = {};
};

struct Backend {
  const char* name;
  void (*moments)(const MomentsArgs&);
  void (*merge)(const MergeArgs&);
  void (*normalize)(const NormalizeArgs&);
  void (*grad_sums)(const GradSumsArgs&);
  void (*grad_input)(const GradInputArgs&);
  void (*forward)(const ForwardArgs&);
  void (*backward)(const BackwardArgs&);
  void (*copy)(const CopyArgs&);
  // Bytes of Queue::scratch that a verb over this fold needs at most, on that device; null: none, ever.
  int64_t (*scratch)(const Fold&, DType, int device);
};

}  // namespace fusednorm
