// What XLA can call itself, as capsules by name; nothing where this was built without jaxlib's headers.
#pragma once

#include <pybind11/pybind11.h>

namespace fusednorm {

#if defined(FUSEDNORM_XLA)
pybind11::dict xla_handlers();
#else
inline pybind11::dict xla_handlers() { return {}; }
#endif

}  // namespace fusednorm
