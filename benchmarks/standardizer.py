"""Standardizer beside scikit-learn's StandardScaler: python benchmarks/standardizer.py [--rows N] [--features C] …

Results are checked against float64 first; what is wrong is not timed. Prints a Markdown table; --json FILE keeps all.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import fusednorm as fn
import numpy as np
from fusednorm.bench import Contender, environment, interleaved, ratio, spread, versions
from sklearn.preprocessing import StandardScaler

METHODS = ("fit", "transform", "fit_transform", "inverse_transform")
CHECKED_ROWS = 1000


def wrong(x: np.ndarray[Any, Any], ours: fn.Standardizer) -> list[str]:
    """Which results are off: the moments by more than 1e-6 σ, numbers by more than a few roundings."""
    mean, std = (
        np.concatenate([f(x[:, [j]], axis=0, dtype=np.float64) for j in range(x.shape[1])]) for f in (np.mean, np.std)
    )
    assert ours.mean_ is not None
    assert ours.scale_ is not None
    head, eps = x[:CHECKED_ROWS].astype(np.float64), np.finfo(x.dtype).eps
    z = (head - mean) / std
    y = ours.transform(x)
    back = ours.inverse_transform(y)[:CHECKED_ROWS]
    checks = {
        "mean_": np.abs(ours.mean_ - mean) < 1e-6 * std,
        "scale_": np.abs(ours.scale_ - std) < 1e-6 * std,
        "transform": np.abs(y[:CHECKED_ROWS] - z) < 8 * eps * (1 + np.abs(z)) + 1e-6,
        "fit_transform": fn.Standardizer().fit_transform(x) == y,
        "inverse_transform": np.abs(back - head) < 8 * eps * (np.abs(head) + np.abs(mean) + std),
    }
    return [name for name, right in checks.items() if not right.all()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=100)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument("--order", choices="CF", default="C")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    x = np.random.default_rng(0).standard_normal((options.rows, options.features), dtype=options.dtype)
    x = np.asarray(3 * x + 1, order=options.order)
    where = environment()
    ours, theirs = fn.Standardizer().fit(x), StandardScaler().fit(x)
    bad = wrong(x, ours)
    if bad:
        print("wrong, so not timed:", ", ".join(bad), file=sys.stderr)
        return 1
    y = ours.transform(x)
    rows = []
    print("| pass | ours ms | scikit-learn ms | scikit-learn/ours |\n|---|---:|---:|---:|")
    for name in METHODS:
        given = y if name == "inverse_transform" else x
        getattr(theirs, name)(given)  # the first call is slower
        ms = interleaved(
            [
                Contender("ours", lambda name=name, given=given: getattr(ours, name)(given)),  # type: ignore[misc]
                Contender("sklearn", lambda name=name, given=given: getattr(theirs, name)(given)),  # type: ignore[misc]
            ],
            options.repeat,
        )
        row = {"pass": name, "ms": {n: spread(t) for n, t in ms.items()}, "ratio": ratio(ms["sklearn"], ms["ours"])}
        rows.append(row)
        quotient = row["ratio"]
        half = (quotient["p90"] - quotient["p10"]) / 2
        medians = " | ".join(f"{row['ms'][n]['median']:.1f}" for n in ms)
        print(f"| {name} | {medians} | {quotient['median']:.1f} ±{half:.1f} |")
    where["versions"] |= versions(("scikit-learn",))
    shape = f"{options.rows}×{options.features} {options.dtype}, {options.order} order"
    print(f"\n{shape}; {where['cpu']}, {where['threads']} threads, {where['isa']}; {where['versions']}")
    if options.json:
        options.json.write_text(json.dumps({"environment": where, "case": shape, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
