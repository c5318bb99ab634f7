"""population_statistics: against NumPy on what the layers were given, PyTorch's update_bn, and what must stay."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import ranks
from support import Array
from test_population import ESTIMATORS, expect_close, expected

torch = pytest.importorskip("torch", reason="PyTorch is not installed")

import fusednorm.torch as fnt  # noqa: E402
from torch import nn  # noqa: E402
from torch.optim.swa_utils import update_bn  # noqa: E402

WRITTEN = ("running_mean", "running_var", "num_batches_tracked")
TRACKED = ("body.1", "body.4", "twice", "head")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
        torch.compiler.set_stance("default")  # which ranks that are threads leave in any state


class Network(nn.Module):
    """Batch norms of several kinds, one of them called twice, one in training only; dropout between them."""

    def __init__(self, dtype: Any = torch.float32, dropout: float = 0.5) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout), fnt.BatchNorm2d(6)
        )
        self.twice = nn.BatchNorm1d(6)
        self.head = fnt.BatchNormAct(6)
        self.auxiliary = nn.BatchNorm1d(6)
        self.untracked = nn.BatchNorm1d(6, track_running_stats=False)
        self.to(dtype)

    def forward(self, x: Any) -> Any:
        x = self.body(x).square().mean((2, 3))
        x = self.head(self.twice(self.twice(self.untracked(x)) * x), residual=x)
        return self.auxiliary(x) if self.training else x


def batches(dtype: Any = torch.float32) -> list[Any]:
    """As of a data loader, uneven."""
    return [(torch.randn(n, 3, 6, 6, dtype=dtype) * (1 + i) + i, "labels") for i, n in enumerate((8, 3, 5))]


def recorded(model: nn.Module) -> dict[str, list[Array]]:
    """What each batch norm is given from here on, call by call."""
    inputs: dict[str, list[Array]] = {}
    for name in TRACKED:
        given = inputs.setdefault(name, [])
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, given=given: given.append(args[0].detach().double().numpy().copy())
        )
    return inputs


def state(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, m in model.named_modules():
        hooks = len(m._forward_pre_hooks), len(m._forward_hooks)
        found[f"{name}.flags"] = (
            m.training,
            getattr(m, "track_running_stats", None),
            getattr(m, "momentum", None),
            hooks,
        )
    return found


def assert_close(got: nn.Module, want: nn.Module, error: float) -> None:
    """Their running statistics, of the order of 1."""
    for name in TRACKED:
        for buffer in WRITTEN:
            pair = (getattr(model.get_submodule(name), buffer) for model in (got, want))
            torch.testing.assert_close(*pair, rtol=error, atol=error)


def assert_unchanged(model: nn.Module, before: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    for name, got in state(model).items():
        if name not in but:
            same = torch.equal(got, before[name]) if isinstance(got, torch.Tensor) else got == before[name]
            assert same, name


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_formula(dtype: str, estimator: str) -> None:
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    model = Network(getattr(torch, dtype))
    inputs = recorded(model)
    model.body[3].eval()
    before, lying = state(model), {name: b.data_ptr() for name, b in model.named_buffers()}
    report = fnt.population_statistics(model, batches(getattr(torch, dtype)), estimator)
    assert_unchanged(model, before, tuple(f"{name}.{buffer}" for name in TRACKED for buffer in WRITTEN))
    assert {name: b.data_ptr() for name, b in model.named_buffers()} == lying
    calls = {name: 6 if name == "twice" else 3 for name in TRACKED}
    assert report.done == {name: f"estimated on {n} batches ({estimator})" for name, n in calls.items()}
    assert report.left == {"untracked": "it has no running statistics", "auxiliary": "it was not called"}
    for name in TRACKED:
        module = model.get_submodule(name)
        assert module.num_batches_tracked == len(inputs[name]) == calls[name]
        running = {buffer: getattr(module, buffer).double().numpy() for buffer in WRITTEN[:2]}
        expect_close(SimpleNamespace(**running), expected(estimator, inputs[name]), dtype, calls[name], stored=dtype)


def test_layers_behind_get_what_they_got_in_training() -> None:
    """Normalized by batches, with nothing dropped; a second pass says the same of a model that it has changed."""
    model = Network(torch.float64)
    inputs = recorded(model)
    given = batches(torch.float64)
    fnt.population_statistics(model, given)
    first = {name: list(values) for name, values in inputs.items()}
    for values in inputs.values():
        values.clear()
    model.eval()
    fnt.population_statistics(model, given)
    for name in TRACKED:
        for one, other in zip(first[name], inputs[name], strict=True):
            assert np.array_equal(one, other)
    behind = np.maximum(model.body[1].train()(model.body[0](given[0][0])).detach().numpy(), 0)
    np.testing.assert_allclose(inputs["body.4"][0], behind, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("converted", [False, True])
def test_update_bn_is_cumulative(converted: bool) -> None:
    """Both in float64, and without dropout the same but for rounding, where another estimator is off by 1/n."""
    model = Network(torch.float64, dropout=0)
    given = batches(torch.float64)
    want = copy.deepcopy(model)
    update_bn(given, want)
    if converted:
        fnt.convert(model)
    fnt.population_statistics(model, given, "cumulative")
    assert_close(model, want, 1e-11)
    fnt.population_statistics(model, given, "exact")
    for name in TRACKED:
        apart = model.get_submodule(name).running_var / want.get_submodule(name).running_var - 1
        assert apart.abs().max() > 1e-3


def test_what_raises_leaves_all_as_it_was() -> None:
    model = Network()
    model.body[4].eval()
    fnt.population_statistics(model, batches())
    before = state(model)
    given = batches()

    def broken() -> Iterator[Any]:
        yield given[0]
        raise KeyboardInterrupt

    def nan() -> Iterator[Any]:
        yield from given
        yield torch.where(torch.arange(3)[:, None, None] == 1, torch.nan, given[0][0]), 0

    with pytest.raises(KeyboardInterrupt):
        fnt.population_statistics(model, broken())
    assert_unchanged(model, before)
    used_up = iter(given)
    list(used_up)
    for nothing in ([], used_up):
        with pytest.raises(ValueError, match=r"no batch norm was called on a batch: is batches empty, or an iterator"):
            fnt.population_statistics(model, nothing)
        assert_unchanged(model, before)
    with pytest.raises(RuntimeError, match="expected input"):
        fnt.population_statistics(model, [given[0], torch.ones(2, 5, 6, 6)])
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fnt.population_statistics(model, [given[0], torch.ones(1, 3, 6, 6)])
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match=r"no statistics of body.1: its inputs have NaN or infinities.* as they were"):
        fnt.population_statistics(model, nan())
    assert_unchanged(model, before)
    with pytest.raises(ValueError, match="estimator must be one of exact, paper, cumulative"):
        fnt.population_statistics(model, given, "average")
    assert_unchanged(model, before)


def test_hooks_run_and_what_they_change_is_seen() -> None:
    layer, seen = nn.BatchNorm1d(4), []
    layer.register_forward_pre_hook(lambda _, args: (2 * args[0],))
    layer.register_forward_hook(lambda *called: seen.append(called[2]))
    x = torch.randn(10, 4, requires_grad=True)
    report = fnt.population_statistics(layer, [x])
    assert report.done == {"": "estimated on 1 batches (exact)"}
    torch.testing.assert_close(layer.running_mean, 2 * x.detach().mean(0), rtol=1e-6, atol=1e-6)
    assert len(seen) == 1
    assert not seen[0].requires_grad
    torch.testing.assert_close(seen[0].var(0, correction=0), torch.ones(4), rtol=1e-4, atol=0)  # normalized by x itself


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("kind", [fnt.BatchNorm1d, fnt.BatchNormAct])
def test_masks_and_other_batches(kind: Any, named: bool) -> None:
    layer = kind(4, dtype=torch.float64)
    given = [{"input": torch.randn(n, 4, 7, dtype=torch.float64), "mask": torch.rand(n, 7) < 0.5} for n in (5, 3)]

    def positional(model: Any, batch: Any) -> Any:
        return model(batch["input"], *([None] if kind is fnt.BatchNormAct else []), batch["mask"])

    fnt.population_statistics(layer, given, call=(lambda model, batch: model(**batch)) if named else positional)
    counted = [batch["input"].movedim(1, -1)[batch["mask"]].numpy() for batch in given]
    running = {buffer: getattr(layer, buffer).numpy() for buffer in WRITTEN[:2]}
    expect_close(SimpleNamespace(**running), expected("exact", counted), "float64")


def test_tensors_alone_are_batches_too() -> None:
    x = torch.randn(6, 4)
    models = [nn.Sequential(nn.BatchNorm1d(4)) for _ in range(3)]
    for model, batch in zip(models, (x, [x, 0], (x,)), strict=True):
        fnt.population_statistics(model, [batch])
        assert torch.equal(model[0].running_mean, models[0][0].running_mean)


def test_nothing_to_estimate() -> None:
    """The batches are not even looked at."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False))
    report = fnt.population_statistics(model, iter([None]))
    assert report.done == {}
    assert report.left == {"1": "it has no running statistics"}


def test_compiled_models() -> None:
    """They run as they are, and nothing is compiled for the occasion."""
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("PyTorch before 2.6")
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU())
    given = [torch.randn(n, 3) for n in (5, 6, 7)]
    want = copy.deepcopy(model)
    fnt.population_statistics(want, given)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    before, counted = compiled(given[0]), dict(torch._dynamo.utils.counters["stats"])
    model[1].reset_running_stats()
    report = fnt.population_statistics(compiled, given)
    assert list(report.done) == ["_orig_mod.1"]
    assert torch.equal(model[1].running_mean, want[1].running_mean)
    assert dict(torch._dynamo.utils.counters["stats"]) == counted
    assert torch.equal(compiled(given[0]), before)


# The progress bar.


class Terminal:
    def __init__(self) -> None:
        self.written = ""

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return True


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    model = nn.BatchNorm1d(3)
    fnt.population_statistics(model, [torch.randn(4, 3)] * 7)
    assert capsys.readouterr() == ("", "")
    fnt.population_statistics(model, [torch.randn(4, 3)] * 7, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "population statistics" in err
    assert "7/7" in err
    for progress, shown in ((None, True), (False, False)):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        fnt.population_statistics(model, iter([torch.randn(4, 3)] * 7), progress=progress)
        assert ("7/?" in terminal.written or "7/7" in terminal.written) == shown
        assert (terminal.written != "") == shown


def test_rich_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "rich", None)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    model = nn.BatchNorm1d(3)
    fnt.population_statistics(model, [torch.randn(4, 3)])
    assert terminal.written == ""
    before = state(model)
    with pytest.raises(ImportError, match="a progress bar needs rich: pip install rich"):
        fnt.population_statistics(model, [torch.randn(4, 3)], progress=True)
    assert_unchanged(model, before)


# Ranks.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranks(estimator: str) -> None:
    """The first layer's statistics are those of all ranks' batches; each rank has the same bits, by one gather."""
    model, given = Network(torch.float64), batches(torch.float64)
    shares = [given[:1], [], given[1:]]
    want = copy.deepcopy(model)
    fnt.population_statistics(want, given, estimator)

    def work(rank: ranks.Threads) -> Any:
        mine = copy.deepcopy(model)
        fnt.population_statistics(mine, shares[rank.rank], estimator, process_group=rank)
        assert rank.gathers == 1
        return mine

    found = ranks.threads(3, work)
    for other in found[1:]:
        assert_unchanged(other, state(found[0]))
    assert_close(found[0], want, 1e-12)


def test_synchronized_modules_are_for_themselves() -> None:
    """Ranks have different numbers of batches, which such modules would wait for."""
    given = batches(torch.float64)
    want = Network(torch.float64)
    fnt.population_statistics(want, given)
    model = fnt.convert_sync_batchnorm(Network(torch.float64))
    model.load_state_dict(want.state_dict())
    shares = [given[:1], given[1:]]

    def work(rank: ranks.Threads) -> Any:
        mine = copy.deepcopy(model)
        synchronized = [module for module in mine.modules() if isinstance(module, fnt.SyncBatchNorm)]
        for module in synchronized:
            module.process_group = rank
        fnt.population_statistics(mine, shares[rank.rank], process_group=rank)
        assert synchronized
        assert all(type(module) is fnt.SyncBatchNorm for module in synchronized)
        assert rank.gathers == 1
        return mine

    for mine in ranks.threads(2, work):
        assert_close(mine, want, 1e-12)
