"""Muon as a plain torch optimizer over whole matrices, in one process (arXiv 2502.16982, Algorithm 1).

Any model can use it: matrices in groups with the algorithm "muon", everything else in groups with "adamw".
"""

import difflib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moonlight.optim.newton_schulz import COEFFICIENTS, orthogonalize_all
from moonlight.optim.update_rules import (
    RMS_MATCHINGS,
    adamw_updates,
    apply_updates,
    can_fuse,
    normalize_rms_,
    rms_match_scale,
    update_momentum_norms,
)

ELEMENTS_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}
"""Most elements whose updates exist at the same time, but for a single larger matrix; on a CPU, what caches hold."""

ALGORITHMS = ("muon", "adamw")
_SCALE_SETTINGS = ("rms_match", "rms_matching", "hidden_size")
WEIGHT_DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class _Part:
    """A parameter, or some matrices of a stack, as views: what is updated at once."""

    weight: torch.Tensor
    gradient: torch.Tensor
    state: dict[str, torch.Tensor]
    group: dict[str, Any]


class Muon(torch.optim.Optimizer):
    """W <- W - lr (rms_match sqrt(max(rows, columns)) O + weight_decay W), O the orthogonalised momentum.

    A parameter [rows, columns] is one matrix, [count, rows, columns] a stack of matrices, and a convolution kernel
    [out, in, height, width] the matrix [out, in * height * width]. A parameter group may override every argument and
    choose `algorithm="adamw"`, which takes parameters of any shape. All values are read from the group at each step.

    Args:
        params: parameters, named parameters or parameter groups, float32 or bfloat16.
        lr: learning rate, for both algorithms.
        weight_decay: decoupled decay, for both algorithms.
        momentum: mu in M <- mu M + G; M is float32 whatever the weight and the gradient are.
        nesterov: orthogonalise G + mu M rather than M.
        num_steps: Newton-Schulz steps.
        coefficients: a name in `newton_schulz.COEFFICIENTS`.
        rms_match: the factor that gives updates the RMS of AdamW's.
        rms_matching: how it does: "adjusted_lr" as above; "update_norm": rms_match O / RMS(O); "baseline": rms_match
            sqrt(hidden_size) O, whatever the shape (arXiv 2502.16982, 3.1).
        hidden_size: of the model; for "baseline" alone.
        dtype: of the Newton-Schulz iteration, torch.bfloat16 or torch.float32.
        betas, eps: of AdamW.

    Raises:
        ValueError: an argument, or a parameter of a group, that cannot be used.
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
        """Add a group, as torch's optimizers do; raises ValueError for what it cannot use."""
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
        """Load what `state_dict` returned; momenta stay float32 also for bfloat16 weights."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(keys, parameters, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if isinstance(value, torch.Tensor):  # torch has rounded it to the dtype of the weight
                    self.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Parts with one key are computed together, across groups: they may differ in lr and decay only.
        together: dict[tuple[Any, ...], list[_Part]] = {}
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
                together.setdefault((*key, parameter.device, parameter.dtype), []).extend(parts)
        for (algorithm, *_), parts in together.items():
            for chunk in _chunks(parts):
                if algorithm == "muon":
                    _apply(chunk, _muon_updates(chunk), _muon_scale(chunk[0]))
                else:
                    _apply(chunk, self._adamw_updates(chunk), 1.0)
        return loss

    def _muon_parts(self, parameter: torch.Tensor, group: dict[str, Any]) -> Iterator[_Part]:
        """The parameter, or runs of matrices of a stack, none above ELEMENTS_AT_ONCE where that is possible."""
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter, dtype=torch.float32)
        momentum, gradient = state["momentum"], parameter.grad
        assert gradient is not None
        limit = ELEMENTS_AT_ONCE[parameter.device.type]
        count = max(1, limit // parameter[0].numel()) if parameter.dim() == 3 else len(parameter)
        for start in range(0, len(parameter), count):
            cut = slice(start, start + count)
            yield _Part(parameter[cut], gradient[cut], {"momentum": momentum[cut]}, group)

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
            [part.gradient.float() for part in parts],
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
    """A parameter or its direction as [..., rows, columns]."""
    return tensor.flatten(1) if tensor.dim() == 4 else tensor


def _muon_updates(parts: list[_Part]) -> list[torch.Tensor]:
    """The orthogonal updates of parts with one shape of matrices and one setting, in the dtype of the iteration."""
    group = parts[0].group
    rows, columns = _matrices(parts[0].weight).shape[-2:]
    directions, norms = update_momentum_norms(
        [part.gradient for part in parts],
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
    """Update weights of one dtype by scale * updates; bfloat16 weights are rounded once, at the end."""
    by_rate: dict[tuple[float, float], list[int]] = {}
    for index, part in enumerate(parts):
        by_rate.setdefault((float(part.group["lr"]), part.group["weight_decay"]), []).append(index)
    for (learning_rate, weight_decay), indices in by_rate.items():
        weights, own = [parts[index].weight for index in indices], [updates[index] for index in indices]
        # Scaling the rate rather than the updates saves a pass over them; the decay is scaled back.
        rates = {"learning_rate": learning_rate * scale, "weight_decay": weight_decay / scale}
        if weights[0].dtype is torch.float32 and can_fuse([*weights, *own]):
            _apply_fused(weights, own, rates)
            continue
        exact = [weight.float() for weight in weights]
        apply_updates(exact, own, **rates)
        if weights[0].dtype is not torch.float32:
            torch._foreach_copy_(weights, exact)


def _apply_fused(weights: list[torch.Tensor], updates: list[torch.Tensor], rates: dict[str, float]) -> None:
    from moonlight.kernels.muon_update import fused_weight_update

    for weight, update in zip(weights, updates, strict=True):
        fused_weight_update(None, weight, None, update, factor=1.0, **rates)


def _chunks(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Consecutive parts, together at most ELEMENTS_AT_ONCE, but at least one."""
    limit = ELEMENTS_AT_ONCE[parts[0].weight.device.type]
    chunk: list[_Part] = []
    elements = 0
    for part in parts:
        if chunk and elements + part.weight.numel() > limit:
            yield chunk
            chunk, elements = [], 0
        chunk.append(part)
        elements += part.weight.numel()
    if chunk:
        yield chunk


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return f"parameter {index} ({names[index]})" if names else f"parameter {index}"


def _check_parameter(parameter: torch.Tensor, name: str, algorithm: str) -> None:
    shape = list(parameter.shape)
    if algorithm == "muon" and parameter.dim() not in (2, 3, 4):
        raise ValueError(
            f"{name} of a muon group has shape {shape}: accepted are a matrix (2-D), a stack of matrices (3-D) or a "
            'convolution kernel (4-D); put others into a group with algorithm="adamw"'
        )
    if parameter.dtype not in WEIGHT_DTYPES:
        raise ValueError(f"{name} with shape {shape} has dtype {parameter.dtype}: accepted are {WEIGHT_DTYPES}")


def _check_names(group: dict[str, Any], known: dict[str, Any]) -> None:
    """Groups may hold what schedulers put there, but no misspelt setting, which would silently not count."""
    for name in group.keys() - known.keys() - {"params", "param_names", "initial_lr", "max_lr", "min_lr"}:
        if near := difflib.get_close_matches(str(name), known, n=1):
            raise ValueError(f"a group has {name!r}: did you mean {near[0]!r}?")


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
    whole = isinstance(size, int) and not isinstance(size, bool) and size >= needed
    require("hidden_size", whole, f"an integer of at least {int(needed)}{' for baseline' * needed}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_fraction(value: object) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1
