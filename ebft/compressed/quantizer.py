"""How transformers loads and saves a compressed model: ``quant_method: ebft`` in its config.json.

transformers imports this file in the middle of importing itself (``registering.py``), so what needs the whole of it is
imported by the method that uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ebft.errors import EBFTError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "ebft"
FORMAT = 2
# What stands in config.json where transformers looks for the name of a file: without ebft it stops there, and says it.
NOTE = "compressed by ebft; pip install ebft, and import ebft before this model is loaded"


def register() -> None:
    """Enter both classes into transformers' tables."""
    AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = CompressedConfig
    AUTO_QUANTIZER_MAPPING[METHOD] = CompressedQuantizer


class CompressedConfig(QuantizationConfigMixin):
    """The index of a compressed model, ``quantization_config`` in its config.json (docs/layouts.md).

    Args:
        layers: name -> ``in_features``, ``out_features``, ``kept``, ``bias``, ``values``.
        heads: attention module -> what it is told of its number of heads.

    Raises:
        EBFTError: something in it has another type than it should.
    """

    def __init__(self, layers: Any = None, heads: Any = None, format: Any = FORMAT, **_: Any) -> None:
        from ebft.compressed.index import check_index

        self.quant_method = METHOD
        self.format = format
        self.layers: dict[str, dict[str, Any]] = layers
        self.heads: dict[str, dict[str, int]] = {} if heads is None else heads
        check_index(vars(self), "config.json")


class CompressedQuantizer(HfQuantizer):
    """Puts ``CompressedLinear`` layers into a model without weights before it is loaded, and checks them afterwards."""

    requires_calibration = True  # a model is compressed by ebft compress, not while it is loaded
    quantization_config: CompressedConfig

    def update_attn_implementation(self, config: Any) -> Any:
        """Sizes are looked at, and the note in place of a file name taken away, before anything is built."""
        from ebft.model.limits import check_settings

        name = str(getattr(config, "name_or_path", "") or "of this configuration")
        check_settings(config.to_dict(), name)
        blocks = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(blocks, int) and blocks > len(self.quantization_config.layers):
            raise EBFTError(
                f"model {name}: its config.json has num_hidden_layers {blocks}, and lists "
                f"{len(self.quantization_config.layers)} layers"
            )
        if getattr(config, "transformers_weights", None) == NOTE:
            del config.transformers_weights
        return config

    update_tp_plan = update_attn_implementation  # what older versions of transformers call at that moment

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        from ebft.compressed.index import check_files, marker, name_pattern, put_layers, tell_heads

        index, where = self.quantization_config, Path(model.name_or_path) / "config.json"
        self._narrow = put_layers(model, index.layers, where)
        tell_heads(model, index.heads, where)
        if checkpoint_files is not None:
            check_files(model, [Path(file) for file in checkpoint_files], index.layers)
        if mark := marker(index.layers):
            ignored = model._keys_to_ignore_on_load_unexpected or ()
            model._keys_to_ignore_on_load_unexpected = {*ignored, name_pattern(mark)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        from ebft.compressed.index import check_loaded, try_out

        where = Path(model.name_or_path)
        check_loaded(model, where)
        if self._narrow:
            try_out(model, where / "config.json")
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What ``save_pretrained`` writes: the layers as they are now, with the marker (``index.marker``)."""
        from ebft.compressed.index import described, marker

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        layers = self.quantization_config.layers
        layers.update({name: described(model.get_submodule(name)) for name in layers})
        mark = marker(layers)
        return model.state_dict() | ({mark: torch.zeros(1)} if mark else {}), {}

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        from ebft.compressed.layers import to_dense

        dense: PreTrainedModel = to_dense(model)
        return dense

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes a folder that loads again."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters beside the layers are; the survivors stay as they are."""
        return True
