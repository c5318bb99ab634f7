from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
_Optional = _Array | None

POOL_BYTES: int

class Fold:
    def __init__(self, batch: int, outer: int, groups: int, inner: int, span: int) -> None: ...
    @property
    def batch(self) -> int: ...
    @property
    def outer(self) -> int: ...
    @property
    def groups(self) -> int: ...
    @property
    def inner(self) -> int: ...
    @property
    def span(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def statistics(self) -> int: ...
    @property
    def per_statistic(self) -> int: ...
    @property
    def channels(self) -> int: ...

class PoolMemory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def moments(
    fold: Fold,
    x: _Array,
    mask: _Optional,
    center: bool,
    count: _Array,
    mean: _Array,
    m2: _Array,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def merge(
    before: int,
    axis: int,
    after: int,
    count: _Array,
    mean: _Optional,
    m2: _Array,
    merged_count: _Array,
    merged_mean: _Array,
    merged_m2: _Array,
    stream: int = 0,
) -> None: ...
def normalize(
    fold: Fold,
    x: _Array,
    mean: _Optional,
    rstd: _Array,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    activation: int,
    slope: float,
    y: _Array,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def forward(
    fold: Fold,
    x: _Array,
    weight: _Optional,
    bias: _Optional,
    running_mean: _Optional,
    running_var: _Optional,
    residual: _Optional,
    mask: _Optional,
    y: _Array,
    mean: _Optional,
    rstd: _Array,
    training: bool,
    momentum: float,
    counted: int,
    averaged: bool,
    correction: int,
    eps: float,
    activation: int,
    slope: float,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def backward(
    fold: Fold,
    dy: _Array,
    x: _Array,
    mean: _Optional,
    rstd: _Array,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    mask: _Optional,
    constant: bool,
    activation: int,
    slope: float,
    dx: _Array,
    dresidual: _Optional,
    dweight: _Array,
    dbias: _Array,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def grad_sums(
    fold: Fold,
    dy: _Array,
    x: _Array,
    mean: _Optional,
    rstd: _Array,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    activation: int,
    slope: float,
    s1: _Array,
    s2: _Array,
    dweight: _Array,
    dbias: _Array,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def grad_input(
    fold: Fold,
    dy: _Array,
    x: _Array,
    mean: _Optional,
    rstd: _Array,
    weight: _Optional,
    bias: _Optional,
    residual: _Optional,
    activation: int,
    slope: float,
    cx: _Optional,
    c0: _Optional,
    mask: _Optional,
    dx: _Array,
    dresidual: _Optional,
    stream: int = 0,
    scratch: _Optional = None,
) -> None: ...
def copy(to: _Array, from_: _Array, stream: int = 0) -> None: ...
def scratch_bytes(fold: Fold, x: _Array) -> int: ...
def cuda_built() -> bool: ...
def cuda_devices() -> int: ...
def capturing(stream: int) -> bool: ...
def apart(out: _Array, others: tuple[Any, ...]) -> bool: ...
def xla_handlers() -> dict[str, Any]: ...
def build_info() -> dict[str, Any]: ...
def select_isa(name: str) -> None: ...
def set_num_threads(n: int) -> None: ...
def get_num_threads() -> int: ...
def empty_cache() -> int: ...
