"""The closed form: against a direct solution in float64, and inside whole runs."""

import pytest
import torch
from conftest import random_model
from faults import assert_same, stopped_at_pass
from torch import nn

from ebft import EBFTConfig, run_ebft
from ebft.model.decoder import Decoder
from ebft.model.matrices import find_matrices
from ebft.recovery.layerwise.solve import input_groups, inputs_of, masked_least_squares
from ebft_kernels import load_masks

CPU = torch.device("cpu")


def system(outputs, inputs, dense_inputs, tokens, dtype, seed=0):
    """Dense weight, masked start, mask, sparse and dense inputs that belong together."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    dense = normal(tokens, dense_inputs) @ (normal(dense_inputs, dense_inputs) / dense_inputs**0.5)
    sparse = dense[:, :inputs] + 0.3 * normal(tokens, inputs)
    target = normal(outputs, dense_inputs)
    mask = torch.rand(outputs, inputs, generator=generator) > 0.6
    mask[0], mask[-1] = True, False
    start = torch.where(mask, target[:, :inputs], 0)
    return [
        tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in (target, start, mask, sparse, dense)
    ]


def solve(target, start, mask, sparse, dense, **settings):
    return masked_least_squares(target, start, mask, sparse.T @ sparse, dense.T @ sparse, **settings)


@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize(("outputs", "inputs", "dense_inputs"), [(5, 13, 13), (1, 1, 1), (7, 9, 14), (33, 3, 5)])
def test_it_is_the_least_squares_solution_of_every_row(outputs, inputs, dense_inputs, damping):
    target, start, mask, sparse, dense = system(outputs, inputs, dense_inputs, 60, torch.float64)
    found = solve(target, start, mask, sparse, dense, iterations=2 * inputs, damping=damping)
    shift = damping * sparse.square().sum(0).mean()
    for row in range(outputs):
        kept = mask[row]
        # damping towards the start, as further rows of the least-squares problem
        matrix = torch.cat([sparse[:, kept], shift.sqrt() * torch.eye(int(kept.sum()), dtype=torch.float64)])
        wanted = torch.cat([dense @ target[row], shift.sqrt() * start[row, kept]])
        expected = torch.linalg.lstsq(matrix, wanted.unsqueeze(1)).solution.squeeze(1)
        torch.testing.assert_close(found[row, kept], expected, rtol=1e-7, atol=1e-9)
        assert torch.equal(found[row, ~kept], torch.zeros_like(found[row, ~kept]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_row_ends_worse_than_it_began(dtype):
    """Ill-conditioned, with dead inputs and repeated ones: at every number of iterations."""
    target, start, mask, sparse, dense = system(21, 37, 37, 50, dtype)
    scale = torch.logspace(-4, 4, 37, dtype=dtype)
    sparse, dense = sparse * scale, dense * scale
    sparse[:, 5], dense[:, 5], sparse[:, 7], dense[:, 7] = 0, 0, sparse[:, 6], dense[:, 6]

    def error(weight):
        return (sparse.double() @ weight.double().T - dense.double() @ target.double().T).square().sum(0)

    before, errors = error(start), []
    for iterations in (1, 2, 5, 20, 200):
        found = solve(target, start, mask, sparse, dense, iterations=iterations, damping=0.0)
        assert torch.isfinite(found).all()
        errors.append(error(found))
        assert (errors[-1] <= before * (1 + 1e-5)).all()
    assert errors[3].sum() < 0.6 * before.sum()


def test_nothing_seen_changes_nothing():
    target, start, mask, sparse, dense = system(5, 13, 13, 60, torch.float32)
    for damping in (0.0, 0.01):
        assert torch.equal(solve(target, start, mask, 0 * sparse, 0 * dense, iterations=20, damping=damping), start)


def test_rows_in_parts_are_rows_at_once(monkeypatch):
    given = system(33, 13, 13, 60, torch.float64)
    whole = solve(*given, iterations=9, damping=0.01)
    monkeypatch.setattr("ebft.recovery.layerwise.solve.ROWS_AT_ONCE", 40)
    torch.testing.assert_close(solve(*given, iterations=9, damping=0.01), whole, rtol=1e-9, atol=1e-12)


# --- what layers are given --------------------------------------------------------------------------------------------

GROUPS = {
    "llama-gqa": ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc", "c_proj"],
    "opt": ["k_proj q_proj v_proj", "out_proj", "fc1", "fc2"],
    "phi": ["fc1 k_proj q_proj v_proj", "dense", "fc2"],
    "mixtral": ["k_proj q_proj v_proj", "o_proj", "gate_up_proj", "down_proj"],
}


@pytest.mark.parametrize("family", GROUPS)
def test_groups_are_those_of_one_input(family):
    decoder = Decoder(random_model(family), CPU)
    block, matrices = decoder.working_block(0), decoder.matrices[0]
    hidden = torch.randn(2, 6, decoder.width())
    groups = input_groups(block, matrices, lambda block, x: decoder.run_block(0, block, x), hidden)
    assert sum(map(len, groups)) == len(matrices)
    names = [" ".join(sorted(m.name.removesuffix(".weight").rpartition(".")[2] for m in group)) for group in groups]
    assert names == [" ".join(sorted(group.split())) for group in GROUPS[family]]
    of_experts = [group[0] for group in groups if group[0].experts > 1]
    for matrix in of_experts:
        seen = inputs_of(block, matrix, lambda block, x: decoder.run_block(0, block, x), hidden)
        assert sum(map(len, seen)) == 2 * 6 * 2  # two experts a token
        assert all(x.shape[1] == matrix.inputs for x in seen)


class Twice(nn.Module):
    """The second layer's input is made of the first one's output, in the memory of the first one's input."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)

    def forward(self, hidden):
        x = hidden.clone()
        x.copy_(self.one(x).tanh())
        return hidden + self.two(x)


def test_a_tensor_that_is_overwritten_is_another_input():
    block = Twice().requires_grad_(False)
    groups = input_groups(block, find_matrices(block), lambda block, x: block(x), torch.randn(1, 3, 6))
    assert [[matrix.name for matrix in group] for group in groups] == [["one.weight"], ["two.weight"]]


# --- whole runs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "target", "inputs"),
    [
        ("llama-gqa", "sparse-stream", "sparse"),
        ("llama-gqa", "dense-stream", "dense"),
        ("gpt2", "sparse-stream", "sparse"),
        ("opt", "dense-stream", "sparse"),
        ("mixtral", "dense-stream", "sparse"),
        ("mixtral", "sparse-stream", "dense"),
    ],
)
def test_a_run_comes_nearer_to_the_dense_block(family, target, inputs, config, tokenizer, silent):
    settings = config(recover="layerwise", target=target, cg_inputs=inputs, samples=24)
    result = run_ebft(random_model(family), settings, tokenizer=tokenizer, reporter=silent)
    for line in result.blocks:  # the dense stream is also far for what the blocks before have done
        limit = {"sparse-stream": 0.9, "dense-stream": 1}[target]
        assert line["loss_after"] < limit * line["loss_before"], line["notes"]
        assert line["losses"] == []
    masks = load_masks(result.output / "masks.safetensors")
    for name, mask in masks.items():
        assert torch.count_nonzero(result.model.get_parameter(name)[~mask.dense()]) == 0


@pytest.mark.parametrize("holdout", [0.0, 0.25])
def test_first_layers_have_the_same_inputs_in_both_blocks(holdout, config, tokenizer, silent):
    """q, k and v of the first block are solved alike from either; what is held out takes no part in it."""
    solved, few = {}, {"samples": 8, "recover": "layerwise", "target": "sparse-stream", "holdout": holdout}
    for inputs in ("dense", "sparse"):
        settings = config(**few, cg_inputs=inputs, output=config().output.folder + inputs)
        model = run_ebft(random_model("llama-gqa"), settings, tokenizer=tokenizer, reporter=silent).model
        solved[inputs] = dict(model.model.layers[0].named_parameters())
    for name in ("q_proj", "k_proj", "v_proj"):
        one, other = (of_block[f"self_attn.{name}.weight"] for of_block in solved.values())
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    one, other = (of_block["mlp.down_proj.weight"] for of_block in solved.values())
    assert (one - other).abs().max() > 1e-3


def test_a_teacher_s_inputs_are_those_of_the_dense_block(tiny, short_run, silent, tmp_path):
    """The same solution whether zeros are pruned again towards a teacher, or the dense model by their masks."""
    given = {"cg_inputs": "dense", "eval": "", "target": "dense-stream"}
    first = run_ebft(config=EBFTConfig.of(**short_run("first", recover="none", eval="")), reporter=silent)
    solved = [
        run_ebft(config=EBFTConfig.of(**short_run(name, recover="layerwise", **given, **how)), reporter=silent).model
        for name, how in (
            ("zeros", {"model": str(first.output), "prune": "zeros", "teacher": str(tiny / "model")}),
            ("masks", {"prune": str(first.output / "masks.safetensors")}),
        )
    ]
    for one, other in zip(*(model.parameters() for model in solved), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_it_beats_the_pruned_model_and_helps_what_follows(trained, config, silent):
    """On a model that has learned something; a sum of recoveries runs both, each after the other."""
    perplexity = {}
    for recover in ("none", "ebft", "layerwise", "layerwise+ebft"):
        of_ebft = {"epochs": 1, "lr": 1e-3} if "ebft" in recover else {}
        settings = config(
            model=str(trained), recover=recover, samples=32, seqlen=64, eval="builtin", eval_seqlen=128,
            sparsity=0.7, output=config().output.folder + recover, **of_ebft,
        )  # fmt: skip
        result = run_ebft(config=settings, reporter=silent)
        *_, perplexity[recover] = result.summary["perplexity"]["builtin"].values()  # of what was saved
        assert f"recovered by {recover}" in result.summary["recipe"] or recover == "none"
        assert all(len(line["losses"]) == (8 if "ebft" in recover else 0) for line in result.blocks)
    assert perplexity["layerwise"] < perplexity["ebft"] < perplexity["none"]
    assert perplexity["layerwise+ebft"] < perplexity["layerwise"]


@pytest.mark.parametrize("streams", ["host", "disk"])
def test_a_streamed_run_is_gone_on_with(streams, short_run, silent, tmp_path):
    """Dense targets, so that the dense model's states before and after a block are both needed."""
    given = {"recover": "layerwise", "target": "dense-stream", "streams": streams}
    whole = run_ebft(config=EBFTConfig.of(**short_run("whole", **given)), reporter=silent)

    with stopped_at_pass(2):
        run_ebft(config=EBFTConfig.of(**short_run(**given)), reporter=silent)
    run_ebft(config=EBFTConfig.of(**short_run(**given, resume=True)), reporter=silent)
    assert_same(tmp_path / "out", tmp_path / "whole")
    assert all(line["loss_after"] < line["loss_before"] for line in whole.blocks)


def test_a_plan_has_its_room(tiny, capsys):
    from ebft.run import main

    flags = ["--model", str(tiny / "model"), "--seqlen", "16", "--eval", "", "--target", "dense-stream", "--plan"]
    rooms = {}
    for recover in ("ebft", "layerwise+ebft"):
        assert main([*flags, "--recover", recover]) == 0
        rooms[recover] = capsys.readouterr().out
    assert "closed form" in rooms["layerwise+ebft"]
    assert "closed form" not in rooms["ebft"]
