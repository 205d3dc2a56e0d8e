"""--unit halves: attention towards the dense states after attention, then the MLP towards those after both."""

import copy

import pytest
import torch
from conftest import random_model
from faults import assert_same

from ebft import BlockReconstructor, EBFTConfig, EBFTError, run_ebft
from ebft.model.decoder import Decoder
from ebft.plan.planner import make_plan
from ebft.recovery.ebft.halves import HalfByHalf
from ebft.recovery.task import BlockResult, BlockTask
from ebft_kernels import PackedMask, load_masks

CPU = torch.device("cpu")


class Told:
    """Keeps the tasks it is given, with what the block gives then, and changes all that it may."""

    needs = frozenset()

    def __init__(self):
        self.tasks, self.outputs = [], []

    def recover(self, task):
        self.tasks.append(replaced := copy.copy(task))
        object.__setattr__(replaced, "targets", task.targets.clone())
        self.outputs.append(task.forward(task.block, task.inputs))
        for name in task.only:
            task.block.get_parameter(name).mul_(1.1)
        return BlockResult([1.0], [2.0], 3.0, 4.0, 5.0, 6.0, ["a note"])


def task_of(family, target):
    """A block of a random model, pruned by half, as a task; and the dense block."""
    decoder = Decoder(random_model(family), CPU)
    torch.manual_seed(1)
    block, hidden = decoder.working_block(1), torch.randn(3, 5, decoder.width())
    dense, dense_hidden = copy.deepcopy(block), torch.randn(3, 5, decoder.width())
    masks = {}
    for matrix in decoder.matrices[1]:
        weight = block.get_parameter(matrix.name)
        masks[matrix.name] = PackedMask.from_dense(torch.rand(weight.shape) > 0.5)
        masks[matrix.name].zero_pruned_(weight)

    def forward(block, x):
        return decoder.run_block(1, block, x)

    source = hidden if target == "sparse-stream" else dense_hidden
    room = torch.empty_like(hidden)
    task = BlockTask(
        index=1, block=block, matrices=decoder.matrices[1], masks=masks, inputs=hidden, targets=forward(dense, source),
        forward=forward, dense_block=lambda: copy.deepcopy(dense), dense_forward=forward, dense_inputs=source,
        statistics={}, on_step=lambda done, steps: None, scratch=lambda: room,
    )  # fmt: skip
    return task, dense


@pytest.mark.parametrize("target", ["sparse-stream", "dense-stream"])
def test_what_each_half_is_given(target):
    """Against the inputs of the MLP's norm, which are a Llama's hidden states after attention."""
    task, dense = task_of("llama-gqa", target)
    after = {}
    for name, block, x in (("dense", dense, task.dense_inputs), ("pruned", task.block, task.inputs)):

        def keep(module, args, name=name):
            after[name] = args[0].clone()

        handle = block.post_attention_layernorm.register_forward_pre_hook(keep)
        task.forward(block, x)
        handle.remove()
    whole = (task.forward(task.block, task.inputs) - task.targets)[:1].square().mean()
    told, before = Told(), {name: p.clone() for name, p in task.block.named_parameters()}
    result = HalfByHalf(EBFTConfig.of(target=target, batch_size=2), CPU, told).recover(task)
    (first, second), (of_attention, _) = told.tasks, told.outputs
    torch.testing.assert_close(first.targets, after["dense"])
    torch.testing.assert_close(of_attention, after["pruned"])
    torch.testing.assert_close(second.targets, task.targets)
    assert all(name.startswith("self_attn.") for name in first.masks)
    assert all(name.startswith("mlp.") for name in second.masks)
    assert first.masks | second.masks == task.masks
    assert "input_layernorm.weight" in first.only
    assert "post_attention_layernorm.weight" in second.only
    assert first.only | second.only == before.keys()
    for name, parameter in task.block.named_parameters():  # each once
        torch.testing.assert_close(parameter, before[name] * 1.1)
    assert result.losses == [1.0, 1.0]
    assert result.error_after == 4.0
    assert result.error_before == pytest.approx(whole.item())
    assert "forward" not in task.block.mlp.__dict__
    assert not any(p.requires_grad for p in task.block.parameters())


@pytest.mark.parametrize("family", ["gpt2", "gpt-neox", "gemma2", "mixtral", "qwen2-moe"])
def test_any_family_with_halves(family):
    task, _ = task_of(family, "sparse-stream")
    settings = EBFTConfig.of(batch_size=3, epochs=4, lr=3e-3, weight_decay=0.0)
    result = HalfByHalf(settings, CPU, BlockReconstructor(settings, CPU)).recover(task)
    assert result.error_after < 0.97 * result.error_before
    assert len(result.losses) == 8
    assert not result.notes
    for name, mask in task.masks.items():
        assert torch.count_nonzero(task.block.get_parameter(name)[~mask.dense()]) == 0


@pytest.mark.parametrize("streams", ["host", "disk"])
def test_a_run(streams, short_run, silent, tmp_path):
    """With the closed form before it, samples held out, and targets of the dense stream; twice the same."""
    given = {"unit": "halves", "recover": "layerwise+ebft", "target": "dense-stream", "epochs": 2, "samples": 8}
    given |= {"streams": streams, "holdout": 0.2, "optimizer": "sign"}
    results = [run_ebft(config=EBFTConfig.of(**short_run(name, **given)), reporter=silent) for name in ("one", "two")]
    assert_same(tmp_path / "one", tmp_path / "two")
    for line in results[0].blocks:
        assert line["loss_after"] < line["loss_before"]
        assert line["relative_held_out_after"] < line["relative_held_out_before"]
    for name, mask in load_masks(tmp_path / "one" / "masks.safetensors").items():
        assert torch.count_nonzero(results[0].model.get_parameter(name)[~mask.dense()]) == 0


def test_what_it_needs(short_run, config, tokenizer, silent):
    with pytest.raises(EBFTError, match="--unit halves: the matrices of OPTDecoderLayer are in self_attn, fc1, fc2"):
        run_ebft(random_model("opt"), config(unit="halves"), tokenizer=tokenizer, reporter=silent)
    for given in ({"compile": True}, {"recompute": "halves"}):
        with pytest.raises(EBFTError, match=r"--(unit|recompute) halves .*expected --(unit|recompute)"):
            EBFTConfig.of(unit="halves", **given)
    plans = [make_plan(EBFTConfig.of(**short_run(unit=unit, eval=""))) for unit in ("block", "halves")]
    assert plans[1].host["streams"] == 1.5 * plans[0].host["streams"]
