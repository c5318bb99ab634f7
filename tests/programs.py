"""C++ programs with the CUDA emulator in them, that tests compile and run under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EMULATOR = Path(__file__).parent / "cuda_emulator"
SANITIZERS = {"plain": [], "asan": ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
              "tsan": ["-fsanitize=thread"]}  # fmt: skip

needs_gcc = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("g++"), reason="the emulator needs Linux and g++"
)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Without the libraries that a sanitizer session preloads."""
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | environment
    return subprocess.run(
        list(map(str, command)), env=clean, text=True, timeout=1800, check=False, stdout=-1, stderr=subprocess.STDOUT
    )


def compiled(*arguments: str | Path) -> None:
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    done = run("g++", "-std=c++20", "-g1", "-fPIC", "-pthread", *warnings, f"-I{EMULATOR}", *arguments)
    assert done.returncode == 0, done.stdout


def outcome(kind: str, program: Path, *arguments: str, devices: str = "", seed: int = 0) -> tuple[int, str]:
    """Exit code and words of a program that was built with a sanitizer, on these devices."""
    # Older runtimes do not start where the kernel scatters addresses widely; containers may forbid to change that.
    fixed = ["setarch", os.uname().machine, "-R"]
    may = kind == "tsan" and shutil.which("setarch") and run(*fixed, "true").returncode == 0
    environment = {"FUSEDNORM_EMU_SEED": str(seed), "FUSEDNORM_EMU_DEVICES": devices}
    options = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1"}
    done = run(*(fixed if may else []), program, *arguments, **environment, **options)
    return done.returncode, done.stdout
