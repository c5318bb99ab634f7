// The CPU backends in this library and the one in use.
#pragma once

#include <string>
#include <vector>

#include "core/backend.h"

namespace fusednorm::cpu {

struct Level {
  const Backend* backend;
  bool runs_here;
};

// Best first.
const std::vector<Level>& levels();

// Chosen at the first call: the best this machine runs, or the one that FUSEDNORM_ISA names (std::invalid_argument
// where it is unknown or not to be run here).
const Backend& backend();
// For tests and `fusednorm selftest`; throws as above.
void select(const std::string& name);

}  // namespace fusednorm::cpu
