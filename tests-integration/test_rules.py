"""Every rule finds what it forbids and leaves alone what it allows."""

from __future__ import annotations

import pytest

from . import mutate, rules
from .distributions import distribution, machine_paths
from .rules import Source

pytestmark = pytest.mark.tools

PARAMETERS = ", ".join(f"a{i}" for i in range(rules.MOST_PARAMETERS + 1))

# rule -> (path, text) of files that break it
BAD = {
    rules.no_sibling: [
        ("diffmax/api.py", "import adasplash"),
        ("diffmax/api.py", "def f():\n    from dsalt.kernels import dsalt_attention"),
        ("diffmax/api.py", "import importlib\nm = importlib.import_module('dsalt.model')"),
        ("shared_kernels/qexp.py", "from diffmax import diffmax_bisect"),
    ],
    rules.one_way: [
        ("diffmax/_torch.py", "from ._reference import bisect"),
        ("diffmax/_torch.py", "from . import _reference"),
        ("diffmax/_torch_rows.py", "from . import _reference"),
        ("diffmax/_torch.py", "import triton"),
        ("diffmax/_triton/forward.py", "from .._reference import bisect"),
        ("diffmax/_triton/forward.py", "def f():\n    import diffmax._reference as r"),
        ("diffmax/_triton/__init__.py", "from .. import _reference"),
        ("diffmax/_reference.py", "from shared_kernels import qexp"),
        ("diffmax/_reference.py", "from ._torch import bisect"),
        ("diffmax/_checks.py", "from . import api"),
        ("diffmax/_ops.py", "from .modules import Diffmax"),
        ("diffmax/api.py", "from diffmax.modules import Diffmax"),
    ],
    rules.init_reexports_only: [
        ("diffmax/__init__.py", "from .api import f\n\n\ndef g():\n    return f()"),
        ("diffmax/__init__.py", "class A:\n    pass"),
        ("diffmax/_triton/__init__.py", "BLOCK = 64"),
        ("diffmax/__init__.py", "import torch\ntorch.set_num_threads(1)"),
        ("diffmax/__init__.py", "try:\n    import triton\nexcept ImportError:\n    triton = None"),
    ],
    rules.all_is_bound: [
        ("diffmax/__init__.py", "from .api import f\n__all__ = ['f', 'g']"),
        ("diffmax/__init__.py", "from .api import f\n__all__ = ['f', 'f']"),
        ("diffmax/__init__.py", "from . import api\n__all__ = [n for n in dir(api)]"),
        ("diffmax/__init__.py", "from .api import f"),
    ],
    rules.configs_are_data: [
        ("diffmax/_triton/configs.py", "import torch"),
        ("diffmax/_triton/configs.py", "def pick(n):\n    return 64"),
        ("diffmax/_triton/configs.py", "T = open('tiles.json')"),
        ("diffmax/_triton/configs.py", "import os\nif os.name == 'nt':\n    T = 1"),
    ],
    rules.version_file_is_a_version: [
        ("diffmax/_version.py", "__version__ = version('diffmax')"),
        ("diffmax/_version.py", "__version__ = '0.1'"),
        ("diffmax/_version.py", "__version__ = '0.1.0'\nDATE = 2026"),
    ],
    rules.rooms_hold_what_they_say: [
        ("diffmax/api.py", "class D(torch.nn.Module):\n    pass\n\n\ndef f():\n    pass"),
        ("diffmax/_torch.py", "class D(nn.Module):\n    pass"),
        ("diffmax/modules.py", "def module():\n    pass"),
        ("diffmax/api.py", "LIMIT = 3"),
    ],
    rules.no_shim: [
        ("dsalt/attention.py", '"""Attention."""\n\nfrom .kernels import f\n\n__all__ = ["f"]'),
        ("diffmax/_autograd.py", '"""Later."""'),
        ("diffmax/_autograd.py", ""),
    ],
    rules.telling_file_name: [
        ("diffmax/utils.py", "x = 1"),
        ("diffmax/_triton/helpers.py", "x = 1"),
        ("adasplash/attention_v2.py", "x = 1"),
        ("shared_kernels/common.py", "x = 1"),
        ("adasplash/tests/forward_old.py", "x = 1"),
    ],
    rules.no_assert: [
        ("diffmax/_checks.py", "def f(x):\n    assert x.ndim == 2"),
        ("shared_kernels/checks.py", "def f(x):\n    assert x"),
    ],
    rules.no_print: [
        ("dsalt/training.py", "def f():\n    print('step')"),
        ("shared_kernels/testing/compare.py", "import builtins\nbuiltins.print('x')"),
    ],
    rules.no_silent_except: [
        ("diffmax/_ops.py", "try:\n    f()\nexcept:\n    g()"),
        ("diffmax/_ops.py", "try:\n    f()\nexcept Exception:\n    pass"),
        (
            "diffmax/_ops.py",
            "for x in y:\n    try:\n        f()\n    except BaseException:\n        continue",
        ),
    ],
    rules.nothing_probed_at_import: [
        ("adasplash/api.py", "import torch\nCAP = torch.cuda.get_device_capability()"),
        ("adasplash/api.py", "import torch\n\n\ndef f(n=torch.cuda.device_count()):\n    return n"),
        ("adasplash/api.py", "import torch\n\n\nclass A:\n    gpu = torch.cuda.is_available()"),
    ],
    rules.version_from_file: [
        ("diffmax/api.py", "from importlib.metadata import version"),
        ("diffmax/api.py", "import importlib.metadata"),
    ],
    rules.is_cuda_unasked: [("diffmax/_ops.py", "def f(x):\n    return x.is_cuda")],
    rules.kernels_stay_portable: [
        ("diffmax/_triton/forward.py", "def f(a, b):\n    return tl.dot(a, b)"),
        ("diffmax/_triton/forward.py", "@triton.autotune(configs=[])\ndef f():\n    pass"),
        ("diffmax/_triton/forward.py", "def f(p, x):\n    tl.atomic_add(p, x)"),
        ("diffmax/_triton/forward.py", "from triton.language.extra import libdevice"),
        ("shared_kernels/triton/tiles.py", "def f():\n    tl.inline_asm_elementwise('')"),
    ],
    rules.kernels_are_named: [
        ("diffmax/_triton/forward.py", "@triton.jit\ndef bisect_kernel():\n    pass"),
        ("diffmax/_triton/backward.py", "def bisect(x):\n    _kernel[(1,)](x)"),
    ],
    rules.calls_are_read_by_name: [
        ("diffmax/_torch.py", "def f(call):\n    return call[3]"),
        ("diffmax/_torch.py", "def f(call):\n    return g(*call[:6])"),
        ("diffmax/_ops.py", "def f(options):\n    return options[11]"),
    ],
    rules.fields_are_replaced_by_one_function: [
        ("diffmax/api.py", "call = call._replace(x=x)"),
        ("shared_kernels/ops.py", "def f(call, change):\n    return change(call._replace)"),
    ],
    rules.bounds_have_names: [
        ("diffmax/tests/test_a.py", "torch.testing.assert_close(a, b, atol=1e-5, rtol=0)"),
        ("diffmax/tests/test_a.py", "assert a == pytest.approx(b, rel=0.2)"),
        ("diffmax/tests/test_a.py", "assert torch.allclose(a, b, atol=0.01 * b.abs().max())"),
        ("diffmax/tests/test_a.py", "assert abs(a - b) < 1e-6"),
        ("diffmax/tests/test_a.py", "def test():\n    assert all(1e-6 >= abs(x) for x in X)"),
        ("diffmax/tests/test_a.py", "assert a <= b + 1e-12 * X"),
        ("diffmax/tests/test_a.py", "NEAR = 1e-3\nassert abs(a - b) < NEAR"),
    ],
    rules.kernels_have_few_parameters: [
        ("diffmax/_triton/forward.py", f"@triton.jit\ndef _f_kernel({PARAMETERS}):\n    pass"),
        (
            "diffmax/_triton/forward.py",
            f"@triton.jit(do_not_specialize=['n'])\ndef _f_kernel({PARAMETERS}):\n    pass",
        ),
    ],
}

# Files that every rule accepts.
GOOD = [
    ("diffmax/__init__.py", '"""D."""\n\nfrom .api import f\n\n__all__ = ["f"]'),
    (
        "diffmax/__init__.py",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .api import f\n"
        "__all__ = ['f']\n\n\ndef __getattr__(name):\n    raise AttributeError(name)",
    ),
    ("diffmax/_triton/__init__.py", '"""Kernels."""'),
    ("diffmax/_version.py", '__version__ = "0.1.0"'),
    ("diffmax/_version.py", '"""Version."""\n\n__version__ = "1.10.0rc1"'),
    (
        "diffmax/_triton/configs.py",
        '"""Tiles."""\n\nfrom shared_kernels.configs import ANY, Config, Table\n\n'
        'ROWS = Table("rows", {(ANY, ANY): (Config(BLOCK=64, why="fits"),)})',
    ),
    (
        "diffmax/_triton/forward.py",
        "import triton\nfrom shared_kernels.triton.dot import dot\nfrom .configs import ROWS\n\n\n"
        "@triton.jit\ndef _f_forward_kernel(x):\n    dot(x, x)\n\n\ndef launch_f_forward(x):\n"
        "    _f_forward_kernel[rows(x)](x)\n\n\ndef rows(x):\n    return (x.shape[0],)",
    ),
    (
        "diffmax/_reference.py",
        "import torch\nfrom shared_kernels import checks\n\n\ndef f():\n    pass",
    ),
    (
        "diffmax/_torch.py",
        "from shared_kernels import qexp\nfrom . import _checks\n\n\ndef f():\n    pass",
    ),
    (
        "diffmax/_ops.py",
        "from shared_kernels.ops import define_op\n\nf = define_op('diffmax::f')",
    ),
    (
        "diffmax/api.py",
        "from . import _checks, _reference\n\n\ndef f(x):\n    try:\n        return g(x)\n"
        "    except ValueError:\n        return None\n",
    ),
    ("diffmax/_torch.py", "def f(call, options):\n    return call.x[3], options['lr']"),
    ("flashdiffusion/utils.py", "def f():\n    pass"),
    ("shared_kernels/testing/compare.py", "def f(x):\n    assert x"),
    ("shared_kernels/triton/dot.py", "def dot(a, b):\n    return tl.dot(a, b)"),
    ("dsalt/modules.py", "class A(torch.nn.Module):\n    pass"),
    ("dsalt/__main__.py", "import sys\nfrom .cli import main\nsys.stdout.write(main())"),
]


def test_every_rule_is_shown_a_file_that_breaks_it():
    assert set(BAD) == set(rules.SOURCE_RULES) | set(rules.ANY_FILE_RULES)


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [
        pytest.param(rule, path, text, id=f"{rule.__name__}-{number}")
        for rule, files in BAD.items()
        for number, (path, text) in enumerate(files)
    ],
)
def test_rule_finds_what_it_forbids(rule, path, text):
    messages = rule(Source(path, text))
    assert messages
    assert all(message.startswith(f"{path}:") for message in messages)


@pytest.mark.parametrize(
    "text",
    [
        "assert torch.allclose(a, b, rtol=0, atol=tolerance(torch.float32) / 2)",
        "assert abs(a - b) < 10 * torch.finfo(a.dtype).eps",
        "np.testing.assert_allclose(a, b, atol=100 * tol)",
        "NEAR = 1e-3  # the limit\nassert abs(a - b) < 0.1 * NEAR",
        "# the limit\nNEAR = 1e-3\nassert a == pytest.approx(b, rel=NEAR)",
        "assert abs(a - b) <= cases.ROUNDING",
        "assert (a - b).abs().max() > 1e-3 and seconds < 0.5 and a < b",
    ],
)
def test_bounds_with_names_may_stand(text):
    assert not rules.bounds_have_names(Source("diffmax/tests/test_a.py", text))


@pytest.mark.parametrize("path, text", GOOD)
def test_rules_leave_good_files_alone(path, text):
    assert not [message for rule in rules.SOURCE_RULES for message in rule(Source(path, text))]


def test_relative_imports_resolve():
    def names(path, text):
        return {name for name, _ in Source(path, text).imports()}

    assert "a.b.c" in names("a/b/x.py", "from .c import d")
    assert "a.b.c" in names("a/b/__init__.py", "from . import c")
    assert "a.c" in names("a/b/x.py", "from .. import c")
    assert "a.c.d" in names("a/b/c.py", "from ..c import d")


def project(**changes):
    table = {
        "name": "diffmax",
        "dynamic": ["version"],
        "license": "MIT",
        "requires-python": ">=3.10",
        "dependencies": ["torch>=2.7", "shared-kernels>=0.1,<0.2"],
        "optional-dependencies": {"dev": ["shared-kernels[testing]"]},
    }
    return {
        "project": {**table, **changes},
        "build-system": {"build-backend": "hatchling.build"},
        "tool": {"hatch": {"version": {"path": "src/diffmax/_version.py"}}},
    }


FILES = {"src/diffmax/_version.py", "src/diffmax/py.typed", "README.md", "CHANGELOG.md"}
MIT = "MIT License\n\nCopyright"


def test_a_good_distribution_passes():
    assert not distribution(project(), MIT, FILES)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"license": "Apache-2.0"}, "LICENSE"),
        ({"license": "GPL-3.0"}, "licence"),
        ({"dynamic": []}, "dynamic"),
        ({"requires-python": ">=3.9"}, "requires-python"),
        ({"dependencies": ["torch", "shared-kernels>=0.1,<0.2"]}, "torch"),
        ({"dependencies": ["torch>=2.7"]}, "shared-kernels"),
        ({"dependencies": ["torch>=2.7", "shared-kernels>=0.1"]}, "ceiling"),
        ({"dependencies": ["torch>=2.7", "shared-kernels>=0.1,<0.2", "einops"]}, "einops"),
        ({"dependencies": ["torch>=2.7", "shared-kernels>=0.1,<0.2", "adasplash"]}, "adasplash"),
        ({"optional-dependencies": {"all": ["dsalt[docs]"]}}, "dsalt"),
    ],
)
def test_a_bad_distribution_is_found(changes, word):
    assert any(word in message for message in distribution(project(**changes), MIT, FILES))


@pytest.mark.parametrize("missing", sorted(FILES))
def test_a_missing_file_is_found(missing):
    assert any(missing in message for message in distribution(project(), MIT, FILES - {missing}))


def test_machine_paths():
    assert machine_paths("a.py", "open('/home/ada/x.txt')")
    assert machine_paths("a.md", "see\n/Users/ada/notes")[0].startswith("a.md:2:")
    assert not machine_paths("a.md", "https://example.org/home/ada, {root}/home/x, a/home/b")


def test_every_mutation_finds_its_line():
    assert not mutate.misplaced(mutate.ROOT)


def test_a_mutation_of_an_older_line_is_found(tmp_path):
    assert len(mutate.misplaced(tmp_path)) == 2 * len(mutate.MUTATIONS)
