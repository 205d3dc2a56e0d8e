"""Compilers, export, mixed precision, averages, transforms and quantisation of torch on masked layers."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from twins import batches, check, make_twins, masked_state, outputs, train

from ebft_kernels import CompressedLinear, MaskedLinear, masked_linear, reconstruction_loss, unmask_linears_
from ebft_kernels.testing import assert_exact_zeros


def dirty(twins) -> None:
    """Both get the same garbage where the masks prune."""
    for name in twins.masks:
        path = name.removesuffix(".weight")
        noise = torch.randn(twins.masks[name].shape, generator=torch.Generator().manual_seed(3))
        for model in (twins.masked, twins.plain):
            weight = model.get_submodule(path)._parameters["weight"]
            weight.data.copy_(torch.where(twins.masks[name], weight.data, noise))


# --- compile and export -------------------------------------------------------------------------------------------


def test_compile():
    """In one graph, trained by another optimizer, with garbage written into the weight."""
    twins = make_twins()
    dirty(twins)
    compiled = torch.compile(twins.masked, fullgraph=True, backend="aot_eager")
    for model, parameters in ((compiled, twins.masked), (twins.plain, twins.plain)):
        train(model, torch.optim.AdamW(parameters.parameters(), lr=1e-2))
    assert_close(compiled(batches(1)[0][0]), twins.plain(batches(1)[0][0]))
    check(twins, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_compile_with_inductor():
    twins = make_twins()
    compiled = torch.compile(twins.masked, fullgraph=True)
    for model, parameters in ((compiled, twins.masked), (twins.plain, twins.plain)):
        train(model, torch.optim.AdamW(parameters.parameters(), lr=1e-2))
    check(twins, rtol=1e-4, atol=1e-6)


def test_export():
    """What is exported holds the mask: garbage in the weight stays without effect, also from a file."""
    twins = make_twins()
    dirty(twins)
    (x, _), (other, _) = batches(2)
    file = io.BytesIO()
    torch.export.save(torch.export.export(twins.masked.eval(), (x,)), file)
    file.seek(0)
    module = torch.export.load(file).module()
    assert_close(module(other), twins.plain(other))


# --- mixed precision ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    twins = make_twins()
    dirty(twins)
    for model in (twins.masked, twins.plain):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for x, y in batches(3):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = (model(x) - y).square().mean()
            loss.backward()
            optimizer.step()
    check(twins, rtol=1e-3, atol=1e-4)


def test_grad_scaler():
    twins = make_twins()
    for model in (twins.masked, twins.plain):
        optimizer, scaler = torch.optim.AdamW(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu")
        for x, y in batches(3):
            optimizer.zero_grad()
            scaler.scale((model(x) - y).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
    check(twins)


# --- averages of weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("ema", [False, True])
def test_averaged_model(use_buffers, ema):
    """Masks are neither averaged nor cast, and the average is masked."""
    twins = make_twins()
    settings = {"use_buffers": use_buffers, "multi_avg_fn": get_ema_multi_avg_fn(0.9) if ema else None}
    averages = [AveragedModel(model, **settings) for model in (twins.masked, twins.plain)]
    for model, average in zip((twins.masked, twins.plain), averages, strict=True):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(3):
            train(model, optimizer, steps=1)
            for parameter in model.parameters():
                parameter.data.add_(0.01)  # in pruned places too
            average.update_parameters(model)
    for name, mask in twins.masks.items():
        layer = averages[0].module.get_submodule(name.removesuffix(".weight"))
        assert torch.equal(layer.mask.dense(), mask)
    check(twins, averages[0].module, averages[1].module)


def test_ema_through_data():
    twins = make_twins()
    means = [copy.deepcopy(model) for model in (twins.masked, twins.plain)]
    for model, mean in zip((twins.masked, twins.plain), means, strict=True):
        train(model, torch.optim.Muon([p for p in model.parameters() if p.ndim == 2], lr=0.05))
        for kept, new in zip(mean.parameters(), model.parameters(), strict=True):
            kept.data.copy_(0.9 * kept.data + 0.1 * new.data)
    check(twins, *means)


# --- torch.func -----------------------------------------------------------------------------------------------------


def losses():
    """(our loss, plain torch's, its arguments), as a function of weight, bias and x."""
    torch.manual_seed(0)
    weight, bias, x = (torch.randn(shape, dtype=torch.float64) for shape in ((5, 7), (5,), (3, 7)))
    mask = torch.rand(5, 7) > 0.5

    def ours(weight, bias, x):
        return masked_linear(x, weight, mask, bias).pow(3).sum()

    def theirs(weight, bias, x):
        return nn.functional.linear(x, weight * mask, bias).pow(3).sum()

    return ours, theirs, (weight, bias, x)


TRANSFORMS = {
    "grad": lambda f: grad(f, (0, 1, 2)),
    "vmap": lambda f: vmap(f, (None, None, 0)),
    "vmap of grad": lambda f: vmap(grad(f, (0, 1, 2)), (None, None, 0)),
    "grad of vmap": lambda f: grad(lambda *a: vmap(f, (None, None, 0))(*a).sum(), (0, 1, 2)),
    "jacrev": lambda f: jacrev(f, (0, 1, 2)),
    "jacfwd": lambda f: jacfwd(f, (0, 1, 2)),
    "hessian": lambda f: hessian(f, (0, 1, 2)),
    "jvp": lambda f: lambda *a: jvp(f, a, tuple(torch.ones_like(t) for t in a)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_torch_func(name):
    ours, theirs, arguments = losses()
    assert_close(TRANSFORMS[name](ours)(*arguments), TRANSFORMS[name](theirs)(*arguments))


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "jacrev", "hessian"])
def test_torch_func_through_a_layer(name):
    """The layer's own weight and others, with garbage where pruned; an ensemble of weights by vmap."""
    _, _, (weight, bias, x) = losses()
    mask = torch.rand(5, 7) > 0.5
    layer = MaskedLinear(7, 5, dtype=torch.float64, mask=mask)

    def ours(weight, bias, x):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x,)).pow(3).sum()

    def theirs(weight, bias, x):
        return nn.functional.linear(x, weight * mask, bias).pow(3).sum()

    assert_close(TRANSFORMS[name](ours)(weight, bias, x), TRANSFORMS[name](theirs)(weight, bias, x))
    many = torch.stack([weight, -weight, layer.weight.detach()])
    each = [vmap(grad(f), (0, None, None))(many, bias, x) for f in (ours, theirs)]
    assert_close(*each)
    assert_exact_zeros(each[0], mask.expand_as(many))
    assert_close(grad(lambda x: layer(x).sum())(x), layer.state_dict()["weight"].sum(0).expand(3, 7))


def test_forward_mode():
    """Tangents outside of ``torch.func``: without care a custom operator drops them, and says nothing."""
    ours, theirs, arguments = losses()
    tangents = []
    for f in (ours, theirs):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(t, torch.ones_like(t)) for t in arguments]
            tangents.append(torch.autograd.forward_ad.unpack_dual(f(*duals)).tangent)
    assert tangents[0] is not None
    assert_close(*tangents)


@pytest.mark.parametrize("name", ["grad", "vmap of grad", "jacrev", "hessian", "jvp"])
def test_torch_func_of_losses_and_compressed_layers(name):
    """The other operators that are differentiable."""
    torch.manual_seed(0)
    layer = MaskedLinear(7, 5, mask=torch.rand(5, 7) > 0.5)
    small = CompressedLinear.from_masked(layer)
    target, residual, x = torch.randn(3, 5), torch.randn(3, 5), torch.randn(3, 7)
    shared = name == "vmap of grad"  # one target for all rows of x there
    target, residual = (target[0], residual[0]) if shared else (target, residual)

    def ours(target, residual, x):
        return reconstruction_loss(small(x), target, residual)

    def theirs(target, residual, x):
        return nn.functional.mse_loss(layer(x) - residual, target)

    for got, expected in zip(*(TRANSFORMS[name](f)(target, residual, x) for f in (ours, theirs)), strict=True):
        assert_close(got, expected)


def test_compile_of_torch_func():
    ours, theirs, arguments = losses()
    compiled = torch.compile(vmap(grad(ours, (0, 1, 2)), (None, None, 0)), backend="eager", fullgraph=True)
    assert_close(compiled(*arguments), vmap(grad(theirs, (0, 1, 2)), (None, None, 0))(*arguments))


def assert_close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


# --- quantisation ---------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantize_dynamic():
    """It takes plain layers by their exact type, and passes masked ones over: unmask them first."""
    twins = make_twins()
    dirty(twins)
    passed_over = torch.ao.quantization.quantize_dynamic(twins.masked, {nn.Linear}, torch.qint8)
    assert isinstance(passed_over[0], MaskedLinear)
    assert_close(outputs(passed_over), outputs(twins.plain))

    unmasked = unmask_linears_(copy.deepcopy(twins.masked))
    quantised = torch.ao.quantization.quantize_dynamic(unmasked, {nn.Linear}, torch.qint8)
    plain = twins.make()
    plain.load_state_dict(masked_state(twins, twins.plain))
    x = batches(1)[0][0]
    assert torch.equal(quantised(x), torch.ao.quantization.quantize_dynamic(plain, {nn.Linear}, torch.qint8)(x))
    for name, mask in twins.masks.items():
        assert_exact_zeros(quantised.get_submodule(name.removesuffix(".weight")).weight().dequantize(), mask, name)


@pytest.mark.slow
def test_torchao():
    """Its weights are no plain tensors: a masked layer says so, an unmasked one keeps its zeros."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    twins = make_twins()
    dirty(twins)
    masked = copy.deepcopy(twins.masked)
    quantize_(masked, Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="a weight that is a Int8Tensor; expected a plain tensor: call unmask"):
        outputs(masked)
    unmasked = unmask_linears_(copy.deepcopy(twins.masked))
    quantize_(unmasked, Int8WeightOnlyConfig())
    plain = twins.make()
    plain.load_state_dict(masked_state(twins, twins.plain))
    quantize_(plain, Int8WeightOnlyConfig())
    assert torch.equal(outputs(unmasked), outputs(plain))
    for name, mask in twins.masks.items():
        assert_exact_zeros(unmasked.get_submodule(name.removesuffix(".weight")).weight.dequantize(), mask, name)
