"""Masks that are partly chosen anew while a block is tuned: weak kept weights against promising pruned ones.

A dense gradient says of every pruned weight what it would do first (RigL, arXiv 1911.11134). Every ``--refresh-every``
steps a pass of its own makes such gradients on a few batches; then in every row the kept weights of the least
|w| sqrt(v), v AdamW's second moment, give way to as many pruned ones of the largest growth score, which begin at 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ebft.config import EBFTConfig
from ebft.model.matrices import find_matrices
from ebft.recovery.ebft import EBFT
from ebft_kernels import MaskedAdamW, PackedMask

BATCHES = 4  # whose gradients a refresh looks at
UNTIL = 0.75  # share of a block's steps after which its masks stay: what is new has to be tuned


class MaskRefresh:
    """The masks of a block while it is tuned.

    Args:
        masks: parameter name -> kept weights at first.
        optimizer: has them too; of survivors it keeps the states.
        steps: in which the block is tuned.

    Attributes:
        masks: parameter name -> kept weights now.
    """

    def __init__(
        self,
        config: EBFTConfig,
        block: nn.Module,
        masks: Mapping[str, PackedMask],
        optimizer: MaskedAdamW,
        steps: int,
    ) -> None:
        self._own, self._pattern = config.of_method(EBFT.Settings), config.prune.mask_pattern
        self._optimizer, self._steps, self._done = optimizer, steps, 0
        self._first, self.masks = masks, dict(masks)
        self._matrices = [matrix for matrix in find_matrices(block) if matrix.name in masks]
        self._weights = {name: block.get_parameter(name) for name in masks}
        self._growth: dict[str, Tensor] = {}

    def due(self, step: int) -> bool:
        """Whether masks are chosen anew after so many steps."""
        every = self._own.refresh_every
        return every > 0 and step % every == 0 and step <= UNTIL * self._steps

    def see_gradients(self) -> None:
        """Add a batch's gradients to the growth scores: |mean of g|, or with ``gradient2`` the mean of g^2."""
        for name, weight in self._weights.items():
            if weight.grad is not None:
                gradient = weight.grad.float()
                score = self._growth.setdefault(name, torch.zeros_like(gradient))
                score.add_(gradient if self._own.refresh_grow == "gradient" else gradient.square())

    @torch.no_grad()
    def choose(self) -> None:
        """Take new masks, here and in the optimizer, from the scores, which then begin anew."""
        pattern = self._pattern
        for matrix in self._matrices:
            weight, second = self._weights[matrix.name], self._optimizer.second_moment(self._weights[matrix.name])
            growth = self._growth.pop(matrix.name, None)
            if growth is None:  # no token went there
                continue
            drop = weight.float().abs() if second is None else weight.float().abs() * second.float().sqrt()
            mask = self.masks[matrix.name].dense().to(weight.device)
            of_experts = [matrix.by_expert(tensor) for tensor in (mask, drop, growth.abs_())]
            for kept, weak, strong in zip(*of_experts, strict=True):
                kept.copy_(exchanged(kept, weak, strong, self._own.refresh_share, pattern.group))
            self.masks[matrix.name] = PackedMask.from_dense(mask)
            self._optimizer.set_mask_(weight, self.masks[matrix.name])
        self._done += 1

    def changed(self) -> dict[str, PackedMask]:
        """The masks that are others now than at first."""
        return {name: mask for name, mask in self.masks.items() if mask != self._first[name]}

    def notes(self) -> list[str]:
        """What has been done, in a sentence; nothing where nothing has."""
        if not self._done:
            return []
        new = sum(int((mask.dense() & ~self._first[name].dense()).sum()) for name, mask in self.masks.items())
        share = new / sum(mask.count() for mask in self._first.values())
        return [f"masks refreshed {self._done} times: {share:.2%} of the kept weights are others than at first"]


def exchanged(mask: Tensor, drop: Tensor, grow: Tensor, share: float, group: int = 0) -> Tensor:
    """``mask`` with ``share`` of every row's kept entries chosen anew; rows, and groups, keep as many as before.

    Args:
        mask: bool (rows, inputs), True = kept.
        drop: (rows, inputs), at least 0: of kept entries those of the least go.
        grow: (rows, inputs), at least 0: of pruned entries those of the largest come; NaN is 0.
        group: M of N:M: within M consecutive inputs, one entry gives way to one of the same group; 0 for none.
    """
    count = (share * mask.sum(-1, keepdim=True)).round()
    weak = drop.masked_fill(~mask, torch.inf)
    strong = grow.nan_to_num(0.0).masked_fill(mask, -torch.inf)
    if not group:
        count = count.minimum((~mask).sum(-1, keepdim=True))
        return (mask & ~(_places(weak) < count)) | (_places(-strong) < count)
    weak, strong, kept = (tensor.unflatten(-1, (-1, group)) for tensor in (weak, strong, mask))
    weakest, strongest = weak.min(-1, keepdim=True), strong.max(-1, keepdim=True)
    chosen = (_places(weakest.values.squeeze(-1)) < count).unsqueeze(-1)
    chosen &= weakest.values.isfinite() & strongest.values.isfinite()  # something to give, and something to take
    new = kept.scatter(-1, weakest.indices, ~chosen & kept.gather(-1, weakest.indices))
    new.scatter_(-1, strongest.indices, chosen | kept.gather(-1, strongest.indices))
    return new.flatten(-2)


def _places(scores: Tensor) -> Tensor:
    """The place of every entry among those of its row, the least first; of equal ones the left one is first."""
    return scores.argsort(dim=-1, stable=True).argsort(dim=-1)
