"""A step that fits: the same mathematics in less memory, and what happens where memory or numbers run out."""

import itertools
import json
import math
import re
from functools import partial

import pytest
import torch
from conftest import random_model
from torch import nn
from torch.nn import functional as F

from ebft import BlockReconstructor, EBFTConfig, EBFTError, run_ebft
from ebft.config.config import all_flat_names
from ebft.config.fields import flag
from ebft.recovery.ebft import objective
from ebft.run import main
from ebft_kernels import MaskedAdamW, PackedMask

CPU = torch.device("cpu")


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16, bias=False)

    def forward(self, hidden):
        q, k, v = self.qkv(hidden).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16, bias=False)

    def forward(self, hidden):
        return self.down(F.silu(self.up(hidden)))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.LayerNorm(16), nn.LayerNorm(16)
        self.attention, self.mlp = Attention(), MLP()

    def forward(self, hidden):
        hidden = hidden + self.attention(self.first(hidden))
        return hidden + self.mlp(self.second(hidden))


def problem(dtype=torch.float32):
    torch.manual_seed(0)
    block, inputs = Block().requires_grad_(False).to(dtype), torch.randn(20, 8, 16, dtype=dtype)
    targets = block(inputs)
    masks = {}
    for name, parameter in block.named_parameters():
        if parameter.ndim == 2:
            masks[name] = PackedMask.from_dense(torch.rand(parameter.shape) > 0.5)
            masks[name].zero_pruned_(parameter)
    return block, inputs, targets, masks


def settings(**changes):
    return EBFTConfig.of(**{"lr": 3e-3, "epochs": 3, "batch_size": 8, "weight_decay": 0.1, "clip": 0.1, **changes})


def fit(compute=torch.float32, dtype=torch.float32, **changes):
    block, inputs, targets, masks = problem(dtype)
    forward = (lambda block, hidden: block(hidden)) if dtype == torch.float64 else None  # by itself it gives float32
    reconstructor = BlockReconstructor(settings(**changes), CPU, compute)
    result = reconstructor.fit(block, inputs, targets, masks=masks, forward=forward)
    for name, mask in masks.items():
        assert torch.count_nonzero(block.get_parameter(name)[~mask.dense()]) == 0
    assert {p.dtype for p in block.parameters()} == {dtype}
    assert not any(p.requires_grad or p.grad is not None for p in block.parameters())
    assert type(block.mlp.up) is nn.Linear
    assert "forward" not in block.mlp.__dict__
    return dict(block.named_parameters()), result


@pytest.mark.parametrize("size", [1, 3, 4])
def test_micro_batches_are_the_same_step(size):
    """In float64, where sums in another order differ in the fifteenth figure; the last batch has 4 samples of 8."""
    whole, told = fit(dtype=torch.float64)
    parts, told_too = fit(dtype=torch.float64, micro_batch=size)
    for name, parameter in whole.items():
        torch.testing.assert_close(parts[name], parameter, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.tensor(told_too.losses), torch.tensor(told.losses))
    torch.testing.assert_close(torch.tensor(told_too.gradient_norms), torch.tensor(told.gradient_norms))


@pytest.mark.parametrize("recompute", ["block", "halves"])
@pytest.mark.parametrize("micro_batch", [None, 3])
def test_recomputation_changes_no_bit(recompute, micro_batch):
    usual, _ = fit(micro_batch=micro_batch)
    again, _ = fit(micro_batch=micro_batch, recompute=recompute)
    assert all(torch.equal(again[name], usual[name]) for name in usual)


def test_recomputation_keeps_less(monkeypatch):
    """Bytes that autograd saves in the forward pass."""

    def saved(recompute):
        block, inputs, _, masks = problem()
        sizes, reconstructor = {}, BlockReconstructor(settings(recompute=recompute), CPU)

        def note(tensor):
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            reconstructor.prepared(block, masks, lambda block, hidden: block(hidden)) as tuning,
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        ):
            output = tuning.forward(inputs)
        assert output.requires_grad
        return sum(sizes.values())

    none, halves, block = saved("none"), saved("halves"), saved("block")
    assert block < halves < none


@pytest.mark.parametrize(
    ("weights", "moments", "compact", "recompute", "micro_batch"),
    [
        ("fp32", "fp32", True, "none", None),
        ("fp32", "int8", True, "halves", 4),
        ("master", "fp32", False, "halves", 2),
        ("master", "bf16", True, "none", None),
        ("stochastic", "bf16", False, "block", 4),
        ("stochastic", "int8", True, "halves", 1),
    ],
)
def test_every_layout_of_weights_and_moments_recovers(weights, moments, compact, recompute, micro_batch):
    layout = {"weights": weights, "moments": moments, "compact": compact, "recompute": recompute}
    after, result = fit(torch.bfloat16, **layout, micro_batch=micro_batch, epochs=8)
    _, usual = fit(torch.bfloat16, epochs=8)
    assert result.error_after < 0.8 * result.error_before
    assert result.error_after < 1.25 * usual.error_after
    if weights != "fp32":
        assert torch.equal(after["mlp.up.weight"], after["mlp.up.weight"].bfloat16().float())
    assert not torch.equal(after["first.weight"], after["first.weight"].bfloat16().float())  # norms stay float32


def test_compact_states_change_no_bit():
    usual, _ = fit()
    compact, _ = fit(compact=True)
    assert all(torch.equal(compact[name], usual[name]) for name in usual)


@pytest.mark.parametrize("recompute", ["none", "halves"])
def test_updating_in_the_backward_pass_is_the_same_step(recompute):
    usual, told = fit(clip=0.0)
    early, told_too = fit(clip=0.0, update_in_backward=True, recompute=recompute)
    assert all(torch.equal(early[name], usual[name]) for name in usual)
    assert told_too.losses == told.losses
    assert all(math.isnan(norm) for norm in told_too.gradient_norms)


def test_a_compiled_block_is_the_same_block():
    usual, told = fit(batch_size=10)
    compiled, result = fit(batch_size=10, compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    for name in (name for name in usual if usual[name].ndim == 2):  # the keys' bias has no gradient but rounding
        torch.testing.assert_close(compiled[name], usual[name], rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(told.losses), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("recompute", ["none", "block"])
def test_many_blocks_are_compiled_once(recompute, config, silent, tokenizer, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run_ebft(
        random_model("llama", num_hidden_layers=12),
        config(compile=True, recompute=recompute, sparsity=0.5, epochs=1),
        tokenizer=tokenizer,
        reporter=silent,
    )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# --- memory runs out ------------------------------------------------------------------------------------------------


def fails(monkeypatch, times, when, what=torch.OutOfMemoryError):
    """Let the attribute ``when`` = (object, name) run out of memory in its calls of these numbers."""
    owner, name = when
    real, calls = getattr(owner, name), itertools.count()

    def call(*args, **kwargs):
        if next(calls) in times:
            raise what("CUDA out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, call)


def test_out_of_memory_halves_the_micro_batch_and_repeats_the_step(monkeypatch):
    expected, usual = fit(dtype=torch.float64)
    # the second step fails whole; then in the second of its two halves; then all is well with quarters
    fails(monkeypatch, {1, 3}, (objective, "reconstruction_loss_and_gradient"))
    block, inputs, targets, masks = problem(torch.float64)
    reconstructor, forward = BlockReconstructor(settings(), CPU), lambda block, hidden: block(hidden)
    result = reconstructor.fit(block, inputs, targets, masks=masks, forward=forward)
    assert result.notes == [
        "out of GPU memory with 8 sequences at once: 4 from here on",
        "out of GPU memory with 4 sequences at once: 2 from here on",
    ]
    assert reconstructor.micro_batch == 2
    for name, parameter in expected.items():
        torch.testing.assert_close(block.get_parameter(name), parameter, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(usual.losses))
    again = reconstructor.fit(block, inputs, targets, masks=masks, forward=forward)  # said once
    assert again.notes == []


def test_out_of_memory_in_the_backward_pass(monkeypatch):
    expected, _ = fit(dtype=torch.float64)
    fails(monkeypatch, {2}, (torch.Tensor, "backward"))
    after, result = fit(dtype=torch.float64)
    assert len(result.notes) == 1
    for name, parameter in expected.items():
        torch.testing.assert_close(after[name], parameter, rtol=1e-9, atol=1e-11)


def test_one_sequence_that_does_not_fit_is_one_sentence(monkeypatch):
    fails(monkeypatch, range(100), (objective, "reconstruction_loss_and_gradient"))
    with pytest.raises(EBFTError, match=r"out of GPU memory with --micro-batch 1; expected .*--plan"):
        fit()


def test_a_half_updated_block_is_never_stepped_again(monkeypatch):
    with monkeypatch.context() as patched:
        fails(patched, {3}, (MaskedAdamW, "update"))
        with pytest.raises(EBFTError, match="in a backward pass that updates weights and so is not repeated"):
            fit(clip=0.0, update_in_backward=True)
    fails(monkeypatch, {1}, (MaskedAdamW, "step"))
    with pytest.raises(EBFTError, match="in the optimizer's step, which may have updated a part"):
        fit()


def test_a_run_says_that_memory_ran_out(monkeypatch, config, silent, tokenizer):
    fails(monkeypatch, {0}, (objective, "reconstruction_loss_and_gradient"))
    result = run_ebft(random_model("llama"), config(sparsity=0.5), tokenizer=tokenizer, reporter=silent)
    notes = [line["notes"] for line in result.blocks]
    assert notes == [["out of GPU memory with 4 sequences at once: 2 from here on"], [], []]
    assert silent.console.file.getvalue().count("out of GPU memory") == 1


# --- numbers run out ------------------------------------------------------------------------------------------------


def test_where_tuning_diverges_the_best_weights_are_kept(monkeypatch):
    block, inputs, targets, masks = problem()
    states = {}
    real = MaskedAdamW.step

    def step(self, *args):
        number = states["steps"] = states.get("steps", 0) + 1
        if number == 7:  # the second epoch has 3 steps, as the first; this is in the third
            states["best"] = {name: p.detach().clone() for name, p in block.named_parameters()}
            with torch.no_grad():
                block.mlp.up.weight[masks["mlp.up.weight"].dense()] = float("nan")
        return real(self, *args)

    monkeypatch.setattr(MaskedAdamW, "step", step)
    result = BlockReconstructor(settings(epochs=5), CPU).fit(block, inputs, targets, masks=masks)
    assert states["steps"] == 9  # it ends with the epoch
    assert len(result.losses) == 9
    assert all(torch.equal(p, states["best"][name]) for name, p in block.named_parameters())
    assert result.error_after < result.error_before
    (note,) = result.notes
    assert note.startswith("tuning diverged: the error was")
    assert "nan after epoch 3" in note


def test_where_tuning_only_harms_the_block_is_as_it_was():
    block, inputs, targets, masks = problem()
    before = {name: p.detach().clone() for name, p in block.named_parameters()}
    result = BlockReconstructor(settings(lr=1.0, epochs=2), CPU).fit(block, inputs, targets, masks=masks)
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert result.error_after == result.error_before
    assert len(result.notes) == 1


def test_a_diverging_run_goes_on_and_says_so(config, silent, tokenizer):
    result = run_ebft(random_model("llama"), config(lr=1e30, epochs=4), tokenizer=tokenizer, reporter=silent)
    for line in result.blocks:
        assert line["loss_after"] == line["loss_before"]
        assert line["notes"][0].startswith("tuning diverged")
    assert "tuning diverged" in silent.console.file.getvalue()
    lines = [json.loads(line) for line in (result.output / "blocks.jsonl").read_text().splitlines()]
    assert [line["notes"] for line in lines] == [line["notes"] for line in result.blocks]
    assert "tuning diverged" in (result.output / "report.html").read_text()


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"micro_batch": 9}, "--micro-batch is 9; expected 1 to 8, the --batch-size"),
        ({"micro_batch": 0}, "--micro-batch is 0; expected a whole number of at least 1"),
        ({"recompute": "all"}, "--recompute is 'all'; expected one of none, block, halves"),
        ({"weights": "fp16"}, "--weights is 'fp16'; expected one of fp32, master, stochastic"),
        ({"moments": "int4"}, "--moments is 'int4'; expected one of fp32, bf16, int8"),
        ({"update_in_backward": True}, "before the norm of all is known, and --clip is 0.1; expected --clip 0"),
        (
            {"update_in_backward": True, "clip": 0, "micro_batch": 4},
            "before they are summed, and --micro-batch is 4; expected 8, the --batch-size",
        ),
        ({"update_in_backward": True, "clip": 0, "compile": True}, "does not go with --compile"),
        ({"compile": True, "recompute": "halves"}, "--recompute halves does not go with --compile"),
        ({"gpu_memory": "a lot"}, "--gpu-memory is 'a lot'; expected a size such as 8GiB or 500MB"),
        ({"host_memory": "-1GiB"}, "--host-memory is '-1GiB'; expected a size"),
    ],
)
def test_settings_are_refused_in_a_sentence(changes, says):
    with pytest.raises(EBFTError) as error:
        settings(**changes)
    assert says in str(error.value)


def test_settings_that_the_products_do_not_allow():
    with pytest.raises(EBFTError, match="--weights stochastic keeps matrices in bfloat16, and products are in float32"):
        BlockReconstructor(settings(weights="stochastic"), CPU)
    with pytest.raises(EBFTError, match="products are in float16; expected --dtype bfloat16"):
        BlockReconstructor(settings(weights="master"), CPU, torch.float16)
    with pytest.raises(EBFTError, match="products in float16 need a loss scale"):
        BlockReconstructor(settings(update_in_backward=True, clip=0), CPU, torch.float16)


def test_a_block_without_halves(config, silent, tokenizer):
    with pytest.raises(EBFTError, match=r"the matrices of OPTDecoderLayer are in self_attn, fc1, fc2; expected two"):
        run_ebft(random_model("opt"), config(recompute="halves"), tokenizer=tokenizer, reporter=silent)


def test_a_budget_for_a_gpu_that_is_not_there(config, silent, tokenizer):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EBFTError, match="--gpu-memory is 4GiB, and the run is on a CPU; expected a GPU"):
        run_ebft(random_model("llama"), config(gpu_memory="4GiB"), tokenizer=tokenizer, reporter=silent)


@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mixtral", "qwen2-moe", "gemma3"])
def test_the_leanest_step_in_other_families(family, config, silent, tokenizer):
    lean = {"weights": "stochastic", "moments": "int8", "compact": True, "recompute": "halves", "micro_batch": 1}
    model = random_model(family).to(torch.bfloat16)
    result = run_ebft(
        model,
        config(sparsity=0.5, dtype="bfloat16", epochs=2, samples=4, **lean),
        tokenizer=tokenizer,
        reporter=silent,
    )
    for line in result.blocks:
        assert line["loss_after"] < line["loss_before"], line["name"]
        assert line["notes"] == []


def test_attention_is_never_eager():
    """Nothing here asks for another attention than transformers' default, which is SDPA."""
    model = random_model("llama")
    assert model.config._attn_implementation == "sdpa"


def test_the_settings_are_flags(capsys):
    assert main(["--help", "all"]) == 0
    said = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert said >= {flag(name) for name in all_flat_names()}
