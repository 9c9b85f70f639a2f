"""The wheels of shared-kernels for every platform, made on one machine.

    python .ci/platform_wheels.py DIST

The package ziglang compiles the native library for each platform in native/build.py; a pure wheel
serves all others. A wheel tagged for this machine alone, which no index takes, is removed. Every
library's header is read: its format, its processor, and on Linux the glibc that it asks for.
"""

from __future__ import annotations

import os
import re
import runpy
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "shared-kernels"
PLATFORMS = runpy.run_path(str(PROJECT / "native" / "build.py"))["PLATFORMS"]
# what the formats call the processors
ELF = {62: "x86_64", 183: "aarch64"}
MACH_O = {0x01000007: "x86_64", 0x0100000C: "arm64"}
PE = {0x8664: "amd64", 0xAA64: "arm64"}


def header(library: bytes) -> str:
    """The platform a shared library is made for: "elf x86_64", "macho arm64", "pe amd64"."""
    if library[:4] == b"\x7fELF":
        (machine,) = struct.unpack_from("<H", library, 18)
        return f"elf {ELF.get(machine, machine)}"
    if library[:4] == b"\xcf\xfa\xed\xfe":
        (machine,) = struct.unpack_from("<I", library, 4)
        return f"macho {MACH_O.get(machine, machine)}"
    if library[:2] == b"MZ":
        (at,) = struct.unpack_from("<I", library, 0x3C)
        signature, machine = struct.unpack_from("<4sH", library, at)
        if signature == b"PE\0\0":
            return f"pe {PE.get(machine, machine)}"
    return "unknown"


def faults(library: bytes, tag: str) -> list[str]:
    """Why a library does not belong into a wheel with this platform tag; empty if it does."""
    found = header(library)
    kind = {"ma": "elf" if tag.startswith("many") else "macho", "wi": "pe"}[tag[:2]]
    processor = next(p for p in ("x86_64", "aarch64", "arm64", "amd64") if tag.endswith(p))
    wrong = [] if found == f"{kind} {processor}" else [f"{tag} holds a library for {found}"]
    if kind == "elf":
        newest = max((int(n) for n in re.findall(rb"GLIBC_2\.(\d+)", library)), default=0)
        if newest > 17:
            wrong.append(f"{tag} asks for glibc 2.{newest}, more than 2.17")
        if b"libstdc++.so" in library:
            wrong.append(f"{tag} asks for libstdc++, which not every machine has")
    return wrong


def wheel_faults(wheel: Path) -> list[str]:
    """`faults` of the library in a wheel, which must hold exactly one; a pure one holds none."""
    tag = wheel.stem.partition("-none-")[2]
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith((".so", ".dylib", ".dll"))]
        if len(names) != (tag != "any"):
            return [f"{wheel.name} holds {len(names)} libraries"]
        return [fault for name in names for fault in faults(archive.read(name), tag)]


def build(dist: Path, **environment: str) -> Path:
    """One wheel, with these variables of the environment besides."""
    before = set(dist.glob("*.whl"))
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist)]
    subprocess.run(command, cwd=PROJECT, env={**os.environ, **environment}, check=True)
    (wheel,) = set(dist.glob("*.whl")) - before
    return wheel


def main(dist: Path) -> int:
    dist = dist.resolve()
    dist.mkdir(parents=True, exist_ok=True)
    for own in dist.glob("shared_kernels-*-py3-none-*.whl"):
        own.unlink()
    made = [build(dist, SHARED_KERNELS_PLATFORM=tag) for tag in PLATFORMS]
    made.append(build(dist, SHARED_KERNELS_NATIVE="0"))
    wrong = [fault for wheel in made for fault in wheel_faults(wheel)]
    for line in wrong or [wheel.name for wheel in made]:
        print(line)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
