"""Once each against the packages that are published under our names, and others of their kind.

`--peers FOLDER` says where they are. Two packages of one name rarely compute the same: a row says
what is the same (sizes, points, kernel), and only ours passes the gate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from adasplash import adasplash
from difflayers import DiffusedHopfield, _reference
from dsalt.kernels import dsalt_attention
from dsalt.model import DSALTLMHeadModel
from flashdiffusion import DiffusionMap, FlashDiffusion

from .. import published
from ..registry import Row, peer

QUICK = False


def _without_gradients(call: Callable[[], Any]) -> Callable[[], Any]:
    def quiet() -> Any:
        with torch.no_grad():
            return call()

    return quiet


def _attention(device: torch.device, quick: bool) -> Row:
    N = 512 if quick else 2048
    q, k, v = (torch.randn(1, 4, N, 64, device=device) for _ in range(3))
    small = [x[:, :, :300] for x in (q, k, v)]
    return Row(
        "peers/adasplash forward",
        f"B1 H4 D64 N={N}, causal",
        ours=lambda: adasplash(q, k, v, 1.5, True),
        checked=lambda: adasplash(*small, 1.5, True),
        exact=lambda: adasplash(*(x.double() for x in small), 1.5, True, backend="reference"),
        peers={
            "adasplash 0.2.2": published.peer(
                "adasplash", lambda m: lambda: m.adasplash(q, k, v, alpha=1.5, is_causal=True)
            )
        },
        once=True,
    )


def _window(device: torch.device, quick: bool) -> Row:
    """A window without landmarks is softmax in a band: compiled FlexAttention knows it too."""
    N, w = 512 if quick else 4096, 256
    q, k, v = (torch.randn(1, 4, N, 64, device=device) for _ in range(3))

    def ours(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        windows = torch.full(q.shape[:3], w, device=device, dtype=torch.int32)
        none = torch.full((1, 4, 1), -1, device=device, dtype=torch.int32)
        return dsalt_attention(q, k, v, windows, none, **options)

    def flex(module: Any) -> Callable[[], Tensor]:
        def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return (i >= j) & (i - j < w)

        mask = module.create_block_mask(near, None, None, N, N, device=str(device))
        compiled = torch.compile(module.flex_attention, fullgraph=True)
        return lambda: compiled(q, k, v, block_mask=mask)

    small = [x[:, :, :400] for x in (q, k, v)]
    return Row(
        "peers/dsalt window forward",
        f"B1 H4 D64 N={N} w={w}",
        ours=lambda: ours(q, k, v),
        checked=lambda: ours(*small),
        exact=lambda: ours(*(x.double() for x in small), backend="reference"),
        peers={
            "FlexAttention, compiled": peer("torch.nn.attention.flex_attention", flex),
            "SDPA": lambda: torch.nn.functional.scaled_dot_product_attention(
                q, k, v, is_causal=True
            ),
        },
    )


def _language_model(device: torch.device, quick: bool) -> Row:
    N = 256 if quick else 1024
    shape = {"vocab_size": 256, "d_model": 128, "n_layers": 2, "n_heads": 4}
    window = {"n_min": 16, "n_max": 128, "k_lmk": 16}
    ids = torch.randint(0, 256, (1, N), device=device)
    model = DSALTLMHeadModel(**shape, **window, dropout=0.0).to(device).eval()

    def theirs(module: Any) -> Callable[[], Any]:
        config = module.DSALTConfig(**shape, **window, max_seq_len=N)
        other = module.DSALTLMHeadModel.from_config(config).to(device).eval()
        return _without_gradients(lambda: other(ids))

    wide = DSALTLMHeadModel(**shape, **window, dropout=0.0).double()
    wide.load_state_dict(model.state_dict())
    wide = wide.to(device).eval()
    return Row(
        "peers/dsalt language model forward",
        f"d128 L2 H4 N={N} w=16..128 K=16",
        ours=_without_gradients(lambda: model(ids)),
        checked=_without_gradients(lambda: model(ids[:, :100]).logits),
        exact=_without_gradients(lambda: wide(ids[:, :100]).logits),
        peers={"dsalt 1.0.0": published.peer("dsalt", theirs)},
        once=True,
    )


def _memory(device: torch.device, quick: bool) -> Row:
    S, d, k = 256 if quick else 1024, 64, 8
    x = torch.randn(1, S, d, device=device)
    static = {f"{n}_as_static": True for n in ("stored_pattern", "state_pattern")}
    options = {"input_size": d, "num_heads": 1, "k_neighbors": k, "diffusion_steps": 3}
    layer = DiffusedHopfield(**options).to(device).eval()

    def theirs(module: Any) -> Callable[[], Any]:
        other = module.DiffusedHopfield(**options, batch_first=True).to(device).eval()
        return _without_gradients(lambda: other((x, x, x)))

    plain = DiffusedHopfield(
        num_heads=1,
        k_neighbors=k,
        diffusion_steps=3,
        disable_out_projection=True,
        scaling=2.0,
        pattern_projection_as_static=True,
        **static,
        **{f"normalize_{n}": False for n in ("stored_pattern", "state_pattern")},
        normalize_pattern_projection=False,
        **{f"normalize_{n}_affine": False for n in ("stored_pattern", "state_pattern")},
        normalize_pattern_projection_affine=False,
    )
    few = x[:, :100].cpu()

    def exact() -> Tensor:
        wide = few[0].double()
        L = _reference.laplacian(_reference.adjacency(wide, k), True)
        keys = _reference.diffuse(wide, L, "factored", 0.1, 3)
        return ((2.0 * wide @ keys.mT).softmax(-1) @ wide)[None]

    return Row(
        "peers/DiffusedHopfield forward",
        f"B1 S{S} L{S} d{d} k{k}, 3 steps, cached graph",
        ours=_without_gradients(lambda: layer((x, x, x))),
        checked=_without_gradients(lambda: plain((few, few, few))),
        exact=exact,
        peers={"difflayers 0.1.1": published.peer("difflayers", theirs)},
        once=True,
    )


def _product(device: torch.device, quick: bool) -> Row:
    N = 1024 if quick else 4096
    X, V = torch.randn(N, 3, device=device), torch.randn(N, 4, device=device)
    points, values = X.cpu().double().numpy(), V.cpu().double().numpy()
    x, v = X[:300], V[:300]

    def keops(module: Any) -> Callable[[], Tensor]:
        a, b = module.LazyTensor(X[:, None, :]), module.LazyTensor(X[None, :, :])
        kernel = (-((a - b) ** 2).sum(-1)).exp()
        return lambda: kernel @ V

    def theirs(module: Any) -> Callable[[], Any]:
        return lambda: module.FlashDiffusion(points, points, values, beta=1.0)

    return Row(
        "peers/FlashDiffusion product",
        f"N={N} d=3 r=4, beta=1",
        ours=lambda: FlashDiffusion(X, X, V, beta=1.0, normalize="none"),
        checked=lambda: FlashDiffusion(x, x, v, beta=1.0, normalize="none"),
        exact=lambda: torch.exp(-torch.cdist(x.double(), x.double()).square()) @ v.double(),
        peers={
            "flashdiffusion 0.1.2 (fp64)": published.peer("flashdiffusion", theirs, "kernel"),
            "pykeops": peer("pykeops.torch", keops),
        },
        once=True,
    )


def _roll(N: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    t = 1.5 * np.pi * (1 + 2 * rng.random(N))
    X = np.stack((t * np.cos(t), 21 * rng.random(N), t * np.sin(t)), 1)
    return (X - X.mean(0)) / X.std()


def _map(quick: bool) -> Row:
    N, beta, k = 500 if quick else 2000, 20.0, 4
    X = _roll(N)

    def ours(points: np.ndarray) -> Any:
        return DiffusionMap(beta, alpha=0.5, n_components=k).fit(points)

    def exact() -> Tensor:
        few = torch.from_numpy(_roll(300))
        K = torch.exp(-beta * torch.cdist(few, few).square())
        K = K / K.sum(1).outer(K.sum(1)).sqrt()
        scale = K.sum(1).rsqrt()
        return torch.linalg.eigvalsh(scale[:, None] * K * scale).flip(0)[1 : k + 1]

    def pydiffmap(module: Any) -> Callable[[], Any]:
        make = module.DiffusionMap.from_sklearn
        # every point a neighbour: the whole kernel, as ours
        return lambda: make(alpha=0.5, k=N, epsilon=1 / (4 * beta), n_evecs=k).fit(X)

    def spectral(module: Any) -> Callable[[], Any]:
        make = module.SpectralEmbedding
        return lambda: make(k, affinity="rbf", gamma=beta, random_state=0).fit(X)

    def datafold(module: Any) -> Callable[[], Any]:
        kernel = module.pcfold.GaussianKernel(epsilon=1 / (4 * beta))
        make = module.dynfold.DiffusionMaps
        return lambda: make(kernel, n_eigenpairs=k + 1, alpha=0.5).fit(module.pcfold.PCManifold(X))

    def published_map(module: Any) -> Callable[[], Any]:
        make = module.DiffusionMap
        return lambda: make(beta=beta, alpha=0.5, n_components=k).fit(X).transform()

    return Row(
        "peers/DiffusionMap.fit",
        f"swiss roll, N={N}, {k} components, beta={beta:g}",
        ours=lambda: ours(X),
        checked=lambda: torch.from_numpy(
            np.asarray(ours(_roll(300)).eigenvalues_, dtype=np.float32)
        ),
        exact=exact,
        peers={
            "flashdiffusion 0.1.2": published.peer("flashdiffusion", published_map, "dmap"),
            "pydiffmap 0.2.0.1": peer("pydiffmap.diffusion_map", pydiffmap),
            "scikit-learn SpectralEmbedding": peer("sklearn.manifold", spectral),
            "datafold": peer("datafold", datafold),
        },
        once=True,
    )


def rows(device: torch.device, quick: bool) -> Iterator[Row]:
    torch.manual_seed(0)
    yield _attention(device, quick)
    yield _window(device, quick)
    yield _language_model(device, quick)
    yield _memory(device, quick)
    yield _product(device, quick)
    if device.type == "cpu":
        yield _map(quick)
