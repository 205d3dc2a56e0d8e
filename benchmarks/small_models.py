"""Two small decoders, trained here, to try settings on models that nothing was tuned on: a GPT-2 and a Llama.

    python -m benchmarks.small_models --texts wikitext2-train.txt c4.jsonl --output models

Each is trained on the texts from random weights until its learning rate has fallen to zero, so that it is at its
optimum as a published model is: a rate that suits weights of that kind need not suit SmolLM2's. A few minutes each on
one core.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from ebft.data.calibration import read_documents

VOCABULARY, SEQLEN, BATCH, WIDTH, LAYERS = 2048, 256, 8, 192, 6
LEARNING_RATE, WARMUP, WEIGHT_DECAY = 2e-3, 0.05, 0.1
MODELS = ("gpt2", "llama")


def main() -> None:
    """Train and save those that are not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--epochs", type=int, default=3)
    given = parser.parse_args()
    documents = [document for text in given.texts for document in read_documents(str(text), "calibration")]
    tokenizer = trained_tokenizer(documents, VOCABULARY)
    ids = torch.tensor([i for text in documents for i in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
    windows = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    for name in given.models:
        folder = given.output / name
        if not folder.exists():
            began = time.perf_counter()
            model = make_model(name, tokenizer.eos_token_id)
            loss = train(model, windows, given.epochs)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            minutes = (time.perf_counter() - began) / 60
            print(f"{name}: {windows.numel()} tokens, {given.epochs} epochs, loss {loss:.3f}, {minutes:.1f} minutes")


def trained_tokenizer(documents: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of so many tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>")


def make_model(name: str, end: int) -> PreTrainedModel:
    """Random weights."""
    torch.manual_seed(0)
    if name == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=2 * SEQLEN,
                n_embd=WIDTH,
                n_layer=LAYERS,
                n_head=4,
                bos_token_id=end,
                eos_token_id=end,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3,
            num_hidden_layers=LAYERS,
            num_attention_heads=6,
            num_key_value_heads=3,
            max_position_embeddings=2 * SEQLEN,
            bos_token_id=end,
            eos_token_id=end,
            tie_word_embeddings=True,
        )
    )


def train(model: PreTrainedModel, windows: Tensor, epochs: int) -> float:
    """AdamW, a warm-up and a cosine to zero; gives the mean loss of the last twentieth of the steps."""
    model.train()
    steps = epochs * (len(windows) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / (WARMUP * steps), (1 + math.cos(math.pi * step / steps)) / 2),
    )
    generator, losses = torch.Generator().manual_seed(0), list[float]()
    for _ in range(epochs):
        for batch in torch.randperm(len(windows), generator=generator).split(BATCH):
            if len(batch) == BATCH:
                loss = model(input_ids=windows[batch], labels=windows[batch]).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                losses.append(loss.item())
    model.eval()
    last = losses[-max(1, len(losses) // 20) :]
    return sum(last) / len(last)


if __name__ == "__main__":
    main()
