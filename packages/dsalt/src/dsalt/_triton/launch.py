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
        self.q, self.k, self.v = Rows.of(call.q), Rows.of(call.k), Rows.of(call.v)
        self.d_out = Rows.of(d_out)
        self.windows = call.windows.contiguous()
        self.out, self.lse = saved.out.contiguous(), saved.lse.contiguous()
        self.landmarks = call.landmarks.to(torch.int32).contiguous()
        self.bias = None if call.bias is None else call.bias.contiguous()
        self.ramp, self.block, self.with_windows = call.ramp, call.block, with_windows
        self.fp32: dict[str, Any] = {"dtype": torch.float32, "device": call.q.device}
        self.numbers = (call.factor * LOG2E, call.factor, call.ramp)
        self.key_flags = {name: self.flags[name] for name in ("HAS_STARTS", "PRECISION")}

    def gates(self) -> Tensor:
        return self.landmarks if self.bias is None else self.bias
