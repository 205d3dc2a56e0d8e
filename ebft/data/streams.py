"""Hidden states of all samples between two blocks, wherever there is room; and the pair that a run walks with.

Just over the guide line, because the ways to hold hidden states are one interface, read side by side.
"""

from __future__ import annotations

import copy
import math
import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ebft.config import EBFTConfig
from ebft.model.decoder import Decoder
from ebft.output.folder import OutputFolder

Run = Callable[[Tensor], Tensor]  # hidden states (batch, seqlen, width) on the device -> the same after a block


@dataclass
class Store:
    """Where streams live.

    Attributes:
        device: where they are computed with.
        kind: ``device``; ``host``, page-locked where the device is a GPU; or ``disk``, memory-mapped files.
        dtype: float32, because residual streams carry a few channels of size 1e3, where bfloat16's step is 4 to 8; or
            bfloat16 for half the room.
        output: the run's folder, which gets the files.
        owner: what the files' names end in; a rank's own.
    """

    device: torch.device
    kind: str = "host"
    dtype: torch.dtype = torch.float32
    output: OutputFolder | None = None
    owner: str = ""
    _mapped: dict[str, mmap.mmap] = field(default_factory=dict, init=False, repr=False)

    def make(self, name: str, shape: tuple[int, ...], *, again: bool = False) -> Tensor:
        """Room for a stream; ``again``: what a file of that name holds already."""
        if self.kind == "disk":
            return self._in_file(name, shape, again)
        if self.kind == "device":
            return torch.empty(shape, dtype=self.dtype, device=self.device)
        return torch.empty(shape, dtype=self.dtype, pin_memory=self.device.type == "cuda")

    def files(self, names: Sequence[str]) -> list[Path]:
        """The files of these streams, holding all that was written to them."""
        assert self.output is not None
        for name in names:
            self._mapped[name].flush()
        return [self._file(name) for name in names]

    def drop(self, name: str) -> None:
        """Give back the file of a stream that is done with."""
        if self._mapped.pop(name, None) is not None:
            self._file(name).unlink()

    def _file(self, name: str) -> Path:
        assert self.output is not None
        return self.output.streams / (name + self.owner)

    def _in_file(self, name: str, shape: tuple[int, ...], again: bool) -> Tensor:
        assert self.output is not None
        size = math.prod(shape) * self.dtype.itemsize
        with self.output.writing():
            self.output.streams.mkdir(exist_ok=True)
            with self._file(name).open("r+b" if again else "w+b") as file:
                if not again:
                    _reserve(file.fileno(), size)
                self._mapped[name] = mmap.mmap(file.fileno(), size)
        return torch.frombuffer(self._mapped[name], dtype=self.dtype).reshape(shape)


def _reserve(descriptor: int, size: int) -> None:
    """Take the file's whole room now: a full disk is an error here, and a crash where a mapped page is written."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
    else:
        for start in range(0, size, 2**24):
            os.write(descriptor, bytes(min(2**24, size - start)))


# --- there and back -------------------------------------------------------------------------------------------------


def carry(
    device: torch.device, sources: Sequence[Tensor], batches: Iterable[Tensor | slice]
) -> Iterator[tuple[Tensor, ...]]:
    """The rows of every source that each batch names, float32 on ``device``.

    On a CPU that is indexing. To a GPU the next batch travels on a stream of its own while the one at hand is computed
    on: row by row from where it lies, so that no stream is shuffled or copied on the host.
    """
    if device.type != "cuda":
        for rows in batches:
            yield tuple(_widened(source[rows]) for source in sources)
        return
    side = torch.cuda.Stream(device)
    if any(source.is_cuda for source in sources):  # which the work before may still be writing
        side.wait_stream(torch.cuda.current_stream(device))

    def send(rows: Tensor | slice) -> tuple[list[Tensor], torch.cuda.Event]:
        with torch.cuda.device(device), torch.cuda.stream(side):
            sent = [_sent(device, source, rows) for source in sources]
            return sent, side.record_event()

    def arrived(batch: Future[tuple[list[Tensor], torch.cuda.Event]]) -> tuple[Tensor, ...]:
        sent, event = batch.result()
        here = torch.cuda.current_stream(device)
        here.wait_event(event)
        for tensor in sent:
            tensor.record_stream(here)  # its memory is not given away while work of this stream uses it
        return tuple(map(_widened, sent))

    with ThreadPoolExecutor(1, thread_name_prefix="ebft-carries") as porter:  # waits for a disk in our place
        on_the_way: deque[Future[tuple[list[Tensor], torch.cuda.Event]]] = deque()
        for rows in batches:
            on_the_way.append(porter.submit(send, rows))
            if len(on_the_way) > 1:
                yield arrived(on_the_way.popleft())
        while on_the_way:
            yield arrived(on_the_way.popleft())


def _widened(tensor: Tensor) -> Tensor:
    """In float32, or wider if it is."""
    return tensor.float() if tensor.itemsize < 4 else tensor


def _sent(device: torch.device, source: Tensor, rows: Tensor | slice) -> Tensor:
    """Rows of ``source`` on their way to ``device``, on the current CUDA stream."""
    places = range(*rows.indices(len(source))) if isinstance(rows, slice) else rows.tolist()
    sent = torch.empty((len(places), *source.shape[1:]), dtype=source.dtype, device=device)
    for target, place in enumerate(places):
        sent[target].copy_(source[place], non_blocking=True)
    return sent


# --- streams --------------------------------------------------------------------------------------------------------


class Stream:
    """Hidden states (samples, seqlen, width) of all samples, or of those that are this process's."""

    def __init__(
        self, shape: tuple[int, ...], store: Store, batch_size: int, name: str, *, again: bool = False
    ) -> None:
        self.states = store.make(name, shape, again=again)
        self.store, self.batch_size, self.name = store, batch_size, name

    @classmethod
    def entering(cls, decoder: Decoder, tokens: Tensor, batch_size: int, store: Store, name: str) -> Stream:
        """The stream before the first block, from token ids (samples, seqlen)."""
        stream = cls((*tokens.shape, decoder.width()), store, batch_size, name)
        stream.enter(decoder, tokens)
        return stream

    def enter(self, decoder: Decoder, tokens: Tensor) -> None:
        """Take the hidden states before the first block, of token ids (samples, seqlen)."""
        with decoder.at_entrance():
            for ids, states in zip(tokens.split(self.batch_size), self.states.split(self.batch_size), strict=True):
                states.copy_(decoder.enter(ids))

    def batches(self) -> Iterator[Tensor]:
        """Hidden states (batch, seqlen, width), float32 on the device, in order."""
        starts = range(0, len(self.states), self.batch_size)
        for (hidden,) in carry(self.store.device, [self.states], (slice(n, n + self.batch_size) for n in starts)):
            yield hidden

    def empty(self, name: str) -> Stream:
        """A stream of this size with nothing in it yet."""
        return Stream(tuple(self.states.shape), self.store, self.batch_size, name)

    def first(self, samples: int) -> Stream:
        """The first so many samples, in the same room."""
        part = copy.copy(self)
        part.states = self.states[:samples]
        return part

    def through(self, run: Run, out: Stream) -> None:
        """Write what ``run`` makes of this stream into ``out``, which may be this stream."""
        write_through([self], run, out)

    def is_finite(self) -> bool:
        """No NaN and no infinity anywhere."""
        return all(bool(torch.isfinite(states).all()) for states in self.states.split(self.batch_size))


@torch.no_grad()
def write_through(sources: Sequence[Stream], run: Callable[..., Tensor], out: Stream) -> None:
    """Write what ``run`` makes of the batches of all ``sources`` together into ``out``, which may be one of them."""
    device, size = out.store.device, out.batch_size
    back = torch.cuda.Stream(device) if device.type == "cuda" and out.states.is_pinned() else None
    rows = (slice(start, start + size) for start in range(0, len(out.states), size))
    batches = carry(device, [source.states for source in sources], rows)
    for given, states in zip(batches, out.states.split(size) if len(out.states) else (), strict=True):
        result = run(*given)
        if back is None:
            states.copy_(result)
            continue
        result = result.to(states.dtype)
        back.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(back):
            states.copy_(result, non_blocking=True)
        result.record_stream(back)
    if back is not None:
        back.synchronize()


class Streams:
    """The inputs of the block at hand, and its targets: two buffers in all, whatever the model's depth.

    On disk, what a finished block's commit names stays as it is until the next commit: what would be moved on in place
    alternates between two files there. So do the dense model's states, anywhere, where a recovery asks for a block's
    dense inputs beside its dense outputs: one buffer more.

    With ``--input mix`` one buffer more holds what the block is given, made anew for every block of both streams.

    Args:
        tokens: (samples, seqlen), of several ranks this one's share.
        position: where an interrupted run's streams are (``position()``), in files that are whole; by default they
            begin before the first block.
        share: which of all ``samples`` those of ``tokens`` are; by default they are all.
        keep_dense_inputs: ``dense_inputs`` are wanted.

    Attributes:
        inputs: what the block is given: the sparse stream, or the dense one, or a mix of them (``--input``).
        targets: what it should give, once ``dense_pass`` has run.
    """

    def __init__(
        self,
        config: EBFTConfig,
        decoder: Decoder,
        teacher: Decoder,
        tokens: Tensor,
        store: Store | None = None,
        position: dict[str, Any] | None = None,
        share: slice | None = None,
        keep_dense_inputs: bool = False,
    ) -> None:
        store = store or Store(decoder.device)
        self._store, self._dense_inputs = store, config.recover.input == "dense-stream"
        # Targets on a stream of their own are that stream, moved on by the dense blocks alone.
        self._dense_targets = config.recover.target == "dense-stream" and not self._dense_inputs

        def stream(of: Decoder, name: str) -> Stream:
            if position is None:
                return Stream.entering(of, tokens, config.recover.batch_size, store, name)
            shape = (*tokens.shape, of.width())
            return Stream(shape, store, config.recover.batch_size, name, again=True)

        self._scratch: Stream | None = None
        self._block: int = (position or {}).get("block", 0)
        self._config, self._share = config, share or slice(len(tokens))

        names = position or {"inputs": "inputs-0", "targets": "targets-0"}
        self._walked = stream(teacher if self._dense_inputs else decoder, names["inputs"])
        self._mixed = self._walked.empty("mixed-0") if config.recover.input == "mix" else None
        self._spare: dict[
            str, Stream
        ] = {}  # the other buffer or file of a stream, which is left behind as it is moved on
        if self._dense_targets:
            self.targets = stream(teacher, names["targets"])
            moved = [self._walked] if store.kind == "disk" else []
            if store.kind == "disk" or keep_dense_inputs:
                moved.append(self.targets)
            self._spare = {s.name: s.empty(_other(s.name)) for s in moved}
        else:
            self.targets = self._walked.empty(_other(self._walked.name))
        self._mix()

    @property
    def inputs(self) -> Stream:
        """See above."""
        return self._mixed or self._walked

    @property
    def dense_source(self) -> Stream:
        """What the dense block is applied to."""
        return self.targets if self._dense_targets else self.inputs

    @property
    def dense_inputs(self) -> Stream | None:
        """What the dense block was applied to, once ``dense_pass`` has run; None where it was not kept."""
        return self._spare.get(self.targets.name) if self._dense_targets else self.inputs

    @property
    def follow_the_dense(self) -> bool:
        """A stream of the dense model's states is among them, which only the dense blocks move on."""
        return self._dense_targets or self._dense_inputs

    def dense_pass(self, run: Run) -> None:
        """Make the targets with the dense block."""
        if self._dense_targets:
            self.targets = self._moved_on(self.targets, run)
        else:
            self._walked.through(run, out=self.targets)

    def sparse_pass(self, run: Run | None) -> None:
        """Move on to the next block's inputs, with the finished sparse block; none is needed for dense inputs."""
        self._block += 1
        if self._dense_inputs:  # they are the targets
            self._walked, self.targets = self.targets, self._walked
            return
        assert run is not None
        if self._dense_targets:
            self._walked = self._moved_on(self._walked, run)
            self._mix()
        else:  # the targets are done with: their buffer takes the new inputs
            self._walked.through(run, out=self.targets)
            self._walked, self.targets = self.targets, self._walked

    def scratch(self) -> Tensor:
        """Room for as much as the targets, where they are; the same one for every block."""
        return self._room().states

    def look_ahead(self, run: Run) -> Stream:
        """The targets after the next dense block, in the room of ``scratch``."""
        self.targets.through(run, out=self._room())
        return self._room()

    def _room(self) -> Stream:
        if self._scratch is None:
            self._scratch = self.targets.empty("scratch-0")
        return self._scratch

    def position(self) -> dict[str, Any] | None:
        """Names of the files that the next block begins with, and their checksums; None where streams are in memory."""
        if self._store.kind != "disk" or self._store.output is None:
            return None
        names = {"inputs": self._walked.name, "targets": self.targets.name if self._dense_targets else None}
        files = self._store.files([name for name in names.values() if name])
        return {**names, "block": self._block, "files": self._store.output.checksums(files)}

    def _mix(self) -> None:
        """Make the mixed inputs of the block at hand, while the targets are still what the dense block is given."""
        if self._mixed is None:
            return
        dense = dense_samples(self._config, self._block)[self._share]
        streams = (stream.states.split(stream.batch_size) for stream in (self._mixed, self._walked, self.targets))
        for chosen, mixed, sparse, of_dense in zip(dense.split(self._mixed.batch_size), *streams, strict=True):
            mixed.copy_(sparse)
            for row in chosen.nonzero().flatten().tolist():
                mixed[row].copy_(of_dense[row])

    def _moved_on(self, stream: Stream, run: Run) -> Stream:
        out = self._spare.pop(stream.name, stream)
        stream.through(run, out)
        if out is not stream:
            self._spare[out.name] = stream
        return out


def dense_samples(config: EBFTConfig, block: int) -> Tensor:
    """Which samples ``--input mix`` takes from the dense stream, bool (samples,): a function of (seed, block) alone."""
    generator = torch.Generator().manual_seed(((config.runtime.seed * 1_000_003 + block) * 1_000_003 - 1) % 2**63)
    chosen = torch.zeros(config.data.samples, dtype=torch.bool)
    chosen[
        torch.randperm(config.data.samples, generator=generator)[: round(config.recover.mix * config.data.samples)]
    ] = True
    return chosen


def _other(name: str) -> str:
    """The name of the file that ``name`` alternates with."""
    kind, _, number = name.rpartition("-")
    return f"{kind}-{1 - int(number)}"
