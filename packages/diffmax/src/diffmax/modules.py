"""diffmax as a layer, and the maps that make its alpha learnable."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from shared_kernels import checks
from shared_kernels.rows import wide

from . import _checks
from .api import diffmax_bisect
from .losses import diffmax_linear_loss

# fp32 sigmoid and tanh saturate; within these ends alpha stays inside (0, 1).
ALPHA_MIN, ALPHA_MAX = 1e-6, 1 - 6e-8


def _floating(x: float | Tensor) -> Tensor:
    if not isinstance(x, Tensor):  # which as_tensor would take to torch's default device
        x = torch.as_tensor(x, device="cpu")
    return x if x.is_floating_point() else x.to(torch.get_default_dtype())


def _wide(x: Tensor) -> Tensor:
    return x.to(wide(x))


class _BetaMap:
    """An increasing map from beta > 0 to alpha in (0, 1), through w = c (log beta - log beta0)."""

    def __init__(self, c: float = 1.0, beta0: float = 1.0) -> None:
        for name, value in (("c", c), ("beta0", beta0)):
            if not 0.0 < _checks.number(name, value) < math.inf:
                checks.fail(name, "be a positive number", value)
        self.c, self.beta0 = float(c), float(beta0)

    def __call__(self, beta: float | Tensor) -> Tensor:
        """alpha of beta > 0."""
        beta = _floating(beta)
        if checks.reads_values(beta) and bool((beta < 0).any()):
            checks.fail("beta", "be positive", beta.min().item())
        return self._inside(_wide(beta).log(), beta.dtype)

    def from_log_beta(self, log_beta: float | Tensor) -> Tensor:
        """alpha of log beta: computed in fp32 at least, and inside (0, 1) in every dtype."""
        log_beta = _floating(log_beta)
        return self._inside(_wide(log_beta), log_beta.dtype)

    def _inside(self, log_beta: Tensor, dtype: torch.dtype) -> Tensor:
        ends = torch.finfo(dtype)
        alpha = self._alpha(self.c * (log_beta - math.log(self.beta0)))
        # eps / 2 below 1 is the last number that is not 1
        return alpha.clamp(ends.tiny, 1 - ends.eps / 2).to(dtype)

    def inverse(self, alpha: float) -> float:
        """The beta whose alpha this is."""
        return math.exp(self.log_inverse(alpha))

    def log_inverse(self, alpha: float) -> float:
        """log beta of alpha, finite where beta itself overflows."""
        return math.log(self.beta0) + self._w(_checks.alpha_number(alpha)) / self.c

    def __repr__(self) -> str:
        return f"{type(self).__name__}(c={self.c:g}, beta0={self.beta0:g})"

    def _alpha(self, w: Tensor) -> Tensor:
        raise NotImplementedError

    def _w(self, alpha: float) -> float:
        raise NotImplementedError


class HillMap(_BetaMap):
    """alpha = beta^c / (beta^c + beta0^c): the sigmoid of c log(beta / beta0). Recommended.

    Args:
        c: steepness > 0; the smaller, the slower alpha moves.
        beta0: the beta at which alpha = 1/2, > 0.

    Example:
        >>> HillMap(c=2.0)(torch.tensor([1.0, 3.0]))
        tensor([0.5000, 0.9000])
    """

    def _alpha(self, w: Tensor) -> Tensor:
        return w.sigmoid()

    def _w(self, alpha: float) -> float:
        return math.log(alpha) - math.log1p(-alpha)


class TanhMap(_BetaMap):
    """alpha = tanh((beta / beta0)^c).

    Args:
        c: steepness > 0.
        beta0: scale > 0; alpha = tanh(1) = 0.76 there.
    """

    def _alpha(self, w: Tensor) -> Tensor:
        return w.clamp(max=5.0).exp().tanh()  # beyond, alpha is 1 and the gradient 0 * inf

    def _w(self, alpha: float) -> float:
        return math.log(math.atanh(alpha))


class ExpMap(_BetaMap):
    """alpha = 1 - exp(-(beta / beta0)^c).

    Args:
        c: steepness > 0.
        beta0: scale > 0; alpha = 1 - 1/e = 0.63 there.
    """

    def _alpha(self, w: Tensor) -> Tensor:
        return -torch.expm1(-w.clamp(max=5.0).exp())

    def _w(self, alpha: float) -> float:
        return math.log(-math.log1p(-alpha))


class DiffmaxBisectModule(nn.Module):
    """`diffmax_bisect` as a layer, with a fixed or a learned alpha.

    Args:
        alpha: in (0, 1); with `alpha_map` the initial value.
        dim, n_iter, ensure_sum_one: as in `diffmax_bisect`.
        alpha_map: `HillMap`, `TanhMap` or `ExpMap`. With one, the layer has the parameter
            `log_beta` and alpha = map(exp(log_beta)); without, it has no parameters.
        num_heads: learn one alpha per head of scores (..., num_heads, N, M); needs `alpha_map`.
        device, dtype: of `log_beta`. In half types alpha is computed and used in fp32.

    Example:
        >>> layer = DiffmaxBisectModule(alpha=0.5, alpha_map=HillMap(c=0.3), num_heads=8)
        >>> layer(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 8, 5, 5])
    """

    def __init__(
        self,
        alpha: float = 0.9,
        dim: int = -1,
        n_iter: int = 50,
        ensure_sum_one: bool = True,
        alpha_map: _BetaMap | None = None,
        num_heads: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._fixed = _checks.alpha_number(alpha, True)
        dim = _checks.dimension(dim)
        ensure_sum_one = checks.flag("ensure_sum_one", ensure_sum_one)
        checks.positive_int("n_iter", n_iter)
        if alpha_map is not None and not isinstance(alpha_map, _BetaMap):
            hint = "pass an instance, e.g. HillMap()"
            checks.fail("alpha_map", "be a map", repr(alpha_map), hint=hint, error=TypeError)
        self.dim, self.n_iter, self.ensure_sum_one = dim, int(n_iter), ensure_sum_one
        self.alpha_map, self.num_heads = alpha_map, num_heads
        if num_heads is not None:
            checks.positive_int("num_heads", num_heads)
            if alpha_map is None:
                checks.fail("num_heads", "come with an alpha_map", num_heads)
        if alpha_map is not None:
            # one dimension at least: fully_shard takes no scalar
            shape = (1 if num_heads is None else int(num_heads),)
            self.log_beta = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Put alpha back to what the layer was made with."""
        if self.alpha_map is not None:
            with torch.no_grad():
                self.log_beta.fill_(self.alpha_map.log_inverse(self._fixed))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}log_beta")
        if saved is not None and saved.dim() == 0:  # as it was saved when it was a scalar
            state_dict[f"{prefix}log_beta"] = saved.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def alpha(self) -> float | Tensor:
        """The present alpha: a number, or a tensor () or (num_heads,) with a gradient."""
        if self.alpha_map is None:
            return self._fixed
        log_beta = self.log_beta if self.num_heads is not None else self.log_beta.squeeze(0)
        alpha = self.alpha_map.from_log_beta(_wide(log_beta))
        return alpha.clamp(ALPHA_MIN, ALPHA_MAX)

    def forward(self, X: Tensor) -> Tensor:
        alpha = self.alpha
        if isinstance(alpha, Tensor) and self.num_heads is not None:
            _checks.scores(X, self.dim)
            if X.dim() < 3 or X.shape[-3] != self.num_heads:
                where = f"have num_heads={self.num_heads} at dim=-3, (..., heads, N, M)"
                checks.fail("X", where, f"shape {tuple(X.shape)}")
            alpha = alpha.view(-1, 1, 1)
        return diffmax_bisect(X, alpha, self.dim, self.n_iter, self.ensure_sum_one)

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        with torch.no_grad():
            alpha = torch.as_tensor(self.alpha).flatten()
        values = [f"{a:.4g}" for a in alpha.tolist()] if checks.has_values(alpha) else ["?"]
        text = ", ".join(values[:4]) + (", ..." if len(values) > 4 else "")
        text = f"alpha=[{text}]" if self.num_heads else f"alpha={text}"
        text += f", dim={self.dim}, n_iter={self.n_iter}, ensure_sum_one={self.ensure_sum_one}"
        return text if self.alpha_map is None else f"{text}, alpha_map={self.alpha_map}"


class DiffmaxLinearLoss(nn.Module):
    """`diffmax_linear_loss` as a layer: loss(hidden, weight, target), alpha fixed or learned.

    Whatever takes a loss as a function of (hidden, weight, labels) takes this one.

    Args:
        alpha: in (0, 1); with `alpha_map` the initial value.
        alpha_map: `HillMap`, `TanhMap` or `ExpMap`, with which alpha is learned.
        ignore_index, label_smoothing, softcap, reduction, group: as in `diffmax_linear_loss`.
        device, dtype: of the parameter of a learned alpha.

    Example:
        >>> loss = DiffmaxLinearLoss(alpha=0.5, label_smoothing=0.1)
        >>> loss(torch.zeros(2, 3), torch.zeros(7, 3), torch.tensor([0, 6])).item() > 0
        True
    """

    def __init__(
        self,
        alpha: float = 0.5,
        alpha_map: _BetaMap | None = None,
        *,
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        softcap: float | None = None,
        reduction: str = "mean",
        group: Any = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.normalizer = DiffmaxBisectModule(
            alpha, alpha_map=alpha_map, device=device, dtype=dtype
        )
        self.options: dict[str, Any] = {
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "softcap": softcap,
            "reduction": reduction,
        }
        self.group = group

    @property
    def alpha(self) -> float | Tensor:
        """The present alpha: a number, or a tensor () with a gradient."""
        return self.normalizer.alpha

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        target_weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of hidden (..., d), weight (V, d) and target (...), as `diffmax_linear_loss`."""
        return diffmax_linear_loss(
            hidden,
            weight,
            target,
            self.alpha,
            bias,
            target_weights=target_weights,
            group=self.group,
            **self.options,
        )

    if TYPE_CHECKING:
        __call__ = forward

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


class Routing(NamedTuple):
    """Which expert takes part of which token."""

    weights: Tensor  # (..., E), zeros for the experts that a token does not go to
    balance: Tensor  # (), the load-balancing term: 1 where the load is even, up to E
    dropped: Tensor  # (), share of the weight that found no place


class DiffmaxRouter(nn.Module):
    """The router of a mixture of experts: sparse weights, so that a token chooses how many.

        p = diffmax_bisect(W x, alpha),   y = sum_e p_e expert_e(x)
        balance = E sum_e (share of the routed places that are e's) (mean of p_e)

    Args:
        dim: size d of a token.
        num_experts: E.
        alpha: in (0, 1); with `alpha_map` the initial value. Lower means fewer experts a token.
        alpha_map: `HillMap`, `TanhMap` or `ExpMap`, with which alpha is learned.
        capacity_factor: an expert takes at most ceil(capacity_factor tokens / E) tokens, those with
            the largest weights; what it leaves is dropped. None: no limit.
        device, dtype: of the parameters.

    Example:
        >>> router = DiffmaxRouter(8, 4, alpha=0.3)
        >>> experts = [nn.Linear(8, 8) for _ in range(4)]
        >>> y, routing = router.mixture(torch.randn(5, 8), experts)
        >>> y.shape, routing.weights.shape
        (torch.Size([5, 8]), torch.Size([5, 4]))

    Source: Fedus, Zoph, Shazeer, JMLR 23 (2022), for the load-balancing term and the capacity.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        alpha: float = 0.5,
        alpha_map: _BetaMap | None = None,
        capacity_factor: float | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        checks.positive_int("dim", dim)
        checks.positive_int("num_experts", num_experts)
        if capacity_factor is not None and not 0.0 < capacity_factor < math.inf:
            checks.fail("capacity_factor", "be a positive number", capacity_factor)
        self.capacity_factor = capacity_factor
        self.gate = nn.Linear(dim, num_experts, bias=False, device=device, dtype=dtype)
        self.normalizer = DiffmaxBisectModule(
            alpha, alpha_map=alpha_map, device=device, dtype=dtype
        )

    @property
    def num_experts(self) -> int:
        return self.gate.out_features

    def forward(self, x: Tensor) -> Routing:
        """The routing of tokens x (..., d)."""
        p = self.normalizer(self.gate(x)).reshape(-1, self.num_experts)
        places = (p > 0).to(p.dtype)
        load = places.sum(0) / places.sum().clamp(min=1)
        balance = self.num_experts * (load * p.sum(0) / max(len(p), 1)).sum()
        kept = p
        if self.capacity_factor is not None:
            capacity = math.ceil(self.capacity_factor * len(p) / self.num_experts)
            order = p.sort(dim=0, descending=True, stable=True).indices
            rank = torch.empty_like(order).scatter_(
                0, order, torch.arange(len(p), device=p.device).unsqueeze(1).expand_as(order)
            )
            kept = torch.where(rank < capacity, p, 0.0)
        mass = p.detach().sum()
        dropped = (mass - kept.detach().sum()) / mass.clamp(min=torch.finfo(p.dtype).tiny)
        return Routing(kept.reshape(*x.shape[:-1], self.num_experts), balance, dropped)

    def mixture(
        self, x: Tensor, experts: Sequence[Callable[[Tensor], Tensor]]
    ) -> tuple[Tensor, Routing]:
        """sum_e p_e expert_e(x): each expert sees only the tokens that it has a weight for.

        Args:
            x: (..., d).
            experts: E functions (n, d) -> (n, d).
        """
        if len(experts) != self.num_experts:
            checks.fail("experts", f"be num_experts={self.num_experts} functions", len(experts))
        routing = self(x)
        tokens, weights = x.reshape(-1, x.shape[-1]), routing.weights.reshape(-1, len(experts))
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(experts):
            chosen = weights[:, e].nonzero().squeeze(1)
            if len(chosen):
                part = expert(tokens.index_select(0, chosen))
                part = part * weights[:, e].index_select(0, chosen).unsqueeze(1)
                y = y.index_add(0, chosen, part.to(y.dtype))
        return y.reshape(x.shape), routing

    if TYPE_CHECKING:
        __call__ = forward
