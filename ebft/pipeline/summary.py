"""What a run depends on, so that it is gone on with only as it was begun; and what it says of itself at its end."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ebft.config import ORGANISATION
from ebft.data.texts import HUB_TEXTS
from ebft.evaluation.continuations import TOKENS
from ebft.files import checksum
from ebft.model.decoder import Decoder
from ebft.pipeline.context import RunContext
from ebft.version import __version__, code_digest
from ebft_kernels import explain

FUSED_OPS = ("masked_adamw_step", "masked_grad_norm")  # the products run on zeroed weights, without masks


def fingerprint(context: RunContext) -> dict[str, dict[str, Any]]:
    """Everything that the results depend on, by heading and name; not where things are."""
    config, decoder, teacher, masker = context.config, context.decoder, context.teacher, context.masker
    calibration, evaluation, zero_shot = context.calibration, context.eval_tokens, context.zero_shot
    named = ORGANISATION | {"model", "teacher", "calibration", "device"}  # what these name is looked at itself
    return {
        "model": {"weights": decoder.weights.fingerprint, "configuration": settings_of(decoder.model)},
        "teacher": {"weights": teacher.weights.fingerprint, "configuration": settings_of(teacher.model)},
        "text": {
            "calibration": calibration.use.sha256 if calibration else None,
            **{name: tokens.use.sha256 for name, tokens in evaluation.items()},
            **(zero_shot.fingerprint() if zero_shot else {}),
            "prompts": context.prompts,
        },
        "criterion": {
            "name": masker.name,
            "file": checksum(Path(config.prune.criterion)) if Path(config.prune.criterion).is_file() else None,
            "allocation": checksum(Path(config.prune.allocation)) if Path(config.prune.allocation).is_file() else None,
        },
        "setting": {name: value for name, value in config.flat().items() if name not in named},
        "version": {**_versions(decoder), "products": str(decoder.compute), **implementations(decoder)},
    }


def settings_of(model: PreTrainedModel) -> str:
    """A digest of a model's configuration."""
    settings = {name: value for name, value in model.config.to_diff_dict().items() if name != "_name_or_path"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def summarise(
    context: RunContext,
    sparsity: float = 0.0,
    stages: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
    whole_model: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    zero_shot: Mapping[str, dict[str, float]] = MappingProxyType({}),
    continued: Mapping[str, dict[str, Any]] = MappingProxyType({}),
    peak_memory: Mapping[str, int | None] = MappingProxyType({}),
) -> dict[str, Any]:
    """What ``ebft_summary.json`` holds; of a run that begins, without what it comes to.

    Args:
        stages: ``dense``, ``pruned``, ``recovered``: the perplexity on each text.
        whole_model: what recoveries of the whole model came to, by name.
        continued: the text samples of the same stages, or why there are none.
    """
    config = context.config
    texts = list(config.data.parts) if context.calibration else []
    recovery = "no recovery" if config.recover.method == "none" else f"recovered by {config.recover.method}"
    return {
        "model": context.name,
        "recipe": f"{context.masker.name}, {recovery}",
        "output": str(context.output.final),
        "perplexity": {text: {stage: values[text] for stage, values in stages.items()} for text in context.eval_tokens},
        "zero_shot": dict(zero_shot),
        "continuations": {
            "prompts": context.prompts,
            "tokens": TOKENS,
            "stages": {stage: of["texts"] for stage, of in continued.items() if "texts" in of},
            "left_out": next((of["left_out"] for of in continued.values() if "left_out" in of), None),
        },
        "blocks": len(context.decoder),
        "seconds": context.clock.total(),
        "stage_seconds": dict(context.clock.laps),
        "peak_memory": dict(peak_memory),
        "sparsity": sparsity,
        "asked_sparsity": config.asked_sparsity,
        "whole_model": dict(whole_model),
        "source": context.source,
        "size": _sizes(context, sparsity),
        "datasets": {
            text: _dataset(text) for text in dict.fromkeys((*texts, *context.eval_tokens)) if text in HUB_TEXTS
        },
        "calibration_texts": texts,
        "calibration": context.calibration.use.to_dict() if context.calibration else None,
        "evaluation": {name: tokens.use.to_dict() for name, tokens in context.eval_tokens.items()},
        "implementations": implementations(context.decoder),
        "config": config.flat(),
        "versions": {"python": platform.python_version(), **_versions(context.decoder)},
    }


def _dataset(text: str) -> dict[str, str]:
    """Which part of which dataset of the hub a text is, where it is measured on."""
    return {"path": HUB_TEXTS[text]["path"], "name": HUB_TEXTS[text]["name"], "split": HUB_TEXTS[text]["evaluation"]}


def _sizes(context: RunContext, sparsity: float) -> dict[str, int | None]:
    """Bytes of the dense model as it is stored, of the saved files, and about what these take without their zeros."""
    out, decoder = context.output, context.decoder
    parameters = [p for p in context.teacher.model.parameters() if p.is_floating_point()]
    saved = sum(file.stat().st_size for file in out.path.glob("model*.safetensors"))
    prunable = [
        decoder.stored_block(index).get_parameter(matrix.name)
        for index, matrices in enumerate(decoder.matrices)
        for matrix in matrices
    ]
    zeros = sparsity * sum(p.numel() * p.itemsize for p in prunable)
    masks = sum(p.numel() for p in prunable) / 8
    return {
        "dense": sum(p.numel() * p.itemsize for p in parameters),
        "saved": saved,
        "compressed": None if context.config.prune.uniform else round(saved - zeros + masks),
    }


def implementations(decoder: Decoder) -> dict[str, str]:
    """Which kernels do the fused ops."""
    return {op: explain(op, decoder.device).impl for op in FUSED_OPS}


def _versions(decoder: Decoder) -> dict[str, Any]:
    return {
        "ebft": __version__,
        "code": code_digest(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": _device_name(decoder.device),
        "threads": torch.get_num_threads(),
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.machine()} CPU"
