"""The commands, on inputs small enough for every test run."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import fusednorm
import numpy as np
import pytest
from fusednorm import _C, bench
from fusednorm.bench import report
from fusednorm.bench.contenders import ours, torch_peer
from fusednorm.bench.timing import Contender, interleaved
from fusednorm.cli import main
from fusednorm.cli.extras import progress
from fusednorm.testing.cases import BENCH, BENCH_CUDA, NORMS, Case, expected, make, numpy_dtype


def test_info_names_what_was_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    info = fusednorm.build_info()
    for part in (info["version"], info["compiler"], info["isa"], info["cuda"]):
        assert part in text


@pytest.mark.parametrize("best", ["v2", "v9"])
def test_info_says_where_better_kernels_could_be_had(
    best: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in an environment that was made on another machine."""
    info = fusednorm.build_info() | {"isa_built": ["v2"], "isa_runnable": ["v2"], "isa_best": best}
    monkeypatch.setattr(fusednorm, "build_info", lambda: info)
    assert main(["info"]) == 0
    assert ("this machine runs v9" in capsys.readouterr().out) == (best == "v9")


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["isa"] in info["isa_runnable"]
    assert info["isa_best"] == info["isa_runnable"][0] or info["isa_best"] not in info["isa_built"]
    assert info["libraries"]["numpy"]
    assert info["threads"] == fusednorm.get_num_threads()


def test_module_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusednorm", "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout.strip() == f"fusednorm {fusednorm.__version__}"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["info", "--no-such-flag"],
        ["bench", "--shape", "8"],
        ["bench", "--shape", "8,0"],
        ["bench", "--shape", "8,four"],
        ["bench", "--isa", "v9"],
        ["bench", "--isa", "v2", "--device", "cuda"],
        ["bench", "--threads", "0"],
        ["bench", "--threads", "1", "--device", "cuda"],
        ["bench", "--compile"],
        ["bench", "--peers", "cudnn"],
        ["bench", "--device", "cuda", "--peers", "torch"],
        ["bench", "--plot", "results.jpeg"],
        ["selftest", "--device", "gpu"],
        ["demo", "--optimizer", "guess"],
        ["demo", "--epochs", "0"],
    ],
)
def test_bad_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert "usage: fusednorm" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["info", "demo", "selftest", "bench"])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert f"fusednorm {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["demo", "bench"])
def test_a_missing_library_is_named_with_its_remedy(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main([command]) == 2
    assert capsys.readouterr().err == (
        f"fusednorm {command} needs rich: pip install 'fusednorm[{command}]', or in a checkout pip install "
        f"'.[{command}]'\n"
    )


@pytest.mark.parametrize(("module", "library"), [("torch", "PyTorch"), ("jax", "JAX")])
def test_a_module_names_the_library_that_it_needs(module: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else found(name))
    monkeypatch.delitem(sys.modules, f"fusednorm.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match=rf"needs {library}: pip install 'fusednorm\[{module}\]'"):
        importlib.import_module(f"fusednorm.{module}")


def test_pytorch_as_a_peer_must_be_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))
    arguments = ["bench", "--shape", "4x6x5x5", "--repeat", "1"]
    assert main([*arguments, "--peers", "torch"]) == 2
    said = "PyTorch is not installed: no other library to compare with (pip install torch)"
    assert capsys.readouterr().err == f"fusednorm bench: {said}\n"
    assert main([*arguments, "--json", "-"]) == 0
    results = json.loads(capsys.readouterr().out)
    for version, line in ((None, said), ("2.9", "no other library was timed")):
        results["environment"]["versions"]["torch"] = version
        assert line in bench.summary(results)
        assert not any("lost" in each for each in bench.summary(results))


@pytest.mark.parametrize(
    "arguments", [["bench", "--json", "file/a.json"], ["bench", "--plot", "file/a.png"], ["demo", "--output", "file"]]
)
def test_what_cannot_be_written_is_said_before_the_work(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")  # no folder
    for library in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(library)
    monkeypatch.setattr(bench, "select", None)
    monkeypatch.setattr("fusednorm.cli.demo.load_digits", None)
    assert main(arguments) == 2
    assert re.fullmatch(rf"fusednorm {arguments[0]}: cannot write \S+: .+\n", capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--json", "--plot"])
def test_bench_shows_its_table_before_writing_fails(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(bench, "plot", full)
    path = tmp_path / "new" / "results.png"
    assert main(["bench", "--shape", "4,6", "--repeat", "1", "--peers", "none", "--markdown", option, str(path)]) == 2
    captured = capsys.readouterr()
    assert "| 4×6 f32 | forward |" in captured.out
    assert captured.err.splitlines()[-1] == f"fusednorm bench: cannot write {path}: No space left on device"


def test_bench_keeps_what_it_measured_before_ctrl_c(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, file = bench.measure, tmp_path / "results.json"

    def interrupted(case: Case, *args: Any, **options: Any) -> Any:
        if len(case.shape) == 2:
            raise KeyboardInterrupt
        return measured(case, *args, **options)

    monkeypatch.setattr(bench, "measure", interrupted)
    arguments = ["bench", "--shape", "4,6,5,5", "--shape", "4,6", "--repeat", "1", "--peers", "none", "--markdown"]
    assert main([*arguments, "--json", str(file)]) == 130
    results = json.loads(file.read_text())
    assert len(results["rows"]) == 6
    assert len(results["interrupted"]) == 2
    assert "stopped after 4 of 6 cases" in capsys.readouterr().out


def test_bench_takes_an_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    before = _C.build_info()["isa"]
    least = _C.build_info()["isa_runnable"][-1]
    arguments = ["bench", "--shape", "4,6", "--repeat", "1", "--peers", "none", "--json", "-"]
    assert main([*arguments, "--isa", least]) == 0
    assert json.loads(capsys.readouterr().out)["environment"]["isa"] == least
    assert _C.build_info()["isa"] == before


def test_bench_says_that_a_machine_is_busy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (1e3, 1e3, 1e3), raising=False)
    assert main(["bench", "--shape", "4,6", "--repeat", "1", "--peers", "none", "--markdown"]) == 0
    captured = capsys.readouterr()
    assert captured.err.startswith("the machine was busy (load 1000")
    assert "the machine was busy (load 1000" in captured.out


@pytest.mark.parametrize("width", [60, 80, 200])
def test_bench_has_one_line_a_row_on_any_terminal(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")  # what rich takes for a terminal
    monkeypatch.setenv("COLUMNS", str(width))
    shape = ["--shape", "2,30,11,10", "--norm", "group", "--dtype", "bfloat16"]
    assert main(["bench", *shape, "--layout", "last", "--repeat", "1", "--peers", "none"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    rows = [line for line in text.splitlines() if "group 2×11×10×30 last bf16" in line]
    assert [row.split()[4] for row in rows] == ["forward", "backward"]
    assert max(map(len, rows)) <= width
    assert text.splitlines()[text.splitlines().index(rows[0]) + 1] == rows[1]
    assert ("a wider terminal also shows" in text) == (width < 100)


def test_bench_tells_the_time_left_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)
    shapes = [part for n in range(2, 7) for part in ("--shape", f"{n},6")]
    arguments = ["bench", *shapes, "--pass", "eval", "--repeat", "1", "--peers", "none", "--json", "-"]
    assert main(arguments) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert main(arguments) == 0
    shown = capsys.readouterr().err.split("\r\x1b[K")
    assert shown[-1] == ""
    assert re.fullmatch(r"10/10, about \d+ s left: 6x6-axis1-float32 eval", shown[-2])


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([])
    assert exit_.value.code == 2
    assert "  selftest  " in capsys.readouterr().err


def test_how_much_slower_the_reference_is_has_digits() -> None:
    def shown(times: float) -> str:
        row = {"ms": {"reference": {"median": times}, "ours": {"median": 1.0}}}
        return report.columns({"environment": {}, "rows": []})["reference/ours"](row)

    assert [*map(shown, (0.254, 1.26, 12.6, 545.4))] == ["0.25", "1.3", "13", "545"]


def test_demo_times_numpy_as_one_writes_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    console = pytest.importorskip("rich.console").Console(highlight=False, width=100)
    from fusednorm.cli import demo

    run = bench.run
    monkeypatch.setattr(bench, "run", lambda cases, **options: run([replace(cases[0], shape=(4, 8, 9, 9))], **options))
    forward, _ = demo._times(console, "cpu")
    text = capsys.readouterr().out
    ms = forward["ms"]["numpy"]["median"]
    assert re.search(rf"^NumPy, float32, from the formulas +{ms:.1f} ", text, re.MULTILINE)
    assert "float64" not in text


@pytest.mark.parametrize("pass_", bench.PASSES)
def test_the_formula_in_numpy_computes_the_same(pass_: str) -> None:
    case = Case(name="formula", shape=(8, 6, 5, 5), training=pass_ != "eval", running=True)
    with bench.Cpu(with_numpy=True) as machine:
        inputs = make(case)
        by_name = {each.name: each for each in machine.contenders(case, inputs, pass_)}
        results = []
        for name in ("ours", "numpy"):
            array = by_name[name].array
            assert array
            results.append(array(by_name[name].call()))
    np.testing.assert_allclose(results[0], results[1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("command", ["selftest", "bench", "demo"])
def test_a_gpu_without_cuda_is_refused_with_the_reason(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_C, "cuda_built", lambda: False)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "not built: no nvcc was found"})
    assert main([command, "--device", "cuda:1"]) == 2
    assert capsys.readouterr().err == (
        f"fusednorm {command}: device 'cuda:1' is not to be had: in this fusednorm CUDA is not built: no nvcc was "
        "found\n"
    )


def _wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the library's y be wrong by 1e-3."""
    right = fusednorm.batch_norm_forward

    def wrong(*args: Any, **options: Any) -> Any:
        y, mean, rstd = right(*args, **options)
        return y + y.dtype.type(1e-3), mean, rstd

    monkeypatch.setattr(fusednorm, "batch_norm_forward", wrong)


def test_selftest_passes_on_every_instruction_set(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = _C.build_info()["isa"]
    assert main(["selftest", "--filter", "37x17-axis1-float"]) == 0
    text = capsys.readouterr().out
    assert "all passed" in text
    assert "up to 1 it passes" in text
    assert all(isa in text for isa in _C.build_info()["isa_runnable"])
    assert _C.build_info()["isa"] == chosen


def test_selftest_json_tells_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    _wrong(monkeypatch)
    assert main(["selftest", "--json", "--filter", "37x17-axis1-float32"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert {failure["name"] for failure in result["failures"]} == {"y"}
    assert {failure["place"] for failure in result["failures"]} == set(_C.build_info()["isa_runnable"])


def test_selftest_of_no_case_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--filter", "no such case"]) == 2
    assert "no such case" in capsys.readouterr().err


def test_bench_writes_what_it_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    file, figure = tmp_path / "results.json", tmp_path / "results.svg"
    assert main(["bench", "--quick", "--shape", "4,6,5,5", "--json", str(file), "--plot", str(figure)]) == 0
    shown = capsys.readouterr().out
    results = json.loads(file.read_text())
    rows = results["rows"]
    assert [(row["shape"], row["layout"], row["pass"]) for row in rows] == [
        (shape, layout, pass_)
        for shape, layout in (([4, 6, 5, 5], "first"), ([4, 5, 5, 6], "last"))
        for pass_ in ("forward", "backward", "eval")
    ]
    for row in rows:
        assert row["wrong"] == []
        assert row["checked"] == [6, 6]
        assert {"copy", "ours_out", "ours", "reference"} <= set(row["ms"])
        assert all(0 < ms["p10"] <= ms["median"] <= ms["p90"] for ms in row["ms"].values())
        assert bench.label(row) in shown
    assert results["environment"]["isa"] == _C.build_info()["isa"]
    assert "<svg" in figure.read_text()

    assert main(["bench", "--from", str(file), "--markdown"]) == 0
    assert capsys.readouterr().out == bench.table(results)


@pytest.mark.parametrize("norm", NORMS)
def test_bench_takes_a_shape_of_every_norm(norm: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "--norm", norm, "--shape", "4,6,5,5", "--repeat", "1", "--peers", "none", "--json", "-"]
    assert main(arguments) == 0
    results = json.loads(capsys.readouterr().out)
    assert results["failed"] == []
    rows = results["rows"]
    layouts = ["first"] if norm in ("layer", "rms", "weight") else ["first", "last"]
    passes = ["forward", "backward", *(["eval"] if norm == "batch" else [])]
    assert [(row["layout"], row["pass"]) for row in rows] == list(itertools.product(layouts, passes))
    for row in rows:
        assert row["norm"] == norm
        assert row["wrong"] == []
        assert set(row["ms"]) == {"copy", "ours_out", "ours"}


def test_bench_compares_with_a_saved_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("rich")

    def run(name: str, copies: float, shape: list[int]) -> str:
        spread = {"median": copies, "p10": copies, "p90": copies}
        row = {"norm": "batch", "shape": shape, "layout": "flat", "dtype": "float32", "pass": "forward", "wrong": [],
               "residual": False, "activation": None, "checked": [1, 1], "ratios": {"ours_out/copy": spread},
               "ms": {"copy": spread, "ours_out": spread, "ours": spread}}  # fmt: skip
        path = tmp_path / name
        path.write_text(json.dumps({"environment": bench.environment(), "rows": [row]}))
        return str(path)

    now, before, other = run("now", 2.0, [64, 32]), run("before", 3.0, [64, 32]), run("other", 3.0, [64, 33])
    for more in ([], ["--markdown"]):
        assert main(["bench", "--from", now, "--compare", before, *more]) == 0
        text = capsys.readouterr().out
        assert "3.00 ±0.00" in text
        assert "beside the copy, 1.50 times as fast as before (geometric mean of 1 rows)" in " ".join(text.split())
    assert main(["bench", "--from", now, "--compare", other]) == 0
    text = capsys.readouterr().out
    assert "3.00" not in text
    assert "as before" not in text


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
@pytest.mark.parametrize("option", ["--from", "--compare"])
def test_bench_says_what_is_wrong_with_a_saved_run(
    option: str, text: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.json"
    if text is not None:
        path.write_text(text)
    assert main(["bench", "--markdown", option, str(path)]) == 2
    assert capsys.readouterr().err.startswith(f"fusednorm bench: cannot read {path}: ")


def test_the_share_of_the_copy_counts_what_must_move() -> None:
    """Half of the copy's time for as many bytes is its full bandwidth for twice as many."""
    row = {"pass": "forward", "residual": False, "activation": None, "ratios": {"ours_out/copy": {"median": 2.0}}}
    assert [report.floor(row | more) for more in (
        {}, {"pass": "backward"}, {"residual": True}, {"pass": "backward", "residual": True},
        {"pass": "backward", "residual": True, "activation": "relu"}, {"floor": 7},
    )] == [2, 3, 3, 4, 5, 7]  # fmt: skip
    assert report.share(row) == 0.5
    assert report.share(row | {"pass": "backward"}) == 0.75
    assert report.share(row | {"floor": 4, "ratios": {"copy/ours_out": {"median": 0.25}}}) == 0.5


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_bench_contenders_agree_in_every_dtype(dtype: str) -> None:
    pytest.importorskip("ml_dtypes")
    for shape, axis in (((6, 8, 5, 5), 1), ((6, 5, 5, 8), -1), ((32, 8), 1)):
        for training, residual in ((True, True), (True, False), (False, True)):
            case = Case("", shape, axis=axis, dtype=dtype, training=training, residual=residual, activation="relu")
            for row in bench.measure(case, repeat=1):
                assert row["wrong"] == [], row
                assert row["ms"]


@pytest.mark.parametrize("norm", sorted({case.norm for case in BENCH} - {"batch"}))
def test_bench_contenders_agree_of_every_norm(norm: str) -> None:
    """On the smallest of its cases, in both dtypes and layouts."""
    pytest.importorskip("ml_dtypes")
    listed = [case for case in BENCH if case.norm == norm]
    least = min(case.size for case in listed)
    for case in (case for case in listed if case.size == least):
        for row in bench.measure(case, repeat=1):
            assert not row["wrong"]
            assert {"copy", "ours_out", "ours", "reference"} <= row["ms"].keys()
            assert "torch" in row["ms"] or importlib.util.find_spec("torch") is None


def test_bench_does_not_time_wrong_results(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("rich")
    _wrong(monkeypatch)
    file = tmp_path / "results.json"
    assert main(["bench", "--shape", "4,6", "--pass", "forward", "--json", str(file)]) == 1
    (row,) = json.loads(file.read_text())["rows"]
    assert row["ms"] == {}
    assert "y: error" in row["wrong"][0]
    assert "WRONG" in capsys.readouterr().out


def test_bench_checks_large_tensors_on_some_channels() -> None:
    (row,) = bench.measure(Case("", (64, 96, 16, 16)), ["forward"], repeat=1)
    assert row["checked"] == [64, 96]
    assert row["wrong"] == []


# Of each norm a case, and how much of it is compared where as much as a fourth may be.
PARTLY = [
    (Case("", (24, 32, 8, 8)), [8, 32]),
    (Case("", (24, 8, 8, 32), axis=-1, ghost_batch_size=7), [8, 32]),
    (Case("", (90, 64), axis=-1, ghost_batch_size=7, residual=True, activation="relu"), [16, 64]),
    (Case("", (24, 32, 8, 8), norm="instance", running=False), [8, 32]),
    (Case("", (24, 8, 8, 32), axis=-1, norm="group", groups=16, running=False), [8, 32]),
    (Case("", (80, 300), norm="layer", running=False), [20, 80]),
    (Case("", (80, 300), norm="rms", running=False), [20, 80]),
    (Case("", (40, 7, 30), norm="layer", normalized=2, running=False), [10, 40]),
    (Case("", (64, 33, 16), norm="weight", axis=0, running=False, eps=0.0), [16, 64]),
    (Case("", (33, 16, 64), norm="weight", axis=2, running=False, eps=0.0), [16, 64]),
    (Case("", (4, 12, 9, 9), norm="switchable"), [12, 12]),
]


@pytest.mark.parametrize(("case", "checked"), PARTLY, ids=lambda value: getattr(value, "norm", ""))
def test_bench_checks_some_of_every_norm(case: Case, checked: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "CHECKED_ELEMENTS", case.size // 4)
    for row in bench.measure(case, repeat=1):
        assert row["checked"] == checked
        assert row["wrong"] == []
        assert {"copy", "ours_out", "ours", "reference"} <= set(row["ms"])
        assert ("torch" in row["ms"]) == (case.ghost_batch_size is None and bool(importlib.util.find_spec("torch")))


@pytest.mark.parametrize(("case", "checked"), PARTLY, ids=lambda value: getattr(value, "norm", ""))
@pytest.mark.parametrize(("which", "result"), [("forward", "y"), ("backward", "dx"), ("backward", "dweight")])
def test_bench_sees_one_wrong_element_in_what_it_checks(
    case: Case, checked: list[int], which: str, result: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "CHECKED_ELEMENTS", case.size // 4)
    function = f"{case.norm}_norm_{which}"
    right = getattr(fusednorm, function)

    def wrong(*args: Any, **options: Any) -> Any:
        results = right(*args, **options)
        results[result == "dweight"].reshape(-1)[-1] += 1e-2  # the last channel, line and column are always compared
        return results

    monkeypatch.setattr(fusednorm, function, wrong)
    assert [text.split(":")[0] for text in bench.measure(case, repeat=1)[0]["wrong"]] == [result]


@pytest.mark.parametrize(("case", "checked"), PARTLY, ids=lambda value: getattr(value, "norm", ""))
def test_bench_times_what_the_case_says(case: Case, checked: list[int]) -> None:
    inputs = make(case)
    want = expected(case, inputs)
    for pass_, result in (("forward", want.y), ("backward", want.dx)):
        for own in ours(case, inputs, pass_):
            assert own.array
            np.testing.assert_allclose(own.array(own.call()), result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("compiles", [False, pytest.param(True, marks=pytest.mark.thorough)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, while it compiles
def test_bench_peers_of_a_gpu_compute_the_same(dtype: str, compiles: bool) -> None:
    """On the CPU: what PyTorch makes of the forward, and autograd of that, against ours."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("ml_dtypes")
    listed = {case.norm: case for case, _ in PARTLY if case.ghost_batch_size is None}
    for case in (replace(case, dtype=dtype) for case in listed.values()):
        inputs = make(case)
        peer = torch_peer(case)
        assert peer
        theirs = peer(case, inputs)
        torch.compiler.reset()
        function = torch.compile(theirs.function, backend="aot_eager", fullgraph=True) if compiles else theirs.function
        for pass_ in ("forward", "backward"):
            own = ours(case, inputs, pass_)[1]
            assert own.array
            want = own.array(own.call()).astype("float64")
            call = theirs.of(function, pass_)
            for _ in range(2):
                got = theirs.array(call())
                assert got.shape == want.shape
                assert abs(got - want).mean() < 0.01 * abs(want).mean(), (case.norm, pass_)


def test_rows_of_a_gpu() -> None:
    rows = [(case.norm, case.dtype, case.size * numpy_dtype(case.dtype).itemsize, case) for case in BENCH_CUDA]
    for norm, dtype in itertools.product(("layer", "rms"), ("float32", "bfloat16")):
        assert [case.shape[1] for n, d, size, case in rows if (n, d) == (norm, dtype) and size >= 2**28] == [
            256, 1024, 4096, 16384, 65536
        ]  # fmt: skip
        assert [size < 10e6 for n, d, size, case in rows if (n, d) == (norm, dtype) and size < 2**28] == [True]
    for norm, dtype, shape in itertools.product(
        ("instance", "group"), ("float32", "bfloat16"),
        [(32, 256, 56, 56), (32, 56, 56, 256), (32, 64, 112, 112), (32, 112, 112, 64)],
    ):  # fmt: skip
        (case,) = (case for n, d, _, case in rows if (n, d, case.shape) == (norm, dtype, shape))
        assert case.groups == (32 if norm == "group" else 1)
    assert any(case.ghost_batch_size for case in BENCH_CUDA)
    assert any(case.ghost_batch_size and "quick" in case.tags for case in BENCH)


def test_bench_threads_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = fusednorm.get_num_threads()
    assert main(["bench", "--shape", "4,6", "--threads", "1", "--markdown", "--pass", "eval"]) == 0
    assert fusednorm.get_num_threads() == before
    assert "threads: 1 on" in capsys.readouterr().out


def test_select_filters_the_list() -> None:
    assert bench.select() == list(BENCH)
    some = bench.select(dtype="bfloat16", layout="last", quick=True)
    assert some
    assert all(
        case.dtype == "bfloat16" and "quick" in case.tags and case.axis == (1 if len(case.shape) == 2 else -1)
        for case in some
    )


def test_lost_rows_are_marked() -> None:
    times = {"median": 2.0, "p10": 1.9, "p90": 2.2}
    row = {
        "norm": "batch", "shape": [8, 4], "layout": "flat", "dtype": "float32", "pass": "forward", "residual": False,
        "activation": None, "checked": [4, 4], "wrong": [], "ms": {"copy": times, "ours_out": times, "ours": times},
        "ratios": {"ours_out/copy": times, "torch/ours": times},
    }  # fmt: skip
    lost = row | {"ratios": {"ours_out/copy": times, "torch/ours": times | {"median": 0.9}}}
    results = {"environment": bench.environment(), "rows": [row, lost]}
    lines = bench.table(results).splitlines()
    assert lines[2].startswith("| 8×4 f32 | forward | 2.00 | 2.00 | 2.00 ±0.15 | – | 2.00 ±0.15 |")
    assert lines[3].startswith("| **✗ 8×4 f32** |")
    assert "1 of 2 rows lost" in bench.table(results)


def test_rounds_are_interleaved() -> None:
    order: list[str] = []
    contenders = [Contender(name, lambda name=name: order.append(name)) for name in "ab"]  # type: ignore[misc]
    samples = interleaved(contenders, repeat=3)
    assert [len(times) for times in samples.values()] == [3, 3]
    assert re.fullmatch("a{2}b{2}(a+b+){3}", "".join(order))


def test_a_call_of_several_computations_is_timed_by_each() -> None:
    contender = Contender("two", lambda: None, count=2)
    assert interleaved([contender], repeat=1, clock=lambda call, calls: 0.5 * calls) == {"two": [250.0]}
    assert interleaved([contender], repeat=1, clock=lambda call, calls: 5.0 * calls) == {"two": [2500.0]}


def test_demo_trains_and_saves_its_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert main(["demo", "--epochs", "1", "--skip-timing", "--output", str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert (tmp_path / "new" / "fusednorm-demo.png").stat().st_size > 10_000
    assert "epoch   1:" in text
    assert "████" in text


def test_demo_for_machines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert main(["demo", "--epochs", "2", "--skip-timing", "--json", "--output", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert "epoch   1:" in captured.err
    (deep, _) = found["training"].values()
    assert {name: len(epochs) for name, epochs in deep.items()} == {"normalized": 2, "plain": 2}
    assert all(0 <= epoch["accuracy"] <= 1 for epochs in deep.values() for epoch in epochs)
    assert Path(found["figure"]).exists()
    assert found["times"] == found["errors"] == []


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "nesterov", "rmsprop", "adam"])
def test_normalization_lets_six_sigmoid_layers_learn(optimizer: str) -> None:
    pytest.importorskip("sklearn")
    threadpoolctl = pytest.importorskip("threadpoolctl")
    from fusednorm.cli.demo import load_digits
    from fusednorm.cli.demo.network import network, train
    from fusednorm.cli.demo.optimizers import OPTIMIZERS

    digits = load_digits(seed=0)
    accuracy = {}
    with threadpoolctl.threadpool_limits(1):
        for normalized in (False, True):
            net = network(6, "sigmoid", normalized, seed=0)
            step = OPTIMIZERS[optimizer](net.parameters(), OPTIMIZERS[optimizer].default_rate)
            *_, last = train(net, step, digits, 25, seed=0)
            accuracy[normalized] = last.accuracy
    assert accuracy[True] > 0.95
    assert accuracy[False] < 0.6


def test_progress_is_one_line_of_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    progress("nobody sees this")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    progress("x" * 30)
    progress()
    assert capsys.readouterr().err == f"\r\x1b[K{'x' * 19}\r\x1b[K"


def test_the_table_of_the_family_fits_100_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(__file__).parent.parent / "examples" / "family.py"
    spec = importlib.util.spec_from_file_location("family_of_the_table", path)
    assert spec
    assert spec.loader
    family = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, family)
    spec.loader.exec_module(family)
    first = ["ghost batch", "(16, 1, 24, 4096, 4096)", "3×16×24, 3×16×24, 16×24"]
    times = ["1.2e-07", "10.00 ±1.00", "20.00 ±1.00", "12.00 ±1.00"]
    rich = importlib.util.find_spec
    for found in (rich, lambda name: None):
        monkeypatch.setattr(importlib.util, "find_spec", found)
        family.show("title", [[*first, "forward", *times], ["", "", "", "backward", *times]])
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= 100
        assert all(any(text in line for line in lines) for text in first)
