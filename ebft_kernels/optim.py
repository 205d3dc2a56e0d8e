"""``MaskedAdamW``: AdamW that never moves a pruned weight from exactly zero.

Long, because a third of it says what each argument means, and a drop-in has all of ``AdamW``'s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ebft_kernels import sharding, updates
from ebft_kernels.adamw import AdamWStep
from ebft_kernels.functional import masked_grad_norm, take_step, take_step_on_product, words_of
from ebft_kernels.mask import MaskLike, PackedMask, as_packed
from ebft_kernels.states import MOMENT_KEYS, Layout, wide


class MaskedAdamW(torch.optim.Optimizer):
    """AdamW (arXiv 1711.05101) on the kept weights; pruned ones are exactly zero from the start and after every step.

    On kept weights it does what ``torch.optim.AdamW`` does, to rounding. The gradients may be anything, NaN included,
    where pruned. Parameters without a mask may be present. A state is a float32 number a weight or less:

    =================  =====================================================  ===============================
    ``weights``        parameters                                             bytes a weight, beside parameter
    =================  =====================================================  ===============================
    ``"fp32"``         float32 (or float64)                                   0
    ``"master"``       bfloat16 or float16, with a float32 master             4
    ``"stochastic"``   bfloat16, rounded stochastically (no master)           0
    =================  =====================================================  ===============================

    ``moments``: ``"fp32"`` 8 bytes, ``"bf16"`` 4, ``"int8"`` 2.03 (blocks of 256 with a scale; docs/layouts.md). With
    ``compact`` all of these are kept for surviving weights only. float32 parameters among 16-bit ones stay float32.

    With ``update_in_backward`` a masked matrix that ``masked_linear`` multiplies is updated as soon as the backward
    pass can make its gradient, which is never kept, on a GPU not even written; ``.grad`` stays None, ``step()``
    updates the rest. The input gradient uses the old weight. Refused, each in one sentence: more than one gradient
    before a step (accumulation, a parameter used twice), data parallelism, clipping by the global norm, and
    ``GradScaler``. If a backward pass fails half way, the next one fails too, until ``load_state_dict`` brings back a
    whole state. Under ``torch.compile`` gradients are made as usual.

    Sharded parameters (``DTensor``s: FSDP2's ``fully_shard``, tensor parallelism) are taken with states that can be
    sharded as they are: ``weights`` and ``moments`` in floats, not ``"stochastic"``, ``"int8"`` or ``compact``. The
    masks are whole on each process.

    Args:
        params: parameters or parameter groups.
        lr, betas, eps, weight_decay: as for ``torch.optim.AdamW``.
        masks: parameter -> PackedMask or bool mask of its shape (1 / True = kept).
        weights, moments, compact: the layout above; every combination is valid.
        seed: of the stochastic rounding, which depends on it, the step, the parameter's number and the place alone.
        zero_grads: set gradients to 0 in the pass of the step, for loops that keep them allocated.
        update_in_backward: update masked matrices during the backward pass.

    Raises:
        ValueError: a setting is out of range, or a mask has another shape or belongs to no parameter given.
            A parameter is sharded, and the layout cannot be; FSDP1 has flattened it.
        TypeError: a parameter's dtype does not go with ``weights``.
        RuntimeError: ``update_in_backward`` among several data-parallel processes.
    """

    _grad_scale: Tensor | None = None  # of the next step: the clip factor, on the device

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masks: Mapping[Tensor, MaskLike] | None = None,
        weights: str = "fp32",
        moments: str = "fp32",
        compact: bool = False,
        seed: int = 0,
        zero_grads: bool = False,
        update_in_backward: bool = False,
    ) -> None:
        for name, value, most in (
            ("lr", lr, None), ("eps", eps, None), ("weight_decay", weight_decay, None),
            ("betas[0]", betas[0], 1.0), ("betas[1]", betas[1], 1.0),
        ):  # fmt: skip
            if not 0 <= value < (most or float("inf")):
                raise ValueError(
                    f"MaskedAdamW got {name} = {value}; expected at least 0 and less than {most or 'infinity'}"
                )
        self._layout = Layout(weights, moments, compact)
        self._seed, self._zero_grads = seed, zero_grads
        self._in_backward = update_in_backward
        self._masks: dict[Tensor, PackedMask] = {}  # whole ones, also of sharded parameters
        self._parts: dict[Tensor, PackedMask] = {}  # of what this process holds
        self._updated: list[Tensor] = []  # in backward, since the last step
        if update_in_backward and (processes := _processes()) > 1:
            raise RuntimeError(
                f"MaskedAdamW(update_in_backward=True) got {processes} data-parallel processes; expected one, because "
                "gradients are used before they could be summed"
            )
        super().__init__(params, {"lr": lr, "betas": tuple(betas), "eps": eps, "weight_decay": weight_decay})
        for param, mask in (masks or {}).items():
            self.set_mask_(param, mask)

    @classmethod
    def for_module(cls, module: nn.Module, **settings: Any) -> MaskedAdamW:
        """For all parameters of ``module`` that require gradients, with the masks of its ``MaskedLinear`` layers."""
        params = [p for p in module.parameters() if p.requires_grad]
        _refuse_flattened(params)
        masks = {}
        for layer in module.modules():
            weight, mask = getattr(layer, "weight", None), getattr(layer, "mask", None)
            if isinstance(weight, Tensor) and isinstance(mask, PackedMask) and weight.requires_grad:
                masks[weight] = mask
        return cls(params, masks=masks, **settings)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As ``torch.optim.Optimizer``'s, with the dtypes checked."""
        super().add_param_group(param_group)
        for param in self.param_groups[-1]["params"]:
            self._layout.check_param(param)

    def mask_of(self, param: Tensor) -> PackedMask | None:
        """The mask of a parameter, or None; of all of it, if it is sharded."""
        mask = self._masks.get(param)
        if mask is not None and mask.device != param.device:  # the module has been moved
            mask = self._take_mask(param, mask.to(param.device))
        return mask

    @torch.no_grad()
    def set_mask_(self, param: Tensor, mask: MaskLike) -> None:
        """Take ``mask`` for ``param`` from now on: survivors keep their states, newcomers start at zero.

        8-bit moments of survivors are rounded anew where their blocks change.
        """
        packed = as_packed(mask).to(param.device)
        if all(param is not p for p in self._params()):
            raise ValueError(
                f"MaskedAdamW got a mask for a tensor {tuple(param.shape)} that is not among its parameters"
            )
        _refuse_flattened([param])
        if packed.shape != param.shape:
            raise ValueError(
                f"MaskedAdamW got a mask {tuple(packed.shape)}; expected {tuple(param.shape)}, the parameter's shape"
            )
        state = self.state.get(param, {})
        dense = {key: self._dense(param, key) for key in ("master", *MOMENT_KEYS) if key in state}
        self._take_mask(param, packed)
        if state:
            self._layout.note_rows(state, packed)
        for key, value in dense.items():
            self._layout.store(state, key, self._zero_pruned_(param, value), param, packed)
        self._zero_pruned_(param, param)

    def second_moment(self, param: Tensor) -> Tensor | None:
        """Of a parameter, in its shape, float32 (float64), 0 where nothing is stored; None before its first step."""
        if "exp_avg_sq" not in self.state.get(param, {}):
            return None
        return sharding.sharded_as(self._dense(param, "exp_avg_sq"), param)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Scale the next step's gradients so that their L2 norm over all kept entries is at most ``max_norm``.

        The factor stays on the device and goes into the next step; ``.grad`` is not touched. Of sharded parameters all
        processes have to call it.

        Returns:
            The norm before, a scalar on the gradients' device (no synchronisation).
        """
        if self._in_backward:
            raise RuntimeError(
                "MaskedAdamW(update_in_backward=True) cannot clip by the global norm, which is known only when all "
                "gradients are; expected a loop without clip_grad_norm_"
            )
        with_grad = [p for p in self._params() if p.grad is not None]
        if not with_grad:
            return torch.zeros(())
        groups: dict[Any, list[Tensor]] = {}  # in the order of the parameters, which is that of all processes
        for p in with_grad:
            groups.setdefault((p.dtype, _sharding(p)), []).append(p)
        norms = []
        for alike in groups.values():
            held = masked_grad_norm([_gradient(p) for p in alike], [self._held_mask(p) for p in alike])
            sharded = sharding.is_sharded(alike[0])
            norms.append(sharding.total(held.square(), alike[0]).sqrt() if sharded else held)
        norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
        self._grad_scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient; gives ``closure``'s loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(p.grad is not None for p in self._updated):
            raise RuntimeError(
                "MaskedAdamW(update_in_backward=True) got .grad of a weight that the backward pass has updated; "
                "expected it to be used by masked_linear alone"
            )
        self._updated = []
        for group in self.param_groups:
            with_grad = [p for p in group["params"] if p.grad is not None]
            for p in with_grad:
                self._begin(p)
            for (step, *_), params in _grouped(with_grad, self._goes_with):
                grads = [_gradient(p) for p in params]
                take_step(self._step_of(group, params, grads, step))
                for p, used in zip(params, grads, strict=True):
                    if self._zero_grads and used is not sharding.local(p.grad):  # the step took a copy
                        p.grad.zero_()
        self._grad_scale = None
        return loss

    @torch.no_grad()
    def update(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        """The step of ``weight`` (N, K) for the gradient dy^T x; the backward pass calls it
        (``update_in_backward``)."""
        if any(weight is p for p in self._updated):
            raise RuntimeError(
                f"MaskedAdamW(update_in_backward=True) got a second gradient of a weight {tuple(weight.shape)} before "
                "step(); expected one: no accumulation, no weight twice, no backward pass again after one that failed"
            )
        self._updated.append(weight)  # before it is touched: if this fails, it must not be done again
        self._begin(weight)
        group = next(group for group in self.param_groups if any(weight is p for p in group["params"]))
        take_step_on_product(dy, x, self._step_of(group, [weight], [], self.state[weight]["step"]))

    def _step_of(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], step: int) -> AdamWStep:
        """Step number ``step`` of parameters that go with each other: ``_goes_with``."""
        numbers, beta = self._numbers(), group["betas"]

        def states(key: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
            """A state of each; an empty tensor, one for all, where this layout has none."""
            nothing = torch.empty(0, dtype=dtype, device=params[0].device)
            return [sharding.local(self.state[p].get(key, nothing)) for p in params]

        return AdamWStep(
            params=[sharding.local(p) for p in params],
            grads=grads,
            exp_avgs=states("exp_avg"),
            exp_avg_sqs=states("exp_avg_sq"),
            exp_avg_scales=states("exp_avg_scale"),
            exp_avg_sq_scales=states("exp_avg_sq_scale"),
            masters=states("master"),
            words=[words_of(self._held_mask(p), sharding.local(p), "MaskedAdamW") for p in params],
            row_offsets=states("row_offsets", torch.int64),
            grad_scale=self._grad_scale,
            lr=float(group["lr"]),
            beta1=beta[0],
            beta2=beta[1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            step=step,
            stochastic=self._layout.rounds_stochastically(params[0]),
            seed=self._seed,
            param_ids=[numbers[p] for p in params],
            zero_grads=self._zero_grads,
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks first."""
        if self._in_backward:
            raise RuntimeError(
                "MaskedAdamW(update_in_backward=True) cannot scale the loss, because gradients are used before they "
                "are unscaled; expected no GradScaler"
            )
        return False

    def _goes_with(self, param: Tensor) -> tuple[Any, ...]:
        """Parameters for which this is the same take a step in one call."""
        state = self.state[param]
        return state["step"], str(param.device), str(param.dtype), "row_offsets" in state

    def _enter(self, param: Tensor) -> None:
        if self._in_backward and param.ndim == 2:
            updates.enter(param, self)

    def _numbers(self) -> dict[Tensor, int]:
        return {p: number for number, p in enumerate(self._params())}

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: getattr(self, name) for name in _KEPT}
        return {**super().__getstate__(), **kept, "_masks": self._masks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._updated, self._parts = [], {}
        for param in self._masks:
            self._enter(param)

    def state_dict(self) -> dict[str, Any]:
        """As ``torch.optim.Optimizer``'s, with the words of the masks among the states."""
        packed = super().state_dict()
        numbers = [number for group in packed["param_groups"] for number in group["params"]]
        for number, param in zip(numbers, self._params(), strict=True):
            if (mask := self.mask_of(param)) is not None:
                packed["state"][number] = {**packed["state"].get(number, {}), "mask": mask.words}
        return packed

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim.Optimizer``'s; a clip factor that no step has used goes with the gradients."""
        super().zero_grad(set_to_none)
        self._grad_scale = None

    # --- masks ----------------------------------------------------------------------------------------------------

    def _take_mask(self, param: Tensor, mask: PackedMask) -> PackedMask:
        self._masks[param] = mask
        self._parts.pop(param, None)
        self._enter(param)
        return mask

    def _held_mask(self, param: Tensor) -> PackedMask | None:
        """The mask of what this process holds of a parameter."""
        mask = self.mask_of(param)
        if mask is None or not sharding.is_sharded(param):
            return mask
        if param not in self._parts:
            self._parts[param] = mask.part_of(param)
        return self._parts[param]

    def _zero_pruned_(self, param: Tensor, tensor: Tensor) -> Tensor:
        """``tensor``, which is of a parameter's shape or what is held of it, with zeros where that is pruned."""
        mask = self._held_mask(param)
        if mask is not None:
            mask.zero_pruned_(sharding.local(tensor))
        return tensor

    # --- states ---------------------------------------------------------------------------------------------------

    def _params(self) -> Iterable[Tensor]:
        return (p for group in self.param_groups for p in group["params"])

    def _begin(self, param: Tensor) -> None:
        """Count a step; make the states before the first."""
        mask = self.mask_of(param)
        if mask is not None:
            _refuse_flattened([param])
        state = self.state[param]
        if "step" not in state:
            state["step"] = 0
            self._layout.begin(state, param, mask)
        state["step"] += 1

    def _dense(self, param: Tensor, key: str) -> Tensor:
        """A state as it is meant: float32 (float64) in the parameter's (local) shape, 0 where nothing is stored."""
        return self._layout.dense(self.state[param], key, param, self.mask_of(param))

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over settings, states and masks; the state of a plain ``torch.optim.AdamW`` is taken too.

        A parameter for which ``state_dict`` has no mask keeps the one it has. Pruned weights and moments are zeroed.
        A sharded parameter takes its part of a whole state.

        Raises:
            ValueError: the states have another layout (weights, moments, compact) than this optimizer.
        """
        self._updated = []
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        super().load_state_dict(
            state_dict
        )  # checks the groups; but casts all that a state holds to the parameter's dtype
        for number, param in zip(numbers, self._params(), strict=True):
            saved = {
                k: v.to(param.device, copy=True) if isinstance(v, Tensor) else v
                for k, v in state_dict["state"].get(number, {}).items()
            }
            for key in saved.keys() & {*MOMENT_KEYS, "master"}:
                if sharding.is_sharded(param) and saved[key].shape == param.shape:
                    held = saved[key] if sharding.is_sharded(saved[key]) else sharding.part_of(saved[key], param)
                    saved[key] = sharding.sharded_as(sharding.local(held), param)
            if "max_exp_avg_sq" in saved:
                raise ValueError("MaskedAdamW got a state dict of AMSGrad; expected one of AdamW")
            if (words := saved.pop("mask", None)) is not None:
                self._take_mask(param, PackedMask(words, param.shape))
            mask = self.mask_of(param)
            plain = isinstance(saved.get("step"), Tensor)  # torch's own counts steps in tensors
            if "step" in saved:
                saved["step"] = int(saved["step"])
            self.state.pop(param, None)
            if saved:
                self.state[param] = saved
            self._zero_pruned_(param, param)
            if plain and "exp_avg" in saved:  # dense, and in whatever dtype
                for key in MOMENT_KEYS:
                    dense = self._zero_pruned_(param, sharding.local(saved[key]).to(wide(param)))
                    self._layout.store(saved, key, dense, param, mask)
                self._layout.note_rows(saved, mask)
            self._layout.check(saved, param, mask)


_KEPT = ("_layout", "_seed", "_zero_grads", "_in_backward")  # of a copy


def _processes() -> int:
    """How many share the work."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gradient(param: Tensor) -> Tensor:
    """What this process holds of a parameter's gradient."""
    assert param.grad is not None
    grad: Any = param.grad
    if sharding.is_sharded(param) and grad.placements != param.placements:
        grad = grad.redistribute(placements=param.placements)
    return sharding.local(grad).contiguous()


def _sharding(param: Any) -> tuple[Any, ...]:
    return (param.device_mesh, param.placements) if sharding.is_sharded(param) else ()


def _refuse_flattened(params: list[Tensor]) -> None:
    for param in params:
        if getattr(param, "_fsdp_flattened", False):
            raise ValueError(
                f"MaskedAdamW got a parameter {tuple(param.shape)} that FullyShardedDataParallel has flattened; "
                "expected one in its own shape: use torch.distributed.fsdp.fully_shard, or torch.optim.AdamW"
            )


def _grouped(params: list[Tensor], key: Callable[[Tensor], Any]) -> Iterable[tuple[Any, list[Tensor]]]:
    """The parameters by ``key``, each group in its order."""
    return ((value, list(alike)) for value, alike in itertools.groupby(sorted(params, key=key), key=key))
