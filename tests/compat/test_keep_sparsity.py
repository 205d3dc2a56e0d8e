"""``ebft.integrations.KeepSparsity`` in transformers' Trainer: zeros stay, and whoever writes there is named."""

import warnings

import pytest
import torch
from test_trainers import trained, with_adapters
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
from twins import VOCABULARY, llama

from ebft import EBFTError
from ebft.integrations import KeepSparsity
from ebft_kernels import MaskedLinear, PackedMask, is_masked, load_masks, save_masks
from ebft_kernels.testing import assert_exact_zeros

Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def pruned(folder=None) -> tuple[nn.Module, dict[str, PackedMask]]:
    """A plain model with zeros in it; its masks, which are in ``folder`` too."""
    torch.manual_seed(0)
    model = llama()
    masks = {
        f"{path}.weight": PackedMask.from_scores(layer.weight.abs(), 2, 4)
        for path, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and path != "lm_head"
    }
    for name, mask in masks.items():
        mask.zero_pruned_(model.get_parameter(name))
    if folder is not None:
        save_masks(masks, folder / "masks.safetensors")
    return model, masks


class Writes(TrainerCallback):
    """Writes to a weight between two steps, as an EMA may."""

    def on_step_end(self, args, state, control, model=None, **others):
        model.get_parameter(Q_PROJ).data.add_(1e-3)


class Replaces(TrainerCallback):
    """Puts another layer in the place of a masked one, as a quantiser may."""

    def on_step_end(self, args, state, control, model=None, **others):
        model.model.layers[0].self_attn.q_proj = nn.Linear(128, 128)


def test_keep_sparsity(tmp_path):
    """From a folder, or from the zeros that are there: before the optimizer is made, without a warning."""
    for given in (tmp_path, None):
        model, masks = pruned(tmp_path)
        before = model.get_parameter(Q_PROJ).detach().clone()
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="KeepSparsity")
            trained(model, tmp_path, callbacks=[KeepSparsity(given)])
        assert load_masks(tmp_path / "masks.safetensors").keys() == masks.keys()
        for name, mask in masks.items():
            assert type(model.get_submodule(name.removesuffix(".weight"))) is MaskedLinear
            assert_exact_zeros(model.state_dict()[name], mask.dense(), name)
        assert not torch.equal(model.get_parameter(Q_PROJ), before)


@pytest.mark.parametrize("who", ["the optimizer, Muon,", "something between two steps"])
def test_keep_sparsity_names_who_wrote(who, tmp_path):
    for strict in (False, True):
        model, masks = pruned()
        keep = KeepSparsity(masks, strict=strict)
        more = {"callbacks": [keep, Writes()]}
        if "Muon" in who:
            matrices = [model.get_parameter(name) for name in masks]
            more = {"callbacks": [keep], "optimizers": (torch.optim.Muon(matrices, lr=1e-2), None)}
        said = f"KeepSparsity: {who}.* wrote to pruned weights by step 1: .*{'q_proj' if 'Muon' not in who else ''}"
        if strict:
            with pytest.raises(EBFTError, match=said):
                trained(model, tmp_path, **more)
        else:
            with pytest.warns(UserWarning, match=said) as caught:
                trained(model, tmp_path, **more)
            assert len([w for w in caught if who in str(w.message)]) == 1  # in three steps
            assert is_masked(model)


def test_keep_sparsity_with_peft(tmp_path):
    """The masks have the plain model's names; new adapters, all zero, are not taken for pruned matrices."""
    for given in (True, False):
        model, masks = pruned()
        adapted = trained(with_adapters(model), tmp_path, callbacks=[KeepSparsity(masks if given else None)])
        merged = adapted.merge_and_unload()
        for name, mask in masks.items():
            assert_exact_zeros(merged.state_dict()[name], mask.dense(), name)


def test_keep_sparsity_where_there_are_no_linear_layers(tmp_path):
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=VOCABULARY, n_positions=32))
    name = "transformer.h.0.mlp.c_fc.weight"
    mask = PackedMask.from_scores(model.get_parameter(name).abs(), 2, 4)
    mask.zero_pruned_(model.get_parameter(name))
    before = model.get_parameter(name).detach().clone()
    trained(model, tmp_path, callbacks=[KeepSparsity()])
    assert_exact_zeros(model.get_parameter(name), mask.dense(), name)
    assert not torch.equal(model.get_parameter(name), before)


def test_keep_sparsity_of_a_model_that_is_made_anew(tmp_path):
    """As ``model_init`` does, when training begins."""
    made, masks = [], pruned()[1]

    def init() -> nn.Module:
        made.append(pruned()[0])
        return made[-1]

    trained(None, tmp_path, model_init=init, callbacks=[KeepSparsity(masks, strict=True)])
    assert len(made) > 1
    assert is_masked(made[-1])


def test_keep_sparsity_refuses(tmp_path):
    model, masks = pruned()
    with pytest.raises(EBFTError, match=r"q_proj is no longer the masked layer"):
        trained(model, tmp_path, callbacks=[KeepSparsity(masks), Replaces()])
    for given, said in (
        (None, "found no zeros"),
        ({"model.layers.7.up.weight": masks[Q_PROJ]}, "'model.layers.7.up.weight', of which a Llama"),
        ({Q_PROJ: PackedMask.ones((2, 2))}, "cannot mask this model: .* expected"),
        (tmp_path / "nothing", "cannot read the masks"),
    ):
        with pytest.raises(EBFTError, match=said):
            KeepSparsity(given).on_init_end(None, None, None, model=llama())
    with pytest.raises(EBFTError, match="every=0"):
        KeepSparsity(every=0)
