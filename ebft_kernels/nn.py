"""``MaskedLinear``: an ``nn.Linear`` whose pruned weights take no part, and helpers that put it into models.

Long, because everything that torch or transformers may do to a module (copy, pickle, cast, shard, load) is met here.
"""

from __future__ import annotations

import contextlib
import copy
import types
import warnings
import weakref
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ebft_kernels.dispatch import skips_zeros, use_impl
from ebft_kernels.functional import is_transformed, linear_of_zeroed, masked_linear
from ebft_kernels.mask import MaskLike, PackedMask, as_packed
from ebft_kernels.places import Places
from ebft_kernels.sharding import is_sharded, local
from ebft_kernels.updates import updater_of

_OPS = torch.ops.ebft_kernels
_Linear = TypeVar("_Linear", bound=nn.Linear)
STRIPES = 16  # on a GPU, of a weight that is trusted: parts of which each call looks at one


class MaskedLinear(nn.Linear):
    """y = x (M * W)^T + b; an ``nn.Linear`` to whoever looks at it, with the same state-dict keys.

    Neither ``forward`` nor ``state_dict()`` ever shows a pruned weight, whoever wrote to it and how: an optimizer, a
    merge or an average through ``weight.data``, a kernel through a raw pointer. What is pruned is set to zero in place
    before each product, when ``weight`` is asked for, and before it is saved; kept weights are never touched, and
    memory is written only where something stands. The weight's gradient is exactly zero where pruned. In places where
    the layer may not write (``torch.compile``, ``torch.func``, ``functional_call``, a weight that is made anew by a
    parametrisation or sharded) the mask takes part in the product instead.

    The check costs one pass over the weight (docs/layouts.md). On a GPU it is left out without gradients as long as
    nothing points to a write, and every such call looks at a 16th of the rows. For inference alone ``unmask_linears_``
    gives plain layers, which check nothing.

    On a CPU products of float32 skip the zeros where that was measured to be faster for so many tokens and zeros
    (``explain("masked_linear", shape=..., density=..., tokens=...)``); sums then differ in their last places.

    The mask is kept as one bit a weight in ``mask_words``, which is neither a parameter nor a buffer: it is in no state
    dict (``ebft_kernels.save_masks`` keeps masks), and what averages, casts or empties tensors does not reach it.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        mask: PackedMask or bool (out_features, in_features), 1 / True = kept; by default everything is kept.
    """

    _words: Tensor
    _own: weakref.ref[Tensor] | None = None  # the weight that was given to this layer, into which it may write
    _trusted: tuple[int, ...] | None = None  # on a GPU: what shows that nothing was written since the last look
    _stripe: int = 0
    _density: float | None = None
    _found: tuple[tuple[Any, ...], bool] | None = None  # how many tokens of which dtype: do products skip zeros?
    _places: Places | None = None  # of the mask, once they have

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        mask: MaskLike | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._hold(PackedMask.ones((out_features, in_features), "cpu") if mask is None else mask)  # not on meta
        self.apply_mask_()

    @classmethod
    def from_linear(cls, linear: nn.Linear, mask: MaskLike) -> MaskedLinear:
        """A masked layer on the very parameters of ``linear``; their pruned weights are set to zero.

        Hooks and attributes are copied. ``mask_linears_`` masks a layer where it is.

        Raises:
            ValueError: ``linear`` is a subclass, quantised or sharded, something else owns its weight or its forward,
                or the mask has another shape.
        """
        if (refusal := _why_not(linear)) is not None:
            raise ValueError(f"MaskedLinear got a layer where {refusal}")
        layer = _twin(linear, cls)
        layer._hold(mask)
        return layer.apply_mask_()

    def to_linear(self) -> nn.Linear:
        """A plain ``nn.Linear`` on the same parameters, with zeros in the weight where pruned; hooks are copied."""
        self.apply_mask_()
        return _twin(self, nn.Linear)

    @property
    def mask(self) -> PackedMask:
        """The mask, in the weight's shape."""
        return PackedMask(self.mask_words, torch.Size((self.out_features, self.in_features)))

    @property
    def mask_words(self) -> Tensor:
        """The words of the mask (int32, docs/layouts.md), where the weight is."""
        weight = self._parameters.get("weight")
        if weight is None or weight.device == self._words.device:
            return self._words
        if self._words.is_meta:
            raise ValueError(
                f"MaskedLinear got a mask on the meta device for a weight on {weight.device}; expected set_mask_ with "
                "a mask that has values first"
            )
        words = self._words.to(weight.device)
        if not words.is_meta:  # a meta tensor would forget the mask
            self._words = words
        return words

    def set_mask_(self, mask: MaskLike) -> MaskedLinear:
        """Take another mask. What it prunes is set to zero, newly kept places hold what stands there: as a rule zeros.

        An optimizer that holds the old mask has to be told too (``MaskedAdamW.set_mask_``).
        """
        self._hold(mask)
        return self.apply_mask_()

    def apply_mask_(self) -> MaskedLinear:
        """Set the pruned weights to exactly zero now."""
        weight = self._parameters.get("weight")
        if weight is not None:
            self._apply_mask_to(weight)
        self._adopt()
        return self

    def forward(self, input: Tensor) -> Tensor:
        """``masked_linear`` of (..., in_features)."""
        weight = self._parameters.get("weight")  # asked for by name it would be looked through twice
        if weight is None:  # a parametrisation makes it
            weight = self.weight
        zeroed, places = self._zero(weight, trusting=True), None
        if zeroed and input.device.type == weight.device.type == "cpu" and self._is_left_alone(weight):
            if not self._skips_zeros(input.shape[:-1].numel(), input.dtype):
                return linear_of_zeroed(input, weight, self._words, self.bias)
            places = self._places_now() if weight.is_contiguous() else None
        return masked_linear(input, weight, self.mask, self.bias, zeroed=zeroed, places=places)

    def extra_repr(self) -> str:
        """That of ``nn.Linear``, with the sparsity, and with what stands in pruned places if anything does."""
        said = [super().extra_repr()]
        if not self._words.is_meta:
            said.append(f"sparsity={1 - PackedMask(self._words, self.mask.shape).density():.3f}")
        if filled := _filled(self):
            said.append(f"{filled} pruned weights written to")
        return ", ".join(said)

    def _is_left_alone(self, weight: Tensor) -> bool:
        """Whether nothing changes what the product is to do: casts, updates in its backward pass, a choice of ops."""
        return (
            use_impl._current in ("auto", "native") and not torch.is_autocast_enabled("cpu") and not updater_of(weight)
        )

    def _skips_zeros(self, tokens: int, dtype: torch.dtype) -> bool:
        """Whether the product of so many tokens does. What was found last is kept: finding it takes a while."""
        asked = (tokens, dtype, use_impl._current)
        if self._found is None or self._found[0] != asked:
            if self._density is None:
                self._density = self.mask.density()
            shape = (self.out_features, self.in_features)
            self._found = asked, skips_zeros(shape, self._density, tokens, dtype).fused
        return self._found[1]

    def _places_now(self) -> Places:
        """The kept places."""
        if self._places is None or not self._places.belong_to(self._words):  # whoever wrote to the words, and how
            self._density, self._places = self.mask.density(), Places.of(self.mask)
        return self._places

    # --- zeros, whoever writes ------------------------------------------------------------------------------------

    def _zero(self, weight: Tensor, trusting: bool = False) -> bool:
        """Set what is pruned of the layer's own ``weight`` to zero; whether products need no mask now.

        Versions are not counted up: what a graph saved of kept weights stands, and pruned ones are zero by definition.
        """
        own = None if torch.compiler.is_compiling() or self._own is None else self._own()
        if own is None or own is not weight or not self._is_whole(weight) or is_transformed():
            return False
        words, held = self.mask_words, weight.data
        if not _trusts(weight) or weight.is_inference() or words.is_inference():
            with _writable(weight):
                _OPS.zero_pruned_(held, words)
            return True
        # Without gradients, until something points to a write. Kernels queue up: nothing waits for them.
        shown = (weight._version, weight.data_ptr(), words._version, words.data_ptr())
        trusting = trusting and not (torch.is_grad_enabled() or _is_captured(weight))
        if trusting and self._trusted == shown:
            rows = -(-len(held) // STRIPES)
            held, words = (of[rows * self._stripe : rows * (self._stripe + 1)] for of in (held, words))
            self._stripe = (self._stripe + 1) % STRIPES
        _OPS.zero_pruned_(held, words)
        self._trusted = shown if trusting else None
        return True

    def _zero_what_is_here(self) -> None:
        """The same for whatever weight the layer holds, its own or one that somebody has put in its place."""
        weight = self._parameters.get("weight")
        if weight is not None and not self._zero(weight):
            self._apply_mask_to(weight)

    def _adopt(self) -> None:
        """From now on the weight that is here is the layer's own, unless it is only a part."""
        weight = self._parameters.get("weight")
        self._own = weakref.ref(weight) if weight is not None and self._is_whole(weight) else None
        self._trusted = None

    def _apply_mask_to(self, weight: Tensor) -> None:
        if weight.shape == (self.out_features, self.in_features):
            with _writable(weight):
                self.mask.zero_pruned_(weight)

    def _is_whole(self, weight: Tensor) -> bool:
        """Not a part, as FSDP2 holds it, and in its shape: FSDP1 flattens it between forward passes."""
        return not is_sharded(weight) and weight.shape == (self.out_features, self.in_features)

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name == "weight":
            self._zero(value)
        return value

    def train(self, mode: bool = True) -> MaskedLinear:
        """As ``nn.Module.train``; on a GPU the weight is looked through anew."""
        self._trusted = None
        return super().train(mode)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._zero_what_is_here()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *args: Any) -> None:
        self._own = None  # torch swaps no tensors to which weak references point
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        if local_metadata.get("assign_to_params_buffers", False):  # the caller's own tensor, which is not ours to zero
            given = self._parameters.get("weight")
            if given is not None:
                self._parameters["weight"] = nn.Parameter(given.detach().clone(), given.requires_grad)
        if f"{prefix}weight" in state_dict and (dropped := _filled(self)):
            warnings.warn(
                f"MaskedLinear got {dropped} non-zero weights for {prefix}weight where its mask prunes; they were set "
                "to zero (if they belong to another mask, call set_mask_ before load_state_dict)",
                stacklevel=2,
            )
        self.apply_mask_()

    def _apply(self, fn: Any, recurse: bool = True) -> MaskedLinear:
        self._own = None
        super()._apply(fn, recurse)
        self._adopt()
        self._zero_what_is_here()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _PASSING}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._adopt()

    def _hold(self, mask: MaskLike) -> None:
        packed, shape = as_packed(mask), (self.out_features, self.in_features)
        if packed.shape != shape:
            raise ValueError(
                f"MaskedLinear got a mask {tuple(packed.shape)}; expected the weight's shape {tuple(shape)}"
            )
        self._words, self._density, self._found, self._places = packed.words, None, None, None


def mask_linears_(module: nn.Module, masks: Mapping[str, MaskLike]) -> nn.Module:
    """Make linear layers inside ``module`` masked ones, each where it is; gives ``module``.

    The layers stay the same objects in another class, so parameters, hooks, attributes, ``accelerate``'s hooks, and
    whatever else refers to them stay too. ``unmask_linears_`` is the inverse.

    Args:
        module: an ``nn.Linear`` (its weight is called ``"weight"``), or anything that holds such layers, or masked
            ones, which get the new mask.
        masks: weight name as in ``module.state_dict()`` (``"layers.0.q_proj.weight"``) -> mask of the weight's shape.

    Raises:
        ValueError: a name is not the weight of a linear layer (a subclass, and what is quantised or sharded, is not
            one), something else owns the weight (``torch.nn.utils.prune``, a weight or spectral norm, a
            parametrisation), or a shape does not fit; nothing has been changed then.
    """
    packed, layers = {name: as_packed(mask) for name, mask in masks.items()}, dict(module.named_modules())
    masked: dict[str, nn.Linear] = {}
    for name, mask in packed.items():
        path, _, last = name.rpartition(".")
        layer = layers.get(path)
        refusal = _why_not(layer) if last == "weight" else f"{_class(layer)} is; expected the weight of an nn.Linear"
        if refusal is not None:
            raise ValueError(f"mask_linears_ got {name!r}, where {refusal}")
        assert isinstance(layer, nn.Linear)
        masked[name], shape = layer, (layer.out_features, layer.in_features)
        if mask.shape != shape:
            raise ValueError(f"mask_linears_ got a mask {tuple(mask.shape)} for {name}; expected {shape}")
    for name, mask in packed.items():
        layer = masked[name]
        if not isinstance(layer, MaskedLinear):
            _become(layer, MaskedLinear)
        layer.set_mask_(mask)
    return module


def unmask_linears_(module: nn.Module) -> nn.Module:
    """Make the masked layers inside ``module`` (and itself) plain ``nn.Linear`` ones again; gives ``module``.

    The inverse of ``mask_linears_``: the layers stay the same objects, with their parameters, hooks and attributes, and
    with zeros where they were pruned. What only knows ``nn.Linear`` (``quantize_dynamic``, torchao, an exporter) takes
    them then, and nothing keeps the zeros any more: ``masks_of`` and ``save_masks`` come before.

    Raises:
        ValueError: a masked layer has been made a subclass, by a parametrisation or by sharding; nothing has been
            changed then.
    """
    masked = {path: layer for path, layer in module.named_modules() if isinstance(layer, MaskedLinear)}
    for path, layer in masked.items():
        if type(layer) is not MaskedLinear:
            raise ValueError(
                f"unmask_linears_ got {path!r}, where {_class(layer)} is; expected a MaskedLinear itself, without a "
                "parametrisation and not sharded"
            )
    for layer in masked.values():
        layer.apply_mask_()
        _become(layer, nn.Linear)
        for name in _STATE:
            layer.__dict__.pop(name, None)
    return module


def is_masked(module: nn.Module) -> bool:
    """Whether there are masked layers inside ``module`` and all of them hold zeros where they are pruned, now.

    It only reads. ``forward`` and ``state_dict()`` set to zero what somebody has written there; until then whoever
    reads the parameters themselves may find something. A sync point on a GPU.
    """
    masked = [layer for layer in module.modules() if isinstance(layer, MaskedLinear)]
    return bool(masked) and not any(map(_filled, masked))


def assert_masked(module: nn.Module) -> None:
    """Nothing if ``is_masked(module)``.

    Raises:
        ValueError: names the masked layers with pruned weights that are not zero, and how many; or there is no masked
            layer.
    """
    masked = {path: layer for path, layer in module.named_modules() if isinstance(layer, MaskedLinear)}
    if not masked:
        raise ValueError(f"assert_masked found no MaskedLinear in a {type(module).__name__}; expected at least one")
    filled = {f"{path}.weight".lstrip("."): count for path, layer in masked.items() if (count := _filled(layer))}
    if filled:
        named = ", ".join(f"{count} of {name}" for name, count in list(filled.items())[:3])
        more = f" and of {len(filled) - 3} layers more" if len(filled) > 3 else ""
        raise ValueError(
            f"assert_masked found non-zero pruned weights ({named}{more}); expected zeros: something has written there "
            "since the last forward pass, and apply_mask_() of the layer, a forward pass or state_dict() clears them"
        )


# --- one layer ----------------------------------------------------------------------------------------------------

_PASSING = ("_own", "_trusted", "_density", "_found", "_places")  # what a MaskedLinear finds anew
_STATE = ("_words", "_stripe", *_PASSING)  # what it has beside an nn.Linear's attributes


def _filled(layer: MaskedLinear) -> int:
    """How many pruned weights are not zero, of what this process holds."""
    weight, mask = layer._parameters.get("weight"), layer.mask
    if weight is None or weight.is_meta or weight.shape != mask.shape:
        return 0
    held, mask = local(weight), mask.part_of(weight)
    words = PackedMask.from_nonzero(held).words & ~mask.words
    return PackedMask(words, mask.shape).count() if held.numel() else 0


def _trusts(weight: Tensor) -> bool:
    """Whether one pass over a weight is no small part of a product, so that what was looked through is trusted."""
    return weight.is_cuda


def _is_captured(weight: Tensor) -> bool:
    """Whether what runs on ``weight`` now is recorded, to be replayed later without asking."""
    return weight.is_cuda and torch.cuda.is_current_stream_capturing()


def _writable(weight: Tensor) -> Any:
    """Where ``weight`` may be written to: an inference tensor only in inference mode."""
    return torch.inference_mode() if weight.is_inference() else contextlib.nullcontext()


def _class(layer: nn.Module | None) -> str:
    return "nothing" if layer is None else type(layer).__qualname__


def _why_not(layer: nn.Module | None) -> str | None:
    """Why ``layer`` cannot become a masked one: what is there, and what was expected; None if it can."""
    expected = "; expected the weight of an nn.Linear inside"
    if not isinstance(layer, nn.Linear):
        within = [name for name, child in layer.named_children() if isinstance(child, nn.Linear)] if layer else []
        hint = f" (it wraps {', '.join(within[:3])}, whose weights may be named)" if within else ""
        return f"{_class(layer)} is{expected}{hint}"
    if (owner := _owner(layer)) is not None:
        return f"{owner} owns the weight{expected} that is its own parameter: make what {owner} does permanent first"
    if type(layer) is not nn.Linear and not isinstance(layer, MaskedLinear):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        return f"{kind} is{expected}: a masked layer would lose what this subclass of it does"
    weight = layer._parameters["weight"]
    if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
        kind = f"{type(weight).__qualname__} of {weight.dtype}"
        return f"the weight is a {kind}{expected} in plain floats: mask it before it is quantised or sharded"
    return None


def _owner(layer: nn.Linear) -> str | None:
    """What makes the layer's weight in its place: a parametrisation, or a hook (pruning, weight or spectral norm)."""
    if parametrize.is_parametrized(layer):
        made = [type(step) for steps in layer.parametrizations.values() for step in steps]
    elif layer._parameters.get("weight") is None:
        made = [
            type(hook) for hook in layer._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn")
        ]
    else:
        return None
    return ", ".join(f"{kind.__module__}.{kind.__qualname__}" for kind in made) or "something else"


def _become(layer: nn.Linear, kind: type[nn.Linear]) -> None:
    """Make ``layer`` one of another class, and with it methods of the old one that somebody has kept in it."""
    for name, value in list(vars(layer).items()):  # such as accelerate's ``_old_forward``
        if _is_method_of(layer, value):
            layer.__dict__[name] = types.MethodType(getattr(kind, value.__name__), layer)
    layer.__class__ = kind


def _is_method_of(layer: nn.Linear, value: Any) -> bool:
    own = isinstance(value, types.MethodType) and value.__self__ is layer
    return own and getattr(type(layer), value.__name__, None) is value.__func__


def _twin(layer: nn.Linear, kind: type[_Linear]) -> _Linear:
    """A layer of another class with the parameters, hooks and attributes of ``layer``."""
    replaced = vars(layer).get("forward")
    if replaced is not None and not _is_method_of(layer, replaced):
        raise ValueError(
            f"{kind.__name__} got a layer whose forward is replaced by {getattr(replaced, '__qualname__', replaced)}; "
            "expected one without, or mask_linears_ and unmask_linears_, which change a layer where it is"
        )
    twin = object.__new__(kind)
    for name, value in vars(layer).items():
        if name not in _STATE and not _is_method_of(layer, value):
            twin.__dict__[name] = copy.copy(value) if isinstance(value, dict | set) else value
    for hooks in vars(twin).values():
        for number, hook in list(hooks.items()) if isinstance(hooks, dict) else ():
            if getattr(hook, "with_module", False):  # torch's wrapper of a state-dict hook, which holds its module
                hooks[number] = copy.copy(hook)
                hooks[number].module = weakref.ref(twin)
    return twin
