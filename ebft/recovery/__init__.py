"""Recoveries, of one block inside the walk and of the whole model after it: what they are given and give back."""

from ebft.recovery.full import FullFineTuning
from ebft.recovery.ebft.halves import HalfByHalf
from ebft.recovery.layerwise import Layerwise
from ebft.recovery.lora import LoRA
from ebft.recovery.ebft.pairs import InPairs
from ebft.recovery.task import BlockRecovery, BlockResult, BlockTask, Chain, Following, Forward
from ebft.recovery.whole_model import WholeModelRecovery, WholeResult, WholeTask

__all__ = [
    "BlockRecovery",
    "BlockResult",
    "BlockTask",
    "Chain",
    "Following",
    "Forward",
    "FullFineTuning",
    "HalfByHalf",
    "InPairs",
    "Layerwise",
    "LoRA",
    "WholeModelRecovery",
    "WholeResult",
    "WholeTask",
]
