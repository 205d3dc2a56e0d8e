"""Recoveries of the whole model after the walk, against plain loops; their masks, files and resumption."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from faults import job
from safetensors.torch import load_file
from several import on_ranks
from torch.func import functional_call
from torch.nn import functional as F

import ebft.pipeline.run
import ebft.recovery.allowance
import ebft.recovery.lora
import ebft_kernels
from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.data.streams import Store
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.model.matrices import router_paths
from ebft.output.audit import audit
from ebft.plan.planner import make_plan
from ebft.recovery.full import FullFineTuning
from ebft.recovery.lora import LoRA
from ebft.recovery.lora.adapters import _add_adapters
from ebft.recovery.samples import batch_order
from ebft.recovery.whole_model import WholeTask
from ebft_kernels import MaskedAdamW, PackedMask

CPU = torch.device("cpu")
SETTINGS = {"batch_size": 4, "lm_epochs": 3, "lm_lr": 1e-2, "clip": 0.5}
OWN = {"lora": {"lora_alpha": 24.0, "lora_rank": 3}, "full": {}}


def recovery_of(kind, **changes):
    """A ``LoRA`` or ``FullFineTuning``."""
    return kind(EBFTConfig.of(recover=kind.name, **{**SETTINGS, **OWN[kind.name], **changes}))


def task_of(family: str, **changes) -> tuple[WholeTask, Decoder]:
    """Half of a random model's weights pruned, row by row at random, and six random sequences."""
    decoder = Decoder(random_model(family), CPU)
    model, masks = decoder.model, {}
    generator = torch.Generator().manual_seed(1)
    for name, matrices in zip(decoder.names, decoder.matrices, strict=True):
        for matrix in matrices:
            weight = model.get_submodule(name).get_parameter(matrix.name)
            mask = PackedMask.from_dense(torch.rand(weight.shape, generator=generator) > 0.5)
            mask.zero_pruned_(weight.data)
            masks[f"{name}.{matrix.name}"] = mask
    task = WholeTask(
        decoder=decoder,
        teacher=decoder,
        saved=lambda index: {
            f"{decoder.names[index]}.{n}": p for n, p in decoder.stored_block(index).named_parameters()
        },
        masks=masks,
        tokens=torch.randint(512, (6, 20), generator=generator),
        store=Store(CPU),
        ranks=Ranks(),
        on_step=lambda share: None,
    )
    return dataclasses.replace(task, **changes), decoder


def tuned_plainly(task: WholeTask, weights: dict, trained: list, effective, decays=()) -> list[float]:
    """The loop as anybody would write it, in float64 but for the model's own float32 parts; tunes ``trained``."""
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in trained if id(p) not in decays]},
            {"params": list(decays.values()), "weight_decay": 0.1},
        ]
        if decays
        else trained,
        betas=(0.9, 0.95),
        weight_decay=0.0,
    )
    losses, steps = [], 3 * 2
    for epoch in range(3):
        for batch in batch_order(6, 0, -1, epoch).split(4):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 * (1 - len(losses) / steps)
            ids = task.tokens[batch]
            logits = functional_call(task.model, {**weights, **effective()}, (ids,), {"use_cache": False}).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            masked = [p for p in trained if hasattr(p, "kept")]
            for p in masked:
                p.grad *= p.kept
            torch.nn.utils.clip_grad_norm_(trained, 0.5)
            optimizer.step()
            for p in masked:
                p.data *= p.kept
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


@pytest.mark.parametrize("masked", [True, False], ids=["masked", "plain"])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2"])
def test_lora_is_a_plain_loop(family, masked):
    """The weights of both merges, from the adapters that peft begins with."""
    task, _ = task_of(family)
    reference, _ = task_of(family)
    reference.model.double()
    before = {name: p.detach().clone() for name, p in reference.model.named_parameters()}
    kept = {name: mask.dense() for name, mask in task.masks.items()}
    adapted = task_of(family)[0].model
    torch.manual_seed(0)
    paths = [name.removesuffix(".weight") for name in kept]
    layers = _add_adapters(adapted, paths, recovery_of(LoRA).settings)
    pairs = {
        f"{path}.weight": [
            part["default"].weight.detach().double().requires_grad_() for part in (layer.lora_B, layer.lora_A)
        ]
        for path, layer in layers.items()
    }

    def product(name):
        b, a = pairs[name]
        return 24 / 3 * (b @ a if family != "gpt2" else (b @ a).T)

    losses = tuned_plainly(
        reference,
        before,
        [part for pair in pairs.values() for part in pair],
        lambda: {name: before[name] + (product(name) * kept[name] if masked else product(name)) for name in kept},
    )
    result = recovery_of(LoRA, lora_masked=masked).recover(task)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    ours = dict(task.model.named_parameters())
    assert ours.keys() == before.keys()  # no layer of peft's is left
    for name in before:
        if name not in kept:
            assert torch.equal(ours[name].double(), before[name])
            continue
        delta = product(name).detach()
        assert delta.abs().max() > 1e-2
        assert torch.count_nonzero(ours[name][~kept[name]]) == 0
        torch.testing.assert_close(ours[name].double(), before[name] + delta * kept[name], rtol=0, atol=2e-3)
        plain = ours[name] + result.left_out[name]()
        torch.testing.assert_close(plain.double(), before[name] + delta, rtol=0, atol=2e-3)


def test_full_is_a_plain_loop():
    task, decoder = task_of("llama-gqa")
    reference, _ = task_of("llama-gqa")
    before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    weights = {name: p.detach().clone().double() for name, p in reference.model.named_parameters()}
    reference.model.double()
    trained = {n: w.requires_grad_() for n, w in weights.items() if n.startswith(tuple(decoder.names))}
    for name, mask in task.masks.items():
        trained[name].kept = mask.dense()
    decays = {id(trained[name]): trained[name] for name in task.masks}
    losses = tuned_plainly(reference, weights, list(trained.values()), dict, decays)
    result = recovery_of(FullFineTuning).recover(task)
    assert result.losses == pytest.approx(losses, rel=1e-4)
    assert result.left_out == {}
    for name, weight in task.model.named_parameters():
        assert not weight.requires_grad
        if name not in trained:
            assert torch.equal(weight, before[name])
            continue
        assert not torch.equal(weight, before[name])
        if name in task.masks:
            assert torch.count_nonzero(weight[~task.masks[name].dense()]) == 0
        close = (weight.double() - trained[name]).abs() < 2e-3  # AdamW's first steps turn on a gradient's sign
        assert close.double().mean() > 0.999


@pytest.mark.parametrize("recovery", [LoRA, FullFineTuning])
def test_parts_of_a_batch_and_recomputation_change_nothing(recovery):
    models = []
    for changes in ({}, {"micro_batch": 3, "recompute": "block"}):
        task, _ = task_of("llama-gqa")
        result = recovery_of(recovery, holdout=0.3, **changes).recover(task)
        models.append([result.losses, result.held_out_before, result.held_out_after])
    assert len(models[0][0]) == 3
    assert models[0][0] == pytest.approx(models[1][0], rel=1e-3)
    assert models[0][1:] == pytest.approx(models[1][1:], rel=1e-3)


def test_dropout_is_recomputed_alike():
    losses = []
    for recompute in ("none", "block"):
        task, _ = task_of("llama-gqa")
        lora = recovery_of(LoRA, lora_dropout=0.5, lora_masked=False, recompute=recompute)
        losses.append(lora.recover(task).losses)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    plain = recovery_of(LoRA, lora_masked=False).recover(task_of("llama-gqa")[0]).losses
    assert plain != pytest.approx(losses[0], rel=1e-4)


def test_by_time(monkeypatch):
    """A clock that is a second later every time: after 4 seconds it ends, and the rate has fallen by a quarter each."""
    now, rates = iter(range(100)), []
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(ebft.recovery.allowance, "time", clock)

    class Optimizer(MaskedAdamW):
        def step(self, *arguments):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*arguments)

    monkeypatch.setattr(ebft_kernels, "MaskedAdamW", Optimizer)
    result = recovery_of(FullFineTuning, lm_epochs=1000, lm_seconds=4).recover(task_of("llama")[0])
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert len(result.losses) == 4


@pytest.mark.parametrize("recovery", [LoRA, FullFineTuning])
def test_a_loss_that_is_no_number(recovery):
    task, _ = task_of("llama")
    task.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(EBFTError, match=r"no longer a number with --lm-lr 0\.01; expected a smaller one"):
        recovery_of(recovery).recover(task)


# --- runs -------------------------------------------------------------------------------------------------------------

LM = {"lm_lr": 3e-3, "lm_epochs": 4, "samples": 16, "holdout": 0.25, "eval": "builtin"}


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama-gqa", {"recover": "lora", "prune": "magnitude"}),
        ("llama-gqa", {"recover": "ebft+lora+full", "pattern": "2:4"}),
        ("gpt2", {"recover": "lora", "lora_masked": False}),
        ("qwen3-moe", {"recover": "layerwise+full"}),
        ("qwen3-moe", {"recover": "lora"}),
    ],
    ids=lambda given: given if isinstance(given, str) else given["recover"],
)
def test_runs(family, changes, config, silent, tokenizer, tmp_path):
    model, dense = random_model(family), random_model(family)
    dense.save_pretrained(tmp_path / "dense")
    result = run_ebft(model, config(**LM, **changes), tokenizer=tokenizer, reporter=silent)
    found = audit(str(result.output), str(tmp_path / "dense"))
    assert found.faults == []
    summary = json.loads((result.output / "ebft_summary.json").read_text())
    page, card = ((result.output / name).read_text() for name in ("report.html", "README.md"))
    for name in [name for name in ("lora", "full") if name in changes["recover"]]:
        entry = summary["whole_model"][name]
        assert len(entry["losses"]) == 4 * 3
        assert sum(entry["losses"][-3:]) < sum(entry["losses"][:3])
        assert name != "full" or "lora" in summary["whole_model"] or entry["held_out_after"] < entry["held_out_before"]
        assert 0 < entry["seconds"] <= summary["stage_seconds"][name]
        assert entry["peak_memory_bytes"] >= max(block["peak_memory_bytes"] for block in result.blocks)
        assert f"Language-model loss ({name})" in page
        assert f"loss {entry['held_out_before']:.3f} before and {entry['held_out_after']:.3f} after" in page
        assert f"{name}, on held-out sequences, nats a token: loss" in card
    if "lora" in changes["recover"]:
        plain = summary["whole_model"]["lora"]["plain_merge"]
        linear = sum(mask.numel() for mask in result.masks.values() if len(mask.shape) == 2)
        fused = sum(mask.numel() for mask in result.masks.values()) - linear
        assert plain["sparsity"] == pytest.approx(summary["sparsity"] * fused / (fused + linear), abs=0.02)
        assert plain["perplexity"]["builtin"] != summary["perplexity"]["builtin"]["recovered"]
        assert "plain merge" in card
        assert "plain merge" in page
        assert bool(summary["whole_model"]["lora"]["notes"]) == (fused > 0)
    for name, parameter in model.named_parameters():  # the model in memory is the one that was saved
        assert torch.equal(parameter, result.model.get_parameter(name))
    blocks = Decoder(model, CPU)
    routers = {f"{n}.{r}.weight" for n in blocks.names for r in router_paths(model.get_submodule(n))}
    for name in routers & dict(model.named_parameters()).keys():
        assert torch.equal(model.get_parameter(name), dense.get_parameter(name))


def test_a_resumed_run_does_not_tune_again(short_run, silent, tmp_path, monkeypatch):
    given = {"recover": "lora+full", "lm_lr": 1e-3}
    whole = run_ebft(config=EBFTConfig.of(**short_run("whole", **given)), reporter=silent)

    def stop(*_):
        raise KeyboardInterrupt

    settings = short_run("out", **given)
    with monkeypatch.context() as broken:
        broken.setattr(FullFineTuning, "recover", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ebft(config=EBFTConfig.of(**settings), reporter=silent)
    with monkeypatch.context() as broken:
        broken.setattr(LoRA, "recover", stop)
        broken.setattr(ebft.pipeline.run, "_save", stop)
        with pytest.raises(KeyboardInterrupt):
            run_ebft(config=EBFTConfig.of(**settings, resume=True), reporter=silent)
    with monkeypatch.context() as broken:
        broken.setattr(LoRA, "recover", stop)
        broken.setattr(FullFineTuning, "recover", stop)
        resumed = run_ebft(config=EBFTConfig.of(**settings, resume=True), reporter=silent)
    assert resumed.summary["whole_model"]["lora"]["losses"] == whole.summary["whole_model"]["lora"]["losses"]
    assert resumed.summary["perplexity"] == whole.summary["perplexity"]
    ours, theirs = (load_file(result.output / "model.safetensors") for result in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_ranks_share_a_batch(short_run, silent, tmp_path):
    given = {"recover": "lora+full", "samples": 5, "batch_size": 3, "lm_lr": 1e-3, "holdout": 0.2, "lm_seconds": 1e4}
    run_ebft(config=EBFTConfig.preset("demo", **short_run("one", **given)), reporter=silent)
    assert on_ranks(2, job, short_run("two", **given)) == [0, 0]
    one, two = (json.loads((tmp_path / name / "ebft_summary.json").read_text()) for name in ("one", "two"))
    for name in ("lora", "full"):
        ours, theirs = (summary["whole_model"][name] for summary in (two, one))
        assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-4)
        assert ours["held_out_after"] == pytest.approx(theirs["held_out_after"], rel=1e-4)


def test_refused(monkeypatch, short_run):
    with pytest.raises(EBFTError, match="holds the whole model in memory, which neither --plan nor a memory budget"):
        make_plan(EBFTConfig.of(**short_run(recover="ebft+full")))
    monkeypatch.setattr(ebft.recovery.lora, "find_spec", lambda name: None)
    with pytest.raises(EBFTError, match=r"needs peft, which is not installed; expected pip install ebft\[lora\]"):
        run_ebft(config=EBFTConfig.of(**short_run(recover="lora")))
