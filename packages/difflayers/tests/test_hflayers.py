"""hflayers' names, shapes, outputs and gradients, option by option (see hflayers_cases.py)."""

import json
import math

import pytest
import torch

import difflayers
from shared_kernels.testing import assert_close

from . import hflayers_cases as h

RECORDED = json.loads(h.FILE.read_text(encoding="utf-8"))


def _id(case):
    changed = {k: v for k, v in case["options"].items() if k not in ("input_size", "num_heads")}
    return "-".join([case["name"], *changed, str(case["mask"])])


def test_every_case_is_recorded():
    assert [(c["name"], c["options"], c["mask"]) for c in RECORDED] == [
        (name, options, mask) for name, options, mask in h.CASES
    ]


def test_every_constructor_option_has_a_case():
    """Those that hflayers gets wrong are tested against the formula in test_modules.py."""
    import inspect

    ours = inspect.signature(difflayers.Hopfield).parameters
    recorded = {k for c in RECORDED if c["name"] == "Hopfield" for k in c["options"]}
    assert set(ours) - recorded == {"concat_bias_pattern", "separation"}


def _ours(case):
    name, options = case["name"], dict(case["options"])
    if name == "HopfieldPooling":
        options["flatten"] = True
    return h.make(difflayers, name, options)


@pytest.mark.parametrize("case", RECORDED, ids=_id)
def test_names_shapes_outputs_and_gradients(case):
    name, options = case["name"], case["options"]
    module = _ours(case)
    assert {k: list(v.shape) for k, v in module.state_dict().items()} == case["shapes"]
    checkpoint = {k: torch.zeros(shape) for k, shape in case["shapes"].items()}
    _ours(case).load_state_dict(checkpoint, strict=True)
    out, inputs = h.call(module, name, options, case["mask"])
    # waiting until nothing moves ends where rounding lets it: both are near the same fixed point
    assert_close(out.flatten(), torch.tensor(case["output"], dtype=torch.float64))
    found = h.gradients(module, out, inputs)
    assert found.keys() == case["gradients"].keys()
    for key, pair in case["gradients"].items():
        assert_close(torch.tensor(found[key]).double(), torch.tensor(pair).double(), "gradient")
    assert all(math.isfinite(v) for pair in found.values() for v in pair)


@pytest.mark.parametrize("name", ["HopfieldEncoderLayer", "HopfieldDecoderLayer"])
def test_both_constructor_styles_make_the_same_layer(name):
    inner = [difflayers.Hopfield(**h.TWO, dropout=0.1) for _ in "ab"]
    from_hopfield = getattr(difflayers, name)(*inner[: 1 if "Encoder" in name else 2], 6, 0.1)
    from_sizes = getattr(difflayers, name)(4, 2, dim_feedforward=6, dropout=0.1)
    from_sizes.load_state_dict(from_hopfield.state_dict(), strict=True)
    x = h.wave(2, 5, 4, phase=0.3).float()
    inputs = (x,) if "Encoder" in name else (x, h.wave(2, 3, 4, phase=0.6).float())
    assert torch.equal(from_sizes.eval()(*inputs), from_hopfield.eval()(*inputs))
