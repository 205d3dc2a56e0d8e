"""Settings: sections by concern, presets, and the settings of the methods that are chosen. Nothing here needs torch."""

from ebft.config.config import ORGANISATION, EBFTConfig, all_flat_names, closest_preset, preset_settings, said_of
from ebft.config.fields import Needs, flag, flat_name, parse_bytes, setting
from ebft.config.presets import PRESETS
from ebft.config.sections import (
    SECTIONS,
    Data,
    Evaluate,
    Model,
    Output,
    Prune,
    Recover,
    Runtime,
    apportion,
)

__all__ = [
    "ORGANISATION",
    "PRESETS",
    "SECTIONS",
    "Data",
    "EBFTConfig",
    "Evaluate",
    "Model",
    "Needs",
    "Output",
    "Prune",
    "Recover",
    "Runtime",
    "all_flat_names",
    "apportion",
    "closest_preset",
    "flag",
    "flat_name",
    "parse_bytes",
    "preset_settings",
    "said_of",
    "setting",
]
