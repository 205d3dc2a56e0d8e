"""What a long part of a run has come to so far, on disk, so that a run that ends too early goes on from there."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ebft.distributed import Ranks
from ebft.model.tensors import Tensors
from ebft.output.folder import OutputFolder

WORTH = 0.05  # of the time since the last checkpoint, that writing one may take
SPEED = 5e8  # bytes a second that the first one is taken to be written at; later ones at what that took


class Checkpoint:
    """The last state that was written of a part of a run; an earlier one goes when a later one is whole.

    Make it before the run asks for the part itself, which forgets what came after it.

    Args:
        output: the run's folder.
        part: the name of what is gone on with.
        ranks: of which the first writes, and all read; all hold the same.

    Attributes:
        found: content and tensors as an interrupted run has written them last, if it is gone on with; or None.
    """

    def __init__(self, output: OutputFolder, part: str, ranks: Ranks) -> None:
        self._output, self._name, self._ranks = output, f"{part}-begun", ranks
        self._written, self._speed = time.perf_counter(), SPEED
        kept = ranks.first(partial(output.part, self._name, alone=True))
        self._number = kept["number"] if kept else 0
        self.found = (kept["content"], Tensors([self._file])) if kept else None

    def is_due(self, size: int) -> bool:
        """Whether this rank should write so many bytes: in little of the time since the last, and if there is room."""
        passed, room = time.perf_counter() - self._written, shutil.disk_usage(self._output.path).free
        return self._ranks.rank == 0 and size <= WORTH * passed * self._speed and 2 * size < room

    def write(self, content: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep this; ``content`` is what JSON can hold."""
        began, before = time.perf_counter(), self._file
        self._number += 1
        with self._output.writing():
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file)
        self._output.commit_part(self._name, {"number": self._number, "content": dict(content)}, [self._file])
        before.unlink(missing_ok=True)
        self._written = time.perf_counter()
        self._speed = sum(tensor.nbytes for tensor in tensors.values()) / max(self._written - began, 1e-9)

    def drop(self) -> None:
        """What it was for is finished, and committed."""
        if self._ranks.rank == 0:
            self._output.drop_part(self._name, [self._file])

    @property
    def _file(self) -> Path:
        return self._output.checkpoint_file(self._name, self._number)
