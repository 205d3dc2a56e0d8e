"""Which device and which dtype a run computes in."""

from __future__ import annotations

import torch

from ebft.distributed import own_device
from ebft.errors import EBFTError


def choose_device(device: str, dtype: str) -> tuple[torch.device, torch.dtype]:
    """What ``--device`` and ``--dtype`` mean on this machine: the device, and the dtype of the matrix products."""
    device = own_device("cuda" if device == "auto" and torch.cuda.is_available() else device)
    if device == "auto":
        device = "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise EBFTError(f"--device is {device!r}; expected cpu, cuda, or cuda:N") from None
    if chosen.type not in ("cpu", "cuda"):
        raise EBFTError(f"--device is {device!r}; expected cpu, cuda, or cuda:N")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise EBFTError(f"--device is {device}; this machine has {torch.cuda.device_count()} GPUs that torch can use")
    if chosen.type == "cuda" and chosen.index is None:  # as the devices of tensors have it
        chosen = torch.device("cuda", torch.cuda.current_device())
    if dtype != "auto":
        return chosen, getattr(torch, dtype)
    if chosen.type == "cpu":
        return chosen, torch.float32
    has_bfloat16 = torch.cuda.get_device_capability(chosen)[0] >= 8
    return chosen, torch.bfloat16 if has_bfloat16 else torch.float16
