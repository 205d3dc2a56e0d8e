"""A model by its shapes alone, from its configuration: what methods look at to say what they need."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ebft.config import EBFTConfig
from ebft.model.blocks import BlockCall, find_blocks
from ebft.model.checkpoint import model_of
from ebft.model.decoder import Decoder
from ebft.model.stand_ins import shapes_only, without_values
from ebft.pruning.statistics import PRODUCTS, InputStatistics


class Shapes:
    """A model on one device, by its shapes.

    Attributes:
        config: the settings that are planned for; ``with_settings`` gives the same with others.
        gpu: whether the device is one.
        compute: dtype of the matrix products there.
        stored: dtype of the checkpoint.
        decoder: the model with a vocabulary of 8: real outside its blocks, so that it can be entered, meta inside.
        parameters, in_blocks: of the whole model, tied ones once; and of its blocks.
        index, largest: which block has most parameters, and how many.
        matrices: those of that block, by name.
        width: of hidden states.
    """

    def __init__(self, config: EBFTConfig, model_config: Any, gpu: bool, compute: torch.dtype) -> None:
        self.config, self.gpu, self.compute = config, gpu, compute
        self.stored = model_config.dtype or torch.float32
        self.model_config = model_config.get_text_config()
        self.vocabulary = self.model_config.vocab_size
        whole = _on_meta(config, model_config)
        self.parameters = sum(p.numel() for p in whole.parameters())
        self.tied = whole.get_input_embeddings().weight is whole.get_output_embeddings().weight
        self.decoder = Decoder(_stand_in(config, model_config), torch.device("cpu"))
        sizes = [sum(p.numel() for p in self.decoder.stored_block(i).parameters()) for i in range(len(self.decoder))]
        self.index, self.largest, self.in_blocks = sizes.index(max(sizes)), max(sizes), sum(sizes)
        self.width = self.decoder.width()
        self.matrices = {m.name: m for m in self.decoder.matrices[self.index]}

    def with_settings(self, config: EBFTConfig) -> Shapes:
        """The same model, planned for with other settings."""
        other = copy.copy(self)
        other.config = config
        return other

    @property
    def block(self) -> nn.Module:
        """The largest block, on the meta device."""
        return self.decoder.stored_block(self.index)

    @property
    def is_bfloat16(self) -> bool:
        """Whether products are in bfloat16."""
        return self.compute == torch.bfloat16

    @property
    def is_float16(self) -> bool:
        """Whether products are in float16, which need a loss scale."""
        return self.compute == torch.float16

    @contextlib.contextmanager
    def fakes(self, batch: int, seqlen: int, *, flash: bool) -> Iterator[tuple[nn.Module, BlockCall]]:
        """Where tensors are fake: the largest block in float32, and how it is called."""
        with self.blocks(1, batch, seqlen, flash=flash) as ((block,), call):
            yield block, call

    @contextlib.contextmanager
    def blocks(
        self, count: int, batch: int, seqlen: int, *, flash: bool
    ) -> Iterator[tuple[list[nn.Module], BlockCall]]:
        """The same with so many of it."""
        copies = [self.decoder.copy_of_block(self.index).float() for _ in range(count)]
        call = self.decoder.call_for(self.index, batch, seqlen)
        with shapes_only(kept=1 - self.config.prune.mask_pattern.sparsity, flash=flash):
            fakes = [block._apply(without_values).requires_grad_(False) for block in copies]
            yield fakes, call.map_tensors(without_values)

    @cached_property
    def gram_bytes(self) -> int:
        """Of all Gram matrices of a block's inputs, once where several matrices read one tensor."""
        seqlen = self.config.data.seqlen
        with self.fakes(1, seqlen, flash=self.gpu) as (block, call), Observed() as observed:
            call(block, torch.empty(1, seqlen, self.width), compute=self.compute)
        experts = sum(m.experts * m.inputs**2 for m in self.matrices.values() if m.experts > 1)
        return 4 * (sum(n**2 for n in observed.widths) + experts)


def _on_meta(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    return model_of(model_config, config.model.source, trust_remote_code=config.model.trust_remote_code)


def _stand_in(config: EBFTConfig, model_config: Any) -> PreTrainedModel:
    """The model with a vocabulary of 8: real outside its blocks, so that it can be entered, and on meta inside."""
    small = copy.deepcopy(model_config)
    small.get_text_config().update({"vocab_size": 8, "pad_token_id": 0})
    model = _on_meta(config, small)
    _, blocks = find_blocks(model)
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside:
            module.to_empty(device="cpu", recurse=False)
            model._init_weights(module)
    return model


class Observed(TorchFunctionMode):
    """Inputs of linear layers go into statistics, as they do in the dense pass.

    Attributes:
        widths: inputs of the layers in turn, once where several multiply one tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.widths: list[int] = []
        self._last: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in PRODUCTS and max(PRODUCTS[func]) < len(args):
            x, weight = (args[place] for place in PRODUCTS[func])
            if isinstance(weight, nn.Parameter) and x is not self._last:
                self._last = x
                self.widths.append(x.shape[-1])
                InputStatistics.empty(x.shape[-1], x.device).add(x)
        return func(*args, **(kwargs or {}))
