"""Test-time statistics: averages kept in training, the paper's estimator, and the exact ones, against the truth."""

from __future__ import annotations

from typing import Any

import fusednorm as fn
import numpy as np
import torch
from torch import nn

from .common import (
    COLORS,
    MARKERS,
    Claim,
    Data,
    Found,
    Settings,
    chain,
    curve,
    evaluate,
    mlp,
    number,
    panels,
    percent,
    split,
    spread,
    training,
    widths,
)

TITLE = "Test-time statistics"
HIDDEN = 128, 128
RATE = 0.3
SIZES = 4, 32
MOMENTA = 0.5, 0.1, 0.01
PAPER, BIASED, EXACT = "E[μ_B], m/(m−1)·E[σ²_B]", "the same without m/(m−1)", "exact, in chunks"
AVERAGES = {momentum: f"average, momentum {momentum}" for momentum in MOMENTA}
NAMES = *AVERAGES.values(), PAPER, BIASED, EXACT
KEYS = "mean", "variance", "first", "accuracy"  # first: the variance's error in the first norm alone

Statistics = list[tuple[Any, Any]]  # of each norm: mean and variance, float64


def setup(found: Found) -> str:
    return (
        f"An MLP {chain(found['widths'])} with ReLU, gradient descent, rate {RATE}, batches of {SIZES[0]} and of "
        f"{SIZES[1]}, {found['epochs']} epochs. Averages are kept in training, one for each momentum (PyTorch's: the "
        "weight of the new batch). The other estimates are taken at the weights of that step: the paper's over the "
        "batches of an epoch, the exact one layer by layer in chunks that `fn.Moments` merges. The truth is the "
        "training set as one batch. Error: the root mean square, over layers and features, of the deviation of the "
        "mean over σ, and of the variance over σ²."
    )


def measure(settings: Settings) -> Found:
    epochs, checks = settings.pick((4, 8), (1, 2))
    found: Found = {"widths": widths(settings, *HIDDEN), "epochs": epochs}
    for size in SIZES:
        found[str(size)] = {"at": [], **{name: {key: [] for key in KEYS} for name in NAMES}}
        found[str(size)]["accuracy of the truth"] = []
    for seed in settings.track(range(settings.seeds), TITLE):
        data = split(settings, seed)
        for size in SIZES:
            steps = epochs * (len(data.x) // size)
            watched(found[str(size)], data, size, steps, max(steps // checks, 1), seed)
    return found


def watched(into: Found, data: Data, size: int, steps: int, every: int, seed: int) -> None:
    model = mlp([data.features, *HIDDEN, 10], seed=seed)
    norms = [module for module in model if isinstance(module, nn.BatchNorm1d)]
    averages: dict[float, Statistics] = {
        momentum: [(np.zeros(norm.num_features), np.ones(norm.num_features)) for norm in norms] for momentum in MOMENTA
    }
    # Running statistics of momentum 1 are the last batch's, from which all averages are made.
    for norm in norms:
        norm.momentum = 1.0
    errors: dict[str, dict[str, list[float]]] = {name: {key: [] for key in KEYS} for name in NAMES}
    steps_at = []
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    for step, _ in enumerate(training(model, data, optimizer, steps, size, seed), 1):
        for momentum, kept in averages.items():
            for i, norm in enumerate(norms):
                of_batch = norm.running_mean.double().numpy(), norm.running_var.double().numpy()
                kept[i] = tuple(a + momentum * (b - a) for a, b in zip(kept[i], of_batch, strict=True))
        if step % every == 0:
            steps_at.append(step)
            true = of_batches(model, norms, data, [torch.arange(len(data.x))], 0)
            order = torch.randperm(len(data.x), generator=torch.Generator().manual_seed(seed))
            parts = order[: len(order) // size * size].split(size)
            estimates = {AVERAGES[momentum]: kept for momentum, kept in averages.items()}
            estimates[PAPER] = of_batches(model, norms, data, parts, 1)
            estimates[BIASED] = of_batches(model, norms, data, parts, 0)
            estimates[EXACT] = exact(model, data, size)
            for name, statistics in estimates.items():
                for key, error in zip(("mean", "variance"), off(statistics, true), strict=True):
                    errors[name][key].append(error)
                errors[name]["first"].append(off(statistics[:1], true[:1])[1])
                errors[name]["accuracy"].append(accuracy(model, norms, data, statistics))
    into["at"] = steps_at
    into["accuracy of the truth"].append(accuracy(model, norms, data, true))
    for name, each in errors.items():
        for key, series in each.items():
            into[name][key].append(series)


def of_batches(model: nn.Module, norms: list[Any], data: Data, parts: Any, correction: int) -> Statistics:
    """E[μ_B] and, with correction 1, m/(m−1)·E[σ²_B], with correction 0 E[σ²_B], at the model's weights."""
    means: list[list[Any]] = [[] for _ in norms]
    variances: list[list[Any]] = [[] for _ in norms]
    with torch.no_grad():
        for rows in parts:
            model(data.x[rows])  # in training mode
            unbiased = len(rows) / (len(rows) - 1)
            for i, norm in enumerate(norms):
                means[i].append(norm.running_mean.double().numpy())
                variances[i].append(norm.running_var.double().numpy() / (1 if correction else unbiased))
    return [(np.mean(mean, 0), np.mean(var, 0)) for mean, var in zip(means, variances, strict=True)]


def exact(model: nn.Sequential, data: Data, size: int) -> Statistics:
    """Of each norm in turn, those before it normalizing with theirs: chunks merged, never all of the set at once."""
    found: Statistics = []
    chunks = list(data.x.split(size))
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm1d):
                moments = fn.Moments()
                for z in chunks:
                    moments.push(z.numpy())
                found.append((moments.mean, moments.variance()))
                mean, var = (torch.from_numpy(a).float() for a in found[-1])
                chunks = [
                    nn.functional.batch_norm(z, mean, var, module.weight, module.bias, eps=module.eps) for z in chunks
                ]
            else:
                chunks = [module(z) for z in chunks]
    return found


def off(statistics: Statistics, true: Statistics) -> tuple[float, float]:
    """Of means, over σ, and of variances, over σ²: the root mean square over layers and features."""
    means = np.concatenate([(m - mean) / np.sqrt(v) for (m, _), (mean, v) in zip(statistics, true, strict=True)])
    variances = np.concatenate([v / var - 1 for (_, v), (_, var) in zip(statistics, true, strict=True)])
    return float(np.sqrt(np.mean(means**2))), float(np.sqrt(np.mean(variances**2)))


def accuracy(model: nn.Module, norms: list[Any], data: Data, statistics: Statistics) -> float:
    for norm, (mean, var) in zip(norms, statistics, strict=True):
        norm.running_mean.copy_(torch.from_numpy(mean))
        norm.running_var.copy_(torch.from_numpy(var))
    return evaluate(model, data.test_x, data.test_y)[1]


def draw(found: Found) -> Any:
    figure, axes = panels(2, 2, width=10, height=3.0)
    for row, size in enumerate(SIZES):
        of_size = found[str(size)]
        for axis, key in zip(axes[2 * row : 2 * row + 2], ("mean", "variance"), strict=True):
            for name, color, marker in zip(NAMES[:-1], COLORS, MARKERS, strict=False):
                by_step = np.maximum(np.array(of_size[name][key]).T, 1e-8).tolist()
                curve(axis, of_size["at"], by_step, color, name, marker=marker)
            what = "error of the mean / σ" if key == "mean" else "error of the variance / σ²"
            axis.set(yscale="log", xlabel="step", ylabel=what, title=f"batches of {size}")
            most = number(float(np.max(of_size[EXACT][key])))
            axis.annotate(f"{EXACT}: at most {most}", (1, 0.97), xycoords="axes fraction", ha="right", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def claims(found: Found) -> list[Claim]:
    last = {size: {name: {key: [series[-1] for series in found[str(size)][name][key]]
                          for key in KEYS} for name in NAMES} for size in SIZES}  # fmt: skip
    usual = AVERAGES[0.1]

    def told(size: int, name: str) -> str:
        return f"{spread(last[size][name]['mean'])} and {spread(last[size][name]['variance'])}"

    def better(one: str, other: str, key: str) -> list[bool]:
        return [a < b for size in SIZES for a, b in zip(last[size][one][key], last[size][other][key], strict=True)]

    return [
        Claim(
            "An exponentially weighted average, kept in training, is good enough at test time.",
            "Test accuracy at the end, with momentum 0.1 and with the truth: "
            + "; ".join(
                f"{spread(last[size][usual]['accuracy'], percent)} and "
                f"{spread(found[str(size)]['accuracy of the truth'], percent)} (batches of {size})"
                for size in SIZES
            )
            + ". It is checked to be at most one point below.",
            [a >= b - 0.01 for size in SIZES
             for a, b in zip(last[size][usual]["accuracy"], found[str(size)]["accuracy of the truth"], strict=True)],
        ),
        Claim(
            "The paper's estimator is closer to the truth than the exponentially weighted average.",
            "Errors of mean and variance at the end: "
            + "; ".join(f"{told(size, PAPER)}, average {told(size, usual)} (batches of {size})" for size in SIZES)
            + ".",
            better(PAPER, usual, "mean") + better(PAPER, usual, "variance"),
        ),
        Claim(
            "The factor m/(m−1) brings E[σ²_B] closer to the truth.",
            "Error of the variance at the end with it and without: "
            + "; ".join(
                f"{spread(last[size][PAPER]['first'])} and {spread(last[size][BIASED]['first'])} in the first layer, "
                f"{spread(last[size][PAPER]['variance'])} and {spread(last[size][BIASED]['variance'])} in all "
                f"(batches of {size})"
                for size in SIZES
            )
            + ". Later layers get inputs that the earlier ones normalized with each batch's own statistics.",
            better(PAPER, BIASED, "first") + better(PAPER, BIASED, "variance"),
        ),
        Claim(
            "A last pass over the training set gives the statistics exactly, layer by layer.",
            "Errors of mean and variance: " + "; ".join(f"{told(s, EXACT)} (chunks of {s})" for s in SIZES)
            + f". Both are checked to be below {number(1e-4)}.",
            [max(a, b) < 1e-4 for s in SIZES
             for a, b in zip(last[s][EXACT]["mean"], last[s][EXACT]["variance"], strict=True)],
        ),
    ]  # fmt: skip
