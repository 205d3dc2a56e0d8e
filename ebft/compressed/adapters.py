"""peft's LoRA beside compressed layers: the adapters are trained, the survivors stay as they are.

peft imports this file in the middle of importing itself (``registering.py``).
"""

from __future__ import annotations

import sys
import warnings
from functools import wraps
from importlib import import_module
from typing import Any

from ebft.errors import EBFTError
from ebft_kernels import CompressedLinear

_layer: Any = import_module("peft.tuners.lora.layer")
_MODEL = "peft.tuners.lora.model"


class CompressedLora(_layer.Linear):
    """peft's adapter of a linear layer, whose base is a ``CompressedLinear``.

    Merging needs a weight to merge into: ``ebft.to_dense(model)`` first.
    """

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """As peft's; ``EBFTError`` where the layer has no weight."""
        if isinstance(self.get_base_layer(), CompressedLinear):
            raise EBFTError("an adapter cannot be merged into a compressed layer; expected ebft.to_dense(model) before")
        super().merge(*args, **kwargs)


def register() -> None:
    """Put ours before peft's default, which knows layers of torch and transformers alone."""
    model: Any = sys.modules[_MODEL]
    default = model.dispatch_default
    if getattr(default, "of_ebft", False):
        return

    @wraps(default)
    def dispatch(target: Any, adapter_name: str, config: Any, **kwargs: Any) -> Any:
        base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
        if not isinstance(base, CompressedLinear) or kwargs.get("parameter_name") is not None:
            return default(target, adapter_name, config=config, **kwargs)
        start = config.init_lora_weights
        if config.use_dora or (isinstance(start, str) and start not in ("gaussian", "orthogonal")):
            how = "use_dora" if config.use_dora else f"init_lora_weights {start!r}"
            raise EBFTError(f"LoRA with {how} needs the weights of its layers; expected ebft.to_dense(model) before")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Unsupported layer type")  # it has in_features and out_features
            return CompressedLora(target, adapter_name, config=config, **kwargs)

    dispatch.of_ebft = True  # type: ignore[attr-defined]
    model.dispatch_default = dispatch
