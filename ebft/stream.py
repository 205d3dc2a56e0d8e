"""Hidden states of all samples between two blocks, kept on the host; and the pair of streams that a run walks with."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ebft.config import EBFTConfig
from ebft.decoder import Decoder

Run = Callable[[Tensor], Tensor]  # hidden states (batch, seqlen, width) on the device -> the same after a block


class Stream:
    """Hidden states, float32 (samples, seqlen, width), on the host (page-locked where the device is a GPU).

    float32, because residual streams carry a few channels of size 1e3, where bfloat16's step is 4 to 8.
    """

    def __init__(self, shape: tuple[int, ...], device: torch.device, batch_size: int) -> None:
        self.states = torch.empty(shape, pin_memory=device.type == "cuda")
        self._device, self.batch_size = device, batch_size

    @classmethod
    def entering(cls, decoder: Decoder, tokens: Tensor, batch_size: int) -> Stream:
        """The stream before the first block, from token ids (samples, seqlen)."""
        stream = cls((*tokens.shape, decoder.width()), decoder.device, batch_size)
        for ids, states in zip(tokens.split(batch_size), stream.states.split(batch_size), strict=True):
            states.copy_(decoder.enter(ids))
        return stream

    def batches(self) -> Iterator[Tensor]:
        """Hidden states (batch, seqlen, width) on the device, in order."""
        for states in self.states.split(self.batch_size):
            yield states.to(self._device, non_blocking=True)

    def empty(self) -> Stream:
        """A stream of this size with nothing in it yet."""
        return Stream(tuple(self.states.shape), self._device, self.batch_size)

    @torch.no_grad()
    def through(self, run: Run, out: Stream) -> None:
        """Write what ``run`` makes of this stream into ``out``, which may be this stream."""
        for hidden, result in zip(self.batches(), out.states.split(self.batch_size), strict=True):
            result.copy_(run(hidden))

    def is_finite(self) -> bool:
        """No NaN and no infinity anywhere."""
        return all(bool(torch.isfinite(states).all()) for states in self.states.split(self.batch_size))


class Streams:
    """The inputs of the block at hand, and its targets: two buffers in all, whatever the model's depth.

    Attributes:
        inputs: what the block is given: the sparse stream, or the dense one (``--input``).
        targets: what it should give, once ``dense_pass`` has run.
    """

    def __init__(self, config: EBFTConfig, decoder: Decoder, teacher: Decoder, tokens: Tensor) -> None:
        self._dense_inputs = config.input == "dense-stream"
        self.inputs = Stream.entering(teacher if self._dense_inputs else decoder, tokens, config.batch_size)
        # Targets on a stream of their own are that stream, moved on in place by the dense blocks alone.
        self._dense_targets = config.target == "dense-stream" and not self._dense_inputs
        self.targets = (
            Stream.entering(teacher, tokens, config.batch_size) if self._dense_targets else self.inputs.empty()
        )

    @property
    def dense_source(self) -> Stream:
        """What the dense block is applied to."""
        return self.targets if self._dense_targets else self.inputs

    def dense_pass(self, run: Run) -> None:
        """Make the targets with the dense block."""
        self.dense_source.through(run, out=self.targets)

    def sparse_pass(self, run: Run) -> None:
        """Move on to the next block's inputs, with the finished sparse block."""
        if self._dense_inputs:  # they are the targets
            self.inputs, self.targets = self.targets, self.inputs
        elif self._dense_targets:
            self.inputs.through(run, out=self.inputs)
        else:  # the targets are done with: their buffer takes the new inputs
            self.inputs.through(run, out=self.targets)
            self.inputs, self.targets = self.targets, self.inputs
