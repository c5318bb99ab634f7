"""``fusednorm info``: what is installed, and what it chose on this machine."""

from __future__ import annotations

import argparse
import json
import platform
from typing import Any

import fusednorm
from fusednorm.bench.environment import versions

LIBRARIES = ("numpy", "ml_dtypes", "rich", "matplotlib", "scikit-learn", "threadpoolctl", "torch", "cupy", "jax")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="version, compiler, instruction sets, threads, CUDA, libraries found",
        description="Version, compiler, instruction sets, threads, the state of CUDA with its reason, and which "
        "optional libraries are installed. Worth pasting into every bug report.",
    )
    parser.add_argument("--json", action="store_true", help="as JSON, for machines")
    parser.set_defaults(run=run)


def better_kernels(info: dict[str, Any]) -> dict[str, str]:
    """A line where there are no kernels for the best instruction set of this machine."""
    if info["isa_best"] in info["isa_built"]:
        return {}
    return {
        "faster": f"this machine runs {info['isa_best']}, for which no kernels were built: install anew here, or build "
        "with FUSEDNORM_KERNELS=all"
    }


def run(args: argparse.Namespace) -> int:
    info = fusednorm.build_info() | {"python": platform.python_version(), "libraries": versions(LIBRARIES)}
    if args.json:
        print(json.dumps(info, indent=2))
        return 0
    openmp = f"OpenMP {info['openmp']}" if info["openmp"] else "built without OpenMP"
    lines = {
        "fusednorm": info["version"],
        "Python": info["python"],
        "compiler": info["compiler"],
        "instruction sets": f"{info['isa']} chosen; runnable here: {' '.join(info['isa_runnable'])}; "
        f"built: {' '.join(info['isa_built'])} (FUSEDNORM_ISA overrides)",
        **better_kernels(info),
        "threads": f"{info['threads']}, {openmp}",
        "CUDA": info["cuda"],
        **{name: version or "absent" for name, version in info["libraries"].items()},
    }
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")
    return 0
