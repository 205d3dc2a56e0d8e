"""Loggers: what a run hands on while it works, to TensorBoard, Weights & Biases, or any object with three methods.

No step waits for one: the losses of a block stay on the device until it is done, and its steps are then told at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from math import isfinite
from pathlib import Path
from typing import Any, Protocol

from ebft.errors import EBFTError

_FIGURES = ("relative_error_before", "relative_error_after", "sparsity", "seconds", "peak_memory_bytes")


class Logger(Protocol):
    """What ``run_ebft(loggers=[…])`` takes. The first process of a run calls it, in order."""

    def on_step(self, part: str, step: int, figures: Mapping[str, float]) -> None:
        """A step of ``part`` (a block, or a recovery of the whole model), from 1 on: ``loss``, ``gradient_norm``."""

    def on_block(self, line: Mapping[str, Any]) -> None:
        """A block is finished: its line of ``blocks.jsonl``."""

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """The run is finished and saved: what ``ebft_summary.json`` holds."""


class TensorBoard:
    """Events for TensorBoard, in ``runs/NAME``."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._writer = _imported("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(Path("runs") / name))
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def on_step(self, part: str, step: int, figures: Mapping[str, float]) -> None:
        """See ``Logger``."""
        for figure, value in figures.items():
            self._writer.add_scalar(f"{part}/{figure}", value, step)

    def on_block(self, line: Mapping[str, Any]) -> None:
        """See ``Logger``."""
        for figure, value in _of_block(line).items():
            self._writer.add_scalar(figure, value, line["block"])

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """See ``Logger``."""
        for figure, value in _of_run(summary).items():
            self._writer.add_scalar(figure, value, 0)
        self._writer.close()


class WandB:
    """A run of Weights & Biases, in the project ``ebft``."""

    def __init__(self, name: str, config: Mapping[str, Any]) -> None:
        self._run = _imported("wandb", "wandb").init(project="ebft", name=name, config=dict(config))

    def on_step(self, part: str, step: int, figures: Mapping[str, float]) -> None:
        """See ``Logger``."""
        self._run.log({f"{part}/step": step} | {f"{part}/{figure}": value for figure, value in figures.items()})

    def on_block(self, line: Mapping[str, Any]) -> None:
        """See ``Logger``."""
        self._run.log({"block": line["block"]} | _of_block(line))

    def on_end(self, summary: Mapping[str, Any]) -> None:
        """See ``Logger``."""
        self._run.summary.update(_of_run(summary))
        self._run.finish()


BY_NAME: dict[str, Callable[[str, Mapping[str, Any]], Logger]] = {"tensorboard": TensorBoard, "wandb": WandB}


def make_loggers(names: Sequence[str], folder: str, config: Mapping[str, Any]) -> list[Logger]:
    """Those of ``--log``, for the run whose output is ``folder``; ``EBFTError`` where the package is not installed."""
    return [BY_NAME[name](Path(folder).name, config) for name in names]


def tell_steps(
    loggers: Sequence[Logger], part: str, losses: Sequence[float], norms: Sequence[float] | None = None
) -> None:
    """Tell them all steps of a part that is done; what is no finite number is left out."""
    for logger in loggers:
        for place, loss in enumerate(losses):
            figures = {"loss": loss} | ({"gradient_norm": norms[place]} if norms and place < len(norms) else {})
            logger.on_step(part, place + 1, {name: value for name, value in figures.items() if isfinite(value)})


def tell_block(loggers: Sequence[Logger], line: Mapping[str, Any]) -> None:
    """Tell them a block's steps, and that it is done."""
    tell_steps(loggers, line["name"], line["losses"], line["gradient_norms"])
    for logger in loggers:
        logger.on_block(line)


def _of_block(line: Mapping[str, Any]) -> dict[str, float]:
    return {f"block/{name}": line[name] for name in _FIGURES if line[name] is not None}


def _of_run(summary: Mapping[str, Any]) -> dict[str, float]:
    perplexities = {
        f"perplexity/{text}/{stage}": value
        for text, of in summary["perplexity"].items()
        for stage, value in of.items()
        if isfinite(value)
    }
    return {"sparsity": summary["sparsity"], "seconds": summary["seconds"], **perplexities}


def _imported(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise EBFTError(f"--log {package} needs {package}, which is not installed (pip install {package})") from None
