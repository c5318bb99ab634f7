"""``fusednorm demo``: the library at work on real digits, then against the clock and against float64."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import fusednorm
from fusednorm import arrays, bench
from fusednorm.cli.demo import network
from fusednorm.cli.demo.optimizers import OPTIMIZERS
from fusednorm.cli.extras import add_device, positive, require, require_device, require_writable, writing
from fusednorm.testing.cases import Array, Case, expected, make

if TYPE_CHECKING:
    from rich.console import Console

EPOCHS, CONTROL_EPOCHS = 60, 30
TRAINED_ON = 1347  # three quarters of the 1,797 digits

# Seconds that an epoch stays on a terminal. It takes less than a tenth of that: too fast to watch.
PACE = 0.08


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="see it work: networks trained with and without batch norm, speed, accuracy",
        description="Trains a network of six sigmoid layers on real handwritten digits with and without batch norm, "
        "the same weights, batches and optimizer for both; then a shallow ReLU network, where both do well. Then one "
        "training step of a large layer against NumPy and PyTorch (if installed), and the accuracy of both against "
        "float64. Takes less than a minute and saves a figure. With --device cuda all of it is on the GPU.",
    )
    add_device(parser)
    parser.add_argument("--optimizer", choices=sorted(OPTIMIZERS), default="sgd", help="default: sgd, plain descent")
    parser.add_argument("--epochs", type=positive, default=EPOCHS, metavar="N", help=f"default: {EPOCHS}")
    parser.add_argument("--learning-rate", type=float, metavar="RATE", help="default: the optimizer's own")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights, batches and the held-out digits")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="folder for the figure, made if missing; default: here",
    )
    parser.add_argument("--skip-timing", action="store_true", help="train only")
    parser.add_argument("--json", action="store_true", help="the figures as JSON; what is shown goes to standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    require_device("demo", args.device)
    require("demo", "demo", rich="rich", matplotlib="matplotlib", sklearn="scikit-learn")
    from rich.console import Console

    from fusednorm.cli.demo import show

    path = args.output / "fusednorm-demo.png"
    require_writable("demo", path)
    console = Console(highlight=False, stderr=args.json)
    digits = load_digits(args.seed).to(args.device)
    optimizer = OPTIMIZERS[args.optimizer]
    rate = optimizer.default_rate if args.learning_rate is None else args.learning_rate
    console.print(
        f"[bold]Handwritten digits[/], {len(digits.images)} to learn from, {len(digits.held_out_images)} held out. "
        f"{optimizer.__name__}, learning rate {rate:g}, seed {args.seed}, {args.device}.\n",
        soft_wrap=True,
    )
    histories, networks = {}, {}
    # Layers of 64 × 100 are too small to share; and the threads of our kernels and of NumPy's matrix products, in turn
    # waiting for work on the same cores, would be in each other's way. (threadpoolctl comes with scikit-learn.)
    with importlib.import_module("threadpoolctl").threadpool_limits(1), arrays.on(args.device):
        for title, depth, activation, epochs in (
            ("Six sigmoid layers", 6, "sigmoid", args.epochs),
            ("Two ReLU layers: where batch norm is not needed", 2, "relu", min(CONTROL_EPOCHS, args.epochs)),
        ):
            console.print(f"[bold]{title}[/], accuracy on the held-out digits")
            pair = {
                name: network.network(depth, activation, name == "normalized", args.seed, args.device)
                for name in show.NAMES
            }
            runs = {
                name: network.train(each, optimizer(each.parameters(), rate), digits, epochs, args.seed)
                for name, each in pair.items()
            }
            histories[title], networks[title] = _contest(console, runs, epochs), pair
        deep = networks["Six sigmoid layers"]
        images = digits.held_out_images
        guesses = {name: arrays.moved(network.predict(trained, images), "cpu") for name, trained in deep.items()}

    console.print("[bold]Held-out digits[/], and what the two deep networks take them for\n")
    first = digits.to("cpu")
    show.digits(
        console,
        first.held_out_images[:8],
        first.held_out_labels[:8],
        {name: guess[:8] for name, guess in guesses.items()},
    )
    times = [] if args.skip_timing else _times(console, args.device)
    errors = [] if args.skip_timing else _accuracy(console, args.device)
    if args.json:
        trained = {
            title: {name: [epoch._asdict() for epoch in epochs] for name, epochs in pair.items()}
            for title, pair in histories.items()
        }
        found = {"build": fusednorm.build_info(), "device": args.device, "seed": args.seed, "training": trained}
        print(json.dumps(found | {"times": times, "errors": errors, "figure": str(path.resolve())}, indent=2))
    with writing("demo", path):
        show.figure(histories, path)
    console.print(f"Training curves: {path.resolve()}", soft_wrap=True)
    return 0


def load_digits(seed: int) -> network.Digits:
    """scikit-learn's digits, 8 × 8 pixels, shuffled and split."""
    images, labels = importlib.import_module("sklearn.datasets").load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(images))
    images, labels = (images[order] / 16).astype(np.float32), labels[order]
    return network.Digits(images[:TRAINED_ON], labels[:TRAINED_ON], images[TRAINED_ON:], labels[TRAINED_ON:])


def _contest(console: Console, runs: dict[str, Iterator[network.Epoch]], epochs: int) -> dict[str, list[network.Epoch]]:
    """Train side by side, an epoch in turn; live on a terminal, else a line now and then."""
    from rich.live import Live

    from fusednorm.cli.demo import show

    histories: dict[str, list[network.Epoch]] = {name: [] for name in runs}
    start = time.perf_counter()
    spent = 0.0
    with Live(console=console, auto_refresh=False, transient=not console.is_terminal) as live:
        for epoch in range(1, epochs + 1):
            before = time.perf_counter()
            for name, steps in runs.items():
                histories[name].append(next(steps))
            spent += time.perf_counter() - before
            if console.is_terminal:
                live.update(show.curves(histories, epochs), refresh=True)
                time.sleep(max(0.0, start + epoch * PACE - time.perf_counter()))
            elif epoch % 10 == 0 or epoch in (1, epochs):
                console.print(show.line(histories), soft_wrap=True)
    console.print(f"[dim]{spent:.1f} s of computing for both[/]\n")
    return histories


def _times(console: Console, device: str) -> list[dict[str, Any]]:
    """One training step of a large layer, forward and backward, beside others and beside copying the tensor; as rows of
    `bench`."""
    shape = (32, 64, 112, 112)
    cpu = device == "cpu"
    console.print(
        f"[bold]Forward and backward of one layer[/], {'×'.join(map(str, shape))} float32, "
        f"{np.prod(shape) * 4 / 1e6:.0f} MB, {f'{fusednorm.get_num_threads()} threads' if cpu else device}",
        soft_wrap=True,
    )
    others = (
        {"torch": "PyTorch", "numpy": "NumPy, float32, from the formulas"}
        if cpu
        else {"native": "PyTorch", "cudnn": "PyTorch with cuDNN", "cupy": "CuPy, from the formulas"}
    )
    machine = bench.Cpu(with_numpy=True) if cpu else bench.Gpu(device)
    with console.status("A moment, results are checked first"):
        rows: list[dict[str, Any]] = bench.run([Case(name="demo", shape=shape)], machine=machine)["rows"]
    forward, backward = rows
    wrong = forward["wrong"] + backward["wrong"]
    if wrong:
        console.print(f"[red]not timed, the results are wrong: {'; '.join(wrong)}[/]")
        return rows
    console.print(f"[dim]{'milliseconds':<34}{'forward':>10}{'backward':>10}{'both':>10}{'/ ours':>10}[/]")
    ours = forward["ms"]["ours"]["median"] + backward["ms"]["ours"]["median"]
    digits = 1 if cpu else 3
    for name, text in ({"ours": "fusednorm"} | others).items():
        if name not in forward["ms"]:
            console.print(f"{text:<34}{'absent':>10}", style="dim")
            continue
        each = [row["ms"][name]["median"] for row in (forward, backward)]
        numbers = "".join(f"{ms:>10.{digits}f}" for ms in (*each, sum(each)))
        console.print(f"{text:<34}{numbers}{sum(each) / ours:>10.1f}", style="bold" if name == "ours" else None)
    console.print(f"{'copying the tensor once':<34}{forward['ms']['copy']['median']:>10.{digits}f}")
    console.print()
    return rows


def _accuracy(console: Console, device: str) -> list[dict[str, Any]]:
    """The error of y against float64, where the mean is 0 and where it is a million standard deviations away."""
    torch = importlib.import_module("torch") if importlib.util.find_spec("torch") else None
    if torch and device != "cpu" and not torch.cuda.is_available():
        torch = None
    console.print("[bold]Largest error of y[/] against float64, 16×32×56×56 float32")
    console.print(f"[dim]{'':<34}{'fusednorm':>12}{'PyTorch':>12}[/]")
    found = []
    for layout, shape, axis in (("channels first", (16, 32, 56, 56), 1), ("channels last", (16, 56, 56, 32), -1)):
        for offset in (0.0, 1e6):
            case = Case(name="demo", shape=shape, axis=axis, offset=offset, affine=False, running=False)
            inputs = make(case)
            true = expected(case, inputs).y

            def error(y: Array, true: Array = true) -> float:
                return float(np.max(np.abs(y - true)))

            y = arrays.moved(fusednorm.batch_norm_forward(arrays.moved(inputs.x, device), axis=axis)[0], "cpu")
            errors = {"fusednorm": error(y)}
            if torch:
                x = torch.moveaxis(torch.from_numpy(inputs.x).to(device), axis, 1)
                y = torch.nn.functional.batch_norm(x, None, None, training=True)
                errors["PyTorch"] = error(torch.moveaxis(y, 1, axis).cpu().numpy())
            theirs = f"{errors['PyTorch']:>12.1e}" if torch else f"{'absent':>12}"
            console.print(f"{layout}, mean/σ = {offset:<7g}".ljust(34) + f"{errors['fusednorm']:>12.1e}" + theirs)
            found.append({"layout": layout, "mean_over_sigma": offset, "largest_error": errors})
    console.print()
    return found
