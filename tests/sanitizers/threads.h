#pragma once

// Set: the team does not wait at the end of a loop, as if the kernels had forgotten to.
extern bool barriers_left_out;
