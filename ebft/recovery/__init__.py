"""Recoveries of one block inside the walk: what they are given and give back, and how they follow one another."""

from ebft.recovery.layerwise import Layerwise
from ebft.recovery.task import BlockRecovery, BlockResult, BlockTask, Chain, Forward

__all__ = ["BlockRecovery", "BlockResult", "BlockTask", "Chain", "Forward", "Layerwise"]
