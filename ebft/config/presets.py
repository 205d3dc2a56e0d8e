"""Presets: settings to start from, by flat names. Those of a method that is not chosen do not count."""

from __future__ import annotations

from typing import Any

# The published recipe (arXiv 2402.12419; the class defaults, clipping after unscaling); one for a quarter of its time
# on a CPU (a third on a GPU), whose learning rate finds itself; the same with distillation of the whole model after it,
# for about the published recipe's time (docs/quality.md has the evidence); and one that ends in minutes on two CPU
# cores. IF_UNIFORM: what is otherwise with --uniform.
LIGHT: dict[str, Any] = {
    "epochs": 1,
    "batch_size": 2,
    "lr": "auto",
    "lr_scale": "rms",
    "weight_decay": 0.0,
    "target": "dense-stream",
    "holdout": 0.125,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "light": LIGHT,
    "best": {**LIGHT, "recover": "ebft+distill", "distill_epochs": 4},
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
