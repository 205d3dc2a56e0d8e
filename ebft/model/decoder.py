"""Any Hugging Face decoder seen as entrance, blocks and exit; no model code is forked or rewritten.

The model's own ``forward`` is run with the blocks' ``forward`` replaced for the moment: by recorders, to learn what
each block is called with (hidden states at the entrance, and keyword arguments such as rotary embeddings and attention
masks, which differ from block to block in Gemma 3), or by pass-throughs, to run just the final norm and the head.

No parameter is held: the code runs on a skeleton, and embeddings, a block, final norm or head are read into it when
they are needed, and only for as long.

Long, because entrance, blocks and exit must agree about every call of the model.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import PreTrainedModel

from ebft.errors import EBFTError, first_line
from ebft.model.blocks import BlockCall, autocast, find_blocks, first_output, forwards_replaced
from ebft.model.fused import fuse_
from ebft.model.matrices import Matrix, find_matrices
from ebft.model.stand_ins import shapes_only, without_values
from ebft.model.tensors import ModelWeights, Tensors, Weights, put
from ebft_kernels import MaskedLinear, PackedMask

M = TypeVar("M", bound=nn.Module)


class _LastBlockReached(Exception):
    pass


class Decoder:
    """A causal language model, whose blocks are worked on one at a time on ``device``.

    Args:
        model: in memory on the host, or a skeleton; it is put into evaluation mode, and its weights are written only by
            ``store_block``.
        device: where working blocks live and run.
        compute: dtype of the matrix products (autocast); weights and hidden states of working blocks are float32.
        fuse: run norms, rotary embedding and SwiGLU of working blocks in liger-kernel (a GPU alone).
        weights: where the parameters are read from (default: ``model`` itself).

    Raises:
        EBFTError: the model has no stack of blocks, or a later token changes earlier outputs (not a decoder).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        device: torch.device,
        compute: torch.dtype = torch.float32,
        fuse: bool = False,
        weights: Weights | None = None,
    ) -> None:
        self.model, self.weights = model.eval(), weights or ModelWeights(model)
        self.device, self.compute, self._fuse = device, compute, fuse
        self._path, self._stored_blocks = find_blocks(model)
        self.names = [f"{self._path}.{i}" for i in range(len(self._stored_blocks))]
        self.matrices: list[list[Matrix]] = [find_matrices(block) for block in self._stored_blocks]
        self._skeleton = _without_values(model)
        self._shells = list(self._skeleton.get_submodule(self._path))  # the skeleton's blocks: code without weights
        self._entrance, self._exit = self._names_of_the_ends()
        self._ends_on: torch.device | None = None  # where the ends are, while they are anywhere
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="ebft-reads-ahead")
        self._ahead: tuple[int, Future[dict[str, Tensor]]] | None = None  # the next block, on its way
        self._calls: dict[tuple[int, int], list[BlockCall]] = {}  # (batch, seqlen) -> a call for each block
        self._returns = [0] * len(self)  # the length of the tuple that a block returns; 0: hidden states alone
        with self.at_entrance():
            self._width = int(self.enter(torch.zeros(1, 2, dtype=torch.long)).shape[-1])
            self._probe()

    def __len__(self) -> int:
        return len(self._stored_blocks)

    # --- blocks -------------------------------------------------------------------------------------------------

    def stored_block(self, index: int) -> nn.Module:
        """Block ``index`` as the model holds it: of a skeleton, shapes and stored dtypes alone."""
        return self._stored_blocks[index]

    def working_block(self, index: int, tensors: Tensors | None = None) -> nn.Module:
        """Block ``index`` to work on: on the device, float32, evaluation mode, no gradients.

        Args:
            tensors: its weights as they were saved, in place of the model's own. Of these the next block is read ahead.
        """
        if tensors is None:
            ready = self._ahead is not None and self._ahead[0] == index
            values = self._ahead[1].result() if self._ahead and ready else self._read(index)
            self._ahead = None
            if self.weights.on_disk and index + 1 < len(self):
                self._ahead = (index + 1, self._reader.submit(self._read, index + 1))
        else:
            values = self._read(index, tensors)
        block = _cast_parameters(self._filled(index, values), self.device).requires_grad_(False)
        if self._fuse:
            fuse_(block)
        return block

    def copy_of_block(self, index: int) -> nn.Module:
        """A copy of block ``index`` as it is stored."""
        return self._filled(index, self._read(index))

    def block_on_host(self, index: int) -> nn.Module:
        """A copy of block ``index`` to run on the host, in float32."""
        return _cast_parameters(self.copy_of_block(index), torch.device("cpu"))

    def not_finite(self, index: int | None = None) -> str | None:
        """The first stored tensor that holds NaN or infinity, of block ``index``; by default outside of the blocks."""
        of_blocks = tuple(f"{name}." for name in self.names)
        within = of_blocks if index is None else of_blocks[index]
        stored = self._skeleton.state_dict()  # with the buffers that are stored too
        for name, tensor in [*self._skeleton.named_parameters(), *self._skeleton.named_buffers()]:
            if name not in stored or name.startswith(within) == (index is None):
                continue
            value = self.weights.read([name])[name] if tensor.is_meta else tensor
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                return name
        return None

    def whole(self, block_at: Callable[[int], Tensors | None]) -> PreTrainedModel:
        """The whole model to work on: on the device, float32, as ``working_block``; its blocks as ``block_at`` has them
        saved, or, where that gives None, the model's own.
        """
        model = _without_values(self._skeleton)
        for index, name in enumerate(self.names):
            put(model.get_submodule(name), self._read(index, block_at(index)))
        put(model, self.weights.read(dict.fromkeys(self._entrance + self._exit)))
        return _cast_parameters(model, self.device).requires_grad_(False)

    def store_block(self, index: int, tensors: Tensors, masks: Mapping[str, PackedMask]) -> None:
        """Write a block's saved weights into the model in memory; its masked layers take ``masks`` (by full names)."""
        for name, mask in masks.items():
            layer = self.model.get_submodule(name.rpartition(".")[0])
            if isinstance(layer, MaskedLinear):
                layer.set_mask_(mask)
        with torch.no_grad():
            for name, parameter in self._stored_blocks[index].named_parameters():
                parameter.copy_(tensors[f"{self.names[index]}.{name}"])

    def round_as_stored(self, index: int, block: nn.Module) -> dict[str, Tensor]:
        """Round the working block's parameters to the dtypes they are stored in; gives them so, by full names."""
        stored = dict(self._stored_blocks[index].named_parameters())
        weights = {}
        with torch.no_grad():
            for name, parameter in block.named_parameters():
                rounded = parameter.to(stored[name].dtype).to("cpu", copy=True)
                parameter.copy_(rounded)
                weights[f"{self.names[index]}.{name}"] = rounded
        return weights

    def run_block(self, index: int, block: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states (batch, seqlen, width) through ``block``, called as the model calls block ``index``."""
        return self.call_for(index, hidden.shape[0], hidden.shape[1])(block, hidden, self.compute)

    def _read(self, index: int, tensors: Tensors | None = None) -> dict[str, Tensor]:
        """The parameters of block ``index`` by their names in it."""
        prefix = f"{self.names[index]}."
        names = [prefix + name for name, _ in self._stored_blocks[index].named_parameters()]
        return {name.removeprefix(prefix): value for name, value in self.weights.read(names, tensors).items()}

    def _filled(self, index: int, values: dict[str, Tensor]) -> nn.Module:
        shell = self._shells[index]
        block = copy.deepcopy(shell, _shared_configs(shell))
        vars(block).pop("forward", None)  # while the model's own forward runs, the shell has another
        put(block, values)
        return block

    # --- entrance and exit --------------------------------------------------------------------------------------

    @torch.no_grad()
    def enter(self, ids: Tensor) -> Tensor:
        """Token ids (batch, seqlen) -> float32 hidden states (batch, seqlen, width) before the first block."""
        hidden: list[Tensor] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden.append(BlockCall.split(args, kwargs)[0])
            raise _LastBlockReached

        with self.at_entrance() as device:
            self._run_skeleton(ids.to(device), record)
        return hidden[0].detach().float()  # a model with gradient checkpointing may ask for gradients of embeddings

    @torch.no_grad()
    def exit(self, ids: Tensor, hidden: Tensor, compute: torch.dtype | None = None) -> Tensor:
        """Hidden states after the last block -> logits (batch, seqlen, vocabulary), by the model's norm and head.

        Args:
            compute: dtype of the matrix products; by default the decoder's.
        """
        return self.logits(ids, hidden, compute)

    def logits(self, ids: Tensor, hidden: Tensor, compute: torch.dtype | None = None) -> Tensor:
        """``exit``, through which gradients go back to ``hidden``."""

        def passing(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return self._as_returned(index, inside if index == len(self) - 1 else BlockCall.split(args, kwargs)[0])

        def nothing(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return torch.zeros(*ids.shape, embedding.weight.shape[-1], device=inside.device)

        with self.at_exit() as device:
            inside, embedding = hidden.to(device), self._skeleton.get_input_embeddings()
            # What is embedded does not matter here, so an embedding that the head does not share is not read.
            unread = [embedding] if embedding.weight.is_meta else []
            with forwards_replaced(unread, nothing), autocast(device, compute or self.compute):
                return self._run_skeleton(ids.to(device), passing).logits

    @torch.no_grad()
    def forward(self, ids: Tensor, run: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Tensor:
        """The model's own forward, on the host: token ids (batch, seqlen) -> logits.

        Args:
            run: (index, args, kwargs) -> what block ``index`` returns, called once a block.
        """
        host, last = torch.device("cpu"), len(self) - 1

        def running(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            out = run(index, args, kwargs)
            if index == last:  # embeddings and head are not both in memory
                ends.close()
                ends.enter_context(self._holding(self._exit, host))
            return out

        with contextlib.ExitStack() as ends:
            ends.enter_context(self._holding(self._entrance, host))
            return self._run_skeleton(ids, running).logits

    def at_entrance(self) -> contextlib.AbstractContextManager[torch.device]:
        """Embeddings on the host while inside, and not before or after; gives the device. ``enter`` does so itself."""
        return self._holding(self._entrance, torch.device("cpu"))

    def at_exit(self) -> contextlib.AbstractContextManager[torch.device]:
        """Final norm and head on the device while inside, and not before or after. ``exit`` does so itself."""
        return self._holding(self._exit, self.device)

    @contextlib.contextmanager
    def _holding(self, names: list[str], device: torch.device) -> Iterator[torch.device]:
        """Parameters of the skeleton in float32 while inside: on ``device``, or where others are already."""
        outer = self._ends_on
        self._ends_on = outer or device
        absent = {name: p for name in names if (p := self._skeleton.get_parameter(name)).is_meta}
        try:
            for name in absent:  # one by one, so that only one is there in both dtypes
                value = self.weights.read([name])[name].to(self._ends_on)
                put(self._skeleton, {name: value.float() if value.is_floating_point() else value})
            _move(self._skeleton, self._ends_on)
            yield self._ends_on
        finally:
            put(self._skeleton, absent)
            self._ends_on = outer
            if outer is None:
                _move(self._skeleton, torch.device("cpu"))

    def _names_of_the_ends(self) -> tuple[list[str], list[str]]:
        """Parameters that are not in blocks: those that the entrance may need, and those that the exit may need."""
        inside = {id(parameter) for shell in self._shells for parameter in shell.parameters()}
        outside = {n: p for n, p in self._skeleton.named_parameters() if id(p) not in inside}
        embedding, head = (
            {id(parameter) for parameter in end.parameters()}
            for end in (self._skeleton.get_input_embeddings(), self._skeleton.get_output_embeddings())
        )
        return (
            [name for name, parameter in outside.items() if id(parameter) not in head - embedding],
            [name for name, parameter in outside.items() if id(parameter) not in embedding - head],
        )

    # --- how the model calls its blocks -------------------------------------------------------------------------

    def call_for(self, index: int, batch: int, seqlen: int) -> BlockCall:
        """How the model calls block ``index`` for a batch of that shape; tensors are on the device."""
        if (batch, seqlen) not in self._calls:
            # Random tokens, twice: an argument that depends on the tokens could not be reused for other samples.
            with self.at_entrance():
                first, second = (self._record_calls(batch, seqlen, seed, last=len(self) - 1) for seed in (0, 1))
            for name, one, other in zip(self.names, first, second, strict=True):
                if one.has_nan():
                    raise EBFTError(
                        f"{type(self.model).__name__} gives {name} arguments that hold NaN; expected a configuration "
                        "by which positions can be computed (rope_parameters, head_dim, max_position_embeddings)"
                    )
                if not one.equals(other):
                    raise EBFTError(
                        f"{type(self.model).__name__} gives {name} arguments that depend on the tokens; "
                        "expected a decoder whose blocks need only hidden states and positions"
                    )
            moved: dict[int, Tensor] = {}  # blocks share most tensors, and shall on the device

            def move(tensor: Tensor) -> Tensor:
                return moved.setdefault(id(tensor), tensor.to(self.device))

            self._calls[batch, seqlen] = [call.map_tensors(move) for call in first]
        return self._calls[batch, seqlen][index]

    @torch.no_grad()
    def _record_calls(self, batch: int, seqlen: int, seed: int, last: int) -> list[BlockCall]:
        """How the model calls its blocks up to the ``last`` one, for random tokens of that shape."""
        calls: list[BlockCall] = []

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, call = BlockCall.split(args, kwargs)
            calls.append(call)
            if index == last:
                raise _LastBlockReached
            return self._as_returned(index, hidden)

        vocabulary = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (batch, seqlen), generator=torch.Generator().manual_seed(seed))
        with self.at_entrance() as device:
            self._run_skeleton(ids.to(device), record)
        if len(calls) != last + 1:
            raise EBFTError(
                f"{type(self.model).__name__} does not call its {len(self)} {self._path} one after another: "
                f"it called {len(calls)} before number {last}"
            )
        return calls

    def _as_returned(self, index: int, hidden: Tensor) -> Any:
        """Hidden states in the form that block ``index`` returns them in."""
        length = self._returns[index]
        return (hidden, *[None] * (length - 1)) if length else hidden

    def _run_skeleton(self, ids: Tensor, instead: Callable[[int, tuple[Any, ...], dict[str, Any]], Any]) -> Any:
        """The model's forward on ``ids``, with ``instead(index, args, kwargs)`` in place of every block's forward."""
        with forwards_replaced(self._shells, instead), contextlib.suppress(_LastBlockReached):
            return self._skeleton(input_ids=ids, use_cache=False)

    @torch.no_grad()
    def _probe(self) -> None:
        """Run a few hidden states through one block of each kind: what does it return, and is it causal?"""
        for index, block in enumerate(self._stored_blocks):
            if type(block) in map(type, self._stored_blocks[:index]):
                continue
            calls, width = self._record_calls(2, 6, seed=0, last=index), self.width()
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(1, 6, width, generator=generator).repeat(2, 1, 1)
            hidden[1, -1] = torch.randn(width, generator=generator)
            kind = type(self.model).__name__
            try:
                out = self._try_block(index, calls[index], hidden)
            except (RuntimeError, ValueError, LookupError, TypeError) as error:  # of the model's own forward
                raise EBFTError(
                    f"{kind} does not run as its config.json has it: {self.names[index]}: {first_line(error)}"
                ) from error
            tensor = first_output(out)
            if not isinstance(tensor, Tensor) or tensor.shape != hidden.shape:
                raise EBFTError(f"{kind} does not pass hidden states through its {self._path} one after another")
            for same, other in enumerate(self._stored_blocks):
                if type(other) is type(block):
                    self._returns[same] = len(out) if isinstance(out, tuple) else 0
            if isinstance(tensor, FakeTensor):
                continue  # a skeleton without values, for a plan
            # Equal but for rounding: rows of one batch may take different roads through a grouped expert product.
            first, second = tensor[:, :-1].float()
            if (first - second).abs().max() > 1e-4 * tensor.float().std():
                raise EBFTError(f"{kind} is not a decoder: a later token changes the outputs at earlier ones")

    def _try_block(self, index: int, call: BlockCall, hidden: Tensor) -> Any:
        """What block ``index`` returns for ``hidden``; on fake tensors where its weights are on the meta device."""
        block = self.copy_of_block(index)
        if all(not p.is_meta for p in block.parameters()):
            block = _cast_parameters(block, torch.device("cpu"))
            call = call.map_tensors(lambda tensor: tensor.cpu())
            return block(hidden, *call.args, **call.kwargs)
        block = block.float()
        with shapes_only():
            block, call = block._apply(without_values), call.map_tensors(without_values)
            return block(without_values(hidden), *call.args, **call.kwargs)

    def width(self) -> int:
        """Channels of the hidden states."""
        return self._width


def _without_values(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of the model whose parameters are on the meta device; buffers (rotary tables) are copied."""
    memo: dict[int, Any] = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for parameter in model.parameters()
    }
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        if hasattr(
            vars(module).get("forward"), "_torchdynamo_orig_callable"
        ):  # compiled, for the model that was copied
            del module.forward
        for name, layer in module.named_children():
            if isinstance(layer, MaskedLinear):  # the zeros are in the weight, and other masks will be
                setattr(module, name, _unmasked(layer))
    return skeleton


def _unmasked(layer: MaskedLinear) -> nn.Linear:
    plain = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    plain.weight, plain.bias = layer.weight, layer.bias
    return plain.train(layer.training)


def _shared_configs(block: nn.Module) -> dict[int, Any]:
    """A deepcopy memo that keeps the model's configuration one object."""
    return {id(m.config): m.config for m in block.modules() if hasattr(m, "config")}


def _cast_parameters(module: M, device: torch.device) -> M:
    """Move ``module`` and make its floating parameters float32; buffers (rotary tables) keep their dtype."""
    _move(module, device)
    for parameter in module.parameters():
        if not parameter.is_meta and parameter.is_floating_point():
            parameter.data = parameter.data.float()
    return module


def _move(module: M, device: torch.device) -> M:
    return module._apply(lambda t: t if t.is_meta else t.to(device))
