"""The examples run, and what they draw is what the library does."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
import ranks
from support import assert_same_bits, normal

EXAMPLES = Path(__file__).parent.parent / "examples"
FAMILY, RESNET, DASK, SYNC = (EXAMPLES / f"{name}.py" for name in ("family", "resnet", "dask_statistics", "sync"))
NORMS = ("batch", "ghost batch", "layer", "instance", "group", "RMS", "switchable", "weight")


def run(example: Path, *arguments: str, missing: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """In an interpreter of its own, warnings as errors, without the libraries in `missing`."""
    code = (
        f"import runpy, sys; sys.modules.update(dict.fromkeys({missing!r})); sys.argv[1:] = {arguments!r}; "
        f"runpy.run_path({str(example)!r}, run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=1200, check=False
    )


def load(example: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example.stem, example)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[example.stem] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def family() -> ModuleType:
    return load(FAMILY)


@pytest.fixture(scope="module")
def resnet() -> ModuleType:
    pytest.importorskip("torch")
    return load(RESNET)


def test_family_draws_and_tells(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = run(FAMILY, "--skip-timing", f"--output={tmp_path / 'drawn.png'}")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert (tmp_path / "drawn.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "drawn.png").stat().st_size > 50_000
    assert all(f"\n  {norm} " in done.stdout or f"\n{norm} " in done.stdout for norm in NORMS)
    assert "WRONG" not in done.stdout


@pytest.mark.thorough
def test_family_needs_no_other_library(tmp_path: Path) -> None:
    done = run(FAMILY, "--skip-timing", f"--output={tmp_path / 'drawn.png'}", missing=("matplotlib", "rich", "torch"))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert all(f"\n{norm} " in done.stdout for norm in NORMS)
    assert "pip install torch" in done.stdout
    assert "pip install 'fusednorm[demo]'" in done.stdout
    assert not (tmp_path / "drawn.png").exists()


def test_wrong_results_have_no_time(family: ModuleType) -> None:
    images, filters = ((normal(shape), normal(shape, seed=1)) for shape in (family.IMAGES, family.FILTERS))
    (batch, *_) = family.norms(*images, *filters)
    wrong = replace(batch, forward=lambda: (batch.forward()[0] + np.float32(1e-3), *batch.forward()[1:]))
    with family.bench.Cpu(with_reference=False) as machine:
        rows, right = family.table([wrong], images, filters, machine, timed=True)
    assert not right
    assert rows[0][4].endswith("WRONG")
    assert rows[0][5:] == ["–"] * 3
    assert not rows[1][4].endswith("WRONG")
    assert "±" in rows[1][5]


@pytest.mark.parametrize("index", range(len(NORMS)), ids=NORMS)
def test_the_cubes_are_what_the_library_does(family: ModuleType, index: int) -> None:
    """One element of x, far away from the others, changes what shares a statistic with it, and nothing else; one
    element of dy is in the gradient of one weight."""
    x, v = normal(family.IMAGES), normal(family.FILTERS, seed=1)

    def of(x: Any, v: Any, dx: Any = None, dv: Any = None) -> Any:
        return family.norms(x, np.zeros_like(x) if dx is None else dx, v, np.zeros_like(v) if dv is None else dv)[index]

    norm = of(x, v)
    assert norm.name == NORMS[index]
    given = v if norm.name == "weight" else x
    y, *saved = norm.forward()
    for element in ((0, 0, 0, 0), tuple(n // 2 for n in given.shape), tuple(n - 1 for n in given.shape)):
        folds = [family.statistic_and_channel(f, given.shape) for f in norm.folds(given.shape)]
        shared = np.any([statistic == statistic[element] for statistic, _ in folds], axis=0)
        far = given.copy()
        far[element] += 1e4
        moved = of(far, far).forward()[0] != y
        assert not np.any(moved & ~shared)
        # An element may round to the same, by chance.
        assert np.count_nonzero(moved) > 0.999 * np.count_nonzero(shared)

        only = np.zeros_like(given)
        only[element] = 1
        dweight = of(x, v, only, only).backward(*saved)[1]
        assert np.flatnonzero(dweight).tolist() == [folds[0][1][element]]


@pytest.mark.parametrize("size", [1, 3])
def test_sync_is_one_process_with_all_samples(size: int) -> None:
    running = ranks.started(ranks.mpi(size, "-W", "error", str(SYNC)))
    said, _ = running.communicate(timeout=120)
    assert running.returncode == 0, said
    assert f"{size} processes with {'12' if size == 1 else '2, 4, 6'} of 12 samples" in said
    assert "WRONG" not in said
    assert "running statistics have the same bits on all ranks" in said
    # 10 numbers of a header, two counts, and two numbers for each of 64 channels.
    assert "sent by each rank: 1120 bytes forward, 1120 backward, in one collective each, and 400 once" in said


def test_sync_without_mpi() -> None:
    done = run(SYNC, missing=("mpi4py",))
    assert done.returncode == 1
    assert done.stderr == "this example needs MPI: pip install mpi4py mpich\n"


@pytest.mark.slow
def test_resnet_trains_alike_in_all_forms(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    written = tmp_path / "runs.json"
    done = run(RESNET, "--quick", f"--json={written}")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert "WRONG" not in done.stdout
    runs = json.loads(written.read_text())
    assert {(r["model"], r["layout"], r["dtype"]) for r in runs} == set(
        itertools.product(("resnet50", "convnext"), ("first", "last"), ("float32", "bfloat16"))
    )
    for r in runs:
        forms = ["torch.nn", "converted", *(["BatchNormAct"] if r["model"] == "resnet50" else [])]
        assert list(r["losses"]) == list(r["ms"]) == list(r["profile_ms"]) == forms
        assert all(min(r["profile_ms"][form][kind] for kind in ("norms", "products")) > 0 for form in forms)
        assert all(f"\n| {form} |" in done.stdout for form in forms)
        fused = r["profile_ms"].get("BatchNormAct")
        assert fused is None or fused["add, ReLU"] < 0.5 * r["profile_ms"]["converted"]["add, ReLU"]


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet50", "convnext"])
def test_resnet_sees_another_norm(resnet: ModuleType, monkeypatch: pytest.MonkeyPatch, model: str) -> None:
    """Norms with another eps are not torch.nn's."""
    monkeypatch.syspath_prepend(EXAMPLES)  # for its processes
    found = resnet.train(model, "first", "float32", steps=1, count=4, size=64, eps=1e-3)
    assert found["wrong"] == [form for form in found["losses"] if form != "torch.nn"]


@pytest.mark.thorough
def test_dask_in_two_processes() -> None:
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'fusednorm[dask]'")
    done = run(DASK, "--rows=200000")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "26 MB in 4 chunks, 2 processes\n" in done.stdout
    assert "standardizer: the bits of one process that reads all chunks\n" in done.stdout


def test_dask_merges_chunks_in_their_order() -> None:
    """Uneven chunks, one of them empty and the features cut, too; ready in another order than they lie in."""
    pytest.importorskip("distributed", reason="Dask is not installed: pip install 'fusednorm[dask]'")
    dask, da, example = importlib.import_module("dask"), importlib.import_module("dask.array"), load(DASK)
    x = (normal((1000, 6), "float64") + 1e4).astype(np.float32)
    bounds = (0, 300, 300, 307, 800, 1000)
    chunks = [x[start:stop] for start, stop in itertools.pairwise(bounds)]
    one = fn.Standardizer()
    for chunk in chunks:
        one.partial_fit(chunk)

    def late(chunk: Any, block_info: Any) -> Any:
        time.sleep(0.02 * (5 - block_info[0]["chunk-location"][0]))
        return chunk

    table = da.concatenate([da.from_array(chunk, chunks=(-1, 4)) for chunk in chunks]).map_blocks(late, dtype=x.dtype)
    for scheduler in ("synchronous", "threads"):
        with dask.config.set(scheduler=scheduler, num_workers=8):
            found = example.standardizer(table)
            layer = example.batch_norm(table.reshape((1000, 3, 2, 1)))
        for name in ("mean_", "var_", "scale_"):
            assert_same_bits(getattr(found, name), getattr(one, name), name)
        assert found.n_samples_seen_ == 1000
        wide = np.moveaxis(x.astype(float).reshape(1000, 3, 2), 1, 0).reshape(3, -1)
        # The mean and the variance are rounded to float32; of the latter the kernels promise 1e-6.
        np.testing.assert_allclose(layer.running_mean, wide.mean(1), rtol=2**-24 * 1.01)
        np.testing.assert_allclose(layer.running_var, wide.var(1, ddof=1), rtol=1e-6 + 2**-24)
