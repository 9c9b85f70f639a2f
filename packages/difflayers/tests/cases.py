"""The cases that every leg runs, and the inputs they stand for."""

import torch

from shared_kernels.testing import Case

MODES = ("factored", "simple", "iterative", "spectral", "ppr", "heat")

MEMORIES = [
    Case("plain", options={}),
    Case("sizes", options={"hidden_size": 5, "output_size": 7, "pattern_size": 3}),
    Case("hetero", options={"stored_pattern_size": 6, "pattern_projection_size": 9}),
    Case("updates", options={"update_steps_max": 2, "scaling": 0.7}),
    Case("normalised-space", options={"normalize_hopfield_space": True}),
    Case("no-bias", options={"input_bias": False, "add_zero_association": True}),
    Case("connected", options={"pattern_projection_as_connected": True}),
    Case("heads-out", options={"disable_out_projection": True}),
    Case("seq-first", options={"batch_first": False}),
    Case("sparsemax", options={"separation": "sparsemax", "scaling": 2.0}),
    Case("entmax15", options={"separation": "entmax15", "scaling": 2.0}),
]

GRAPHS = [
    Case("one", B=1, N=9, d=4, k=2, padding=None),
    Case("batch", B=3, N=17, d=5, k=3, padding=None),
    Case("padded", B=3, N=17, d=5, k=4, padding=(17, 9, 1)),
    Case("k-too-large", B=2, N=5, d=3, k=40, padding=(5, 3)),
    Case("wide", B=2, N=70, d=8, k=6, padding=(70, 64)),
]


def randn(*shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def data_of(module, B=2, L=4, S=6, seed=0, dtype=torch.float32):
    """(stored, state, projection) of the sizes that ``module`` wants."""
    sizes = (module.stored_pattern_dim, module.state_pattern_dim, module.pattern_projection_dim)
    shapes = [(B, n, size) for n, size in zip((S, L, S), sizes, strict=True)]
    if not module.batch_first:
        shapes = [(n, B, size) for _, n, size in shapes]
    return tuple(randn(*s, seed=seed + i, dtype=dtype) for i, s in enumerate(shapes))


def padding_of(case):
    """(B, N) bool, True = ignore."""
    if case.padding is None:
        return None
    lengths = torch.tensor(case.padding)
    return torch.arange(case.N)[None] >= lengths[:, None]


def spread(module, seed=3):
    """Give every parameter an ordinary size: the default initialisation is nearly zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
    return module
