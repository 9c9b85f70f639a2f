"""Compile the native library with the compiler of this machine. Nothing but Python is needed here.

`hatch_build.py` calls it when a wheel or an editable install is made, `python -m
shared_kernels.native build` in a checkout. One shared library comes out: every source is compiled
once per instruction set, and the library chooses between them when it runs.

For the platforms in PLATFORMS any machine compiles, with the package `ziglang` (a clang that brings
the headers and libraries of all of them): the wheels of a release come from one runner.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUBJECTS = (
    *("rows", "attention", "attention_double", "lazy", "lazy_double"),
    *("pages", "pairs", "band", "band_double", "neighbours", "association"),
)
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-exceptions", "-fno-rtti", "-Wno-psabi"),
)
AVX2 = ("-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mpopcnt")
AVX512 = ("-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mprefer-vector-width=512")
# tests alone choose plain x86-64, so it need not be fast
X86_SETS = {"base": ("-O1",), "avx2": AVX2, "avx512": (*AVX2, *AVX512)}
# the tag of a wheel: Zig's name of the platform, and the library's suffix
PLATFORMS = {
    "manylinux_2_17_x86_64": ("x86_64-linux-gnu.2.17", ".so"),
    "manylinux_2_17_aarch64": ("aarch64-linux-gnu.2.17", ".so"),
    "macosx_11_0_x86_64": ("x86_64-macos.11.0-none", ".dylib"),
    "macosx_11_0_arm64": ("aarch64-macos.11.0-none", ".dylib"),
    "win_amd64": ("x86_64-windows-gnu", ".dll"),
}
SUFFIX = {"win32": ".dll", "darwin": ".dylib"}.get(sys.platform, ".so")
NAME = "libshared_kernels" + SUFFIX


class BuildError(Exception):
    """Why there is no library, in one line."""


def compiler() -> list[str]:
    """The C++ compiler that CXX names, or the first that is found."""
    wanted = os.environ.get("CXX")
    if wanted:
        if shutil.which(wanted.split()[0]) is None:
            raise BuildError(f"CXX names {wanted!r}, which is not found")
        return wanted.split()
    names = ("clang-cl", "clang++") if sys.platform == "win32" else ("c++", "g++", "clang++")
    for name in names:
        if shutil.which(name):
            return [name]
    raise BuildError(f"no C++ compiler is found (looked for CXX, {', '.join(names)})")


def cross_compiler(target: str) -> list[str]:
    if importlib.util.find_spec("ziglang") is None:
        raise BuildError(f"{target} needs the package ziglang (pip install ziglang)")
    return [sys.executable, "-m", "ziglang", "c++", "-target", target]


def run(command: list[str]) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        shown = [line for line in done.stdout.splitlines() if "error" in line] or [done.stdout]
        raise BuildError(f"{command[0]} failed: {shown[0].strip()}")


def is_current(library: Path) -> bool:
    """Whether the library is newer than everything that it is made of."""
    made_of = [path for path in HERE.iterdir() if path.suffix in (".cpp", ".h", ".py")]
    newest = max(path.stat().st_mtime for path in made_of)
    return library.exists() and library.stat().st_mtime > newest


def build(folder: Path, extra: tuple[str, ...] = (), wheel: str | None = None) -> Path:
    """Compile into `folder`; the library's path.

    Args:
        extra: further flags, such as a sanitizer's; those of the environment variable
            SHARED_KERNELS_CXXFLAGS follow.
        wheel: the platform, by its tag in PLATFORMS; this machine's own if it is None.

    Raises:
        BuildError: there is no compiler, or it failed.
    """
    if wheel is None:
        cxx, suffix, machine = compiler(), SUFFIX, platform.machine().lower()
        static = [] if sys.platform == "darwin" else ["-static-libgcc", "-static-libstdc++"]
        static.append("-lm")
    else:
        target, suffix = PLATFORMS[wheel]
        cxx, machine, static = cross_compiler(target), target.partition("-")[0], ["-s"]
    extra = (*extra, *shlex.split(os.environ.get("SHARED_KERNELS_CXXFLAGS", "")))
    library = folder / f"libshared_kernels{suffix}"
    is_x86 = machine in ("x86_64", "amd64")
    sets = X86_SETS if is_x86 else {"base": ()}
    with tempfile.TemporaryDirectory() as scratch:
        jobs = {
            Path(scratch, f"{subject}.{name}.o"): (subject, flags)
            for name, flags in sets.items()
            for subject in SUBJECTS
        }
        jobs[Path(scratch, "library.o")] = ("library", ())

        def compile_one(job: tuple[Path, tuple[str, tuple[str, ...]]]) -> None:
            to, (subject, flags) = job
            source = str(HERE / f"{subject}.cpp")
            run([*cxx, *FLAGS, *flags, *extra, "-c", source, "-o", str(to)])

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            list(pool.map(compile_one, jobs.items()))
        # linked aside and then moved: a process that has the old file mapped keeps it
        made = Path(scratch, library.name)
        run([*cxx, "-shared", *extra, "-o", str(made), *map(str, jobs), *static])
        folder.mkdir(parents=True, exist_ok=True)
        aside = library.with_name(f".{library.name}.{os.getpid()}")
        shutil.copyfile(made, aside)
        os.replace(aside, library)
    return library
