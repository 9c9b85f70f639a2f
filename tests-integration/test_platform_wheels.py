"""The wheels that one machine makes for all platforms: what their libraries' headers say."""

import importlib.util
import platform
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def wheels(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / ".ci"))
    import platform_wheels

    yield platform_wheels
    sys.modules.pop("platform_wheels")


def elf(machine: int, text: bytes = b"") -> bytes:
    return b"\x7fELF" + bytes(14) + struct.pack("<H", machine) + bytes(44) + text


def macho(machine: int) -> bytes:
    return b"\xcf\xfa\xed\xfe" + struct.pack("<I", machine) + bytes(24)


def pe(machine: int) -> bytes:
    return b"MZ" + bytes(58) + struct.pack("<I", 64) + b"PE\0\0" + struct.pack("<H", machine)


LIBRARIES = {
    "manylinux_2_17_x86_64": elf(62, b"GLIBC_2.14"),
    "manylinux_2_17_aarch64": elf(183, b"GLIBC_2.17"),
    "macosx_11_0_x86_64": macho(0x01000007),
    "macosx_11_0_arm64": macho(0x0100000C),
    "win_amd64": pe(0x8664),
}


def test_each_platform_of_the_build_has_a_header_that_is_known(wheels):
    assert set(LIBRARIES) == set(wheels.PLATFORMS)


@pytest.mark.parametrize("tag", LIBRARIES)
def test_a_library_belongs_into_its_own_wheel_alone(wheels, tag):
    for other, library in LIBRARIES.items():
        assert bool(wheels.faults(library, tag)) == (other != tag)


@pytest.mark.parametrize(
    ("text", "word"), [(b"GLIBC_2.28", "2.28"), (b"libstdc++.so.6", "libstdc++")]
)
def test_what_old_machines_lack_is_found(wheels, text, word):
    (fault,) = wheels.faults(elf(62, text), "manylinux_2_17_x86_64")
    assert word in fault
    assert wheels.faults(b"text", "win_amd64")


@pytest.mark.parametrize(
    ("tag", "names", "fits"),
    [
        ("win_amd64", ["a.dll"], True),
        ("win_amd64", ["a.dll", "a.so"], False),  # this machine's own beside it
        ("win_amd64", [], False),
        ("any", [], True),
        ("any", ["a.so"], False),
    ],
)
def test_a_wheel_holds_the_library_of_its_platform_alone(wheels, tmp_path, tag, names, fits):
    wheel = tmp_path / f"shared_kernels-0.1.0-py3-none-{tag}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name in ("shared_kernels/__init__.py", *names):
            archive.writestr(name, LIBRARIES["win_amd64"])
    assert (wheels.wheel_faults(wheel) == []) == fits


RUN = """
import sys, torch
from shared_kernels import native
from shared_kernels.native import rows
assert native.library.LIBRARY.is_relative_to(sys.argv[1]) and native.why_not() is None
print(rows.normalize(torch.tensor([2.0, 1.0, -1.0]), 1.0).tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ziglang") is None, reason="needs ziglang")
@pytest.mark.skipif(platform.system() != "Linux", reason="loads a library for Linux")
def test_the_wheel_of_this_machine_loads_in_a_fresh_process(wheels, tmp_path):
    wheel = wheels.build(tmp_path, SHARED_KERNELS_PLATFORM=f"manylinux_2_17_{platform.machine()}")
    assert wheels.wheel_faults(wheel) == []
    unpacked = tmp_path / "unpacked"
    subprocess.run([sys.executable, "-m", "zipfile", "-e", wheel, unpacked], check=True)
    environment = {"PYTHONPATH": str(unpacked), "PATH": "/usr/bin"}
    command = [sys.executable, "-c", RUN, str(unpacked)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout == "[1.0, 0.0, 0.0]\n", done.stderr
