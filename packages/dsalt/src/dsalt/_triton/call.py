"""The arguments of one backward call in launching form."""

from __future__ import annotations

import torch
from torch import Tensor

from .band import LOG2E
from .forward import Geometry, rows


class Call:
    """The arguments of one backward call in launching form."""

    def __init__(
        self,
        d_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        windows: Tensor,
        landmarks: Tensor,
        bias: Tensor | None,
        cu_seqlens: Tensor | None,
        out: Tensor,
        lse: Tensor,
        scale: float,
        ramp: float,
        block: int,
        with_windows: bool,
    ) -> None:
        self.g = Geometry(q, k, landmarks, cu_seqlens, block)
        self.q, self.k, self.v, self.d_out = rows(q), rows(k), rows(v), rows(d_out)
        self.windows, self.out, self.lse = windows.contiguous(), out.contiguous(), lse.contiguous()
        self.landmarks = landmarks.to(torch.int32).contiguous()
        self.bias = None if bias is None else bias.contiguous()
        self.scale, self.ramp, self.block, self.with_windows = scale, ramp, block, with_windows
        self.fp32 = {"dtype": torch.float32, "device": q.device}
        tensors = (self.q, self.k, self.v, self.d_out)
        self.strides = [stride for x in tensors for stride in x.stride()[:3]]
        self.numbers = (scale * LOG2E, scale, ramp)
        self.key_flags = {name: self.g.flags[name] for name in ("HAS_STARTS", "PRECISION")}

    def gates(self) -> Tensor:
        return self.landmarks if self.bias is None else self.bias
