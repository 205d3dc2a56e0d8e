"""``PackedMask``: one bit a weight; and the file that keeps masks (docs/layouts.md)."""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ebft_kernels import sharding
from ebft_kernels.ops import words_in

_OPS = torch.ops.ebft_kernels


@dataclass(frozen=True, eq=False)
class PackedMask:
    """Which weights are kept, one bit each: 1 = kept, 0 = pruned.

    Attributes:
        words: int32 (..., ceil(K / 32)); bit i of word j is place 32 j + i of a row, tail bits are 0.
        shape: the shape (..., K) of the weight that it masks.

    Raises:
        ValueError: ``words`` do not fit ``shape``.
    """

    words: Tensor
    shape: torch.Size

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", torch.Size(self.shape))
        object.__setattr__(self, "words", sharding.local(self.words))  # tensor parallelism replicates buffers
        if not self.shape or 0 in self.shape[-1:]:
            raise ValueError(f"PackedMask got shape {tuple(self.shape)}; expected (..., K) with K of at least 1")
        expected = (*self.shape[:-1], words_in(self.shape[-1]))
        if self.words.dtype != torch.int32 or tuple(self.words.shape) != expected:
            given = f"{self.words.dtype} {tuple(self.words.shape)}"
            raise ValueError(
                f"PackedMask got words {given} for shape {tuple(self.shape)}; expected torch.int32 {expected}"
            )

    # --- made from ----------------------------------------------------------------------------------------------

    @classmethod
    def from_dense(cls, mask: Tensor) -> PackedMask:
        """From a bool mask (..., K), True = kept."""
        if mask.dtype != torch.bool or mask.ndim == 0:
            raise ValueError(
                f"PackedMask.from_dense got {mask.dtype} {tuple(mask.shape)}; expected torch.bool (..., K)"
            )
        return cls(_OPS.pack_mask(mask), mask.shape)

    @classmethod
    def from_nonzero(cls, weight: Tensor) -> PackedMask:
        """What a pruned weight (..., K) shows: kept where it is not zero."""
        return cls.from_dense(weight.detach() != 0)

    @classmethod
    def from_topk(cls, scores: Tensor, k: int) -> PackedMask:
        """Keep the ``k`` highest of every row of float scores (..., K); ties go left, NaN is highest."""
        _check_scores("from_topk", scores)
        if not 0 <= k <= scores.shape[-1]:
            raise ValueError(
                f"PackedMask.from_topk got k = {k} for rows of {scores.shape[-1]}; expected 0 to that many"
            )
        return cls(_OPS.topk_mask(scores.detach(), k), scores.shape)

    @classmethod
    def from_scores(cls, scores: Tensor, n: int, m: int) -> PackedMask:
        """N:M: keep the ``n`` highest of every ``m`` consecutive scores (..., K); ties and NaN as ``from_topk``."""
        _check_scores("from_scores", scores)
        _check_nm("from_scores", n, m, scores.shape[-1])
        return cls(_OPS.nm_mask(scores.detach(), n, m), scores.shape)

    @classmethod
    def ones(cls, shape: tuple[int, ...] | torch.Size, device: torch.device | str | None = None) -> PackedMask:
        """Everything kept."""
        return cls.from_dense(torch.ones(shape, dtype=torch.bool, device=device))

    # --- read as ------------------------------------------------------------------------------------------------

    def dense(self) -> Tensor:
        """Bool (..., K), True = kept."""
        return _OPS.unpack_mask(self.words, self.shape[-1])

    def numel(self) -> int:
        """How many weights it masks."""
        return math.prod(self.shape)

    def count(self) -> int:
        """How many it keeps. A sync point on a GPU."""
        return int(self.row_offsets()[-1])

    def row_offsets(self) -> Tensor:
        """int64 (rows + 1): how many weights are kept before each row, and in all; rows are all leading places."""
        return _OPS.row_offsets(self.words)

    def density(self) -> float:
        """The kept share, 1 - sparsity. A sync point on a GPU."""
        return self.count() / self.numel() if self.numel() else 1.0

    def is_nm(self, n: int, m: int) -> bool:
        """At most ``n`` of every ``m`` consecutive inputs are kept, in every row. A sync point on a GPU."""
        _check_nm("is_nm", n, m, self.shape[-1])
        return bool(_OPS.is_nm(self.words, self.shape[-1], n, m))

    def __eq__(self, other: object) -> bool:
        """Same shape and same bits, on whatever devices. A sync point on a GPU."""
        if not isinstance(other, PackedMask):
            return NotImplemented
        return self.shape == other.shape and torch.equal(self.words, other.words.to(self.words.device))

    __hash__ = None  # type: ignore[assignment]

    # --- changed ------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the words are."""
        return self.words.device

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedMask:
        """The same mask on ``device``; itself if it is there."""
        words = self.words.to(device, non_blocking=non_blocking)
        return self if words is self.words else PackedMask(words, self.shape)

    def part_of(self, weight: Tensor) -> PackedMask:
        """The mask of what this process holds of ``weight``, a tensor that this masks; itself unless it is sharded."""
        if not sharding.is_sharded(weight):
            return self
        return PackedMask.from_dense(sharding.part_of(self.dense(), weight))

    @torch.no_grad()
    def zero_pruned_(self, weight: Tensor) -> Tensor:
        """Set the pruned entries of ``weight`` (..., K) to exactly +0, in place; gives ``weight``."""
        if weight.shape != self.shape:
            raise ValueError(
                f"zero_pruned_ got a weight {tuple(weight.shape)}; expected {tuple(self.shape)}, the mask's shape"
            )
        held = self.to(weight.device).part_of(weight)
        sharding.local(weight).masked_fill_(~held.dense(), 0.0)
        return weight

    def __repr__(self) -> str:
        return f"PackedMask(shape={tuple(self.shape)}, device={self.device})"


MaskLike: TypeAlias = PackedMask | Tensor


def as_packed(mask: MaskLike) -> PackedMask:
    """A ``PackedMask`` from itself or from a bool tensor."""
    return mask if isinstance(mask, PackedMask) else PackedMask.from_dense(mask)


def _check_scores(who: str, scores: Tensor) -> None:
    if not scores.is_floating_point() or scores.ndim == 0 or scores.shape[-1] == 0:
        raise ValueError(
            f"PackedMask.{who} got scores {scores.dtype} {tuple(scores.shape)}; expected floats (..., K), K >= 1"
        )


def _check_nm(who: str, n: int, m: int, width: int) -> None:
    if not 0 < n <= m or width % m:
        raise ValueError(
            f"PackedMask.{who} got {n}:{m} for rows of {width}; expected 0 < N <= M and M dividing the width"
        )


# --- files --------------------------------------------------------------------------------------------------------


def masks_of(module: nn.Module) -> dict[str, PackedMask]:
    """Weight name -> mask, for every ``MaskedLinear`` (what has a ``PackedMask`` as ``mask``) inside ``module``."""
    return {
        f"{path}.weight" if path else "weight": layer.mask
        for path, layer in module.named_modules()
        if isinstance(getattr(layer, "mask", None), PackedMask)
    }


def save_masks(masks: nn.Module | Mapping[str, PackedMask | Tensor], path: str | os.PathLike[str]) -> None:
    """Write masks to a safetensors file: key = weight name, tensor = words; metadata["shapes"], JSON, has the shapes.

    Args:
        masks: weight name -> mask, or a module with ``MaskedLinear`` layers inside.
        path: the file; its folder exists.
    """
    named = masks_of(masks) if isinstance(masks, nn.Module) else {name: as_packed(m) for name, m in masks.items()}
    words = {name: mask.words.cpu().contiguous() for name, mask in named.items()}
    with Path(path).open("ab") as file:  # as the umask says: safetensors makes files for their owner alone
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    # One metadata entry: safetensors writes several in no fixed order, and equal masks shall give equal files.
    save_file(words, path, metadata={"shapes": json.dumps({name: list(mask.shape) for name, mask in named.items()})})
    Path(path).chmod(mode)


def load_masks(path: str | os.PathLike[str]) -> dict[str, PackedMask]:
    """Weight name -> mask, from a file of ``save_masks`` or from one that holds plain bool tensors (True = kept).

    Raises:
        ValueError: the file is not a safetensors file, or a tensor in it is no mask.
        OSError: it cannot be read.
    """
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise ValueError(f"{path} is no file; expected a safetensors file")
    return dict(_read_masks(path))


def _read_masks(path: str | os.PathLike[str]) -> Iterator[tuple[str, PackedMask]]:
    try:
        with safe_open(path, framework="pt") as file:
            shapes = json.loads((file.metadata() or {}).get("shapes", "{}"))
            if not isinstance(shapes, dict):
                raise ValueError(f"metadata shapes is {type(shapes).__name__}; expected a JSON object, name -> shape")
            for name in file.keys():  # noqa: SIM118  (a safetensors file, not a dict)
                tensor = file.get_tensor(name)
                if tensor.dtype == torch.bool:
                    yield name, PackedMask.from_dense(tensor)
                elif name in shapes:
                    mask = PackedMask(tensor, torch.Size(shapes[name]))
                    if not torch.equal(PackedMask.from_dense(mask.dense()).words, mask.words):
                        raise ValueError(f"{name} has bits set past the end of a row of {mask.shape[-1]}")
                    yield name, mask
                else:
                    raise ValueError(
                        f"{name} is {tensor.dtype}; expected bool, or int32 words with a shape in the metadata"
                    )
    except SafetensorError as error:
        raise ValueError(f"not a safetensors file: {error}") from None
