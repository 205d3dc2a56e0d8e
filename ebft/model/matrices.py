"""Which parameters of a block are matrices that may be pruned, and how each is stored."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


@dataclass(frozen=True)
class Matrix:
    """A prunable parameter of a block.

    Attributes:
        name: the parameter's name within the block, such as ``self_attn.q_proj.weight``.
        outputs, inputs: the size of the matrix (of each expert's matrix).
        experts: how many matrices the parameter holds: 1, or the experts of a fused 3-D parameter.
        transposed: stored (inputs, outputs), as GPT-2's Conv1D is.
    """

    name: str
    outputs: int
    inputs: int
    experts: int
    transposed: bool

    def by_expert(self, tensor: Tensor) -> Tensor:
        """A view of ``tensor`` (in the parameter's shape) as (experts, outputs, inputs)."""
        oriented = tensor.mT if self.transposed else tensor
        return oriented.unsqueeze(0) if oriented.ndim == 2 else oriented


def find_matrices(block: nn.Module) -> list[Matrix]:
    """The prunable matrices of ``block`` in their order: linear layers, Conv1D, fused experts; never a router."""
    found: list[Matrix] = []
    routers = router_paths(block)
    for path, module in block.named_modules():
        prefix = f"{path}." if path else ""
        if path in routers:
            continue
        if isinstance(module, nn.Linear):
            outputs, inputs = module.weight.shape
            found.append(Matrix(f"{prefix}weight", outputs, inputs, experts=1, transposed=False))
        elif isinstance(module, Conv1D):
            inputs, outputs = module.weight.shape
            found.append(Matrix(f"{prefix}weight", outputs, inputs, experts=1, transposed=True))
        else:
            for name, weight in module.named_parameters(recurse=False):
                if weight.ndim == 3 and min(weight.shape[1:]) > 1:  # fused experts; depth-wise kernels have a 1
                    transposed = bool(getattr(module, "is_transposed", False))
                    experts, outputs, inputs = weight.mT.shape if transposed else weight.shape
                    found.append(Matrix(prefix + name, outputs, inputs, experts, transposed))
    return found


def router_paths(block: nn.Module) -> set[str]:
    """Names of the modules that choose or weigh experts: what is called a router, or stands beside ``experts`` and is
    called gate (with all below it), and linear layers with a single output, such as a shared expert's gate."""
    names = {path for path, _ in block.named_modules()}
    routers: set[str] = set()
    for path, module in block.named_modules():
        parent, _, last = path.rpartition(".")
        beside_experts = (f"{parent}.experts" if parent else "experts") in names
        single = isinstance(module, nn.Linear) and module.out_features == 1
        if single or parent in routers or "router" in last or (beside_experts and last == "gate"):
            routers.add(path)
    return routers
