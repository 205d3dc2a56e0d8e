"""Which weights are known to hold zeros where their mask prunes, so that products need no mask at all.

Knowledge is tied to the versions of weight and words: any in-place change that torch sees ends it. Writes through
``.data`` are not seen (``MaskedLinear.apply_mask_`` after them). Nothing is hung on parameters.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_known: Any = WeakTensorKeyDictionary()  # weight -> (its version, a weak reference to the words, their version)


def mark_zeroed(weight: Tensor, words: Tensor) -> None:
    """Note that ``weight`` holds zeros where ``words`` prune, as both are now."""
    if not (weight.is_inference() or words.is_inference()):  # inference tensors have no version
        _known[weight] = (weight._version, weakref.ref(words), words._version)


def known_words(weight: Tensor) -> Tensor | None:
    """The words by which ``weight`` was last marked, if they are still there."""
    return _known[weight][1]() if weight in _known else None


def is_zeroed(weight: Tensor, words: Tensor) -> bool:
    """Whether ``weight`` is known to hold zeros where ``words`` prune; False where nothing is known."""
    if weight.is_inference() or words.is_inference() or weight not in _known:
        return False
    version, marked, words_version = _known[weight]
    return weight._version == version and marked() is words and words._version == words_version
