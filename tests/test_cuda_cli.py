"""The commands with --device cuda: on a GPU, or emulated."""

from __future__ import annotations

import itertools
import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import fusednorm
import numpy as np
import pytest
from fusednorm import _C, arrays, bench
from fusednorm.bench import gpu
from fusednorm.bench.contenders import Torch
from fusednorm.cli import main
from fusednorm.testing.cases import Case
from test_cuda import DEVICES, EMULATED, cupy


@pytest.mark.parametrize("device", ["cuda", f"cuda:{DEVICES[-1]}"])
def test_selftest(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", device, "--filter", "37x17-axis1"]) == 0
    shown = capsys.readouterr().out
    assert f"cases on {'cuda:0' if device == 'cuda' else device}: all passed" in shown
    assert _C.build_info()["isa"] not in shown


def wrong_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library's y be wrong by 1e-3."""
    right = fusednorm.batch_norm_forward

    def wrong(*args: Any, **options: Any) -> Any:
        y, mean, rstd = right(*args, **options)
        return y + y.dtype.type(1e-3), mean, rstd

    monkeypatch.setattr(fusednorm, "batch_norm_forward", wrong)


def test_selftest_tells_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong_forward(monkeypatch)
    assert main(["selftest", "--device", "cuda", "--json", "--filter", "37x17-axis1-float64"]) == 1
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert {(failure["name"], failure["place"]) for failure in failures} == {("y", "cuda:0")}


@pytest.mark.parametrize("command", ["selftest", "bench", "demo"])
def test_what_is_missing_is_said_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(device: str) -> str:
        assert main([command, "--device", device]) == 2
        return capsys.readouterr().err

    beyond = f"cuda:{len(DEVICES)}"
    refused = f"fusednorm {command}: device {{}} is not to be had: {{}}\n"
    assert said(beyond) == refused.format(repr(beyond), f"there are {len(DEVICES)} GPUs")
    monkeypatch.setattr(_C, "cuda_devices", lambda: 0)
    assert said("cuda") == refused.format("'cuda:0'", "no GPU was found")
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert said("cuda") == refused.format("'cuda:0'", f"CuPy is not installed: {arrays.installs('cuda')}")


def test_bench_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    file, figure = tmp_path / "results.json", tmp_path / "results.svg"
    shape = ["--shape", "4,6,5,5", "--layout", "last"]
    assert main(["bench", "--device", "cuda", "--quick", *shape, "--json", str(file), "--plot", str(figure)]) == 0
    shown = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert [(row["shape"], row["pass"], row["floor"]) for row in results["rows"]] == [
        ([4, 5, 5, 6], pass_, floor) for pass_, floor in (("forward", 2), ("backward", 3), ("eval", 2))
    ]
    for row in results["rows"]:
        assert row["wrong"] == []
        assert row["checked"] == [6, 6]
        assert {"copy", "ours_out", "ours", "cupy"} <= set(row["ms"]) == set(row["host_us"])
        assert {"native", "cudnn", "compile"} <= set(row["ms"]) | set(row["absent"])
        assert all(0 < ms["p10"] <= ms["median"] <= ms["p90"] for ms in row["ms"].values())
        assert bench.label(row) in shown
    assert results["left_out"] == []
    assert results["environment"]["gpu"] in shown
    assert "<svg" in figure.read_text()
    assert main(["bench", "--from", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == bench.table(results)


@pytest.fixture
def torch_beside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """PyTorch as the benchmark finds it on a GPU; emulated, its CPU tensors lie over the emulator's memory."""
    torch = pytest.importorskip("torch")
    if not EMULATED:
        return torch
    import emulator

    def whole(self: Any, array: Any) -> Any:
        self.__dict__.setdefault("kept", []).append(array)
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array._host.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array._host)

    monkeypatch.setattr(Torch, "whole", whole)
    monkeypatch.setattr(cupy, "from_dlpack", lambda tensor: cupy.array(tensor.numpy()), raising=False)
    monkeypatch.setattr(gpu, "_pytorch", lambda: (torch, ""))
    for name in ("device", "stream", "ExternalStream"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with emulator.memory():
        yield torch


BENCHED = [
    Case("", shape, axis=axis, dtype=dtype, training=training, residual=bool(activation), activation=activation)
    for (shape, axis), dtype, training, activation in itertools.product(
        [((6, 8, 5, 5), 1), ((6, 5, 5, 8), -1)], ["float32", "bfloat16"], [True, False], [None, "relu"]
    )
]
BENCHED += [
    Case("", shape, norm=norm, axis=axis, groups=groups, dtype=dtype, running=False)
    for (norm, shape, axis, groups), dtype in itertools.product(
        [
            ("layer", (40, 96), 1, 1),
            ("rms", (40, 96), 1, 1),
            ("instance", (6, 8, 5, 5), 1, 1),
            ("instance", (6, 5, 5, 8), -1, 1),
            ("group", (6, 8, 5, 5), 1, 4),
            ("group", (6, 5, 5, 8), -1, 4),
        ],
        ["float32", "bfloat16"],
    )
]
# Compiling takes seconds.
BENCHED += [replace(case, tags=frozenset({"compile"})) for case in (*BENCHED[:4], *BENCHED[16:23:2])]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_bench_contenders_agree(torch_beside: Any) -> None:
    with bench.Gpu("cuda:0") as machine:
        for case in BENCHED:
            theirs = ["native", *case.tags]
            for row in bench.measure(case, machine=machine, repeat=1):
                assert row["wrong"] == [], row
                assert {*theirs, *(["cupy"] if case.norm == "batch" else ())} <= set(row["ms"]), row["absent"]
                assert row["eager"] == (theirs if EMULATED else []), row


def test_bench_sees_a_contender_that_computes_something_else(
    torch_beside: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = gpu._Batch.chosen

    def wrong(self: Any, pass_: str, *, cudnn: bool) -> Any:
        call = right(self, pass_, cudnn=cudnn)
        return lambda: call() * 1.1

    monkeypatch.setattr(gpu._Batch, "chosen", wrong)
    with bench.Gpu("cuda:0") as machine:
        for row in bench.measure(Case("", (6, 8, 5, 5)), machine=machine, repeat=1):
            assert "native computes something else" in row["wrong"]
            assert row["ms"] == {}


def test_bench_does_not_time_wrong_results(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_forward(monkeypatch)
    with bench.Gpu("cuda:0") as machine:
        (row,) = bench.measure(Case("", (6, 8, 5, 5), training=False), machine=machine, repeat=1)
    assert row["ms"] == {}
    assert row["wrong"][0].startswith("y: error")


def test_bench_fills_large_tensors_without_repeating_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "DRAWN", 100)  # half of the samples
    case = Case("", (8, 6, 2, 2), dtype="float64", residual=True)
    with bench.Gpu("cuda:0") as machine:
        inputs = machine.make(case)
        assert inputs.weight is not None
        assert inputs.weight.shape == (6,)
        for name in ("x", "dy", "residual"):
            samples = cupy.asnumpy(getattr(inputs, name)).reshape(8, -1)
            assert len({sample.tobytes() for sample in samples}) == 8, name
            assert np.isfinite(samples).all()
            assert 0.3 < samples.std() < 3
        assert all(row["wrong"] == [] for row in bench.measure(case, machine=machine, repeat=1))


def test_bench_goes_on_after_a_case_that_raises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    right = fusednorm.batch_norm_backward

    def raises(dy: Any, *args: Any, **options: Any) -> Any:
        if dy.ndim == 2:
            raise RuntimeError("cudaErrorUnknown")
        return right(dy, *args, **options)

    monkeypatch.setattr(fusednorm, "batch_norm_backward", raises)
    file = tmp_path / "results.json"
    shapes = ["--shape", "4,6", "--shape", "4,6,5", "--layout", "first", "--pass", "eval"]
    assert main(["bench", "--device", "cuda", "--markdown", "--repeat", "1", *shapes, "--json", str(file)]) == 1
    results = json.loads(file.read_text())
    assert [row["shape"] for row in results["rows"]] == [[4, 6, 5]]
    assert results["failed"] == ["4x6-axis1-float32: RuntimeError: cudaErrorUnknown"]
    assert "1 cases FAILED, the first of them 4x6-axis1-float32" in capsys.readouterr().out


def test_bench_says_what_was_left_out() -> None:
    cases = [Case("first", (4, 6)), Case("second", (4, 6)), Case("huge", (1 << 20, 1 << 20))]
    with_time = bench.run(cases[2:], machine=bench.Gpu("cuda:0"))
    assert with_time["left_out"] == ["huge: too large for the memory"]
    without = bench.run(cases, machine=bench.Gpu("cuda:0"), repeat=1, seconds=0)
    assert without["left_out"] == [f"{case.name}: no time was left" for case in cases]
    assert "3 cases were not measured, the first of them first: no time was left" in bench.table(without)


@pytest.mark.parametrize(
    ("shape", "axis", "pass_", "residual", "activation", "floor"),
    [
        ((256, 64, 112, 112), 1, "forward", False, None, 2),
        ((256, 64, 112, 112), 1, "backward", False, None, 3),  # 25.7 MB of x and dy of a channel
        ((512, 64, 112, 112), 1, "backward", False, None, 5),
        ((256, 112, 112, 64), -1, "forward", False, None, 3),
        ((256, 112, 112, 64), -1, "backward", False, None, 5),
        ((256, 112, 112, 64), -1, "eval", False, None, 2),
        ((256, 28, 28, 512), -1, "forward", False, None, 2),  # 64 bytes of 200,704 rows
        ((256, 28, 28, 512), -1, "backward", False, None, 3),
        ((32, 112, 112, 64), -1, "backward", False, None, 5),
        ((65536, 1024), 1, "backward", False, None, 3),
        ((32, 64, 56, 56), 1, "forward", True, "relu", 3),
        ((32, 64, 56, 56), 1, "eval", True, None, 3),
        ((32, 64, 56, 56), 1, "backward", True, "relu", 5),  # dy, x, residual; dx, dresidual
        ((32, 64, 56, 56), 1, "backward", True, None, 4),  # dresidual is dy, but it is written
        ((512, 112, 112, 64), -1, "backward", True, "relu", 8),
    ],
)
def test_floor(shape: Any, axis: int, pass_: str, residual: bool, activation: Any, floor: int) -> None:
    case = Case("", shape, axis=axis, residual=residual, activation=activation, training=pass_ != "eval")
    assert gpu.floor(case, pass_, on_chip=132 * (228 << 10)) == floor


@pytest.mark.parametrize(
    ("norm", "shape", "axis", "options", "kept"),
    [
        ("layer", (1000, 70000), 1, {}, 280_000),
        ("rms", (1000, 700), 1, {"dtype": "bfloat16"}, 1400),
        ("instance", (32, 64, 100), 1, {}, 400),
        ("instance", (32, 100, 64), -1, {}, 6400),  # 64 bytes of each row
        ("instance", (32, 100, 5), -1, {}, 2000),  # rows of 20 bytes
        ("group", (32, 64, 100), 1, {"groups": 8}, 3200),
        ("group", (32, 100, 64), -1, {"groups": 8}, 6400),  # of 32 bytes a row, twice that come along
        ("group", (32, 100, 64), -1, {"groups": 2}, 12800),
        ("batch", (32, 64, 100), 1, {"ghost_batch_size": 8}, 3200),
        ("batch", (32, 100, 64), -1, {"ghost_batch_size": 8}, 51200),
        ("batch", (32, 64), 1, {"ghost_batch_size": 50}, 2048),
    ],
)
def test_floor_of_what_shares_a_statistic(norm: str, shape: Any, axis: int, options: Any, kept: int) -> None:
    case = Case("", shape, norm=norm, axis=axis, **options)
    assert [gpu.floor(case, "forward", on_chip) for on_chip in (kept, kept - 1)] == [2, 3]
    assert [gpu.floor(case, "backward", on_chip) for on_chip in (2 * kept, 2 * kept - 1)] == [3, 5]


def test_lost_rows_of_a_gpu_are_marked() -> None:
    def times(median: float) -> dict[str, float]:
        return {"median": median, "p10": median * 0.9, "p90": median * 1.1}

    def row(native: float) -> dict[str, Any]:
        return {
            "norm": "batch", "shape": [8, 4], "layout": "flat", "dtype": "float32", "pass": "backward",
            "residual": False, "activation": None, "checked": [4, 4], "wrong": [], "floor": 3, "sets": 64,
            "eager": [], "absent": {},
            "ms": {"copy": times(0.002), "ours_out": times(0.004), "ours": times(0.004), "native": times(0.004)},
            "ratios": {"copy/ours_out": times(0.5), "native/ours_out": times(native)},
            "host_us": {"ours": times(20), "native": times(15)},
        }  # fmt: skip

    with bench.Gpu("cuda:0") as machine:
        environment = bench.environment() | machine.environment()
    lines = bench.table({"environment": environment, "rows": [row(2), row(0.9)]}).splitlines()
    assert lines[2] == "| 8×4 f32 | backward | 2.0 | 4.0 | 3 | 75% | 2.00 ±0.20 | – | – | – | 20 | 15 |"
    assert lines[3].startswith("| **✗ 8×4 f32** |")
    assert any("1 of 2 rows lost" in line for line in lines)
    assert any("backward reaches 75% of the copy's bandwidth" in line for line in lines)


def test_demo_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for library in ("sklearn", "rich", "matplotlib"):
        pytest.importorskip(library)
    device = f"cuda:{DEVICES[-1]}"
    assert main(["demo", "--device", device, "--epochs", "1", "--skip-timing", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "fusednorm-demo.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert f"seed 0, {device}." in shown
    assert "epoch   1:" in shown


def test_the_demos_network_learns_as_on_the_cpu() -> None:
    pytest.importorskip("sklearn")
    from fusednorm.cli.demo import load_digits
    from fusednorm.cli.demo.network import network, train
    from fusednorm.cli.demo.optimizers import OPTIMIZERS

    last = {}
    for device in ("cpu", "cuda:0"):
        net = network(2, "relu", True, seed=0, device=device)
        *_, last[device] = train(net, OPTIMIZERS["adam"](net.parameters(), 0.001), load_digits(0).to(device), 2, seed=0)
    assert last["cuda:0"] == pytest.approx(last["cpu"], rel=1e-3)
