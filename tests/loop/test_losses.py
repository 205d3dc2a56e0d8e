"""What is minimised: each loss and its gradient against the formula written down in float64, and in a run."""

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebft import BlockReconstructor, EBFTConfig
from ebft.distributed import Ranks
from ebft.recovery.ebft.objective import Objective, measured_by_token
from ebft.recovery.samples import Energies, Errors, Split
from ebft_kernels import PackedMask

CPU = torch.device("cpu")
CASES = [("channel", "none"), ("cosine", "none"), ("mse", "norm"), ("channel", "norm"), ("cosine", "norm")]


def samples():
    """X and Y (samples, seqlen, width) with a channel and a token that are large, and ones that do nothing."""
    torch.manual_seed(0)
    x = torch.randn(6, 5, 8, dtype=torch.float64)
    y = x + 0.3 * torch.randn_like(x)
    y[..., 2] += 4 * torch.randn(6, 5, dtype=torch.float64)
    y[..., 5] = x[..., 5]
    y[:, 0] *= 50
    y[1, 3] = x[1, 3]
    return x, y


def floored(energies):
    """Energies, none of them less than a tenth of the geometric mean of those that are not 0."""
    logs = [math.log(e) for e in energies.tolist() if e > 0]
    return [max(e, 0.1 * math.exp(sum(logs) / len(logs))) for e in energies.tolist()]


def by_hand(loss, token_weights, x, y, output, of):
    """The documented formula, on ``output``; weights from the samples ``of``."""
    branch = (y - x)[of].flatten(0, 1)
    energies = floored(branch.square().mean(0))
    total = sum(1 / e for e in energies)
    channels = [len(energies) / e / total if loss == "channel" else 1.0 for e in energies]
    per_token = floored(branch.square().mean(1))
    floor, usual = min(per_token), len(per_token) / sum(1 / e for e in per_token)
    size = y[of].square().mean(-1).log().mean().exp() if loss == "cosine" else 0.0
    losses = []
    for f, wanted, given in zip(output.flatten(0, 1), y.flatten(0, 1), x.flatten(0, 1), strict=True):
        value = sum(c * (a - b) ** 2 for c, a, b in zip(channels, f, wanted, strict=True)) / len(f)
        value = value + 2 * size * (1 - f @ wanted / (f.norm() * wanted.norm()))
        energy = max(float((wanted - given).square().mean()), floor)
        losses.append(value * (usual / energy if token_weights == "norm" else 1))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(("loss", "token_weights"), CASES)
def test_it_is_the_formula(loss, token_weights):
    (x, y), settings = samples(), EBFTConfig.of(loss=loss, token_weights=token_weights)
    split = Split.of(6, 0.3, Ranks())
    made = Objective.of(settings, partial(Energies.of, Errors(x, y, split, CPU, Ranks(), at_once=4)))
    output = (y + 0.2 * torch.randn_like(y)).requires_grad_()
    value, gradient = made(output, y, x)
    wanted = by_hand(loss, token_weights, x, y, output, split.tuned)
    torch.testing.assert_close(value, wanted.detach(), rtol=1e-6, atol=0)
    (by_autograd,) = torch.autograd.grad(wanted, output)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-5, atol=1e-9)
    parts = [made(output[rows], y[rows], x[rows])[0] / 2 for rows in (slice(3), slice(3, 6))]
    torch.testing.assert_close(sum(parts), value)  # micro-batches add up


def test_a_small_error_at_right_angles_costs_as_much_in_both_terms():
    y = F.normalize(torch.randn(2, 3, 8, dtype=torch.float64), dim=-1) * 7
    errors = Errors(0 * y, y, Split.of(2, 0, Ranks()), CPU, Ranks(), at_once=2)
    made = Objective.of(EBFTConfig.of(loss="cosine"), partial(Energies.of, errors))
    aside = torch.randn_like(y)
    aside = 1e-4 * (aside - (aside * y).sum(-1, keepdim=True) * y / 49)
    square = aside.square().mean()
    torch.testing.assert_close(made(y + aside, y, 0 * y)[0], 2 * square, rtol=1e-4, atol=0)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)

    def forward(self, hidden):
        return hidden + self.down(self.up(hidden).tanh())


@pytest.mark.parametrize("holdout", [0.0, 0.25])
@pytest.mark.parametrize(("loss", "token_weights"), CASES)
def test_tuning_lowers_it_and_reports_the_plain_error(loss, token_weights, holdout):
    """With norms one token in eight is a sink, whose error is nearly all of the mean square."""
    torch.manual_seed(0)
    block, x = Block().requires_grad_(False), torch.randn(16, 8, 8)
    y = block(x)
    y[:, 0] *= 40 if token_weights == "norm" else 1
    mask = PackedMask.from_dense(torch.rand(12, 8) > 0.5)
    mask.zero_pruned_(block.up.weight)
    settings = EBFTConfig.of(
        loss=loss, token_weights=token_weights, holdout=holdout, lr=3e-3, epochs=6, batch_size=4, micro_batch=3,
        weight_decay=0.0,
    )  # fmt: skip
    pruned, errors = copy.deepcopy(block), Errors(x, y, Split.of(16, holdout, Ranks()), CPU, Ranks(), at_once=4)
    result = BlockReconstructor(settings, CPU).fit(block, x, y, masks={"up.weight": mask})
    assert torch.count_nonzero(block.up.weight[~mask.dense()]) == 0
    assert result.error_after == pytest.approx(errors.of(block, errors.split.probe))
    made = Objective.of(settings, partial(Energies.of, errors))
    first, last = (made.measured(errors, which, errors.split.tuned).loss for which in (pruned, block))
    assert last < 0.95 * first
    steps = len(errors.split.tuned) // 4
    assert sum(result.losses[:steps]) / steps == pytest.approx(first, rel=0.25)
    if token_weights == "norm":  # the others come nearer, whatever becomes of the sinks
        assert F.mse_loss(block(x)[:, 1:], y[:, 1:]) < 0.7 * F.mse_loss(pruned(x)[:, 1:], y[:, 1:])


def test_held_out_sequences_are_judged_by_each_token_s_error_over_its_size():
    """Tuning brings all tokens nearer but a few enormous ones, which are nearly all of the plain error."""
    torch.manual_seed(0)
    block, x = Block().requires_grad_(False), torch.randn(16, 8, 8)
    y, mask = block(x), PackedMask.from_dense(torch.rand(12, 8) > 0.5)
    mask.zero_pruned_(block.up.weight)
    split, settings = Split.of(16, 0.25, Ranks()), EBFTConfig.of(holdout=0.25, lr=3e-3, epochs=6, batch_size=4)
    pruned, held = copy.deepcopy(block), split.held_out
    y[held, 0] = pruned(x)[held, 0] - 100 * (y - pruned(x))[held, 0]
    errors = Errors(x, y, split, CPU, Ranks(), at_once=3)
    ratios = (pruned(x)[held].double() - y[held]).square().sum(-1) / y[held].double().square().sum(-1)
    assert measured_by_token(errors, pruned, held) == pytest.approx((errors.of(pruned, held), float(ratios.mean())))
    result = BlockReconstructor(settings, CPU).fit(block, x, y, masks={"up.weight": mask})
    assert result.held_out_after > result.held_out_before
    assert F.mse_loss(block(x)[held, 1:], y[held, 1:]) < 0.9 * F.mse_loss(pruned(x)[held, 1:], y[held, 1:])
