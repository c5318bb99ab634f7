"""The page of all experiments, from their results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HEAD = """\
# What lecture notes say about batch norm, measured

`pip install '.[study]' && python -m examples.study all` writes this page, its figures and, beside them, all numbers
(`NAME.json`); `python -m examples.study rates depth --seeds 5` some of it. The code is
[examples/study](../../examples/study), an experiment a page; the layers are `fusednorm.torch`'s, the data
scikit-learn's digits: 1797 images of 8×8 pixels.

A seed is a split into training and test set, initial weights and an order of batches. Numbers are medians over seeds,
in brackets from the lowest to the highest; in figures lines and bands are the same. A claim comes down to comparisons,
made for each seed: it *holds* if all come out as claimed, *holds partly* if half of them or more do, and *does not hold
here* if fewer; the counts stand beside. Small networks on small images: what holds here need not hold elsewhere, nor
the other way round.
"""
ENVIRONMENT = "date", "cpu", "cores", "threads", "python", "numpy", "torch", "fusednorm", "isa"


def kept(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of the environment belongs to results that are no times; with the versions of what was used."""
    versions = {name: importlib.import_module(name).__version__ for name in ("numpy", "torch", "sklearn", "optuna")}
    return {key: environment[key] for key in ENVIRONMENT if key in environment} | versions


def figure(experiment: Any, path: Path) -> None:
    drawn = experiment.draw(json.loads(path.read_text())["found"])
    drawn.savefig(path.with_suffix(".png"), dpi=110)


def table(experiment: Any, found: Any) -> list[str]:
    rows = [f"| {claim.says} | {claim.measured} | **{claim.verdict}** |" for claim in experiment.claims(found)]
    return ["| the notes | measured | |", "|---|---|---|", *rows]


def section(experiment: Any, path: Path) -> str:
    record = json.loads(path.read_text())
    found, name = record["found"], path.stem
    code = f"[{name}.py](../../examples/study/{name}.py)"
    seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}{', tiny settings' * record['quick']}"
    done = f"{experiment.setup(found)} {seeds}, {record['cpu_seconds']} s of CPU time; {code}."
    figure = f"![{experiment.TITLE}]({name}.png)"
    return "\n".join([f"## {experiment.TITLE}", "", done, "", figure, "", *table(experiment, found), ""])


def page(folder: Path, names: Sequence[str]) -> str:
    sections: list[str] = []
    where: dict[str, list[str]] = {}
    for name in names:
        path = folder / f"{name}.json"
        if path.exists():
            sections.append(section(importlib.import_module(f".{name}", __package__), path))
            environment = json.loads(path.read_text())["environment"]
            text = "; ".join(f"{key} {value}" for key, value in environment.items() if key != "date")
            where.setdefault(text, []).append(f"{name} ({environment['date']})")
    told = [f"{', '.join(which)}: {text}." for text, which in where.items()]
    return "\n".join([HEAD, *sections, "## Where it ran", "", *told, ""])
