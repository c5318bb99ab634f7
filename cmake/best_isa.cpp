// Prints the best instruction set of this machine, by its name in CMakeLists.txt.
#include <cstdio>

#include "cpu/levels.h"

int main() { std::puts(fusednorm::cpu::best_level()); }
