"""BlockReconstructor: the loop itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ebft import BlockReconstructor, EBFTConfig
from ebft.recovery.samples import batch_order
from ebft_kernels import MaskedLinear, PackedMask, dispatch
from ebft_kernels.places import Places

CPU = torch.device("cpu")


class Block(nn.Module):
    """A residual block with a norm, two matrices and a bias."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12, bias=False)

    def forward(self, hidden, gain=1.0):
        return hidden + gain * self.down(F.silu(self.up(self.norm(hidden))))


@pytest.fixture
def problem():
    torch.manual_seed(0)
    block, inputs = Block().requires_grad_(False), torch.randn(10, 6, 12)
    targets = block(inputs)
    shapes = {"up.weight": (20, 12), "down.weight": (12, 20)}
    masks = {name: PackedMask.from_dense(torch.rand(shape) > 0.5) for name, shape in shapes.items()}
    for name, mask in masks.items():
        mask.zero_pruned_(block.get_parameter(name))
    return block, inputs, targets, masks


def settings(**changes):
    return EBFTConfig.of(**{"lr": 3e-3, "epochs": 5, "batch_size": 4, "weight_decay": 0.1, "clip": 0.02, **changes})


@pytest.fixture
def walked(monkeypatch):
    """The masks through whose kept places products have walked; on any shape that was measured to be faster."""
    masks, of = [], Places.of
    everything = {dispatch.cpu_kind(): {"least_side": 1, "sparsity": {"0": 0.0}}}
    monkeypatch.setattr(dispatch, "sparse_measured", lambda: everything)
    monkeypatch.setattr(Places, "of", lambda mask: masks.append(mask) or of(mask))
    return masks


def test_tuning_that_skips_zeros_is_the_loop_of_the_paper(problem, walked):
    masks = problem[-1]
    test_it_is_the_loop_of_the_paper(problem)
    assert all(any(mask == other for other in walked) for mask in masks.values())
    assert type(problem[0].up) is nn.Linear


@pytest.mark.parametrize("changes", [{"refresh_every": 3}, {"compile": True}, {"optimizer": "adamw"}])
def test_zeros_are_not_skipped_where_pruned_weights_need_gradients(problem, walked, changes):
    block, inputs, targets, masks = problem
    skips = changes == {"optimizer": "adamw"}
    reconstructor = BlockReconstructor(settings(epochs=1, **changes), CPU)
    with reconstructor.prepared(block, masks, lambda block, hidden: block(hidden), tokens=24) as _:
        assert isinstance(block.up, MaskedLinear) is skips
    compute = BlockReconstructor(settings(epochs=1), CPU, torch.bfloat16)
    compute.fit(block, inputs, targets, masks=masks)
    assert not walked


def test_it_is_the_loop_of_the_paper(problem):
    """Against the method written down plainly: masks in the forward pass, torch's AdamW, linear decay, clipping."""
    block, inputs, targets, masks = problem
    twin = Block()
    twin.load_state_dict(block.state_dict())
    dense = {name: mask.dense().float() for name, mask in masks.items()}
    result = BlockReconstructor(settings(), CPU).fit(block, inputs, targets, masks=masks, index=3)

    groups = [
        {"params": [twin.up.weight, twin.down.weight], "weight_decay": 0.1},
        {"params": [twin.norm.weight, twin.norm.bias, twin.up.bias], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95), eps=1e-8)
    steps, losses = 5 * 3, []
    for epoch in range(5):
        for batch in batch_order(10, 0, 3, epoch).split(4):
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * (1 - len(losses) / steps)
            hidden = twin.norm(inputs[batch])
            up = F.silu(F.linear(hidden, twin.up.weight * dense["up.weight"], twin.up.bias))
            out = inputs[batch] + F.linear(up, twin.down.weight * dense["down.weight"])
            loss = F.mse_loss(out, targets[batch])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 0.02)
            optimizer.step()
            losses.append(loss.item())
    torch.testing.assert_close(torch.tensor(result.losses), torch.tensor(losses), rtol=1e-4, atol=1e-7)
    for name, parameter in block.named_parameters():
        expected = twin.get_parameter(name) * dense.get(name, 1)
        torch.testing.assert_close(parameter, expected.detach(), rtol=1e-3, atol=1e-5)
        if name in masks:
            assert torch.count_nonzero(parameter[~masks[name].dense()]) == 0
    assert result.error_after < result.error_before
    assert max(result.gradient_norms) > 0.02  # clipping had something to do
    assert result.seconds > 0
    assert not any(p.requires_grad for p in block.parameters())


def test_keyword_arguments_reach_the_block(problem):
    block, inputs, targets, masks = problem
    before = BlockReconstructor(settings(epochs=1, lr=0.0), CPU).fit(block, inputs, targets, masks=masks, gain=0.0)
    torch.testing.assert_close(before.error_before, before.error_after)
    assert before.error_before == pytest.approx(F.mse_loss(inputs[:1], targets[:1]).item())
    assert before.branch_energy == pytest.approx(before.error_before)


def test_progress_is_told(problem):
    block, inputs, targets, masks = problem
    told = []
    BlockReconstructor(settings(epochs=2), CPU).fit(
        block, inputs, targets, masks=masks, on_step=lambda done, steps: told.append((done, steps))
    )
    assert told == [(step, 6) for step in range(1, 7)]


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float16])
def test_low_precision_products_tune_float32_weights(problem, compute):
    block, inputs, targets, masks = problem
    result = BlockReconstructor(settings(epochs=20), CPU, compute).fit(block, inputs, targets, masks=masks)
    assert result.error_after < 0.8 * result.error_before
    assert {p.dtype for p in block.parameters()} == {torch.float32}


def test_clipping_comes_after_unscaling(problem):
    """float16 scales the loss by 65536; the norms that are clipped and reported are those of the unscaled gradient."""
    norms = []
    for compute in (torch.float32, torch.float16):
        block, inputs, targets, masks = problem
        twin = Block().requires_grad_(False)
        twin.load_state_dict(block.state_dict())
        reconstructor = BlockReconstructor(settings(epochs=1, batch_size=10), CPU, compute)
        result = reconstructor.fit(twin, inputs, targets, masks=masks)
        norms.append(result.gradient_norms[0])
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_the_batch_order_is_a_function_of_seed_block_and_epoch():
    orders = [tuple(batch_order(50, *key).tolist()) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    torch.manual_seed(7)
    assert tuple(batch_order(50, 0, 1, 0).tolist()) == orders[2]
