"""Whole networks in training: ResNet-50 and ConvNeXt-T with torch.nn's norms, with these, and, for ResNet-50, with
those that take the residual addition and ReLU along. `python examples/resnet.py` takes many minutes, with --quick two.

Forms start from the same weights, get the same images, and take their steps in turn, so that a slow moment of the
machine hits all of them. Each is in a process of its own, as a training is: what a step costs depends much on whether
the C library finds memory for its results in the heap or maps it anew, and models that share a heap change that for
each other. bfloat16 is torch.autocast's.

**The check.** Two norms that are both right round differently: each result to half a unit in the last place, so that
the two lie within one relative eps of each other. What a training makes of such differences is measured beside the
forms: by a control, torch.nn's model whose norms' results are multiplied by 1 + eps or 1 - eps, at random, and so their
gradients. It moves the logits z of a sample by |Δz|, and cross entropy moves by √2·|Δz| at most, since its gradient is
softmax(z) minus a unit vector. The mean of that over the batch, the largest so far, and one eps of the loss for its own
rounding, is the tolerance for the loss of a form.

**Where the time goes** is of one step more, under torch.profiler: what forward and backward call, summed by kind.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import fusednorm as fn
import fusednorm.torch as fnt
import torch
from fusednorm.bench import environment, ratio, spread
from fusednorm.cli.extras import positive
from torch import Tensor, nn
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile, record_function

CLASSES = 10
FORMATS = {"first": torch.contiguous_format, "last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
QUICK = {"steps": 2, "batch": 4, "size": 64}

# Of what forward and backward call; the rest is "other".
KINDS = {
    "norms": ("aten::batch_norm", "aten::layer_norm", "_Norm", "_NormBackward", "NativeBatchNormBackward0",
              "NativeLayerNormBackward0"),
    "add, ReLU": ("aten::add_", "aten::relu_", "AddBackward0", "ReluBackward0"),
    "products": ("aten::conv2d", "ConvolutionBackward0", "aten::linear", "AddmmBackward0", "ViewBackward0"),
}  # fmt: skip


class Bottleneck(nn.Module):
    """ResNet's block, its stride in the 3×3 convolution."""

    norm: type[nn.Module] = nn.BatchNorm2d

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = self.norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = self.norm(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = self.norm(4 * width)
        self.shortcut = nn.Sequential()
        if stride > 1 or channels != 4 * width:
            conv = nn.Conv2d(channels, 4 * width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu_(self.bn1(self.conv1(x)))
        y = functional.relu_(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y += self.shortcut(x)
        return functional.relu_(y)


class FusedBottleneck(Bottleneck):
    """The same, with the same names, in fewer passes over memory."""

    norm = fnt.BatchNormAct

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn1(self.conv1(x))
        y = self.bn2(self.conv2(y))
        return self.bn3(self.conv3(y), self.shortcut(x))


class ResNet50(nn.Sequential):
    def __init__(self, block: type[Bottleneck] = Bottleneck) -> None:
        stem = [nn.Conv2d(3, 64, 7, 2, padding=3, bias=False), block.norm(64)]
        stem += [nn.ReLU(inplace=True)] if block is Bottleneck else []
        blocks, channels = [], 64
        for width, depth in ((64, 3), (128, 4), (256, 6), (512, 3)):
            for i in range(depth):
                blocks.append(block(channels, width, 2 if i == 0 and width > 64 else 1))
                channels = 4 * width
        head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, CLASSES)
        super().__init__(nn.Sequential(*stem), nn.MaxPool2d(3, 2, padding=1), nn.Sequential(*blocks), *head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(module, Bottleneck):
                # Near 0, where trainings start it (Goyal et al., 2017): at 1 a difference in rounding grows beyond all
                # bounds within a step, and at 0 the norms before it would not matter to the first loss.
                nn.init.constant_(module.bn3.weight, 0.2)


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class ConvNeXtT(nn.Sequential):
    """Without the layer scale, which starts at 1e-6: a norm in a block would hardly matter to the loss."""

    def __init__(self) -> None:
        to_last, to_first = Permute(0, 2, 3, 1), Permute(0, 3, 1, 2)

        def norm(channels: int) -> list[nn.Module]:
            return [to_last, nn.LayerNorm(channels, eps=1e-6), to_first]

        layers: list[nn.Module] = [nn.Conv2d(3, 96, 4, 4), *norm(96)]
        for channels, depth in ((96, 3), (192, 3), (384, 9), (768, 3)):
            if channels > 96:
                layers += [*norm(channels // 2), nn.Conv2d(channels // 2, channels, 2, 2)]
            for _ in range(depth):
                conv = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
                mlp = nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels)
                layers.append(Residual(conv, to_last, nn.LayerNorm(channels, eps=1e-6), *mlp, to_first))
        head = nn.LayerNorm(768, eps=1e-6), nn.Linear(768, CLASSES)
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)


MODELS: dict[str, Callable[[], nn.Module]] = {"resnet50": ResNet50, "convnext": ConvNeXtT}
NORMS = nn.BatchNorm2d, nn.LayerNorm


class Rounding:
    """A hook that multiplies what a module returns by 1 + eps or 1 - eps, at random."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(1)

    def __call__(self, module: nn.Module, inputs: Any, y: Tensor) -> Tensor:
        signs = torch.randint(0, 2, y.shape, generator=self.generator, dtype=torch.int8).mul_(2).sub_(1)
        return y * (1 + torch.finfo(y.dtype).eps * signs).to(y.dtype)


@dataclass
class Form:
    """A model in training."""

    model: nn.Module
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9)  # as a warm-up begins

    def step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """The logits, in float32, the loss, and the seconds that it took."""
        start = perf_counter()
        self.optimizer.zero_grad()
        with (
            record_function("forward"),
            torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.dtype is torch.bfloat16),
        ):
            logits = self.model(images).float()
        loss = functional.cross_entropy(logits, labels)
        with record_function("backward"):
            loss.backward()
        self.optimizer.step()
        seconds = perf_counter() - start
        return {"logits": logits.tolist(), "loss": loss.item(), "seconds": seconds}


def form_of(form: str, name: str, layout: str, dtype: str, eps: float | None) -> Form:
    """A form of a model, whose weights are the same in all. eps: of its norms, where they are not torch.nn's."""
    torch.manual_seed(0)
    plain = model = MODELS[name]()
    if form == "BatchNormAct":
        model = ResNet50(FusedBottleneck)
        model.load_state_dict(plain.state_dict())
    if form in ("converted", "BatchNormAct"):
        fnt.convert(model)
        for module in model.modules():
            if eps is not None and hasattr(module, "eps"):
                module.eps = eps
    if form == "control":
        rounding = Rounding()
        for module in model.modules():
            if isinstance(module, NORMS):
                module.register_forward_hook(rounding)
    return Form(model.to(memory_format=FORMATS[layout]), DTYPES[dtype])


def serve(pipe: Connection, threads: int | None, form: str, run: dict[str, Any], eps: float | None) -> None:
    """A form's process: takes a step for each request, or a profiled one."""
    if threads:
        torch.set_num_threads(threads)
        fn.set_num_threads(threads)
    trained = form_of(form, run["model"], run["layout"], run["dtype"], eps)
    generator = torch.Generator().manual_seed(0)
    for request in iter(pipe.recv, "stop"):
        images = batch(generator, run["batch"], run["size"], run["layout"])
        pipe.send(trained.step(*images) if request == "step" else profiled(trained, *images))


class Process:
    """A form in a process of its own."""

    def __init__(self, *how: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, *how), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead process is an EOFError here, not silence

    def __call__(self, request: str) -> Any:
        self.pipe.send(request)
        return self.pipe.recv()

    def stop(self) -> None:
        self.pipe.send("stop")
        self.process.join()


def batch(generator: torch.Generator, count: int, size: int, layout: str) -> tuple[Tensor, Tensor]:
    """Noisy stripes, whose direction is the class; and the classes."""
    labels = torch.randint(CLASSES, (count,), generator=generator)
    angle = math.pi / CLASSES * labels[:, None, None, None]
    at = torch.linspace(-1, 1, size)
    phase = 2 * math.pi * torch.rand(count, 3, 1, 1, generator=generator)
    stripes = torch.cos(20 * (at[:, None] * torch.cos(angle) + at * torch.sin(angle)) + phase)
    images = stripes + 0.5 * torch.randn(count, 3, size, size, generator=generator)
    return images.contiguous(memory_format=FORMATS[layout]), labels


def train(
    name: str, layout: str, dtype: str, *, steps: int, count: int, size: int, threads: int | None = None,
    eps: float | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What :func:`main` prints and writes of one model in one layout and dtype. A first step is not timed. eps: of the
    norms of this library, to see it found out."""
    run = {"model": name, "layout": layout, "dtype": dtype, "batch": count, "size": size, "steps": steps}
    names = ["torch.nn", "converted", *(["BatchNormAct"] if name == "resnet50" else []), "control"]
    forms = {form: Process(threads, form, run, eps) for form in names}
    taken: dict[str, list[dict[str, Any]]] = {form: [] for form in names}
    moved, tolerance = 0.0, []
    for i in range(steps + 1):
        for form in names[i % len(names) :] + names[: i % len(names)]:
            taken[form].append(forms[form]("step"))
        control, plain = (torch.tensor(taken[form][-1]["logits"]) for form in ("control", "torch.nn"))
        moved = max(moved, (control - plain).norm(dim=1).mean().item())
        tolerance.append(math.sqrt(2) * moved + torch.finfo(torch.float32).eps * taken["torch.nn"][-1]["loss"])
    forms.pop("control").stop()
    losses = {form: [step["loss"] for step in taken[form]] for form in forms}
    ms = {form: [1e3 * step["seconds"] for step in taken[form][1:]] for form in forms}
    profiles = {form: process("profile") for form, process in forms.items()}
    for process in forms.values():
        process.stop()
    within = {form: all(abs(a - b) <= most for a, b, most in zip(own, losses["torch.nn"], tolerance, strict=True))
              for form, own in losses.items()}  # fmt: skip
    return {
        **run,
        "losses": losses,
        "tolerance": tolerance,
        "wrong": [form for form, right in within.items() if not right],
        "ms": {form: {**spread(each), "steps": each} for form, each in ms.items()},
        "ratios": {f"torch.nn/{form}": ratio(ms["torch.nn"], each) for form, each in ms.items() if form != "torch.nn"},
        "profile_ms": profiles,
    }


def profiled(form: Form, images: Tensor, labels: Tensor) -> dict[str, float]:
    """Milliseconds of one step by kind, with the profiler's own cost."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        form.step(images, labels)
    ms = dict.fromkeys((*KINDS, "other"), 0.0)
    for event in seen.events():
        if event.cpu_parent is not None and event.cpu_parent.name in ("forward", "backward"):
            call = event.name.removeprefix("autograd::engine::evaluate_function: ")
            ms[next((kind for kind, calls in KINDS.items() if call in calls), "other")] += event.cpu_time_total / 1e3
    return ms


def show(run: dict[str, Any]) -> None:
    print(f"\n{run['model']}, {run['batch']}×3×{run['size']}×{run['size']}, channels {run['layout']}, {run['dtype']}, "
          f"{run['steps']} steps\n")  # fmt: skip
    print(f"| form | ms a step | times as fast | {' | '.join(KINDS)} | other | norms' share | loss, last step | "
          "off, tolerance |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")  # fmt: skip
    for form, ms in run["ms"].items():
        faster = run["ratios"].get(f"torch.nn/{form}")
        kinds = run["profile_ms"][form]
        share = kinds["norms"] / sum(kinds.values())
        losses = run["losses"][form]
        off = max(abs(a - b) for a, b in zip(losses, run["losses"]["torch.nn"], strict=True))
        cells = [
            form,
            f"{ms['median']:.0f} ±{(ms['p90'] - ms['p10']) / 2:.0f}",
            "–" if faster is None else f"{faster['median']:.2f} ±{(faster['p90'] - faster['p10']) / 2:.2f}",
            *(f"{each:.0f}" for each in kinds.values()),
            f"{share:.0%}",
            f"{losses[-1]:.5f}",
            f"{off:.1e}, {run['tolerance'][-1]:.1e}{' WRONG' if form in run['wrong'] else ''}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Whole networks in training, with torch.nn's norms and with these.")
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layout", nargs="+", choices=FORMATS, default=list(FORMATS), help="channels first or last")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--steps", type=positive, metavar="N", help="timed ones; default: 5")
    parser.add_argument("--batch", type=positive, metavar="N", help="default: 16")
    parser.add_argument("--size", type=positive, metavar="N", help="of images; default: 224")
    parser.add_argument("--threads", type=positive, metavar="N", help="of PyTorch and of fusednorm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures; those in FILE are kept")
    parser.add_argument("--quick", action="store_true", help="few steps with small images")
    args = parser.parse_args(arguments)
    usual = QUICK if args.quick else {"steps": 5, "batch": 16, "size": 224}
    steps, count, size = (getattr(args, name) or usual[name] for name in ("steps", "batch", "size"))
    if args.threads:  # here for what `environment` tells
        torch.set_num_threads(args.threads)
        fn.set_num_threads(args.threads)
    where = environment()
    where["malloc"] = {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")}
    print("; ".join(f"{key} {value}" for key, value in where.items()))
    runs = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    right = True
    for name, layout, dtype in ((n, la, d) for n in args.model for d in args.dtype for la in args.layout):
        run = train(name, layout, dtype, steps=steps, count=count, size=size, threads=args.threads)
        show(run)
        right &= not run["wrong"]
        runs.append({"environment": where, **run})
        if args.json:
            args.json.write_text(json.dumps(runs, indent=1) + "\n")
    print(
        "\nTimes: medians of steps in turn; ± is half the distance between the 10th and the 90th percentile. Kinds:\n"
        "ms of one profiled step. off: how far the losses are from torch.nn's at most; the last step's tolerance."
    )
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
