"""Ground truth for the ops that multiply kept weights alone, as reference.py is for the others.

A weight (N, K) is its kept values and a walk through their places: row by row, in chunks of 128 columns that are
counted from the beginning of the chunk. A place that is met twice counts twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ebft_kernels.reference import wide

SPARSE_CHUNK = 128  # columns


def check_walk(columns: Tensor, offsets: Tensor, width: int) -> None:
    """A walk through places in rows of ``width``, at least 1: what products that follow it trust.

    ``columns``, int16 (kept,), is each place's column from the beginning of its chunk; ``offsets``, int32
    (rows * chunks + 1) with chunks = ceil(width / 128), says where the places of a row in a chunk begin: from 0 to
    as many as there are, never falling.

    Raises:
        ValueError: it is another one.
    """
    for name, tensor, dtype in (("columns", columns, torch.int16), ("offsets", offsets, torch.int32)):
        if tensor.dtype != dtype or tensor.ndim != 1:
            raise ValueError(f"got {name} {tensor.dtype} {tuple(tensor.shape)}; expected {dtype}, one dimension")
    chunks = -(-width // SPARSE_CHUNK)
    if width < 1 or offsets.numel() < 1 or (offsets.numel() - 1) % chunks:
        raise ValueError(f"got {offsets.numel()} offsets for rows of {width}; expected 1 and a multiple of {chunks}")
    if int(offsets[0]) != 0 or int(offsets[-1]) != columns.numel() or bool((offsets[1:] < offsets[:-1]).any()):
        raise ValueError(
            f"got offsets from {int(offsets[0])} to {int(offsets[-1])} for {columns.numel()} columns; expected 0 to as "
            "many, never falling"
        )
    _, column = places_of(columns, offsets, width)
    if bool(((columns < 0) | (columns >= SPARSE_CHUNK) | (column >= width)).any()):
        raise ValueError(f"got a column outside of its chunk of {SPARSE_CHUNK} or of a row of {width}")


def places_of(columns: Tensor, offsets: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The row and the column of every place of a walk: int64 (kept,) each."""
    chunks = -(-width // SPARSE_CHUNK)
    slices = torch.arange(offsets.numel() - 1, device=offsets.device)
    slices = slices.repeat_interleave(offsets.long().diff())
    return slices // chunks, slices % chunks * SPARSE_CHUNK + columns.long()


def sparse_weight(values: Tensor, columns: Tensor, offsets: Tensor, width: int) -> Tensor:
    """The weight (N, ``width``) of ``values`` (kept,) in the places of a walk, in wide arithmetic."""
    check_walk(columns, offsets, width)
    if values.shape != columns.shape:
        raise ValueError(f"got values {tuple(values.shape)} for columns {tuple(columns.shape)}; expected the same")
    rows = (offsets.numel() - 1) // -(-width // SPARSE_CHUNK)
    weight = torch.zeros(rows, width, dtype=wide(values).dtype, device=values.device)
    return weight.index_put_(places_of(columns, offsets, width), wide(values), accumulate=True)


def sparse_linear(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    back_columns: Tensor,
    back_offsets: Tensor,
    bias: Tensor | None,
    width: int,
) -> Tensor:
    """y = x W^T + b for the weight (N, K) of ``values`` in the places of a walk, N and K at least 1.

    Args:
        x: float (..., K).
        values: float (kept,), in the order of the walk.
        columns, offsets: ``check_walk``.
        back_columns, back_offsets: a walk through the same places of W^T, column after column of W, each in the order
            of the rows. It is for derivatives, and not read here.
        bias: float (N,) or None.
        width: K.

    Returns:
        (..., N) in x's dtype.
    """
    y = wide(x) @ sparse_weight(values, columns, offsets, width).to(wide(x).dtype).T
    return (y if bias is None else y + wide(bias)).to(x.dtype)


def sparse_linear_dx(
    dy: Tensor,
    values: Tensor,
    columns: Tensor,
    offsets: Tensor,
    back_columns: Tensor,
    back_offsets: Tensor,
    width: int,
) -> Tensor:
    """The input gradient dx = dy W of ``sparse_linear``: dy (..., N) -> (..., K) in dy's dtype.

    It follows the walk back, and takes for its places the values as they lie in W column after column, in the order
    of the rows.
    """
    check_walk(columns, offsets, width)
    _, column = places_of(columns, offsets, width)
    rows = (offsets.numel() - 1) // -(-width // SPARSE_CHUNK)
    check_walk(back_columns, back_offsets, rows)
    back_row, _ = places_of(back_columns, back_offsets, rows)
    back_rows = (back_offsets.numel() - 1) // -(-rows // SPARSE_CHUNK)
    order = column.argsort(stable=True)
    if back_rows != width or not torch.equal(back_row, column[order]):
        raise ValueError("got a walk and a way back that do not meet the same places")
    return (wide(dy) @ sparse_weight(values[order], back_columns, back_offsets, rows).to(wide(dy).dtype).T).to(dy.dtype)


def sparse_linear_dw(
    dy: Tensor, x: Tensor, columns: Tensor, offsets: Tensor, back_columns: Tensor, back_offsets: Tensor
) -> Tensor:
    """The gradients of the values of ``sparse_linear`` alone: (kept,), summed over tokens, in x's dtype.

    dy (..., N), x (..., K). The way back is not read here.
    """
    width = x.shape[-1]
    check_walk(columns, offsets, width)
    rows = (offsets.numel() - 1) // -(-width // SPARSE_CHUNK)
    if dy.shape != (*x.shape[:-1], rows):
        raise ValueError(f"got dy {tuple(dy.shape)} and x {tuple(x.shape)}; expected (..., {rows}) and (..., {width})")
    product = wide(dy).reshape(-1, rows).T @ wide(x).reshape(-1, width)
    return product[places_of(columns, offsets, width)].to(x.dtype)
