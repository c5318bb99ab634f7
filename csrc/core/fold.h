// Fold: which elements share a statistic and which share a parameter, in five integers.
//
// A contiguous tensor is seen as (batch, outer, groups, inner):
//
//        batch      outer       groups       inner
//     ┌─────────┬───────────┬───────────┬─────────────┐      statistic  s = b·groups + g          S of them,
//     │    b    │     o     │     g     │      i      │                  reduced over outer and inner
//     └─────────┴───────────┴───────────┴─────────────┘      channel    c = (g·inner + i) / span  C of them
//       own       reduced     own         reduced            position   p = (b·outer + o)·span + i mod span
//
// `span` is the run of elements along `inner` that share one weight and bias. Channel and position together name the
// element: C·P = size. No kernel knows which norm it serves; python/fusednorm/fold.py has the table.
#pragma once

#include <cstdint>

#include "core/inline.h"

namespace fusednorm {

struct Fold {
  int64_t batch = 1, outer = 1, groups = 1, inner = 1, span = 1;

  FN_INLINE int64_t size() const { return batch * outer * groups * inner; }
  FN_INLINE int64_t statistics() const { return batch * groups; }
  FN_INLINE int64_t per_statistic() const { return outer * inner; }
  FN_INLINE int64_t channels() const { return span > 0 ? groups * inner / span : groups; }

  // Cells: what a statistic and a channel have in common. A statistic is taken over `share` neighbouring ones.
  FN_INLINE int64_t share() const { return span > 0 ? inner / span : 1; }
  FN_INLINE Fold cells() const { return {batch, outer, groups * share(), span, span}; }

  // Shapes of memory. Columns: neighbours belong to different channels. Rows: a run of `span` elements has one channel.
  // Lines: each run of `inner` elements has one statistic, and they have channels of their own.
  FN_INLINE bool is_columns() const { return span == 1; }
  FN_INLINE bool is_lines() const { return outer == 1 && span == 1 && inner != 1; }
};

}  // namespace fusednorm
