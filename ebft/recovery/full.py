"""``--recover full``: masked fine-tuning of all blocks on the language-model loss, for small models.

All of it is in memory at once, in float32: weights, gradients and two moments of every parameter in the blocks. Pruned
weights are held at exactly zero by the optimizer, so the model runs as it is, without masks. Norms and biases are tuned
too, without weight decay; embeddings, final norm, head and routers are not.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ebft.recovery.protocol import WholeModelRecovery
from ebft.recovery.settings import LanguageModelTuning, SurvivorsOnly, WeightDecay
from ebft.registry import register_recovery

if TYPE_CHECKING:
    from ebft.recovery.whole_model import WholeResult, WholeTask


@register_recovery("full", scope="model")
class FullFineTuning(WholeModelRecovery):
    """Every weight that a block keeps is tuned on the language-model loss."""

    told = "as a whole on the language-model loss"

    @dataclass(frozen=True)
    class Settings(LanguageModelTuning, WeightDecay, SurvivorsOnly):
        """Of full fine-tuning."""

    def recover(self, task: WholeTask) -> WholeResult:
        """See ``WholeModelRecovery``."""
        from ebft.model.matrices import router_paths
        from ebft.recovery.skipping import zeros_skipped
        from ebft.recovery.whole_model import fit
        from ebft_kernels import MaskedAdamW

        own, tuned = self.settings, {}
        for name, block in task.blocks.items():
            routers = router_paths(block)
            for of_block, parameter in block.named_parameters():
                if parameter.is_floating_point() and of_block.rpartition(".")[0] not in routers:
                    tuned[f"{name}.{of_block}"] = parameter.requires_grad_()
        masks = {tuned[name]: mask for name, mask in task.masks.items()}
        optimizer = MaskedAdamW(
            [
                {"params": list(masks), "weight_decay": own.weight_decay},
                {"params": [tuned[name] for name in tuned if name not in task.masks], "weight_decay": 0.0},
            ],
            lr=own.lm_lr,
            betas=own.betas,
            masks=masks,
            moments=own.moments,
            compact=own.compact,
            seed=self.config.runtime.seed,
        )
        tokens = self.config.recover.at_once * task.tokens.shape[1]
        with ExitStack() as undone_after:
            for name, block in task.blocks.items():
                undone_after.enter_context(zeros_skipped(block, task.masks_of(name), tokens, task.device, task.compute))
            result = fit(task, self.config, own, optimizer)
        task.model.requires_grad_(False)
        return result
