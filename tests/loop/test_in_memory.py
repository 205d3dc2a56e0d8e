"""Models that are given in memory, with something around them or in them: the plain model's result, or one sentence."""

import pytest
import torch
from conftest import random_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune

from ebft import EBFTError, run_ebft
from ebft_kernels import MaskedLinear, mask_linears_


@pytest.fixture
def run(config, tokenizer, silent, tmp_path):
    """The tensors that a run of a model saves, and what its result gives as the model."""

    def of(model, **settings):
        result = run_ebft(model, config(overwrite=True, **settings), tokenizer=tokenizer, reporter=silent)
        return load_file(tmp_path / "out" / "model.safetensors"), result.model

    return of


def same(ours, theirs) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def with_checkpointing(model):
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    return model.train()


def with_compiled_forward(model):
    model.forward = torch.compile(model.forward)
    return model


AROUND = [torch.compile, nn.DataParallel, lambda m: torch.compile(nn.DataParallel(m)), with_compiled_forward]


@pytest.mark.parametrize("around", [*AROUND, with_checkpointing], ids=range(5))
def test_what_is_around_a_model_changes_nothing(run, around):
    plain, _ = run(random_model("llama-gqa"))
    inner = random_model("llama-gqa")
    saved, model = run(around(inner))
    assert same(saved, plain)
    assert model is inner
    assert same({name: model.state_dict()[name] for name in plain}, plain)


def test_hooks_of_accelerate_that_move_nothing_change_nothing(run):
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    hooked = random_model("llama-gqa")
    for layer in hooked.model.layers:
        add_hook_to_module(layer.mlp.up_proj, AlignDevicesHook(execution_device="cpu"))
    assert same(run(hooked)[0], run(random_model("llama-gqa"))[0])


def masked(model):
    """Linear layers of its blocks with a random 30 % of their weights pruned."""
    torch.manual_seed(1)
    names = [name for name, _ in model.named_parameters() if name.endswith("proj.weight")]
    return mask_linears_(model, {name: torch.rand(model.get_parameter(name).shape) > 0.3 for name in names})


def test_masked_layers_take_the_masks_of_the_run(run):
    model, plain = masked(random_model("llama-gqa")), random_model("llama-gqa")
    plain.load_state_dict(model.state_dict())
    expected, _ = run(plain)
    saved, recovered = run(model)
    assert same(saved, expected)
    layer = recovered.model.layers[1].mlp.up_proj
    assert recovered is model
    assert type(layer) is MaskedLinear
    assert torch.equal(layer.mask.dense(), saved["model.layers.1.mlp.up_proj.weight"] != 0)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(recovered(ids).logits, plain(ids).logits)


def test_weights_that_were_written_behind_a_mask_are_not_used(run):
    model, other = masked(random_model("llama-gqa")), masked(random_model("llama-gqa"))
    layer = other.model.layers[0].mlp.up_proj
    layer.weight.data[~layer.mask.dense()] = 5.0
    assert same(run(model)[0], run(other)[0])


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def with_(change):
    """What makes a model of which the first layer of each MLP is another."""

    def make():
        model = random_model("llama-gqa")
        for block in model.model.layers:
            block.mlp.up_proj = change(block.mlp.up_proj)
        return model

    return make


def adapted():
    return get_peft_model(random_model("llama-gqa"), LoraConfig(target_modules=["up_proj"], r=2))


def offloaded():
    from accelerate import cpu_offload

    return cpu_offload(random_model("llama-gqa"))


def in_inference_mode():
    with torch.inference_mode():
        return random_model("llama-gqa")


def smaller(change):
    model = random_model("llama-gqa")
    change(model.model)
    return model


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (adapted, "a PeftModel.* is given, whose adapters .* expected what its merge_and_unload"),
        (lambda: adapted().get_base_model(), r"the model has .*up_proj.base_layer.weight, which Llama.* does not"),
        (with_(Wrapped), "the model has .*up_proj.inner.weight, which LlamaForCausalLM does not make"),
        (with_(torch.compile), "the model has .*up_proj._orig_mod.weight, which LlamaForCausalLM does not make"),
        (with_(parametrizations.weight_norm), "the model has .*up_proj.parametrizations.*, which Llama"),
        (with_(lambda m: prune.l1_unstructured(m, "weight", 0.3)), "the model has .*up_proj.weight_mask, which Llama"),
        (offloaded, "the model's model.embed_tokens.weight is not in memory .it is on the meta device, as accelerate"),
        (in_inference_mode, "the model's model.embed_tokens.weight was made in torch.inference_mode"),
        (lambda: smaller(lambda m: setattr(m, "layers", m.layers[:2])), "the model lacks model.layers.2"),
        (lambda: smaller(lambda m: setattr(m, "embed_tokens", nn.Embedding(9, 32))), r"weight is \(9, 32\)"),
        (lambda: nn.Linear(3, 3), "the model is a torch.nn.modules.linear.Linear; expected a hub id, a folder"),
        (lambda: 3, "the model is a builtins.int; expected a hub id, a folder"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_do_justice_to(config, silent, tokenizer, tmp_path, make, says):
    with pytest.raises(EBFTError, match=says):
        run_ebft(make(), config(), tokenizer=tokenizer, reporter=silent)
    assert not list(tmp_path.iterdir())
