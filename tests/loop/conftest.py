"""Models for the tests of the loop: tiny random ones of every family, and a small Llama that has learned something."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest
import torch
import transformers
from filelock import FileLock
from rich.console import Console
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.seven_b_run import VOCABULARY, small_tokenizer
from ebft import EBFTConfig
from ebft.config import preset_settings
from ebft.data.calibration import builtin_documents
from ebft.output.terminal import Reporter

_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
_BASE = {**_SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "tie_word_embeddings": False}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# family -> (configuration class, its arguments); windows shorter than the test's sequences, so that layer types matter
FAMILIES = {
    "llama": ("LlamaConfig", {**_BASE, "num_key_value_heads": 4, "attention_bias": True}),
    "llama-gqa": ("LlamaConfig", {**_BASE, "num_key_value_heads": 2}),
    "mistral": ("MistralConfig", {**_BASE, "num_key_value_heads": 2, "sliding_window": 8}),
    "qwen2": ("Qwen2Config", {**_BASE, "num_key_value_heads": 2}),
    "qwen3": ("Qwen3Config", {**_BASE, "num_key_value_heads": 2, "head_dim": 8}),
    "opt": ("OPTConfig", {**_BASE, "ffn_dim": 48, "word_embed_proj_dim": 24}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "n_positions": 64}),
    "gpt-neox": ("GPTNeoXConfig", _BASE),
    "phi": ("PhiConfig", _BASE),
    "gemma2": ("Gemma2Config", {**_BASE, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_BASE,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {**_BASE, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_BASE, **_EXPERTS, "num_key_value_heads": 2, "shared_expert_intermediate_size": 24},
    ),
    "qwen3-moe": ("Qwen3MoeConfig", {**_BASE, **_EXPERTS, "num_key_value_heads": 2, "head_dim": 8}),
}


def random_model(family: str, **changes) -> transformers.PreTrainedModel:
    """A random model in evaluation mode, with weights large enough for the blocks to matter."""
    name, arguments = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**arguments, "initializer_range": 0.2, **changes})
    config.pad_token_id = config.bos_token_id = config.eos_token_id = 0
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Of 512 tokens."""
    return small_tokenizer()


@pytest.fixture(scope="session")
def trained(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a Llama of 0.7 M parameters, trained for half a minute; once for all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "trained" / "model"
    with FileLock(base.parent / "trained.lock"):
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            _train(tokenizer).save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            partial.rename(folder)
    return folder


def _train(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """On the built-in calibration text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    ids = torch.tensor(tokenizer("\n\n".join(builtin_documents("calibration")), verbose=False)["input_ids"])
    steps, batch, length = 700, 8, 96
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        starts = torch.randint(len(ids) - length, (batch,)).tolist()
        rows = torch.stack([ids[start : start + length] for start in starts])
        logits = model(rows).logits[:, :-1]
        F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


def with_effect(usual, settings):
    """``settings`` over the ``usual`` ones, without those of the latter that would then have no effect."""
    made = EBFTConfig.of(usual, **settings)
    known = made.flat().keys()
    return {name: value for name, value in usual.items() if name in known and made.has_effect(name)} | settings


@pytest.fixture
def config(tmp_path: Path):
    """Makes settings for a run of a second or two; the output is ``tmp_path / "out"``."""

    def make(**settings) -> EBFTConfig:
        small = {"samples": 8, "seqlen": 24, "epochs": 2, "batch_size": 4, "eval_seqlen": 32, "eval": ""}
        small |= {"target": "sparse-stream", "output": tmp_path / "out"}
        return EBFTConfig.of(preset_settings("demo") | small, **settings)

    return make


@pytest.fixture
def silent() -> Reporter:
    """A reporter that writes into a string, ``silent.console.file.getvalue()``."""
    return Reporter(Console(file=io.StringIO(), width=200))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory, tokenizer):
    """A folder with a random Llama of three blocks, and a text to calibrate and measure on."""
    folder = tmp_path_factory.mktemp("tiny")
    random_model("llama-gqa").save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(builtin_documents("evaluation")[0][:6000])
    return folder


@pytest.fixture
def short_run(tiny, tmp_path):
    """Makes the settings of a run of half a second, plain ones that a child can be given."""

    def make(output="out", **changes):
        text = str(tiny / "text.txt")
        usual = {"model": str(tiny / "model"), "calibration": text, "eval": text, "eval_seqlen": 32, "device": "cpu"}
        usual |= {"samples": 4, "seqlen": 16, "batch_size": 2, "epochs": 1, "prompts": "none"}
        usual["output"] = str(tmp_path / output)
        return with_effect(usual, changes)

    return make
