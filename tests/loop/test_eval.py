"""``ebft eval``: any model, alone or against another one, by its own forward pass."""

import json
import math

import pytest
import torch
from conftest import random_model
from torch.nn import functional as F

from ebft.cli.app import main
from ebft.compressed.layers import save_compressed
from ebft.data.calibration import evaluation_tokens

SMALL = ["--eval-seqlen", "32", "--device", "cpu", "--quiet", "--json"]


@pytest.fixture(scope="module")
def other(tiny, tokenizer, tmp_path_factory):
    """A model of the same vocabulary with other weights."""
    folder = tmp_path_factory.mktemp("other") / "model"
    model = random_model("llama-gqa")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model


def figures(capsys, *flags):
    assert main(["eval", *map(str, flags), *SMALL]) == 0
    return json.loads(capsys.readouterr().out)


def logits_of(model, windows):
    with torch.no_grad():
        return model(windows).logits[:, :-1].flatten(0, 1).double()


def test_perplexity_is_the_model_s_own(tiny, tokenizer, capsys):
    text = str(tiny / "text.txt")
    found = figures(capsys, tiny / "model", "--eval", text)
    windows = evaluation_tokens(text, tokenizer, seqlen=32).ids
    loss = F.cross_entropy(logits_of(random_model("llama-gqa"), windows), windows[:, 1:].flatten())
    assert found["perplexity"][text] == pytest.approx(math.exp(loss), rel=1e-4)


def test_a_compressed_folder_is_measured_as_it_is(tiny, tmp_path, capsys):
    """Its 8-bit survivors are what they were rounded to."""
    text, source = str(tiny / "text.txt"), str(tiny / "model")
    for values in ("fp32", "int8"):
        save_compressed(source, str(tmp_path / values), values=values)
    dense, same, rounded = (
        figures(capsys, model, "--eval", text)["perplexity"][text]
        for model in (source, tmp_path / "fp32", tmp_path / "int8")
    )
    assert same == pytest.approx(dense, rel=1e-6)
    assert rounded != dense
    assert rounded == pytest.approx(dense, rel=0.05)


def test_divergence_is_that_of_the_two_models(tiny, tokenizer, other, capsys):
    text, (folder, dense) = str(tiny / "text.txt"), other
    found = figures(capsys, tiny / "model", "--against", folder, "--eval", text)["divergence"][text]
    windows = evaluation_tokens(text, tokenizer, seqlen=32).ids
    ours, theirs = (logits_of(model, windows).log_softmax(-1) for model in (random_model("llama-gqa"), dense))
    assert found["kl"] == pytest.approx(float(F.kl_div(ours, theirs, reduction="batchmean", log_target=True)), rel=1e-3)
    assert found["same_choice"] == pytest.approx(
        float((ours.argmax(-1) == theirs.argmax(-1)).double().mean()), abs=0.01
    )
    assert found["of_other"] == pytest.approx(math.exp(F.nll_loss(theirs, windows[:, 1:].flatten())), rel=1e-4)


def test_a_model_is_no_way_from_itself(tiny, capsys):
    text = str(tiny / "text.txt")
    found = figures(capsys, tiny / "model", "--against", tiny / "model", "--eval", text)["divergence"][text]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["same_choice"] == 1


def test_a_few_tokens_will_do(tiny, capsys):
    text = str(tiny / "text.txt")
    few, all_of_it = (figures(capsys, tiny / "model", "--eval", text, *more) for more in (["--eval-tokens", "64"], []))
    assert few["perplexity"][text] != all_of_it["perplexity"][text]


def test_for_people_it_is_a_table(tiny, capsys):
    text = str(tiny / "text.txt")
    assert main(["eval", str(tiny / "model"), "--eval", text, "--eval-seqlen", "32", "--device", "cpu", "--quiet"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_vocabularies_have_to_be_the_same(tiny, tokenizer, tmp_path, capsys):
    random_model("llama-gqa", vocab_size=600).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    text = str(tiny / "text.txt")
    assert main(["eval", str(tiny / "model"), "--against", str(tmp_path / "wide"), "--eval", text, *SMALL]) == 2
    assert "--against has a vocabulary of 600; expected 512, as the model has" in capsys.readouterr().err
