#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "cpu/levels.h"

namespace fusednorm::cpu {

// FUSEDNORM_ISA_LIST is X(v4) X(v3) …, from CMake.
#define X(isa)                  \
  namespace isa {               \
  extern const Backend backend; \
  }
FUSEDNORM_ISA_LIST
#undef X

namespace {

const Backend* choose(const std::string& name) {
  std::string built, runnable;
  const Level* found = nullptr;
  for (const Level& level : levels()) {
    if (name == level.backend->name || name == std::string("x86-64-") + level.backend->name) found = &level;
    built += std::string(built.empty() ? "" : ", ") + level.backend->name;
    if (level.runs_here) runnable += std::string(runnable.empty() ? "" : ", ") + level.backend->name;
  }
  if (!found) throw std::invalid_argument("unknown instruction set '" + name + "'; this build has " + built);
  if (!found->runs_here)
    throw std::invalid_argument("this machine does not run the instruction set '" + name + "'; it runs " + runnable);
  return found->backend;
}

std::atomic<const Backend*> chosen{nullptr};

}  // namespace

const std::vector<Level>& levels() {
  static const std::vector<Level> all = {
#define X(isa) {&isa::backend, runs_here(isa::backend.name)},
      FUSEDNORM_ISA_LIST
#undef X
  };
  return all;
}

const Backend& backend() {
  const Backend* now = chosen.load(std::memory_order_acquire);
  if (now) return *now;
  const char* wanted = std::getenv("FUSEDNORM_ISA");
  if (wanted && *wanted) {
    try {
      select(wanted);
    } catch (const std::invalid_argument& e) {
      throw std::invalid_argument("FUSEDNORM_ISA=" + std::string(wanted) + ": " + e.what());
    }
    return *chosen.load(std::memory_order_acquire);
  }
  for (const Level& level : levels())
    if (level.runs_here) {
      chosen.store(level.backend, std::memory_order_release);
      return *level.backend;
    }
  throw std::invalid_argument("this machine runs none of the instruction sets this build has; x86-64-v2 is the least");
}

void select(const std::string& name) { chosen.store(choose(name), std::memory_order_release); }

}  // namespace fusednorm::cpu
