"""Text to tokens: where it comes from, how it is cut, and that what was used is told."""

import itertools

import datasets
import pytest
import torch

from ebft.data import calibration
from ebft.data.calibration import builtin_documents, calibration_tokens, evaluation_tokens, read_documents

DOCUMENTS = [f"Document {i}: " + f"word{i} " * (5 + 7 * i) for i in range(12)]


def test_packed_windows_are_the_documents_end_to_end(tokenizer):
    tokens = calibration_tokens(iter(DOCUMENTS), tokenizer, samples=5, seqlen=16, windows="packed")
    ids = [i for document in DOCUMENTS for i in tokenizer(document)["input_ids"]]
    assert tokens.ids.flatten().tolist() == ids[: 5 * 16]
    assert (tokens.ids.shape, tokens.ids.dtype) == ((5, 16), torch.int64)
    use = tokens.use
    assert (use.source, use.windows, use.tokens) == ("an iterable of strings", "packed", 80)
    assert use.begins.startswith("Document 0: word0")
    assert len(use.sha256) == 64


def test_random_windows_come_from_long_documents_only(tokenizer):
    tokens = calibration_tokens(DOCUMENTS, tokenizer, samples=6, seqlen=40, windows="random-window", seed=1)
    long = [ids for ids in (tokenizer(document)["input_ids"] for document in DOCUMENTS) if len(ids) > 40]
    assert 2 <= len(long) < len(DOCUMENTS)

    def whence(row):
        return [n for n, ids in enumerate(long) for s in range(len(ids) - 39) if ids[s : s + 40] == row]

    found = [whence(row) for row in tokens.ids.tolist()]
    assert all(found)
    assert len({documents[0] for documents in found}) == min(6, len(long))  # each is used once before any is again
    again = calibration_tokens(DOCUMENTS, tokenizer, samples=6, seqlen=40, windows="random-window", seed=1)
    other = calibration_tokens(DOCUMENTS, tokenizer, samples=6, seqlen=40, windows="random-window", seed=2)
    assert torch.equal(tokens.ids, again.ids)
    assert tokens.use.sha256 == again.use.sha256 != other.use.sha256


def test_more_random_windows_than_documents(tokenizer):
    tokens = calibration_tokens(DOCUMENTS[-2:], tokenizer, samples=7, seqlen=20, windows="random-window")
    assert tokens.ids.shape == (7, 20)
    assert tokens.use.documents == 2


def test_evaluation_is_tokenised_once_and_the_partial_window_dropped(tokenizer, tmp_path):
    (tmp_path / "text.txt").write_text("\n\n".join(DOCUMENTS))
    tokens = evaluation_tokens(str(tmp_path / "text.txt"), tokenizer, seqlen=32)
    ids = tokenizer("\n\n".join(DOCUMENTS))["input_ids"]
    assert tokens.ids.flatten().tolist() == ids[: len(ids) // 32 * 32]
    rows = tmp_path / "text.jsonl"
    datasets.Dataset.from_dict({"text": DOCUMENTS}).to_json(rows)
    assert torch.equal(evaluation_tokens(str(rows), tokenizer, seqlen=32).ids, tokens.ids)


def test_local_files_of_every_kind(tmp_path):
    table = datasets.Dataset.from_dict({"text": DOCUMENTS, "url": ["x"] * 12})
    table.to_json(tmp_path / "a.jsonl")
    table.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    for name in ("a.jsonl", "a.parquet"):
        assert list(read_documents(str(tmp_path / name), "calibration")) == DOCUMENTS
    assert list(read_documents(str(tmp_path / "a.txt"), "calibration")) == ["one\n\ntwo"]


def test_the_built_in_text_holds_out_what_it_evaluates_on():
    calibrate, evaluate = builtin_documents("calibration"), builtin_documents("evaluation")
    assert sum(map(len, calibrate)) > 8 * sum(map(len, evaluate)) > 200_000

    def paragraphs(documents):
        return [" ".join(p.split()) for document in documents for p in document.split("\n\n") if p.strip()]

    assert not set(paragraphs(calibrate)) & set(paragraphs(evaluate))
    assert builtin_documents("calibration") == calibrate


class Rows:
    """What ``load_dataset(streaming=True)`` gives, in short: endless rows, read one by one."""

    def __init__(self, log, texts=None):
        self.log, self.texts, self.read = log, texts, 0

    def shuffle(self, seed, buffer_size):
        self.log.append(("shuffle", seed, buffer_size))
        return self

    def take(self, count):
        self.log.append(("take", count))
        return ({"text": f"row {i}"} for i in range(count))

    def __iter__(self):
        if self.texts is not None:
            yield from ({"text": text} for text in self.texts)
            return
        while True:
            self.read += 1
            yield {"text": DOCUMENTS[self.read % len(DOCUMENTS)]}


def test_c4_is_streamed_and_read_no_further_than_needed(tokenizer, monkeypatch):
    log = []
    rows = Rows(log)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: log.append((args, kwargs)) or rows)
    tokens = calibration_tokens("c4", tokenizer, samples=8, seqlen=40, windows="random-window", seed=5)
    assert tokens.ids.shape == (8, 40)
    assert log[0] == (("allenai/c4", "en"), {"split": "train", "streaming": True})
    assert log[1][:2] == ("shuffle", 5)
    assert rows.read < 100
    assert tokens.use.source == "c4"


def test_wikitext2_is_calibrated_on_in_its_own_order(tokenizer, monkeypatch):
    lines, log = [f" line {i} has a few words .\n" for i in range(200)], []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: Rows(log, lines))
    tokens = calibration_tokens("wikitext2", tokenizer, samples=3, seqlen=40, windows="random-window")
    whole = tokenizer("\n\n".join(lines))["input_ids"]
    for row in tokens.ids.tolist():
        assert any(whole[start : start + 40] == row for start in range(len(whole) - 39))
    assert not log  # its rows are lines: shuffled, they would be noise


def test_an_endless_iterator_is_read_no_further_than_needed(tokenizer):
    read = []
    endless = (read.append(i) or DOCUMENTS[i % len(DOCUMENTS)] for i in itertools.count())
    tokens = calibration_tokens(endless, tokenizer, samples=4, seqlen=40, windows="random-window")
    assert tokens.ids.shape == (4, 40)
    assert len(read) <= 4 * 500


def test_a_stream_of_short_documents_ends(tokenizer, monkeypatch):
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: Rows([]))
    with pytest.raises(calibration.EBFTError, match="longest of 500 documents"):
        calibration_tokens("c4", tokenizer, samples=1, seqlen=1000)


def test_wikitext2_is_the_test_split_joined_with_blank_lines(tokenizer, monkeypatch):
    lines, log = ["", " = Title = \n", "", " Text one . \n", " Text two . \n"] * 9, []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: log.append((a, k)) or Rows([], lines))
    tokens = evaluation_tokens("wikitext2", tokenizer, seqlen=16)
    assert log == [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "streaming": True})]
    ids = tokenizer("\n\n".join(lines))["input_ids"]
    assert tokens.ids.flatten().tolist() == ids[: len(ids) // 16 * 16]
