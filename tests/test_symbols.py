"""What is in the extension's file, and what happens when it is loaded.

The one-definition rule: no function that was compiled for one instruction set may stand in for another's.

An inline function or template that several objects emit is kept once, as whichever copy the linker meets first. If
that copy came from the object for AVX-512, a machine without it dies in code that has nothing to do with kernels. So:
what an object for an instruction set emits under a name that other objects may use (weak, or global) must lie in that
instruction set's namespace.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import fusednorm as fn
import pytest
from fusednorm import _C
from support import run_python

EXTENSION = Path(_C.__file__)
BUILT = fn.build_info()["isa_built"]
# fusednorm::cpu::v4::…, and vtables, guards and lambdas inside it.
NAMESPACES = re.compile("9fusednorm3cpu(" + "|".join(f"{len(name)}{name}" for name in BUILT) + ")")
# Registers that only wider instruction sets have: ymm with AVX, zmm and mask registers with AVX-512.
WIDE = re.compile(r"%[yz]mm|%k[0-7]\b|\{%k")
VEX = re.compile(r"\tv[a-z0-9]+ ")


def tool(name: str) -> str:
    # Under an emulator the plain name is the tool of another processor.
    found = shutil.which(f"{platform.machine()}-linux-gnu-{name}") or shutil.which(name)
    if not found:
        pytest.skip(f"{name} is not installed")
    return found


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def defined_symbols(path: Path) -> list[tuple[str, str]]:
    """(type, mangled name) of what the file defines."""
    lines = output(tool("nm"), "--defined-only", "--format=posix", str(path)).splitlines()
    return [(fields[1], fields[0]) for fields in (line.split() for line in lines) if len(fields) >= 2]


def unstripped() -> Path:
    """The installed extension, or the one it was made from: installing strips it."""
    root = Path(__file__).resolve().parent.parent
    built = sorted(root.glob(f"build/*/{EXTENSION.name}"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in (EXTENSION, *built):
        if any(NAMESPACES.search(name) for _, name in defined_symbols(path)):
            return path
    pytest.skip(f"{EXTENSION.name} is stripped, and under build/ there is none that is not")


def functions(path: Path) -> dict[str, str]:
    """Disassembly of every function, by mangled name."""
    text = output(tool("objdump"), "-d", "--no-show-raw-insn", "-w", str(path))
    found: dict[str, str] = {}
    for block in re.split(r"\n\n(?=[0-9a-f]+ <)", text):
        head = re.match(r"\s*[0-9a-f]+ <([^>]+)>:", block)
        if head:
            found[head.group(1)] = block
    return found


def needs_several_x86_objects() -> None:
    if "v2" not in BUILT or len(BUILT) < 2:
        pytest.skip(f"built for {', '.join(BUILT)} only")


def test_wide_instructions_stay_in_their_namespace() -> None:
    needs_several_x86_objects()
    code = functions(unstripped())
    wide = {name for name, block in code.items() if WIDE.search(block) or VEX.search(block)}
    # The control: the kernels are there, and are seen to be wide.
    for isa in set(BUILT) - {"v2"}:
        assert any(f"3cpu2{isa}" in name for name in wide)
    outside = sorted(name for name in wide if not NAMESPACES.search(name))
    assert not outside
    # And nothing wide within the narrow one.
    assert not sorted(name for name in wide if "3cpu2v2" in name)
    assert not sorted(name for name in wide if "3cpu2v3" in name and re.search(r"%zmm|%k[0-7]\b", code[name]))


def test_every_instruction_set_has_its_own_copy() -> None:
    """As many functions for one as for another, near enough (v2 has fewer loops), and none that names two."""
    needs_several_x86_objects()
    counted = Counter()  # type: Counter[str]
    for _, name in defined_symbols(unstripped()):
        named = set(NAMESPACES.findall(name))
        assert len(named) <= 1, name
        counted.update(named)
    assert len(counted) == len(BUILT)
    assert min(counted.values()) > max(counted.values()) / 2


def test_objects_emit_nothing_under_shared_names() -> None:
    """Object by object, where the build left them: the only way to see a weak symbol before the linker drops it."""
    needs_several_x86_objects()
    root = Path(__file__).resolve().parent.parent
    objects = [path for path in root.glob("build/**/*.o") if re.search(r"kernels_v\d", str(path))]
    if not objects:
        pytest.skip("no object files of the kernels under build/")
    for path in objects:
        # DW.ref: a pointer to the exception personality; data, the same in all.
        shared = [name for kind, name in defined_symbols(path) if kind in "WVuTDBRC" and not name.startswith("DW.ref.")]
        assert shared, path
        outside = [name for name in shared if not NAMESPACES.search(name)]
        assert not outside, f"{path.name} defines what other objects may use"


@pytest.mark.skipif(platform.machine() != "aarch64", reason="about aarch64")
def test_aarch64_computes_with_its_own_instructions() -> None:
    """fma is one instruction and no call; float16 is converted by the processor, both halves of a register."""
    code = "\n".join(block for name, block in functions(unstripped()).items() if NAMESPACES.search(name))
    used = set(re.findall(r"\t((?:fmla|fcvtl2?|fcvtn2?)\tv\d+\.\d[sdh])", re.sub(r"\tv\d+\.", r"\tv0.", code)))
    assert used >= {"fmla\tv0.4s", "fmla\tv0.2d", "fcvtl\tv0.4s", "fcvtl2\tv0.4s", "fcvtn\tv0.4h", "fcvtn2\tv0.8h"}
    calls = set(re.findall(r"\tbl\t[0-9a-f]+ <(\w+)@plt>", code))
    assert "memcpy" in calls  # the control: calls are seen
    assert not calls & {"fma", "fmaf"}


def test_the_extension_exports_its_entry_only() -> None:
    """Hidden visibility: nothing of ours can be taken for another library's, or the other way round."""
    exported = output(tool("nm"), "--dynamic", "--defined-only", "--format=posix", str(EXTENSION)).splitlines()
    names = [line.split()[0] for line in exported]
    assert "PyInit__C" in names
    assert [name for name in names if "fusednorm" in name] == []


def test_no_second_openmp_runtime() -> None:
    """libgomp is the one PyTorch's wheels bring as well; two runtimes fight over the cores."""
    needed = re.findall(r"NEEDED\s+(\S+)", output(tool("objdump"), "-p", str(EXTENSION)))
    runtimes = [name for name in needed if re.search(r"gomp|iomp|libomp", name)]
    assert len(runtimes) <= 1
    if fn.build_info()["compiler"].startswith("GNU"):  # a renamed copy, as auditwheel makes it, is no longer the same
        assert set(runtimes) <= {"libgomp.so.1"}


@pytest.mark.skipif(not fn.build_info()["cuda"].startswith("built"), reason=f"CUDA is {fn.build_info()['cuda']}")
def test_importing_does_not_initialize_cuda(tmp_path: Path) -> None:
    """The CUDA runtime loads the driver when it is first asked something. Here the driver leaves a trace."""
    (tmp_path / "driver.cpp").write_text(
        "#include <cstdio>\n#include <cstdlib>\n"
        '__attribute__((constructor)) void loaded() { std::fclose(std::fopen(std::getenv("TRACE"), "w")); }\n'
    )
    output(tool("g++"), "-shared", "-fPIC", str(tmp_path / "driver.cpp"), "-o", str(tmp_path / "libcuda.so.1"))
    trace = tmp_path / "trace"
    environment = {"LD_LIBRARY_PATH": str(tmp_path), "TRACE": str(trace)}
    run_python("import fusednorm, fusednorm.cli; fusednorm.build_info()", **environment).check_returncode()
    assert not trace.exists()
    run_python("from fusednorm import _C; _C.cuda_devices()", **environment).check_returncode()
    assert trace.exists()
