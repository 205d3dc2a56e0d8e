"""Recoveries, of one block inside the walk and of the whole model after it; importing this package registers ours."""

from ebft.recovery import losses, optimizers  # noqa: I001  (the order is that in which recoveries can follow one another)
from ebft.recovery import layerwise, ebft, lora, full, distill
from ebft.recovery.protocol import BlockRecovery, Footprint, Loss, Optimizer, Place, Recovery, WholeModelRecovery

__all__ = [
    "BlockRecovery",
    "Footprint",
    "Loss",
    "Optimizer",
    "Place",
    "Recovery",
    "WholeModelRecovery",
    "distill",
    "ebft",
    "full",
    "layerwise",
    "lora",
    "losses",
    "optimizers",
]
