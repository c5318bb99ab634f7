"""How CUDA's work is divided (csrc/cuda/plan.h): within every device's limits, and as meant on known ones. No GPU."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from fusednorm import fold
from fusednorm.fold import Fold

TESTS = Path(__file__).parent
TEAMS = ("block", "cluster", "grid", "launches")
KINDS = ("training", "evaluation", "statistics", "backward", "grad_sums", "grad_input")
KB = 1024


@dataclass(frozen=True)
class Device:
    sms: int
    threads: int  # of an SM
    shared: int  # bytes of an SM
    shared_block: int
    shared_lost: int
    l2: int
    max_cluster: int
    cooperative: int


# Of NVIDIA's programming guide (compute capabilities 7.5, 8.0, 8.6, 9.0, 12.0) and data sheets.
DEVICES = {
    "T4": Device(40, 1024, 64 * KB, 64 * KB, 0, 4 << 20, 1, 1),
    "A100": Device(108, 2048, 164 * KB, 163 * KB, KB, 40 << 20, 1, 1),
    "RTX 3090": Device(82, 1536, 100 * KB, 99 * KB, KB, 6 << 20, 1, 1),
    "H200": Device(132, 2048, 228 * KB, 227 * KB, KB, 50 << 20, 8, 1),
    "RTX 5090": Device(170, 1536, 100 * KB, 99 * KB, KB, 96 << 20, 8, 1),
    "toy": Device(4, 256, 40 * KB, 20 * KB, 0, 64 * KB, 4, 1),
    "toy without clusters": Device(4, 256, 40 * KB, 20 * KB, 0, 64 * KB, 1, 1),
    "toy with neither": Device(3, 64, 16 * KB, 16 * KB, 0, 8 * KB, 1, 0),
    "one SM": Device(1, 128, 16 * KB, 16 * KB, 0, 0, 2, 1),
}
SHAPES = [
    (n, c, *spatial)
    for n, c, spatial in itertools.product(
        (1, 2, 32, 256), (1, 3, 4, 7, 64, 100, 2048), ((), (1, 1), (7, 7), (112, 112))
    )
] + [(65536, 1024), (4096, 128, 1, 1), (8, 64, 7, 7), (2, 3, 1024, 1024), (1 << 21, 1024), (3, 1, 1 << 31), (0, 4, 2)]


@dataclass(frozen=True)
class Plan:
    team: str
    threads: int  # of a block
    size: int  # blocks of a team
    teams: int  # in flight
    share: int  # packs of the slab that are one block's
    kept: int  # packs of each tensor that a thread keeps
    shared: int  # bytes
    slabs: int
    packs: int  # of a slab
    columns: int
    repeat: int
    together: bool

    @property
    def blocks(self) -> int:
        return self.teams * self.size

    @property
    def kept_part(self) -> float:
        """How much of a slab waits in shared memory for the second sweep."""
        return min(1.0, self.kept * self.threads * self.size / self.packs)


Planner = Callable[..., Plan]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("g++ is not installed")
    path = tmp_path_factory.mktemp("plan") / "plan.so"
    folders = [f"-I{TESTS / 'cuda_emulator'}", f"-I{TESTS.parent / 'csrc'}"]
    subprocess.run(
        [compiler, "-std=c++20", "-shared", "-fPIC", *folders, str(TESTS / "cuda_plan.cpp"), "-o", str(path)],
        check=True,
    )
    found = ctypes.CDLL(str(path))
    found.scratch_sums.restype = ctypes.c_int64
    return found


@pytest.fixture(scope="module")
def plan(library: ctypes.CDLL) -> Planner:
    def planned(f: Fold, item: int, kind: str, device: Device, general: bool = False) -> Plan:
        numbers = (ctypes.c_int64 * 5)(f.batch, f.outer, f.groups, f.inner, f.span)
        limits = (ctypes.c_int64 * 8)(*vars(device).values())
        out = (ctypes.c_int64 * 12)()
        library.plan_for(numbers, item, KINDS.index(kind), general, limits, out)
        return Plan(TEAMS[out[0]], *out[1:11], bool(out[11]))

    return planned


def folds(shape: tuple[int, ...]) -> list[Fold]:
    n, c, *spatial = shape
    last = (n, *spatial, c)
    return [fold.batch(s, range(len(s)), axis) for s, axis in ((shape, 1), (last, len(last) - 1))]


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_plans_keep_to_the_device(device: Device, plan: Planner, library: ctypes.CDLL) -> None:
    for shape, kind, item, general in itertools.product(SHAPES, KINDS, (2, 4, 8), (False, True)):
        for f in folds(shape):
            p = plan(f, item, kind, device, general)
            what = f"{shape} {f} {kind} {item} {general}: {p}"
            if p.slabs == 0:
                continue
            merges = kind not in ("evaluation", "grad_input")
            resident = max(device.threads // p.threads, 1) * device.sms
            assert p.threads % 32 == 0, what
            assert p.columns <= p.threads <= min(device.threads, 1024), what
            assert p.shared <= device.shared_block, what
            assert p.shared + device.shared_lost <= device.shared, what
            assert p.share * p.size >= p.packs, what  # all of the slab is somebody's
            assert p.share < 1 << 31, what  # counted in 32 bits
            assert 1 <= p.teams <= max(p.slabs, 1), what
            if p.team == "block":
                assert p.size == 1, what
            if p.team == "cluster":
                assert 1 < p.size <= device.max_cluster, what
                assert p.size & (p.size - 1) == 0, what
            if p.team == "grid":  # a grid's barrier needs all of its blocks at once
                assert device.cooperative, what
                fit = (device.shared // (p.shared + device.shared_lost)) * device.sms if p.shared else resident
                assert p.blocks <= min(resident, fit), what
            if p.team == "launches":
                assert p.kept == 0, what
            if p.together and merges:  # sums of one slab are needed by another
                assert p.team in ("grid", "launches"), what
                assert p.team == "launches" or p.teams == p.slabs, what
            # Partial sums lie in scratch memory: of a grid those of two rounds.
            slots = {"grid": 2 * p.teams, "launches": p.slabs if merges else 0}.get(p.team, 0)
            widest = 8 * 16 // item if f.inner == 1 else 1
            assert slots * p.size * p.columns <= library.scratch_sums() * device.sms * widest, what


RESNET = {
    (64, 112): 2,
    (64, 56): 2,
    (256, 56): 2,
    (128, 28): 2,
    (512, 28): 2,
    (256, 14): 2,
    (1024, 14): 2,
    (2048, 7): 2,
}


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("kind", ["training", "backward"])
def test_what_fits_on_an_h200_is_read_once(kind: str, item: int, plan: Planner) -> None:
    """Channels first, a channel's slab of all tensors within eight SMs' shared memory: what is not kept of the slabs in
    flight, L2 still has."""
    h200, tensors = DEVICES["H200"], 1 if kind == "training" else 2
    for n, (c, hw) in itertools.product((32, 256), RESNET):
        first, _ = folds((n, c, hw, hw))
        p = plan(first, item, kind, h200)
        if n * hw * hw * item * tensors <= 8 * 200 * KB:
            assert (1 - p.kept_part) * p.teams * p.packs * 16 * tensors <= h200.l2 / 4, p
            assert p.kept_part > 0.8, p
            assert p.team in ("block", "cluster"), p
        else:  # and else as much of it as there is room on the chip for
            assert p.team in ("cluster", "grid"), p
            assert p.kept * p.threads * p.blocks * 16 * tensors >= 0.5 * h200.sms * h200.shared_block, p


def test_small_channels_share_an_sm(plan: Planner) -> None:
    first, _ = folds((8, 64, 7, 7))
    assert plan(first, 4, "training", DEVICES["H200"]).team == "block"
    many, _ = folds((32, 2048, 7, 7))
    p = plan(many, 4, "training", DEVICES["H200"])
    assert p.team == "block"
    assert DEVICES["H200"].shared // (p.shared + KB) > 1
    assert p.teams > DEVICES["H200"].sms


def test_few_channels_of_a_large_tensor_take_all_sms(plan: Planner) -> None:
    for channels, axis in itertools.product((3, 4), (0, 1)):
        f = folds((16, channels, 512, 512))[axis]
        for kind in ("training", "backward"):
            p = plan(f, 4, kind, DEVICES["H200"])
            assert p.team == "grid", p
            assert p.blocks >= 0.9 * DEVICES["H200"].sms, p


def test_narrow_rows_are_taken_several_at_a_time(plan: Planner) -> None:
    """Three channels last: four rows are 48 bytes, whole packs."""
    _, last = folds((16, 3, 512, 512))
    assert plan(last, 4, "training", DEVICES["H200"]).repeat == 4
    assert plan(last, 2, "training", DEVICES["H200"]).repeat == 8


@pytest.mark.parametrize("kind", ["evaluation", "grad_input"])
def test_what_needs_no_sums_keeps_nothing(kind: str, plan: Planner) -> None:
    for f in folds((32, 64, 56, 56)):
        p = plan(f, 2, kind, DEVICES["H200"])
        assert (p.team, p.kept) == ("launches", 0)
        assert p.blocks * p.threads >= DEVICES["H200"].sms * 1024  # enough to fill the device


def test_without_clusters_and_cooperative_launches_there_are_two_launches(plan: Planner) -> None:
    first, last = folds((32, 4, 112, 112))
    for f in (first, last):
        assert plan(f, 4, "training", DEVICES["toy with neither"]).team in ("block", "launches")
    _, three = folds((64, 3, 16, 16))
    assert plan(three, 4, "training", DEVICES["toy with neither"]).team == "launches"


@dataclass(frozen=True)
class LinePlan:
    team: str
    threads: int  # of a block
    size: int  # blocks of a line
    teams: int  # of a group
    steps: int  # of which a team does every so many
    share: int  # packs of a line that are one block's
    several: bool  # a thread has one pack of some lines, else some packs of one
    sharers: int  # threads of a block that share a line
    lines: int  # of a block at once
    room: int  # elements of a line that they can hold
    shared: int  # bytes
    rows: int  # lines of a thread


LinePlanner = Callable[..., LinePlan]


@pytest.fixture(scope="module")
def line_plan(library: ctypes.CDLL) -> LinePlanner:
    def planned(f: Fold, item: int, kind: str, device: Device) -> LinePlan:
        numbers = (ctypes.c_int64 * 5)(f.batch, f.outer, f.groups, f.inner, f.span)
        limits = (ctypes.c_int64 * 8)(*vars(device).values())
        out = (ctypes.c_int64 * 12)()
        library.line_plan_for(numbers, item, KINDS.index(kind), limits, out)
        return LinePlan(TEAMS[out[0]], *out[1:6], bool(out[6]), *out[7:])

    return planned


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_lines_keep_to_the_device(device: Device, line_plan: LinePlanner) -> None:
    widths = (0, 2, 7, 8, 33, 128, 129, 512, 1000, 4096, 5003, 65536, 1 << 20, (1 << 31) + 77)
    for lines, groups, width in itertools.product((1, 7, 4096, 10**6), (1, 3, 5000), widths):
        if lines * groups * width > 1 << 40:
            continue
        for kind, item in itertools.product(KINDS, (2, 4, 8)):
            f = Fold(lines, 1, groups, width, 1)
            p = line_plan(f, item, kind, device)
            what = f"{f} {kind} {item}: {p}"
            packs = -(-width * item // 16)
            assert p.threads % 32 == 0, what
            assert p.threads == p.sharers * p.lines <= min(device.threads, 1024), what
            assert p.shared <= device.shared_block, what
            assert p.shared + device.shared_lost <= device.shared, what
            assert p.share * p.size >= packs, what  # all of the line is somebody's
            assert p.share * 16 // item <= p.room, what  # and held
            assert p.sharers & (p.sharers - 1) == 0 if p.several else p.sharers % 32 == 0, what
            assert p.several == (packs <= 32), what
            assert (p.steps - 1) * p.lines * p.rows < lines <= p.steps * p.lines * p.rows, what
            assert 1 <= p.teams <= p.steps, what
            assert p.teams * p.size * groups < 1 << 31, what
            if p.team == "cluster":
                assert 1 < p.size <= device.max_cluster, what
                assert p.size & (p.size - 1) == 0, what
                assert p.lines == 1, what
            if p.team == "launches":  # only sums must wait for another launch
                assert kind not in ("evaluation", "grad_input"), what
            # What scratch memory holds of the sums across lines (csrc/cuda/backend.cu).
            if kind in ("backward", "grad_sums"):
                held = min(lines * groups * width, device.sms * 512 * 16)
                assert p.teams * groups * width <= max(groups * width, held), what


@pytest.mark.parametrize("item", [2, 4])
@pytest.mark.parametrize("kind", ["training", "backward"])
def test_lines_are_read_once_on_an_h200(kind: str, item: int, line_plan: LinePlanner) -> None:
    """Up to 65,536 numbers, and with enough threads to fill the device, most of which have something to do."""
    h200 = DEVICES["H200"]
    for width in (8, 32, 64, 100, 256, 768, 1024, 4096, 5000, 8192, 16384, 32768, 65536):
        p = line_plan(Fold((1 << 28) // width, 1, 1, width, 1), item, kind, h200)
        assert p.team in ("block", "cluster"), p
        assert p.size == 1 or p.team == "cluster", p
        assert p.teams * p.size * p.threads >= 0.7 * h200.sms * 512, p
        assert p.size * p.room <= max(2 * width, 32), p
