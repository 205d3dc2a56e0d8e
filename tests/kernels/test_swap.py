"""mask_linears_ and unmask_linears_: a layer changes where it is, with all that hangs on it; what cannot is refused."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

from ebft_kernels import MaskedLinear, is_masked, mask_linears_, unmask_linears_
from ebft_kernels.testing import assert_exact_zeros


def make_mask():
    return torch.rand(8, 40, generator=torch.Generator().manual_seed(0)) > 0.5


def hooked(linear):
    """Every kind of hook on a layer; gives what they have called and their handles."""
    called = []

    def note(kind):
        return lambda *args, **kwargs: called.append(kind)

    handles = [
        linear.register_forward_pre_hook(note("forward pre")),
        linear.register_forward_hook(note("forward"), with_kwargs=True),
        linear.register_full_backward_pre_hook(note("backward pre")),
        linear.register_full_backward_hook(note("backward")),
        linear.register_state_dict_pre_hook(note("state dict pre")),
        linear.register_state_dict_post_hook(note("state dict post")),
        linear.register_load_state_dict_pre_hook(note("load pre")),
        linear.register_load_state_dict_post_hook(note("load post")),
        linear.weight.register_hook(note("gradient")),
    ]
    return called, handles


def use(layer):
    layer(torch.randn(2, 40, dtype=torch.float64, requires_grad=True)).sum().backward()
    layer.load_state_dict(copy.deepcopy(layer.state_dict()))


HOOKS = {
    "forward pre", "forward", "backward pre", "backward", "state dict pre", "state dict post", "load pre", "load post",
    "gradient",
}  # fmt: skip


def ways():
    """Into a masked layer, and back into a plain one."""
    mask = make_mask()
    return {
        "in place": lambda linear: mask_linears_(linear, {"weight": mask}),
        "copied": lambda linear: MaskedLinear.from_linear(linear, mask),
        "in place and back": lambda linear: unmask_linears_(mask_linears_(linear, {"weight": mask})),
        "copied and back": lambda linear: MaskedLinear.from_linear(linear, mask).to_linear(),
        "another mask": lambda linear: mask_linears_(mask_linears_(linear, {"weight": ~mask}), {"weight": mask}),
    }


@pytest.mark.parametrize("way", ways())
def test_hooks_and_attributes_stay(way):
    linear = nn.Linear(40, 8, dtype=torch.float64).eval()
    linear.bias.requires_grad_(False)
    linear.quantized, linear.sibling = "not yet", nn.ReLU()
    linear.register_buffer("scale", torch.ones(3))
    called, handles = hooked(linear)
    parameters = list(linear.parameters())
    layer = ways()[way](linear)
    assert type(layer) is (nn.Linear if "back" in way else MaskedLinear)
    del linear
    use(layer)
    assert set(called) == HOOKS
    assert not layer.training
    assert layer.quantized == "not yet"
    assert [name for name, _ in layer.named_modules()] == ["", "sibling"]
    assert list(layer.state_dict()) == ["weight", "bias", "scale"]
    assert all(mine is given for mine, given in zip(layer.parameters(), parameters, strict=True))
    assert not layer.bias.requires_grad
    assert_exact_zeros(layer.weight, make_mask())
    if "copied" not in way:
        called.clear()
        for handle in handles:
            handle.remove()
        use(layer)
        assert called == []


def test_copied_hooks_are_the_copys_own():
    linear = nn.Linear(40, 8)
    layer = MaskedLinear.from_linear(linear, make_mask())
    layer.register_forward_hook(lambda *args: torch.zeros(()))
    assert linear(torch.randn(2, 40)).shape == (2, 8)


def test_layers_stay_the_same_objects():
    """A layer that two names lead to, and one that somebody holds, are masked wherever they are used."""
    shared = nn.Linear(40, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(nn.ReLU(), shared)})
    mask_linears_(model, {"a.weight": make_mask()})
    assert model["a"] is model["b"][1] is shared
    assert type(shared) is MaskedLinear
    unmask_linears_(model)
    assert type(shared) is nn.Linear
    assert pickle.loads(pickle.dumps(shared)).weight.equal(shared.weight)
    assert not {"_words", "_own", "_trusted", "_stripe"} & set(vars(shared))


def accelerates(layer):
    """As accelerate puts a hook around a layer's forward."""
    seen = []

    def new_forward(module, *args):
        seen.append(type(module))
        return module._old_forward(*args)

    layer._hf_hook, layer._old_forward = object(), layer.forward
    layer.forward = functools.update_wrapper(functools.partial(new_forward, layer), layer.forward)
    return seen


def somebodys(layer):
    seen, before = [], layer.forward

    def forward(*args):
        seen.append(type(layer))
        return before(*args)

    layer.forward = forward
    return seen


@pytest.mark.parametrize("replace", [accelerates, somebodys])
def test_a_forward_that_somebody_replaced_stays(replace):
    linear, mask, x = nn.Linear(40, 8), make_mask(), torch.randn(2, 40)
    seen = replace(linear)
    layer = mask_linears_(nn.Sequential(linear), {"0.weight": mask})[0]
    layer._parameters["weight"].data[~mask] = 1.0
    y = layer(x)
    torch.testing.assert_close(y, nn.functional.linear(x, layer.weight * mask, layer.bias))
    assert seen == [MaskedLinear]
    unmask_linears_(layer)
    assert torch.equal(layer(x), y)
    assert seen == [MaskedLinear, nn.Linear]
    with pytest.raises(ValueError, match=r"forward is replaced by .*; expected one without, or mask_linears_"):
        MaskedLinear.from_linear(linear, mask)


def test_accelerates_own_hooks():
    hooks = pytest.importorskip("accelerate.hooks")
    linear, mask, x = nn.Linear(40, 8), make_mask(), torch.randn(2, 40)
    hooks.add_hook_to_module(linear, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    assert linear.weight.is_meta
    layer = mask_linears_(nn.Sequential(linear), {"0.weight": mask})[0]
    dense = layer._hf_hook.weights_map["weight"]
    torch.testing.assert_close(layer(x), nn.functional.linear(x, dense * mask, layer._hf_hook.weights_map["bias"]))
    hooks.remove_hook_from_module(layer)
    layer.apply_mask_()
    layer._parameters["weight"].data[~mask] = 1.0
    layer(x)
    assert is_masked(layer)


class OwnLinear(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.base_layer = nn.Linear(40, 8)
        self.weight = self.base_layer.weight


def owned():
    """name -> (layer, what is said of it)."""
    torch.manual_seed(0)
    pruned, on_bias = nn.Linear(40, 8), nn.Linear(40, 8)
    prune.l1_unstructured(prune.random_unstructured(pruned, "weight", 0.3), "weight", 0.3)
    parametrize.register_parametrization(on_bias, "bias", nn.Tanh())
    spectral, halves = nn.Linear(40, 8), nn.Linear(40, 8)
    halves.weight = nn.Parameter(torch.ones(8, 40, dtype=torch.int8), requires_grad=False)
    weight_normed = weight_norm(nn.Linear(40, 8))
    return {
        "prune": (prune.random_unstructured(nn.Linear(40, 8), "weight", 0.3), r"prune\.RandomUnstructured owns the"),
        "prune twice": (pruned, r"torch\.nn\.utils\.prune\.PruningContainer owns the weight; expected"),
        "weight norm": (weight_normed, r"torch\.nn\.utils\.weight_norm\.WeightNorm owns the weight"),
        "spectral norm": (spectral_norm(spectral), r"torch\.nn\.utils\.spectral_norm\.SpectralNorm owns the weight"),
        "new weight norm": (
            parametrizations.weight_norm(nn.Linear(40, 8)), r"torch\.nn\.utils\.parametrizations\._WeightNorm owns",
        ),
        "new spectral norm": (
            parametrizations.spectral_norm(nn.Linear(40, 8)), r"torch\.nn\.utils\.parametrizations\._SpectralNorm owns",
        ),
        "parametrisation": (on_bias, r"torch\.nn\.modules\.activation\.Tanh owns the weight"),
        "own class": (OwnLinear(40, 8), r"test_swap\.OwnLinear is; expected .* lose what this subclass of it does"),
        "torch's own": (
            nn.modules.linear.NonDynamicallyQuantizableLinear(40, 8), "NonDynamicallyQuantizableLinear is; expected",
        ),
        "wrapped": (Wrapper(), r"Wrapper is; expected .*it wraps base_layer, whose weights may be named"),
        "integers": (halves, r"the weight is a Parameter of torch\.int8; expected .* before it is quantised"),
        "quantised": (
            torch.ao.nn.quantized.dynamic.Linear(40, 8), r"Linear is; expected the weight of an nn\.Linear inside",
        ),
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", owned())
def test_what_others_own_is_refused_and_nothing_is_changed(case):
    layer, says = owned()[case]
    model = nn.Sequential(nn.Linear(40, 8), layer)
    state, kinds = copy.deepcopy(model.state_dict()), [type(child) for child in model]
    with pytest.raises(ValueError, match=rf"mask_linears_ got '1\.weight', where .*{says}") as error:
        mask_linears_(model, {"0.weight": make_mask(), "1.weight": make_mask()})
    assert "\n" not in str(error.value)
    assert [type(child) for child in model] == kinds
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items() if torch.is_tensor(value))
    if isinstance(layer, nn.Linear):
        with pytest.raises(ValueError, match=rf"got a layer where .*{says}"):
            MaskedLinear.from_linear(layer, make_mask())


def test_a_weight_of_another_kind_is_refused():
    """Quantised and sharded weights are tensors of another class in a plain nn.Linear."""
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Sequential(nn.Linear(40, 8))
    model[0].weight = nn.Parameter(TwoTensor(torch.randn(8, 40), torch.randn(8, 40)))
    with pytest.raises(ValueError, match=r"where the weight is a TwoTensor of torch.float32; .* quantised or sharded"):
        mask_linears_(model, {"0.weight": make_mask()})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("own", [weight_norm, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_who_takes_over_a_masked_layer_gets_masked_products(own):
    mask, x = make_mask(), torch.randn(2, 40)
    model = nn.Sequential(own(MaskedLinear.from_linear(nn.Linear(40, 8), mask))).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1)
    y = model(x)
    torch.testing.assert_close(y, nn.functional.linear(x, model[0].weight * mask, model[0].bias))
    y.sum().backward()
    model.state_dict()
    if own is not weight_norm:
        with pytest.raises(ValueError, match=r"unmask_linears_ got '0', where ParametrizedMaskedLinear is"):
            unmask_linears_(model)


def test_unmask_whole_models():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 8), nn.Sequential(nn.ReLU(), nn.Linear(8, 4)), nn.Linear(4, 4))
    masks = {"0.weight": make_mask(), "1.1.weight": torch.rand(4, 8) > 0.5}
    layers, x = [model[0], model[1][1]], torch.randn(2, 40)
    y = mask_linears_(model, masks)(x)
    for layer in layers:
        next(layer.parameters()).data.add_(1.0)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    y = model(x)
    assert unmask_linears_(model) is model
    assert [type(layer) for layer in layers] == [nn.Linear] * 2
    assert torch.equal(model(x), y)
    for layer, mask in zip(layers, masks.values(), strict=True):
        assert_exact_zeros(layer.weight, mask)
    assert not any(isinstance(layer, MaskedLinear) for layer in model.modules())
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    assert quantized(x).shape == y.shape
    assert not any(type(layer) is nn.Linear for layer in quantized.modules())
