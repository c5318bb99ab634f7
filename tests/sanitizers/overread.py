"""Wrong on purpose: an array that claims more memory than it has.

Run with the name of an instruction set, in an extension built with the address sanitizer, it must not reach its
end. Without the sanitizer it reads a few bytes that are not its own.
"""

import sys

import fusednorm
import numpy as np
from fusednorm import _C

_C.select_isa(sys.argv[1])
# Short by several registers: the masked load of a tail is checked by no sanitizer.
memory = np.zeros(3 * 1024 - 64, np.float32)
x = np.lib.stride_tricks.as_strided(memory, (1, 3, 1024), (3 * 4096, 4096, 4))
fusednorm.batch_norm_forward(x)
