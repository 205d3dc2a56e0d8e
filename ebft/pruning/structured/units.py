"""What structured pruning takes away whole: attention heads (of grouped queries a whole KV group) and MLP channels.

A unit's values are made by rows of some matrices (q, k and v; gate and up) and taken up by columns of one other, the
consumer (o; down). They are found by the layers' names and held against the shapes that the configuration gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ebft.errors import EBFTError
from ebft.model.matrices import Matrix
from ebft_kernels import PackedMask

# Layers that stand beside each other: those that make a unit's values, and the names that the consumer goes by.
_HEADS = (
    ({"q_proj", "k_proj", "v_proj"}, {"o_proj", "out_proj", "dense"}),
    ({"c_attn"}, {"c_proj"}),  # GPT-2: all q, all k, all v
    ({"query_key_value"}, {"dense"}),  # GPT-NeoX: q, k and v of a head together
)
_CHANNELS = (
    ({"gate_proj", "up_proj"}, {"down_proj"}),
    ({"up_proj"}, {"down_proj"}),
    ({"fc1"}, {"fc2"}),
    ({"c_fc"}, {"c_proj"}),
    ({"dense_h_to_4h"}, {"dense_4h_to_h"}),
)


@dataclass(frozen=True)
class Units:
    """All units of one kind in a block.

    Attributes:
        kind: ``heads`` (KV groups) or ``channels``.
        rows: matrix that makes their values -> which of its outputs, int64 (units, outputs of one).
        consumer: the matrix that takes them up.
        columns: which of its inputs, int64 (units, inputs of one).
    """

    kind: str
    rows: dict[Matrix, Tensor]
    consumer: Matrix
    columns: Tensor

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def parameters(self) -> int:
        """Weights of one unit in all of the matrices."""
        made = sum(rows.shape[1] * matrix.inputs for matrix, rows in self.rows.items())
        return made + self.columns.shape[1] * self.consumer.outputs


def find_units(block_name: str, block: nn.Module, matrices: Sequence[Matrix]) -> list[Units]:
    """The heads and the channels of a block, which hold all of its matrices between them.

    Raises:
        EBFTError: a matrix belongs to neither, or has a shape that heads or channels do not explain.
    """
    beside: dict[str, dict[str, Matrix]] = {}
    for matrix in matrices:
        parent, _, layer = matrix.name.removesuffix(".weight").rpartition(".")
        beside.setdefault(parent, {})[layer] = matrix
    found = []
    for parent, layers in beside.items():
        name = f"{block_name}.{parent}" if parent else block_name
        heads, channels = (_split(layers, known) for known in (_HEADS, _CHANNELS))
        if heads:
            found.append(_heads(name, block, *heads))
        elif channels:
            found.append(_channels(name, *channels))
        else:
            raise EBFTError(
                f"--structured: {name} holds {', '.join(layers)}, which are no known layout of attention heads or MLP "
                "channels; expected such as q_proj, k_proj, v_proj, o_proj and gate_proj, up_proj, down_proj"
            )
    kinds = [units.kind for units in found]
    if sorted(kinds) != ["channels", "heads"]:
        raise EBFTError(
            f"--structured: {block_name} has {' and '.join(kinds) or 'nothing'} to prune; expected one attention and "
            "one MLP"
        )
    return sorted(found, key=lambda units: units.kind, reverse=True)


def _split(
    layers: dict[str, Matrix], known: Sequence[tuple[set[str], set[str]]]
) -> tuple[dict[str, Matrix], Matrix] | None:
    """The layers that make values, and the consumer, if these stand beside each other and nothing else does."""
    if any(matrix.experts > 1 for matrix in layers.values()):
        return None
    for makers, consumers in known:
        rest = layers.keys() - makers
        if layers.keys() >= makers and len(rest) == 1 and rest <= consumers:
            return {name: layers[name] for name in sorted(makers)}, layers[rest.pop()]
    return None


def _heads(name: str, block: nn.Module, makers: dict[str, Matrix], consumer: Matrix) -> Units:
    config = next((module.config for module in block.modules() if hasattr(module, "config")), None)
    if config is None:
        raise EBFTError(f"--structured: {name} does not say how many heads it has; expected a configuration that does")
    config = config.get_text_config()
    heads = config.num_attention_heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    width, left = divmod(consumer.inputs, heads)
    of_group = {"q_proj": heads // groups * width, "c_attn": 3 * width, "query_key_value": 3 * width}
    for layer, matrix in makers.items():
        if left or heads % groups or matrix.outputs != groups * of_group.get(layer, width):
            raise EBFTError(
                f"--structured: {name}.{layer} has {matrix.outputs} outputs, which {heads} heads in {groups} groups "
                "do not explain"
            )
    rows = {
        matrix: torch.arange(matrix.outputs).reshape(3, groups, -1).transpose(0, 1).reshape(groups, -1)
        if layer == "c_attn"
        else torch.arange(matrix.outputs).reshape(groups, -1)
        for layer, matrix in makers.items()
    }
    return Units("heads", rows, consumer, torch.arange(consumer.inputs).reshape(groups, -1))


def _channels(name: str, makers: dict[str, Matrix], consumer: Matrix) -> Units:
    for layer, matrix in makers.items():
        if matrix.outputs != consumer.inputs:
            raise EBFTError(
                f"--structured: {name}.{layer} has {matrix.outputs} outputs; expected {consumer.inputs}, the inputs of "
                f"{consumer.name}"
            )
    each = torch.arange(consumer.inputs).unsqueeze(1)
    return Units("channels", dict.fromkeys(makers.values(), each), consumer, each)


# --- masks ----------------------------------------------------------------------------------------------------------


def masks_without(block: nn.Module, units: Sequence[Units], removed: Sequence[Tensor]) -> dict[str, PackedMask]:
    """Masks of all matrices that prune the ``removed`` units (int64, of each kind) and nothing else."""
    masks: dict[str, PackedMask] = {}
    for of_kind, gone in zip(units, removed, strict=True):
        for matrix in (*of_kind.rows, of_kind.consumer):
            kept = torch.ones(block.get_parameter(matrix.name).shape, dtype=torch.bool)
            oriented = matrix.by_expert(kept)[0]
            if matrix == of_kind.consumer:
                oriented[:, of_kind.columns[gone].flatten()] = False
            else:
                oriented[of_kind.rows[matrix][gone].flatten()] = False
            masks[matrix.name] = PackedMask.from_dense(kept)
    return masks


def removed_by(units: Units, kept: Mapping[str, Tensor]) -> Tensor:
    """The units, int64, of which nothing is left: bool tensors by parameter name, in the parameters' shapes."""
    alive = units.consumer.by_expert(kept[units.consumer.name])[0].any(0)[units.columns].any(1)
    for matrix, rows in units.rows.items():
        alive |= matrix.by_expert(kept[matrix.name])[0].any(1)[rows].any(1)
    return (~alive).nonzero().flatten()


def bias_of(block: nn.Module, matrix: Matrix) -> nn.Parameter | None:
    """The bias (outputs,) of the layer whose weight ``matrix`` is; None where it has none."""
    return dict(block.named_parameters()).get(bias_name(matrix))


def bias_name(matrix: Matrix) -> str:
    """What the bias of that layer is called, if there is one."""
    return f"{matrix.name.removesuffix('weight')}bias"
