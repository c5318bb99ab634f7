"""Standardizer and Whitener: against their formulas in wide arithmetic, scikit-learn, and themselves in pieces."""

from __future__ import annotations

import pickle
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
from fusednorm.preprocessing import NotFittedError
from fusednorm.testing.cases import UNIT_ROUNDOFF
from hypothesis import given, settings
from hypothesis import strategies as st
from support import DTYPES, LAYOUTS, Array, assert_same_bits, numpy_dtype

FLAGS = [{"with_mean": mean, "with_std": std} for mean in (True, False) for std in (True, False)]
ESTIMATORS: list[Callable[[], Any]] = [
    fn.Standardizer,
    lambda: fn.Standardizer(copy=False),
    *(lambda flags=flags: fn.Standardizer(**flags) for flags in FLAGS[1:]),
    fn.Whitener,
    lambda: fn.Whitener("zca"),
    lambda: fn.Whitener(eps=0.1),
]
EACH = pytest.mark.parametrize("make", ESTIMATORS, ids=lambda make: repr(make()))


def digits(dtype: str, far: Any = 0) -> Any:
    """What var_ may be off by, relative, and mean_, in σ.

    The kernels promise 1e-6, 16 roundings, in float32, the arithmetic of the 16-bit dtypes too, and the same number in
    float64. Merges subtract means, each of which float64 rounds by 2⁻⁵³ of itself: far·2⁻⁵³ in σ, far being mean/σ.
    """
    return 16 * UNIT_ROUNDOFF["float64" if dtype == "float64" else "float32"] + 8 * UNIT_ROUNDOFF["float64"] * far


def wide(x: Any) -> Array:
    return np.asarray(x).astype(np.longdouble)


def formula(x: Any) -> tuple[Array, Array]:
    """Mean and variance of the numbers that are not NaN, in the widest arithmetic there is."""
    mean = np.nanmean(wide(x), 0)
    return mean, np.nanmean((wide(x) - mean) ** 2, 0)


def table(n: int, features: int, dtype: str = "float32", far: float = 0, seed: int = 0) -> Array:
    """Features of different σ, each `far` σ from 0."""
    sigma = 10.0 ** np.linspace(-2, 3, features)
    drawn = np.random.default_rng(seed).standard_normal((n, features))
    return ((drawn + far) * sigma).astype(numpy_dtype(dtype))


def expect_standardized(fitted: fn.Standardizer, x: Array, dtype: str) -> None:
    mean, var = formula(x)
    tolerance = digits(dtype, np.abs(mean) / np.sqrt(var))
    assert fitted.mean_ is not None
    assert fitted.var_ is not None
    assert fitted.scale_ is not None
    assert np.all(np.abs(fitted.mean_ - mean) <= tolerance * np.sqrt(var))
    assert np.all(np.abs(fitted.var_ - var) <= tolerance * var)
    assert np.all(np.abs(fitted.scale_ - np.sqrt(var)) <= tolerance * np.sqrt(var))


# Standardizer: the formula.

FAR = [("float32", 0), ("float32", 1e3), ("float32", 1e6), ("float64", 0), ("float64", 1e6), ("float16", 0)]
FAR += [("bfloat16", 0), ("float16", 30), ("bfloat16", 10)]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "far"), FAR)
def test_the_formula(dtype: str, far: float, layout: str) -> None:
    for n, features in ((2, 3), (7, 1), (100, 5), (3000, 17)):
        x = LAYOUTS[layout](table(n, features, dtype, far))
        mean, var = formula(x)
        if np.any(var == 0):  # rounded to a constant, which is another test's
            continue
        fitted = fn.Standardizer().fit(x)
        expect_standardized(fitted, x, dtype)
        assert fitted.n_samples_seen_ == n
        assert fitted.n_features_in_ == features
        y = fitted.transform(x)
        assert y.dtype == x.dtype
        # x̂ inherits the moments' errors, those of a multiplication and an addition, and is rounded to the dtype.
        want = (wide(x) - mean) / np.sqrt(var)
        error = 2 * digits(dtype, np.abs(mean) / np.sqrt(var)) * (1 + np.abs(want)) + UNIT_ROUNDOFF[dtype] * np.abs(
            want
        )
        assert np.all(np.abs(y - want) <= error)
        assert_same_bits(fn.Standardizer().fit_transform(x), y)
        # Back: y's rounding, in σ, and x's own; the mean is rounded to the arithmetic's dtype.
        back = fitted.inverse_transform(y)
        error = (error + UNIT_ROUNDOFF[dtype]) * np.sqrt(var) + 3 * UNIT_ROUNDOFF[dtype] * (np.abs(wide(x)) + abs(mean))
        assert back.dtype == x.dtype
        assert np.all(np.abs(back - wide(x)) <= error)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_with_mean_and_with_std(flags: dict[str, bool]) -> None:
    x = table(50, 4, "float64", far=3)
    fitted = fn.Standardizer(**flags).fit(x)
    mean = x.mean(0) if flags["with_mean"] else 0
    scale = x.std(0) if flags["with_std"] else 1
    error = 4 * digits("float64", 4)  # of the mean in σ, and so of what it is taken off
    assert np.all(np.abs(fitted.transform(x) - (x - mean) / scale) <= error * (np.abs(x) + x.std(0)) / scale)
    np.testing.assert_allclose(fitted.inverse_transform(x), x * scale + mean, rtol=error)
    assert (fitted.var_ is None) == (fitted.scale_ is None) == (not flags["with_std"])
    assert (fitted.mean_ is None) == (not any(flags.values()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("order", "CF")
def test_a_constant_feature_has_scale_1(order: str, dtype: str) -> None:
    rng = np.random.default_rng(0)
    for n in (1, 2, 3, 7, 64, 100, 1000, 4097):
        constants = (10 ** rng.uniform(-3, 3, 20) * rng.choice((-1, 1), 20)).astype(numpy_dtype(dtype))
        x = np.array(np.broadcast_to(constants, (n, 20)), order=order)  # type: ignore[call-overload]
        fitted = fn.Standardizer()
        for part in (x[: n // 3], x[n // 3 :]):
            fitted.partial_fit(part)
        assert np.all(fitted.scale_ == 1)
        assert np.all(fitted.transform(x) == 0)
        np.testing.assert_array_equal(fitted.inverse_transform(0 * x), x)


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("sigma", [1e-39, 1e-38, 1e-32, 1e-27, 1e-24, 1e-23, 1e-22, 1e-19, 1e32, 1e36])
def test_float32_to_its_ends(sigma: float, dtype: str, order: str) -> None:
    """1/σ is beyond float32 there, or below its normal numbers; or squares are."""
    drawn = np.c_[np.arange(12.0).reshape(6, 2), [[-1], [1], [-1], [1], [-1], [1]], np.zeros((6, 1))]
    x = np.array(drawn * sigma, numpy_dtype(dtype), order=order)  # type: ignore[call-overload]
    fitted = fn.Standardizer().fit(x)
    mean, var = formula(x)
    assert np.all((var == 0) == [False, False, False, True])
    want = (wide(x) - mean) / np.sqrt(np.where(var > 0, var, 1))
    # x̂ ≤ 2, of rounded moments, and rounded to the dtype.
    error = 4 * digits("float32") + 2 * UNIT_ROUNDOFF[dtype]
    assert np.all(np.abs(fitted.transform(x) - want) <= error)
    back = fitted.inverse_transform(want.astype(x.dtype))
    assert np.all(np.abs(back - wide(x)) <= 2 * error * np.abs(wide(x)).max(0) + 2.0**-133)


def test_copy() -> None:
    x = table(40, 3)
    fitted = fn.Standardizer().fit(x)
    before = x.copy()
    y, back = fitted.transform(x), fitted.inverse_transform(x)
    assert_same_bits(x, before)
    for view in (lambda a: a, np.asfortranarray, lambda a: np.repeat(a, 2, 0)[::2]):
        for method, want in (("transform", y), ("inverse_transform", back)):
            given = view(x.copy())
            assert np.shares_memory(getattr(fitted, method)(given, copy=False), given)
            assert_same_bits(given, want)
    given = x.copy()
    assert fn.Standardizer(copy=False).fit_transform(given) is given
    assert_same_bits(given, y)
    given = x.copy()
    given.flags.writeable = False
    assert_same_bits(fitted.transform(given, copy=False), y)
    assert_same_bits(given, x)


# NaN and infinities.


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize(("dtype", "far"), FAR)
def test_nan_are_left_out_and_kept(dtype: str, far: float, order: str) -> None:
    x = np.array(table(9000, 6, dtype, far), order=order)  # type: ignore[call-overload]
    missing = np.random.default_rng(1).random(x.shape) < [0, 0, 0.001, 0.3, 0.9, 0.999]
    x[missing] = np.nan
    fitted = fn.Standardizer().fit(x)
    expect_standardized(fitted, x, dtype)
    np.testing.assert_array_equal(fitted.n_samples_seen_, (~missing).sum(0))
    assert fitted.n_samples_seen_.dtype == np.int64
    for y in (fitted.transform(x), fitted.inverse_transform(x)):
        np.testing.assert_array_equal(np.isnan(y), missing)


def test_a_feature_of_nothing_but_nan() -> None:
    x = table(10, 3, "float64")
    x[:, 1] = np.nan
    fitted = fn.Standardizer().fit(x)
    assert fitted.mean_ is not None
    assert np.isnan(fitted.mean_[1])
    np.testing.assert_array_equal(np.isnan(fitted.transform(x)), np.isnan(x))
    later = table(8, 3, "float64", seed=1)
    fitted.partial_fit(later)
    expect_standardized(fitted, np.concatenate((x, later)), "float64")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinities_are_errors(bad: float, dtype: str) -> None:
    x = table(20, 4, dtype)
    fitted = fn.Standardizer().fit(x)
    state = pickle.dumps(fitted)
    for also_nan in (False, True):
        worse = x.copy()
        worse[7, 2] = bad
        worse[8, 2] = np.nan if also_nan else 0
        for method in ("partial_fit", "transform", "inverse_transform"):
            with pytest.raises(ValueError, match="infinity"):
                getattr(fitted, method)(worse)
        given = worse.copy()
        with pytest.raises(ValueError, match="infinity"):
            fitted.transform(given, copy=False)
        assert_same_bits(given, worse)
        for method in ("fit", "fit_transform"):
            with pytest.raises(ValueError, match="infinity"):
                getattr(fn.Standardizer(), method)(worse)
    assert pickle.dumps(fitted) == state
    first = fn.Standardizer()
    with pytest.raises(ValueError, match="infinity"):
        first.partial_fit(worse)
    first.partial_fit(np.ones((2, 7)))  # what failed left no number of features behind


@pytest.mark.parametrize("order", "CF")
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_infinity_in_many_rows(dtype: str, order: str) -> None:
    x = np.array(table(9001, 30, dtype), order=order)  # type: ignore[call-overload]
    fitted = fn.Standardizer().fit(x)
    for nan in (False, True):
        if nan:
            x[::50, 3] = np.nan
        for row in (1, 4999, 9000):
            kept, x[row, 7] = x[row, 7], np.inf
            for method in (fitted.transform, fn.Standardizer().fit):
                with pytest.raises(ValueError, match="infinity"):
                    method(x)
            x[row, 7] = kept
        assert np.isnan(fitted.transform(x)).sum() == (181 if nan else 0)


def test_large_numbers_are_no_infinities() -> None:
    """Their squares overflow, and in float64 their differences too."""
    signs = np.tile([[1.0, -1.0], [-1.0, -1.0]], (3, 1))
    assert np.all(np.isfinite(fn.Standardizer().fit_transform((signs * 3e38).astype(np.float32))))
    fitted = fn.Standardizer().fit(np.full((4, 1), 1e308))
    assert fitted.mean_ == 1e308
    assert fitted.scale_ == 1
    assert fitted.transform([[1e308]]) == 0


# Chunks and merges.

cuts = st.lists(st.integers(0, 60), max_size=6).map(sorted)
fast = settings(deadline=None, derandomize=True, database=None, max_examples=60)


def chunks(x: Array, at: list[int]) -> list[Array]:
    return np.split(x, [a for a in at if a <= len(x)])


@fast
@given(cuts, st.sampled_from(FAR), st.booleans(), st.booleans())
def test_chunks_are_one_fit(at: list[int], kind: tuple[str, float], nan: bool, ordered: bool) -> None:
    dtype, far = kind
    x = table(60, 4, dtype, far)
    if ordered:  # the chunks' means lie apart
        x = np.sort(x, 0)
    if nan:
        x[::3, 1], x[20:50, 2] = np.nan, np.nan
    streamed, merged = fn.Standardizer(), fn.Standardizer()
    for chunk in chunks(x, at):
        streamed.partial_fit(chunk)
        merged.merge(fn.Standardizer().partial_fit(chunk))
    whole = fn.Standardizer().fit(x)
    for one in (streamed, merged, whole):
        expect_standardized(one, x, dtype)
        np.testing.assert_array_equal(one.n_samples_seen_, whole.n_samples_seen_)
    assert pickle.dumps(streamed) == pickle.dumps(merged)


def test_merge() -> None:
    x = table(30, 3, "float64")
    whole = fn.Standardizer().fit(x)
    left, right = fn.Standardizer().fit(x[:11]), fn.Standardizer().fit(x[11:])
    kept = pickle.dumps(right)
    assert left.merge(right) is left
    expect_standardized(left, x, "float64")
    left.partial_fit(x)  # what was merged is not shared
    assert pickle.dumps(right) == kept
    for none in (fn.Standardizer(), fn.Standardizer().partial_fit(x[:0])):
        assert pickle.dumps(fn.Standardizer().fit(x).merge(none)) == pickle.dumps(whole)
        kept = pickle.dumps(whole)
        assert_same_bits(none.merge(whole).transform(x), whole.transform(x))
        none.partial_fit(x + 1)
        assert pickle.dumps(whole) == kept
    # The flags are those of the one that takes in.
    assert_same_bits(
        fn.Standardizer(with_std=False).merge(whole).transform(x), fn.Standardizer(with_std=False).fit_transform(x)
    )


@pytest.mark.parametrize("make", [fn.Standardizer, fn.Whitener])
def test_merge_refuses(make: Callable[[], Any]) -> None:
    fitted = make().fit(table(9, 3))
    for other in (make().fit(table(9, 4)), make().partial_fit(table(0, 4))):
        with pytest.raises(ValueError, match="4 features do not merge into 3"):
            fitted.merge(other)
    with pytest.raises(TypeError, match="merges with another one"):
        fitted.merge(fn.Moments())
    named = make().fit(Table(table(9, 3), ["a", "b", "c"]))
    with pytest.raises(ValueError, match="names should match"):
        named.merge(make().fit(Table(table(9, 3), ["a", "b", "d"])))


@EACH
def test_fit_forgets(make: Callable[[], Any]) -> None:
    x = table(20, 3)
    used = make().fit(table(30, 5, "float64", far=4))
    assert_same_bits(used.fit(x).transform(x), make().fit(x).transform(x))
    assert used.n_samples_seen_ == 20
    used = make().fit(Table(x, ["a", "b", "c"])).fit(x)
    assert not hasattr(used, "feature_names_in_")


@EACH
def test_pickles_in_the_middle_of_a_stream(make: Callable[[], Any]) -> None:
    x = table(60, 4, far=10)
    straight = make().partial_fit(x[:25])
    stored = pickle.loads(pickle.dumps(straight))
    for one in (straight, stored):
        one.partial_fit(x[25:])
    assert stored.get_params() == straight.get_params()
    assert stored.n_samples_seen_ == 60
    assert_same_bits(stored.transform(x), straight.transform(x))


# Conventions.


class Table:
    """What of a data frame is looked at."""

    def __init__(self, values: Array, columns: list[Any]) -> None:
        self.values, self.columns = values, columns

    def __array__(self, dtype: Any = None, copy: Any = None) -> Array:
        return np.array(self.values, dtype)


@EACH
def test_not_fitted(make: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "sklearn.exceptions", raising=False)
    x = table(5, 3)
    for one in (make(), make().partial_fit(x[:0])):
        for call in (one.transform, one.inverse_transform, lambda _, one=one: one.get_feature_names_out()):
            with pytest.raises(NotFittedError, match="not fitted yet") as raised:
                call(x)
            assert isinstance(raised.value, ValueError)
            assert isinstance(raised.value, AttributeError)


@EACH
def test_what_is_no_table(make: Callable[[], Any]) -> None:
    fitted = make().fit(table(9, 3))

    class Sparse:
        def tocsr(self) -> None: ...

    errors: list[tuple[Any, type[Exception], str]] = [
        (Sparse(), TypeError, "Sparse data"),
        (np.ma.masked_array(table(9, 3), False), TypeError, "masked"),  # type: ignore[no-untyped-call]
        (table(9, 3) * 1j, ValueError, "Complex"),
        (table(9, 3)[0], ValueError, "Expected 2D array, got 1D"),
        (3.0, ValueError, "Expected 2D array, got 0D"),
        (table(9, 3)[None], ValueError, "dim 3"),
        ([["a", "b", "c"]], ValueError, "could not convert"),
        (table(9, 4), ValueError, "X has 4 features, but .* is expecting 3 features"),
    ]
    for bad, error, match in errors:
        for method in (fitted.partial_fit, fitted.transform, fitted.inverse_transform):
            with pytest.raises(error, match=match):
                method(bad)
    for few in (table(9, 3)[:, :0], table(0, 3)):
        with pytest.raises(ValueError, match="a minimum of"):
            make().fit(few)


@EACH
def test_other_numbers_become_float64(make: Callable[[], Any]) -> None:
    numbers = [[1, 2, 7], [3, 5, 6], [4, 9, 9], [0, 0, 5]]
    want = make().fit_transform(np.array(numbers, np.float64))
    for kind in (list, np.int8, np.uint64, np.longdouble, object, ">f8"):
        given = numbers if kind is list else np.array(numbers, kind)  # type: ignore[call-overload]
        y = make().fit_transform(given)
        assert y.dtype == np.float64
        assert_same_bits(y, want)
    assert make().fit_transform(np.array(numbers, ">f4")).dtype == np.float32


@EACH
def test_feature_names(make: Callable[[], Any]) -> None:
    x = table(9, 3)
    names = ["a", "b", "c"]
    fitted = make().fit(Table(x, names))
    assert list(fitted.feature_names_in_) == names
    assert_same_bits(fitted.transform(Table(x, names)), fitted.transform(Table(x, names)))
    bad = [(["c", "b", "a"], "same order"), (["a", "b", "d"], "unseen at fit time:\n- d\n.*missing:\n- c\n")]
    for other, match in bad:
        for method in (fitted.transform, fitted.partial_fit):
            with pytest.raises(ValueError, match=f"(?s){match}"):
                method(Table(x, other))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        fitted.transform(x)
    with pytest.warns(UserWarning, match="X has feature names, but"):
        make().fit(x).transform(Table(x, names))
    with pytest.raises(TypeError, match="all input features have string names"):
        make().fit(Table(x, ["a", 1, 2]))
    assert not hasattr(make().fit(Table(x, [0, 1, 2])), "feature_names_in_")
    with pytest.raises(ValueError, match="not equal to feature_names_in_"):
        fitted.get_feature_names_out(["a", "b", "d"])
    with pytest.raises(ValueError, match="length equal to number of features"):
        make().fit(x).get_feature_names_out(["a"])


def test_names_of_what_comes_out() -> None:
    x = table(9, 3)
    named = Table(x, ["a", "b", "c"])
    for make in (fn.Standardizer, lambda: fn.Whitener("zca")):
        assert list(make().fit(x).get_feature_names_out()) == ["x0", "x1", "x2"]
        assert list(make().fit(x).get_feature_names_out(["d", "e", "f"])) == ["d", "e", "f"]
        assert list(make().fit(named).get_feature_names_out()) == ["a", "b", "c"]
    assert list(fn.Whitener(n_components=2).fit(named).get_feature_names_out()) == ["whitener0", "whitener1"]


def test_parameters() -> None:
    one = fn.Standardizer(with_std=False)
    assert one.get_params() == {"copy": True, "with_mean": True, "with_std": False}
    assert one.set_params(with_std=True, copy=False) is one
    assert one.get_params() == {"copy": False, "with_mean": True, "with_std": True}
    assert repr(one) == "Standardizer(copy=False)"
    assert repr(fn.Whitener("zca", eps=0.5)) == "Whitener(method='zca', eps=0.5)"
    with pytest.raises(ValueError, match=r"Invalid parameter 'std' .* Valid parameters are: \['copy', 'with_mean'"):
        one.set_params(copy=True, std=True)
    assert not one.copy


def test_scikit_learn_is_not_needed() -> None:
    program = """
        import pickle, sys
        sys.modules |= dict.fromkeys(("sklearn", "scipy", "pandas"))
        import fusednorm as fn
        x = [[1.0, 2.0], [3.0, 5.0], [4.0, 9.0]]
        for one in (fn.Standardizer(), fn.Whitener("zca")):
            assert repr(one.set_params(**one.get_params()))
            try:
                one.transform(x)
            except AttributeError as error:
                print(type(error).__module__)
            assert abs(pickle.loads(pickle.dumps(one.fit(x))).transform(x).mean()) < 1e-15
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout == "fusednorm.preprocessing\n" * 2


def test_scikit_learn_is_not_imported() -> None:
    program = """
        import sys, fusednorm as fn
        for make in (fn.Standardizer, fn.Whitener):
            make().partial_fit([[1, 2], [3, 5]]).fit_transform([[1, 2], [3, 5]])
        print([name for name in sys.modules if name.startswith("sklearn")])
        """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=True)
    assert ran.stdout == "[]\n"


# Beside scikit-learn.


@EACH
@pytest.mark.filterwarnings("ignore:Estimator .* does not inherit from `sklearn.base.BaseEstimator`")
def test_scikit_learns_checks(make: Callable[[], Any]) -> None:
    pytest.importorskip("sklearn", "1.6", reason="scikit-learn 1.6 or newer is not installed")
    from sklearn.utils.estimator_checks import check_estimator

    one = make()
    again = "looks at X again after it was transformed in place"
    in_place = ("check_methods_sample_order_invariance", "check_methods_subset_invariance")
    expected = dict.fromkeys(in_place, again) if one.get_params().get("copy") is False else {}
    ran = check_estimator(one, expected_failed_checks=expected, on_skip=None)
    skipped = {check["check_name"] for check in ran if check["status"] == "skipped"}
    # These want SCIPY_ARRAY_API=1 in the environment, and pandas.
    assert skipped <= {"check_array_api_input", "check_dataframe_column_names_consistency"}
    assert len(ran) - len(skipped) > 30


@pytest.mark.parametrize("flags", FLAGS, ids=str)
@pytest.mark.parametrize("nan", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64"])
def test_as_standard_scaler(dtype: str, nan: bool, flags: dict[str, bool]) -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="scikit-learn is not installed")
    x = np.random.default_rng(0).integers(-1000, 1000, (200, 5)).astype(dtype)
    x[:, 3] = 7
    if nan and dtype != "int64":
        x[::7, 1] = np.nan
    ours, theirs = fn.Standardizer(**flags), preprocessing.StandardScaler(**flags)
    for chunk in (x[:50], x[50:51], x[51:]):
        ours.partial_fit(chunk)
        theirs.partial_fit(chunk)
        for name in ("mean_", "var_", "scale_"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert (mine is None) == (other is None)
            if mine is not None:
                np.testing.assert_allclose(mine, other, rtol=2 * digits(dtype), atol=1000 * digits(dtype))
        assert np.shape(ours.n_samples_seen_) == np.shape(theirs.n_samples_seen_)
        np.testing.assert_array_equal(ours.n_samples_seen_, theirs.n_samples_seen_)
    kind = "float32" if dtype == "float32" else "float64"
    for method, size in (("transform", 1000), ("inverse_transform", 1e6)):
        mine, other = getattr(ours, method)(x), getattr(theirs, method)(x)
        assert mine.dtype == other.dtype
        np.testing.assert_allclose(mine, other, rtol=2 * digits(kind), atol=size * digits(kind))


def test_nearly_constant_features_as_standard_scaler() -> None:
    preprocessing = pytest.importorskip("sklearn.preprocessing", reason="scikit-learn is not installed")
    n = 100
    size = 10.0 ** -np.arange(8, 17)
    x = 1 + np.where(np.arange(n) % 2, 1, -1)[:, None] * size
    ours, theirs = fn.Standardizer().fit(x), preprocessing.StandardScaler().fit(x)
    np.testing.assert_array_equal(ours.scale_ == 1, theirs.scale_ == 1)
    assert 0 < np.sum(ours.scale_ == 1) < len(size)


@EACH
def test_in_a_pipeline(make: Callable[[], Any]) -> None:
    pytest.importorskip("sklearn", "1.6", reason="scikit-learn 1.6 or newer is not installed")
    from sklearn.base import clone
    from sklearn.exceptions import NotFittedError
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import cross_val_score
    from sklearn.pipeline import make_pipeline

    x = table(60, 4, "float64")
    target = x @ [1, 2, 3, 4]
    pipeline = make_pipeline(make(), Ridge())
    assert np.isfinite(cross_val_score(pipeline, x, target)).all()
    assert list(pipeline[:-1].fit(x).get_feature_names_out()) == list(make().fit(x).get_feature_names_out())
    fitted = make().fit(x)
    copy = clone(fitted)
    assert copy.get_params() == fitted.get_params()
    with pytest.raises(NotFittedError):
        copy.transform(x)


# Whitener.


def mixed(n: int, features: int, dtype: str = "float64", far: float = 0, seed: int = 0) -> Array:
    """Correlated features of σ 1 to 3; the covariance's condition stays below 100."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.standard_normal((features, features)))[0]
    x = rng.standard_normal((n, features)) * np.linspace(1, 3, features) @ basis
    return (x + 3 * far).astype(numpy_dtype(dtype))


def covariance(x: Any) -> Array:
    deviations = wide(x) - wide(x).mean(0)
    return (deviations.T @ deviations / (len(x) - 1)).astype(np.float64)


def covariance_error(x: Any) -> float:
    """Deviations are off by the mean's error, digits() σ, which enters squared, and by float64's rounding of x and
    mean; the sums of n products by n roundings."""
    far = float(np.max(np.abs(np.mean(wide(x), 0)) / np.std(wide(x), 0)))
    dtype = np.asarray(x).dtype.name
    u = UNIT_ROUNDOFF["float64"]
    return (digits(dtype, far) ** 2 + 8 * u * far + 2 * len(x) * u) * float(np.max(np.diag(covariance(x))))


@pytest.mark.parametrize(("dtype", "far"), FAR)
@pytest.mark.parametrize("method", ["pca", "zca"])
def test_whitening(method: str, dtype: str, far: float) -> None:
    for n, features in ((50, 1), (50, 4), (9001, 7)):
        x = mixed(n, features, dtype, min(far, 3) if dtype in ("float16", "bfloat16") else far)
        fitted = fn.Whitener(method)
        y = fitted.fit_transform(x)
        assert_same_bits(y, fitted.transform(x))
        assert y.dtype == x.dtype
        want, error = covariance(x), covariance_error(x)
        np.testing.assert_allclose(fitted.covariance_, want, rtol=0, atol=error)
        # W is that of a matrix within `error` of the covariance, whose condition is below 100.
        w = fitted.whitening_
        slack = 1e2 * features * (error + 1e-14)
        np.testing.assert_allclose(w @ want @ w.T, np.eye(features), rtol=0, atol=slack)
        values = np.linalg.eigvalsh(want)[::-1]
        np.testing.assert_allclose(fitted.explained_variance_, values, rtol=0, atol=slack)
        if method == "zca":
            np.testing.assert_allclose(w, w.T, rtol=0, atol=slack)
            assert np.all(np.linalg.eigvalsh(w) > 0)
        else:
            np.testing.assert_allclose(w @ w.T, np.diag(1 / values), rtol=0, atol=slack)
            largest = np.take_along_axis(fitted.components_, np.abs(fitted.components_).argmax(1)[:, None], 1)
            assert np.all(largest > 0)
        # y itself is float64's, rounded once.
        z = (wide(x) - wide(x).mean(0)) @ wide(w.T)
        off = digits(dtype, far) * np.abs(w).sum() * 3 + UNIT_ROUNDOFF[dtype] * np.abs(z)
        assert np.all(np.abs(y - z) <= off)
        back = wide(fitted.inverse_transform(y))
        size = np.abs(fitted.dewhitening_).sum() * (off.max() + slack) + UNIT_ROUNDOFF[dtype] * np.abs(wide(x))
        assert np.all(np.abs(back - wide(x)) <= 2 * size)


def test_as_pca_of_scikit_learn() -> None:
    decomposition = pytest.importorskip("sklearn.decomposition", reason="scikit-learn is not installed")
    x = mixed(300, 5)
    theirs = decomposition.PCA(n_components=3, whiten=True, svd_solver="full").fit(x)
    ours = fn.Whitener(n_components=3).fit(x)
    np.testing.assert_allclose(ours.explained_variance_, theirs.explained_variance_, rtol=1e-12)
    # The same convention of signs, by the components.
    np.testing.assert_allclose(ours.components_, theirs.components_, atol=1e-12)
    np.testing.assert_allclose(ours.transform(x), theirs.transform(x), atol=1e-11)
    np.testing.assert_allclose(ours.inverse_transform(ours.transform(x)), theirs.inverse_transform(theirs.transform(x)))


DEFICIENT: dict[str, Callable[[str], tuple[Array, int]]] = {
    "a feature twice": lambda dtype: (mixed(200, 4, dtype)[:, [0, 1, 2, 3, 1]], 4),
    "a constant feature": lambda dtype: (np.where(np.arange(4) == 2, 0.1, mixed(200, 4)).astype(numpy_dtype(dtype)), 3),
    "constant features": lambda dtype: (np.full((20, 3), 0.1, numpy_dtype(dtype)), 0),
    "more features than samples": lambda dtype: (mixed(6, 40, dtype), 5),
    "two samples": lambda dtype: (mixed(2, 3, dtype), 1),
    # The sums are rounded: there is a little variance in the direction that should have none.
    "a sum of features": lambda dtype: (mixed(500, 4) @ np.c_[np.eye(4), np.ones(4)], 4),
    "a rounded sum": lambda dtype: (
        (mixed(500, 4, far=8) @ np.c_[np.eye(4), np.ones(4)]).astype(numpy_dtype(dtype)),
        4,
    ),
    "a rounded sum, far": lambda dtype: ((mixed(500, 2, far=1e3) @ [[1, 0, 1], [0, 1, 1]]).astype("f4"), 2),
}


@pytest.mark.parametrize("case", DEFICIENT)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["pca", "zca"])
def test_directions_without_variance_are_dropped(method: str, dtype: str, case: str) -> None:
    x, rank = DEFICIENT[case](dtype)
    fitted = fn.Whitener(method).fit(x)
    y = fitted.transform(x)
    assert fitted.n_components_ == rank
    assert y.shape == (len(x), rank if method == "pca" else x.shape[1])
    # Whitened where there is variance, 0 elsewhere: a projection of that rank. Two roundings of y, of size 10 at most.
    of_y = covariance(y) if y.shape[1] else np.zeros((0, 0))
    rounding = 40 * UNIT_ROUNDOFF[np.asarray(y).dtype.name] + 1e-9
    np.testing.assert_allclose(np.atleast_2d(of_y @ of_y), np.atleast_2d(of_y), rtol=0, atol=4 * rounding)
    np.testing.assert_allclose(np.trace(of_y), rank, rtol=0, atol=10 * rounding)
    # Far off the data's plane: no direction is blown up.
    away = fitted.transform((x[:1] + 100).astype(x.dtype))
    smallest = fitted.explained_variance_.min() if rank else 1.0
    assert np.all(np.abs(away.astype(np.float64)) <= 1.1 * (100 * x.shape[1] + 50) / np.sqrt(smallest))
    # Back onto x, but for what was dropped, which is rounding, y's and x's.
    back = fitted.inverse_transform(y).astype(np.float64)
    size = np.abs(x.astype(np.float64)).max() + 10 * np.abs(fitted.dewhitening_).sum()
    np.testing.assert_allclose(back, x.astype(np.float64), rtol=0, atol=4 * UNIT_ROUNDOFF[x.dtype.name] * size + 1e-12)


def test_little_variance_is_kept_where_it_is_real() -> None:
    """σ down to 1e-6 of the largest; a feature near 0 has none of the rounding of those far from it."""
    for dtype, smallest, far in (("float32", 1e-5, 0), ("float32", 1e-5, 1e3), ("float64", 1e-6, 1e3)):
        x = (mixed(1000, 3) * [1, 1, smallest] + [far, far, 0]).astype(dtype)
        assert fn.Whitener().fit(x).n_components_ == 3


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_eps(method: str) -> None:
    x = mixed(100, 4)[:, [0, 1, 2, 3, 0]]
    fitted = fn.Whitener(method, eps=0.5).fit(x)
    assert fitted.n_components_ == 5
    values = np.clip(np.linalg.eigvalsh(covariance(x))[::-1], 0, None)
    w = fitted.whitening_
    np.testing.assert_allclose(np.linalg.svd(w)[1][::-1], 1 / np.sqrt(values + 0.5), rtol=1e-12)
    np.testing.assert_allclose(w @ fitted.dewhitening_, np.eye(5), atol=1e-12)
    assert np.linalg.eigvalsh(covariance(fitted.transform(x))).max() < 1


@pytest.mark.parametrize("method", ["pca", "zca"])
def test_n_components(method: str) -> None:
    x = mixed(100, 4)
    whole, part = fn.Whitener().fit(x), fn.Whitener(method, n_components=2).fit(x)
    assert_same_bits(part.components_, whole.components_[:2])
    assert part.n_components_ == 2
    want = whole.transform(x)[:, :2]
    y = part.transform(x)
    np.testing.assert_allclose(y, want if method == "pca" else want @ whole.components_[:2], atol=1e-13)
    plane = (x - x.mean(0)) @ part.components_.T @ part.components_ + x.mean(0)
    np.testing.assert_allclose(part.inverse_transform(y), plane, atol=1e-13)
    for bad in (0, 5, 1.5, True, "all"):
        with pytest.raises(ValueError, match="n_components must be an integer from 1 to the number of features, 4"):
            fn.Whitener(method, n_components=bad).fit(x)  # type: ignore[arg-type]


@fast
@given(cuts, st.sampled_from(FAR), st.booleans())
def test_chunks_are_one_covariance(at: list[int], kind: tuple[str, float], ordered: bool) -> None:
    dtype, far = kind
    x = mixed(60, 3, dtype, min(far, 3) if dtype in ("float16", "bfloat16") else far)
    if ordered:
        x = x[np.argsort(x[:, 0])]
    streamed, merged = fn.Whitener(), fn.Whitener()
    for chunk in chunks(x, at):
        streamed.partial_fit(chunk)
        merged.merge(fn.Whitener().partial_fit(chunk))
    for one in (streamed, merged, fn.Whitener().fit(x)):
        assert one.n_samples_seen_ == 60
        # Chunks' means are off by far·2⁻⁵³ σ each.
        error = covariance_error(x)
        np.testing.assert_allclose(one.covariance_, covariance(x), rtol=0, atol=error)
        assert np.all(np.abs(one.mean_ - wide(x).mean(0)) <= 4 * digits(dtype, far))
    assert_same_bits(streamed.whitening_, merged.whitening_)


def test_a_stream_is_fitted_from_two_samples_on() -> None:
    x = mixed(9, 3)
    one = fn.Whitener().partial_fit(x[:1])
    with pytest.raises(ValueError, match="not fitted yet"):
        one.transform(x)
    assert one.partial_fit(x[1:2]).n_components_ == 1
    assert one.partial_fit(x[2:]).n_components_ == 3
    with pytest.raises(ValueError, match=r"1 sample\(s\) .* a minimum of 2"):
        fn.Whitener().fit(x[:1])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_whitener_wants_numbers(bad: float) -> None:
    x = mixed(9, 3)
    fitted = fn.Whitener().fit(x)
    state = pickle.dumps(fitted)
    worse = x.copy()
    worse[3, 1] = bad
    for method in (fitted.partial_fit, fitted.transform, fitted.inverse_transform, fn.Whitener().fit):
        with pytest.raises(ValueError, match="NaN" if np.isnan(bad) else "infinity"):
            method(worse)
    assert pickle.dumps(fitted) == state


def test_whitener_refuses() -> None:
    x = mixed(9, 3)
    for parameters, match in (({"method": "cholesky"}, "pca"), ({"eps": -1}, "eps"), ({"eps": np.nan}, "eps")):
        with pytest.raises(ValueError, match=match):
            fn.Whitener(**parameters).fit(x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beyond float64's range"), np.errstate(over="ignore"):
        fn.Whitener().fit(x * 1e200)
    with pytest.raises(ValueError, match="X has 3 features, but Whitener is expecting 2 features"):
        fn.Whitener(n_components=2).fit(x).inverse_transform(x)
