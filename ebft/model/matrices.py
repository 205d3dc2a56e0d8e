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
            fused = _fused_experts(path, module)
            transposed = _is_transposed(module, fused)
            for name, weight in fused.items():
                experts, outputs, inputs = weight.mT.shape if transposed else weight.shape
                found.append(Matrix(prefix + name, outputs, inputs, experts, transposed))
    return found


def left_dense(block: nn.Module) -> list[str]:
    """Parameters of ``block`` with two axes or more that are no prunable matrices: routers, indexers, kernels …"""
    matrices = {matrix.name for matrix in find_matrices(block)}
    return [name for name, p in block.named_parameters() if name not in matrices and sum(n > 1 for n in p.shape) > 1]


def _fused_experts(path: str, module: nn.Module) -> dict[str, nn.Parameter]:
    """The 3-D parameters of a module that holds experts: one that says so, by its name or a count of them.

    Other parameters with three axes, such as the kernels of convolutions and gates by heads, are no experts.
    """
    named = "expert" in path.rpartition(".")[2].lower() or "expert" in type(module).__name__.lower()
    if not named and not any("num_experts" in name for name in vars(module)):
        return {}
    return {
        name: weight
        for name, weight in module.named_parameters(recurse=False)
        if weight.ndim == 3 and min(weight.shape[1:]) > 1
    }


def _is_transposed(module: nn.Module, fused: dict[str, nn.Parameter]) -> bool:
    """Whether fused experts are stored (experts, inputs, outputs): as they say, or by where the hidden width is.

    What this says is proven, or refused, where the products are seen (``ebft.pruning.statistics``).
    """
    if hasattr(module, "is_transposed"):
        return bool(module.is_transposed)
    hidden = getattr(module, "hidden_size", getattr(module, "hidden_dim", None))
    for name, weight in fused.items():
        gives_hidden = "down" in name
        first, last = weight.shape[1:]
        if first != last and hidden in (first, last):
            return (hidden == last) if gives_hidden else (hidden == first)
    return False


def router_paths(block: nn.Module) -> set[str]:
    """Names of the modules that choose: what is called a router, or stands beside ``experts`` and is called gate, and
    indexers, which choose the tokens of sparse attention (each with all below it); and linear layers with a single
    output, such as a shared expert's gate."""
    names = {path for path, _ in block.named_modules()}
    routers: set[str] = set()
    for path, module in block.named_modules():
        parent, _, last = path.rpartition(".")
        beside_experts = (f"{parent}.experts" if parent else "experts") in names
        single = isinstance(module, nn.Linear) and module.out_features == 1
        indexes = "Indexer" in type(module).__name__
        if single or indexes or parent in routers or "router" in last or (beside_experts and last == "gate"):
            routers.add(path)
    return routers
