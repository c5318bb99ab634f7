"""Statistics of an array that no machine has to hold: Dask's workers see a chunk at a time, and what they learned is
merged. `python examples/dask_statistics.py` does it in two processes here, `--scheduler ADDRESS` on a cluster.

A Standardizer or Moments of a chunk is a few numbers for each feature, pickles, and merges exactly. So a pass over the
data is one task for each chunk, and a fold over the results, which another engine's map and reduce do as well. The fold
is in the order of the chunks, whichever worker is done first: every run has the bits of one process that reads them, if
all have one instruction set.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import dask
import dask.array as da
import fusednorm as fn
import numpy as np
from distributed import Client
from fusednorm.cli.extras import positive

CHUNK, FEATURES = 2**16, 32


def of_chunks(x: da.Array, learn: Callable[[Any], Any]) -> list[Any]:
    """`learn` of each chunk of rows, where that lies, in their order."""
    chunks = x.rechunk(dict.fromkeys(range(1, x.ndim), -1)).to_delayed().ravel()
    return list(dask.compute(*(dask.delayed(learn)(chunk) for chunk in chunks)))


def standardizer(table: da.Array) -> fn.Standardizer:
    """Fitted on all rows of (rows, features)."""
    parts = of_chunks(table, lambda chunk: fn.Standardizer().partial_fit(chunk))  # its own each: workers may be threads
    return reduce(fn.Standardizer.merge, parts, fn.Standardizer())


def batch_norm(images: da.Array) -> fn.BatchNorm:
    """With the mean and variance of all of (images, channels, height, width), for inference."""
    parts = of_chunks(images, lambda chunk: fn.Moments().push(chunk, (0, 2, 3)))
    moments = reduce(fn.Moments.merge, parts, fn.Moments())
    layer = fn.BatchNorm(images.shape[1]).eval()
    layer.running_mean, layer.running_var = moments.mean, moments.variance(layer.correction)
    return layer


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--rows", type=positive, default=1_000_000, help="of the table, 128 bytes each (default: 1000000)"
    )
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a running cluster; otherwise two processes here")
    given = parser.parse_args(arguments)
    two = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with Client(given.scheduler) if given.scheduler else Client(**two) as client:
        workers = set(client.run(os.getpid).values())
        random = da.random.default_rng(0)  # drawn by the workers, chunk by chunk, whenever it is needed
        table = random.normal(1e4, 1, (given.rows, FEATURES), chunks=(CHUNK, FEATURES)).astype(np.float32)
        fitted = standardizer(table)
        print(f"{table.nbytes / 1e6:.0f} MB in {table.numblocks[0]} chunks, {len(workers - {os.getpid()})} processes")

        here = fn.Standardizer()
        for chunk in table.blocks:
            here.partial_fit(chunk.compute())
        same = all(np.array_equal(getattr(fitted, name), getattr(here, name)) for name in ("mean_", "var_", "scale_"))
        print(f"standardizer: {'the bits of' if same else 'NOT AS'} one process that reads all chunks")

        y = table.map_blocks(fitted.transform, dtype=table.dtype)
        mean, std = dask.compute(y.mean(dtype=float), y.std(dtype=float))
        print(f"standardized, as Dask computes them: mean {mean:.1e}, σ − 1 {std - 1:.1e}")

        layer = batch_norm(table[:, :, None, None])
        print(
            f"batch norm: means about {layer.running_mean.mean():.0f}, variances about {layer.running_var.mean():.4f}"
        )
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
