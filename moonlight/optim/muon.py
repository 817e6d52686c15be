"""Muon as a plain torch optimizer for full matrices in one process (arXiv 2502.16982, Algorithm 1).

Any model can use it: put matrices into parameter groups with algorithm "muon", and all other parameters into groups
with "adamw".
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moonlight.optim.newton_schulz import COEFFICIENTS, WORKSPACE_ELEMENTS, orthogonalize_all
from moonlight.optim.update_rules import (
    RMS_MATCHINGS,
    adamw_updates,
    apply_updates,
    batch_by_elements,
    can_fuse,
    normalize_rms_,
    rms_match_scale,
    update_momentum_norms,
)

ALGORITHMS = ("muon", "adamw")
_SCALE_SETTINGS = ("rms_match", "rms_matching", "hidden_size")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class _Part:
    """A parameter, or some matrices of a stack, as views."""

    weight: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]


class Muon(torch.optim.Optimizer):
    """W <- W - lr (rms_match sqrt(max(rows, columns)) O + weight_decay W), O the orthogonalized momentum.

    A parameter [rows, columns] is one matrix, [count, rows, columns] is a stack of matrices, and a convolution kernel
    [out, in, height, width] is the matrix [out, in * height * width]. A parameter group may override every argument and
    set `algorithm="adamw"`, which accepts parameters of any shape. Each step reads all values from the group.

    Args:
        params: parameters, named parameters or parameter groups, float32 or bfloat16.
        lr: learning rate of both algorithms.
        weight_decay: decoupled weight decay of both algorithms.
        momentum: mu in M <- mu M + G; M is float32 for any dtype of weight and gradient.
        nesterov: orthogonalize G + mu M instead of M.
        num_steps: number of Newton-Schulz steps.
        coefficients: a name in `newton_schulz.COEFFICIENTS`.
        rms_match: target RMS of the updates, close to that of AdamW's.
        rms_matching: how to reach it. "adjusted_lr": as above; "update_norm": rms_match O / RMS(O); "baseline":
            rms_match sqrt(hidden_size) O for any shape (arXiv 2502.16982, 3.1).
        hidden_size: of the model; used by "baseline" only.
        dtype: of the Newton-Schulz iteration, torch.bfloat16 or torch.float32.
        betas, eps: of AdamW.

    Raises:
        ValueError: an argument or a parameter of a group is invalid.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        num_steps: int = 5,
        coefficients: str = "moonlight",
        rms_match: float = 0.2,
        rms_matching: str = "adjusted_lr",
        hidden_size: int = 0,
        dtype: torch.dtype = torch.bfloat16,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        defaults = {
            "algorithm": "muon",
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "num_steps": num_steps,
            "coefficients": coefficients,
            "rms_match": rms_match,
            "rms_matching": rms_matching,
            "hidden_size": hidden_size,
            "dtype": dtype,
            "betas": betas,
            "eps": eps,
        }
        _check_settings(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as in torch's optimizers. Raises ValueError if the group is invalid."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_names(group, self.defaults)
            _check_settings(group)
            for index, parameter in enumerate(group["params"]):
                _check_parameter(parameter, _name(group, index), group["algorithm"])
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`. Momenta and moments stay float32, also for bfloat16 weights."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):  # torch has rounded it to the weight's dtype
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, and return the result of `closure`.

        Raises:
            ValueError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parts of all groups with one key are computed together: they differ in learning rate and decay only.
        parts_by_key: dict[tuple[Any, ...], list[_Part]] = {}
        for group in self.param_groups:
            for index, parameter in enumerate(group["params"]):
                if parameter.grad is None or parameter.numel() == 0:
                    continue
                if parameter.grad.is_sparse:
                    raise ValueError(f"{_name(group, index)} has a sparse gradient: only dense ones are accepted")
                if group["algorithm"] == "muon":
                    key = _muon_key(parameter, group)
                    parts = list(self._muon_parts(parameter, group))
                else:
                    parts = [self._adamw_part(parameter, group)]
                    key = ("adamw", self.state[parameter]["step"], *group["betas"], group["eps"])
                parts_by_key.setdefault((*key, parameter.device, parameter.dtype), []).extend(parts)
        for (algorithm, *_), parts in parts_by_key.items():
            for batch in _batches(parts):
                if algorithm == "muon":
                    _apply(batch, _muon_updates(batch), _muon_scale(batch[0]))
                else:
                    _apply(batch, self._adamw_updates(batch), 1.0)
        return loss

    def _muon_parts(self, parameter: torch.Tensor, group: dict[str, Any]) -> Iterator[_Part]:
        """Yield the parameter, or parts of a stack with at most WORKSPACE_ELEMENTS elements or one matrix each."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        momentum, grad = state["momentum"], parameter.grad
        assert grad is not None
        limit = WORKSPACE_ELEMENTS[parameter.device.type]
        count = max(1, limit // parameter[0].numel()) if parameter.dim() == 3 else len(parameter)
        for start in range(0, len(parameter), count):
            rows = slice(start, start + count)
            yield _Part(parameter[rows], grad[rows], {"momentum": momentum[rows]}, group)

    def _adamw_part(self, parameter: torch.Tensor, group: dict[str, Any]) -> _Part:
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        assert parameter.grad is not None
        return _Part(parameter, parameter.grad, state, group)

    @staticmethod
    def _adamw_updates(parts: list[_Part]) -> list[torch.Tensor]:
        (beta1, beta2), eps = parts[0].group["betas"], parts[0].group["eps"]
        return adamw_updates(
            [part.grad.float() for part in parts],
            [part.state["exp_avg"] for part in parts],
            [part.state["exp_avg_sq"] for part in parts],
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            step=int(parts[0].state["step"]),
            scale=1.0,
        )


def _muon_key(parameter: torch.Tensor, group: dict[str, Any]) -> tuple[Any, ...]:
    settings = ("momentum", "nesterov", "num_steps", "coefficients", *_SCALE_SETTINGS, "dtype")
    return ("muon", *(group[name] for name in settings), _matrices(parameter).shape[-2:])


def _muon_scale(part: _Part) -> float:
    rows, columns = _matrices(part.weight).shape[-2:]
    return rms_match_scale(rows, columns, *(part.group[name] for name in _SCALE_SETTINGS))


def _matrices(tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter or its direction as [..., rows, columns]."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def _muon_updates(parts: list[_Part]) -> list[torch.Tensor]:
    """Return orthogonal updates in the dtype of the iteration. All parts have one matrix shape and equal settings."""
    group = parts[0].group
    rows, columns = _matrices(parts[0].weight).shape[-2:]
    directions, norms = update_momentum_norms(
        [part.grad for part in parts],
        [part.state["momentum"] for part in parts],
        [rows * columns] * len(parts),
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        scale=1.0,
    )
    matrices = [_matrices(direction) for direction in directions]
    updates = orthogonalize_all(matrices, group["num_steps"], group["coefficients"], group["dtype"], norms)
    if group["rms_matching"] == "update_norm":
        normalize_rms_(updates)
    return [update.view(part.weight.shape) for update, part in zip(updates, parts, strict=True)]


def _apply(parts: list[_Part], updates: list[torch.Tensor], scale: float) -> None:
    """Update weights of one dtype by scale * updates; bfloat16 weights are rounded once, after the update."""
    by_rate: dict[tuple[float, float], list[int]] = {}
    for index, part in enumerate(parts):
        by_rate.setdefault((float(part.group["lr"]), part.group["weight_decay"]), []).append(index)
    for (learning_rate, weight_decay), indices in by_rate.items():
        weights, rate_updates = [parts[index].weight for index in indices], [updates[index] for index in indices]
        # Scaling the rate instead of the updates saves a pass over them; the decay is scaled back.
        rates = {"learning_rate": learning_rate * scale, "weight_decay": weight_decay / scale}
        if weights[0].dtype is torch.float32 and can_fuse([*weights, *rate_updates]):
            from moonlight.kernels.muon_update import fused_weight_update

            for weight, update in zip(weights, rate_updates, strict=True):
                fused_weight_update(None, weight, None, update, factor=1.0, **rates)
            continue
        exact = [weight.float() for weight in weights]
        apply_updates(exact, rate_updates, **rates)
        if weights[0].dtype is not torch.float32:
            torch._foreach_copy_(weights, exact)


def _batches(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Yield batches of consecutive parts, of at most WORKSPACE_ELEMENTS or one part each."""
    limit = WORKSPACE_ELEMENTS[parts[0].weight.device.type]
    return batch_by_elements(parts, lambda part: part.weight.numel(), limit)


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {index} ({names[index]})" if names else f"parameter {index}"


def _check_parameter(parameter: torch.Tensor, name: str, algorithm: str) -> None:
    shape = list(parameter.shape)
    if algorithm == "muon" and parameter.dim() not in (2, 3, 4):
        raise ValueError(
            f"{name} of a muon group has shape {shape}: accepted are a matrix (2-D), a stack of matrices (3-D) or a "
            'convolution kernel (4-D). Put other parameters into a group with algorithm="adamw"'
        )
    if parameter.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} with shape {shape} has dtype {parameter.dtype}: accepted are {WEIGHT_DTYPES}")


def _check_names(group: dict[str, Any], defaults: dict[str, Any]) -> None:
    """Reject misspelled settings, which would have no effect. Groups may hold other keys, such as a scheduler's."""
    for name in group.keys() - defaults.keys() - {"params", "param_names", "initial_lr", "max_lr", "min_lr"}:
        if matches := difflib.get_close_matches(str(name), defaults, n=1):
            raise ValueError(f"a group has {name!r}: did you mean {matches[0]!r}?")


def _check_settings(values: dict[str, Any]) -> None:
    def require(name: str, accepted: bool, text: str) -> None:
        if not accepted:
            raise ValueError(f"{name} is {values[name]!r}: it must be {text}")

    for name in ("lr", "weight_decay"):
        require(name, _is_number(values[name]) and values[name] >= 0, "a finite number, at least 0")
    for name in ("rms_match", "eps"):
        require(name, _is_number(values[name]) and values[name] > 0, "a finite number above 0")
    require("momentum", _is_fraction(values["momentum"]), "at least 0 and less than 1")
    betas = values["betas"]
    pair = isinstance(betas, tuple | list) and len(betas) == 2 and all(map(_is_fraction, betas))
    require("betas", pair, "two numbers, each at least 0 and less than 1")
    steps = values["num_steps"]
    require("num_steps", isinstance(steps, int) and not isinstance(steps, bool) and steps > 0, "an integer above 0")
    require("nesterov", isinstance(values["nesterov"], bool), "True or False")
    for name, choices in (
        ("algorithm", ALGORITHMS),
        ("coefficients", tuple(COEFFICIENTS)),
        ("rms_matching", RMS_MATCHINGS),
        ("dtype", WEIGHT_DTYPES),
    ):
        require(name, values[name] in choices, f"one of {', '.join(map(str, choices))}")
    size, needed = values["hidden_size"], values["rms_matching"] == "baseline"
    is_valid = isinstance(size, int) and not isinstance(size, bool) and size >= needed
    require("hidden_size", is_valid, f"an integer of at least {int(needed)}{' for baseline' * needed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1
