"""What two ranks do with a replicated or sharded masked model; apart from the tests, which a child cannot import.

``python sharded.py FOLDER [CASE…]`` runs all cases, or some, on two ranks (gloo, CPU), and writes what each said to
``FOLDER/CASE.json``.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from multiplied import MultipliedLinear
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from ebft_kernels import MaskedAdamW, assert_masked, mask_linears_, masked_linear
from ebft_kernels.testing import assert_exact_zeros

WORLD, WAIT = 2, timedelta(seconds=60)
FULL = dcp_state.StateDictOptions(full_state_dict=True)
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def make(dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Widths that no number of ranks divides, and one output: the second rank holds nothing of that layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 33), nn.GELU(), nn.Linear(33, 18), nn.GELU(), nn.Linear(18, 1)).to(dtype)
    masks = {f"{n}.weight": torch.rand(model[n].weight.shape) > 0.5 for n in (0, 2, 4)}
    mask_linears_(model, masks)
    return model, masks


def plain_twin(model: nn.Sequential, masks: dict[str, Tensor]) -> nn.Sequential:
    twin = copy.deepcopy(model)
    for n in (0, 2, 4):
        twin[n].__class__, twin[n].keep = MultipliedLinear, masks[f"{n}.weight"]
    return twin


def adamw(model: nn.Module, **settings) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, **settings)


def masked_adamw(model: nn.Module, **settings) -> MaskedAdamW:
    return MaskedAdamW.for_module(model, lr=1e-2, **settings)


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, split: bool = True, clip: float = 0.0
) -> Tensor | None:
    """Each rank takes every second row (``split``), or all take all."""
    rows = slice(dist.get_rank(), None, WORLD) if split else slice(None)
    norm = None
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        dtype = next(model.parameters()).dtype
        x, y = (torch.randn(8, width, generator=generator).to(dtype)[rows] for width in (24, 1))
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        if clip:
            norm = optimizer.clip_grad_norm_(clip)
        optimizer.step()
    return norm


def alone(make_optimizer=masked_adamw, steps: int = 5, clip: float = 0.0, dtype=torch.float64):
    """What one process gives; for another optimizer than ours, the plain twin."""
    model, masks = make(dtype)
    if make_optimizer is not masked_adamw:
        model = plain_twin(model, masks)
    norm = train(model, make_optimizer(model), range(steps), split=False, clip=clip)
    return model, masks, norm


def assert_equal(state: dict[str, Tensor], expected: nn.Module, masks: dict[str, Tensor], **tolerance: float) -> None:
    for name, value in expected.state_dict().items():
        got = state[name].full_tensor() if isinstance(state[name], DTensor) else state[name]
        wanted = torch.where(masks[name], value, 0.0) if name in masks else value
        torch.testing.assert_close(got, wanted, **(tolerance or EXACT))
        if name in masks:
            assert_exact_zeros(got, masks[name], name)


def shard(model: nn.Sequential, **settings) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)


# --- cases ----------------------------------------------------------------------------------------------------------


def ddp(folder: Path) -> None:
    for make_optimizer in (masked_adamw, adamw):
        expected, masks, _ = alone(make_optimizer)
        model = nn.parallel.DistributedDataParallel(make()[0])
        train(model, make_optimizer(model), range(5))
        assert_equal(model.module.state_dict(), expected, masks)
        assert_masked(model)


def fsdp2(folder: Path) -> None:
    expected, masks, norm = alone(clip=0.5)
    model = shard(make()[0])
    optimizer = masked_adamw(model)
    torch.testing.assert_close(train(model, optimizer, range(5), clip=0.5), norm, **EXACT)
    state = model.state_dict()
    assert all(isinstance(value, DTensor) for value in state.values())
    assert_equal(state, expected, masks)
    full = dcp_state.get_model_state_dict(model, options=FULL)  # on the first rank
    if dist.get_rank() == 0:
        assert_equal(full, expected, masks)
    for name, p in model.named_parameters():
        if name in masks:
            assert_exact_zeros(optimizer.second_moment(p).full_tensor(), masks[name], name)


def fsdp2_other_layouts(folder: Path) -> None:
    """A master copy and 16-bit moments, of float32 and 16-bit parameters; a reshard policy that keeps layers whole."""
    layouts = (("fp32", "bf16", torch.float32), ("master", "fp32", torch.bfloat16), ("master", "bf16", torch.bfloat16))
    for weights, moments, dtype in layouts:

        def optimizer(model, weights=weights, moments=moments):
            return masked_adamw(model, weights=weights, moments=moments)

        whole, masks = make(dtype)
        train(whole, optimizer(whole), range(5), split=False)
        model = shard(make(dtype)[0], reshard_after_forward=False)
        train(model, optimizer(model), range(5), split=False)  # the mean of equal gradients: bit for bit the same
        assert_equal(model.state_dict(), whole, masks, rtol=0, atol=0)


def fsdp2_whoever_writes(folder: Path) -> None:
    """Another optimizer, and a write through ``.data``: forward and state dict show zeros."""
    expected, masks, _ = alone(adamw)
    model = shard(make()[0])
    train(model, adamw(model), range(5))
    for layer in (model[0], model[2]):
        layer._parameters["weight"].to_local().data.add_(1.0)
        expected.get_submodule("0" if layer is model[0] else "2").weight.data.add_(1.0)
    x = torch.ones(3, 24, dtype=torch.float64)
    torch.testing.assert_close(model(x), expected(x), **EXACT)
    assert_equal(model.state_dict(), expected, masks)


def fsdp2_refuses(folder: Path) -> None:
    model = shard(make(torch.bfloat16)[0])
    for layout in ({"weights": "stochastic"}, {"moments": "int8"}, {"compact": True}):
        with pytest.raises(ValueError, match=r"got a sharded parameter \(33, 24\) with"):
            MaskedAdamW.for_module(model, **{"weights": "master", **layout})


def make_even() -> tuple[nn.Sequential, dict[str, Tensor]]:
    """Two ranks can share the hidden features; cuts do not fall on whole words of a mask."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 34), nn.GELU(), nn.Linear(34, 1)).double()
    masks = {f"{n}.weight": torch.rand(model[n].weight.shape) > 0.5 for n in (0, 2)}
    mask_linears_(model, masks)
    return model, masks


def tensor_parallel(folder: Path) -> None:
    """Matrices cut along outputs and along inputs; with FSDP2 on a second axis, too."""
    whole, masks = make_even()
    norm = train(whole, masked_adamw(whole), range(5), split=False, clip=0.5)
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    for with_fsdp in (False, True):
        model = parallelize_module(make_even()[0], mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        if with_fsdp:
            fully_shard(model, mesh=mesh["data"])
        got = train(model, masked_adamw(model), range(5), split=False, clip=0.5)
        torch.testing.assert_close(got, norm, **EXACT)
        assert_equal(model.state_dict(), whole, masks)


def checkpoint(folder: Path) -> None:
    """DCP: saved by two ranks, read into a fresh model and optimizer, and by one process; full state dicts too."""
    expected, masks, _ = alone(steps=6)
    model = shard(make()[0])
    optimizer = masked_adamw(model)
    train(model, optimizer, range(3))
    kept = dict(zip(("model", "optimizer"), dcp_state.get_state_dict(model, optimizer), strict=True))
    dcp.save(kept, checkpoint_id=folder / "dcp")

    fresh = shard(make()[0])
    other = MaskedAdamW.for_module(fresh, lr=0.5)
    read = dict(zip(("model", "optimizer"), dcp_state.get_state_dict(fresh, other), strict=True))
    dcp.load(read, checkpoint_id=folder / "dcp")
    dcp_state.set_state_dict(fresh, other, model_state_dict=read["model"], optim_state_dict=read["optimizer"])
    train(fresh, other, range(3, 6))
    assert_equal(fresh.state_dict(), expected, masks)

    full = dcp_state.get_optimizer_state_dict(model, optimizer, options=FULL)  # on the first rank
    if dist.get_rank() == 0:
        one, _, _ = alone(steps=0)
        one.load_state_dict(dcp_state_of(folder / "dcp", one))
        single = masked_adamw(one)
        states = [full["state"][name] for name, _ in one.named_parameters()]
        assert states[0]["exp_avg"].shape == (33, 24)
        single.load_state_dict({**single.state_dict(), "state": dict(enumerate(states))})
        train(one, single, range(3, 6), split=False)
        assert_equal(one.state_dict(), expected, masks)


def dcp_state_of(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """What the checkpoint has of ``model``, read by this process alone."""
    state = {"model": {name: torch.empty_like(value) for name, value in model.state_dict().items()}}
    dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]


def whole_state_into_shards(folder: Path) -> None:
    """The state of one process's optimizer, plain AdamW's too, goes into a sharded one."""
    expected, masks, _ = alone(steps=6)
    for make_optimizer in (masked_adamw, adamw):
        one, _ = make()
        before = make_optimizer(one)
        train(one, before, range(3), split=False)
        model = shard(copy.deepcopy(one))
        optimizer = MaskedAdamW.for_module(model)
        optimizer.load_state_dict(copy.deepcopy(before.state_dict()))
        train(model, optimizer, range(3, 6))
        assert_equal(model.state_dict(), expected, masks)


def fsdp1(folder: Path) -> None:
    """FullyShardedDataParallel: other optimizers work, ours refuses flattened parameters in one sentence."""
    for original in (True, False):
        expected, masks, _ = alone(adamw)
        early = masked_adamw(inner := make()[0])
        model = FullyShardedDataParallel(inner, use_orig_params=original, device_id=torch.device("cpu"))
        train(model, adamw(model), range(5))
        assert_equal(model.state_dict(), expected, masks)
        refused = [lambda model=model: masked_adamw(model)]
        if original:  # without, the optimizer's parameters are no part of the model any more, as torch says
            refused.append(lambda model=model, early=early: train(model, early, range(1)))
        for use in refused:
            with pytest.raises(
                ValueError, match="FullyShardedDataParallel has flattened; expected one in its own shape"
            ):
                use()


def product_of_dtensors(folder: Path) -> None:
    """``masked_linear`` itself, and its gradients, for every placement of the weight."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(0)
    x, weight, mask = torch.randn(3, 5, 40).double(), torch.randn(7, 40).double(), torch.rand(7, 40) > 0.5
    wanted = [t.requires_grad_() for t in (x.clone(), weight.clone())]
    y = masked_linear(*wanted, mask)
    y.square().sum().backward()
    for placement in (Replicate(), Shard(0), Shard(1)):
        got = [distribute_tensor(x, mesh, [Replicate()]), distribute_tensor(weight, mesh, [placement])]
        got = [t.requires_grad_() for t in got]
        out = masked_linear(*got, mask)
        torch.testing.assert_close(out.full_tensor(), y, **EXACT)
        out.square().sum().backward()
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine.grad.full_tensor(), theirs.grad, **EXACT)
        assert_exact_zeros(got[1].grad.full_tensor(), mask)


CASES = (
    ddp, fsdp2, fsdp2_other_layouts, fsdp2_whoever_writes, fsdp2_refuses, tensor_parallel, checkpoint,
    whole_state_into_shards, fsdp1, product_of_dtensors,
)  # fmt: skip


def on_rank(rank: int, folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD, timeout=WAIT)
    for case in (case for case in CASES if not names or case.__name__ in names):
        said = ""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                case(folder)
        except Exception:  # it is what the test reports
            said = traceback.format_exc()
        heard: list[str] = [""] * WORLD
        dist.all_gather_object(heard, said)
        if rank == 0:
            (folder / f"{case.__name__}.json").write_text(json.dumps(heard), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.multiprocessing.spawn(on_rank, (Path(sys.argv[1]), sys.argv[2:]), WORLD)
