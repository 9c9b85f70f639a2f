"""python -m shared_kernels.offline.ptx run module:function [--target sm_80]

Calls a function that launches Triton kernels on CPU tensors, runs what Triton compiled for the
target, and prints what the sanitizer found and what the launches cost. Its other command,
``forms``, prints the page of the instructions that a file of `leg` holds.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from .counters import Counters
from .errors import FaultError, UnsupportedError
from .forms import page
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
    run.add_argument(
        "--largest-grid",
        type=int,
        default=1 << 20,
        help="refuse launches of more programs: each takes milliseconds here (%(default)s)",
    )
    forms = commands.add_parser("forms", help="the page of the forms that a leg has written")
    forms.add_argument("file", metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.command == "forms":
        sys.stdout.write(page(json.loads(Path(options.file).read_text("utf-8"))))
        return 0

    module, colon, name = options.function.partition(":")
    if not colon:
        parser.error(f"give MODULE:FUNCTION, got {options.function!r}")
    sys.path.insert(0, "")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        parser.error(f"cannot import {module}: {error}")
    if not callable(function):
        parser.error(f"{module} has no function {name!r}")
    sanitizer, counters = Sanitizer(), Counters()
    try:
        with executing(
            options.target,
            sanitizer,
            counters,
            fused=options.fused,
            largest_grid=options.largest_grid,
        ):
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
    if not counters.blocks:
        sys.stdout.write(f"{options.function} launched no Triton kernel\n")
        return 1
    sys.stdout.write(f"{sanitizer.text()}\n" if sanitizer.found else "nothing found\n")
    return 1 if sanitizer.found else 0


if __name__ == "__main__":
    sys.exit(main())
