"""`python -m examples.study all`, or some of its experiments by name. Results, figures and the page that tells what
holds go to docs/study; `--redraw` writes figures and page anew from results that are there."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from fusednorm.cli.extras import Missing, positive, require

EXPERIMENTS = ("rates", "scale", "depth", "batches", "shift", "population", "norms", "optimizers", "tuning")
LIBRARIES = {name: name for name in ("torch", "optuna", "matplotlib", "rich")} | {"sklearn": "scikit-learn"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.study", description=__doc__)
    parser.add_argument("experiment", nargs="+", choices=("all", *EXPERIMENTS))
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="repetitions; default: 3")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that all of it runs")
    parser.add_argument("--output", type=Path, default=Path("docs/study"), metavar="DIR", help="default: docs/study")
    parser.add_argument("--redraw", action="store_true", help="figures and page from the results in DIR")
    args = parser.parse_args(arguments)
    try:
        require("study", "study", **LIBRARIES)
    except Missing as missing:
        parser.error(str(missing).replace("fusednorm study", "the study"))

    import fusednorm as fn
    import torch
    from fusednorm.bench import environment

    from . import report
    from .common import Settings, rounded

    torch.set_num_threads(1)  # small tensors; and results do not depend on how many there are
    fn.set_num_threads(1)
    args.output.mkdir(parents=True, exist_ok=True)
    settings = Settings(args.seeds, args.quick)
    for name in EXPERIMENTS if "all" in args.experiment else dict.fromkeys(args.experiment):
        experiment = importlib.import_module(f".{name}", __package__)
        path = args.output / f"{name}.json"
        if not args.redraw:
            start = process_time()
            found = rounded(experiment.measure(settings))
            record = {
                "environment": report.kept(environment()),
                "seeds": args.seeds,
                "quick": args.quick,
                "cpu_seconds": round(process_time() - start),
                "found": found,
            }
            path.write_text(json.dumps(record, ensure_ascii=False) + "\n")
        report.figure(experiment, path)
        print(f"\n{report.section(experiment, path)}", flush=True)
    (args.output / "README.md").write_text(report.page(args.output, EXPERIMENTS))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
