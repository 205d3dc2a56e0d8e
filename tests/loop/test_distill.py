"""Whole-model distillation against a plain loop over the model's own forward, in float64 where it can be."""

import dataclasses

import pytest
import torch
from conftest import random_model
from test_whole_model import task_of
from torch.nn import functional as F

from ebft import EBFTConfig
from ebft.distributed import Ranks
from ebft.model.decoder import Decoder
from ebft.recovery.distill import Distillation
from ebft.recovery.distill.objective import losses_and_gradient_, losses_of
from ebft.recovery.distill.predictions import Predictions, likeliest_of
from ebft.recovery.distill.stack import Stack
from ebft_kernels import MaskedAdamW

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


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", ["llama-gqa", "gpt2", "mixtral", "gemma2"])
def test_a_step_is_that_of_a_plain_loop(family, recompute):
    """The same weights after three steps as with the model's own forward, autograd, and AdamW on masked gradients."""
    task, decoder = task_of(family)
    teacher = Decoder(random_model(family), CPU)
    predictions = Predictions.of(teacher, task.tokens, 8, task.store, Ranks())
    blocks = [decoder.working_block(i, task.saved(i)) for i in range(len(decoder))]
    optimizers = []
    for name, block in zip(decoder.names, blocks, strict=True):
        weights = {f"{name}.{n}": p.requires_grad_() for n, p in block.named_parameters()}
        masks = {weights[n]: mask for n, mask in task.masks.items() if n in weights}
        optimizers.append(MaskedAdamW(weights.values(), lr=1.0, eps=1e-4, weight_decay=0.0, masks=masks))
        optimizers[-1].param_groups[0]["scale"] = 1.0
    stack = Stack(decoder, blocks, optimizers, task.tokens, predictions, 2, Ranks(), 0.0, recompute)

    reference, _ = task_of(family)
    model = reference.model
    tuned = {
        f"{name}.{n}": p.requires_grad_()
        for name, block in reference.blocks.items()
        for n, p in block.named_parameters()
    }
    plain = torch.optim.AdamW(
        tuned.values(), lr=1e-3, eps=1e-4, weight_decay=0.0
    )  # eps: above rounding's noise in gradients that are 0
    batches = torch.tensor([[0, 1, 2, 3], [4, 5, 0, 1], [2, 3, 4, 5]])
    with stack.in_place():
        for batch in batches:
            losses = stack.step(batch, 1e-3, 0.25)
            ids = task.tokens[batch]
            logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
            known = (
                predictions.tokens[batch].flatten(0, 1).long(),
                predictions.logarithms[batch].flatten(0, 1).float(),
            )
            kl, ce = plain_losses(logits, *known, ids[:, 1:].flatten())
            ((0.75 * kl + 0.25 * ce) / len(logits)).backward()
            torch.testing.assert_close(
                losses, torch.stack([kl, ce]).detach().double() / len(logits), rtol=1e-4, atol=1e-5
            )
            for name, mask in reference.masks.items():
                if tuned[name].grad is not None:
                    mask.zero_pruned_(tuned[name].grad)
            plain.step()
            plain.zero_grad()
    for name, block in zip(decoder.names, blocks, strict=True):
        for of_block, ours in block.named_parameters():
            full = f"{name}.{of_block}"
            torch.testing.assert_close(ours.detach(), tuned[full].detach(), rtol=1e-3, atol=3e-5, msg=full)
            if full in task.masks:
                assert not ours[~task.masks[full].dense()].any()


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
