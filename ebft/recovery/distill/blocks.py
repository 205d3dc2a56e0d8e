"""Where the blocks of a model and their optimizers' states are while all of them are tuned (``--distill-blocks``).

``Held`` has all of them on the device. ``Streamed`` has them on the host, page-locked where the device is a GPU. There
a block's weights come when it is its turn, those of the next one travel meanwhile, and its states come for its update;
what the update has changed goes back while the next block is worked on. So the device holds the weights of two blocks,
and the gradients and states of one.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ebft_kernels import MaskedAdamW

K = TypeVar("K", bound=Hashable)
ROOM = 0.75  # of the device's free memory, for blocks and states where they are held; the rest is for activations


def bytes_a_weight(moments: str, compact: bool, kept: float) -> float:
    """Of a block's weight with its mask and states, of which ``compact`` keeps that share ``kept``."""
    states = {"fp32": 8, "bf16": 4, "int8": 2 * (1 + 4 / 256)}[moments]
    return 4 + states * (kept if compact else 1) + 1 / 8


def where_they_fit(where: str, device: torch.device, needed: int, budget: int | None) -> str:
    """What ``--distill-blocks`` means here: ``device`` or ``host``.

    Args:
        needed: bytes of all that is held.
        budget: of the device's memory, where the run has one.
    """
    if where != "auto" or device.type != "cuda":
        return "host" if where == "host" else "device"
    free, _ = torch.cuda.mem_get_info(device)
    return "device" if needed <= ROOM * min(free, budget or free) else "host"


class Held:
    """All blocks on the device, with their optimizers and what these have stored.

    Args:
        made: every block, float32 on the device, and its optimizer, which has taken no step.
    """

    streamed = False

    def __init__(self, made: Iterable[tuple[nn.Module, MaskedAdamW]]) -> None:
        self._blocks, self.optimizers = list[nn.Module](), list[MaskedAdamW]()
        for block, optimizer in made:
            self._blocks.append(block)
            self.optimizers.append(optimizer)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._blocks)

    def in_turn(self, order: Sequence[int], *, tuned: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """Each of these blocks with its number, on the device until the next one is asked for; ``tuned``: to change."""
        for index in order:
            yield index, self._blocks[index]

    def states_ahead(self, index: int) -> None:
        """The states of this block, whose turn it is, will be needed soon."""

    def states_here(self, index: int) -> None:
        """They are needed now."""


class Streamed(Held):
    """All blocks on the host, as are their optimizers' states and masks; on the device while it is their turn."""

    streamed = True

    def __init__(self, made: Iterable[tuple[nn.Module, MaskedAdamW]], device: torch.device) -> None:
        self._ways = _Ways(device)
        self._homes: dict[tuple[Tensor, str], Tensor] = {}  # of a parameter ("") and of its states, by their names
        self._ahead: dict[int, _Sent[tuple[Tensor, str]]] = {}  # states on their way to the device, or there
        super().__init__(self._taken_home(*each) for each in made)

    def in_turn(self, order: Sequence[int], *, tuned: bool = False) -> Iterator[tuple[int, nn.Module]]:
        """See ``Held``."""
        order = list(order)
        coming = self._sent(order[0])
        for index, following in zip(order, [*order[1:], None], strict=True):
            block = self._blocks[index]
            for parameter, here in coming.arrived().items():
                parameter.data = here
            if following is not None:
                coming = self._sent(following)
            yield index, block
            if tuned:
                self._take_back(index)
            for parameter in block.parameters():
                parameter.data = self._homes[parameter, ""]
            if tuned:
                _masks_follow(self.optimizers[index])
        self._ways.wait_for_the_way_back()

    def states_ahead(self, index: int) -> None:
        """See ``Held``. Those of the block before have left by then, or this waits for it."""
        if index not in self._ahead:
            self._ways.wait_for_the_way_back()
            self._ahead[index] = self._ways.send({(p, key): state for p, key, state in _states(self.optimizers[index])})

    def states_here(self, index: int) -> None:
        """See ``Held``."""
        self.states_ahead(index)
        for (parameter, key), here in self._ahead.pop(index).arrived().items():
            self.optimizers[index].state[parameter][key] = here

    # --- its parts --------------------------------------------------------------------------------------------------

    def _taken_home(self, block: nn.Module, optimizer: MaskedAdamW) -> tuple[nn.Module, MaskedAdamW]:
        for parameter in block.parameters():
            self._home(parameter, "", parameter).copy_(parameter.data)
            parameter.data = self._homes[parameter, ""]
        _masks_follow(optimizer)
        return block, optimizer

    def _sent(self, index: int) -> _Sent[nn.Parameter]:
        return self._ways.send({p: self._homes[p, ""] for p in self._blocks[index].parameters()})

    def _take_back(self, index: int) -> None:
        """Weights that an update has changed, and states."""
        optimizer = self.optimizers[index]
        tuned = [(p, "", p.data) for p in self._blocks[index].parameters() if p.requires_grad]
        states = list(_states(optimizer))
        homes = [self._home(*each) for each in (*tuned, *states)]
        self._ways.return_([here for *_, here in (*tuned, *states)], homes)
        for parameter, key, _ in states:
            optimizer.state[parameter][key] = self._homes[parameter, key]

    def _home(self, parameter: Tensor, key: str, like: Tensor) -> Tensor:
        """Room on the host, for good."""
        home = self._homes.get((parameter, key))
        if home is None or (home.shape, home.dtype) != (like.shape, like.dtype):
            home = torch.empty(like.shape, dtype=like.dtype, pin_memory=self._ways.device.type == "cuda")
            self._homes[parameter, key] = home
        return home


@dataclass(frozen=True)
class _Sent(Generic[K]):
    """Tensors on their way to the device, and what says on a GPU that they are there."""

    tensors: dict[K, Tensor]
    event: Any = None

    def arrived(self) -> dict[K, Tensor]:
        """They are there for whatever is asked of the device from now on."""
        for tensor in self.tensors.values() if self.event is not None else ():
            here = torch.cuda.current_stream(tensor.device)
            here.wait_event(self.event)
            tensor.record_stream(here)  # its memory is not given away while work of this stream uses it
        return self.tensors


class _Ways:
    """To the device and back; of a GPU two streams beside its work, elsewhere plain copies."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._there, self._back = (torch.cuda.Stream(device) if device.type == "cuda" else None for _ in range(2))

    def send(self, tensors: Mapping[K, Tensor]) -> _Sent[K]:
        """Copies on the device."""
        if self._there is None:
            return _Sent({key: tensor.clone() for key, tensor in tensors.items()})
        with torch.cuda.stream(self._there):
            sent = {key: tensor.to(self.device, non_blocking=True) for key, tensor in tensors.items()}
            return _Sent(sent, self._there.record_event())

    def return_(self, tensors: Sequence[Tensor], homes: Sequence[Tensor]) -> None:
        """Write tensors of the device, once the work asked of it is done, into ``homes``."""
        if self._back is None:
            for tensor, home in zip(tensors, homes, strict=True):
                home.copy_(tensor)
            return
        self._back.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._back):
            for tensor, home in zip(tensors, homes, strict=True):
                home.copy_(tensor, non_blocking=True)
                tensor.record_stream(self._back)

    def wait_for_the_way_back(self) -> None:
        """All that was returned has come home. A sync point."""
        if self._back is not None:
            self._back.synchronize()


def _states(optimizer: MaskedAdamW) -> Iterator[tuple[Tensor, str, Tensor]]:
    """Parameter, name and value of every state that is a tensor."""
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                yield parameter, key, value


def _masks_follow(optimizer: MaskedAdamW) -> None:
    """Bring the masks to where the parameters are."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.mask_of(parameter)
