"""The commands of CONTRIBUTING.md, one session each: `nox -s tests`. `.ci/run` runs the same sessions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from itertools import product
from pathlib import Path

import nox

nox.needs_version = ">=2024.4.15"
nox.options.default_venv_backend = "venv"
nox.options.sessions = ["tests", "lint", "types"]

LINUX = platform.system() == "Linux"
X86 = platform.machine() in ("x86_64", "AMD64")
LEAST = "v2" if X86 else "baseline"  # instruction set
GATED = (75, 80, 90, 100, 120)  # CUDA architectures: the first and each that changed how kernels compile since
PROJECT = nox.project.load_toml("pyproject.toml")
LINT = nox.project.dependency_groups(PROJECT, "lint")
DOCS = nox.project.dependency_groups(PROJECT, "docs")
WHEEL = nox.project.dependency_groups(PROJECT, "wheel")


def install(session: nox.Session, what: str, *options: str, **environment: str) -> None:
    """Build and install, in a build folder of the session's own: build/ belongs to `pip install`. Without CUDA, unless
    the session is about it."""
    environment = {"FUSEDNORM_CUDA": "OFF"} | environment
    session.install(what, "-C", f"build-dir={session.create_tmp()}/build", *options, env=environment)


@nox.session
def tests(session: nox.Session) -> None:
    """The test suite, warnings as errors; arguments go to pytest, such as --slow for the cases that take minutes."""
    install(session, ".[test]", FUSEDNORM_CUDA="AUTO", FUSEDNORM_WERROR="ON")
    session.run("pytest", *session.posargs)


@nox.session(name="torch")
def with_torch(session: nox.Session) -> None:
    """With PyTorch: fusednorm.torch, several processes under gloo, examples, study and the documentation's blocks;
    arguments go to pytest, such as --slow for what compiles kernels besides."""
    install(session, ".[test,study,torch]")
    files = ("test_torch", "test_torch_population", "test_distributed", "test_examples", "test_study", "test_docs")
    session.run("pytest", *(f"tests/{name}.py" for name in files), *session.posargs)


@nox.session(name="jax")
def with_jax(session: nox.Session) -> None:
    """fusednorm.jax and the documentation's blocks, with JAX: called back by XLA, then called by it without Python.
    Arguments go to pytest, such as --slow for the whole list of cases."""
    install(session, ".[test,jax]")
    session.run("pytest", "tests/test_jax.py", "tests/test_docs.py", *session.posargs)
    session.install("cmake", "ninja", *PROJECT["build-system"]["requires"])
    session.install("--no-build-isolation", "--no-deps", ".", "-C", f"build-dir={session.create_tmp()}/xla",
                    env={"FUSEDNORM_CUDA": "OFF", "FUSEDNORM_XLA": "ON", "FUSEDNORM_WERROR": "ON"})  # fmt: skip
    session.run("pytest", "tests/test_jax.py", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation as a site, warnings as errors, in build/site; -- serve shows it while it is written."""
    # The figures are computed by the library, whose time is of no interest here: it is compiled in a sixth of the time.
    install(session, ".", "-C", "cmake.define.CMAKE_CXX_FLAGS_RELEASE=-O0")
    session.install(*DOCS)
    session.run("mkdocs", *(session.posargs or ["build"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """ruff, clang-format and actionlint; with -- --fix the first two change the files."""
    session.install(*LINT)
    fix = "--fix" in session.posargs
    session.run("ruff", "check", *(["--fix"] if fix else []))
    session.run("ruff", "format", *([] if fix else ["--check"]))
    sources = [str(path) for top in ("csrc", "tests") for path in Path(top).rglob("*") if path.suffix in (".h", ".cpp")]
    session.run("clang-format", *(["-i"] if fix else ["--dry-run", "-Werror"]), *sorted(sources))
    if LINUX:
        # The same verdict whether these two are installed or not.
        session.run("actionlint", "-shellcheck=", "-pyflakes=")
    else:
        session.log("actionlint has no wheels for this system: the workflows are not checked")


@nox.session
def types(session: nox.Session) -> None:
    """mypy --strict on the package and the examples."""
    session.install(*LINT, "numpy", "ml_dtypes", "rich", "matplotlib", "threadpoolctl")
    session.run("mypy")


@nox.session
def wheel(session: nox.Session) -> None:
    """The source distribution, and from it a wheel as a release has it: repaired for other machines, it works where
    there is no compiler, and has the types that the stubs say. Of cibuildwheel, which needs Docker, that it takes its
    configuration."""
    dist = Path(session.create_tmp()).resolve() / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.install("numpy", "rich", *WHEEL, *LINT)
    session.run("cibuildwheel", "--platform", "linux", "--print-build-identifiers")
    released = PROJECT["tool"]["cibuildwheel"]["environment"] | ({} if LINUX else {"FUSEDNORM_BUNDLE_OPENMP": "OFF"})
    session.run("python", "-m", "build", "--outdir", str(dist), env=released)
    (built,) = dist.glob("*.whl")
    if LINUX:
        session.run("auditwheel", "repair", "--wheel-dir", str(dist / "repaired"), str(built))
        (built,) = (dist / "repaired").glob("*.whl")
    else:
        session.log("auditwheel is for Linux: the wheel is checked as it was built")
    session.log(f"{built.name}: {built.stat().st_size / 1e6:.1f} MB")
    alone = dist / "venv"
    session.run("python", "-m", "venv", str(alone))
    session.chdir(dist)  # away from the sources
    nothing = {"PATH": str(alone / "bin")}
    session.run(f"{alone}/bin/pip", "install", "--quiet", "--only-binary=:all:", str(built), env=nothing, external=True)
    session.run(f"{alone}/bin/python", "-c", WITHOUT_COMPILER, env=nothing, external=True)
    session.run(f"{alone}/bin/fusednorm", "info", env=nothing, external=True)
    session.run(f"{alone}/bin/fusednorm", "selftest", env=nothing, external=True)

    session.install("--no-deps", "--force-reinstall", str(built))
    # pybind11's metaclass, and the buffer protocol, which Python sees from 3.12 on only, are in no stub.
    (dist / "allowed.txt").write_text("fusednorm._C.Fold\nfusednorm._C.PoolMemory(.__buffer__)?\n")
    session.run("python", "-m", "mypy.stubtest", "--allowlist", "allowed.txt", "fusednorm._C")


# There is none to be found, and the OpenMP runtime is the wheel's own, not one that came with the compiler.
WITHOUT_COMPILER = """
import pathlib, shutil, sys
found = [name for name in ("cc", "gcc", "g++", "c++", "clang", "clang++") if shutil.which(name)]
assert not found, found
import fusednorm
maps = pathlib.Path("/proc/self/maps")
if maps.exists():
    runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "libgomp" in line}
    assert runtimes == {str(pathlib.Path(fusednorm.__file__).with_name("libgomp.so.1"))}, runtimes
"""


@nox.session
def clang(session: nox.Session) -> None:
    """Built by clang, warnings as errors, and checked against the reference on every instruction set."""
    compiler = os.environ.get("CLANGXX") or next(
        filter(shutil.which, ["clang++", *(f"clang++-{version}" for version in range(25, 13, -1))]), None
    )
    if not compiler:
        session.skip("no clang++ found; CLANGXX names one")
    install(session, ".[test]", CXX=compiler, FUSEDNORM_KERNELS="all", FUSEDNORM_WERROR="ON")
    session.run("fusednorm", "info")
    session.run("pytest", "tests/test_cases.py", "tests/test_verbs.py")


@nox.session
def aarch64(session: nox.Session) -> None:
    """aarch64's kernels, cross-compiled with warnings as errors, and the cases under qemu; arguments go to pytest."""
    for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "apt-get", "dpkg"):
        if not shutil.which(tool):
            session.skip(f"no {tool} found; Debian and Ubuntu: apt install g++-aarch64-linux-gnu qemu-user")
    folder = Path(session.create_tmp()).resolve()
    python, headers = aarch64_python(session, folder)
    site, build = folder / "site", str(folder / "build")
    shutil.rmtree(site, ignore_errors=True)
    version = headers.name.removeprefix("python")
    wheels = [f"--platform=manylinux{kind}_aarch64" for kind in ("2014", "_2_28")]
    session.install("--target", str(site), "--only-binary=:all:", f"--python-version={version}", *wheels,
                    "numpy", "ml_dtypes", "pytest")  # fmt: skip

    session.install("cmake", "ninja", "pybind11")
    pybind11 = str(session.run("python", "-m", "pybind11", "--cmakedir", silent=True, log=False)).strip()
    session.run("cmake", "-S", ".", "-B", build, "-G", "Ninja", "-DCMAKE_SYSTEM_NAME=Linux",
                "-DCMAKE_SYSTEM_PROCESSOR=aarch64", "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
                f"-DCMAKE_CXX_FLAGS=-idirafter {headers.parent}", f"-DPython_EXECUTABLE={python}",
                f"-DPython_INCLUDE_DIR={headers}", f"-Dpybind11_DIR={pybind11}",
                f"-DSKBUILD_PROJECT_VERSION={PROJECT['project']['version']}", "-DFUSEDNORM_CUDA=OFF",
                "-DFUSEDNORM_WERROR=ON")  # fmt: skip
    session.run("cmake", "--build", build)
    session.run("cmake", "--install", build, "--prefix", str(site))
    shutil.copytree("python/fusednorm", site / "fusednorm", dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.so"))

    environment = {"PYTHONPATH": str(site), "OMP_WAIT_POLICY": "passive"}
    session.run(python, "-m", "fusednorm", "info", external=True, env=environment)
    tests = [*(f"tests/test_{name}.py" for name in ("cases", "verbs", "symbols")),
             "tests/test_functional.py::test_half_types_round_to_nearest_even",
             "tests/test_functional.py::test_every_number_of_a_half_type"]  # fmt: skip
    session.run(python, "-m", "pytest", "-q", *tests, *session.posargs, external=True, env=environment)


def aarch64_python(session: nox.Session, folder: Path) -> tuple[str, Path]:
    """Debian's Python for aarch64 in the folder, as a command that qemu runs, and where its headers are. apt is given
    lists and a state of its own, in which nothing is installed: the system's stay as they are, and root is not
    needed."""
    system, apt = folder / "system", folder / "apt"
    if not system.exists():
        shutil.rmtree(apt, ignore_errors=True)
        for part in ("state/lists/partial", "cache/archives/partial"):
            (apt / part).mkdir(parents=True)
        (apt / "status").touch()
        options = [f"-oDir::State={apt}/state", f"-oDir::State::status={apt}/status", f"-oDir::Cache={apt}/cache",
                   "-oAPT::Architecture=arm64", "-oAPT::Architectures=arm64", "-oAPT::Sandbox::User="]  # fmt: skip
        packages = ["python3-minimal", "libpython3-dev", "libstdc++6", "libgomp1"]
        for command in (["update"], ["install", "--yes", "--no-install-recommends", "--download-only", *packages]):
            done = subprocess.run(["apt-get", *options, *command], capture_output=True, text=True, check=False)
            if done.returncode:
                session.skip(f"apt-get {command[0]} for arm64: {done.stderr.strip()}")
        unpacked = folder / "unpacked"
        shutil.rmtree(unpacked, ignore_errors=True)
        for package in sorted(apt.glob("cache/archives/*.deb")):
            subprocess.run(["dpkg", "-x", package, unpacked], check=True)
        if not (unpacked / "lib").exists():  # since Debian 13 packages leave it to a link, which comes with no package
            (unpacked / "lib").symlink_to("usr/lib")
        unpacked.rename(system)
    headers = next(system.glob("usr/include/python3.*"))
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nexec qemu-aarch64 -L {system} {system}/usr/bin/{headers.name} "$@"\n')
    python.chmod(0o755)
    return str(python), headers


@nox.session
def cuda(session: nox.Session) -> None:
    """CUDA's kernels without a GPU: what nvcc makes of them, where there is one, passes the gates, whose bounds --
    --update sets anew; then emulated, through the same cases as the CPU's."""
    update = [one for one in session.posargs if one == "--update"]
    site = str(Path(session.create_tmp()).resolve() / "site")
    if shutil.which("nvcc"):
        build = f"{session.create_tmp()}/gates"
        session.install("cmake", "ninja", "pybind11")
        if not (shutil.which("cuobjdump") and shutil.which("nvdisasm")):
            session.install("--no-deps", "nvidia-cuda-cuobjdump", "nvidia-cuda-nvdisasm")
        pybind11 = str(session.run("python", "-m", "pybind11", "--cmakedir", silent=True, log=False)).strip()
        session.run("cmake", "-S", ".", "-B", build, "-G", "Ninja", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
                    f"-DPython_ROOT_DIR={session.virtualenv.location}", f"-Dpybind11_DIR={pybind11}",
                    "-DFUSEDNORM_CUDA=ON", "-DFUSEDNORM_WERROR=ON", f"-DFUSEDNORM_KERNELS={LEAST}",
                    f"-DSKBUILD_PROJECT_VERSION={PROJECT['project']['version']}",
                    f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(f'{one}-real' for one in GATED)}")  # fmt: skip
        session.run("cmake", "--build", build)
        session.run("python", "tests/cuda_gates/gates.py", build, *update)
        session.run("cmake", "--install", build, "--prefix", site)
        shutil.copytree("python/fusednorm", f"{site}/fusednorm", dirs_exist_ok=True)
    else:
        session.log("no nvcc found: its part is skipped")
    install(session, ".[test]", FUSEDNORM_CUDA="EMULATED")
    if shutil.which("nvcc"):  # the extension with CUDA, which nothing here can run
        session.run("python", "-m", "fusednorm", "info", env={"PYTHONPATH": site})
        session.run("pytest", "-q", "tests/test_symbols.py", env={"PYTHONPATH": site})
    others = [one for one in session.posargs if one not in update]
    session.run("pytest", "-q", "tests/test_cuda.py", "tests/test_cuda_cli.py", *others)
    session.run("pytest", "-q", "-k", "gpu", "tests/test_docs.py", env={"PYTHONPATH": "tests/cuda_emulator"})
    session.run("pytest", "-q", "--slow", "tests/test_cuda_sanitizers.py")


@nox.session
def asan(session: nox.Session) -> None:
    """Memory errors and undefined behaviour (gcc): the verbs from C++, then the extension within Python."""
    # What is left out is checked in the extension; here it would take longer to compile, as checks in line would.
    flags = ["-fsanitize=address,undefined", "-fno-sanitize=null,object-size", "-fno-sanitize-recover=all",
             "--param=asan-instrumentation-with-call-threshold=0"]  # fmt: skip
    options = {"ASAN_OPTIONS": "detect_leaks=0"}
    verbs = build_verbs(session, flags, [], link=["-fopenmp"])
    session.run(verbs, external=True, env=options)
    for plant, message in {
        "overread": "heap-buffer-overflow",
        "overwrite": "heap-buffer-overflow",
        "misaligned": "misaligned address",
    }.items():
        must_fail(session, verbs, plant, message=message, environment=options)

    # The widest this machine has; v2's are in the program above, and v3 reaches memory as these do.
    kernels = ("v4" if "avx512bw" in Path("/proc/cpuinfo").read_text() else "v3") if X86 else ""
    install(session, ".[test]", CXX=gxx(session), FUSEDNORM_SANITIZE="address,undefined", FUSEDNORM_KERNELS=kernels)
    # The interpreter is not instrumented, so the runtime comes first; with libstdc++, whose exceptions it wraps.
    runtimes = [session.run(gxx(session), f"-print-file-name={name}", external=True, silent=True, log=False).strip()
                for name in ("libasan.so", "libstdc++.so")]  # fmt: skip
    options["LD_PRELOAD"] = " ".join(runtimes)
    runnable = session.run(
        "python", "-c", "import fusednorm as fn; print(*fn.build_info()['isa_runnable'])", env=options, silent=True
    )
    for isa in runnable.split():
        overread = ("python", "tests/sanitizers/overread.py", isa)
        must_fail(session, *overread, message="heap-buffer-overflow", environment=options)
    # Not captured: the report is written by a process about to end.
    session.run("pytest", "--capture=no", "-q", "-m", "sanitize", *session.posargs, env=options)


@nox.session
def race(session: nox.Session) -> None:
    """Data races (gcc): the verbs from C++, on threads that ThreadSanitizer understands."""
    options = {"TSAN_OPTIONS": "halt_on_error=1"}
    flags = ["-fsanitize=thread", "-DFN_RACE"]
    verbs = build_verbs(session, flags, ["threads"], link=["-pthread"])
    # Older runtimes do not start where the kernel scatters addresses widely; containers may forbid to change that.
    fixed = ["setarch", platform.machine(), "-R"]
    may = shutil.which("setarch") and subprocess.run([*fixed, "true"], capture_output=True, check=False).returncode == 0
    command = [*(fixed if may else []), verbs]
    session.run(*command, external=True, env=options)
    for plant in ("overlap", "barrier"):
        must_fail(session, *command, plant, message="ThreadSanitizer: data race", environment=options)


def gxx(session: nox.Session) -> str:
    """gcc: the sanitizer sessions name its runtimes and its OpenMP entry points."""
    compiler = os.environ.get("GXX", "g++")
    if not shutil.which(compiler):
        session.error(f"{compiler} not found; GXX names another gcc")
    return compiler


def build_verbs(session: nox.Session, flags: list[str], more: list[str], link: list[str]) -> str:
    """tests/sanitizers/cpu.cpp and the kernels of the least instruction set, as a program; its path."""
    build = Path(session.create_tmp())
    isa = [*(["-march=x86-64-v2"] if X86 else []), f"-DFUSEDNORM_ISA={LEAST}"]
    warnings = ["-Wall", "-Wextra", "-Werror", "-Wno-psabi", "-Wno-maybe-uninitialized"]
    flags = ["-std=c++20", "-O1", "-g1", "-ffp-contract=off", "-Icsrc", *isa, *warnings, *flags]
    objects = []
    sources = [*(f"tests/sanitizers/{name}.cpp" for name in ("kernels", "verbs", "cpu", *more)),
               "csrc/cpu/host.cpp", "csrc/cpu/pool.cpp"]  # fmt: skip
    for source, *element in [*zip(sources), *product(sources[:1], ("f32", "f64", "f16", "bf16"))]:
        objects.append(str(build / f"{Path(source).stem}{''.join(element)}.o"))
        definition = [f"-DFUSEDNORM_DTYPE={dtype}" for dtype in element]
        session.run(gxx(session), *flags, *definition, "-fopenmp", "-c", source, "-o", objects[-1], external=True)
    program = str(build / "verbs")
    session.run(gxx(session), *flags, *objects, *link, "-o", program, external=True)
    return program


def must_fail(session: nox.Session, *command: str, message: str, environment: dict[str, str]) -> None:
    """Positive control: the planted error is reported, so the silence before it meant something."""
    output = session.run(
        *command, external=True, env=environment, silent=True, log=False, success_codes=range(-64, 256)
    )
    if message not in str(output):
        session.error(f"the planted error went unnoticed: {' '.join(command)}\n{output}")
    session.log(f"caught, as it must be: {' '.join(command[-2:])}")
