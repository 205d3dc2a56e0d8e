"""Hidden states of all calibration (or evaluation) samples between two blocks, kept on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ebft.decoder import Decoder

Run = Callable[[Tensor], Tensor]  # hidden states (batch, seqlen, width) on the device -> the same after a block


class Stream:
    """Hidden states, float32 (samples, seqlen, width), on the host (page-locked where the device is a GPU).

    float32, because residual streams carry a few channels of size 1e3, where bfloat16's step is 4 to 8.
    """

    def __init__(self, states: Tensor, device: torch.device, batch_size: int) -> None:
        self.states = states.pin_memory() if device.type == "cuda" else states
        self._device, self.batch_size = device, batch_size

    @classmethod
    def entering(cls, decoder: Decoder, tokens: Tensor, batch_size: int) -> Stream:
        """The stream before the first block, from token ids (samples, seqlen)."""
        states = torch.cat([decoder.enter(ids) for ids in tokens.split(batch_size)])
        return cls(states, decoder.device, batch_size)

    def batches(self) -> Iterator[Tensor]:
        """Hidden states (batch, seqlen, width) on the device, in order."""
        for states in self.states.split(self.batch_size):
            yield states.to(self._device, non_blocking=True)

    @torch.no_grad()
    def through(self, run: Run, out: Stream | None = None) -> Stream:
        """The stream after ``run``, written into ``out`` (which may be this stream) or into a new one."""
        out = out or Stream(torch.empty_like(self.states), self._device, self.batch_size)
        for hidden, result in zip(self.batches(), out.states.split(self.batch_size), strict=True):
            result.copy_(run(hidden))
        return out

    def is_finite(self) -> bool:
        """No NaN and no infinity anywhere."""
        return all(bool(torch.isfinite(states).all()) for states in self.states.split(self.batch_size))
