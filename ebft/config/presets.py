"""Presets: settings to start from, by flat names. Those of a method that is not chosen do not count."""

from __future__ import annotations

from typing import Any

# The published recipe (arXiv 2402.12419; the class defaults, clipping after unscaling); one for a quarter of its time
# on a CPU (a third on a GPU) and one for about its time, both with targets from the dense stream, smaller batches, and
# a learning rate that is a share of the weights' own size (docs/quality.md has the evidence); and one that ends in
# minutes on two CPU cores. IF_UNIFORM: what is otherwise with --uniform.
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "light": {
        "epochs": 1,
        "batch_size": 2,
        "lr": 0.01,
        "lr_scale": "rms",
        "weight_decay": 0.0,
        "target": "dense-stream",
    },
    "best": {
        "epochs": 8,
        "batch_size": 4,
        "lr": 0.007,
        "lr_scale": "rms",
        "lr_decay": "cosine",
        "warmup": 0.05,
        "weight_decay": 0.0,
        "target": "dense-stream",
    },
    "demo": {
        "sparsity": 0.6,
        "calibration": "builtin",
        "windows": "packed",
        "samples": 96,
        "seqlen": 128,
        "epochs": 2,
        "batch_size": 4,
        "lr": 3e-3,
        "weight_decay": 0.0,
        "target": "dense-stream",
        "eval": "builtin",
        "eval_seqlen": 256,
    },
}
IF_UNIFORM: dict[str, dict[str, Any]] = {"light": {"target": "sparse-stream"}}
