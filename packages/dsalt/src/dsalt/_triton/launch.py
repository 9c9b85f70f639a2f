"""What the kernels of a backward pass are launched with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from shared_kernels.triton.arguments import Rows

from .._call import Attention, Normalized
from .band import LOG2E
from .forward import Arguments


class BackwardArguments(Arguments):
    """The arguments that several kernels of one backward pass share."""

    def __init__(
        self, call: Attention, saved: Normalized, d_out: Tensor, with_windows: bool
    ) -> None:
        super().__init__(call)
        self.k, self.v = Rows.of(call.k), Rows.of(call.v)
        self.d_out = Rows.of(d_out)
        self.windows = call.windows.contiguous()
        self.out = saved.out.contiguous()
        self.top, self.lse = saved.top.contiguous(), saved.lse.contiguous()
        self.landmarks = call.landmarks.to(torch.int32).contiguous()
        self.ramp, self.block, self.with_windows = call.ramp, call.block, with_windows
        self.fp32: dict[str, Any] = {"dtype": torch.float32, "device": call.q.device}
        scale = self.unit * LOG2E
        self.numbers = (scale, call.factor, call.ramp)
        self.key_numbers = (scale, self.unit, call.ramp)  # the sign is that of the queries
        self.key_flags = {name: self.flags[name] for name in ("HAS_STARTS", "PRECISION")}

    def gates(self) -> Tensor:
        return self.landmarks if self.bias is None else self.bias
