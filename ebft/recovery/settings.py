"""Settings that several methods of recovery have, each defined once; their ``Settings`` inherit them."""

from __future__ import annotations

from dataclasses import dataclass

from ebft.config.fields import Needs, check_fields, setting

UNTIMED = Needs("no --time, which says how long it takes", ("time",), lambda config: config.runtime.time is None)


@dataclass(frozen=True)
class Checked:
    """Settings that check themselves when they are made."""

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Clipping(Checked):
    """The gradient's norm."""

    clip: float = setting(1.0, "clip the gradient norm over kept weights, after unscaling; 0 turns it off", at_least=0)


@dataclass(frozen=True)
class WeightDecay(Checked):
    """Decay of matrices."""

    weight_decay: float = setting(
        0.1, "decoupled weight decay of the pruned matrices (norms and biases: 0)", at_least=0
    )


@dataclass(frozen=True)
class GradientCheckpointing(Checked):
    """Activations."""

    recompute: str = setting(
        "none",
        "gradient checkpointing: activations that are made again in the backward pass, those of the block, or of its "
        "attention and MLP in turn (of --unit pair its two blocks)",
        choices=("none", "block", "halves"),
    )


@dataclass(frozen=True)
class Betas(Checked):
    """Momenta."""

    betas: tuple[float, float] = setting(
        (0.9, 0.95), "betas of AdamW and Lion; Muon's momentum is the first", at_least=0, below=1
    )


@dataclass(frozen=True)
class Moments(Checked):
    """The dtype of AdamW's states."""

    moments: str = setting("fp32", "AdamW's moments: float32, bfloat16 or 8 bits", choices=("fp32", "bf16", "int8"))


@dataclass(frozen=True)
class SurvivorsOnly(Checked):
    """Which states there are."""

    compact: bool = setting(False, "store optimizer states for kept weights only")


@dataclass(frozen=True)
class LanguageModelTuning(Clipping, GradientCheckpointing, Betas, Moments):
    """Of a whole model on the language-model loss."""

    lm_lr: float = setting(
        3e-4,
        "AdamW learning rate of whole-model recoveries (lora, full), decayed linearly to 0 over their time",
        at_least=0,
    )
    lm_epochs: int = setting(2, "epochs of whole-model recoveries over the calibration sequences", at_least=1)
    lm_seconds: float | None = setting(
        None,
        "they end after so many seconds if that comes first, and the learning rate falls by time",
        metavar="S",
        above=0,
    )
