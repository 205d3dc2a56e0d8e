"""Text to token batches: datasets by name, local files, the built-in text, or any iterable of strings."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ebft.config.sections import apportion
from ebft.data.texts import FILES, HUB_TEXTS, check_text
from ebft.errors import EBFTError, on_one_line

HELD_OUT_EVERY = 12  # of the built-in topics, every 12th is for evaluation
C4_EVALUATION_DOCUMENTS = 1100
SHUFFLE_BUFFER = 4096  # documents
DOCUMENTS_A_SAMPLE = 500  # are looked at, at the most


@dataclass(frozen=True)
class TextUse:
    """The text that was actually used, for the report; of a mixture, also that of each part."""

    source: str
    windows: str
    documents: int
    tokens: int
    sha256: str
    begins: str
    parts: tuple[TextUse, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        if self.parts:
            return " and ".join(map(str, self.parts))
        return f"{self.tokens} tokens of {self.source} ({self.windows}, {self.documents} documents)"


@dataclass(frozen=True)
class Tokens:
    """Token ids, int64 (windows, seqlen), and where they come from."""

    ids: Tensor
    use: TextUse


def calibration_tokens(
    text: str | Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    seqlen: int,
    windows: str = "random-window",
    seed: int = 0,
) -> Tokens:
    """``samples`` sequences of ``seqlen`` tokens.

    Args:
        text: ``c4``, ``wikitext2``, ``builtin``, a file, or documents as strings.
        windows: ``random-window``, one window at a random place in each random document longer than ``seqlen``
            (further rounds through the documents where they are fewer than the samples); or ``packed``, documents
            joined end to end in their order and cut.

    Raises:
        EBFTError: the text cannot be read, or is too short.
    """
    source = text if isinstance(text, str) else "an iterable of strings"
    documents = read_documents(text, "calibration", shuffle_seed=seed if windows == "random-window" else None)
    # Bounded, so that an endless stream of short documents cannot keep us for ever.
    documents = itertools.islice(documents, DOCUMENTS_A_SAMPLE * samples)
    if windows == "random-window" and text != "c4":  # which its reader has shuffled, shards and all
        documents = _shuffled(documents, seed)
    take = _random_windows if windows == "random-window" else _packed_windows
    ids, used, first = take(documents, tokenizer, samples, seqlen, seed, source)
    return Tokens(ids, use_of(source, windows, used, ids, first))


def mixture(parts: Sequence[Tokens], groups: Sequence[Tensor]) -> Tokens:
    """The sequences of several texts as one.

    Args:
        parts: of each text its sequences, all of one length.
        groups: places in the mixture, each in one group; every group gets sequences of all texts, in proportion,
            interleaved (such as those held out, and those that are not).
    """
    first, places = parts[0], torch.empty(sum(len(part.ids) for part in parts), dtype=torch.long)
    left = [list(range(len(part.ids))) for part in parts]
    offsets = [sum(len(before.ids) for before in parts[:number]) for number in range(len(parts))]
    for group in groups:
        counts = apportion(len(group), [len(numbers) for numbers in left]) if len(group) else [0] * len(parts)
        chosen = [
            ((place + 0.5) / count, offset + numbers.pop(0))
            for count, offset, numbers in zip(counts, offsets, left, strict=True)
            for place in range(count)
        ]
        places[group] = torch.tensor([number for _, number in sorted(chosen)], dtype=torch.long)
    ids, uses = torch.cat([part.ids for part in parts])[places], tuple(part.use for part in parts)
    source, windows = (
        ", ".join(dict.fromkeys(of_each)) for of_each in zip(*((u.source, u.windows) for u in uses), strict=True)
    )
    used = use_of(source, windows, sum(use.documents for use in uses), ids, first.use.begins)
    return Tokens(ids, replace(used, parts=uses))


def evaluation_tokens(text: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int, most: int | None = None) -> Tokens:
    """The whole text joined with blank lines, tokenised once, cut into windows; the last partial one is dropped.

    Args:
        most: tokens at most, from the beginning: as many whole windows, one at least.
    """
    documents = list(read_documents(text, "evaluation"))
    ids = _token_ids(tokenizer, "\n\n".join(documents))
    count = len(ids) // seqlen
    if most is not None:
        count = min(count, max(1, most // seqlen))
    if count == 0:
        raise EBFTError(f"--eval {text} has {len(ids)} tokens; expected at least --eval-seqlen {seqlen}")
    cut = torch.tensor(ids[: count * seqlen]).reshape(count, seqlen)
    return Tokens(cut, use_of(text, "packed", len(documents), cut, documents[0] if documents else ""))


def read_documents(text: str | Iterable[str], use: str, shuffle_seed: int | None = None) -> Iterator[str]:
    """Documents of a named text, a file, or an iterable; ``use`` is ``calibration`` or ``evaluation``."""
    if not isinstance(text, str):
        return iter(text)
    if text == "builtin":
        return iter(builtin_documents(use))
    if text in HUB_TEXTS:
        return _from_hub(text, use, shuffle_seed)
    return _from_file(text, use)


def builtin_documents(use: str) -> list[str]:
    """Python's own reference texts (``pydoc_data.topics``): every 12th topic for evaluation, the others to calibrate.

    Topics repeat each other's paragraphs; a paragraph that is held out is taken from the calibration text, and each
    paragraph stands once.
    """
    names = sorted(topics.topics)
    held_out = names[::HELD_OUT_EVERY]
    seen: set[str] = set()
    parts: dict[str, list[str]] = {"evaluation": [], "calibration": []}
    for part, chosen in (("evaluation", held_out), ("calibration", [name for name in names if name not in held_out])):
        for name in chosen:
            paragraphs = []
            for paragraph in re.split(r"\n\s*\n", topics.topics[name]):
                key = " ".join(paragraph.split())
                if key and key not in seen:
                    seen.add(key)
                    paragraphs.append(paragraph.strip("\n"))
            if paragraphs:
                parts[part].append("\n\n".join(paragraphs))
    return parts[use]


def _from_hub(name: str, use: str, shuffle_seed: int | None) -> Iterator[str]:
    import datasets  # here, not above: importing it takes seconds, and most runs on local text need none of it

    entry = HUB_TEXTS[name]
    try:
        rows = datasets.load_dataset(entry["path"], entry["name"], split=entry[use], streaming=True)
        if name == "c4" and use == "calibration" and shuffle_seed is not None:
            rows = rows.shuffle(seed=shuffle_seed, buffer_size=SHUFFLE_BUFFER)
        if use == "evaluation" and name == "c4":
            rows = rows.take(C4_EVALUATION_DOCUMENTS)
        texts: Iterator[str] = (row["text"] for row in rows)
        if name == "wikitext2":  # its rows are lines: the documents are what the field joins them to
            texts = iter(["\n\n".join(texts)])
        yield from texts
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise EBFTError(f"text {name} ({entry['path']}) cannot be read from the hub: {reason}") from None


def _from_file(file: str, use: str) -> Iterator[str]:
    path = Path(file).expanduser()
    check_text(file, use)
    try:
        if FILES[path.suffix] is None:
            yield path.read_text(encoding="utf-8")
            return
        if not path.stat().st_size:
            return
        import datasets

        logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)  # its readers raise what they log
        rows = datasets.load_dataset(FILES[path.suffix], data_files=str(path), split="train", streaming=True)
        for row in rows:
            if "text" not in row:
                raise EBFTError(
                    f"text {file}: a row has the fields {', '.join(row)}; expected a field 'text' of strings"
                )
            if not isinstance(row["text"], str):
                raise EBFTError(f"text {file}: the text of a row is {type(row['text']).__name__}; expected a string")
            yield row["text"]
    except EBFTError:
        raise
    except Exception as error:  # datasets' readers raise anything for a file that is damaged
        reason = on_one_line(error)
        raise EBFTError(f"text {file} cannot be read: {reason}") from error


def _random_windows(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int, source: str
) -> tuple[Tensor, int, str]:
    generator = torch.Generator().manual_seed(seed)
    long: list[list[int]] = []
    first, seen, longest = "", 0, 0
    for document in documents:
        seen += 1
        ids = _token_ids(tokenizer, document)
        longest = max(longest, len(ids))
        if len(ids) > seqlen:
            first = first or document
            long.append(ids)
        if len(long) == samples:
            break
    if not long:
        raise EBFTError(
            f"text {source} is empty or too short: the longest of {seen} documents has {longest} tokens; expected more "
            f"than --seqlen {seqlen} (or --windows packed)"
        )
    rows: list[list[int]] = []
    for ids in itertools.islice(itertools.cycle(long), samples):
        start = int(torch.randint(len(ids) - seqlen + 1, (), generator=generator))
        rows.append(ids[start : start + seqlen])
    return torch.tensor(rows), len(long), first


def _shuffled(documents: Iterator[str], seed: int) -> Iterator[str]:
    """The documents in random order, drawn from a buffer of the next few thousand."""
    choose, buffer = random.Random(seed), list(itertools.islice(documents, SHUFFLE_BUFFER))
    for document in documents:  # each takes the place of one that is given away
        place = choose.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = document
    choose.shuffle(buffer)
    yield from buffer


def _packed_windows(
    documents: Iterator[str], tokenizer: PreTrainedTokenizerBase, samples: int, seqlen: int, seed: int, source: str
) -> tuple[Tensor, int, str]:
    needed, ids, first, used = samples * seqlen, [], "", 0
    for document in documents:
        first = first or document
        ids += _token_ids(tokenizer, document)
        used += 1
        if len(ids) >= needed:
            break
    if len(ids) < needed:
        raise EBFTError(f"text {source} is empty or too short: it has {len(ids)} tokens; expected {samples} x {seqlen}")
    return torch.tensor(ids[:needed]).reshape(samples, seqlen), used, first


def check_vocabulary(tokens: Tokens, tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """``EBFTError`` if a token has no embedding in a model that has ``embeddings`` of them."""
    if not tokens.ids.numel() or int(tokens.ids.max()) < embeddings:
        return
    largest = int(tokens.ids.max())
    raise EBFTError(
        f"the tokenizer makes token {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}) of {tokens.use.source}, "
        f"and the model has {embeddings} embeddings; expected the model's own tokenizer, or a model that is resized "
        f"and trained with this one: model.resize_token_embeddings({max(len(tokenizer), largest + 1)})"
    )


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    try:
        return list(tokenizer(text, verbose=False)["input_ids"])
    except Exception as error:  # a tokenizer is a library's, or the user's
        said = f"{type(error).__name__}: {on_one_line(error)}"
        raise EBFTError(f"the tokenizer cannot turn a text into tokens ({said})") from error


def use_of(source: str, windows: str, documents: int, ids: Tensor, first: str) -> TextUse:
    """What there is to say of token ids (windows, seqlen) from so many documents, the first of which is ``first``."""
    digest = hashlib.sha256(ids.to(torch.int32).numpy().tobytes()).hexdigest()
    return TextUse(source, windows, documents, ids.numel(), digest, " ".join(first.split())[:80])
