"""What a GPU script runs on; exits with 1 where there is no GPU, unless it is a dry run."""

from __future__ import annotations

import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version

import torch

NEEDED = ("torch", "triton", "numpy", "scipy", "pytest")


def main(dry: bool) -> int:
    for name in NEEDED:
        try:
            print(f"{name} {version(name)}")
        except PackageNotFoundError:
            there = importlib.util.find_spec(name) is not None
            print(f"{name}: {'version unknown' if there else 'NOT INSTALLED'}")
    print(f"python {sys.version.split()[0]}")
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {properties}")
        return 0
    print("no GPU here" + (": dry run" if dry else "; --dry-run shows what would run"))
    return 0 if dry else 1


if __name__ == "__main__":
    raise SystemExit(main("--dry-run" in sys.argv))
