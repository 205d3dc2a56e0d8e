"""Structured pruning: whole attention heads (KV groups) and MLP channels go."""

from ebft.pruning.structured import flap

__all__ = ["flap"]
