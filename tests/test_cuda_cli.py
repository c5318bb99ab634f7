"""The commands with --device cuda: on a GPU, or emulated."""

from __future__ import annotations

import json
import sys
from typing import Any

import fusednorm
import pytest
from fusednorm import _C
from fusednorm.cli import main
from test_cuda import DEVICES


@pytest.mark.parametrize("device", ["cuda", f"cuda:{DEVICES[-1]}"])
def test_selftest(device: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--device", device, "--filter", "37x17-axis1"]) == 0
    shown = capsys.readouterr().out
    assert f"cases on {'cuda:0' if device == 'cuda' else device}: all passed" in shown
    assert _C.build_info()["isa"] not in shown


def test_selftest_tells_failures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    right = fusednorm.batch_norm_forward

    def wrong(*args: Any, **options: Any) -> Any:
        y, mean, rstd = right(*args, **options)
        return y + 1e-3, mean, rstd

    monkeypatch.setattr(fusednorm, "batch_norm_forward", wrong)
    assert main(["selftest", "--device", "cuda", "--json", "--filter", "37x17-axis1-float64"]) == 1
    failures = json.loads(capsys.readouterr().out)["failures"]
    assert {(failure["name"], failure["place"]) for failure in failures} == {("y", "cuda:0")}


@pytest.mark.parametrize("command", ["selftest"])
def test_what_is_missing_is_said_in_one_line(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--device", f"cuda:{len(DEVICES)}"]) == 2
    assert capsys.readouterr().err == (
        f"fusednorm {command} --device cuda:{len(DEVICES)}: the last one is cuda:{len(DEVICES) - 1}\n"
    )
    monkeypatch.setattr(_C, "cuda_devices", lambda: 0)
    assert main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        f"fusednorm {command} --device cuda:0: no GPU was found; nvidia-smi may say why\n"
    )
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        f"fusednorm {command} --device cuda:0 needs CuPy: pip install 'fusednorm[cuda]'\n"
    )
