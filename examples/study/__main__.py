"""`python -m examples.study all`, or some of its experiments by name, on both sources of data or on one. Results,
figures and the pages that tell what holds go to docs/study; `--redraw` writes figures and pages anew from results that
are there."""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from time import process_time

from fusednorm.cli.extras import Missing, positive, require

EXPERIMENTS = ("rates", "scale", "depth", "batches", "shift", "population", "norms", "optimizers", "tuning")
LIBRARIES = {name: name for name in ("torch", "optuna", "matplotlib", "mlxtend", "rich")} | {"sklearn": "scikit-learn"}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m examples.study", description=__doc__)
    parser.add_argument("experiment", nargs="+", choices=("all", *EXPERIMENTS))
    parser.add_argument("--data", choices=("digits", "mnist", "both"), default="both", help="default: both")
    parser.add_argument("--seeds", type=positive, default=3, metavar="N", help="repetitions; default: 3")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that all of it runs")
    parser.add_argument("--output", type=Path, default=Path("docs/study"), metavar="DIR", help="default: docs/study")
    parser.add_argument("--redraw", action="store_true", help="figures and pages from the results in DIR")
    args = parser.parse_args(arguments)
    try:
        require("study", "study", **LIBRARIES)
    except Missing as missing:
        parser.error(str(missing).replace("fusednorm study", "the study"))

    import fusednorm as fn
    import torch
    from fusednorm.bench import environment

    from . import report
    from .common import SOURCES, Settings, images, rounded

    torch.set_num_threads(1)  # small tensors; and results do not depend on how many there are
    fn.set_num_threads(1)
    names = EXPERIMENTS if "all" in args.experiment else dict.fromkeys(args.experiment)
    for data in SOURCES if args.data == "both" else (args.data,):
        settings, folder = Settings(args.seeds, args.quick, data), report.folder_of(args.output, data)
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            experiment = importlib.import_module(f".{name}", __package__)
            path = folder / f"{name}.json"
            if not args.redraw:
                images(data)  # read before the clock starts
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
            if path.exists():
                report.figure(experiment, path)
                print(f"\n{SOURCES[data].title}\n\n{report.section(experiment, path, 'examples/study')}", flush=True)
    report.write(args.output, EXPERIMENTS, SOURCES)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
