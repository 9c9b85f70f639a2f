"""The door of the native library: what it says where there is none, threads, and the build hook."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch

from shared_kernels import native
from shared_kernels.native import library, rows

PROJECT = Path(__file__).resolve().parents[1]
needs_library = pytest.mark.skipif(native.why_not() is not None, reason="no native library")


def at(monkeypatch, path: Path) -> str:
    monkeypatch.setattr(library, "LIBRARY", path)
    reason = native.why_not()
    assert reason is not None and "\n" not in reason
    with pytest.raises(RuntimeError, match="native library"):
        rows.normalize(torch.ones(2, 3), 0.5)
    return reason


def test_a_missing_library_says_how_to_get_one(monkeypatch, tmp_path):
    reason = at(monkeypatch, tmp_path / "absent.so")
    assert "python -m shared_kernels.native build" in reason


@pytest.mark.parametrize("content", [b"", b"\x7fELF\x02\x01\x01", b"not a library" * 100])
def test_a_broken_library_is_one_clear_line(monkeypatch, tmp_path, content):
    path = tmp_path / "broken.so"
    path.write_bytes(content)
    assert "cannot be loaded" in at(monkeypatch, path)


@needs_library
def test_a_truncated_library_and_one_of_another_processor_are_refused(monkeypatch, tmp_path):
    whole = library.LIBRARY.read_bytes()
    if whole[:4] != b"\x7fELF":
        pytest.skip("the header below is that of ELF")
    short, foreign = tmp_path / "short.so", tmp_path / "foreign.so"
    short.write_bytes(whole[:1000])
    foreign.write_bytes(whole[:18] + (243).to_bytes(2, "little") + whole[20:])  # RISC-V
    assert "cannot be loaded (its file is cut short)" in at(monkeypatch, short)
    assert "cannot be loaded (it is made for riscv64, this is" in at(monkeypatch, foreign)


@needs_library
def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", "avx9")
    assert "avx9" in native.why_not() and "avx512" in native.why_not()
    with pytest.raises(RuntimeError, match="SHARED_KERNELS_INSTRUCTIONS"):
        native.instruction_set()


@needs_library
def test_the_switch_and_the_widest_set_are_read_at_every_call(monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_NATIVE", "0")
    assert "SHARED_KERNELS_NATIVE=0" in native.why_not(torch.ones(3))
    monkeypatch.delenv("SHARED_KERNELS_NATIVE")
    assert native.why_not(torch.ones(3), None) is None
    missing = {"base", "avx2", "avx512"} - set(native.instruction_sets())
    for name in missing:
        monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", name)
        assert f"{name}: this processor has" in native.why_not()


@needs_library
@pytest.mark.parametrize("processor, runs", [("x86_64", False), ("AMD64", False), ("arm64", True)])
def test_x86_without_avx2_takes_pytorch(monkeypatch, processor, runs):
    class Old:
        @staticmethod
        def widest_set():
            return 0

    monkeypatch.setattr(library, "_load", lambda path: Old)
    monkeypatch.setattr(library.platform, "machine", lambda: processor)
    choose = library._chosen.__wrapped__
    assert (choose("", "") == (Old, 0)) is runs
    assert runs or "without AVX2" in choose("", "")
    assert choose("", "base") == (Old, 0)


@pytest.mark.parametrize(
    "why, x", [("meta", torch.empty(3, device="meta")), ("int", torch.ones(3).int())]
)
def test_why_not_names_what_is_not_taken(why, x):
    assert why in native.why_not(torch.ones(2), None, x)


@needs_library
def test_the_profiler_shows_the_function_by_name():
    with torch.profiler.profile() as seen:
        rows.normalize(torch.randn(3, 5), 0.5)
    assert "native::rows_forward" in {event.key for event in seen.key_averages()}


class _Rows(torch.utils.data.Dataset):
    """Rows that would be worth threads; an item says to how many they were dealt."""

    def __len__(self):
        return 2

    def __getitem__(self, i):
        started = []
        library.in_ranges(lambda start, stop: started.append((start, stop)), 64, 1.0)
        if native.why_not() is None:
            rows.normalize(torch.randn(64, 100_000), 0.5)
        return torch.tensor(len(started))


def test_a_worker_of_a_dataloader_starts_no_threads():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert _Rows()[0] == 2  # the threads of this process are no trouble for a forked one
        found = list(torch.utils.data.DataLoader(_Rows(), num_workers=2))
    finally:
        torch.set_num_threads(before)
    assert [n.item() for n in found] == [1, 1]


@pytest.mark.parametrize("error", [KeyError, IndexError])
@pytest.mark.parametrize("of_caller", [True, False])
def test_what_a_thread_raises_is_raised(of_caller, error):
    before, caller, both = torch.get_num_threads(), threading.get_ident(), threading.Barrier(2)

    def fail(start, stop):
        both.wait(60)  # each thread has a range
        if (threading.get_ident() == caller) == of_caller:
            raise error(start)

    try:
        torch.set_num_threads(2)
        with pytest.raises(error):
            library.in_ranges(fail, 2, 1.0)
    finally:
        torch.set_num_threads(before)


def test_a_thread_that_never_starts_is_not_waited_for():
    """Where all others are busy, the caller does the work alone."""
    before, free = torch.get_num_threads(), threading.Event()
    busy = [library._pool().submit(free.wait, 60) for _ in range(library._pool()._max_workers)]
    seen = []
    try:
        torch.set_num_threads(2)
        library.in_ranges(lambda start, stop: seen.append((start, stop)), 4, 1.0)
    finally:
        free.set()
        torch.set_num_threads(before)
    assert seen == [(0, 2), (2, 4)] and all(task.result() for task in busy)


@pytest.mark.system
def test_a_process_that_ends_still_works():
    """Python starts no thread any more when it calls what ``atexit`` was given."""
    lines = (
        "import atexit, torch",
        "from shared_kernels.native import library",
        "seen = torch.zeros(9)",
        "def work(start, stop): seen[start:stop] += 1",
        "def end(): library.in_ranges(work, 9, 1.0); print(seen.tolist())",
        "torch.set_num_threads(2)",
        "atexit.register(end)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.stdout.strip() == str([1.0] * 9), found.stderr


@pytest.mark.parametrize("n, threads", [(0, 1), (1, 4), (7, 3), (100, 2)])
def test_ranges_cover_all_items_once(n, threads):
    seen = torch.zeros(n)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        library.in_ranges(lambda start, stop: seen[start:stop].add_(1), n, 1.0)
    finally:
        torch.set_num_threads(before)
    assert (seen == 1).all()


def wheel(tmp_path: Path, **environment: str) -> tuple[Path, str]:
    pytest.importorskip("hatchling")
    tree = tmp_path / "tree"
    parts = ("src", "native", "hatch_build.py", "pyproject.toml", "README.md", "LICENSE")
    tree.mkdir()
    for name in parts:
        source = PROJECT / name
        if not source.exists():
            pytest.skip(f"{name} is not beside these tests")
        if source.is_dir():
            skip = shutil.ignore_patterns("*.so", "*.dylib", "*.dll", "__pycache__")
            shutil.copytree(source, tree / name, ignore=skip)
        else:
            shutil.copy(source, tree / name)
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=tree,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    (built,) = tmp_path.glob("*.whl")
    return built, done.stdout + done.stderr


def holds_library(built: Path) -> bool:
    names = zipfile.ZipFile(built).namelist()
    return f"shared_kernels/native/{library.LIBRARY.name}" in names


@pytest.mark.parametrize(
    "environment, why",
    [
        ({"SHARED_KERNELS_NATIVE": "0"}, "switched off"),
        ({"CXX": "no-such-compiler"}, "CXX names 'no-such-compiler', which is not found"),
        ({"CXX": "false"}, "false failed"),
    ],
)
def test_a_wheel_without_the_library_is_pure_and_says_so(tmp_path, environment, why):
    built, told = wheel(tmp_path, **{"SHARED_KERNELS_NATIVE": "", **environment})
    assert built.name.endswith("-py3-none-any.whl") and not holds_library(built)
    lines = [line for line in told.splitlines() if "native library" in line]
    assert len(lines) == 1 and why in lines[0]


def test_a_library_that_is_asked_for_and_cannot_be_built_is_an_error(tmp_path):
    with pytest.raises(AssertionError, match="no-such-compiler"):
        wheel(tmp_path, SHARED_KERNELS_NATIVE="1", CXX="no-such-compiler")


def test_a_wheel_with_the_library_is_of_its_platform(tmp_path):
    # a stand-in for the compiler: what is tested is the hook
    fake = tmp_path / "cxx"
    log = tmp_path / "log"
    fake.write_text(
        f'#!/bin/sh\nprintf "<%s>" "$@" "" >> {log}\n'
        'while [ "$1" != -o ]; do shift; done\necho library > "$2"\n'
    )
    fake.chmod(0o755)
    if os.name != "posix":
        pytest.skip("the stand-in is a shell script")
    flags = {"SHARED_KERNELS_CXXFLAGS": "-O0 '-DNAME=two words'"}
    built, _ = wheel(tmp_path, SHARED_KERNELS_NATIVE="", CXX=str(fake), **flags)
    assert "-py3-none-" in built.name and not built.name.endswith("any.whl")
    assert holds_library(built)
    calls = log.read_text().split("<>")[:-1]
    assert all("<-O0><-DNAME=two words>" in call for call in calls)
    assert all(call.find("<-O3>") < call.find("<-O0>") for call in calls)
