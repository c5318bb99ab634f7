"""The emulator within the extension: its devices, its schedule, its list of launches, its memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
from collections.abc import Iterator

_library: ctypes.CDLL | None = None


def library() -> ctypes.CDLL:
    """The extension's C functions."""
    if _library is None:
        spec = importlib.util.find_spec("fusednorm._C")
        assert spec is not None
        assert spec.origin is not None
        use(spec.origin)
    assert _library is not None
    return _library


def use(path: str) -> None:
    """A library with the emulator in it, in place of the extension."""
    global _library
    found = ctypes.CDLL(path)
    if not hasattr(found, "fn_emu_seed"):
        raise RuntimeError(f"{path} was not built with FUSEDNORM_CUDA=EMULATED")
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, result, *arguments in (
        ("seed", None, ctypes.c_ulong),
        ("devices", ctypes.c_int, ctypes.c_char_p),
        ("device_count", ctypes.c_int),
        ("get_device", ctypes.c_int),
        ("set_device", ctypes.c_int, ctypes.c_int),
        ("launches", size, ctypes.POINTER(_Record), size),
        ("allocate", pointer, size),
        ("free", None, pointer),
        ("open", None, ctypes.c_int),
        ("stream", pointer, ctypes.c_int),
        ("begin_capture", None, pointer),
        ("capturing", ctypes.c_int, pointer),
        ("end_capture", pointer, pointer),
        ("record", None, pointer, STEP),
        ("replay", ctypes.c_char_p, pointer),
    ):
        function = getattr(found, f"fn_emu_{name}")
        function.restype, function.argtypes = result, arguments
    _library = found


STEP = ctypes.CFUNCTYPE(None)


class _Record(ctypes.Structure):
    _fields_ = (
        ("device", ctypes.c_int),
        ("cooperative", ctypes.c_int),
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("cluster", ctypes.c_uint),
        ("shared", ctypes.c_size_t),
        ("stream", ctypes.c_void_p),
    )


def seed(to: int) -> None:
    """The order in which CUDA threads run; see emu.h."""
    library().fn_emu_seed(to)


def devices(settings: str) -> int:
    """Other devices, "sms=4,shared=2048;cluster=1"; names and defaults are in runtime.cpp. How many there are now."""
    count: int = library().fn_emu_devices(settings.encode())
    if count < 0:
        raise ValueError(f"no such settings of devices: {settings}")
    return count


def launches() -> list[_Record]:
    """The launches since the last call."""
    records = (_Record * 10_000)()
    count = library().fn_emu_launches(records, len(records))
    return list(records[:count])


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """Within, the host may touch device memory."""
    library().fn_emu_open(1)
    try:
        yield
    finally:
        library().fn_emu_open(-1)
