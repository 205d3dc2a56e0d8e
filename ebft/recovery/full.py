"""``--recover full``: masked fine-tuning of all blocks on the language-model loss, for small models.

All of it is in memory at once, in float32: weights, gradients and two moments of every parameter in the blocks. Pruned
weights are held at exactly zero by the optimizer, so the model runs as it is, without masks. Norms and biases are tuned
too, without weight decay; embeddings, final norm, head and routers are not.
"""

from __future__ import annotations

from ebft.config.config import EBFTConfig
from ebft.model.matrices import router_paths
from ebft.recovery.whole_model import WholeResult, WholeTask, fit
from ebft_kernels import MaskedAdamW


class FullFineTuning:
    """Tunes every weight that a block keeps.

    Args:
        config: the settings from ``lm_lr`` on, those of AdamW, and the seed.
    """

    def __init__(self, config: EBFTConfig) -> None:
        self._config = config

    def recover(self, task: WholeTask) -> WholeResult:
        """Tune ``task.model`` in place."""
        config, tuned = self._config, {}
        for name, block in task.blocks.items():
            routers = router_paths(block)
            for of_block, parameter in block.named_parameters():
                if parameter.is_floating_point() and of_block.rpartition(".")[0] not in routers:
                    tuned[f"{name}.{of_block}"] = parameter.requires_grad_()
        masks = {tuned[name]: mask for name, mask in task.masks.items()}
        optimizer = MaskedAdamW(
            [
                {"params": list(masks), "weight_decay": config.weight_decay},
                {"params": [tuned[name] for name in tuned if name not in task.masks], "weight_decay": 0.0},
            ],
            lr=config.lm_lr,
            betas=config.betas,
            masks=masks,
            moments=config.moments,
            compact=config.compact,
            seed=config.seed,
        )
        result = fit(task, config, optimizer)
        task.model.requires_grad_(False)
        return result
