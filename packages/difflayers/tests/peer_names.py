"""The public names, signatures and methods of difflayers 0.1.1, as they were read from it.

    pip install --no-deps --target DIR difflayers==0.1.1
    python packages/difflayers/tests/peer_names.py DIR

writes peer_names.json: for each name of ``__all__`` and of its documented modules, the parameters
of the call (kind and default as text) and, for a class, its public methods and properties.
"""

import inspect
import json
import sys
from pathlib import Path

FILE = Path(__file__).parent / "peer_names.json"
MODULES = (
    "functional",
    "transformer",
    "auxiliary.data",
    "graph",
    "graph.build_graph",
    "graph.laplacian",
)


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [
        [p.name, p.kind.name, None if p.default is p.empty else repr(p.default)]
        for p in found
        if p.name not in ("self", "args", "kwargs")
    ]


def members(cls):
    from torch import nn

    seen = {}
    for name, value in inspect.getmembers(cls):
        if name.startswith("_") or hasattr(nn.Module, name) and name != "forward":
            continue
        call = callable(value) and not isinstance(value, type)
        seen[name] = parameters(value) if call else None
    return seen


def record(package):
    import importlib

    found = {}
    homes = [package, *(importlib.import_module(f"{package.__name__}.{m}") for m in MODULES)]
    for home in homes:
        names = getattr(home, "__all__", None) or [
            n for n, v in vars(home).items() if getattr(v, "__module__", "") == home.__name__
        ]
        for name in names:
            thing = getattr(home, name)
            if name.startswith("_") or not callable(thing):
                continue
            where = home.__name__.removeprefix(package.__name__).lstrip(".")
            entry = {"call": parameters(thing)}
            if isinstance(thing, type):
                entry["members"] = members(thing)
            found[f"{where}:{name}"] = entry
    return found


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    import difflayers

    text = json.dumps(record(difflayers), indent=None, sort_keys=True).replace('}}, "', '}},\n"')
    FILE.write_text(text + "\n", encoding="utf-8")
