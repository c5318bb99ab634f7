"""Statistics of whole populations: against NumPy on all inputs at once, and what must stay as it was."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
import ranks
from fusednorm import functional
from fusednorm.population import Estimate
from fusednorm.testing.cases import UNIT_ROUNDOFF
from support import DTYPES, LAYOUTS, Array, assert_same_bits, normal, numpy_dtype

ESTIMATORS = ("exact", "paper", "cumulative")
SIZES = (6, 1, 9, 13)  # of batches; last, one short of a ghost batch


def batches(channels: int, dtype: str = "float32", far: float = 0, sizes: tuple[int, ...] = SIZES) -> list[Array]:
    """Uneven batches, whose means and scales differ, `far` σ from 0."""
    drawn = (normal((n, channels, 4, 3), "float64", seed) for seed, n in enumerate(sizes))
    return [((x * (1 + i) + i + far) * 0.1).astype(numpy_dtype(dtype)) for i, x in enumerate(drawn)]


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.longdouble)


def moments(values: list[Array], correction: int = 1) -> tuple[Array, Array]:
    """Of each channel (axis 1) of all values together, by the two-pass formula in the widest arithmetic."""
    x = np.concatenate([np.moveaxis(wide(v), 1, 0).reshape(v.shape[1], -1) for v in values], 1)
    mean = x.mean(1)
    return mean, ((x - mean[:, None]) ** 2).sum(1) / (x.shape[1] - correction)


def averages(values: list[Array], correction: int = 1) -> tuple[Array, Array]:
    """E[μ_B] and E[m/(m − correction)·σ²_B], each batch weighing the same."""
    of_each = [moments([v], correction) for v in values]
    return np.mean([m for m, _ in of_each], 0), np.mean([v for _, v in of_each], 0)


def expected(estimator: str, values: list[Array], correction: int = 1) -> tuple[Array, Array]:
    if estimator == "exact":
        return moments(values, correction)
    return averages(values, 1 if estimator == "paper" else correction)


def expect_close(layer: Any, want: tuple[Array, Array], dtype: str, steps: int = len(SIZES), stored: str = "") -> None:
    """The kernels promise the variance and the mean in σ to 16 roundings of their arithmetic, float32 or wider. Each
    merge rounds means of float64, by 2⁻⁵³ of themselves; what is stored is rounded once."""
    mean, var = want
    sigma, stored = np.sqrt(var), stored or layer.running_mean.dtype.name
    arithmetic = UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"]
    digits = 16 * arithmetic + 8 * steps * UNIT_ROUNDOFF["float64"] * np.abs(mean) / sigma
    rounding = 0 if stored == "float64" else UNIT_ROUNDOFF[stored]
    assert np.all(np.abs(layer.running_mean - mean) <= digits * sigma + rounding * np.abs(mean))
    assert np.all(np.abs(layer.running_var - var) <= (digits + rounding) * var)


def estimated(layer: Any, values: list[Array], estimator: str = "exact", **options: Any) -> Any:
    with fn.Population(layer, estimator=estimator):
        for x in values:
            layer(x, **options)
    return layer


def state(layer: Any) -> dict[str, Any]:
    return layer.state_dict() | {"training": layer.training, "keys": sorted(vars(layer))}


def assert_unchanged(layer: Any, before: dict[str, Any]) -> None:
    for name, want in before.items():
        got = state(layer)[name]
        if isinstance(want, np.ndarray):
            assert_same_bits(got, want, name)
        else:
            assert got == want, name


# The estimators.

FAR = [(dtype, 0.0) for dtype in DTYPES] + [("float32", 1e6), ("float64", 1e9), ("float16", 100.0)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("dtype", "far"), FAR)
def test_the_formula(dtype: str, far: float, estimator: str) -> None:
    values = batches(5, dtype, far)
    layer = estimated(fn.BatchNorm(5, dtype="float64"), values, estimator)
    expect_close(layer, expected(estimator, values), dtype)
    assert layer.num_batches_tracked == len(values)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str) -> None:
    values = [LAYOUTS[layout](x) for x in batches(5)]
    expect_close(estimated(fn.BatchNorm(5), values), moments(values), "float32")


def test_channels_last_and_tables() -> None:
    values = batches(5)
    last = [np.ascontiguousarray(np.moveaxis(x, 1, -1)) for x in values]
    expect_close(estimated(fn.BatchNorm(5, axis=-1), last), moments(values), "float32")
    tables = [x[:, :, 0, 0] for x in values if len(x) > 1]
    expect_close(estimated(fn.BatchNorm(5), tables), moments(tables), "float32")


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("correction", [0, 1])
def test_correction(correction: int, estimator: str) -> None:
    """The paper's variance is over m − 1, whatever the layer's; the others' is as the layer has it."""
    values = batches(5, "float64", sizes=(2, 2, 3))
    layer = estimated(fn.BatchNorm(5, correction=correction, dtype="float64"), values, estimator)
    expect_close(layer, expected(estimator, values, correction), "float64")


def test_uneven_batches_weigh_the_same_but_for_exact() -> None:
    values = [np.full((n, 1), c, "float64") + normal((n, 1), "float64") * 1e-3 for n, c in ((2, 0.0), (98, 1.0))]
    means = {e: estimated(fn.BatchNorm(1), values, e).running_mean.item() for e in ESTIMATORS}
    assert means["exact"] == pytest.approx(0.98, abs=2e-3)
    assert means["paper"] == means["cumulative"] == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("correction", [0, 1])
def test_cumulative_is_momentum_none(correction: int, ghost: int | None, dtype: str) -> None:
    values = batches(5, dtype)
    options: dict[str, Any] = {"ghost_batch_size": ghost, "correction": correction, "dtype": dtype}
    want = fn.BatchNorm(5, momentum=None, **options)
    for x in values:
        want(x)
    got = estimated(fn.BatchNorm(5, **options), values, "cumulative")
    assert got.num_batches_tracked == want.num_batches_tracked == (len(values) if ghost is None else 10)
    # momentum=None rounds what it keeps once a batch.
    u = 2 * got.num_batches_tracked * UNIT_ROUNDOFF[dtype]
    for name in ("running_mean", "running_var"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=u, atol=u)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_batch_is_its_running_update(estimator: str) -> None:
    (x,) = batches(5, sizes=(7,))
    want = fn.BatchNorm(5, momentum=1.0)
    want(x)
    got = estimated(fn.BatchNorm(5), [x], estimator)
    assert_same_bits(got.running_mean, want.running_mean)
    assert_same_bits(got.running_var, want.running_var)


@pytest.mark.parametrize("ghost", [4, 5, 100])
def test_ghost_batches(ghost: int) -> None:
    values = batches(5, "float64")
    parts = [x[start : start + ghost] for x in values for start in range(0, len(x), ghost)]
    for estimator in ESTIMATORS:
        layer = estimated(fn.BatchNorm(5, ghost_batch_size=ghost, dtype="float64"), values, estimator)
        expect_close(layer, expected(estimator, parts), "float64", len(parts))
        assert layer.num_batches_tracked == len(parts)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ghost", [None, 4])
@pytest.mark.parametrize("axis", [1, -1])
def test_masks(axis: int, ghost: int | None, estimator: str) -> None:
    """Only the positions that count do; a batch of which one does says nothing of a variance, but of the mean."""
    values = batches(5, "float64", sizes=(6, 8, 4, 4))
    masks = [np.random.default_rng(i).random((len(x), 4, 3)) < 0.4 for i, x in enumerate(values)]
    masks[2][...] = False
    masks[3][...] = False
    masks[3][2, 1, 1] = True
    layer = fn.BatchNorm(5, axis=axis, ghost_batch_size=ghost, dtype="float64")
    with fn.Population(layer, estimator=estimator):
        for x, mask in zip(values, masks, strict=True):
            layer(np.moveaxis(x, 1, axis), mask=mask)
    parts = [
        np.moveaxis(x[start : start + (ghost or len(x))], 1, -1)[mask[start : start + (ghost or len(x))]]
        for x, mask in zip(values, masks, strict=True)
        for start in range(0, len(x), ghost or len(x))
    ]
    counted = [part for part in parts if len(part) > (estimator != "exact")]
    assert len(counted) < len(parts)
    expect_close(layer, expected(estimator, counted), "float64", len(parts))
    assert layer.num_batches_tracked == len(counted)


def test_switchable_norm() -> None:
    """What its authors do before inference: averages over batches, with the parameters frozen."""
    values = batches(5, "float64")
    for estimator in ESTIMATORS:
        layer = estimated(fn.SwitchableNorm(5, dtype="float64"), values, estimator)
        expect_close(layer, expected(estimator, values), "float64")
        assert layer.num_batches_tracked == len(values)


def test_keras_variance_is_over_n() -> None:
    values = [np.moveaxis(x, 1, -1) for x in batches(5, "float64", sizes=(2, 2))]
    layer = estimated(fn.BatchNorm.from_convention("keras", 5, dtype="float64"), values)
    expect_close(layer, moments(batches(5, "float64", sizes=(2, 2)), 0), "float64")


# The context.


@pytest.mark.parametrize("training", [True, False])
def test_calls_are_those_of_training(training: bool) -> None:
    """Whatever the flag, y and the gradients are the batch's, and what runs stays until the end."""
    x, dy = batches(5, sizes=(6, 6))
    layer, want = fn.BatchNorm(5, activation="relu"), fn.BatchNorm(5, activation="relu")
    layer.train(training)
    before = state(layer)
    with fn.Population(layer):
        assert_same_bits(layer(x, dy), want(x, dy))
        for got, expect in zip(layer.backward(dy), want.backward(dy), strict=True):
            assert_same_bits(got, expect)
        assert_same_bits(layer.state_dict()["running_mean"], before["running_mean"])
        assert layer.num_batches_tracked == 0
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            other(x)
            assert other.num_batches_tracked == int(training)
    assert layer.training is training
    assert vars(layer).keys() == vars(want).keys()
    expect_close(layer, moments([x]), "float32")
    assert_same_bits(layer.weight, before["weight"])
    layer.eval()
    assert_same_bits(layer(x), fn.batch_norm(x, layer.running_mean, layer.running_var, activation=None).clip(0))


def test_in_place_calls_are_taken_before_they_write() -> None:
    (x,) = batches(5, sizes=(6,))
    layer, given = fn.BatchNorm(5), x.copy()
    with fn.Population(layer):
        layer(given, out=given)
    assert not np.array_equal(given, x)
    expect_close(layer, moments([x]), "float32")


def test_what_raises_leaves_all_as_it_was() -> None:
    x, y = batches(5, sizes=(6, 7))
    layers = [fn.BatchNorm(5), fn.SwitchableNorm(5)]
    for layer in layers:
        layer(x)
    before = [state(layer) for layer in layers]

    def block(values: list[Array], error: bool = False) -> None:
        with fn.Population(*layers):
            for value in values:
                layers[0](value)
            layers[1](y)
            if error:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        block([y], error=True)
    with pytest.raises(ValueError, match=r"no statistics of BatchNorm\(5, .*: it saw no batch; all layers are as"):
        block([])
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        block([y, y[:1, :, 0, 0]])
    with pytest.raises(ValueError, match="NaN or infinities"):
        block([y, np.where(np.arange(5)[:, None, None] == 3, np.nan, y).astype(np.float32)])
    for layer, want in zip(layers, before, strict=True):
        assert_unchanged(layer, want)
    block([y])
    for layer in layers:
        expect_close(layer, moments([y]), "float32")


def test_a_call_that_raises_is_not_taken_in() -> None:
    x, y = batches(5, sizes=(6, 7))
    layer = fn.BatchNorm(5)
    with fn.Population(layer):
        layer(x)
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            layer(y[:1, :, 0, 0])
        with pytest.raises(ValueError, match="out must have"):
            layer(y, out=x)
    expect_close(layer, moments([x]), "float32")
    assert layer.num_batches_tracked == 1


def test_too_few_values() -> None:
    x = batches(5, sizes=(6,))[0]
    mask = np.zeros((6, 4, 3), bool)
    layer = fn.BatchNorm(5)
    with pytest.raises(ValueError, match="it saw no batch"):
        estimated(layer, [x], mask=mask)
    mask[1, 2, 2] = True
    with pytest.raises(ValueError, match="one value per channel, and a variance over n − 1 needs more"):
        estimated(layer, [x], mask=mask)
    layer = estimated(fn.BatchNorm(5, correction=0), [x], mask=mask)
    assert_same_bits(layer.running_mean, x[1, :, 2, 2])
    assert np.all(layer.running_var == 0)


def test_what_is_refused() -> None:
    layer = fn.BatchNorm(5)
    before = state(layer)
    with pytest.raises(TypeError, match="BatchNorm and SwitchableNorm layers, not of InstanceNorm"):
        fn.Population(layer, fn.InstanceNorm(5, track_running_stats=True)).__enter__()  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="has no running statistics"):
        fn.Population(layer, fn.BatchNorm(5, track_running_stats=False)).__enter__()
    with pytest.raises(ValueError, match="estimator must be one of exact, paper, cumulative, not 'mean'"):
        fn.Population(layer, estimator="mean").__enter__()
    with pytest.raises(ValueError, match="needs layers, and each once"):
        fn.Population(layer, layer).__enter__()
    with pytest.raises(ValueError, match="needs layers, and each once"):
        fn.Population().__enter__()
    assert_unchanged(layer, before)


def test_nested_and_second_use() -> None:
    x, y = batches(5, sizes=(6, 7))
    outer, inner = fn.BatchNorm(5), fn.BatchNorm(5)
    population = fn.Population(outer)
    with population:
        outer(x)
        with pytest.raises(RuntimeError, match="part of another Population"), fn.Population(inner, outer):
            pass
        with fn.Population(inner):
            inner(outer(y))
    expect_close(outer, moments([x, y]), "float32")
    assert inner.num_batches_tracked == 1
    with population:
        outer(y)
    expect_close(outer, moments([y]), "float32")
    assert outer.num_batches_tracked == 1


# Ranks.


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_ranks_are_merged_in_their_order(estimator: str) -> None:
    """Uneven shares, one rank without any batch: what one process has on all batches, and the same bits on each."""
    values = batches(5, "float64", far=100)
    shares = [values[:1], [], values[1:]]

    def work(rank: ranks.Threads) -> tuple[fn.BatchNorm, fn.BatchNorm]:
        layers = fn.BatchNorm(5, dtype="float64"), fn.BatchNorm(5, dtype="float64")
        with fn.Population(*layers, estimator=estimator, process_group=rank):
            for x in shares[rank.rank]:
                layers[1](2 * layers[0](x))
        assert rank.gathers == 1
        return layers

    found = ranks.threads(3, work)
    expect_close(found[0][0], expected(estimator, values), "float64")
    of_ranks = [Estimate(estimator, 5, 1) for _ in shares]
    for estimate, share in zip(of_ranks, shares, strict=True):
        for x in share:
            estimate.add(*functional._batch_moments(x, 1, None, None))
    in_order, backwards = Estimate(estimator, 5, 1), Estimate(estimator, 5, 1)
    for one, other in zip(of_ranks, of_ranks[::-1], strict=True):
        in_order._merge(one._state())
        backwards._merge(other._state())
    assert not np.array_equal(in_order.result(), backwards.result())
    assert_same_bits([found[0][0].running_mean, found[0][0].running_var], in_order.result())
    for layers in found:
        for layer, want in zip(layers, found[0], strict=True):
            assert_unchanged(layer, state(want))
            assert layer.num_batches_tracked == len(values)


def test_synchronized_layers_are_for_themselves() -> None:
    """They may be called on different numbers of batches; the group of the population merges what all have seen."""
    values = batches(5, "float64")
    shares = [values[:1], values[1:]]

    def work(rank: ranks.Threads) -> fn.BatchNorm:
        layer = fn.BatchNorm(5, dtype="float64", process_group=rank)
        with fn.Population(layer, process_group=rank):
            for x in shares[rank.rank]:
                assert_same_bits(layer(x), fn.BatchNorm(5, dtype="float64")(x))
        assert rank.gathers == 1
        return layer

    for layer in ranks.threads(2, work):
        expect_close(layer, expected("exact", values), "float64")


def test_a_group_is_looked_at_first() -> None:
    layer = fn.BatchNorm(5)
    with (
        pytest.raises(TypeError, match="process_group must be an mpi4py communicator"),
        fn.Population(layer, process_group="world"),
    ):
        raise AssertionError
    assert layer._estimate is None


def test_ranks_without_batches() -> None:
    def work(rank: ranks.Threads) -> None:
        layer = fn.BatchNorm(5)
        with pytest.raises(ValueError, match="it saw no batch"), fn.Population(layer, process_group=rank):
            pass

    ranks.threads(2, work)


def test_ranks_with_other_layers() -> None:
    class Wrong:
        rank, size = 0, 2

        def allgather(self, array: Array, /) -> Array:
            return np.stack([array[:-1]] * 2)

    layer = fn.BatchNorm(5)
    with (
        pytest.raises(ValueError, match=r"must return \(ranks, 16\), got \(2, 15\)"),
        fn.Population(layer, process_group=Wrong()),
    ):
        layer(batches(5)[0])
    assert layer.num_batches_tracked == 0
