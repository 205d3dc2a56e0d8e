"""``ebft eval``: any model measured on its own, or against another one."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ebft.compressed.layers import is_compressed, load_compressed, to_dense
from ebft.config import EBFTConfig
from ebft.data.calibration import evaluation_tokens
from ebft.errors import EBFTError
from ebft.evaluation.divergence import divergences
from ebft.evaluation.perplexity import perplexities
from ebft.evaluation.zero_shot import ZeroShot
from ebft.model.checkpoint import Source, load_model, load_tokenizer, open_model
from ebft.model.decoder import Decoder
from ebft.model.device import choose_device
from ebft.model.lengths import check_lengths
from ebft.model.tensors import ModelWeights
from ebft.output.terminal import Reporter


def evaluate_model(config: EBFTConfig, against: str | None, reporter: Reporter) -> dict[str, Any]:
    """Figures of ``config.model`` on the texts and tasks of ``config.evaluate``.

    Args:
        against: hub id, folder or GGUF file of another model, of the same vocabulary; divergences are from it.

    Returns:
        ``perplexity`` text -> figure, or with ``against`` ``divergence`` text -> the figures of ``Divergence``;
        ``zero_shot`` task -> its metrics.

    Raises:
        EBFTError: a model, a text or a task cannot be had, or the two vocabularies differ.
    """
    settings, trust = config.evaluate, config.model.trust_remote_code
    device, compute = choose_device(config.runtime.device, config.runtime.dtype)
    asked = ZeroShot.prepare(list(settings.tasks), settings.limit) if settings.tasks else None
    tokenizer = load_tokenizer(config.model.source, trust_remote_code=trust)
    windows = {
        text: evaluation_tokens(text, tokenizer, seqlen=settings.seqlen, most=settings.tokens).ids
        for text in settings.texts
    }

    def decoder(source: str | None) -> Decoder:
        opened = _expanded(source) or open_model(source, trust_remote_code=trust, say=reporter.say)
        check_lengths(config, opened.model.config)
        return Decoder(opened.model, device, compute, weights=opened.weights)

    figures: dict[str, Any] = {}
    if windows and against is None:
        model = decoder(config.model.source)
        with reporter.progress("perplexity", len(model)) as advance:
            figures["perplexity"] = perplexities(model, windows, on_block=advance)
    elif windows:
        model, other = decoder(config.model.source), decoder(against)
        sizes = [of.model.get_output_embeddings().weight.shape[0] for of in (model, other)]
        if sizes[0] != sizes[1]:
            raise EBFTError(f"--against has a vocabulary of {sizes[1]}; expected {sizes[0]}, as the model has")
        with reporter.progress("both models", len(model) + len(other)) as advance:
            found = divergences(model, other, windows, on_block=advance)
        figures["divergence"] = {text: asdict(of_text) for text, of_text in found.items()}
    if asked is not None:
        expanded = _expanded(config.model.source)
        whole = expanded.model if expanded else load_model(config.model.source, trust_remote_code=trust)
        figures["zero_shot"] = asked.measure(whole, tokenizer, device)
    return figures


def _expanded(source: str | None) -> Source | None:
    """What a compressed folder holds, with the zeros and as its survivors were rounded; None for any other model."""
    if source is None or not is_compressed(source):
        return None
    model = to_dense(load_compressed(source))
    return Source(model, ModelWeights(model))
