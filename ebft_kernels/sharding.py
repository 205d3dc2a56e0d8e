"""What a process holds of a sharded tensor: a ``DTensor``, as FSDP2 and tensor parallelism make of parameters.

``torch.distributed.tensor`` takes half a second to import; here it is imported only once somebody has made a DTensor.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether ``tensor`` is a ``DTensor``: one tensor to its readers, of which each process holds a part."""
    return hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Tensor:
    """What this process holds of ``tensor``, in the same memory; itself if it is not sharded."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def beside(whole: Tensor, other: Any) -> Tensor:
    """``whole``, which every process has, as an operand for ``other``: a replicated DTensor if that is sharded."""
    if not is_sharded(other):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh = other.device_mesh
    return DTensor.from_local(local(whole), mesh, [Replicate()] * mesh.ndim, run_check=False)


def part_of(whole: Tensor, other: Any) -> Tensor:
    """Of ``whole``, which every process has, the part that this process holds of ``other``; no communication."""
    if not is_sharded(other):
        return local(whole)
    return beside(whole, other).redistribute(placements=other.placements).to_local()


def sharded_as(held: Tensor, other: Any) -> Tensor:
    """``held`` as this process's part of a tensor with the shape and the sharding of ``other``."""
    if not is_sharded(other):
        return held
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        held, other.device_mesh, other.placements, run_check=False, shape=other.shape, stride=other.stride()
    )


def total(held: Tensor, other: Any) -> Tensor:
    """The sum of ``held``, a scalar, over the processes that hold different parts of ``other``."""
    if not is_sharded(other):
        return held
    from torch.distributed.tensor import DTensor, Partial, Replicate

    placements = [Partial() if placement.is_shard() else Replicate() for placement in other.placements]
    return DTensor.from_local(held, other.device_mesh, placements, run_check=False).full_tensor()
