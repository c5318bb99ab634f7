"""fusednorm.torch's BatchNorm beside torch.nn's, in training: python benchmarks/torch_modules.py [--repeat N] …

Results and gradients are checked against torch.nn's in float64 first; what is wrong is not timed. Prints a Markdown
table of forward and backward, and what a module costs beside the function it calls; --json FILE keeps all.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fusednorm as fn
import fusednorm.torch as fnt
import torch
from fusednorm.bench import Contender, environment, interleaved, ratio, spread
from fusednorm.cli.extras import positive
from torch import Tensor, nn

LAYOUTS = {"first": torch.contiguous_format, "last": torch.channels_last}
SHAPES = ((64, 32), (256, 512), (32, 64, 14, 14), (32, 64, 28, 28), (32, 64, 56, 56), (32, 256, 56, 56))
CASES = [(shape, layout) for shape in SHAPES for layout in LAYOUTS if len(shape) == 4 or layout == "first"]


def trained(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """y and the gradients of x, weight and bias."""
    y = module(x)
    return y, *torch.autograd.grad(y, (x, *module.parameters()), dy)


def is_right(ours: nn.Module, plain: nn.Module, x: Tensor, dy: Tensor) -> bool:
    """To 1e-4 of each result's largest number."""
    x64 = x.detach().double().requires_grad_()
    pairs = zip(trained(ours, x, dy), trained(copy.deepcopy(plain).double(), x64, dy.double()), strict=True)
    return all(bool((got - want).abs().max() < 1e-4 * want.abs().max()) for got, want in pairs)


def overhead(repeat: int) -> dict[str, dict[str, float]]:
    """µs of a call with 64×32 numbers: the module in evaluation, and the function with NumPy's arrays."""
    module = fnt.BatchNorm1d(32).eval().requires_grad_(False)
    x = torch.randn(64, 32)
    a, mean, var, weight, bias = (t.numpy() for t in (x, *module.buffers(), *module.parameters()) if t.ndim)

    contenders = [
        Contender("module", lambda: module(x)),
        Contender("function", lambda: fn.batch_norm(a, mean, var, weight, bias)),
    ]
    return {name: spread([1e3 * one for one in ms]) for name, ms in interleaved(contenders, repeat).items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=positive, default=9)
    parser.add_argument("--threads", type=positive, help="of PyTorch and of fusednorm")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
        fn.set_num_threads(options.threads)
    where, rows = environment(), []
    print("| x | channels | torch.nn ms | ours ms | torch.nn/ours |\n|---|---|---:|---:|---:|")
    for shape, layout in CASES:
        torch.manual_seed(0)
        x, dy = (torch.randn(shape) for _ in range(2))
        if len(shape) == 4:
            x, dy = (t.contiguous(memory_format=LAYOUTS[layout]) for t in (x, dy))
        x.requires_grad_()
        plain = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])
        ours = copy.deepcopy(plain)
        fnt.convert(ours)
        if not is_right(ours, plain, x, dy):
            print(f"{shape}, channels {layout}, is wrong, so not timed", file=sys.stderr)
            return 1
        calls: dict[str, Callable[[], Any]] = {
            "torch.nn": lambda plain=plain, x=x, dy=dy: trained(plain, x, dy),  # type: ignore[misc]
            "ours": lambda ours=ours, x=x, dy=dy: trained(ours, x, dy),  # type: ignore[misc]
        }
        ms = interleaved([Contender(name, call) for name, call in calls.items()], options.repeat)
        row = {"shape": shape, "layout": layout, "ms": {name: spread(times) for name, times in ms.items()}}
        row["ratio"] = quotient = ratio(ms["torch.nn"], ms["ours"])
        rows.append(row)
        medians = " | ".join(f"{row['ms'][name]['median']:.3g}" for name in ms)
        half = (quotient["p90"] - quotient["p10"]) / 2
        print(
            f"| {'×'.join(map(str, shape))} | {layout} | {medians} | {quotient['median']:.2f} ±{half:.2f} |", flush=True
        )
    alone = overhead(max(options.repeat, 50))
    print("\nA call in evaluation, 64×32, µs: " + ", ".join(f"{name} {t['median']:.1f}" for name, t in alone.items()))
    print(f"float32; {where['cpu']}, {where['threads']} threads, {where['isa']}; {where['versions']}")
    if options.json:
        found = {"environment": where, "rows": rows, "call_us": alone}
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
