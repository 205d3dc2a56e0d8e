"""What ``--recover ebft`` minimises, a file each."""

from ebft.recovery.losses import mse, channel, cosine  # noqa: I001  (mse is the usual one)

__all__ = ["channel", "cosine", "mse"]
