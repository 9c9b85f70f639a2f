"""The primitive: a diffusion operator times vectors, never the operator itself."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from shared_kernels import checks, distributed, ops

from . import _checks, _reference
from ._checks import Points
from ._operator import Kernel, Reversible, explained
from ._problem import Problem, Score

_BACKENDS = ("auto", "native", "torch", "cpu", "triton", "reference")
# Weights that span more than this factor go through logarithms.
_WIDE = 1e30


def FlashDiffusion(  # noqa: N802 - the name of the primitive
    Q: Any,
    K: Any,
    V: Points,
    beta: float = 1.0,
    alpha: float = 0.5,
    h: Any = None,
    *,
    score_mod: Score | None = None,
    normalize: str = "auto",
    rscale_q: Any = None,
    rscale_k: Any = None,
    tile: int | None = None,
    precision: str = "auto",
    tile_skip_tol: float | None = None,
    backend: str = "auto",
    group: Any = None,
) -> Points:
    """Multiply vectors by the diffusion operator between two point sets, in O(N tile) memory.

    With K_ij = exp(-beta score(q_i, k_j)), r_i = sum_j K_ij, c_j = sum_i K_ij,
    Ka_ij = K_ij / (r_i^alpha c_j^alpha) and d_i = sum_j Ka_ij the result is

    - "symmetric": M V, M = D^-1/2 Ka D^-1/2 (diffusion maps; Q equal to K),
    - "row": P V, P = D^-1 Ka, whose rows are probabilities; with h, Doob's transform
      P^h_ij = P_ij h_j / (P h)_i,
    - "none": K V, unnormalised (alpha does not matter, h must be None).

    alpha = 0 with "row" is softmax(-beta score) V: attention. Rows are shifted by their maximum, so
    a query far from every key gets the weights of its nearest keys and not 0/0.

    Args:
        Q: (N, d) points or queries; numpy or torch, floating.
        K: (M, d), same dtype.
        V: (M,) or (M, r), same dtype.
        beta: inverse temperature, > 0, in 1 / (unit of score).
        alpha: power of the density that is divided out, in [0, 1].
        h: (M,) positive Doob function over the keys; its scale does not matter.
        score_mod: None or "sqeuclidean" |q-k|^2, "dot" -q.k, "cosine" 1 - cos(q, k), "l1"
            sum |q-k|, or a callable of torch tensors x (t, 1, d), y (1, u, d) -> (t, u).
        normalize: "auto" is "symmetric" when Q equals K by value and h is None, else "row"; and
            "none" with rscale_q or rscale_k.
        rscale_q, rscale_k: (N,), (M,) scales of your own: rscale_q_i sum_j K_ij rscale_k_j h_j V_j.

    Performance:
        tile: rows and columns of a tile.
        precision: "float32", "mixed" (float64 exponents, float32 sums), "float64"; "auto" takes
            float64 for float64 input, else float32 unless beta |x|^2 is so large that the exponent
            would lose digits ("mixed").
        tile_skip_tol: drop pairs of tiles whose kernel entries are all smaller (|x-y|^2 only):
            |error_i| <= tile_skip_tol * sum_j |V_j| for "none", and relative to sums >= 1 where
            Q equals K. None drops nothing.
        backend: "auto", "native" (compiled loops on a CPU; a score that has a name, rows only where
            Q equals K), "torch" (tiled, on any device; alias "cpu"), "triton" (|x-y|^2 in float32,
            rows only where Q equals K) or "reference" (the dense formula, O(N M) memory, one
            process); what cannot run is refused with the reason.
        group: processes of torch.distributed that share the work: "world" or a ProcessGroup. All
            call with the same arguments; tile pairs are dealt in turn, the partial sums meet in an
            all_reduce per sweep, and every rank gets the whole result.

    Returns:
        (N,) or (N, r) as V, of V's kind (numpy or torch), dtype and device. Not differentiable.

    Raises:
        ValueError, TypeError: what is not as described; NaN or inf in the points; arguments that
            differ between ranks.
        RuntimeError: another rank has died.
        NotImplementedError: the backend asked for cannot run this.

    Example:
        >>> X = np.random.default_rng(0).standard_normal((100, 3))
        >>> np.allclose(FlashDiffusion(X, X, np.ones(100), normalize="row"), 1.0)
        True

    Source: Coifman and Lafon, "Diffusion maps" (2006), section 3.
    """
    ranks = distributed.resolve(group)
    with distributed.agreement(ranks) as agreed:
        q, k, v, same = _checks.points_and_values(Q, K, V)
        beta, score = _checks.kernel_options(beta, score_mod, precision)
        alpha = _checks.alpha_range(alpha)
        checks.in_set("normalize", normalize, _checks.NORMALIZE)
        if tile is not None:
            checks.positive_int("tile", tile)
            tile = int(tile)
        if tile_skip_tol is not None:
            tile_skip_tol = _checks.positive("tile_skip_tol", tile_skip_tol)
        scaled = rscale_q is not None or rscale_k is not None
        if scaled:
            checks.in_set("normalize", normalize, ("auto", "none"))
            normalize = "none"
            left = _checks.scale("rscale_q", rscale_q, q)
            right = _checks.scale("rscale_k", rscale_k, k)
        if h is not None:
            if normalize == "none" and not scaled:
                checks.fail("h", "be None with normalize='none'", "an array")
            h = _checks.doob(h, k.shape[0], k)
        if scaled:
            right = right if h is None else right * h
            v, h = _scaled(right, v).to(v.dtype), None
        if normalize == "auto":
            normalize = "symmetric" if same and h is None else "row"
        checks.in_set("backend", backend, _BACKENDS)
        if backend == "reference" and ranks is not None:
            checks.fail("group", "be None with backend='reference'", repr(group))
        if normalize == "symmetric" and not same:
            checks.fail("normalize", "not be 'symmetric' where Q differs from K", "'symmetric'")
        if ranks is not None:
            own = left if scaled else None
            arrays = [_checks.as_array(t) for t in (q, k, v, h, own) if t is not None]
            options = (beta, alpha, normalize, precision, tile, tile_skip_tol, backend)
            named = score_mod if not callable(score_mod) else "callable"
            agreed.equal["Q"] = distributed.fingerprint(*arrays, options, named)
    problem = Problem(q, None if same else k, beta, score, precision=precision)
    kernel = Kernel(problem, tile, tile_skip_tol, backend, ranks)
    kernel.has_reference = ranks is None
    if kernel.chosen(_product(problem, normalize, h)) == "reference":
        double = q.dtype == torch.float64 or precision in ("mixed", "float64")
        dtype = torch.float64 if double else torch.float32
        wide = [t.to(dtype) for t in (q, k, v)]
        h = None if h is None else h.to(dtype)
        if callable(score_mod):
            score_mod = functools.partial(_checks.scored, score_mod)
        with ops.full_precision(q.device.type):
            out = _reference.flash_diffusion(
                *wide, beta, alpha, h, score_mod=score_mod, normalize=normalize
            )
        out = _scaled(left, out) if scaled else out
        return _checks.like_input(out.to(v.dtype), V)
    columns = v[:, None] if v.dim() == 1 else v
    with torch.no_grad():
        out = _apply(kernel, columns, alpha, h, normalize)
        out = left[:, None] * out if scaled else out
    return _checks.like_input((out[:, 0] if v.dim() == 1 else out).to(v.dtype), V)


def prepass_rowsum(
    Q: Any, K: Any, beta: float, weights_k: Any = None, tile: int | None = None
) -> Any:
    """sum_j exp(-beta |q_i - k_j|^2) w_j: (N,), of Q's kind and dtype; w = 1 if not given.

    A name of the published 0.1.2, for `FlashDiffusion(Q, K, w, beta, normalize="none")`.

    Example:
        >>> prepass_rowsum(np.zeros((2, 3)), np.zeros((5, 3)), 1.0)
        array([5., 5.])
    """
    q = _checks.as_tensor("Q", Q)
    k = q if K is Q else _checks.as_tensor("K", K)
    w = q.new_ones(len(k)) if weights_k is None else _checks.as_tensor("weights_k", weights_k)
    sums = FlashDiffusion(q, k, w.to(q), beta, normalize="none", tile=tile)
    return _checks.like_input(sums, Q)


def explain(function: Any, *args: Any, **kwargs: Any) -> str:
    """Which backend would run ``function(*args, **kwargs)``, which others could, and why not.

    Args:
        function: a function of this package, or any that runs one; then the arguments of a call to
            it, which is made. Points Q, with K, beta, score_mod and precision as FlashDiffusion
            takes them, stand for a product and one of rows that are shifted by their maximum.

    Returns:
        One line per backend, for each kind of product in the call.

    Raises:
        ValueError: the call multiplies by no kernel.

    Example:
        >>> x = np.zeros((3, 2))
        >>> "reference: can run" in explain(FlashDiffusion, x, x, x)
        True
    """
    if not callable(function):
        return _explain_points(function, *args, **kwargs)
    with explained() as found:
        function(*args, **kwargs)
    if not found:
        name = getattr(function, "__name__", type(function).__name__)
        checks.fail("function", "multiply by a kernel of flashdiffusion", name)
    return "\n".join(found.values())


def _explain_points(
    Q: Any,
    K: Any = None,
    beta: float = 1.0,
    *,
    score_mod: Score | None = None,
    precision: str = "auto",
) -> str:
    q, k, _, same = _checks.points_and_values(Q, Q if K is None else K, Q if K is None else K)
    beta, score = _checks.kernel_options(beta, score_mod, precision)
    kernel = Kernel(Problem(q, None if same else k, beta, score, precision=precision))
    kernel.has_reference = True
    return "\n".join(kernel.explain(product) for product in ("matvec", "softmax"))


def _product(problem: Problem, normalize: str, h: Tensor | None) -> str:
    """Which product the normalisation rests on: of entries as they are, or of shifted rows."""
    if normalize == "none" or (problem.same and problem.euclidean and _is_narrow(h)):
        return "matvec"
    return "softmax"


def _is_narrow(h: Tensor | None) -> bool:
    return h is None or h.numel() == 0 or float(h.max() / h.min()) < _WIDE


def _scaled(scale: Tensor, V: Tensor) -> Tensor:
    """Row i of V (N,) or (N, r) times scale_i, float64."""
    return (scale if V.dim() == 1 else scale[:, None]) * V.double()


def _apply(kernel: Kernel, V: Tensor, alpha: float, h: Tensor | None, normalize: str) -> Tensor:
    if normalize == "none":
        return kernel.matvec(V)
    if kernel.shape[0] == 0 or kernel.shape[1] == 0:
        return V.new_zeros(kernel.shape[0], V.shape[1])
    if _product(kernel.problem, normalize, h) == "matvec":
        reversible = Reversible.normalised(kernel, alpha, h)
        V = V.double()
        return reversible.apply(V) if normalize == "symmetric" else reversible.markov(V)
    if normalize == "symmetric":
        return _symmetric_in_logarithms(kernel, V, alpha, h)
    bias = column_bias(kernel, alpha, h)
    return kernel.softmax(V, bias)[0]


def column_bias(kernel: Kernel, alpha: float, h: Tensor | None) -> Tensor | None:
    """log(h_j c_j^-alpha): what multiplies column j of K before the rows are normalised."""
    bias = None if h is None else h.log()
    if alpha > 0.0:
        log_c = kernel.transposed().log_sum_exp()
        bias = -alpha * log_c + (0.0 if bias is None else bias)
    return bias


def _symmetric_in_logarithms(kernel: Kernel, V: Tensor, alpha: float, h: Tensor | None) -> Tensor:
    """M V for any score: its entries exp(e_ij + row_i + column_j) are at most about 1."""
    log_r = kernel.log_sum_exp()
    log_c = log_r if kernel.symmetric else kernel.transposed().log_sum_exp()
    log_h = 0.0 if h is None else h.log()
    row, column = log_h - alpha * log_r, log_h - alpha * log_c
    log_d = kernel.log_sum_exp(column) + row
    return kernel.biased(V, row - 0.5 * log_d, column - 0.5 * log_d)
