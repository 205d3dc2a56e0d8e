"""Running a block on shapes alone: no storage, no arithmetic, whatever the model's size."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Inside, tensors are fake (torch's ``FakeTensorMode``), experts' grouped products among them."""
    with FakeTensorMode(), _GroupedAsOne():
        yield


def without_values(tensor: Tensor) -> Tensor:
    """Inside ``shapes_only``: a fake CPU tensor of that shape (a fake one of another device fails in autograd)."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")


class _GroupedAsOne(TorchFunctionMode):
    """Grouped products as one product with the first expert: the same shapes, FLOPs and sizes of gradients.

    The fake kernel of ``grouped_mm`` takes bfloat16 alone, unlike the real one.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _GROUPED:
            return args[0] @ args[1][0]
        return func(*args, **(kwargs or {}))


_GROUPED = (torch.nn.functional.grouped_mm, torch._grouped_mm)
