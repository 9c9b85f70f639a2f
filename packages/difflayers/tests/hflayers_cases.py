"""What hflayers computes: the cases, their inputs, and how their numbers are recorded.

hflayers is not on the package index. With its repository on PYTHONPATH,

    python packages/difflayers/tests/hflayers_cases.py

writes hflayers_outputs.json: per case the names and shapes of the state dict, the output, and two
weighted sums of the gradient of every parameter and input. All in float64; parameters and inputs
are waves. Left out are the options that hflayers itself gets wrong (docs/migration.md).
"""

import json
from pathlib import Path

import torch

FILE = Path(__file__).parent / "hflayers_outputs.json"
B, L, S, SIZE = 2, 3, 5, 4
ONE, TWO = {"input_size": SIZE, "num_heads": 1}, {"input_size": SIZE, "num_heads": 2}
INPUTS = ("stored_pattern", "state_pattern", "pattern_projection")


def without_norm(*names):
    return {f"normalize_{n}{tail}": False for n in names for tail in ("", "_affine")}


def static(*names):
    return {f"{n}_as_static": True for n in names}


HOPFIELD = [
    TWO,
    {**TWO, "hidden_size": 3, "output_size": 5},
    {**TWO, "pattern_size": 3},
    {**TWO, "scaling": 0.7},
    {**ONE, "stored_pattern_size": 3, "pattern_projection_size": 5},
    {**TWO, "stored_pattern_size": 3, "pattern_projection_size": 5, "hidden_size": 3},
    {**TWO, "update_steps_max": 3, "update_steps_eps": 1e-6, "scaling": 1.5},
    {**TWO, "update_steps_max": None, "update_steps_eps": 1e-9, "scaling": 1.5},
    {**TWO, "update_steps_max": [0, 2], "scaling": 1.5},
    {**TWO, "update_steps_max": None, "update_steps_eps": [0.3, 0.02], "scaling": 1.5},
    {**TWO, "update_steps_max": 4, "update_steps_eps": 0.2, "scaling": 1.5},
    {**TWO, "hidden_size": 3, "normalize_hopfield_space": True},
    {
        **TWO,
        "hidden_size": 3,
        "normalize_hopfield_space": True,
        "normalize_hopfield_space_affine": True,
        "normalize_hopfield_space_eps": 0.1,
    },
    *({**TWO, **without_norm(n)} for n in INPUTS),
    *({**TWO, f"normalize_{n}_affine": False} for n in INPUTS),
    *({**TWO, f"normalize_{n}_eps": 0.1} for n in INPUTS),
    *({**ONE, **static(n)} for n in INPUTS),
    {**ONE, **static(*INPUTS[:2])},
    {**ONE, **static(*INPUTS[1:]), "output_size": 3},
    {**static(*INPUTS), **without_norm(*INPUTS), "disable_out_projection": True, "scaling": 0.8},
    {**TWO, "pattern_projection_as_connected": True},
    {**TWO, "association_activation": "tanh"},
    {**TWO, "dropout": 0.3},
    {**TWO, "input_bias": False},
    {**TWO, "add_zero_association": True},
    {**TWO, "disable_out_projection": True},
    {**TWO, "batch_first": False, "update_steps_max": 1},
]
POOLING = [
    TWO,
    {**TWO, "quantity": 3},
    {**TWO, "trainable": False},
    {**TWO, "batch_first": False, "quantity": 2},
    {**TWO, "hidden_size": 3, "output_size": 5, "scaling": 0.5},
    {**ONE, "state_pattern_as_static": True},
]
LAYER = [
    TWO,
    {**TWO, "quantity": 5},
    {**TWO, "quantity": 5, "lookup_weights_as_separated": True},
    {
        **TWO,
        "quantity": 3,
        "lookup_weights_as_separated": True,
        "lookup_targets_as_trainable": False,
    },
    {**TWO, "quantity": 3, "trainable": False, "batch_first": False},
    {
        **TWO,
        "quantity": 3,
        "lookup_weights_as_separated": True,
        "stored_pattern_size": 3,
        "pattern_projection_size": 5,
    },
]
TRANSFORMER = [
    {"dim_feedforward": 6, "dropout": 0.0},
    {"dim_feedforward": 6, "dropout": 0.3, "activation": "tanh"},
    {"dim_feedforward": 6, "dropout": 0.0, "batch_first": False},
]
MASKS = ("padding", "association", "additive", "per head", "both")
CASES = [
    *(("Hopfield", options, "both") for options in HOPFIELD),
    *(("Hopfield", TWO, mask) for mask in (None, *MASKS[:-1])),
    *(("HopfieldPooling", options, "padding") for options in POOLING),
    *(("HopfieldLayer", options, None) for options in LAYER),
    *(("HopfieldEncoderLayer", options, m) for options in TRANSFORMER for m in (None, "both")),
    *(("HopfieldDecoderLayer", options, m) for options in TRANSFORMER for m in (None, "both")),
]


def wave(*shape, phase):
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return torch.sin(phase + 0.9 * n**1.1).view(shape)


def make(library, name, options):
    """The module, in float64 and evaluation mode, its parameters waves of ordinary size."""
    options = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}
    if name.endswith("coderLayer"):
        first = options.pop("batch_first", True)
        inner = [library.Hopfield(**TWO, batch_first=first) for _ in "ab"]
        module = getattr(library, name)(*inner[: 1 if "Encoder" in name else 2], **options)
    else:
        module = getattr(library, name)(**options)
    module = module.double().eval()
    with torch.no_grad():
        for i, (_, p) in enumerate(sorted(module.named_parameters())):
            n = torch.arange(p.numel(), dtype=torch.float64)
            p.copy_((0.5 * torch.cos(1.0 + i + 0.7 * n)).view(p.shape))
    return module


def masks_of(mask, L, S, H):
    """(padding (B, S), association) for the name of a mask; True = ignore."""
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[1, 2:] = True
    association = torch.zeros(L, S, dtype=torch.bool)
    association[0, 1] = association[-1, 0] = True
    if mask == "additive":
        return None, torch.zeros(L, S, dtype=torch.float64).masked_fill(association, -torch.inf)
    if mask == "per head":
        association = association.expand(B * H, L, S).clone()
        association[1, 1, 0] = True
        return None, association
    return (
        padding if mask in ("padding", "both") else None,
        association if mask in ("association", "both") else None,
    )


def call(module, name, options, mask):
    """(output, inputs) of the module on its wave inputs, which need a gradient."""
    first = options.get("batch_first", True)

    def patterns(n, size, phase):
        x = wave(B, n, size, phase=phase)
        return (x if first else x.transpose(0, 1).contiguous()).requires_grad_()

    state, stored = patterns(L, SIZE, 0.2), patterns(S, SIZE, 0.1)
    H = options.get("num_heads", 2)
    if name == "Hopfield":
        core = module.association_core
        inputs = (
            patterns(S, core.kdim or SIZE, 0.1),
            state,
            patterns(S, core.vdim or SIZE, 0.3),
        )
        padding, association = masks_of(mask, L, S, H)
        out = module(inputs, stored_pattern_padding_mask=padding, association_mask=association)
    elif name == "HopfieldPooling":
        inputs = (stored,)
        out = module(stored, stored_pattern_padding_mask=masks_of(mask, L, S, H)[0])
    elif name == "HopfieldLayer":
        inputs = (state,)
        out = module(state)
    elif name == "HopfieldEncoderLayer":
        inputs = (stored,)
        padding, association = masks_of(mask, S, S, 2)
        out = module(stored, src_mask=association, src_key_padding_mask=padding)
    else:
        inputs = (state, stored)
        padding, association = masks_of(mask, L, S, 2)
        out = module(state, stored, memory_mask=association, memory_key_padding_mask=padding)
    return out, inputs


def gradients(module, out, inputs):
    """Name -> two weighted sums of the gradient of a weighted sum of the output."""
    (out * wave(*out.shape, phase=1.7)).sum().backward()
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    named += [(f"input {i}", x) for i, x in enumerate(inputs)]
    found = {}
    for name, p in named:
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        found[name] = [(grad * wave(*p.shape, phase=f)).sum().item() for f in (0.4, 2.1)]
    return found


def record():
    import hflayers
    import hflayers.transformer

    for name in ("HopfieldEncoderLayer", "HopfieldDecoderLayer"):
        setattr(hflayers, name, getattr(hflayers.transformer, name))
    recorded = []
    for name, options, mask in CASES:
        module = make(hflayers, name, options)
        out, inputs = call(module, name, options, mask)
        recorded.append(
            {
                "name": name,
                "options": options,
                "mask": mask,
                "shapes": {k: list(v.shape) for k, v in module.state_dict().items()},
                "output": [float(f"{v:.12g}") for v in out.flatten().tolist()],
                "gradients": {
                    k: [float(f"{v:.12g}") for v in pair]
                    for k, pair in gradients(module, out, inputs).items()
                },
            }
        )
    FILE.write_text("[\n" + ",\n".join(map(json.dumps, recorded)) + "\n]\n", encoding="utf-8")


if __name__ == "__main__":
    record()
