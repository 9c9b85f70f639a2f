"""Is the input legal? Arrays become tensors here, and nowhere else."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_kernels import checks

from ._problem import Score

# What comes in as numpy goes out as numpy, and a tensor as a tensor.
Points = TypeVar("Points", NDArray[Any], Tensor)

SCORES = ("sqeuclidean", "dot", "cosine", "l1")
NORMALIZE = ("auto", "symmetric", "row", "none")
PRECISIONS = ("auto", "float32", "mixed", "float64")


def plain(name: str, x: Any) -> None:
    """Refuse what numpy would take for an array of numbers, and what it would not, by its name."""
    if isinstance(x, np.ma.MaskedArray):
        masked = int(np.ma.count_masked(x))
        if masked:
            checks.fail(
                name,
                "have no masked values",
                f"{masked} of {x.size} masked",
                "leave out those rows, or fill the values in: behind a mask stands any number",
            )
    for attribute, advice in (
        ("xyz", ".xyz (nm), or .xyz of each chunk"),
        ("obsm", ".X, or .obsm['X_pca']"),
        ("positions", ".positions.copy() of each frame"),
        ("trajectory", ".trajectory"),
    ):
        # a column of a data frame may have any name
        if (
            hasattr(x, attribute)
            and not isinstance(x, (np.ndarray, Tensor))
            and not hasattr(x, "iloc")
        ):
            checks.fail(name, "be an array", type(x).__name__, f"pass {advice}", error=TypeError)


def scored(score_mod: Callable[[Tensor, Tensor], Any], q: Tensor, k: Tensor) -> Tensor:
    """score_mod of q (t, 1, d) and k (1, u, d), which must be (t, u)."""
    s, wanted = score_mod(q, k), (q.shape[0], k.shape[1])
    if not isinstance(s, Tensor) or s.shape != wanted:
        got = tuple(s.shape) if isinstance(s, Tensor) else type(s).__name__
        raise ValueError(f"`score_mod` must return a tensor of shape (t, u) = {wanted}, got {got}")
    return s


def no_mask(name: str, rows: np.ndarray) -> None:
    if rows.dtype.kind == "b":
        checks.fail(name, "hold indices", "a boolean mask", f"pass np.flatnonzero({name})")


def as_tensor(name: str, x: Any) -> Tensor:
    """A numpy array, or anything np.asarray takes as numbers, or a tensor -> floating tensor."""
    plain(name, x)
    if isinstance(x, Tensor):
        if x.layout != torch.strided:
            got = str(x.layout)
            checks.fail(name, "be dense", got, "pass x.to_dense()", error=TypeError)
        checks.floating(name, x)
        if x.requires_grad and torch.is_grad_enabled():
            checks.fail(name, "not require grad", "requires_grad=True", "pass x.detach()")
        return x.detach()
    if hasattr(x, "toarray") and not isinstance(x, np.ndarray):
        checks.fail(name, "be dense", type(x).__name__, "pass x.toarray()", error=TypeError)
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        checks.fail(name, "be real numbers", f"dtype {array.dtype}", error=TypeError)
    if array.dtype not in (np.float16, np.float32, np.float64):
        array = array.astype(np.float64)
    # from_numpy wants positive strides and native byte order
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("="), order="C"))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the caller's line, however many of our and scikit-learn's calls lie between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _is_library(frame.f_globals.get("__name__", "")):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)


def _is_library(module: str) -> bool:
    return module.split(".")[0] in ("flashdiffusion", "sklearn")


def warn_unconverged(message: str) -> None:
    # scikit-learn is loaded where it is needed: it takes longer than all else together
    from sklearn.exceptions import ConvergenceWarning

    warn(message, ConvergenceWarning)


@overload
def like_input(x: Tensor, original: Tensor) -> Tensor: ...


@overload
def like_input(x: Tensor, original: np.ndarray) -> np.ndarray: ...


def like_input(x: Tensor, original: Tensor | np.ndarray) -> Tensor | np.ndarray:
    """Give a tensor back as the kind of array that came in."""
    return x if isinstance(original, Tensor) else x.cpu().numpy()


def as_array(x: Tensor) -> np.ndarray:
    """The bytes of a tensor, whatever its dtype: for a checksum."""
    return x.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()


def positive(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        checks.fail(name, "be a number", type(value).__name__, error=TypeError)
    number = float(value)
    if not (number > 0.0 and math.isfinite(number)):
        checks.fail(name, "be positive and finite", number)
    return number


def alpha_range(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        checks.fail("alpha", "be a number", type(value).__name__, error=TypeError)
    if not 0.0 <= float(value) <= 1.0:
        checks.fail("alpha", "be in [0, 1]", value, "0 keeps the density, 1 removes it")
    return float(value)


def kernel_options(
    beta: Any, score_mod: str | Callable[..., Tensor] | None, precision: Any
) -> tuple[float, Score]:
    """beta and the score by its name, or as the caller's function, if these are legal."""
    if not callable(score_mod):
        checks.in_set("score_mod", score_mod, (None, *SCORES))
    checks.in_set("precision", precision, PRECISIONS)
    beta = positive("beta", beta)
    return beta, "sqeuclidean" if score_mod is None else score_mod


def finite(name: str, x: Tensor) -> None:
    if checks.reads_values(x) and not bool(torch.isfinite(x).all()):
        checks.fail(name, "be finite", "NaN or inf")


def doob(given: Any, n_keys: int, like: Tensor) -> Tensor:
    """h (M,) over the keys, positive -> float64 tensor."""
    h = as_tensor("h", given).to(like.device, torch.float64)
    checks.shape("h", h, (n_keys,), lambda: f"({n_keys},), one value per key")
    if checks.reads_values(h) and not bool(((h > 0) & torch.isfinite(h)).all()):
        checks.fail("h", "be positive and finite", f"values down to {float(h.min())}")
    return h


def scale(name: str, value: Any, points: Tensor) -> Tensor:
    """(N,) finite scales of the points -> float64; ones for None."""
    if value is None:
        return torch.ones(len(points), dtype=torch.float64, device=points.device)
    found = as_tensor(name, value).to(points.device, torch.float64)
    checks.shape(name, found, (len(points),), lambda: f"({len(points)},), one per point")
    finite(name, found)
    return found


def points_and_values(
    Q: Any, K: Any, V: Any, names: tuple[str, str] = ("Q", "K")
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Q (N, d), K (M, d), V (M,) or (M, r) of one dtype and device; and whether Q equals K."""
    first, second = names
    q = as_tensor(first, Q)
    k = q if K is Q else as_tensor(second, K)
    v = as_tensor("V", V)
    checks.shape(first, q, (None, None), "(N, d)")
    checks.shape(second, k, (None, q.shape[1]), lambda: f"(M, d={q.shape[1]}) like {first}")
    if v.dim() not in (1, 2) or v.shape[0] != k.shape[0]:
        checks.fail("V", f"have shape ({k.shape[0]},) or ({k.shape[0]}, r)", tuple(v.shape))
    checks.same_device(**{first: q, second: k, "V": v})
    checks.same_dtype(**{first: q, second: k, "V": v})
    finite(first, q)
    if k is not q:
        finite(second, k)
    same = k is q or (q.shape == k.shape and torch.equal(q, k))
    return q, k, v, same
