"""The model card: metadata that huggingface_hub reads, of where the model comes from, and the command that makes it."""

import shlex

import pytest
from huggingface_hub import ModelCard
from test_security import a_summary

from ebft.cli.app import parse_args
from ebft.config import EBFTConfig, closest_preset
from ebft.model.locate import DEFAULT_MODEL
from ebft.model.provenance import provenance
from ebft.output.card import model_card
from ebft.output.recipe import command_again

WIKITEXT = {"path": "Salesforce/wikitext", "name": "wikitext-2-raw-v1", "split": "test"}


def summary_of(config, model="org/model", **changes):
    """As a run with these settings would leave it."""
    return {**a_summary(model, "wikitext2"), "config": config.flat(), "whole_model": {}, "zero_shot": {}, **changes}


def test_the_metadata_are_what_huggingface_hub_reads(tmp_path):
    datasets = {"c4": {"path": "allenai/c4", "name": "en", "split": "validation"}, "wikitext2": WIKITEXT}
    source = {"base_model": "org/model", "license": "other", "license_name": "x", "license_link": "LICENSE"}
    made = summary_of(
        EBFTConfig.preset("light", model="org/model"),
        datasets=datasets,
        calibration_texts=["c4", "mine.txt"],
        source={**source, "language": ["en"], "tags": ["chat", "ebft"]},
    )
    (tmp_path / "README.md").write_text(model_card(made))
    data = ModelCard.load(tmp_path / "README.md", ignore_metadata_errors=False).data
    assert {name: data[name] for name in source} == source
    assert (data.language, data.datasets) == (["en"], ["allenai/c4"])
    assert data.tags == ["chat", "ebft", "sparse", "pruned"]
    assert (data.pipeline_tag, data.library_name, data.model_name) == ("text-generation", "transformers", "org/model")
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_type, result.dataset_name) == (
        "text-generation",
        "Salesforce/wikitext",
        "wikitext2",
    )
    assert (result.dataset_config, result.dataset_split) == ("wikitext-2-raw-v1", "test")
    assert (result.metric_type, result.metric_value) == ("perplexity", 25.5)


@pytest.mark.parametrize(
    ("preset", "changes"),
    [
        ("paper", {}),
        ("paper", {"schedule": "0.4,0.6", "prune": "magnitude"}),
        ("light", {"uniform": True, "structured": True, "prune": "flap", "sparsity": 0.3}),
        ("best", {"pattern": "2:4", "compact": True, "eval": ""}),
        ("demo", {"recover": "none", "eval": ["builtin", "wikitext2"]}),
        ("demo", {"lr_decay": "cosine", "holdout": 0.25}),
    ],
)
def test_the_command_in_the_card_makes_it_again(preset, changes):
    config = EBFTConfig.preset(preset, model="org/model", **changes)
    ebft, run, *words = shlex.split(command_again(summary_of(config)))
    assert (ebft, run) == ("ebft", "run")
    again, _ = parse_args(words)
    assert again == config


def test_only_what_differs_from_the_preset_is_shown():
    config = EBFTConfig.preset("light", sparsity=0.5, output="elsewhere")
    assert closest_preset(config.flat()) == ("light", {"sparsity": 0.5})
    card = model_card(summary_of(config, DEFAULT_MODEL))
    assert "ebft run --preset light --sparsity 0.5\n" in card
    assert "- sparsity: 0.5\n" in card
    assert "batch_size" not in card


def test_where_a_model_comes_from(tmp_path):
    assert provenance(None)["license"] == "apache-2.0"
    assert provenance("some-org/some-model") == {"base_model": "some-org/some-model"}
    (tmp_path / "README.md").write_text(
        "---\nlicense: mit\ntags: [a, 'b c', {d: e}, f]\nlanguage: de\nbase_model: [x/y]\nlicense_link: 'x:y'\n---\n"
    )
    assert provenance(str(tmp_path)) == {"license": "mit", "tags": ["a", "f"], "language": ["de"], "base_model": "x/y"}


@pytest.mark.parametrize("front", ["[]", "a: !!python/object/apply:os.system [x]", "a: [" * 2000, "license: [mit]", ""])
def test_a_card_that_says_nothing_useful_is_none(front, tmp_path):
    (tmp_path / "README.md").write_text(f"---\n{front}\n---\n")
    assert provenance(str(tmp_path)) == {}
