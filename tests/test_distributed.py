"""Synchronized batch norm: on threads, MPI's processes and gloo's, against one process with the whole batch."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fusednorm as fn
import numpy as np
import pytest
import ranks
from fusednorm import distributed
from fusednorm.testing import cases
from fusednorm.testing.cases import Case, Inputs, Outputs
from support import assert_same_bits, normal, run_python

PROGRAM = str(Path(ranks.__file__))
ENGINES = [(engine, size) for engine in ("threads", "mpi", "gloo") for size in (2, 3, 4)]
# Of processes, which take seconds to start, one number stands for the others.
SHORT = [*ENGINES[:3], ("mpi", 3), ("gloo", 2)]


def parametrized(engines: list[tuple[str, int]]) -> list[Any]:
    return [
        pytest.param(one, id=f"{one[0]}-{one[1]}", marks=[] if one in SHORT else [pytest.mark.thorough])
        for one in engines
    ]


_found: dict[tuple[str, int], list[dict[str, Any]]] = {}  # one launch for all tests


def launched(engine: str, size: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank found, as processes."""
    if engine == "mpi":
        commands = [ranks.mpi(size, PROGRAM, engine, str(folder))]
    else:
        torch = pytest.importorskip("torch", reason="PyTorch is not installed")
        if not torch.distributed.is_gloo_available():
            pytest.skip("PyTorch is built without gloo")
        commands = [[sys.executable, PROGRAM, engine, str(folder), str(rank), str(size)] for rank in range(size)]
    running = [ranks.started(one) for one in commands]
    try:
        said = [one.communicate(timeout=300)[0] for one in running]
    finally:
        for one in running:
            one.kill()
    assert all(one.returncode == 0 for one in running), "\n".join(said)
    files = [folder / f"rank{rank}.pickle" for rank in range(size)]
    return [pickle.loads(one.read_bytes()) if one.exists() else {} for one in files]


@pytest.fixture(params=parametrized(ENGINES))
def found(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Engine, and what each of its ranks found."""
    engine, size = request.param
    if request.param not in _found:
        threads = engine == "threads"
        _found[request.param] = ranks.threads(size, ranks.everything) if threads else launched(engine, size, tmp_path)
    return engine, _found[request.param]


on_gloo = pytest.mark.parametrize("found", parametrized([one for one in ENGINES if one[0] == "gloo"]), indirect=True)


def joined(case: Case, inputs: Inputs, each: list[dict[str, Any]]) -> Outputs:
    """One result of what the ranks have: their rows put together, their gradients of parameters added up."""
    samples, mine = cases._samples(case), ranks.rows(case, len(each))
    whole: dict[str, Any] = {}
    for name in ("y", "dx", "dresidual"):
        if each[0][name] is not None:
            whole[name] = np.empty(case.shape, each[0][name].dtype)
            for one, rows in zip(each, mine, strict=True):
                whole[name][(slice(None),) * samples + (rows,)] = one[name]
    for name in ("dweight", "dbias"):
        if each[0][name] is not None:
            whole[name] = sum(one[name] for one in each).astype(each[0][name].dtype)
    # A rank has as many ghost batches of the whole as it has rows in.
    longest = max(each, key=lambda one: len(one["mean"]))
    for name in ("mean", "rstd"):
        whole[name] = longest[name] if case.ghost_batch_size else longest[name][0]
    whole |= {name: each[0][name] if case.running else None for name in ("running_mean", "running_var")}
    return Outputs(**(dict.fromkeys(Outputs.__dataclass_fields__) | whole))


def wrong(case: Case, each: list[dict[str, Any]]) -> list[str]:
    """What is not within the bounds of the case's whole batch.

    These bounds hold here as well. Each rank's moments err as those of a smaller tensor do, relative to the rank's own
    σ, and Chan's merge adds roundings of float64; y, dx and var in float32 have 2 to 16 roundings to spare for the same
    count of operations. dweight and dbias are sums of as many numbers in shorter chains, whose errors fill half of the
    bound; each rank rounds its own to float32, by 1/16 of the bound (6e-8 of Σ|dy·x̂|, which is the sum of the ranks'),
    and so does the sum here. float64's bounds count chains of up to 4096 additions.
    """
    inputs = cases.make(case)
    expected = cases.expected(case, inputs)
    return [
        f"{case.name}: {deviation}"
        for deviation in cases.compare(case, inputs, expected, joined(case, inputs, each))
        if not deviation.ok and (case.affine or deviation.name not in ("dweight", "dbias"))
    ]


def test_as_one_process_with_the_whole_batch(found: Any) -> None:
    engine, each = found
    mistakes = []
    for case in ranks.chosen(engine, len(each)):
        mistakes += wrong(case, [one[case.name] for one in each])
    assert not mistakes, "\n".join(mistakes)


def test_wrong_results_are_seen() -> None:
    case = next(case for case in ranks.SMALL if case.name == "4x5x49-axis1-float32-relu-residual")
    each = ranks.threads(2, lambda group: ranks.computed(case, group))
    assert not wrong(case, each)
    for name in ("y", "dx", "dweight", "running_mean", "running_var", "rstd"):
        off = copy.deepcopy(each)
        for one in off:
            one[name] += 1e-4 * np.abs(one[name]).max()
        assert wrong(case, off), name


def test_all_ranks_have_the_same_bits(found: Any) -> None:
    engine, each = found
    for case in ranks.chosen(engine, len(each)):
        first, *others = (one[case.name] for one in each)
        for one in others:
            ghosts = min(len(first["mean"]), len(one["mean"]))
            assert_same_bits(one["mean"][:ghosts], first["mean"][:ghosts], case.name)
            assert_same_bits(one["rstd"][:ghosts], first["rstd"][:ghosts], case.name)
            if case.running:
                assert_same_bits(one["running_mean"], first["running_mean"], case.name)
                assert_same_bits(one["running_var"], first["running_var"], case.name)
            assert one["batches"] == first["batches"]
    assert_same_bits(each[-1]["alike"], each[0]["alike"])


def test_merged_in_the_order_of_the_ranks(found: Any) -> None:
    """By Chan's formula, one rank after the other: bit by bit what Moments.merge has."""
    engine, each = found
    plain = [case for case in ranks.chosen(engine, len(each)) if case.axis == 1 and len(case.shape) == 2]
    plain = [case for case in plain if case.size and not case.mask and case.ghost_batch_size is None]
    assert max(case.channels for case in plain) > 10
    for case in plain:
        merged = fn.Moments(np.zeros(case.channels), 0, 0)
        x = cases.make(case).x
        for rows in ranks.rows(case, len(each)):
            merged.merge(fn.Moments(np.zeros(case.channels), 0, 0).push(x[rows], 0))
        assert_same_bits(each[0][case.name]["mean"][0], merged.mean)
        assert_same_bits(each[0][case.name]["rstd"][0], 1 / np.sqrt(merged.variance() + case.eps))


def test_one_collective_forward_and_one_backward(found: Any) -> None:
    engine, each = found
    for case in ranks.chosen(engine, len(each)):
        assert {one[case.name]["collectives"] for one in each} == {(1, 1, 0)}, case.name


def test_batches_are_counted_alike(found: Any) -> None:
    """Two calls; a rank without rows counts as well, but a batch without any does not."""
    engine, each = found
    for case in ranks.chosen(engine, len(each)):
        batch = len(cases._ghosts(case)) if case.size else 0
        assert each[0][case.name]["batches"] == 2 * batch * case.running, case.name


# What each rank's error is: of the odd one, of the others. None: all have the odd one's.
REFUSED: dict[str, tuple[tuple[str, str], tuple[str, str] | None]] = {
    "channels": (("ValueError", "the number of channels, and there is 64 on rank {others}; 63 on rank {odd}"), None),
    "channels of x": (
        ("ValueError", "running_mean should contain 5 elements not 6"),
        ("RuntimeError", "forward of a synchronized batch norm of 6 channels: rank {odd} of {size} has ValueError: "),
    ),
    "dtype": (("TypeError", "the dtype of x, and there is float32 on rank {others}; float64 on rank {odd}"), None),
    "mask": (("TypeError", "mask must be boolean"), ("RuntimeError", "rank {odd} of {size} has TypeError: mask must")),
    "dtype, later": (("TypeError", "dtype of x, and there is float32 on rank {others}; float16 on rank {odd}"), None),
    "residual, later": (
        ("ValueError", "residual must have x's shape (4, 6, 5), got (4, 5, 5)"),
        ("RuntimeError", "has ValueError: residual must have x's shape (4, 6, 5), got (4, 5, 5)"),
    ),
    "no array, later": (("TypeError", "x must be a NumPy or CuPy array, not list"), ("RuntimeError", "not list")),
    "eps, later": (("ValueError", "eps, and there is 1e-05 on rank {others}; 0.001 on rank {odd}"), None),
    "dy": (("ValueError", "dy must have x's"), ("RuntimeError", "backward of a synchronized batch norm of 6 channels")),
    "pass": (("RuntimeError", "the pass, and there is backward on rank {others}; forward on rank {odd}"), None),
    "batches": (("ValueError", "num_batches_tracked, and there is 0 on rank {others}; 1 on rank {odd}"), None),
    "lone": (("ValueError", "Expected more than 1 value per channel when training, got 1 over {size} ranks"), None),
}


def test_errors_are_every_ranks(found: Any) -> None:
    _, each = found
    places = {"size": len(each), "odd": len(each) - 1, "others": ", ".join(map(str, range(len(each) - 1)))}
    refused = [one["refusals"] for one in each]
    for what, (odd, others) in REFUSED.items():
        for rank, one in enumerate(refused):
            kind, words = odd if others is None or rank == places["odd"] else others
            assert one[what][0] == kind, (what, rank, one[what])
            assert words.format(**places) in one[what][1], (what, rank)
            assert one[what][2], f"{what}: the layer of rank {rank} has changed"
    assert set(refused[0]) == {*REFUSED, "backward, again", "at last"}
    for what in ("backward, again", "at last"):
        assert all(one[what][:2] == ("", "") and not one[what][2] for one in refused), what


def test_messages_grow_with_the_ghost_batches(found: Any) -> None:
    """One more collective where a rank has more ghost batches than any had before: on all ranks alike."""
    _, each = found
    most = 3 + len(each) - 1  # of the last rank, in the third call
    for one in each:
        sizes, batches = zip(*one["growing"], strict=True)
        assert [len(many) for many in sizes] == [2, 1, 2, 1, 1]
        assert sizes[1][0] < sizes[3][0] == sizes[4][0]
        assert batches == (2, 4, 4 + most, 4 + 2 * most, 5 + 2 * most)
        assert one["growing"] == each[0]["growing"]


@on_gloo
def test_modules_are_the_same(found: Any) -> None:
    _, each = found
    mistakes = []
    for name, first in each[0]["modules"].items():
        case = next(case for case in ranks.SMALL if case.name == name)
        mistakes += wrong(case, [one["modules"][name] for one in each])
        assert {one["modules"][name]["collectives"] for one in each} == {(1, 1, 0)}
        assert first["batches"] == 2 * case.running
    assert len(each[0]["modules"]) > 25
    assert not mistakes, "\n".join(mistakes)


@on_gloo
def test_a_network_under_data_parallel(found: Any) -> None:
    """float64, of numbers up to 10: some thousand roundings of 1e-16, which 1e-11 leaves room for, and a wrong count
    does not."""
    _, each = found
    for one in each:
        whole, parallel = one["network"]["whole"], one["network"]["parallel"]
        assert whole.keys() == parallel.keys()
        for name, want in whole.items():
            np.testing.assert_allclose(parallel[name], want, rtol=1e-11, atol=1e-11, err_msg=name)
        if len(each) == 3:
            np.testing.assert_array_equal(one["network"]["compiled"], one["network"]["eager"])


@pytest.mark.thorough
def test_a_rank_that_is_late_or_dies(tmp_path: Path) -> None:
    there, _ = launched("failing", 2, tmp_path)
    for what, step in (("late", "backward"), ("died", "forward")):
        kind, words, unchanged = there[what]
        assert kind == "RuntimeError"
        assert f"{step} of a synchronized batch norm of 6 channels: the gather of " in words
        assert "failed on rank 0 of 2: " in words
        assert unchanged
    assert "imed out" in there["late"][1]


# What needs no processes.


@pytest.mark.parametrize("gather", [1, 2, 3, 4])
def test_a_gather_that_fails(gather: int) -> None:
    """The first one, the first with numbers, the backward's, and the next forward's: what was, stays."""

    def work(group: Any) -> Any:
        x = normal((4, 6, 5), seed=group.rank)
        layer = fn.BatchNorm(6, process_group=group)
        steps = [lambda: layer(x), lambda: layer.backward(x), lambda: layer(x)]
        found = []
        for step in steps:
            out = ranks.attempt(layer, step)
            found.append(out)
            if out[0]:
                break
        return found

    each = ranks.threads(2, work, fails=gather)
    step = "backward" if gather == 3 else "forward"
    for found in each:
        assert len(found) == {1: 1, 2: 1, 3: 2, 4: 3}[gather]
        kind, words, unchanged = found[-1]
        assert kind == "RuntimeError"
        assert f"{step} of a synchronized batch norm of 6 channels: the gather of " in words
        assert unchanged
    assert "failed on rank 0 of 2: the cable is out" in each[0][-1][1]


def test_a_backward_after_a_failed_one() -> None:
    """The call is still there for it."""

    def work(group: Any) -> Any:
        x = normal((4, 6), seed=group.rank)
        layer = fn.BatchNorm(6, process_group=group)
        layer(x)
        assert ranks.attempt(layer, lambda: layer.backward(x[:1]))[0] == "ValueError"
        return layer.backward(x)

    assert all(dx.shape == (4, 6) for dx in ranks.threads(2, work))


def test_a_group_of_one_has_the_bits_of_none() -> None:
    for case in ranks.SMALL:
        if case.mask:  # the verb backward makes its coefficients in another order
            continue
        inputs = cases.make(case)
        given = {name: getattr(inputs, name) for name in inputs.__dataclass_fields__}
        results = []
        for group in (None, ranks.threads(1, lambda group: group)[0]):
            layer = ranks.layer_of(case, given, group)
            y = layer(inputs.x, inputs.residual, inputs.mask)
            back = layer.backward(inputs.dy)
            results.append([y, *(back if isinstance(back, tuple) else (back,)), *ranks.snapshot(layer).values()])
        for alone, with_group in zip(*results, strict=True):
            if isinstance(alone, np.ndarray):
                assert_same_bits(with_group, alone, case.name)
            else:
                assert with_group == alone, case.name


def test_momentum_none_is_an_average_of_all() -> None:
    """float64, whose roundings are below 1e-13 of the numbers here."""
    x = normal((3, 9, 6, 5), "float64")
    alone = fn.BatchNorm(6, momentum=None, dtype="float64", ghost_batch_size=6)
    for batch in x:
        alone(batch)

    def work(group: Any) -> Any:
        layer = fn.BatchNorm(6, momentum=None, dtype="float64", ghost_batch_size=2, process_group=group)
        mine = np.flatnonzero(np.arange(9) % 6 // 2 == group.rank)  # rows 0, 1, 6, 7 are rank 0's
        for batch in x:
            layer(batch[mine])
        return layer

    for layer in ranks.threads(3, work):
        assert layer.num_batches_tracked == alone.num_batches_tracked == 6
        np.testing.assert_allclose(layer.running_mean, alone.running_mean, rtol=0, atol=1e-13)
        np.testing.assert_allclose(layer.running_var, alone.running_var, rtol=1e-13)


def test_out_may_be_x_and_dy() -> None:
    x, dy = normal((8, 6, 5)), normal((8, 6, 5), seed=1)

    def work(group: Any) -> Any:
        mine = slice(4 * group.rank, 4 * group.rank + 4)
        layer, other = fn.BatchNorm(6, process_group=group), fn.BatchNorm(6, process_group=group)
        y, own = layer(x[mine]), x[mine].copy()
        assert other(own, out=own) is own
        assert_same_bits(own, y)
        dx, own = layer.backward(dy[mine]), dy[mine].copy()
        layer(x[mine])
        assert layer.backward(own, out=own) is own
        assert_same_bits(own, dx)
        strided = np.empty((6, 5, 8), np.float32).transpose(2, 0, 1)[::2]
        assert layer(x[mine], out=strided) is strided
        assert_same_bits(strided, y)

    ranks.threads(2, work)


def test_without_running_statistics_evaluation_is_local() -> None:
    x = normal((8, 6, 5))

    def work(group: Any) -> Any:
        counted = ranks.Counted(group)
        layer = fn.BatchNorm(6, track_running_stats=False, process_group=counted)
        mine = x[4 * group.rank : 4 * group.rank + 4]
        layer(mine)
        before = len(counted.sizes)
        assert_same_bits(layer.eval()(mine), fn.batch_norm_forward(mine, layer.weight, layer.bias)[0])
        layer.backward(mine)
        assert len(counted.sizes) == before

    ranks.threads(2, work)


def test_the_gradients_sum_is_in_the_order_of_the_ranks() -> None:
    """By numbers whose sum depends on it: (1e16 − 1e16) + 1 is 1, in another order 0."""
    sums = []

    def work(group: Any) -> Any:
        x = np.array([[1.0], [-1.0]]) + 0 * group.rank
        layer = fn.BatchNorm(1, eps=1e-300, process_group=group)
        layer(x)
        dx = layer.backward(np.full((2, 1), (1e16, -1e16, 1.0)[group.rank] / 2))
        sums.append((group.rank, dx))

    ranks.threads(3, work)
    # Σ dy is 1 then, and the rank whose dy is 1/2 has dx = 1/2 − 1/6.
    (dx,) = (dx for rank, dx in sums if rank == 2)
    np.testing.assert_allclose(dx, 1 / 2 - 1 / 6, rtol=1e-15)


def test_copies_have_no_group() -> None:
    group = ranks.threads(1, lambda group: group)[0]
    layer = fn.BatchNorm(4, process_group=group)
    assert layer.process_group is group
    layer(normal((4, 4)))
    for one in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert one.process_group is None
        one(normal((4, 4)))
        one.backward(normal((4, 4)))
        assert_same_bits(one.weight, layer.weight)
    layer.process_group = None
    before = group.gathers
    layer(normal((4, 4)))
    assert group.gathers == before


def test_what_is_no_group() -> None:
    with pytest.raises(TypeError, match=r"process_group must be .*, or have rank, size and allgather, not int"):
        fn.BatchNorm(4, process_group=3)
    outside = SimpleNamespace(rank=-1, size=2, allgather=None)
    with pytest.raises(ValueError, match="this process is none of the group's 2 ranks"):
        fn.BatchNorm(4, process_group=outside)
    strange = SimpleNamespace(rank=0, size=2, allgather=lambda numbers: numbers)
    with pytest.raises(RuntimeError, match=r"must bring \(2, 50\) of them on rank 0 of 2, not \(50,\)"):
        fn.BatchNorm(4, process_group=strange)(normal((4, 4)))


def test_long_errors_are_cut() -> None:
    def work(group: Any) -> Any:
        layer = fn.BatchNorm(4, process_group=group)
        activation = "é" * 500 if group.rank else None
        layer.activation = activation
        return ranks.attempt(layer, lambda: layer(normal((4, 4))))

    (kind, words, _), (own, full, _) = ranks.threads(2, work)
    assert (kind, own) == ("RuntimeError", "ValueError")
    assert "é" * 500 in full
    assert "has ValueError: activation must be one of relu" in words
    assert len(words) < 300


def test_no_library_is_imported() -> None:
    done = run_python(
        "import sys, numpy as np, fusednorm as fn\n"
        "from types import SimpleNamespace as S\n"
        "group = S(rank=0, size=1, allgather=lambda numbers: [numbers])\n"
        "layer = fn.BatchNorm(3, process_group=group); layer(np.ones((4, 3))); layer.backward(np.ones((4, 3)))\n"
        "print([name for name in ('mpi4py', 'torch', 'cupy', 'cupyx') if name in sys.modules])"
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def fake_libraries(monkeypatch: pytest.MonkeyPatch) -> Any:
    """CuPy's NCCL, as far as it is used, on NumPy's arrays: a communicator of one rank."""
    calls = []

    class NcclCommunicator:
        def rank_id(self) -> int:
            return 0

        def size(self) -> int:
            return 1

        def device_id(self) -> int:
            return 5

        def allGather(self, sent: Any, found: Any, count: int, kind: int, stream: int) -> None:
            calls.append((count, kind, stream))
            found[...] = sent

    class Sent(np.ndarray):  # type: ignore[type-arg]
        def get(self) -> Any:
            return np.asarray(self)

        data = property(lambda self: SimpleNamespace(ptr=np.asarray(self)))

    class NCCLBackend:
        def __init__(self) -> None:
            self._comm = NcclCommunicator()

    class Device:
        def __init__(self, device: int) -> None:
            assert device == 5

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

    nccl = SimpleNamespace(NcclCommunicator=NcclCommunicator, NCCL_FLOAT64=8)
    cuda = SimpleNamespace(nccl=nccl, Device=Device, get_current_stream=lambda: SimpleNamespace(ptr=77))
    cupy = SimpleNamespace(
        cuda=cuda, ndarray=Sent, asarray=lambda a: a.view(Sent), empty=lambda shape: np.empty(shape).view(Sent)
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx.distributed", SimpleNamespace(NCCLBackend=NCCLBackend))
    return calls, (NCCLBackend(), NcclCommunicator())


def test_nccls_communicators(monkeypatch: pytest.MonkeyPatch) -> None:
    """How they are called; with a GPU, the test below calls them."""
    calls, communicators = fake_libraries(monkeypatch)
    for given in communicators:
        group = distributed.group_of(given)
        assert (group.rank, group.size) == (0, 1)
        numbers = normal((7,), "float64")
        assert_same_bits(group.allgather(numbers), numbers[None])
    assert calls == [(7, 8, 77)] * 2


def test_with_a_gpu() -> None:
    cupy = pytest.importorskip("cupy", reason="CuPy is not installed")
    if not fn._C.cuda_devices() or not cupy.cuda.nccl.available:
        pytest.skip("there is no GPU, or CuPy has no NCCL")
    nccl = cupy.cuda.nccl
    communicator = nccl.NcclCommunicator(1, nccl.get_unique_id(), 0)
    x, dy = (cupy.asarray(normal((8, 6, 5), seed=seed)) for seed in (0, 1))
    alone, layer = (fn.BatchNorm(6, device="cuda", process_group=group) for group in (None, communicator))
    for got, want in ((layer(x), alone(x)), (layer.backward(dy), alone.backward(dy))):
        # 33 u of numbers up to 4, as the cases' bounds are.
        np.testing.assert_allclose(got.get(), want.get(), rtol=0, atol=8e-6)
    np.testing.assert_allclose(layer.running_var.get(), alone.running_var.get(), rtol=1e-6)


# PyTorch's module without a group.


def test_the_module_is_torch_nns() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import fusednorm.torch as fnt

    theirs, ours = torch.nn.SyncBatchNorm(4, 1e-3, 0.2), fnt.SyncBatchNorm(4, 1e-3, 0.2)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert not isinstance(ours, torch.nn.SyncBatchNorm)  # which DistributedDataParallel refuses on the CPU
    x = torch.randn(5, 4, 3, requires_grad=True)
    np.testing.assert_allclose(ours(x).detach(), theirs(x).detach(), atol=2e-6)
    np.testing.assert_allclose(ours.running_var, theirs.running_var, rtol=1e-6)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
    np.testing.assert_allclose(ours.eval()(x).detach(), theirs.eval()(x).detach(), atol=2e-6)
    compiled = torch.compile(ours.train(), backend="eager", fullgraph=True)
    assert compiled(x).shape == x.shape
    torch._dynamo.reset()


def test_modules_are_converted() -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import fusednorm.torch as fnt
    from torch import nn

    plain = nn.BatchNorm2d(4, momentum=None)
    plain.register_forward_hook(lambda *_: None)
    model = nn.Sequential(plain, nn.Sequential(fnt.BatchNorm1d(4), plain), fnt.BatchNormAct(4, activation="tanh"))
    model.append(nn.SyncBatchNorm(4)).append(nn.GroupNorm(2, 4))
    state = dict(model.state_dict())
    group = SimpleNamespace(rank=0, size=1, allgather=lambda numbers: [numbers])
    assert fnt.SyncBatchNorm.convert_sync_batchnorm(model, group) is model
    kinds = [type(one) for one in model.modules() if not isinstance(one, nn.Sequential)]
    assert kinds == [fnt.SyncBatchNorm] * 4 + [nn.GroupNorm]
    assert plain._forward_hooks
    assert [one.activation for one in model.modules() if isinstance(one, fnt.SyncBatchNorm)] == [
        None,
        None,
        "tanh",
        None,
    ]
    assert all(one.process_group is group for one in model.modules() if isinstance(one, fnt.SyncBatchNorm))
    assert all(torch.equal(a, state[name]) for name, a in model.state_dict().items())
    for one in (copy.deepcopy(model), pickle.loads(pickle.dumps(model[2]))):
        assert all(m.process_group is None for m in one.modules() if isinstance(m, fnt.SyncBatchNorm))
    lone = nn.BatchNorm1d(3)
    assert type(fnt.convert_sync_batchnorm(lone)) is fnt.SyncBatchNorm
    lazy = nn.Sequential(nn.BatchNorm1d(3), nn.LazyBatchNorm1d())
    with pytest.raises(ValueError, match="a lazy batch norm has no channels"):
        fnt.convert_sync_batchnorm(lazy)
    assert type(lazy[0]) is nn.BatchNorm1d


def test_modules_take_part_with_their_errors() -> None:
    """On threads: PyTorch's modules take any group."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    import fusednorm.torch as fnt

    def work(group: Any) -> Any:
        module = fnt.SyncBatchNorm(4, process_group=group)
        x = torch.ones(3, 4).requires_grad_()
        before = [a.clone() for a in module.state_dict().values()]
        found = []
        for bad in (torch.ones(4), torch.ones(3, 5), torch.ones(3, 4).double(), torch.ones(3, 4).to_sparse()):
            try:
                module(bad if group.rank else x)
            except Exception as error:
                found.append((type(error).__name__, str(error)))
        assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before, strict=True))
        try:
            torch.autograd.grad(module(x).sum(), x, create_graph=bool(group.rank))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        return found

    there, odd = ranks.threads(2, work)
    assert [kind for kind, _ in odd] == ["ValueError", "ValueError", "TypeError", odd[3][0], "NotImplementedError"]
    assert [kind for kind, _ in there] == ["RuntimeError", "RuntimeError", "TypeError", "RuntimeError", "RuntimeError"]
    assert "has ValueError: expected at least 2D input" in there[0][1]
    assert "has NotImplementedError: a synchronized batch norm has no second gradients" in there[4][1]
