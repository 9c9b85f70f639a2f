"""weights(scale q k^T + mask) v without the (L, S) matrix, for softmax and any other normaliser.

q (B, H, L, D), k (B, H, S, D), v (B, H, S, D_v), each with B or 1 items. A mask is bool (True =
may be seen) or additive, and broadcasts to (B, H, L, S). softmax is
``scaled_dot_product_attention``; everything else runs over tiles of queries and computes a tile
again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from shared_kernels import checks, ops
from shared_kernels.native import association as native
from shared_kernels.native import instruction_set

from . import _checks, _ops, _separation
from ._call import Association, NeighbourAttention
from ._tiles import in_one_piece, row_tiles

# Scores held at once by the tiled paths, in elements (16 MB of fp32).
TILE = 1 << 22
# A convergence threshold at most this large changes a fixed number of steps by no more than itself,
# and is not looked at.
_IGNORED_EPS = 1e-3
# The update is a contraction near a fixed point; a normaliser for which it is not would never end.
MOST_STEPS = 10_000

# (weights, which of them may be above 0 or None for all) -> weights
Transform = Callable[[Tensor, Tensor | None], Tensor]
# (q, k) -> index (B or 1, L, K) and ok, of the stored patterns that each state may see
Neighbours = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class Rule(NamedTuple):
    """How scores become weights, and how often the state is updated before the read-out.

    scale: a number or one per head. transform: what follows the normaliser, at the read-out only.
    steps, eps: as for `iterate`. neighbours: the stored patterns that each state sees, None for
    all; then `backend` runs the association.
    """

    scale: float | Tensor = 1.0
    normalizer: _separation.Normalizer | None = None
    transform: Transform | None = None
    steps: int | Tensor | None = 0
    eps: float | Tensor = 1e-4
    dropout: float = 0.0
    neighbours: Neighbours | None = None
    backend: str = "auto"

    def scaled(self, q: Tensor) -> Tensor:
        if isinstance(self.scale, Tensor):
            return q * self.scale.to(q).view(-1, 1, 1)
        return q * self.scale


def batch_of(*tensors: Tensor) -> int:
    """The batch of tensors of B or 1 items each; none where one of them has none."""
    sizes = [x.shape[0] for x in tensors]
    return 0 if any(size == 0 for size in sizes) else max(sizes)


def merge_masks(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    """One mask from two; bool masks are True where a pattern may be seen, others are added."""
    if first is None or second is None:
        return second if first is None else first
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    if first.dtype == torch.bool:
        first, second = second, first
    if second.dtype == torch.bool:
        return first.masked_fill(~second, -torch.inf)
    return first + second


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, dropout_p: float = 0.0
) -> Tensor:
    """Weighted sum of v, (B, H, L, D_v). Queries do not see each other."""
    if rule.normalizer is None and rule.transform is None:
        return _fused(q, k, v, mask, rule, dropout_p)
    return _tiled(q, k, v, mask, rule, dropout_p)


def association_weights(q: Tensor, k: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """separation(scale q k^T + mask), (B, H, L, S)."""
    # not k.mT: a loop of an exported program takes that for a second tensor of the same memory
    scores = rule.scaled(q) @ k.transpose(-2, -1)
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if mask is not None:
        wide = wide.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else wide + mask
    weights = _separation.weights(wide, rule.normalizer)
    if rule.transform is not None:
        seen = mask if mask is None or mask.dtype == torch.bool else mask > _checks.MASKED
        weights = rule.transform(weights, seen)
    return weights.to(scores.dtype)


def _fused(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, dropout_p: float
) -> Tensor:
    scale = rule.scale
    if isinstance(scale, Tensor):
        q, scale = rule.scaled(q), 1.0
    B, D, D_v = batch_of(q, k, v), q.shape[-1], v.shape[-1]
    if q.shape[-2] == 0 or k.shape[-2] == 0:
        # sums over nothing: zeros, and zero gradients
        return ((q @ k.mT) @ v).expand(B, -1, -1, -1)
    if D != D_v:
        # the fused kernels want one head dim; zero columns change neither scores nor outputs
        wide = max(D, D_v)
        q, k, v = (F.pad(x, (0, wide - x.shape[-1])) for x in (q, k, v))
    q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    if mask is None and q.is_cpu:
        # torch's unmasked CPU kernel answers a NaN query with zeros: NaN in, NaN out of that row
        out = out + 0.0 * q.detach().amax(-1, keepdim=True)
    return out[..., :D_v] if D != D_v else out


def mask_rows(mask: Tensor | None, rows: slice) -> Tensor | None:
    """The mask of some queries."""
    if mask is None or mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    return mask[..., rows, :]


def _by_tiles(
    tile: Callable[..., Tensor],
    tiles: list[slice],
    args: Callable[[slice], tuple[Tensor | None, ...]],
) -> Tensor:
    """`tile` of each slice of the queries, one after the other, and again in the backward pass."""
    out = []
    for rows in tiles:
        given = args(rows)
        again = torch.is_grad_enabled() and any(
            x is not None and x.requires_grad for x in given[:3]
        )
        out.append(checkpoint(tile, *given, use_reentrant=False) if again else tile(*given))
    return torch.cat(out, 2)


def _tiled(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule, dropout_p: float
) -> Tensor:
    def tile(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = association_weights(q, k, mask, rule)
        return F.dropout(weights, dropout_p) @ v if dropout_p > 0.0 else weights @ v

    tiles = row_tiles(q.shape[-2], batch_of(q, k, v) * q.shape[1] * k.shape[-2], TILE)
    if len(tiles) == 1:
        return tile(q, k, v, mask)
    return _by_tiles(tile, tiles, lambda rows: (q[:, :, rows], k, v, mask_rows(mask, rows)))


def in_one_op(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, rule: Rule) -> Tensor | None:
    """All updates and the read-out by the op `association`, (B, H, L, D_v); None where it is not
    the quicker way: it knows softmax, and one association is as quick by PyTorch's attention.

    Half types stay with PyTorch's attention, which has the processor's own products for them.
    """
    knows_rule = (
        isinstance(rule.eps, float)
        and rule.eps <= _IGNORED_EPS
        and not isinstance(rule.scale, Tensor)
        and (rule.normalizer, rule.transform, rule.dropout) == (None, None, 0.0)
    )
    if not isinstance(rule.steps, int) or rule.steps < 1:
        return None
    if not knows_rule or torch.compiler.is_compiling() or in_one_piece():
        return None
    if not all(_is_eager(x) for x in (q, k, v, mask)):
        return None
    if {x.dtype for x in (q, k, v)} != {torch.float32} or ops.autocast_on(q.device.type):
        return None
    if native.why_not(q, k, v) is not None or instruction_set() == "base":
        return None  # PyTorch's products are quicker without AVX2
    if mask is not None and mask.requires_grad:
        return None
    B = batch_of(q, k, v)
    q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
    save = ops.wants_gradient(q, k, v)
    call = Association(q, k, v, mask, float(rule.scale), rule.steps, save)
    out: Tensor = _ops.association(call.check())
    return out


def _is_eager(x: Tensor | None) -> bool:
    """Whether a tensor has values, and neither forward mode nor torch.func looks at it."""
    if x is None:
        return True
    if isinstance(x, FakeTensor) or torch._C._functorch.is_functorch_wrapped_tensor(x):
        return False
    return forward_ad._current_level < 0


def iterate(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    rule: Rule,
    steps: int | Tensor | None,
    eps: float | Tensor,
) -> Tensor:
    """The state after ``steps`` updates q <- weights(q) k; None: until it stands still."""
    if isinstance(steps, int) and isinstance(eps, float) and eps <= _IGNORED_EPS:
        for _ in range(steps):
            q = attend(q, k, k, mask, rule)
        return q
    return _iterate_until(q, k, mask, rule, steps, eps)


def _iterate_until(
    q: Tensor,
    k: Tensor,
    mask: Tensor | None,
    rule: Rule,
    steps: int | Tensor | None,
    eps: float | Tensor,
) -> Tensor:
    """A head goes on while its largest ||xi - xi_old|| over the batch exceeds eps."""
    if torch.jit.is_tracing():
        checks.fail(
            "update_steps_max",
            "be an int for torch.jit.trace, with update_steps_eps of at most 1e-3",
            None,
            "a trace would repeat as many updates as its example took",
            NotImplementedError,
        )
    if 0 in (q.shape[0], q.shape[1], q.shape[2]):
        return q
    if not torch.compiler.is_compiling() and (q.is_meta or isinstance(q, FakeTensor)):
        # without values nothing converges; every number of updates has this shape
        return attend(q, k, k, mask, rule)
    H = q.shape[1]
    last = torch.as_tensor(-1 if steps is None else steps, device=q.device).expand(H)
    # weights are known to rounding only: a smaller threshold would never be met
    size = torch.ones((), dtype=torch.float64, device=q.device) * q.shape[-2]
    noise = 8 * torch.finfo(q.dtype).eps * size.sqrt()
    small = torch.maximum(torch.as_tensor(eps, device=q.device).double(), noise).expand(H)
    if torch.compiler.is_exporting():
        return _exported_until(q, k, mask, rule, last, small)
    before, n = None, 0
    while True:
        active = (n < last) | (last < 0)
        if before is not None:
            active = active & (change(before.detach(), q.detach(), k.detach(), mask, rule) > small)
        if _checks.is_batched(active):
            checks.fail(
                "update_steps_max",
                "be an int inside torch.func.vmap, with update_steps_eps of at most 1e-3",
                "a number of updates that the values decide",
                error=NotImplementedError,
            )
        if not bool(active.any()):
            return q
        if n == MOST_STEPS:
            raise RuntimeError(
                f"the association does not settle: {MOST_STEPS} updates and still moving; "
                "set update_steps_max"
            )
        before, n = q, n + 1
        q = torch.where(active[:, None, None], attend(q, k, k, mask, rule), q)


def _exported_until(
    q: Tensor, k: Tensor, mask: Tensor | None, rule: Rule, last: Tensor, small: Tensor
) -> Tensor:
    """The loop of `_iterate_until` inside an exported program; NaN where a head does not settle."""
    from torch._higher_order_ops.while_loop import while_loop

    def goes_on(q: Tensor, n: Tensor, active: Tensor) -> Tensor:
        return active.any() & (n < MOST_STEPS)

    def update(q: Tensor, n: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # [B, H, L, D], laid out like the first state
        new = torch.where(active[:, None, None], attend(q, k, k, mask, rule), q).contiguous()
        n = n + 1
        moves = change(q.detach(), new.detach(), k.detach(), mask, rule) > small
        return new, n, ((n < last) | (last < 0)) & moves

    n = torch.zeros((), dtype=torch.int64, device=q.device)
    B = batch_of(q, k)
    first = q.expand(B, -1, -1, -1).clone(memory_format=torch.contiguous_format)
    start = (first, n, (last > 0) | (last < 0))
    q, _, active = while_loop(goes_on, update, start)
    return torch.where(active[:, None, None], torch.nan, q)


@torch.no_grad()
def change(before: Tensor, after: Tensor, k: Tensor, mask: Tensor | None, rule: Rule) -> Tensor:
    """max over the batch of ||weights(after) - weights(before)|| over (L, S), per head."""
    (B, H, L, _), S = after.shape, k.shape[-2]
    total = torch.zeros(B, H, dtype=torch.float64, device=after.device)
    for rows in row_tiles(L, B * H * S, TILE):
        part = mask_rows(mask, rows)
        xi = association_weights(after[:, :, rows], k, part, rule)
        xi_old = association_weights(before[:, :, rows], k, part, rule)
        total = total + (xi - xi_old).double().square().sum((-2, -1))
    return total.sqrt().amax(0)


def attend_neighbours(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    ok: Tensor,
    mask: Tensor | None,
    rule: Rule,
    dropout_p: float = 0.0,
) -> Tensor:
    """As `attend`, but query i sees only the stored patterns index[:, i] where ok[:, i].

    index, ok: (B or 1, L, K), for all heads. O(L K) scores; a query without neighbours gives zeros.
    The op knows softmax and masks that are the same for every head. Additive masks, masks by head,
    other normalisers and dropout are the same few lines of PyTorch on every device, which stand for
    the backends "torch" and "reference".
    """
    B = batch_of(q, k, v, index)
    q, k, v = (x if x.shape[0] == B else x.expand(B, -1, -1, -1) for x in (q, k, v))
    index, ok = (x if x.shape[0] == B else x.expand(B, -1, -1) for x in (index, ok))
    H, L, K = q.shape[1], q.shape[2], index.shape[-1]
    if K == 0 or L == 0 or k.shape[2] == 0:
        return (q @ k[:, :, :0].mT) @ v[:, :, :0]
    if mask is not None and mask.dtype == torch.bool and mask.shape[1] == 1:
        # what the mask hides leaves the lists
        ok = ok & mask[:, 0].expand(B, L, k.shape[2]).gather(-1, index)
        mask = None
    if mask is None and rule.normalizer is None and dropout_p == 0.0:
        scale = 1.0 if isinstance(rule.scale, Tensor) else float(rule.scale)
        q = rule.scaled(q) if isinstance(rule.scale, Tensor) else q
        call = NeighbourAttention(q, k, v, torch.where(ok, index, -1), scale)
        return _ops.neighbour_attention(call.check(), rule.backend)
    if rule.backend == "triton":
        checks.fail(
            "backend",
            "be 'auto', 'torch' or 'reference' here",
            repr(rule.backend),
            "the kernel knows softmax without dropout, and masks that are the same for every head",
            NotImplementedError,
        )

    def tile(
        q: Tensor, k: Tensor, v: Tensor, index: Tensor, ok: Tensor, mask: Tensor | None
    ) -> Tensor:
        def neighbours(x: Tensor) -> Tensor:
            # [B, H, rows, K, d]
            flat = index.flatten(1)[:, None, :, None].expand(-1, H, -1, x.shape[-1])
            lists: Tensor = x.gather(2, flat).unflatten(2, (-1, K))
            return lists

        scores = (rule.scaled(q).unsqueeze(-2) * neighbours(k)).sum(-1)
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        seen = ok[:, None]
        if mask is not None:
            rows = mask.expand(B, H, q.shape[2], k.shape[2]).gather(
                -1, index[:, None].expand(-1, H, -1, -1)
            )
            if mask.dtype == torch.bool:
                seen = seen & rows
            else:
                scores = scores + rows
        weights = _separation.weights(scores.masked_fill(~seen, -torch.inf), rule.normalizer)
        weights = F.dropout(weights, dropout_p) if dropout_p > 0.0 else weights
        return (weights.to(q.dtype).unsqueeze(-1) * neighbours(v)).sum(-2)

    tiles = row_tiles(L, B * H * K * max(k.shape[-1], v.shape[-1]), TILE)
    if len(tiles) == 1:
        return tile(q, k, v, index, ok, mask)

    def args(rows: slice) -> tuple[Tensor | None, ...]:
        return q[:, :, rows], k, v, index[:, rows], ok[:, rows], mask_rows(mask, rows)

    return _by_tiles(tile, tiles, args)
