"""``--recover ebft``: block-wise reconstruction (arXiv 2402.12419), the method that this package is named after.

    minimise over W:  mean || f(X; M * W) - Y ||^2

This file says what it is and what it can be told; ``reconstruct.py`` does it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ebft.config.fields import Needs, setting
from ebft.errors import EBFTError
from ebft.recovery.protocol import BlockRecovery, Footprint, Place
from ebft.recovery.settings import UNTIMED, Clipping, GradientCheckpointing, WeightDecay
from ebft.registry import optimizers, register_recovery

if TYPE_CHECKING:
    from ebft.config import EBFTConfig
    from ebft.plan.shapes import Shapes
    from ebft.recovery.task import BlockResult, BlockTask


_REFRESH = Needs(
    "--refresh-every", ("refresh_every",), lambda config: config.of_method(EBFT.Settings).refresh_every > 0
)


@register_recovery("ebft", scope="block")
class EBFT(BlockRecovery):
    """Tunes a block's kept weights by back-propagation until it gives the dense block's outputs."""

    goes_by_time = True

    @dataclass(frozen=True)
    class Settings(Clipping, WeightDecay, GradientCheckpointing):
        """Of block-wise reconstruction."""

        epochs: int = setting(
            10, "passes over the calibration sequences in each block", at_least=1, basic=True, needs=UNTIMED
        )
        lr: float | Literal["auto"] = setting(
            2e-4,
            "learning rate, which --lr-decay lowers in each block; auto: found by short trials on the validation split "
            "(--holdout)",
            at_least=0,
            basic=True,
        )
        lr_scale: str = setting(
            "absolute",
            "what --lr is: a learning rate, or a share of the root mean square of each matrix's kept weights",
            choices=("absolute", "rms"),
        )
        lr_decay: str = setting(
            "linear", "learning-rate schedule in each block", choices=("linear", "cosine", "constant")
        )
        warmup: float = setting(0.0, "share of each block's steps spent warming up to --lr", at_least=0, below=1)
        optimizer: str = setting("adamw", "the optimizer (see ebft methods)", metavar="NAME")
        loss: str = setting("mse", "the loss (see ebft methods)", metavar="NAME")
        token_weights: str = setting(
            "none",
            "what a token counts in it: all the same, or by 1 / ||Y - X||^2, for tokens of enormous hidden states",
            choices=("none", "norm"),
        )
        unit: str = setting(
            "block",
            "what is tuned at once: a block; its attention and then its MLP, each towards the dense one's output; or a "
            "block with the next one, towards the dense states after both, of which the first is kept",
            choices=("block", "halves", "pair"),
        )
        compile: bool = setting(False, "compile the block with torch.compile while tuning")
        refresh_every: int = setting(
            0,
            "steps after which a part of each mask is chosen anew, in the first three quarters of them; 0: never",
            at_least=0,
        )
        refresh_share: float = setting(
            0.05,
            "share of each row's kept weights that --refresh-every chooses anew",
            above=0,
            at_most=1,
            needs=_REFRESH,
        )
        refresh_grow: str = setting(
            "gradient",
            "what pruned weights come back by: the size of the mean gradient of a few batches, or the mean of its "
            "square",
            choices=("gradient", "gradient2"),
            needs=_REFRESH,
        )
        patience: int = setting(
            2,
            "epochs without a lower error on the validation split (--holdout) before a block is done",
            at_least=1,
            needs=Needs("--holdout", ("holdout",), lambda config: config.recover.holdout > 0),
        )
        epochs_where: str = setting(
            "all",
            "what becomes of the epochs that a block saves by ending early: nothing, or later blocks that pruning has "
            "harmed more than the mean of those before take them, up to twice --epochs",
            choices=("all", "error"),
        )

    def __init__(self, config: EBFTConfig) -> None:
        super().__init__(config)
        self.needs_dense_inputs = self.settings.unit == "halves"
        self.blocks_at_once = 2 if self.settings.unit == "pair" else 1
        self.changes_masks = self.settings.refresh_every > 0

    @classmethod
    def uses(cls, settings: Any) -> tuple[tuple[str, str], ...]:
        """See ``Recovery``."""
        return (("loss", settings.loss), ("optimizer", settings.optimizer))

    @classmethod
    def check(cls, config: EBFTConfig) -> None:
        """See ``Recovery``."""
        own = config.of_method(cls.Settings)
        for name, other in (("recompute", "none or block"), ("unit", "block")):
            if own.compile and getattr(own, name) == "halves":
                raise EBFTError(
                    f"--{name} halves does not go with --compile, which would compile the halves of every block anew; "
                    f"expected --{name} {other}"
                )
        if own.unit == own.recompute == "halves":
            raise EBFTError("--recompute halves of --unit halves would be quarters; expected --recompute none or block")
        if own.lr == "auto":
            _check_lr(own, config)
        if own.unit == "pair":
            _check_pair(own, config)
        if own.epochs_where == "error":
            _check_epochs_where(own, config)
        if own.refresh_every:
            _check_refresh(own, config)
        if config.runtime.time and (own.refresh_every or own.epochs_where == "error"):
            other = "--refresh-every" if own.refresh_every else "--epochs-where error"
            raise EBFTError(
                f"{other} counts a block's steps beforehand, which --time leaves open; expected one of both"
            )
        if _optimizer_of(own, config).updates_in_backward:
            _check_update_in_backward(own)

    def prepare(self, place: Place) -> None:
        """See ``Recovery``."""
        from ebft.recovery.ebft.halves import HalfByHalf
        from ebft.recovery.ebft.pairs import InPairs
        from ebft.recovery.ebft.reconstruct import BlockReconstructor

        super().prepare(place)
        whole = BlockReconstructor(self.config, place.device, place.compute, place.ranks)
        units: dict[str, Any] = {"block": lambda *_: whole, "halves": HalfByHalf, "pair": InPairs}
        self._worker: Any = units[self.settings.unit](self.config, place.device, whole, place.ranks)

    def recover(self, task: BlockTask) -> BlockResult:
        """See ``BlockRecovery``."""
        return self._worker.recover(task)

    def footprint(self, shapes: Shapes) -> Footprint:
        """See ``Recovery``."""
        from ebft.recovery.ebft.footprint import footprint

        return footprint(self, shapes)

    def leaner(self, shapes: Shapes) -> Iterator[dict[str, Any]]:
        """See ``Recovery``."""
        optimizer = _optimizer_of(self.settings, self.config)
        yield from optimizer.leaner_layouts(shapes)
        size = self.config.recover.at_once
        while size > 1 and not optimizer.updates_in_backward:
            size //= 2
            yield {"micro_batch": size}
        if self.settings.unit == "halves":  # of which one is recomputed whole
            yield {"recompute": "block"}
        elif self.settings.recompute != "halves" and self._has_halves(shapes) and not self.settings.compile:
            yield {"recompute": "halves"}
        yield from optimizer.leaner_states(shapes)

    def last_resort(self, shapes: Shapes) -> dict[str, Any] | None:
        """The same without gradients, where a step needs neither their norm nor their sum."""
        own = self.settings
        if own.optimizer != "adamw" or own.clip or own.compile or own.refresh_every or shapes.is_float16:
            return None
        return {"micro_batch": None, "update_in_backward": True}

    def _has_halves(self, shapes: Shapes) -> bool:
        from ebft.recovery.ebft.halves import halves

        try:
            return self.settings.unit == "pair" or bool(halves(shapes.block, list(shapes.matrices)))
        except EBFTError:
            return False


def _optimizer_of(own: Any, config: EBFTConfig) -> Any:
    kind = optimizers[own.optimizer]
    return kind(config.of_method(kind.Settings))


def _check_lr(own: Any, config: EBFTConfig) -> None:
    if not config.recover.holdout:
        raise EBFTError("--lr auto goes by the validation split, and --holdout is 0; expected --holdout above 0")
    if config.recover.input == "dense-stream":
        raise EBFTError(
            "--lr auto begins from what the block before has found, of which blocks with --input dense-stream are "
            "independent; expected --input sparse-stream or mix, or a number"
        )
    if own.lr_scale != "rms":
        raise EBFTError("--lr auto finds a share of the weights' own size; expected --lr-scale rms with it")


def _check_pair(own: Any, config: EBFTConfig) -> None:
    others = {
        "--input dense-stream, which makes blocks independent": config.recover.input == "dense-stream",
        "--epochs-where error, which goes by errors of single blocks": own.epochs_where == "error",
        "--refresh-every, whose masks of the second block would be thrown away": own.refresh_every > 0,
        "--compile, which would compile every two blocks anew": own.compile,
    }
    for other, given in others.items():
        if given:
            raise EBFTError(f"--unit pair tunes two blocks together, and does not go with {other}; expected one")


def _check_epochs_where(own: Any, config: EBFTConfig) -> None:
    if not config.recover.holdout:
        raise EBFTError(
            "--epochs-where error spends what blocks save by ending early, which none does without --holdout; "
            "expected --holdout above 0"
        )
    if config.recover.input == "dense-stream":
        raise EBFTError(
            "--epochs-where error looks at the blocks before, of which blocks with --input dense-stream are "
            "independent; expected --input sparse-stream or mix"
        )
    if own.unit == "halves":
        raise EBFTError("--epochs-where error counts epochs of whole blocks; expected --unit block")


def _check_refresh(own: Any, config: EBFTConfig) -> None:
    optimizer = _optimizer_of(own, config)
    if optimizer.updates_in_backward:
        raise EBFTError("--refresh-every needs gradients of pruned weights, which --update-in-backward never makes")
    if not optimizer.has_second_moments:
        raise EBFTError(
            f"--refresh-every weighs weights by AdamW's second moment, and --optimizer is {own.optimizer}; expected "
            "--optimizer adamw"
        )
    if config.prune.structured:
        raise EBFTError("--refresh-every brings single weights back, which --structured does not have")
    if config.prune.transposable:
        raise EBFTError(
            f"--transposable holds along the outputs too, which --refresh-every {own.refresh_every} would not keep so; "
            "expected one of both"
        )


def _check_update_in_backward(own: Any) -> None:
    if own.clip:
        raise EBFTError(
            f"--update-in-backward uses gradients before the norm of all is known, and --clip is {own.clip:g}; "
            "expected --clip 0"
        )
    if own.compile:
        raise EBFTError("--update-in-backward does not go with --compile, which makes all gradients first")
