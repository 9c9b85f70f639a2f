"""Distances and neighbours between two sets of points, a tile at a time: nothing of size N x M.

`knn` is exact. A matrix product proposes `k + slack` candidates per row, the candidates' values are
computed again in float64 from differences, and an error bound decides whether a better point can
have been missed. Rows where it can are searched again with a float64 product, and what is still
undecided (true ties) is searched without any product. Equal values are ordered by index.
"""

import math

import torch
from torch import Tensor

from . import checks, device, dispatch, native
from .native import neighbours

__all__ = ["METRICS", "dot_tile", "knn", "sqdist_tile"]

METRICS = ("sqeuclidean", "dot", "cosine")

# Elements of the (rows, candidates, D) buffer in which candidates are computed exactly: 16 MB, and
# what the second-level cache of a CPU holds.
_EXACT_BUDGET = 1 << 21
_CACHED_BUDGET = 1 << 17
_ROWS_PER_LAUNCH = 1 << 16


def _working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Sums of half types are taken in float32, all others in their own dtype."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def dot_tile(x: Tensor, y: Tensor) -> Tensor:
    """Dot products of every row of x with every row of y, out_ij = x_i . y_j.

    Args:
        x: (n, D), floating. Half types are multiplied in float32.
        y: (m, D), same dtype.

    Returns:
        (n, m), float32 for half types, else x's dtype.
    """
    dtype = _working_dtype(x.dtype)
    return x.to(dtype) @ y.to(dtype).mT


def sqdist_tile(x: Tensor, y: Tensor) -> Tensor:
    """Squared distances of every row of x to every row of y, out_ij = |x_i - y_j|^2 >= 0.

    One matrix product: |x|^2 + |y|^2 - 2 x.y after both are shifted by y's mean, so that points far
    from the origin lose nothing. The error is about eps * (|x|^2 + |y|^2) after the shift.

    Args:
        x: (n, D), floating. Half types are computed in float32.
        y: (m, D), same dtype.

    Returns:
        (n, m), float32 for half types, else x's dtype. Differentiable.

    Example:
        >>> sqdist_tile(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.0, 1.0]]))
        tensor([[25.,  1.]])
    """
    dtype = _working_dtype(x.dtype)
    if y.shape[0] == 0:
        return x.new_zeros((x.shape[0], 0), dtype=dtype)
    x, y = x.to(dtype), y.to(dtype)
    centre = y.detach().mean(0)
    x, y = x - centre, y - centre
    x_sq, y_sq = (x * x).sum(-1, keepdim=True), (y * y).sum(-1)
    return (x_sq + y_sq - 2.0 * (x @ y.mT)).clamp(min=0.0)


def _check(X: Tensor, k: int, Y: Tensor | None, metric: str, tile: int, exclude_self: bool) -> None:
    for name, x in ({"X": X} if Y is None else {"X": X, "Y": Y}).items():
        checks.floating(name, x)
        checks.shape(name, x, (None, None), "(N, D)")
        if not math.isfinite(_magnitude(x)):
            checks.fail(name, "be finite", "NaN or inf")
    if Y is not None:
        if exclude_self:
            checks.fail("exclude_self", "be False when `Y` is given", True)
        checks.shape("Y", Y, (None, X.shape[1]), f"(M, {X.shape[1]}) like X")
        checks.same_dtype(X=X, Y=Y)
        checks.same_device(X=X, Y=Y)
    checks.in_set("metric", metric, METRICS)
    checks.positive_int("tile", tile)
    checks.positive_int("k", k)
    most = (X if Y is None else Y).shape[0] - int(exclude_self)
    if k > most:
        checks.fail("k", f"be at most {most}, the number of points to choose from", k)


def _exact_scores(x: Tensor, y: Tensor, euclidean: bool) -> Tensor:
    """Smaller is nearer, float64: x (n, 1, D), y (n or 1, c, D) -> (n, c). Every path uses it."""
    if euclidean:
        diff = x - y
        return (diff * diff).sum(-1)
    return -(x * y).sum(-1)


def _sort_by_score_then_index(scores: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Ascending scores, equal scores by ascending index, along the last dim."""
    index, order = index.sort(dim=-1)
    scores, order = scores.gather(-1, order).sort(dim=-1, stable=True)
    return scores, index.gather(-1, order)


def _exact_rows(
    X: Tensor, rows: Tensor, Y: Tensor, k: int, euclidean: bool, exclude_self: bool
) -> tuple[Tensor, Tensor]:
    """Search without a matrix product. X, Y float64; rows (n,) of X -> scores, index (n, k)."""
    M, D = Y.shape
    width = max(1, min(M, _EXACT_BUDGET // max(1, D)))
    height = max(1, _EXACT_BUDGET // max(1, D * width))
    all_scores, all_index = [], []
    for part in rows.split(height):
        best = X.new_empty((len(part), 0))
        best_index = part.new_empty((len(part), 0))
        for j in range(0, M, width):
            y = Y[j : j + width]
            # [part, width]
            scores = _exact_scores(X[part, None], y[None], euclidean)
            index = torch.arange(j, j + len(y), device=X.device).expand(len(part), -1)
            if exclude_self:
                scores = scores.masked_fill(index == part[:, None], float("inf"))
            best, best_index = _sort_by_score_then_index(
                torch.cat((best, scores), 1), torch.cat((best_index, index), 1)
            )
            best, best_index = best[:, :k], best_index[:, :k]
        all_scores.append(best)
        all_index.append(best_index)
    return torch.cat(all_scores), torch.cat(all_index)


def _smallest(s: Tensor, n_keep: int) -> tuple[Tensor, Tensor]:
    """The n_keep smallest entries of each row, in any order: values and columns (n, n_keep).

    They lie in the n_keep groups whose minima are smallest, so the costly selection sees the minima
    and then n_keep groups, not the row. Group g is columns g, g + n_groups, ...: the minima are one
    vectorised pass.
    """
    n, width = s.shape
    group = max(1, min(64, int((width / n_keep) ** 0.5)))
    n_groups = width // group
    if group < 4:
        return s.topk(n_keep, dim=-1, largest=False, sorted=False)
    minima = s[:, : group * n_groups].view(n, group, n_groups).amin(1)
    chosen = minima.topk(n_keep, dim=-1, largest=False, sorted=False).indices
    members = torch.arange(0, group * n_groups, n_groups, device=s.device)
    # [n, group * n_keep], and the columns that fill no group
    columns = (chosen[:, None, :] + members[:, None]).flatten(1)
    rest = torch.arange(group * n_groups, width, device=s.device).expand(n, -1)
    columns = torch.cat((columns, rest), 1)
    values, order = s.gather(1, columns).topk(n_keep, dim=-1, largest=False, sorted=False)
    return values, columns.gather(1, order)


def _candidate_scores(x: Tensor, Y: Tensor, index: Tensor, euclidean: bool) -> Tensor:
    """Exact scores of x (n, D) against its own candidates Y[index]: (n, c)."""
    n, c = index.shape
    budget = _CACHED_BUDGET if x.is_cpu else _EXACT_BUDGET
    parts = max(1, budget // (c * max(1, x.shape[1])))
    return torch.cat(
        [
            _exact_scores(
                a[:, None], Y.index_select(0, i.reshape(-1)).view(len(a), c, -1), euclidean
            )
            for a, i in zip(x.split(parts), index.split(parts), strict=True)
        ]
    )


def _tiled_candidates(
    gram_x: Tensor,
    gram_y: Tensor,
    y_sq: Tensor,
    rows: Tensor,
    n_keep: int,
    tile: int,
    euclidean: bool,
    exclude_self: bool,
) -> tuple[Tensor, Tensor]:
    """The n_keep smallest y_sq_j - 2 x.y (or -x.y) of each of the rows, in any order."""
    M = gram_y.shape[0]
    x = gram_x[rows]
    # few long rows: one selection per row, and products that are still large
    width = min(M, max(16 * tile, n_keep))
    best = x.new_empty((len(rows), 0))
    best_index = rows.new_empty((len(rows), 0))
    for j in range(0, M, width):
        y = gram_y[j : j + width]
        if euclidean:
            # [rows, width]: |x - y|^2 - |x|^2, the row's own constant comes last
            s = torch.addmm(y_sq[j : j + width], x, y.mT, alpha=-2.0)
        else:
            s = (x @ y.mT).neg_()
        if exclude_self:
            here = (rows >= j) & (rows < j + len(y))
            s[here, rows[here] - j] = float("inf")
        s, index = _smallest(s, min(n_keep, len(y)))
        best = torch.cat((best, s), 1)
        best_index = torch.cat((best_index, index + j), 1)
        if best.shape[1] > n_keep:
            best, order = best.topk(n_keep, dim=-1, largest=False, sorted=False)
            best_index = best_index.gather(1, order)
    return best, best_index


def _product_rows(
    gram_x: Tensor,
    gram_y: Tensor,
    X: Tensor,
    rows: Tensor,
    Y: Tensor,
    k: int,
    slack: int,
    tile: int,
    euclidean: bool,
    exclude_self: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Search by products in gram's dtype -> scores (n, k), index (n, k), proven (n,) bool."""
    M = len(gram_y)
    n_keep = min(M, k + slack)
    y_sq = (gram_y * gram_y).sum(-1)
    # three tensor-core passes keep two bits less
    loss = 2 if backend == "triton" else 1
    height = max(1, tile * tile // min(M, max(16 * tile, n_keep)))
    if backend == "triton":
        height = _ROWS_PER_LAUNCH
    all_scores, all_index, all_proven = [], [], []
    for part in rows.split(height):
        if backend == "triton":
            from .triton import knn as kernel

            x = gram_x[part] * (2.0 if euclidean else 1.0)
            best, best_index = kernel.launch_knn_forward(
                x,
                gram_y,
                y_sq if euclidean else torch.zeros_like(y_sq),
                n_keep,
                int(part[0]) if exclude_self else None,
            )
        else:
            best, best_index = _tiled_candidates(
                gram_x, gram_y, y_sq, part, n_keep, tile, euclidean, exclude_self
            )
        scores = _candidate_scores(X[part], Y, best_index, euclidean)
        # no candidate: the excluded point, or fewer keys than slots
        scores = scores.masked_fill(best == float("inf"), float("inf"))
        scores, index = _sort_by_score_then_index(scores, best_index)
        worst = best.max(dim=-1).values
        proven = _is_proven(scores[:, k - 1], worst, gram_x[part], y_sq, euclidean, loss)
        all_proven.append(proven | (n_keep == M))
        all_scores.append(scores[:, :k])
        all_index.append(index[:, :k])
    return torch.cat(all_scores), torch.cat(all_index), torch.cat(all_proven)


def _is_proven(
    last: Tensor, worst: Tensor, x: Tensor, y_sq: Tensor, euclidean: bool, loss: int = 1
) -> Tensor:
    """Whether no point outside of the candidates of a row can be nearer than its k-th one.

    last (n,): the exact score of that one. worst (n,): the largest y_sq_j - 2 x.y (or -x.y) among
    the candidates, from products of x (n, D) in its dtype, which lose `loss` times its epsilon.
    """
    x_sq = x.square().sum(-1)
    # |computed - exact| <= (2 D + 8) eps (|x|^2 + |y|^2): dot products of length D and two sums;
    # the rest covers the rounding of x and y
    eps = torch.finfo(x.dtype).eps * loss
    bound = (2 * x.shape[1] + 8) * eps * (x_sq + y_sq.max()).double()
    least = worst.double() + x_sq.double() if euclidean else worst.double()
    return least - bound > last


def _native_rows(
    gram_x: Tensor,
    gram_y: Tensor,
    X: Tensor,
    Y: Tensor,
    k: int,
    n_keep: int,
    euclidean: bool,
    exclude_self: bool,
    in_double: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`_product_rows` of all rows by the native library.

    in_double: whether the scores are those of `_exact_scores` to the last bit, which no rounding to
    a narrower dtype hides.
    """
    y_sq = (gram_y * gram_y).sum(-1)
    scores, index, worst = neighbours.search(
        gram_x, gram_y, y_sq if euclidean else None, (X, Y), k, n_keep, exclude_self
    )
    if in_double:
        scores = _candidate_scores(X, Y, index, euclidean)
        scores, index = _sort_by_score_then_index(scores, index)
    return scores, index, _is_proven(scores[:, -1], worst, gram_x, y_sq, euclidean)


def _magnitude(x: Tensor) -> float:
    """max |x|, in one pass; NaN if there is one, 0 of nothing."""
    if not x.numel():
        return 0.0
    least, most = x.aminmax()
    return float(torch.maximum(-least, most))


def _exponent(x: Tensor) -> int:
    """e with max |x| in [2^(e-1), 2^e); 0 where that is 0 or not finite."""
    most = _magnitude(x)
    return math.frexp(most)[1] if math.isfinite(most) else 0


def _scaled(x: Tensor, y: Tensor, euclidean: bool) -> tuple[Tensor, Tensor, int]:
    """x and y by powers of two, and the exponent that brings their scores back.

    Then Y, as the products see it, is of size 1: the bound on what float32 rounds knows nothing of
    numbers that are too small for it. Powers of two change no bit of what is compared.
    """
    at_x = _exponent(x)
    at_y = at_x if x is y else _exponent(y)
    if euclidean:
        spread = _exponent(y - y.mean(0)) if len(y) else 0
        at_x = at_y = max(spread, max(at_x, at_y) - 500)  # nothing overflows
    at_x, at_y = (min(max(e, -1000), 1000) for e in (at_x, at_y))
    scaled = x * math.ldexp(1.0, -at_x)
    return scaled, scaled if x is y else y * math.ldexp(1.0, -at_y), at_x + at_y


def _unit_rows(x: Tensor) -> Tensor:
    """Rows of length 1, zeros stay. By a power of two first: squares of small numbers underflow."""
    if x.shape[-1]:
        exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent.clamp(-1000, 1000)
        x = x * torch.ldexp(torch.ones_like(exponent, dtype=x.dtype), -exponent)
    return torch.nn.functional.normalize(x, dim=-1, eps=0.0).nan_to_num(nan=0.0)


def _knn_reasons(x: Tensor, y: Tensor, n_keep: int) -> dict[str, str | None]:
    """Backend -> why it cannot propose the candidates, or None; in order of preference."""
    reason = device.triton_why_not(x, y)
    if reason is None:
        from .triton import knn as kernel

        reason = kernel.why_not(x, y, n_keep)
    if device.target(x).is_gpu:
        return {"triton": reason, "cpu": None, "native": native.why_not(x, y)}
    return {"native": native.why_not(x, y), "cpu": None, "triton": reason}


@torch.no_grad()
def knn(
    X: Tensor,
    k: int,
    *,
    Y: Tensor | None = None,
    metric: str = "sqeuclidean",
    tile: int = 1024,
    exclude_self: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The k nearest rows of Y for each row of X: exact, in O(N D + tile^2) memory.

    metric "sqeuclidean" takes the k smallest |x - y|^2, ascending; "dot" the k largest x.y and
    "cosine" the k largest x.y / (|x| |y|) (0 where a vector is zero), descending. Values are those
    of float64 arithmetic on the given numbers, rounded once; equal values are ordered by index.

    Args:
        X: (N, D) floating, finite.
        k: neighbours per row, 1 <= k <= rows of Y (minus one with exclude_self).
        Y: (M, D), same dtype and device; None searches X itself.
        metric: "sqeuclidean", "dot" or "cosine".
        exclude_self: with Y=None, row i is not its own neighbour (its duplicates still are).
        tile: products are taken tile * tile entries at a time; performance only.
        backend: what proposes candidates in float32: "auto", "native" (the compiled library, on a
            CPU), "cpu" (tiled torch, any device) or "triton" (at most 64 candidates, about 1.25 k,
            and 256 dimensions). Values and order do not depend on it: both are checked in float64.

    Returns:
        values (N, k) in X's dtype and indices (N, k) int64. Not differentiable: gather rows by the
        indices for a gradient.

    Raises:
        ValueError, TypeError: shapes, dtypes, k or metric as described, or NaN/inf in the points.

    Example:
        >>> knn(torch.tensor([[0.0], [1.0], [3.0]]), 1, exclude_self=True)[1]
        tensor([[1],
                [0],
                [1]])
    """
    _check(X, k, Y, metric, tile, exclude_self)
    euclidean = metric == "sqeuclidean"
    exact_x = X.double()
    exact_y = exact_x if Y is None else Y.double()
    shift = 0
    if metric == "cosine":
        exact_x = _unit_rows(exact_x)
        exact_y = exact_x if Y is None else _unit_rows(exact_y)
    else:
        exact_x, exact_y, shift = _scaled(exact_x, exact_y, euclidean)
    N, M = X.shape[0], exact_y.shape[0]
    scores = exact_x.new_empty((N, k))
    indices = torch.empty((N, k), dtype=torch.int64, device=X.device)
    rows = torch.arange(N, device=X.device)
    centre = exact_y.mean(0) if euclidean else 0.0
    slack = max(8, k // 4) + int(exclude_self)
    chosen = dispatch.choose(
        "shared_kernels::knn", backend, _knn_reasons(exact_x, exact_y, k + slack)
    )
    # float32 first for float64 points too: what it cannot prove, float64 products decide
    for dtype in (torch.float32, torch.float64):
        if len(rows) == 0 or k + slack >= M:
            break
        gram_x = (exact_x - centre).to(dtype)
        gram_y = gram_x if Y is None else (exact_y - centre).to(dtype)
        if not all(math.isfinite(_magnitude(x)) for x in {gram_x, gram_y}):
            continue  # centred values beyond float32's range
        if chosen == "native" and dtype == torch.float32:
            found, index, proven = _native_rows(
                gram_x,
                gram_y,
                exact_x,
                exact_y,
                k,
                k + slack,
                euclidean,
                exclude_self,
                X.dtype == torch.float64,
            )
        else:
            found, index, proven = _product_rows(
                gram_x,
                gram_y,
                exact_x,
                rows,
                exact_y,
                k,
                slack,
                tile,
                euclidean,
                exclude_self,
                chosen if dtype == torch.float32 else "cpu",
            )
        done = rows[proven]
        scores[done], indices[done] = found[proven], index[proven]
        rows = rows[~proven]
    if len(rows) > 0:
        scores[rows], indices[rows] = _exact_rows(
            exact_x, rows, exact_y, k, euclidean, exclude_self
        )
    for half in (shift // 2, shift - shift // 2):  # 2^shift itself may overflow
        scores = scores * math.ldexp(1.0, half)
    # + 0.0 turns the -0.0 of a negated zero product into 0.0
    return (scores if euclidean else -scores + 0.0).to(X.dtype), indices
