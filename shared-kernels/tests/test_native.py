"""The door of the native library: what it says where there is none, threads, and the build hook."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
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
    assert "cannot be loaded" in at(monkeypatch, short)
    assert "cannot be loaded" in at(monkeypatch, foreign)


@needs_library
def test_an_unknown_instruction_set_is_named(monkeypatch):
    monkeypatch.setenv("SHARED_KERNELS_INSTRUCTIONS", "avx9")
    assert "avx9" in native.why_not() and "avx512" in native.why_not()
    with pytest.raises(RuntimeError, match="SHARED_KERNELS_INSTRUCTIONS"):
        native.instruction_set()


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


@pytest.mark.parametrize("wish", ["0", ""])
def test_a_wheel_is_pure_unless_the_library_is_asked_for(tmp_path, wish):
    built, _ = wheel(tmp_path, SHARED_KERNELS_NATIVE=wish)
    assert built.name.endswith("-py3-none-any.whl")
    assert not any(
        name.endswith((".so", ".dll", ".dylib")) for name in zipfile.ZipFile(built).namelist()
    )


def test_a_wheel_with_the_library_is_of_its_platform(tmp_path):
    if not any(shutil.which(name) for name in ("c++", "g++", "clang++")):
        pytest.skip("no compiler")
    # a stand-in for the compiler: what is tested is the hook
    fake = tmp_path / "cxx"
    fake.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\necho library > "$2"\n')
    fake.chmod(0o755)
    built, _ = wheel(tmp_path, SHARED_KERNELS_NATIVE="1", CXX=str(fake))
    assert "-py3-none-" in built.name and not built.name.endswith("any.whl")
    assert f"shared_kernels/native/{library.LIBRARY.name}" in zipfile.ZipFile(built).namelist()
