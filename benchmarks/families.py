"""Every causal language model of the installed transformers, tiny, from disk: does the walk give its own logits?

``python -m benchmarks.families`` writes docs/families.md; ``--only llama,zaya`` prints the lines of these alone.

For each model type a configuration is made by making its default one small, field by field; the random model is saved,
opened as a run opens it, and held against its own forward (``ebft.model.agreement``); then every block runs once while
its products are observed. What is not right by then is a refusal in one sentence, or a fault.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ebft.errors import EBFTError, first_line
from ebft.model.agreement import check_agreement
from ebft.model.checkpoint import open_model
from ebft.model.decoder import Decoder
from ebft.model.libraries import quiet
from ebft.model.matrices import left_dense
from ebft.pruning.statistics import InputObserver

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
SEQLEN = 16
# How small a setting is made, by its name: the first pattern that fits.
SMALL: dict[str, Any] = {
    r".*(pad|bos|eos|image|audio|video|sep|cls|mask|unk)\w*_(id|index|token|token_id)": 0,
    r"vocab_size|\w+_vocab_size\w*": 512,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers": 4,
    r"\w*(key_value|kv)_heads|n_head_kv": 2,
    r"(num|n)_(attention_)?heads?|decoder_attention_heads|linear_num_\w+_heads": 4,
    r"head_dim|qk_nope_head_dim|qk_rope_head_dim|v_head_dim|attention_head_dim|index_head_dim|global_head_dim": 8,
    r"linear_\w+_head_dim|swa_\w*head_dim": 8,
    r"\w*(q|kv|o)_lora_rank|\w*_rank": 8,
    r"hidden_size|d_model|n_embd|emb_dim|dim|embedding_size|word_embed_proj_dim|lru_width": 32,
    r"\w*intermediate_size\w*|ffn_dim|n_inner|d_inner|d_ff|decoder_ffn_dim|dim_ff|\w*ffn_hidden_size": 48,
    r"(num|n)_(local_|routed_)?experts|moe_num_experts": 4,
    r"\w*experts_per_tok\w*|\w*top_?k(_experts)?|moe_k|index_topk": 2,
    r"\w*n_group|topk_group": 1,
    r"first_k_dense_replace|n_shared_experts|num_shared_experts": 1,
    r"sliding_window|attention_window\w*|index_n_heads": 8,
    r"\w*chunk_size\w*": 8,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len\w*|context_length": 64,
}
# What has to fit something else, by model type.
OVERRIDES: dict[str, dict[str, Any]] = {
    "openai-gpt": {"n_head": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "attn_layer_indices": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "rwkv": {"attention_hidden_size": 32},
    "xlm": {"causal": True, "asm": False},
    "zaya": {"num_experts_per_tok": 1},
}


@dataclass
class Line:
    """What came of a model type.

    Attributes:
        verdict: ``runs``, ``refused``, ``fault``, or ``not built``.
        said: the sentence, for all but the first.
        dense: parameters with two axes or more that are left dense, without the blocks' numbers.
        unseen: matrices of which no product was seen.
    """

    kind: str
    verdict: str = "runs"
    said: str = ""
    seconds: float = 0.0
    dense: set[str] = field(default_factory=set)
    unseen: set[str] = field(default_factory=set)

    def __str__(self) -> str:
        also = [f"left dense: {', '.join(sorted(self.dense))}"] if self.dense else []
        also += [f"no product seen: {', '.join(sorted(self.unseen))}"] if self.unseen else []
        return f"| {self.kind} | {self.verdict} | {'; '.join([self.said] * bool(self.said) + also).replace('|', '/')} |"


def kinds() -> list[str]:
    """All types of causal language models, in alphabetical order."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(kind: str) -> PretrainedConfig:
    """The default configuration of a model type, made small."""
    default = AutoConfig.for_model(kind)
    return type(default)(**_small(default.to_dict()))


def _small(settings: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    kind, made = str(settings.get("model_type", kind)), dict[str, Any]()
    for name, value in settings.items():
        pattern = next((pattern for pattern in SMALL if re.fullmatch(pattern, name)), None)
        if isinstance(value, Mapping):
            if name.endswith("_config") and value:
                made[name] = _small(value)
        elif isinstance(value, list) and "layer" in name and len(value) > 4:
            made[name] = _first_of_each(value)
        elif isinstance(value, int | type(None)) and not isinstance(value, bool) and pattern and value != 0:
            made[name] = SMALL[pattern] if value is not None else None
    if settings.get("kv_lora_rank"):  # latent attention has a key for every head
        made["num_key_value_heads"] = made["num_attention_heads"]
    if "is_decoder" in settings and not settings.get("is_encoder_decoder"):
        made["is_decoder"] = True
    return made | OVERRIDES.get(kind, {})


def _first_of_each(layers: list[Any]) -> list[Any]:
    """Four entries, of all kinds that there are."""
    found = [layer for place, layer in enumerate(layers) if layer not in layers[:place]][:4]
    return found + layers[: 4 - len(found)]


def build(kind: str) -> transformers.PreTrainedModel:
    """A random model of a type, with weights large enough for its blocks to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(kind), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and parameter.is_floating_point():
                parameter.normal_(std=0.2)
    return model


def look_at(kind: str) -> Line:
    """Build a type, save it, open it, and hold it against itself."""
    line, began = Line(kind), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            with quiet():
                model = build(kind)
                if model.config.is_encoder_decoder:
                    return Line(kind, "not built", "an encoder-decoder")
                with torch.no_grad():
                    model(input_ids=torch.arange(SEQLEN)[None], use_cache=False)
                model.save_pretrained(folder)
        except Exception as error:  # of whatever kind: a configuration that nobody has tried
            return Line(kind, "not built", first_line(error)[:160])
        try:
            opened = open_model(folder)
            decoder = Decoder(opened.model, torch.device("cpu"), weights=opened.weights)
            check_agreement(decoder, kind)
            line.dense, line.unseen = _dense_and_unseen(decoder)
        except EBFTError as error:
            line.verdict, line.said = "refused", str(error).replace(folder, kind)
        except Exception as error:
            line.verdict, line.said = "fault", f"{type(error).__name__}: {first_line(error)[:160]}"
    line.seconds = time.perf_counter() - began
    return line


@torch.no_grad()
def _dense_and_unseen(decoder: Decoder) -> tuple[set[str], set[str]]:
    """What all blocks leave dense, and matrices of whose products none was seen in a pass."""
    dense, unseen = set[str](), set[str]()
    hidden = decoder.enter(torch.arange(8 * SEQLEN).reshape(8, SEQLEN) % 500)
    for index, matrices in enumerate(decoder.matrices):
        block = decoder.working_block(index)
        observer = InputObserver(block, matrices)
        with observer.watching():
            hidden = decoder.run_block(index, block, hidden)
        dense |= {_short(name) for name in left_dense(decoder.stored_block(index))}
        unseen |= {
            _short(matrix.name)
            for matrix in matrices
            if not any(seen.tokens for seen in observer.statistics.get(matrix.name, []))
        }
    return dense, unseen


def _short(name: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", name)


def page(lines: list[Line]) -> Iterator[str]:
    """docs/families.md."""
    count = {verdict: sum(line.verdict == verdict for line in lines) for verdict in ("runs", "refused", "fault")}
    yield "# Which models run\n"
    yield (
        f"Written by `python -m benchmarks.families` with transformers {transformers.__version__}: every model type of "
        "`AutoModelForCausalLM`, tiny and random, saved and opened from its files. Every run makes the same check of "
        "the model it is given, and refuses where it fails.\n"
    )
    yield (
        "*runs*: the logits of the walk from block to block are the model's own (to 1e-4 of their standard deviation). "
        "*refused*: the sentence is what a run says. *fault*: a traceback, to be mended. *not built*: the sweep has no "
        "small configuration of the type; it says nothing about `ebft`.\n"
    )
    yield f"{count['runs']} run, {count['refused']} are refused, {count['fault']} fault, of {len(lines)}.\n"
    yield "| type | | |\n| --- | --- | --- |"
    yield from map(str, lines)


def main() -> None:
    """Look at all types, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="types, with commas between them; writes nothing")
    only = parser.parse_args().only
    lines = []
    for kind in only.split(",") if only else kinds():
        lines.append(look_at(kind))
        print(f"{lines[-1]} {lines[-1].seconds:.1f} s", flush=True)
    if not only:
        PAGE.write_text("\n".join(page(lines)) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
