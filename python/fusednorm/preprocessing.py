"""Standardizing and whitening of tables: transformers after scikit-learn's conventions, which do not need scikit-learn.

They inherit nothing from it and import nothing of it until it asks for its tags. What they have learned lies on the
CPU, in float64, wherever the data lie.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import Any, TypeVar

import numpy as np

from fusednorm import _C, arrays, foreign, functional, operands
from fusednorm.arrays import Array
from fusednorm.statistics import Moments

__all__ = ["NotFittedError", "Standardizer", "Whitener"]

_FLOAT64 = np.dtype(np.float64)
_EPS = float(np.finfo(_FLOAT64).eps)
# Numbers done at a time: in float64 1 MB, which stays in the second-level cache; 32 MB where a matrix is added to.
_CACHED, _SUMMED = 2**17, 2**22
# Factors that the arithmetic of the 16- and 32-bit dtypes, float32, holds with all its digits.
_FACTORS = (1e-30, 1e30)


class NotFittedError(ValueError, AttributeError):
    """A transformer is used before it has seen data. Where scikit-learn's is imported, that is raised instead."""


def _rows(x: Array, numbers: int) -> Iterator[slice]:
    """Some rows at a time, of so many numbers at most."""
    step = max(1, min(4096, numbers // max(1, x.shape[1])))
    return (slice(start, start + step) for start in range(0, len(x), step))


def _floats(X: Any) -> Array:
    """`X` as a 2-D array of floating point numbers: float64 where it is of other numbers or no array."""
    if hasattr(X, "tocsr"):
        raise TypeError("Sparse data was passed for X, but dense data is required. Use '.toarray()' to convert it.")
    x = arrays.taken(X, "X") if isinstance(X, np.ndarray) or arrays.is_of_a_gpu(X) else np.asarray(X)
    if x.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: X has dtype {x.dtype}")
    x = x.astype(x.dtype.newbyteorder("=") if arrays.is_floating(x.dtype) else _FLOAT64, copy=False)
    if x.ndim < 2:
        raise ValueError(
            f"Expected 2D array, got {x.ndim}D array instead. Reshape your data either using array.reshape(-1, 1) if "
            "it has a single feature or array.reshape(1, -1) if it contains a single sample."
        )
    if x.ndim > 2:
        raise ValueError(f"Found array with dim {x.ndim}, while dim <= 2 is required.")
    return x


def _feature_names(X: Any) -> Array | None:
    """The names of a table's columns, if they are strings."""
    columns = getattr(X, "columns", None)
    names = np.asarray([] if columns is None else list(columns), object)
    strings = [isinstance(name, str) for name in names]
    if any(strings) and not all(strings):
        raise TypeError(
            "Feature names are only supported if all input features have string names, but your input has others as "
            "well. Convert them: X.columns = X.columns.astype(str)."
        )
    return names if any(strings) else None


def _expect_names(names: Array | None, fitted: Array | None, owner: str) -> None:
    """ValueError where the columns' names are not those that were fitted, a warning where one side has none."""
    if names is None or fitted is None:
        if fitted is not None:
            warnings.warn(f"X does not have valid feature names, but {owner} was fitted with them", stacklevel=4)
        elif names is not None:
            warnings.warn(f"X has feature names, but {owner} was fitted without feature names", stacklevel=4)
        return
    if np.array_equal(names, fitted):
        return

    def listed(names: Iterable[str]) -> str:
        ordered = sorted(names)
        return "".join(f"- {name}\n" for name in ordered[:5]) + ("- ...\n" if len(ordered) > 5 else "")

    unseen, missing = listed({*names} - {*fitted}), listed({*fitted} - {*names})
    raise ValueError(
        "The feature names should match those that were passed during fit.\n"
        + (f"Feature names unseen at fit time:\n{unseen}" if unseen else "")
        + (f"Feature names seen at fit time, yet now missing:\n{missing}" if missing else "")
        + ("" if unseen or missing else "Feature names must be in the same order as they were in fit.\n")
    )


@foreign.on_its_device
def _expect_finite(x: Array, allow_nan: bool) -> None:
    """ValueError where x has infinities, or NaN if that is not allowed. The mean of all numbers shows either fastest,
    but many NaN make the kernels slow: some rows tell."""
    xp = arrays.namespace(x)
    if bool(xp.isfinite(x[:: len(x) // 1000 + 1]).all()) and np.isfinite(functional._moments(x, (0, 1))[1].item()):
        return
    for rows in _rows(x, _CACHED):
        if bool(xp.isinf(x[rows]).any()):
            raise ValueError(f"Input X contains infinity or a value too large for {x.dtype!r}.")
    if not allow_nan and bool(xp.isnan(x).any()):
        raise ValueError("Input X contains NaN.")


@foreign.on_its_device
def _moments(x: Array) -> Moments:
    """The moments of each feature's numbers that are not NaN; ValueError for infinities."""
    n, *found, _ = functional._moments(x, 0)
    mean, m2 = (arrays.moved(a[0], "cpu") for a in found)
    count = np.full(mean.shape, n)
    again = np.flatnonzero(~np.isfinite(mean) | np.isnan(m2))
    if again.size:
        numbers = _moments_without_nan(x, again)
        count[again], mean[again], m2[again] = numbers.count, numbers.mean, numbers.m2
    return Moments(count, mean, m2)


def _moments_without_nan(x: Array, features: Array) -> Moments:
    """By the two-pass formula, in float64, some rows at a time."""
    xp = arrays.namespace(x)
    features = xp.asarray(features)
    total = Moments()
    for rows in _rows(x, _CACHED):
        block = x[rows][:, features].astype(_FLOAT64)
        if bool(xp.isinf(block).any()):
            raise ValueError(f"Input X contains infinity or a value too large for {x.dtype!r}.")
        missing = xp.isnan(block)
        count = (~missing).sum(0).astype(_FLOAT64)
        mean = (xp.where(missing, 0, block) / xp.maximum(count, 1)).sum(0)
        m2 = (xp.where(missing, 0, block - mean) ** 2).sum(0)
        total.merge(Moments(*(arrays.moved(a, "cpu") for a in (count, mean, m2))))
    return total


@foreign.on_its_device
def _scaled(x: Array, mean: Array, factor: Array, shift: Array, in_place: bool) -> Array:
    """(x − mean)·factor + shift of each feature, in one pass."""
    if x.dtype != _FLOAT64 and not np.all(np.isnan(factor) | ((factor > _FACTORS[0]) & (factor < _FACTORS[1]))):
        y = _scaled(x.astype(_FLOAT64), mean, factor, shift, True).astype(x.dtype)
        return operands.deliver(y, x if in_place else None, x)
    dense, layout = operands.dense(x, functional._batch, (1, None))
    (part,) = layout.parts
    y, out = operands.output(x, x, dense, (x,)) if in_place else (arrays.empty_like(dense), None)
    mean, factor, shift = (arrays.moved(a, arrays.device(x)) for a in (mean, factor, shift))
    queue = arrays.queue(dense, part.fold)
    _C.normalize(part.fold, dense, mean, factor, None, shift, None, 0, 0.0, y, *queue)
    arrays.launched(queue, dense, y, mean, factor, shift)
    return operands.deliver(y, out, x)


_Self = TypeVar("_Self", bound="_Transformer")


class _Transformer:
    """What scikit-learn's conventions ask of every transformer."""

    n_features_in_: int
    n_samples_seen_: Any
    _allow_nan: bool

    @classmethod
    def _parameters(cls) -> dict[str, Any]:
        """The constructor's parameters and their defaults."""
        given = list(inspect.signature(cls.__init__).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in given}

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self: _Self, **params: Any) -> _Self:
        """Change arguments of the constructor; ValueError for unknown ones."""
        known = list(self._parameters())
        for name in params:
            if name not in known:
                raise ValueError(f"Invalid parameter {name!r} for estimator {self}. Valid parameters are: {known}.")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        changed = (
            f"{name}={getattr(self, name)!r}"
            for name, default in self._parameters().items()
            if getattr(self, name) is not default and getattr(self, name) != default
        )
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        utils = import_module("sklearn.utils")
        return utils.Tags(
            estimator_type=None,
            target_tags=utils.TargetTags(required=False),
            transformer_tags=utils.TransformerTags(preserves_dtype=["float64", "float32", "float16"]),
            input_tags=utils.InputTags(allow_nan=self._allow_nan),
        )

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "n_samples_seen_")

    def _expect_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            # Who catches scikit-learn's has imported it.
            kind = getattr(sys.modules.get("sklearn.exceptions"), "NotFittedError", NotFittedError)
            raise kind(
                f"This {type(self).__name__} instance is not fitted yet. Call 'fit' with appropriate arguments before "
                "using this estimator."
            )

    def _forget(self) -> None:
        for name in list(vars(self)):
            if name == "_seen" or (name[-1] == "_" and name[0] != "_"):
                delattr(self, name)

    def _taken(self, X: Any) -> tuple[Array, Array | None]:
        """`X` as an array, and the names of its columns; ValueError where they are not the features seen before."""
        names, x = _feature_names(X), _floats(X)
        owner = type(self).__name__
        if x.shape[1] == 0:
            raise ValueError(f"Found array with 0 feature(s) (shape={x.shape}) while a minimum of 1 is required.")
        if hasattr(self, "n_features_in_"):
            _expect_names(names, getattr(self, "feature_names_in_", None), owner)
            self._expect_width(x, self.n_features_in_)
        return x, names

    def _expect_width(self, x: Array, width: int) -> None:
        if x.shape[1] != width:
            raise ValueError(
                f"X has {x.shape[1]} features, but {type(self).__name__} is expecting {width} features as input."
            )

    def _remember(self, width: int, names: Array | None) -> None:
        """The features, where these are the first."""
        if not hasattr(self, "n_features_in_"):
            self.n_features_in_ = width
            if names is not None:
                self.feature_names_in_ = names

    def _expect_rows(self, x: Array, n: int) -> None:
        if len(x) < n:
            raise ValueError(
                f"Found array with {len(x)} sample(s) (shape={x.shape}) while a minimum of {n} is required by "
                f"{type(self).__name__}."
            )

    def _expect_mergeable(self, other: Any) -> None:
        if type(other) is not type(self):
            raise TypeError(f"a {type(self).__name__} merges with another one, not with {type(other).__name__}")
        if hasattr(self, "n_features_in_") and hasattr(other, "n_features_in_"):
            if self.n_features_in_ != other.n_features_in_:
                raise ValueError(f"{other.n_features_in_} features do not merge into {self.n_features_in_}")
            names = getattr(other, "feature_names_in_", None)
            _expect_names(names, getattr(self, "feature_names_in_", None), type(self).__name__)

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """The names of the columns that `transform` returns; x0, x1, … where the input had none."""
        self._expect_fitted()
        fitted: Array | None = getattr(self, "feature_names_in_", None)
        if input_features is None:
            return np.asarray([f"x{i}" for i in range(self.n_features_in_)], object) if fitted is None else fitted
        names = np.asarray(input_features, object)
        if fitted is not None and not np.array_equal(names, fitted):
            raise ValueError("input_features is not equal to feature_names_in_")
        if len(names) != self.n_features_in_:
            raise ValueError(
                f"input_features should have length equal to number of features ({self.n_features_in_}), got "
                f"{len(names)}"
            )
        return names


class Standardizer(_Transformer):
    """Each feature minus its mean, divided by its standard deviation: scikit-learn's StandardScaler on these kernels.

    Moments are taken by Welford's update, a block at a time, and merged by Chan, Golub & LeVeque (1979): chunks of any
    sizes give what one fit on all of X gives, within rounding, and the variance keeps its digits at any mean/σ. The
    variance is divided by n, as StandardScaler's.

    NaN are missing values: left out by `fit`, kept by `transform`. The plain kernels run first, and only features whose
    mean comes out as NaN are done again, slower, without their NaN. Infinities are a ValueError. A feature that is
    constant, by StandardScaler's rule, has the scale 1.

    X are arrays of shape (samples, features), NumPy's or CuPy's, of float32, float64, float16 or bfloat16, whose dtype
    is kept; or anything else that NumPy makes a table of numbers of, in float64. Float arrays are read where they lie,
    in C or Fortran order: by `fit` once, by `transform` once for infinities and once to standardize. Not taken: sparse
    matrices (TypeError), and sample weights.

    Parameters
    ----------
    copy : bool
        False: a writeable float array is transformed in place.
    with_mean, with_std : bool
        Whether the mean is taken off and whether the scale is divided by.

    Attributes
    ----------
    mean_, var_, scale_ : float64, (features,)
        None where they are not used: var_ and scale_ without `with_std`, mean_ without both.
    n_samples_seen_ : int, or int64 (features,) where NaN made the counts differ
    n_features_in_ : int
    feature_names_in_ : (features,)
        Only where X had columns with names.
    """

    mean_: Array | None
    var_: Array | None
    scale_: Array | None
    feature_names_in_: Array
    _allow_nan = True

    def __init__(self, *, copy: bool = True, with_mean: bool = True, with_std: bool = True) -> None:
        self.copy = copy
        self.with_mean = with_mean
        self.with_std = with_std

    def fit(self, X: Any, y: Any = None) -> Standardizer:
        """Learn mean and scale from X, and from nothing before it. y is ignored."""
        self._fit(X)
        return self

    def _fit(self, X: Any) -> Array:
        self._forget()
        x, names = self._taken(X)
        self._expect_rows(x, 1)
        self._learn(x, names)
        return x

    def partial_fit(self, X: Any, y: Any = None) -> Standardizer:
        """Take in more samples; X may have no rows. y is ignored."""
        self._learn(*self._taken(X))
        return self

    def _learn(self, x: Array, names: Array | None) -> None:
        moments = _moments(x)  # nothing is changed if this raises
        self._remember(x.shape[1], names)
        if len(x):
            self._merge(moments)

    def merge(self, other: Standardizer) -> Standardizer:
        """Take in all that `other` has seen, as one fit on both would. ValueError where the features differ."""
        self._expect_mergeable(other)
        if hasattr(other, "n_features_in_"):
            self._remember(other.n_features_in_, getattr(other, "feature_names_in_", None))
        if other.__sklearn_is_fitted__():
            self._merge(other._seen)
        return self

    def _merge(self, moments: Moments) -> None:
        self._seen = getattr(self, "_seen", Moments()).merge(moments)
        n = self._seen.count
        mean, var = np.where(n > 0, self._seen.mean, np.nan), self._seen.variance()
        self.n_samples_seen_ = int(n[0]) if np.all(n == n[0]) else n.astype(np.int64)
        self.mean_ = mean if self.with_mean or self.with_std else None
        self.var_ = var if self.with_std else None
        # What rounding alone makes of a constant feature's variance (Chan, Golub & LeVeque 1983), as StandardScaler:
        # var ≤ n·ε·var + (n·ε·mean)².
        std = np.sqrt(var)
        constant = std * np.sqrt(np.maximum(1 - n * _EPS, 0)) <= n * _EPS * np.abs(mean)
        self.scale_ = np.where(constant, 1.0, std) if self.with_std else None

    def transform(self, X: Any, copy: bool | None = None) -> Array:
        """(X − mean_) / scale_, in X's dtype. NotFittedError before any sample was seen."""
        self._expect_fitted()
        x, _ = self._taken(X)
        _expect_finite(x, allow_nan=True)
        return self._standardized(x, copy)

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """`fit`, then `transform`."""
        return self._standardized(self._fit(X), None)

    def _standardized(self, x: Array, copy: bool | None) -> Array:
        mean, scale = self._mean_and_scale()
        return _scaled(x, mean, 1 / scale, np.zeros_like(mean), self._in_place(x, copy))

    def inverse_transform(self, X: Any, copy: bool | None = None) -> Array:
        """X·scale_ + mean_, in X's dtype."""
        self._expect_fitted()
        x = _floats(X)
        self._expect_width(x, self.n_features_in_)
        _expect_finite(x, allow_nan=True)
        mean, scale = self._mean_and_scale()
        return _scaled(x, np.zeros_like(mean), scale, mean, self._in_place(x, copy))

    def _mean_and_scale(self) -> tuple[Array, Array]:
        ones = np.ones(self.n_features_in_)
        mean = self.mean_ if self.with_mean and self.mean_ is not None else 0 * ones
        return mean, self.scale_ if self.with_std and self.scale_ is not None else ones

    def _in_place(self, x: Array, copy: bool | None) -> bool:
        return not (self.copy if copy is None else copy) and arrays.is_writeable(x)


@foreign.on_its_device
def _scatter(x: Array, near: Array) -> tuple[Array, Array]:
    """The mean, and Σ(x − mean)(x − mean)ᵀ, in float64; `near` is the mean as the kernels have it, with the digits of
    their arithmetic."""
    xp = arrays.namespace(x)
    center = arrays.moved(near, arrays.device(x))
    total, left = xp.zeros((x.shape[1], x.shape[1])), xp.zeros(x.shape[1])
    for rows in _rows(x, _SUMMED):
        deviations = x[rows].astype(_FLOAT64) - center
        total += deviations.T @ deviations
        left += deviations.sum(0)
    total, left = arrays.moved(total, "cpu"), arrays.moved(left, "cpu")
    if not np.isfinite(total).all():
        raise ValueError("the covariance of X is beyond float64's range: scale X")
    n = max(len(x), 1)
    return near + left / n, total - np.outer(left, left / n)


@foreign.on_its_device
def _linear(x: Array, before: Array, matrix: Array, after: Array) -> Array:
    """(x − before) @ matrix + after, in float64, rounded to x's dtype."""
    before, matrix, after = (arrays.moved(a, arrays.device(x)) for a in (before, matrix, after))
    y = arrays.empty((len(x), matrix.shape[1]), x.dtype, beside=x)
    for rows in _rows(x, _CACHED):
        y[rows] = (x[rows].astype(_FLOAT64) - before) @ matrix + after
    return y


@foreign.on_its_device
def _eigh(beside: Array, matrix: Array) -> tuple[Array, Array]:
    """Eigenvalues, largest first, and eigenvectors as rows, by the library of `beside`."""
    values, vectors = arrays.namespace(beside).linalg.eigh(arrays.moved(matrix, arrays.device(beside)))
    values, vectors = arrays.moved(values, "cpu"), arrays.moved(vectors, "cpu")
    rows = np.ascontiguousarray(vectors.T[::-1])
    largest = np.take_along_axis(rows, np.abs(rows).argmax(1)[:, None], 1)
    return np.maximum(values[::-1], 0), rows * np.where(largest < 0, -1.0, 1.0)


class Whitener(_Transformer):
    """Features made uncorrelated and of variance 1 (Kessy, Lewin & Strimmer 2018): y = W(x − mean), WᵀW = Σ⁻¹.

    With the covariance Σ = U·Λ·Uᵀ, divided by n − 1, PCA whitening is W = Λ^(−½)·Uᵀ, the principal components scaled to
    variance 1, largest first; ZCA whitening is W = U·Λ^(−½)·Uᵀ, of all whitenings the one that changes x least.

    The mean is the kernels' and is taken off, in float64, before any product, so nothing cancels at a large mean/σ.
    Chunks are merged by the formula of Chan, Golub & LeVeque (1979) for covariances. Memory is features²; each
    `partial_fit` and `merge` takes an eigendecomposition, features³.

    **Directions without variance** are dropped: PCA gives fewer components, ZCA maps them to 0, and `inverse_transform`
    puts the mean there. A direction v is one of them if its variance + eps is not above what rounding may have made:
    the largest eigenvalue times (features + √n)·2⁻⁵², for the sums of n products and the decomposition, and
    Σⱼ vⱼ²·u²·(mean square of feature j), for an input that was rounded to its dtype, whose relative error is u
    (6e-8 in float32). So features of scales further apart than 10⁶ should be standardized first.

    In PCA the element of each component that is largest in size is positive: signs are the same on every run.

    X are as in :class:`Standardizer`, but NaN are an error as infinities are, and `fit` needs two samples.

    Parameters
    ----------
    method : "pca" or "zca"
    n_components : int, optional
        How many directions to keep at most, those of the largest variance; all unless given. ZCA maps the others to 0.
    eps : float
        Added to the eigenvalues: y has variances λ/(λ + eps). Above the tolerance it keeps all directions.

    Attributes
    ----------
    mean_ : float64, (features,)
    covariance_ : float64, (features, features)
    components_ : float64, (kept, features)
        The directions kept, eigenvectors of the covariance, as rows.
    explained_variance_ : float64, (kept,)
        Their variances, without eps.
    whitening_ : float64, (columns of y, features)
        W.
    dewhitening_ : float64, (features, columns of y)
        x = dewhitening_ @ y + mean_.
    n_components_ : int
        Directions kept.
    n_samples_seen_, n_features_in_ : int
    feature_names_in_ : (features,)
        Only where X had columns with names.
    """

    mean_: Array
    covariance_: Array
    components_: Array
    explained_variance_: Array
    whitening_: Array
    dewhitening_: Array
    n_components_: int
    feature_names_in_: Array
    _allow_nan = False

    def __init__(self, method: str = "pca", *, n_components: int | None = None, eps: float = 0.0) -> None:
        self.method = method
        self.n_components = n_components
        self.eps = eps

    def _expect_parameters(self, width: int) -> None:
        if self.method not in ("pca", "zca"):
            raise ValueError(f'method must be "pca" or "zca", not {self.method!r}')
        if not self.eps >= 0:
            raise ValueError(f"eps must not be negative, got {self.eps}")
        k = self.n_components
        if k is not None and (isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= width):
            raise ValueError(f"n_components must be an integer from 1 to the number of features, {width}, not {k!r}")

    def fit(self, X: Any, y: Any = None) -> Whitener:
        """Learn from X, and from nothing before it. y is ignored."""
        self._fit(X)
        return self

    def _fit(self, X: Any) -> Array:
        self._forget()
        x, names = self._taken(X)
        self._expect_rows(x, 2)
        self._learn(x, names)
        return x

    def partial_fit(self, X: Any, y: Any = None) -> Whitener:
        """Take in more samples; X may have one row or none. Fitted once there are two. y is ignored."""
        self._learn(*self._taken(X))
        return self

    def _learn(self, x: Array, names: Array | None) -> None:
        self._expect_parameters(x.shape[1])
        moments = _moments(x)
        if not np.all(moments.count == len(x)):
            raise ValueError("Input X contains NaN.")
        mean, scatter = _scatter(x, moments.mean)
        u = 2.0**-8 if x.dtype.name == "bfloat16" else float(np.finfo(x.dtype).eps) / 2
        rounding = u**2 * (moments.m2 + moments.count * moments.mean**2)
        self._remember(x.shape[1], names)
        self._merge(len(x), mean, scatter, rounding, x)

    def merge(self, other: Whitener) -> Whitener:
        """Take in all that `other` has seen, as one fit on both would. ValueError where the features differ."""
        self._expect_mergeable(other)
        if hasattr(other, "_seen"):
            self._remember(other.n_features_in_, getattr(other, "feature_names_in_", None))
            self._expect_parameters(self.n_features_in_)
            self._merge(*other._seen, beside=other._seen[1])
        return self

    def _merge(self, n: int, mean: Array, scatter: Array, rounding: Array, beside: Array) -> None:
        """n samples with their mean, Σ(x − mean)(x − mean)ᵀ and Σu²x²."""
        before, mean_before, scatter_before, rounding_before = getattr(self, "_seen", (0, 0 * mean, 0.0, 0.0))
        both = before + n
        if n:
            apart = mean - mean_before
            mean = mean_before + apart * (n / both)
            scatter = scatter_before + scatter + np.outer(apart, apart) * (before * n / both)
            self._seen = (both, mean, scatter, rounding_before + rounding)
        if both > 1:
            self._decompose(beside)

    def _decompose(self, beside: Array) -> None:
        n, mean, scatter, rounding = self._seen
        covariance = scatter / (n - 1)
        values, rows = _eigh(beside, covariance)
        of_sums = values[0] * (len(values) + n**0.5) * _EPS  # sums of n products err by √n·ε (Higham & Mary 2019)
        kept = values + self.eps > np.maximum(of_sums, rows**2 @ rounding / n)
        self.components_ = rows[kept][: self.n_components]
        self.explained_variance_ = values[kept][: self.n_components]
        scale = np.sqrt(self.explained_variance_ + self.eps)[:, None]
        self.whitening_, self.dewhitening_ = self.components_ / scale, (self.components_ * scale).T
        if self.method == "zca":
            self.whitening_ = self.components_.T @ self.whitening_
            self.dewhitening_ = self.dewhitening_ @ self.components_
        self.mean_, self.covariance_ = mean, covariance
        self.n_components_, self.n_samples_seen_ = len(self.components_), n

    def transform(self, X: Any) -> Array:
        """Whitened X, in its dtype. NotFittedError before two samples were seen."""
        self._expect_fitted()
        x, _ = self._taken(X)
        _expect_finite(x, allow_nan=False)
        return self._whitened(x)

    def fit_transform(self, X: Any, y: Any = None) -> Array:
        """`fit`, then `transform`."""
        return self._whitened(self._fit(X))

    def _whitened(self, x: Array) -> Array:
        return _linear(x, self.mean_, self.whitening_.T, np.zeros(len(self.whitening_)))

    def inverse_transform(self, X: Any) -> Array:
        """What `transform` made X of, but for what lay in directions that were dropped; in X's dtype."""
        self._expect_fitted()
        x = _floats(X)
        self._expect_width(x, len(self.whitening_))
        _expect_finite(x, allow_nan=False)
        return _linear(x, np.zeros(len(self.whitening_)), self.dewhitening_.T, self.mean_)

    def get_feature_names_out(self, input_features: Any = None) -> Array:
        """whitener0, whitener1, … for PCA, the input's names for ZCA."""
        names = super().get_feature_names_out(input_features)
        if self.method == "zca":
            return names
        return np.asarray([f"whitener{i}" for i in range(self.n_components_)], object)
