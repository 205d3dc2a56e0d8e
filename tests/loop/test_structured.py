"""Structured pruning: what a unit is, which ones go, and that nothing of them is left in what is saved."""

import re

import pytest
import torch
from conftest import random_model, with_effect
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ebft import EBFTConfig, run_ebft
from ebft.compressed.layers import load_compressed, save_compressed
from ebft.errors import EBFTError
from ebft.model.blocks import find_blocks
from ebft.model.decoder import Decoder
from ebft.model.matrices import find_matrices
from ebft.output.audit import audit
from ebft.pruning.statistics import InputStatistics
from ebft.pruning.structured.scores import least_of_all, remove
from ebft.pruning.structured.units import bias_of, find_units, masks_without, removed_by
from ebft.recovery.layerwise.solve import ClosedForm, inputs_of
from ebft.recovery.task import BlockTask
from ebft.registry import criteria

FAMILIES = ["llama", "llama-gqa", "mistral", "qwen2", "qwen3", "opt", "gpt2", "gpt-neox", "phi", "gemma2"]
GROUPS = {"llama-gqa": 2, "mistral": 2, "qwen2": 2, "qwen3": 2, "gemma2": 2}


def first_block(family):
    decoder = Decoder(random_model(family), torch.device("cpu"))
    block = decoder.working_block(0)
    return decoder, block, find_units(decoder.names[0], block, decoder.matrices[0])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_unit_s_rows_change_its_columns_of_the_consumer_s_input_and_no_others(family):
    decoder, block, units = first_block(family)
    assert [(of_kind.kind, len(of_kind)) for of_kind in units] == [
        ("heads", GROUPS.get(family, 4)),
        ("channels", 128 if family == "gpt2" else 48),
    ]
    assert sum(len(of_kind) * of_kind.parameters for of_kind in units) == sum(
        matrix.outputs * matrix.inputs for matrix in decoder.matrices[0]
    )
    hidden = torch.randn(2, 6, 32)

    def seen(of_kind):
        return inputs_of(block, of_kind.consumer, lambda b, h: decoder.run_block(0, b, h), hidden)[0]

    for of_kind in units:
        before = seen(of_kind)
        for matrix, rows in of_kind.rows.items():
            weight = block.get_parameter(matrix.name)
            kept = weight.clone()
            matrix.by_expert(weight)[0][rows[1]] += torch.randn(rows.shape[1], matrix.inputs)
            changed = (seen(of_kind) != before).any(0).nonzero().flatten().tolist()
            assert set(changed) <= set(of_kind.columns[1].tolist())
            assert changed
            weight.copy_(kept)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "gpt-neox"])
def test_scores_are_those_of_the_paper(family):
    decoder, block, units = first_block(family)
    statistics, hidden = {}, torch.randn(4, 10, 32)
    for of_kind in units:
        x = inputs_of(block, of_kind.consumer, lambda b, h: decoder.run_block(0, b, h), hidden)[0]
        statistics[of_kind.consumer.name] = [InputStatistics.empty(x.shape[1], x.device, {"sums"})]
        statistics[of_kind.consumer.name][0].add(x)
        weight = of_kind.consumer.by_expert(block.get_parameter(of_kind.consumer.name))[0].double()
        columns = weight.square().sum(0)
        for name, of_inputs in (
            ("flap", x.double().var(0, correction=0)),
            ("wanda", x.double().square().mean(0)),
        ):
            wanted = [float((of_inputs * columns)[unit].mean()) for unit in of_kind.columns]
            torch.testing.assert_close(
                criteria[name]().score_units(block, of_kind, statistics),
                torch.tensor(wanted, dtype=torch.float64),
                rtol=1e-5,
                atol=0,
            )
        masks = masks_without(block, [of_kind], [torch.tensor([1])])
        gone = torch.cat([block.get_parameter(name)[~mask.dense()].double() for name, mask in masks.items()])
        assert gone.numel() == of_kind.parameters
        torch.testing.assert_close(criteria["magnitude"]().score_units(block, of_kind, {})[1], gone.abs().mean())


def test_the_least_go_until_the_share_is_met():
    scores, sizes = [torch.rand(5, dtype=torch.float64) for _ in range(4)], [30, 3, 30, 3]
    removed = [set(units.tolist()) for units in least_of_all(scores, sizes, 80)]
    assert abs(sum(size * len(units) for size, units in zip(sizes, removed, strict=True)) - 80) <= 1.5
    for place, of_one in enumerate(scores):
        assert int(of_one.argmax()) not in removed[place]
    for kind in (0, 1):  # units of a size go in the order of their scores, wherever they are
        alike = [(float(s), place, unit) for place in (kind, kind + 2) for unit, s in enumerate(scores[place])]
        free = [(place, unit) for _, place, unit in sorted(alike) if unit != int(scores[place].argmax())]
        gone = sum(len(removed[place]) for place in (kind, kind + 2))
        assert all(unit in removed[place] for place, unit in free[:gone])
    with pytest.raises(EBFTError, match="264 is all that goes while each keeps a head and a channel"):
        least_of_all(scores, sizes, 320)


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-neox"])
def test_biases_make_up_for_the_mean_of_what_is_removed(family):
    decoder, block, units = first_block(family)
    hidden, statistics, xs = torch.randn(4, 10, 32), {}, []
    for of_kind in units:
        xs.append(inputs_of(block, of_kind.consumer, lambda b, h: decoder.run_block(0, b, h), hidden)[0] + 0.5)
        statistics[of_kind.consumer.name] = [InputStatistics.empty(xs[-1].shape[1], hidden.device, {"sums"})]
        statistics[of_kind.consumer.name][0].add(xs[-1])

    def means():
        return [
            (x @ u.consumer.by_expert(block.get_parameter(u.consumer.name))[0].T + bias_of(block, u.consumer)).mean(0)
            for x, u in zip(xs, units, strict=True)
        ]

    removed = [torch.tensor([0, 2]), torch.arange(0, len(units[1]), 3)]
    before = means()
    result = remove(block, units, removed, statistics)
    for name, mask in result.masks.items():
        mask.zero_pruned_(block.get_parameter(name))
    for one, other in zip(before, means(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    dense = {name: mask.dense() for name, mask in result.masks.items()}
    assert [removed_by(u, dense).tolist() for u in units] == [r.tolist() for r in removed]
    for of_kind, gone in zip(units, removed, strict=True):
        for matrix, rows in of_kind.rows.items():
            assert not bias_of(block, matrix)[rows[gone].flatten()].any()


@pytest.fixture
def flap_run(short_run):
    def make(**changes):
        changes = {"structured": True, "prune": "flap", **changes}
        settings = with_effect({"sparsity": 0.3, "weight_decay": 0.0}, changes)
        return run_ebft(config=EBFTConfig.preset("demo", **short_run(**settings)))

    return make


def test_a_run_of_a_model_without_biases(flap_run, tiny, silent):
    """It meets the ratio, biases are there where something was made up for, 0 where nothing was, and all is sound."""
    result = flap_run()
    assert abs(result.summary["sparsity"] - 0.3) < 0.01
    assert "flap structured 30%" in result.summary["recipe"]
    found = audit(str(result.output), str(tiny / "model"))
    assert found.faults == []
    saved = load_file(result.output / "model.safetensors")
    biases = {name: tensor for name, tensor in saved.items() if name.endswith(".bias")}
    assert len(biases) == 3 * 7
    for name, bias in biases.items():
        assert bias.any() == any(consumer in name for consumer in ("o_proj", "down_proj"))
    model, report = AutoModelForCausalLM.from_pretrained(result.output, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for index, block in enumerate(model.model.layers):
        name = f"model.layers.{index}"
        units = find_units(name, block, find_matrices(block))
        zeros = {m.name: block.get_parameter(m.name) != 0 for m in find_matrices(block)}
        removed = [removed_by(of_kind, zeros) for of_kind in units]
        for matrix, mask in masks_without(block, units, removed).items():
            assert torch.equal(result.masks[f"{name}.{matrix}"].dense(), mask.dense())
    again = run_ebft(
        config=EBFTConfig.preset(
            "demo",
            **{
                **{
                    k: v
                    for k, v in result.summary["config"].items()
                    if k not in ("output", "prune", "sparsity", "teacher")
                },
                "model": str(tiny / "model"),
                "prune": str(result.output / "masks.safetensors"),
                "output": f"{result.output}-again",
            },
        ),
        reporter=silent,
    )
    assert again.masks.keys() == result.masks.keys()
    assert all(torch.equal(again.masks[name].dense(), mask.dense()) for name, mask in result.masks.items())


def test_the_pruned_perplexity_is_that_of_the_model_saved_without_recovery(flap_run, tiny):
    result = flap_run(recover="none")
    (perplexity,) = result.summary["perplexity"].values()
    (idle,) = flap_run(recover="ebft", lr=0.0, output=f"{result.output}-idle").summary["perplexity"].values()
    assert idle["pruned"] == pytest.approx(perplexity["pruned"], rel=1e-6)
    assert audit(str(result.output), str(tiny / "model")).faults == []


@pytest.mark.parametrize(("family", "prune"), [("gpt2", "flap"), ("mistral", "flap"), ("llama-gqa", "magnitude")])
def test_models_in_memory(family, prune, short_run, tokenizer, silent):
    model = random_model(family)
    result = run_ebft(
        model,
        EBFTConfig.preset("demo", **short_run(structured=True, prune=prune, sparsity=0.26, model=None)),
        tokenizer=tokenizer,
        reporter=silent,
    )
    assert abs(result.summary["sparsity"] - 0.26) < 0.01
    assert audit(str(result.output)).faults == []
    said = silent.console.file.getvalue()
    assert ("MistralForCausalLM has no bias in down_proj and o_proj" in said) == (family == "mistral")


def test_only_flap_puts_something_into_biases(short_run, tokenizer):
    """Also where a recovery looks at the means that it would take."""
    model = random_model("opt")
    before = {name: p.clone() for name, p in model.named_parameters() if name.endswith(("fc2.bias", "out_proj.bias"))}
    settings = {"structured": True, "prune": "magnitude", "sparsity": 0.26, "eval": "", "model": None}
    settings |= {"recover": "layerwise", "cg_inputs": "dense"}
    run_ebft(model, EBFTConfig.preset("demo", **short_run(**settings)), tokenizer=tokenizer)
    assert all(torch.equal(model.get_parameter(name), bias) for name, bias in before.items())


def test_pruning_and_recovery_are_two_steps(flap_run, tiny, tmp_path):
    """A model that pruning has given biases goes by the teacher that has none, and can be pruned further."""
    first = flap_run(recover="none", eval="", output=str(tmp_path / "first"))
    again = {"model": str(first.output), "teacher": str(tiny / "model"), "recover": "layerwise+ebft", "eval": ""}
    second = flap_run(prune="zeros", output=str(tmp_path / "second"), **again)
    assert all(torch.equal(first.masks[name].dense(), mask.dense()) for name, mask in second.masks.items())
    at_once = flap_run(recover="layerwise+ebft", eval="")
    assert second.blocks[0]["loss_before"] == pytest.approx(at_once.blocks[0]["loss_before"], rel=1e-5)
    more = {"prune": "magnitude", "sparsity": 0.4, "recover": "none", "eval": "", "model": str(second.output)}
    further = flap_run(output=str(tmp_path / "further"), **more)
    assert abs(further.summary["sparsity"] - 0.4) < 0.01
    assert audit(str(further.output), str(second.output)).faults == []


@pytest.mark.parametrize(
    ("family", "heads"), [("llama-gqa", 2), ("mistral", 2), ("opt", 4), ("gpt2", 4), ("gpt-neox", 4)]
)
def test_uniform_widths_are_said_by_the_configuration(family, heads, short_run, tokenizer):
    """The smaller model of transformers gives the outputs of the full shape with zeros, and generates."""
    model = random_model(family)
    whole = weights_in_blocks(model)
    settings = {"structured": True, "uniform": True, "prune": "flap", "sparsity": 0.26, "eval": "", "model": None}
    result = run_ebft(model, EBFTConfig.preset("demo", **short_run(**settings)), tokenizer=tokenizer)
    assert abs(result.summary["sparsity"] - 0.26) < 0.01
    assert audit(str(result.output)).faults == []
    small, report = AutoModelForCausalLM.from_pretrained(result.output, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert small.config.num_attention_heads == heads
    assert 1 - weights_in_blocks(small) / whole == pytest.approx(result.summary["sparsity"])
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert small.generate(ids, max_new_tokens=4, do_sample=False).shape == (1, 16)


def weights_in_blocks(model):
    return sum(m.outputs * m.inputs for block in find_blocks(model)[1] for m in find_matrices(block))


def test_a_run_of_uniform_widths_measures_what_it_saves(flap_run, tiny):
    result = flap_run(uniform=True, recover="none", sparsity=0.26)
    (perplexity,) = result.summary["perplexity"].values()
    (idle,) = (
        flap_run(uniform=True, recover="ebft", lr=0.0, sparsity=0.26, output=f"{result.output}-idle")
        .summary["perplexity"]
        .values()
    )
    assert idle["pruned"] == pytest.approx(perplexity["pruned"], rel=1e-5)
    saved = load_file(result.output / "model.safetensors")
    assert not any(saved[name].any() for name in saved if name.endswith(("q_proj.bias", "up_proj.bias")))
    assert any(saved[name].any() for name in saved if name.endswith("down_proj.bias"))
    assert {mask.density() for mask in result.masks.values()} == {1.0}
    assert audit(str(result.output), str(tiny / "model")).faults == []


@pytest.mark.parametrize(
    ("on", "left"),
    [
        ({"recover": "ebft"}, ""),
        ({"recover": "ebft", "unit": "halves"}, ""),
        ({"recover": "layerwise+ebft"}, "q k v gate up"),
        ({"recover": "layerwise+ebft", "cg_inputs": "dense"}, "q k v o gate up down"),
    ],
)
def test_a_model_of_uniform_widths_is_recovered_against_its_wider_teacher(flap_run, tiny, tmp_path, on, left):
    """The closed form has an aim where a layer has all outputs of the dense one, and inputs of its own."""
    first = flap_run(uniform=True, recover="none", eval="", sparsity=0.26, output=str(tmp_path / "first"))
    two_steps = {"structured": False, "prune": "zeros", "model": str(first.output), "teacher": str(tiny / "model")}
    second = flap_run(**two_steps, **{"eval": "", "lr": 1e-3, **on})
    assert {mask.density() for mask in second.masks.values()} == {1.0}
    assert audit(str(second.output), str(first.output)).faults == []
    for block in second.blocks:
        assert block["loss_after"] < block["loss_before"]
        said = [note for note in block["notes"] if "the dense block has more of" in note]
        assert re.findall(r"(\w+)_proj", " ".join(said)) == left.split()


@pytest.mark.parametrize("family", ["llama-gqa", "opt", "gpt2", "gpt-neox"])
def test_the_compact_form_has_layers_of_their_own_widths(family, tmp_path, short_run, tokenizer):
    """Lossless: logits and generated tokens are those of the full shape; the weights that are 0 are not stored."""
    model = random_model(family)
    whole = weights_in_blocks(model)
    settings = {"structured": True, "prune": "flap", "sparsity": 0.4, "eval": "", "model": None, "recover": "none"}
    result = run_ebft(model, EBFTConfig.preset("demo", **short_run(**settings)), tokenizer=tokenizer)
    saved = save_compressed(str(result.output), str(tmp_path / "compact"))
    small = load_compressed(tmp_path / "compact")
    assert saved["bytes"] == 4 * weights_in_blocks(small)
    assert 1 - weights_in_blocks(small) / whole == pytest.approx(result.summary["sparsity"])
    widths = [tuple(tuple(p.shape) for p in block.parameters()) for block in find_blocks(small)[1]]
    assert len(set(widths)) > 1
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(small(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    tokens = [m.generate(ids, max_new_tokens=8, do_sample=False).tolist() for m in (small, model)]
    assert tokens[0] == tokens[1]
    small.save_pretrained(tmp_path / "again")
    with torch.no_grad():
        assert torch.equal(load_compressed(tmp_path / "again")(ids).logits, small(ids).logits)


def test_layerwise_reckons_with_what_the_biases_hold():
    """A consumer is solved for what its bias does not give already: against least squares in float64."""
    decoder, block, (heads, _) = first_block("gpt-neox")
    dense, hidden, matrix = decoder.working_block(0), torch.randn(8, 12, 32), heads.consumer

    def forward(block, hidden):
        return decoder.run_block(0, block, hidden)

    masks = {matrix.name: masks_without(block, [heads], [torch.tensor([1, 3])])[matrix.name]}
    with torch.no_grad():
        masks[matrix.name].zero_pruned_(block.get_parameter(matrix.name))
        bias_of(block, matrix).add_(torch.randn(32))
    task = BlockTask(
        index=0,
        block=block,
        matrices=[matrix],
        masks=masks,
        inputs=hidden,
        targets=forward(dense, hidden),
        forward=forward,
        dense_block=lambda: dense,
        dense_forward=forward,
        dense_inputs=hidden,
        statistics={},
        on_step=lambda done, steps: None,
        scratch=torch.empty_like,
    )
    ClosedForm(EBFTConfig.of(recover="layerwise", cg_iterations=40, cg_damping=0.0), torch.device("cpu")).recover(task)
    x = inputs_of(dense, matrix, forward, hidden)[0].double()
    weight, bias = dense.get_parameter(matrix.name).double(), bias_of(dense, matrix) - bias_of(block, matrix)
    kept = masks[matrix.name].dense()[0]
    wanted = torch.linalg.lstsq(x[:, kept], x @ weight.T + bias.double()).solution.T
    torch.testing.assert_close(block.get_parameter(matrix.name)[:, kept].double(), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"structured": True, "pattern": "2:4"}, "--structured prunes whole heads and channels, and --pattern is 2:4"),
        ({"uniform": True}, "--uniform is about the widths that --structured leaves; expected --structured"),
        ({"prune": "flap"}, "--prune flap scores whole heads and channels; expected --structured"),
    ],
)
def test_settings_that_make_no_sense(settings, says):
    with pytest.raises(EBFTError, match=says):
        EBFTConfig.of(**settings)


def test_models_and_masks_that_are_refused(tiny, short_run, tokenizer, tmp_path):
    def refused(says, model=None, **settings):
        given = {"structured": True, **settings}
        with pytest.raises(EBFTError, match=says):
            run_ebft(model, EBFTConfig.preset("demo", **short_run(**given)), tokenizer=tokenizer)

    refused("qwen3.*|model.layers.0.mlp.experts holds gate_up_proj", random_model("qwen3-moe"), prune="flap")
    refused("--prune is 'hope'; expected .*flap, wanda, zeros or an existing file", prune="hope")
    refused(
        "--uniform chooses the widths, and --prune is zeros; expected magnitude, flap, wanda",
        prune="zeros",
        uniform=True,
    )
    refused("no configuration of LlamaConfig says widths with 95% of", prune="flap", uniform=True, sparsity=0.95)
    masks = {
        f"model.layers.{i}.{m.name}": torch.rand(m.outputs, m.inputs) > 0.5
        for i, block in enumerate(find_blocks(random_model("llama-gqa"))[1])
        for m in find_matrices(block)
    }
    save_file(masks, tmp_path / "masks.safetensors")
    refused("k_proj.weight is not pruned by whole heads and channels", prune=str(tmp_path / "masks.safetensors"))


def test_a_preset_may_aim_otherwise_with_uniform():
    uniform = {"structured": True, "uniform": True, "prune": "flap"}
    targets = [
        EBFTConfig.preset("light", model="x", **given).recover.target
        for given in ({"structured": True, "prune": "flap"}, uniform, {**uniform, "target": "dense-stream"})
    ]
    assert targets == ["dense-stream", "sparse-stream", "dense-stream"]
