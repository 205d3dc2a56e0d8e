"""What tunes weights under the mask, a file each."""

from ebft.recovery.optimizers import adamw, sign, muon  # noqa: I001  (AdamW is the usual one)

__all__ = ["adamw", "muon", "sign"]
