"""CUDA's kernels, emulated: right results under several schedules, no memory error, no data race; and errors planted in
a copy of them, each of which must be caught. The program is tests/sanitizers/cuda.cpp; it takes minutes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from programs import EMULATOR, SANITIZERS, compiled, needs_gcc, outcome

pytestmark = [needs_gcc, pytest.mark.slow]

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "csrc"

# Small ones, as ThreadSanitizer pays for each CUDA thread. What is too large for a block is shared by a cluster, a grid
# or two launches.
SMALL = "threads=128,threads_sm=128,shared=32768,shared_sm=65536,reserved=0,l2=65536"
DEVICES = {
    "clusters": f"{SMALL},sms=2,cluster=4",
    "grids": f"{SMALL},sms=3,cluster=1",
    "launches": f"{SMALL},sms=2,cluster=1,cooperative=0",
}
# In order, by priority and at random. ThreadSanitizer looks at what is ordered, whatever came first; what is overrun is
# so in any order.
SEEDS = {"plain": "012", "asan": "1", "tsan": "1"}


class Plant(NamedTuple):
    """What stands in `file` between « and » becomes `instead`: a statement or an expression."""

    file: str
    text: str
    instead: str
    device: str
    caught: dict[str, str]  # by which build, and in which words


WRONG = {"plain": r"\w, not |depends on the schedule"}
RACE = {"tsan": "data race"}
OVERRUN = {"asan": "AddressSanitizer: heap-(buffer-overflow|use-after-free)"}

PLANTS = {
    "no barrier before the warps' sums are read": Plant(
        "team.h", "= R(n);\n      }\n    }\n    «__syncthreads();»", ";", "clusters", WRONG | RACE
    ),
    "no barrier after the warps' sums are read": Plant(
        "team.h", "«__syncthreads();»\n    return mine;", ";", "clusters", RACE
    ),
    "no barrier before the blocks' sums are read": Plant(
        "team.h", "«__syncthreads();»\n    sums = Total::none();", ";", "clusters", WRONG | RACE
    ),
    "a cluster does not wait": Plant("team.h", "Team::cluster: «sync_cluster();»", ";", "clusters", WRONG | RACE),
    "a cluster's totals are overwritten": Plant("team.h", "«parity_ ^= 1;»", ";", "clusters", WRONG | RACE),
    "a block ends while its cluster reads": Plant(
        "team.h",
        "«if (job.plan.team == Team::cluster) sync_cluster();»",
        ";",
        "clusters",
        {"plain": "map_shared_rank of a block that has ended"},
    ),
    "a grid does not wait": Plant("team.h", "«cooperative_groups::this_grid().sync();»", ";", "grids", WRONG),
    "a grid's totals are overwritten": Plant(
        "team.h", ": «parity_ * job.plan.teams + team()»;", "team()", "grids", WRONG | RACE
    ),
    "a grid's totals are written after the barrier": Plant(
        "backward.h",
        "«if (mine) me.publish();\n        me.sync();»",
        "me.sync(); if (mine) me.publish();",
        "grids",
        WRONG,
    ),
    "a team without a slab leaves the grid": Plant(
        "forward.h", "for (; «me.slab - me.team()» <", "me.slab", "grids", {"plain": "deadlock"}
    ),
    "pivots are read before they are there": Plant(
        "forward.h", "me.set_pivots(0, sum);\n      «__syncwarp();»", ";", "clusters", WRONG | RACE
    ),
    "coefficients are read before they are there": Plant(
        "forward.h", "settle(pass, me, column, sums);\n      «__syncthreads();»", ";", "clusters", WRONG | RACE
    ),
    "coefficients are overwritten": Plant(
        "backward.h", "«__syncthreads();»  // coefficients and stage are free", ";", "clusters", WRONG | RACE
    ),
    "a whole pack is read": Plant(
        "pack.h", "if («vector && there == kWhole<T>») {\n    const uint4*", "vector && there", "clusters", OVERRUN
    ),
    "a whole pack is written": Plant(
        "pack.h", "if («vector && there == kWhole<T>») {\n    uint4*", "vector && there", "clusters", OVERRUN
    ),
    "packs are taken for aligned": Plant(
        "passes.h", "«anchor(p) == first»);", "true", "clusters", {"plain": "misaligned address"}
    ),
    "packs after the block's count": Plant("slab.h", "«index < end ? there : 0»", "there", "clusters", OVERRUN),
    "elements before the run count": Plant("slab.h", "«if (k == 0) bits &= ~0u << shift;»", ";", "clusters", WRONG),
    "a mask is read behind its end": Plant("slab.h", "«if (a.there == 0) return 0;»", ";", "clusters", OVERRUN),
    "more packs are kept than there is room for": Plant(
        "forward.h", "if («i + (kAll ? 0 : k) < kept») place", "true", "clusters", OVERRUN
    ),
    "scratch memory is too small": Plant("backend.cu", "int64_t(«kMaxParts») * device", "1", "grids", OVERRUN),
    "no barrier before the warps' parts of a line are read": Plant(
        "lines.h", "«__syncthreads();»\n        p = unite<kMoments>(", ";", "clusters", WRONG | RACE
    ),
    "a line's parts are overwritten": Plant("lines.h", "«parity_ ^= 1;»", ";", "clusters", WRONG | RACE),
    "a line's cluster does not wait": Plant(
        "lines.h", "«sync_cluster();»\n        p = unite<kMoments>(", ";", "clusters", WRONG
    ),
    "a block ends while its line's cluster reads": Plant(
        "lines.h",
        "«if (job.plan.team == Team::cluster) sync_cluster();»",
        ";",
        "clusters",
        {"plain": "map_shared_rank of a block that has ended"},
    ),
    "no barrier before the sums across lines are read": Plant(
        "lines.h", "= q;\n      }\n    «__syncthreads();»", ";", "clusters", WRONG | RACE
    ),
    "sums across lines begin anew": Plant("lines.h", "«taken == kChunk»", "true", "grids", WRONG),
    "lines behind the last are read": Plant("lines.h", "return «entry < fold.batch»;", "true", "clusters", OVERRUN),
    "what is not there counts": Plant(
        "lines.h", "«if (!kAll && !(me.there(k) >> (part * some + i) & 1)) d = 0;»", ";", "clusters", WRONG
    ),
    "lines that are cut have no room": Plant(
        "backend.cu", "f.statistics() * «pieces» * kSumsBytes", "0", "grids", WRONG
    ),
    "a cell has a statistic of its own": Plant(
        "forward.h", "pass.given_rstd[«pass.share.divide(s)»]", "s", "clusters", {"plain": WRONG["plain"]} | OVERRUN
    ),
    "a cell's sums are the statistic's": Plant("backend.cu", "«1 / double(f.share())»", "1.0", "clusters", WRONG),
    "running statistics are updated by every block": Plant(
        "forward.h",
        "if («me.rank() == 0 && column.first») {\n      if (pass.count)",
        "column.first",
        "clusters",
        {"plain": "forward.running_mean.* not "},
    ),
    "running statistics are updated by every copy": Plant(
        "passes.h", "return {there, «v < l.groups»,", "true", "clusters", {"plain": "forward.running_mean.* not "}
    ),
}


def planted(file: str) -> str:
    """A source with all the errors of it, each for the value that `planted` (tests/sanitizers/cuda.cpp) then has."""
    source = (SOURCES / "cuda" / file).read_text()
    for number, (name, plant) in enumerate(PLANTS.items(), 1):
        if plant.file != file:
            continue
        before, right, after = re.split("[«»]", plant.text)
        if source.count(before + right + after) != 1:
            pytest.fail(f"{name}: csrc/cuda/{file} does not have this once; give PLANTS another text:\n{plant.text}")
        if right.endswith(";"):
            both = f"{{ if (planted == {number}) {{ {plant.instead} }} else {{ {right} }} }}"
        else:
            both = f"(planted == {number} ? ({plant.instead}) : ({right}))"
        source = source.replace(before + right + after, before + both + after)
    return source


class Programs:
    """One for each sanitizer, compiled in the background."""

    def __init__(self, folder: Path, pool: ThreadPoolExecutor) -> None:
        self.folder, self.pool = folder, pool
        self.linked: dict[str, Future[Path]] = {}
        (folder / "cuda").mkdir()
        for path in (SOURCES / "cuda").iterdir():
            (folder / "cuda" / path.name).write_text(planted(path.name))
        (folder / "planted.h").write_text("extern int planted;\n")
        self.emulator = [self.object("plain", EMULATOR / f"{name}.cpp", "-O2") for name in ("emu", "runtime")]

    def object(self, kind: str, source: Path, *options: str | Path) -> Future[Path]:
        target = self.folder / f"{kind}_{source.stem}.o"

        def build() -> Path:
            compiled("-O1", "-ffp-contract=off", *options, f"-I{SOURCES}", "-x", "c++", "-c", source, "-o", target)
            return target

        return self.pool.submit(build)

    def start(self, kind: str) -> None:
        flags = SANITIZERS[kind]
        if kind == "asan":  # faster to compile without them, and with calls that check
            flags = [*flags, "-fno-sanitize=null,object-size", "--param=asan-instrumentation-with-call-threshold=0"]
        copies = ["-include", self.folder / "planted.h", f"-I{self.folder}"]
        kernels = [self.folder / "cuda" / f"{name}.cu" for name in ("bf16", "f16", "f32", "f64", "backend")]
        objects = [
            *(self.object(kind, path, *flags, *copies) for path in kernels),
            *(self.object(kind, TESTS / "sanitizers" / name, *flags) for name in ("verbs.cpp", "cuda.cpp")),
            *self.emulator,
        ]

        def link() -> Path:
            program = self.folder / kind
            compiled(*flags, *(one.result() for one in objects), "-o", program)
            return program

        self.linked[kind] = self.pool.submit(link)

    def outcome(self, kind: str, plant: str) -> tuple[int, str]:
        """Exit code and words; "" is no plant."""
        number = ["", *PLANTS].index(plant)
        devices = DEVICES[PLANTS[plant].device] if plant else ";".join(DEVICES.values())
        return outcome(kind, self.linked[kind].result(), str(number), *SEEDS[kind], devices=devices)


Outcomes = dict[tuple[str, str], Future[tuple[int, str]]]


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Outcomes]:
    """Of all tests that were asked for, by kind and plant; they run beside each other while the first one waits."""
    wanted = [
        (item.callspec.params["kind"], item.callspec.params["plant"])
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.path == Path(__file__)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = Programs(tmp_path_factory.mktemp("cuda"), pool)
        for kind in dict(wanted):
            programs.start(kind)
        yield {(kind, plant): pool.submit(programs.outcome, kind, plant) for kind, plant in wanted}


@pytest.mark.parametrize("plant", [""], ids=["right"])
@pytest.mark.parametrize("kind", SANITIZERS)
def test_kernels(kind: str, plant: str, outcomes: Outcomes) -> None:
    code, words = outcomes[kind, plant].result()
    assert code == 0, words


@pytest.mark.parametrize(("kind", "plant"), [(kind, name) for name, plant in PLANTS.items() for kind in plant.caught])
def test_planted_error_is_caught(kind: str, plant: str, outcomes: Outcomes) -> None:
    code, words = outcomes[kind, plant].result()
    assert code != 0
    assert re.search(PLANTS[plant].caught[kind], words), words
