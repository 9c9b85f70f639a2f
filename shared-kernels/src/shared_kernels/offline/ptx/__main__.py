"""python -m shared_kernels.offline.ptx run module:function [--target sm_80]

Calls a function that launches Triton kernels on CPU tensors, runs what Triton compiled for the
target, and prints what the sanitizer found and what the launches cost.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from .counters import Counters
from .errors import FaultError, UnsupportedError
from .launcher import executing
from .sanitizer import Sanitizer


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m shared_kernels.offline.ptx",
        description="Run the code that Triton compiles for a GPU on CPU tensors, and watch it.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="call a function that launches kernels on CPU tensors")
    run.add_argument("function", metavar="MODULE:FUNCTION")
    run.add_argument("--target", default="sm_80", help="sm_80, sm_90 or sm_120 (%(default)s)")
    run.add_argument("--fused", action="store_true", help="round a product and its sum once")
    options = parser.parse_args(arguments)

    module, colon, name = options.function.partition(":")
    if not colon:
        parser.error(f"give MODULE:FUNCTION, got {options.function!r}")
    sys.path.insert(0, "")
    function = getattr(importlib.import_module(module), name)
    sanitizer, counters = Sanitizer(), Counters()
    try:
        with executing(options.target, sanitizer, counters, fused=options.fused):
            function()
    except (FaultError, UnsupportedError) as error:
        sys.stdout.write(f"{error}\n")
        return 1
    for kernel, classes in counters.instructions().items():
        mix = ", ".join(f"{count} {name}" for name, count in classes.most_common())
        sys.stdout.write(f"{kernel}: instructions of warps: {mix}\n")
    for (source, i), (accesses, wavefronts) in counters.shared.items():
        if wavefronts > accesses:
            times = wavefronts / accesses
            sys.stdout.write(f"bank conflicts: {source} {i.form}: {times:.1f} wavefronts each\n")
    for (source, i), (_, sectors, ideal) in counters.sectors.items():
        if sectors > ideal:
            sys.stdout.write(f"sectors: {source} {i.form}: {sectors} where {ideal} would do\n")
    sys.stdout.write(f"{sanitizer.text()}\n" if sanitizer.found else "nothing found\n")
    return 1 if sanitizer.found else 0


if __name__ == "__main__":
    sys.exit(main())
