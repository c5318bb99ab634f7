"""Where numbers were taken: the machine, the libraries, and what was chosen on them."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import fusednorm


def versions(libraries: Sequence[str]) -> dict[str, str | None]:
    """Versions of installed distributions, None for absent ones. Nothing is imported: PyTorch would take seconds."""
    found: dict[str, str | None] = dict.fromkeys(libraries)
    for name in libraries:
        # CuPy's wheels have other names than its source.
        for distribution in (name, *(f"cupy-cuda{major}x" for major in (13, 12) if name == "cupy")):
            with suppress(metadata.PackageNotFoundError):
                found[name] = metadata.version(distribution)
                break
    return found


def environment() -> dict[str, Any]:
    """The record that stands beside every result; sizes as the system names them, the load average before the run."""
    build = fusednorm.build_info()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "caches": _caches(),
        "cores": os.cpu_count(),
        "threads": fusednorm.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "isa": build["isa"],
        "compiler": build["compiler"],
        "versions": {"fusednorm": build["version"], **versions(("numpy", "torch", "ml_dtypes"))},
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def _caches() -> dict[str, str]:
    """Size of each cache that the first core sees, such as ``{"L1 data": "48K", "L2": "1024K"}``; may be empty."""
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            caches[f"L{level} data" if level == "1" else f"L{level}"] = size
    return caches
