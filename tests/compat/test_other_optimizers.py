"""Optimizers of torch, transformers and bitsandbytes on masked layers: what they do to kept weights, and no more."""

import copy

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from twins import check, llama, make_twins, token_rows, train

from ebft_kernels import MaskedAdamW

IN_MAKE_TEST = ("adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop")
OF_THE_EXTRA = (  # bitsandbytes and torchao
    "adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit", "lion_32bit", "paged_lion_8bit",
    "rmsprop_bnb_8bit", "ademamix", "ademamix_8bit", "adamw_torch_8bit", "adamw_torch_4bit",
)  # fmt: skip


@pytest.mark.parametrize("name", [*IN_MAKE_TEST, *(pytest.param(n, marks=pytest.mark.slow) for n in OF_THE_EXTRA)])
def test_hugging_face_trainer(name, tmp_path):
    twins = make_twins(llama)
    for model in (twins.masked, twins.plain):
        settings = TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, optim=name, learning_rate=1e-2, weight_decay=0.1, logging_steps=100,
        )  # fmt: skip
        Trainer(model=model, args=settings, train_dataset=token_rows()).train()
    check(twins)


def matrices_and_rest(model: nn.Module, of_matrices, of_rest) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return [of_matrices(matrices), of_rest([p for p in model.parameters() if p.ndim != 2])]


def test_muon():
    """It writes everywhere: its update of a matrix is orthogonal, whatever the gradient's zeros."""
    twins = make_twins()
    for model in (twins.masked, twins.plain):
        for optimizer in matrices_and_rest(model, lambda p: torch.optim.Muon(p, lr=0.05), torch.optim.SGD):
            train(model, optimizer)
    assert (twins.plain[0].weight[~twins.masks["0.weight"]] != 0).any()
    check(twins)


def test_moments_from_before_masking():
    twins = make_twins()
    states = []
    for model in (twins.masked, twins.plain):
        dense = twins.make()
        dense.load_state_dict(twins.plain.state_dict())
        optimizer = torch.optim.AdamW(dense.parameters(), lr=1e-2)
        train(dense, optimizer, steps=2)
        states.append(copy.deepcopy(optimizer.state_dict()))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        optimizer.load_state_dict(states[-1])
        train(model, optimizer)
    assert (twins.plain[0].weight[~twins.masks["0.weight"]] != 0).any()
    check(twins)


@pytest.mark.parametrize("name", ["Adadelta", "Adam", "Adamax", "ASGD", "NAdam", "RAdam", "Rprop"])
def test_the_rest_of_torch(name):
    twins = make_twins()
    for model in (twins.masked, twins.plain):
        train(model, getattr(torch.optim, name)(model.parameters(), lr=1e-2))
    check(twins)


def test_lbfgs():
    """Its line search writes along a direction that couples all entries."""
    twins = make_twins(dtype=torch.float64)
    for model in (twins.masked, twins.plain):
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=4)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(128, dtype=torch.float64)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    check(twins)


def test_masked_adamw():
    twins = make_twins()
    train(twins.masked, MaskedAdamW.for_module(twins.masked, lr=1e-2))
    train(twins.plain, torch.optim.AdamW(twins.plain.parameters(), lr=1e-2))
    check(twins, rtol=1e-4, atol=1e-6)
