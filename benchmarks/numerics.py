"""How the variance, and the normalized tensor, come out where the mean is far from 0: by the shortcut E[x²] − E[x]², by
NumPy's two passes, by PyTorch and Flax, as far as they are installed, all in float32, and by this library; against
float64.

``python benchmarks/numerics.py`` prints a table; ``--json FILE`` writes it, and where it was measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
from fusednorm.bench.environment import environment, versions

SHAPE = 16, 32, 56, 56
OFFSETS = 1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6  # mean/σ; σ is 1
EPS = 1e-5
AXES = 0, 2, 3

SHORTCUT, TWO_PASSES, OURS = "E[x²] − E[x]²", "two passes", "fusednorm"
TORCH, TORCH_LAST = "PyTorch", "PyTorch, channels last"
FLAX, FLAX_SLOW = "Flax", "Flax, slow variance"

Array = np.ndarray[Any, Any]
Way = Callable[[Array], tuple[Array, Array]]  # the normalized tensor and the variance, (C,)


def _normalized(x: Array, mean: Array, variance: Array) -> tuple[Array, Array]:
    """A variance below 0 is taken as 0, as frameworks do that use the shortcut."""
    rstd = 1 / np.sqrt(np.maximum(variance, 0) + x.dtype.type(EPS))
    return (x - mean) * rstd, variance.ravel()


def shortcut(x: Array) -> tuple[Array, Array]:
    mean = x.mean(AXES, keepdims=True)
    return _normalized(x, mean, (x * x).mean(AXES, keepdims=True) - mean * mean)


def two_passes(x: Array) -> tuple[Array, Array]:
    mean = x.mean(AXES, keepdims=True)
    return _normalized(x, mean, ((x - mean) ** 2).mean(AXES, keepdims=True))


def ours(x: Array) -> tuple[Array, Array]:
    y, _, rstd = fn.batch_norm_forward(x, eps=EPS)
    return y, rstd**-2 - EPS


def torch_way(memory_format: str) -> Way:
    import torch

    def way(x: Array) -> tuple[Array, Array]:
        laid = torch.from_numpy(x).to(memory_format=getattr(torch, memory_format))
        y, _, rstd = torch.native_batch_norm(laid, None, None, None, None, True, 0.0, EPS)
        return y.numpy(), rstd.numpy().astype(np.float64) ** -2 - EPS

    return way


def flax_way(use_fast_variance: bool) -> Way:
    import jax.numpy as jnp
    from flax import linen

    norm = linen.BatchNorm(
        use_running_average=False, axis=1, momentum=0.0, epsilon=EPS, use_bias=False, use_scale=False,
        use_fast_variance=use_fast_variance,
    )  # fmt: skip

    def way(x: Array) -> tuple[Array, Array]:
        # With momentum 0 the running variance is the batch's.
        y, kept = norm.apply({}, jnp.asarray(x), mutable=["batch_stats"])
        return np.asarray(y), np.asarray(kept["batch_stats"]["var"])

    return way


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {SHORTCUT: shortcut}
    if importlib.util.find_spec("flax"):
        found |= {FLAX: flax_way(True), FLAX_SLOW: flax_way(False)}
    if importlib.util.find_spec("torch"):
        found |= {TORCH: torch_way("contiguous_format"), TORCH_LAST: torch_way("channels_last")}
    return found | {TWO_PASSES: two_passes, OURS: ours}


def measure() -> list[dict[str, Any]]:
    """By offset and way: the largest relative error of a channel's variance, the largest error of an element of y."""
    z = np.random.default_rng(0).standard_normal(SHAPE)
    rows = []
    found = ways()
    for offset in OFFSETS:
        x = (z + offset).astype(np.float32)
        true_y, true_variance = two_passes(x.astype(np.float64))
        for name, way in found.items():
            y, variance = way(x)
            rows.append(
                {
                    "offset": offset,
                    "way": name,
                    "variance": float(np.max(np.abs(variance / true_variance - 1))),
                    "y": float(np.max(np.abs(y - true_y))),
                }
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="The variance where the mean is far from 0, in float32.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the errors there")
    args = parser.parse_args()
    rows = measure()
    print(f"{'mean/σ':>8}  {'way':<24}{'error of variance':>18}{'error of y':>14}")
    for row in rows:
        print(f"{row['offset']:>8g}  {row['way']:<24}{row['variance']:>18.1e}{row['y']:>14.1e}")
    if args.json:
        where = environment()
        where["versions"] |= versions(("jax", "flax"))
        args.json.write_text(json.dumps({"environment": where, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
