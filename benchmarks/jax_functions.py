"""fusednorm.jax beside the same formulas in jax.numpy, both jitted: python benchmarks/jax_functions.py [--repeat N] …

Values and gradients are checked against float64 first; what is wrong is not timed. Prints a Markdown table, and what a
callback into Python costs that does nothing; --json FILE keeps all.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusednorm.jax as fnj
import jax
import jax.numpy as jnp
import numpy as np
from fusednorm.bench import Contender, environment, interleaved, ratio, spread, versions
from jax.experimental.buffer_callback import buffer_callback


def formula(x: Any, axes: Any, weight: Any, bias: Any) -> Any:
    mean = x.mean(axes, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(((x - mean) ** 2).mean(axes, keepdims=True) + 1e-5) * weight + bias


NORMS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "batch": (
        lambda x, w, b: fnj.batch_norm(x, None, None, w, b, training=True)[0],
        lambda x, w, b: formula(x, tuple(range(x.ndim - 1)), w, b),
    ),
    "layer": (lambda x, w, b: fnj.layer_norm(x, x.shape[-1], w, b), lambda x, w, b: formula(x, -1, w, b)),
}
CASES = (("batch", (64, 32)), ("batch", (32, 56, 56, 64)), ("batch", (8192, 1024)), ("layer", (8192, 1024)))


def passes(f: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    def both(x: Any, dy: Any, w: Any, b: Any) -> Any:
        y, pull = jax.vjp(f, x, w, b)
        return y, *pull(dy)

    return {"forward": jax.jit(lambda x, dy, w, b: (f(x, w, b),)), "forward and backward": jax.jit(both)}


def is_right(name: str, given: list[Any]) -> bool:
    """To 1e-4 of each result's largest number."""
    ours, theirs = NORMS[name]
    got = passes(ours)["forward and backward"](*given)
    with jax.enable_x64(True):
        want = passes(theirs)["forward and backward"](*(np.asarray(a, np.float64) for a in given))
        pairs = [(np.asarray(g, np.float64), np.asarray(w)) for g, w in zip(got, want, strict=True)]
    return all(np.abs(g - w).max() < 1e-4 * np.abs(w).max() for g, w in pairs)


def nothing(*_: Any) -> None: ...


def callbacks() -> dict[str, Any]:
    """µs of calls of eight numbers that do nothing, jitted: without a callback, and through JAX's two kinds."""
    x = jnp.zeros(8)
    result = jax.ShapeDtypeStruct(x.shape, x.dtype)
    ways = {
        "none": lambda x: x + 1,
        "buffer_callback": lambda x: buffer_callback(nothing, result)(x),
        "pure_callback": lambda x: jax.pure_callback(lambda a: a, result, x),
    }
    calls = {name: jax.jit(way) for name, way in ways.items()}
    ms = interleaved([Contender(name, lambda f=f: f(x).block_until_ready()) for name, f in calls.items()], 50)  # type: ignore[misc]
    return {name: spread([1e3 * one for one in times]) for name, times in ms.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    where, rows, rng = environment(), [], np.random.default_rng(0)
    where["versions"] |= versions(("jax", "jaxlib"))
    where["called"] = "by XLA" if fnj._HANDLERS else "from Python"
    print("| norm | x | pass | jax.numpy ms | ours ms | jax.numpy/ours |\n|---|---|---|---:|---:|---:|")
    for name, shape in CASES:
        x, dy = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
        w, b = (jnp.asarray(rng.standard_normal(shape[-1:], np.float32)) for _ in range(2))
        given = [x, dy, w, b]
        if not is_right(name, given):
            print(f"{name} of {shape} is wrong, so not timed", file=sys.stderr)
            return 1
        ours, theirs = (passes(f) for f in NORMS[name])
        for which in ours:
            contenders = [
                Contender(n, lambda f=f, given=given: jax.block_until_ready(f(*given)))  # type: ignore[misc]
                for n, f in (("jax.numpy", theirs[which]), ("ours", ours[which]))
            ]
            ms = interleaved(contenders, options.repeat)
            row = {"norm": name, "shape": shape, "pass": which, "ms": {n: spread(t) for n, t in ms.items()}}
            row["ratio"] = quotient = ratio(ms["jax.numpy"], ms["ours"])
            rows.append(row)
            half = (quotient["p90"] - quotient["p10"]) / 2
            medians = " | ".join(f"{row['ms'][n]['median']:.3g}" for n in ms)
            print(
                f"| {name} | {'×'.join(map(str, shape))} | {which} | {medians} | {quotient['median']:.2f} ±{half:.2f} |"
            )
    empty = callbacks()
    print("\nA callback that does nothing, µs: " + ", ".join(f"{n} {t['median']:.1f}" for n, t in empty.items()))
    print(f"float32; {where['cpu']}, {where['threads']} threads, {where['isa']}; {where['versions']}")
    print(f"The kernels are called {where['called']}.")
    if options.json:
        found = {"environment": where, "rows": rows, "callbacks_us": empty}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
