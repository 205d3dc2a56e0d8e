"""Which weights are updated in the backward pass: a layer finds the optimizer that uses its gradient at once.

An optimizer enters its weights, a layer asks for them; neither knows the other, and nothing is hung on parameters.
"""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_updaters: Any = WeakTensorKeyDictionary()  # weight -> a weak reference to its updater


class Updater(Protocol):
    """What takes a step on a weight from the two operands of its gradient."""

    def update(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        """Take the step that belongs to the gradient dy^T x: dy (..., N), x (..., K), weight (N, K)."""


def enter(weight: Tensor, updater: Updater) -> None:
    """From now on ``updater`` takes the steps of ``weight``, as long as it lives."""
    _updaters[weight] = weakref.ref(updater)


def updater_of(weight: Tensor) -> Updater | None:
    """Who updates ``weight`` in the backward pass; None where its gradient goes to ``.grad`` as usual."""
    return _updaters[weight]() if weight in _updaters else None
