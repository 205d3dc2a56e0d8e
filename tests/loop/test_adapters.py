"""peft on compressed models: adapters over a frozen sparse base are trained, saved, loaded and merged."""

import warnings

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

import ebft
from ebft.compressed.layers import compress_model
from ebft.errors import EBFTError
from ebft.model.blocks import find_blocks
from ebft.model.matrices import find_matrices
from ebft_kernels import CompressedLinear

IDS = torch.arange(40).reshape(2, 20)
TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A compressed Llama, half of whose block weights are 0."""
    model = random_model("llama-gqa")
    for block in find_blocks(model)[1]:
        for matrix in find_matrices(block):
            weight = block.get_parameter(matrix.name).data
            weight.mul_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) > 0.5)
    compress_model(model)
    folder = tmp_path_factory.mktemp("adapters") / "small"
    model.save_pretrained(folder)
    return folder


def loaded(folder, **how):
    return AutoModelForCausalLM.from_pretrained(folder, **how)


def trained(model, steps=8):
    """Some steps on one batch; gives the losses."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def test_adapters_are_trained_saved_loaded_and_merged(folder, tmp_path):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = get_peft_model(loaded(folder), LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.0))
    base = loaded(folder)
    assert torch.equal(logits(model), logits(base))
    losses = trained(model)
    assert losses[-1] < 0.9 * losses[0]
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_A", "lora_B"}
    layers = [module for module in model.modules() if isinstance(module, CompressedLinear)]
    untouched = [module for module in base.modules() if isinstance(module, CompressedLinear)]
    assert len(layers) == 3 * 7
    assert all(torch.equal(a.values, b.values) for a, b in zip(layers, untouched, strict=True))

    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))

    with pytest.raises(EBFTError, match=r"expected ebft\.to_dense\(model\) before"):
        again.merge_and_unload()
    merged = ebft.to_dense(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), logits(again), rtol=1e-4, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


def test_gradients_are_those_of_dense_layers(folder):
    """In bfloat16 too; more rows than the kernel takes, and fewer."""
    for dtype, rows in ((torch.float32, 40), (torch.float32, 3), (torch.bfloat16, 40)):
        torch.manual_seed(0)
        small = loaded(folder, dtype=dtype)
        dense = ebft.to_dense(loaded(folder, dtype=dtype))
        hidden = torch.randn(rows, 32, dtype=dtype)
        x, y = (hidden.clone().requires_grad_() for _ in range(2))
        (small.model.layers[0].mlp(x).float().square().sum()).backward()
        (dense.model.layers[0].mlp(y).float().square().sum()).backward()
        torch.testing.assert_close(x.grad, y.grad, rtol=2e-2 if dtype is torch.bfloat16 else 1e-4, atol=1e-4)


def test_no_expanded_weight_waits_for_the_backward_pass(folder):
    model, sizes = loaded(folder), []
    hidden = torch.randn(40, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        model.model.layers[0].mlp(hidden)
    assert sizes
    assert not {(48, 32), (32, 48)} & set(sizes)


@pytest.mark.parametrize("settings", [{"use_dora": True}, {"init_lora_weights": "pissa"}])
def test_what_needs_weights_is_refused(settings, folder):
    with pytest.raises(EBFTError, match=r"needs the weights of its layers; expected ebft\.to_dense\(model\) before"):
        get_peft_model(loaded(folder), LoraConfig(r=4, target_modules=TARGETS, **settings))


def test_transformers_own_adapters(folder, tmp_path):
    model = loaded(folder)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    assert trained(model, 4)[-1] < trained(model, 1)[0] + 1
    model.save_pretrained(tmp_path / "adapter")
    again = loaded(folder)
    again.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
