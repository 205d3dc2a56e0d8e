"""Whole-model distillation against a plain loop over the model's own forward, in float64 where it can be."""

import dataclasses
import json
import signal
from pathlib import Path

import pytest
import torch
from conftest import random_model
from faults import in_child, job
from safetensors.torch import load_file
from several import dies_after_a_checkpoint, dies_distilling, goes_on_without_trials, on_ranks
from test_whole_model import task_of
from torch.nn import functional as F

from ebft import EBFTConfig, EBFTError, run_ebft
from ebft.data.streams import Store
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.output.audit import audit
from ebft.output.folder import OutputFolder
from ebft.recovery.distill import Distillation
from ebft.recovery.distill.blocks import ROOM, Held, Streamed, where_they_fit
from ebft.recovery.distill.objective import losses_and_gradient_, losses_of
from ebft.recovery.distill.predictions import Predictions, likeliest_of
from ebft.recovery.distill.stack import Stack
from ebft_kernels import MaskedAdamW, dispatch
from ebft_kernels.places import Places

CPU = torch.device("cpu")


def plain_losses(logits, tokens, logarithms, following):
    """KL and CE summed over places, by autograd's own functions."""
    q = logits.log_softmax(-1)
    inside = q.gather(-1, tokens)
    rest = (1 - inside.exp().sum(-1, keepdim=True)).log()
    kl = (logarithms.exp() * (logarithms - torch.cat([inside, rest], -1))).sum()
    return kl, F.cross_entropy(logits, following, reduction="sum")


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("k", [1, 7, 49])
def test_the_gradient_is_that_of_the_loss(share, k):
    generator = torch.Generator().manual_seed(k)
    logits = (3 * torch.randn(6, 50, generator=generator, dtype=torch.float64)).requires_grad_()
    following = torch.randint(50, (6,), generator=generator)
    tokens, logarithms = likeliest_of(2 * torch.randn(6, 50, generator=generator, dtype=torch.float64), k)
    tokens = tokens.long()
    kl, ce = plain_losses(logits, tokens, logarithms, following)
    ((1 - share) * kl + share * ce).backward()

    losses, gradient = losses_and_gradient_(logits.detach().clone(), tokens, logarithms, following, share)

    torch.testing.assert_close(torch.stack(losses).sum(1), torch.stack([kl, ce]).detach())
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(losses_of(logits.detach(), tokens, logarithms, following), losses)


def test_all_tokens_make_the_divergence_exact():
    """With all tokens but one among the likeliest, what is left is one token: nothing is lumped together."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = torch.randn(2, 9, 30, generator=generator, dtype=torch.float64)
    tokens, logarithms = likeliest_of(theirs, 29)
    kl = losses_of(ours, tokens.long(), logarithms, torch.zeros(9, dtype=torch.long)).kl.sum()
    exact = F.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(kl, exact)


def test_predictions_are_the_models_own(monkeypatch):
    """Whatever is at hand together: few places, few samples."""
    teacher = Decoder(random_model("llama-gqa"), CPU)
    task, _ = task_of("llama-gqa")
    whole = Predictions.of(teacher, task.tokens, 5, task.store, Ranks())
    logarithms = teacher.model(task.tokens).logits[:, :-1].log_softmax(-1)
    values, _ = logarithms.topk(5)
    torch.testing.assert_close(whole.logarithms[..., :-1].float(), values, rtol=1e-3, atol=1e-3)
    rest = (1 - values.exp().sum(-1)).log()
    torch.testing.assert_close(whole.logarithms[..., -1].float(), rest, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr("ebft.recovery.distill.predictions.LOGITS_AT_ONCE", 512 * 3)
    monkeypatch.setattr("ebft.recovery.distill.predictions.TOKENS_AT_ONCE", 45)
    parts = Predictions.of(teacher, task.tokens, 5, task.store, Ranks())
    torch.testing.assert_close(parts.logarithms, whole.logarithms)
    two = [Predictions.of(teacher, task.tokens[half], 5, task.store, Ranks()) for half in (slice(3), slice(3, 6))]
    torch.testing.assert_close(torch.cat([part.logarithms for part in two]), whole.logarithms)


def stack_of(task, predictions, kind=Held, *, recompute=False, clip=0.0, lr_scale=1.0, **states) -> Stack:
    """All blocks of a task's model with their optimizers, every parameter tuned, two samples at once."""
    decoder = task.decoder

    def made():
        for index, name in enumerate(decoder.names):
            block = decoder.working_block(index, task.saved(index))
            weights = {f"{name}.{n}": p.requires_grad_() for n, p in block.named_parameters()}
            masks = {weights[n]: mask for n, mask in task.masks.items() if n in weights}
            settings = {"eps": 1e-4, **states}  # above rounding's noise in gradients that are 0
            optimizer = MaskedAdamW(weights.values(), weight_decay=0.0, masks=masks, **settings)
            optimizer.param_groups[0]["scale"] = 1.0
            yield block, optimizer

    blocks = Streamed(made(), CPU) if kind is Streamed else Held(made())
    return Stack(decoder, blocks, task.tokens, predictions, 2, Ranks(), clip, recompute, task.store)


def stepped_plainly(task, predictions, batches, share) -> tuple[dict, list]:
    """Weights and losses of the model's own forward, autograd, and AdamW on masked gradients."""
    model = task.model
    tuned = {
        f"{name}.{n}": p.requires_grad_() for name, block in task.blocks.items() for n, p in block.named_parameters()
    }
    plain, losses = torch.optim.AdamW(tuned.values(), lr=1e-3, eps=1e-4, weight_decay=0.0), []
    for batch in batches:
        ids = task.tokens[batch]
        logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        known = (predictions.tokens[batch].flatten(0, 1).long(), predictions.logarithms[batch].flatten(0, 1).float())
        kl, ce = plain_losses(logits, *known, ids[:, 1:].flatten())
        (((1 - share) * kl + share * ce) / len(logits)).backward()
        losses.append(torch.stack([kl, ce]).detach().double() / len(logits))
        for name, mask in task.masks.items():
            if tuned[name].grad is not None:
                mask.zero_pruned_(tuned[name].grad)
        plain.step()
        plain.zero_grad()
    return tuned, losses


def weights_of(stack) -> dict:
    """By their full names."""
    named = zip(stack.decoder.names, stack.blocks, strict=True)
    return {f"{name}.{n}": p.detach() for name, block in named for n, p in block.named_parameters()}


BATCHES = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mixtral", "gemma2"])
def test_a_step_is_that_of_a_plain_loop(family, recompute):
    """The same losses in three steps, and weights after them."""
    task, _ = task_of(family)
    predictions = Predictions.of(Decoder(random_model(family), CPU), task.tokens, 8, task.store, Ranks())
    stack = stack_of(task, predictions, recompute=recompute)
    with stack.in_place():
        losses = [stack.step(batch, 1e-3, 0.25) for batch in BATCHES]
    expected, plain = stepped_plainly(task_of(family)[0], predictions, BATCHES, 0.25)
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-5)
    for name, ours in weights_of(stack).items():
        torch.testing.assert_close(ours, expected[name].detach(), rtol=1e-3, atol=3e-5, msg=name)
        if name in task.masks:
            assert not ours[~task.masks[name].dense()].any()


@pytest.fixture
def float64(monkeypatch):
    """What is in float32 by default, and what we make float32, is in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("kind", [Held, Streamed])
@pytest.mark.usefixtures("float64")
def test_in_float64_a_step_is_that_of_a_plain_loop(kind):
    """To rounding; of a model whose own code has no part in float32."""
    task, _ = task_of("gpt2", store=Store(CPU, dtype=torch.float64))
    half = Predictions.of(Decoder(random_model("gpt2"), CPU), task.tokens, 8, task.store, Ranks())
    predictions = Predictions(half.tokens, half.logarithms.double().log_softmax(-1))  # rounded, they do not sum to 1
    stack = stack_of(task, predictions, kind)
    with stack.in_place():
        losses = [stack.step(batch, 1e-3, 0.25) for batch in BATCHES]
    expected, plain = stepped_plainly(task_of("gpt2")[0], predictions, BATCHES, 0.25)
    torch.testing.assert_close(losses, plain, rtol=1e-10, atol=1e-10)
    for name, ours in weights_of(stack).items():
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, expected[name].detach(), rtol=1e-10, atol=1e-10, msg=name)


STATES = [{}, {"compact": True}, {"moments": "bf16"}, {"moments": "int8", "compact": True}]


@pytest.mark.parametrize(("states", "kind"), [*((states, "host") for states in STATES), ({}, "disk")], ids=str)
def test_streamed_blocks_take_the_same_steps(states, kind, tmp_path):
    """Bit for bit those of blocks that are held, with hidden states anywhere; batches of several sizes."""
    batches = [torch.tensor(numbers) for numbers in ([0, 1, 2], [3, 4, 5, 0], [5], [2, 4, 1, 0])]
    predictions = Predictions.of(
        Decoder(random_model("llama-gqa"), CPU), task_of("llama-gqa")[0].tokens, 8, Store(CPU), Ranks()
    )
    found = []
    for placed in (Held, Streamed):
        with OutputFolder(str(tmp_path / placed.__name__), overwrite=False) as output:
            task, _ = task_of("llama-gqa", store=Store(CPU, kind, output=output))
            stack = stack_of(task, predictions, placed, recompute=True, clip=0.5, **states)
            with stack.in_place():
                losses = [stack.step(batch, 1e-2, 0.25) for batch in batches]
                losses.append(stack.losses(torch.tensor([3, 1, 0])))
            assert not any(output.streams.glob("*"))
        moments = [state for optimizer in stack.optimizers for state in optimizer.state_dict()["state"].values()]
        found.append((losses, weights_of(stack), moments))
    before = weights_of(stack_of(task_of("llama-gqa")[0], predictions))
    assert not any(torch.equal(weight, before[name]) for name, weight in found[1][1].items())
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_where_blocks_fit(monkeypatch):
    """A GPU is only pretended: what is free there, or in the budget, decides; a CPU is the host."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 2000))
    gpu, least, most = torch.device("cuda"), int(ROOM * 1000), int(ROOM * 800)
    assert [where_they_fit("auto", gpu, needed, None) for needed in (least, least + 1)] == ["device", "host"]
    assert [where_they_fit("auto", gpu, needed, 800) for needed in (most, most + 1)] == ["device", "host"]
    assert where_they_fit("auto", gpu, least, 5000) == "device"
    assert where_they_fit("device", gpu, 10**9, None) == "device"
    assert where_they_fit("host", gpu, 1, None) == where_they_fit("host", CPU, 1, None) == "host"
    assert where_they_fit("auto", CPU, 10**9, None) == "device"


def test_streamed_blocks_are_away_but_for_their_turn():
    """What is on the device is a copy, of one block and the next; its changes and states come home."""
    task, _ = task_of("llama-gqa")
    predictions = Predictions.of(Decoder(random_model("llama-gqa"), CPU), task.tokens, 8, task.store, Ranks())
    stack = stack_of(task, predictions, Streamed)
    homes = [[p.data_ptr() for p in block.parameters()] for block in stack.blocks]
    here = []
    for index, _ in stack.blocks.in_turn([2, 0]):
        here.append([p.data_ptr() for p in list(stack.blocks)[index].parameters()])
        assert not set(here[-1]) & set(homes[index])
        others = (list(stack.blocks)[other] for other in range(3) if other != index)
        assert [[p.data_ptr() for p in block.parameters()] for block in others] == [
            home for other, home in enumerate(homes) if other != index
        ]
    assert [[p.data_ptr() for p in block.parameters()] for block in stack.blocks] == homes
    states = []
    with stack.in_place():
        for batch in BATCHES:
            stack.step(batch, 1e-3, 0.25)
            assert homes == [[p.data_ptr() for p in block.parameters()] for block in stack.blocks]
            states.append([state["exp_avg"].data_ptr() for o in stack.optimizers for state in o.state.values()])
    assert states[0] == states[1] == states[2]


def test_distillation_brings_a_model_nearer_to_the_dense_one():
    task, decoder = task_of("llama-gqa")
    task = dataclasses.replace(task, teacher=Decoder(random_model("llama-gqa"), CPU))
    config = EBFTConfig.of(recover="distill", batch_size=2, distill_epochs=20, distill_text=0.0)
    result = Distillation(config).recover(task)
    assert result.held_out_after < 0.9 * result.held_out_before
    for name, block in zip(decoder.names, result.blocks, strict=True):
        for of_block, weight in block.named_parameters():
            assert not weight.requires_grad
            if mask := task.masks.get(f"{name}.{of_block}"):
                assert not weight[~mask.dense()].any()


# --- runs -------------------------------------------------------------------------------------------------------------


def summary_of(folder) -> dict:
    return json.loads((folder / "ebft_summary.json").read_text())


@pytest.mark.parametrize(
    ("killed", "then", "place"),
    [
        (dies_distilling, job, {"distill_blocks": "host", "streams": "disk"}),
        (dies_after_a_checkpoint, goes_on_without_trials, {"distill_blocks": "host", "moments": "int8"}),
        (dies_after_a_checkpoint, goes_on_without_trials, {"distill_blocks": "device", "distill_lr": "auto"}),
    ],
    ids=["in its trials", "in its second epoch, streamed", "in its second epoch"],
)
def test_a_run_killed_while_it_distils_goes_on(killed, then, place, short_run, tmp_path):
    """To the same bits; from the last epoch that was kept."""
    given = {"recover": "ebft+distill", "samples": 8, "distill_epochs": 3, **place}
    assert in_child(job, short_run("whole", **given)) == 0
    settings = short_run("out", **given)
    assert in_child(killed, settings) == -signal.SIGKILL
    assert (tmp_path / "out.partial").exists()
    assert in_child(then, settings | {"resume": True}) == 0
    assert not list((tmp_path / "out").glob("**/*begun*"))
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    one, other = (summary_of(tmp_path / name)["whole_model"]["distill"] for name in ("out", "whole"))
    times = ("seconds", "peak_memory_bytes")
    assert [one.pop(name) > 0 for name in times] == [other.pop(name) > 0 for name in times]
    assert one == other


@pytest.mark.parametrize("place", ["host", "device"])
def test_a_run_and_its_ranks(place, short_run, silent, tiny, tmp_path):
    """Two ranks do to rounding what one process does, whose report says what it came to."""
    given = {"recover": "ebft+distill", "samples": 6, "batch_size": 2, "holdout": 0.2, "distill_blocks": place}
    given |= {"distill_text": 0.5}
    result = run_ebft(config=EBFTConfig.preset("demo", **short_run("one", **given)), reporter=silent)
    entry = result.summary["whole_model"]["distill"]
    assert entry["held_out_after"] < entry["held_out_before"]
    divergence, entropy = entry["held_out_parts"].values()
    assert [(kl + ce) / 2 for kl, ce in zip(divergence, entropy, strict=True)] == pytest.approx(
        [entry["held_out_before"], entry["held_out_after"]]
    )
    page, card = ((result.output / name).read_text() for name in ("report.html", "README.md"))
    assert "Distillation loss (distill)" in page
    for text in (page, card):
        assert f"cross-entropy of the text {entropy[0]:.3f} before and {entropy[1]:.3f} after" in text
    assert audit(str(result.output), str(tiny / "model")).faults == []

    assert on_ranks(2, job, short_run("two", **given)) == [0, 0]
    shared = summary_of(tmp_path / "two")["whole_model"]["distill"]
    assert shared["losses"] == pytest.approx(entry["losses"], rel=1e-4)
    for part, figures in entry["held_out_parts"].items():
        assert shared["held_out_parts"][part] == pytest.approx(figures, rel=1e-4)


@pytest.mark.parametrize("recovery", ["distill", "full"])
def test_zeros_are_skipped_and_leave_the_result_as_it_is(recovery, short_run, silent, monkeypatch):
    """Where products were measured to be faster without them; to rounding."""
    given = {"recover": recovery, "samples": 4, "seqlen": 32}
    given |= {"distill_lr": 1e-3, "distill_text": 0.0} if recovery == "distill" else {}
    dense = run_ebft(config=EBFTConfig.preset("demo", **short_run("dense", **given)), reporter=silent)
    everything = {dispatch.cpu_kind(): {"least_side": 1, "sparsity": {"0": 0.0}}}
    monkeypatch.setattr(dispatch, "sparse_measured", lambda: everything)
    made, of = [], Places.of
    monkeypatch.setattr(Places, "of", lambda mask: made.append(mask) or of(mask))
    sparse = run_ebft(config=EBFTConfig.preset("demo", **short_run("sparse", **given)), reporter=silent)
    assert len(made) == len(sparse.masks)
    ours, theirs = (run.summary["whole_model"][recovery]["losses"] for run in (sparse, dense))
    assert ours == pytest.approx(theirs, rel=1e-4)
    assert audit(str(sparse.output)).faults == []


def test_a_host_that_is_too_small_is_said_before_any_work(short_run, silent, monkeypatch):
    monkeypatch.setattr("ebft.recovery.distill.os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1)
    settings = short_run(recover="ebft+distill")
    with pytest.raises(EBFTError, match="GiB of the host's memory, which has 0; expected a --recover without distill"):
        run_ebft(config=EBFTConfig.preset("demo", **settings), reporter=silent)
    assert not Path(settings["output"]).exists()
