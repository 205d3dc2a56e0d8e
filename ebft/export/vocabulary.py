"""The vocabulary of a GGUF file: tokens, their kinds, merges or scores, and how text is split before it is encoded."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, SpecialVocab, TokenType
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ebft.errors import EBFTError

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> None:
    """Write what llama.cpp needs to encode text as ``tokenizer`` does.

    Raises:
        EBFTError: the tokenizer is no byte-level or byte-fallback BPE, nor a unigram model.
    """
    with tempfile.TemporaryDirectory(prefix="ebft-") as folder:
        tokenizer.save_pretrained(folder)
        config.save_pretrained(folder)
        if not (Path(folder) / "tokenizer.json").is_file():
            raise EBFTError(f"{type(tokenizer).__name__} has no tokenizer.json, which alone can be written to GGUF")
        content = json.loads((Path(folder) / "tokenizer.json").read_text(encoding="utf-8"))
        of_bytes = content["model"]["type"] == "BPE" and not content["model"].get("byte_fallback")
        special = SpecialVocab(folder, load_merges=of_bytes, n_vocab=config.vocab_size)
    texts = {number: text for text, number in tokenizer.get_vocab().items()}
    added = {number: token.special for number, token in tokenizer.added_tokens_decoder.items()}
    tokens = [texts.get(number, f"[PAD{number}]") for number in range(config.vocab_size)]
    writer.add_token_list(tokens)
    writer.add_token_types([_kind(number, text, texts, added) for number, text in enumerate(tokens)])
    if of_bytes:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splits(content["pre_tokenizer"]))
    else:
        writer.add_tokenizer_model("llama")
        writer.add_token_scores(_scores(content["model"], tokens))
        writer.add_add_space_prefix('"Prepend"' in json.dumps([content["normalizer"], content["pre_tokenizer"]]))
    special.add_to_gguf(writer, quiet=True)


def _kind(number: int, text: str, texts: dict[int, str], added: dict[int, bool]) -> TokenType:
    if number not in texts:
        return TokenType.UNUSED
    if number in added:
        return TokenType.CONTROL if added[number] else TokenType.USER_DEFINED
    return TokenType.BYTE if _BYTE.fullmatch(text) else TokenType.NORMAL


def _splits(pre_tokenizer: Any) -> str:
    """What llama.cpp calls the way in which a byte-level BPE splits text first."""
    said = json.dumps(pre_tokenizer)
    if r"\\p{N}{1,3}" in said:
        return "llama-bpe"
    if r"\\p{N}" in said:
        return "qwen2"
    if '"Digits"' in said:
        return "smollm"
    if '"ByteLevel"' in said and '"Split"' not in said:
        return "gpt-2"
    raise EBFTError("the tokenizer splits text in a way that llama.cpp has no name for that is known here")


def _scores(model: dict[str, Any], tokens: list[str]) -> list[float]:
    """As SentencePiece has them: of a unigram model its own, of a BPE the places of the merges, from the first on."""
    if model["type"] == "Unigram":
        known = {text: float(score) for text, score in model["vocab"]}
    elif model["type"] == "BPE":
        merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        known = {}
        for place, merge in enumerate(merges):
            known.setdefault("".join(merge), -float(place))
    else:
        raise EBFTError(f"a tokenizer of type {model['type']} cannot be written to GGUF; expected BPE or Unigram")
    return [known.get(text, -1e6) for text in tokens]
