"""Gates for what nvcc makes of the kernels, without a GPU: `python tests/cuda_gates/gates.py BUILD`.

BUILD is CMake's build folder, with the target `cuda` built and compile_commands.json: `nox -s cuda` makes it. No
warnings, spills or local memory: nvcc has seen to that. Here: no kernel has more registers than registers.json allows,
and memory is read and written 16 bytes at a time. `--update` writes today's registers into the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BOUNDS = HERE / "registers.json"
DTYPES = {"f": "f32", "d": "f64", "NS_3f16E": "f16", "NS_4bf16E": "bf16"}
# Accesses of 16 bytes, at least: loads of the first sweep, which leaves them in the caches, of the second, which does
# not (evict first), and its stores. Forward takes 4 packs at once, backward 2 of dy and of x.
ACCESSES = ("LDG.E.128", "LDG.E.EF.128", "STG.E.EF.128")
# Lines are swept once.
WIDE = {
    "forward lines": (0, 2, 2), "backward lines": (0, 4, 2), "forward": (4, 4, 4), "backward": (4, 4, 2),
}  # fmt: skip

Bounds = dict[str, dict[str, int]]  # registers of a kernel on an architecture


class Use(NamedTuple):
    registers: int
    wide: tuple[int, ...]  # instructions of each of ACCESSES
    generic: int  # of 16 bytes that do not know that they are in device memory


def readable(symbol: str) -> str:
    """`backward columns plain f32`, or the name of a kernel that is no template."""
    if pass_ := re.search(r"\d(forward|backward)I(\w+?)Lb([01])ELb([01])E", symbol):
        name, dtype, columns, general = pass_.groups()
        kind = "general" if general == "1" else "plain"
        return f"{name} {'columns' if columns == '1' else 'rows'} {kind} {DTYPES[dtype]}"
    if pass_ := re.search(r"\d(forward|backward)_linesI(\w+?)Li(\d)ELi\dE", symbol):
        return f"{pass_[1]} lines {'one' if pass_[3] == '1' else 'several'} {DTYPES[pass_[2]]}"
    plain = re.search(r".*\d([a-z]\w*_kernel)E", symbol)
    return plain[1] if plain else symbol


def tools() -> dict[str, str]:
    """The environment in which cuobjdump and nvdisasm are found: the toolkit's, or those of their Python packages."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += Path(sysconfig.get_path("purelib"), "nvidia").glob("*/bin")
    path = os.pathsep.join([os.environ["PATH"], *map(str, folders)])
    for tool in ("cuobjdump", "nvdisasm"):
        if not shutil.which(tool, path=path):
            sys.exit(f"{tool} not found: pip install --no-deps nvidia-cuda-{tool}, or have the toolkit's on PATH")
    return os.environ | {"PATH": path}


def measure(objects: list[Path]) -> dict[tuple[str, str], Use]:
    """What each kernel of the objects uses on each architecture."""
    environment = tools()
    registers: dict[tuple[str, str], int] = {}
    code: dict[tuple[str, str], list[str]] = {}
    for file in objects:
        for what in ("-res-usage", "-sass"):
            text = subprocess.run(
                ["cuobjdump", what, file], env=environment, check=True, capture_output=True, text=True
            ).stdout
            architecture = kernel = ""
            for line in text.splitlines():
                if found := re.match(r"arch = (sm_\w+)", line):
                    architecture = found[1]
                elif found := re.match(r"\s+Function (?:: )?(\w+)", line):
                    kernel = readable(found[1])
                    code.setdefault((kernel, architecture), [])
                elif found := re.match(r"\s+REG:(\d+)", line):
                    registers[kernel, architecture] = int(found[1])
                elif found := re.search(r"\b(?:LD|ST)G?\.E[.\w]*\.128\b", line):
                    code[kernel, architecture].append(found[0])
    return {
        key: Use(registers[key], tuple(map(ops.count, ACCESSES)), sum(op[2] == "." for op in ops))
        for key, ops in code.items()
    }


def complaints(uses: dict[tuple[str, str], Use], bounds: Bounds) -> list[str]:
    found = []
    for (kernel, architecture), use in sorted(uses.items()):
        bound = bounds.get(kernel, {}).get(architecture)
        if bound is None:
            found.append(f"{kernel} on {architecture}: no bound of its registers")
        elif use.registers > bound:
            found.append(
                f"{kernel} on {architecture}: {use.registers} registers, {use.registers - bound} more than its bound"
            )
        wide = next((accesses for name, accesses in WIDE.items() if kernel.startswith(name)), (0, 0, 0))
        for access, there, least in zip(ACCESSES, use.wide, wide, strict=True):
            if there < least:
                found.append(
                    f"{kernel} on {architecture}: {there} {access}, not {least} at least: are packs taken element by "
                    "element?"
                )
        if use.generic:
            found.append(f"{kernel} on {architecture}: {use.generic} generic accesses of 16 bytes: mark them as global")
    for kernel, of in bounds.items():
        found += [f"{kernel} on {one}: has a bound, but is not built" for one in of if (kernel, one) not in uses]
    return found


def compile_as(build: Path, source: Path, output: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """nvcc with the flags of the kernels, for one architecture."""
    commands = json.loads((build / "compile_commands.json").read_text())
    command = shlex.split(next(entry for entry in commands if entry["file"].endswith("cuda/f32.cu"))["command"])
    architectures = [flag for flag in command if flag.startswith("--generate-code")]
    kept = [flag for flag in command[: command.index("-x")] if flag not in architectures[1:]]
    return subprocess.run(
        [*kept, *more, "-x", "cu", "-c", source, "-o", output], cwd=build, capture_output=True, text=True, check=False
    )


def controls(build: Path) -> list[str]:
    """Planted errors that went unnoticed."""
    missed = []

    def must_say(name: str, words: str, said: str) -> None:
        if words in said:
            print(f"caught, as it must be: {name}")
        else:
            missed.append(f"a planted error went unnoticed: {name}. What was said:\n{said}")

    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "control.o"
        for plant, words, *more in (
            ("unused variable", "never referenced"),
            ("local memory", "Local memory used"),
            ("spill", "Registers are spilled", "-maxrregcount=24"),
        ):
            done = compile_as(build, HERE / "controls.cu", output, f"-DPLANT_{plant.split()[0].upper()}", *more)
            must_say(plant, words, done.stderr if done.returncode else "nothing: it was compiled")
        done = compile_as(build, HERE / "controls.cu", output)
        if done.returncode:
            return [*missed, f"controls.cu is not compiled:\n{done.stderr}"]
        uses = measure([output])
        (kernel, architecture), use = next(iter(uses.items()))
        said = "\n".join(complaints(uses, {kernel: {architecture: use.registers - 3}, "gone": {architecture: 9}}))
        must_say("registers", f"forward rows plain f32 on {architecture}: {use.registers} registers, 3 more", said)
        must_say("stale bound", f"gone on {architecture}: has a bound", said)
        must_say("narrow loads", "0 LDG.E.128, not 4", said)
        must_say("generic accesses", "2 generic accesses", said)
        must_say("missing bound", "no bound", "\n".join(complaints(uses, {})))
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path)
    parser.add_argument("--update", action="store_true", help="write today's registers into registers.json")
    arguments = parser.parse_args()
    build = arguments.build.resolve()

    missed = controls(build)
    uses = measure(sorted(build.glob("CMakeFiles/cuda.dir/csrc/cuda/*.cu.o")))
    version = re.search(r"release ([\d.]+)", subprocess.check_output(["nvcc", "--version"], text=True))
    nvcc = version[1] if version else "?"
    if arguments.update:
        rows: Bounds = {}
        for (kernel, architecture), use in sorted(uses.items(), key=lambda item: (item[0][0], int(item[0][1][3:]))):
            rows.setdefault(kernel, {})[architecture] = use.registers
        lines = ",\n".join(f"    {json.dumps(kernel)}: {json.dumps(of)}" for kernel, of in rows.items())
        BOUNDS.write_text(f'{{\n  "nvcc": "{nvcc}",\n  "registers": {{\n{lines}\n  }}\n}}\n')
    file = json.loads(BOUNDS.read_text())
    found = complaints(uses, file["registers"])
    for line in [*missed, *found]:
        print(line)
    if missed or found:
        sys.exit(
            f"{len(missed) + len(found)} complaints. The bounds are those of nvcc {file['nvcc']}, this is {nvcc}. If "
            f"the kernels are meant to be so: nox -s cuda -- --update, and commit {BOUNDS.name} with the reason."
        )
    print(f"{len(uses)} kernels within their bounds, their memory accesses wide")


if __name__ == "__main__":
    main()
