"""Attention over keys that ranks share: a program of forked processes for test_sharded.py.

Few groups of processes run all cases: starting one costs more than a case.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from adasplash import EntmaxAttention, adasplash, sequence_places
from shared_kernels.testing.ranks import refused

B, H, N, D, D_V = 2, 4, 83, 8, 6
PER_HEAD = (1.0, 1.25, 1.5, 2.0)
CASES = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal zigzag": {"is_causal": True, "layout": "zigzag"},
    "softmax": {"alpha": 1.0, "is_causal": True},
    "near softmax": {"alpha": 1.02},
    "sparsemax": {"alpha": 2.0, "layout": "zigzag"},
    "a number per head": {"alpha": PER_HEAD, "is_causal": True},
    "one learned number": {"alpha": (1.4,)},
    "groups of heads": {"kv_heads": 2, "is_causal": True, "layout": "zigzag"},
    "one key head": {"kv_heads": 1, "alpha": 1.7},
    "window": {"window": 9},
    "causal window": {"window": 20, "is_causal": True, "layout": "zigzag"},
    "slopes": {"slopes": True, "is_causal": True},
    "slopes both ways": {"slopes": True, "alpha": PER_HEAD, "layout": "zigzag"},
    "cap": {"softcap": 1.5, "alpha": PER_HEAD},
    "sink": {"sink": True, "alpha": PER_HEAD, "is_causal": True},
    "lengths": {"varlen": (83, 30), "is_causal": True},
    "no length": {"varlen": (0, 41), "sink": True, "layout": "zigzag"},
    "packed": {"cu_seqlens": (0, 7, 40, 40, 83), "is_causal": True},
    "packed zigzag": {"cu_seqlens": (0, 50, 83), "layout": "zigzag", "slopes": True, "window": 30},
    "other scale": {"scale": 3.0},
    "large scores": {"scale": 40.0, "is_causal": True},
    "grows": {"length_scale": True, "is_causal": True, "layout": "zigzag"},
    "grows packed": {"length_scale": True, "cu_seqlens": (0, 20, 83)},
    "grows with lengths": {"length_scale": True, "varlen": (70, 5)},
}
# Tokens of each rank of the contiguous layout: as equal as can be, and not at all equal.
SPLITS = {2: ((42, 41), (80, 3)), 4: ((21, 21, 21, 20), (1, 40, 0, 42))}


def result(name, dtype, part=slice(None), group=None):
    """Output and gradients of q, k and v of some tokens, and gradients of what ranks share."""
    options = dict(CASES[name])
    generator = torch.Generator().manual_seed(3)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    batch = 1 if "cu_seqlens" in options else B
    H_kv = options.pop("kv_heads", H)
    layout = options.pop("layout", "contiguous")
    tokens = [draw(batch, H, N, D), draw(batch, H_kv, N, D), draw(batch, H_kv, N, D_V)]
    tokens = [x[:, :, part].clone().requires_grad_() for x in tokens]
    d_out = draw(batch, H, N, D_V)[:, :, part]
    shared = {}
    alpha = options.pop("alpha", 1.5)
    if isinstance(alpha, tuple):
        alpha = shared["alpha"] = torch.tensor(alpha, dtype=dtype).requires_grad_()
    for flag, argument, shape in (
        ("slopes", "alibi_slopes", (H,)),
        ("sink", "s_aux", (H,)),
        ("length_scale", "length_scale", (H, 3)),
    ):
        if options.pop(flag, False):
            shared[argument] = draw(*shape).abs_().mul_(0.3).requires_grad_()
    for argument in ("varlen", "cu_seqlens"):
        if argument in options:
            options[argument] = torch.tensor(options[argument])
    for argument in set(shared) - {"alpha"}:
        options[argument] = shared[argument]
    if group is not None:
        options |= {"group": group, "layout": layout}
    out = adasplash(*tokens, alpha, **options)
    grads = torch.autograd.grad((out * d_out).sum(), [*tokens, *shared.values()])
    of_tokens = [out.detach(), *grads[:3]]
    return of_tokens, dict(zip(shared, grads[3:], strict=True))


def parts(name, size):
    """The tokens of each rank, for each way to split them."""
    if CASES[name].get("layout") == "zigzag":
        return [[sequence_places(N, rank=rank, size=size) for rank in range(size)]]
    found = []
    for split in SPLITS[size]:
        ends = torch.tensor(split).cumsum(0).tolist()
        found.append([torch.arange(end - n, end) for n, end in zip(split, ends, strict=True)])
    return found


def attention(rank, size):
    found = {}
    for name in CASES:
        every = parts(name, size)
        for i, places in enumerate(every):
            last = i + 1 == len(every)
            for dtype in (torch.float64, torch.float32) if last else (torch.float64,):
                found[name, i, dtype] = result(name, dtype, places[rank], dist.group.WORLD)
    return found


def refusals(rank, size):
    """What is refused, on which rank, and what the others hear."""
    world = dist.group.WORLD
    q = torch.randn(1, 2, 6, 4)
    mask = torch.ones(6, 6, dtype=torch.bool)
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    attention = EntmaxAttention(8, 2, causal=True)
    x = torch.randn(1, 6, 8)
    twice = q.clone().requires_grad_()

    def second():
        (g,) = torch.autograd.grad(
            adasplash(twice, q, q, group=world).square().sum(), twice, create_graph=True
        )
        g.sum().backward()

    calls = {
        "one rank's alpha": lambda: adasplash(q, q, q, 1.5 + rank, group=world),
        "alpha": lambda: adasplash(q, q, q, 1.5 + rank / 10, group=world),
        "heads": lambda: adasplash(q[:, : 1 + rank], q[:, :1], q[:, :1], group=world),
        "mask": lambda: adasplash(q, q, q, mask=mask, group=world),
        "bias": lambda: adasplash(q, q, q, bias=mask.float(), group=world),
        "score_mod": lambda: adasplash(q, q, q, score_mod=lambda x, *_: x, group=world),
        "lengths": lambda: adasplash(q[:, :, 1:], q, q, is_causal=True, group=world),
        "zigzag": lambda: adasplash(*[q[:, :, rank:]] * 3, layout="zigzag", group=world),
        "layout": lambda: adasplash(q, q, q, layout="ring", group=world),
        "varlen": lambda: adasplash(q, q, q, varlen=torch.tensor([13]), group=world),
        "bounds": lambda: adasplash(q, q, q, cu_seqlens=torch.tensor([0, 6]), group=world),
        "mesh": lambda: adasplash(q, q, q, group=mesh),
        "backend": lambda: adasplash(q, q, q, group=world, backend="triton"),
        "gradient": lambda: adasplash(q.clone().requires_grad_(rank == 1), q, q, group=world),
        "cache": lambda: attention(x, use_cache=True, group=world),
        "second": second,
    }
    return refused(calls)


def modules(rank, size):
    """A module on a mesh; half types; more queries than keys; no key at all."""
    mesh = dist.device_mesh.init_device_mesh("cpu", (1, size), mesh_dim_names=("dp", "cp"))
    torch.manual_seed(0)
    attention = EntmaxAttention(8, 2, causal=True, learn_alpha=True).double()
    x = torch.randn(1, N, 8, dtype=torch.float64)
    places = sequence_places(N, mesh["cp"])
    own = x[:, places].requires_grad_()
    out = attention(own, group=mesh["cp"], layout="zigzag")
    out.square().sum().backward()
    found = {"out": out.detach(), "x": own.grad, "places": places}
    found["parameters"] = {n: p.grad for n, p in attention.named_parameters()}
    q, k, v = (torch.randn(1, 2, n, 8) for n in (5, 40, 40))
    part = slice(20 * rank, 20 * rank + 20)
    few = q[:, :, : 5 * (1 - rank)]  # rank 1 has keys and no query
    found["few queries"] = adasplash(few, k[:, :, part], v[:, :, part], group=mesh["cp"])
    half = [x.bfloat16() for x in (q, k[:, :, part], v[:, :, part])]
    found["half"] = adasplash(*half, group=mesh["cp"])
    bad = k[:, :, part].clone()
    if rank == 1:
        bad[0, 1, 3] = torch.nan  # every query of head 1 sees it
    found["nan"] = adasplash(q, bad, v[:, :, part], group=mesh["cp"])
    found["no key"] = adasplash(q, k[:, :, :0], v[:, :, :0], group=mesh["cp"])
    found["again"] = adasplash(few, k[:, :, part], v[:, :, part], group=mesh["cp"])
    found["inputs"] = (q, k, v)
    return found
