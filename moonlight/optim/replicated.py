"""The optimizer of a run, with its whole state on every data-parallel rank.

Each parameter of this rank has a float32 master copy (the parameter itself, if it is float32) and its momenta.
Gradients arrive reduced in `parameter.main_grad`. Data-parallel ranks repeat the same arithmetic on the same numbers,
so they stay equal without communication; only matrices cut by tensor parallelism are gathered, orthogonalised whole,
and cut again.
"""

from dataclasses import dataclass, replace

import moonlight.cpu  # noqa: F401  (stand-ins, before Megatron)

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from moonlight.config import Optimizer
from moonlight.model.shards import Pieces, Sharded, is_first_replica, pieces, pieces_of, sharded_state
from moonlight.optim.newton_schulz import orthogonalize_all
from moonlight.optim.routing import Rule, route

MOMENTA = {"muon": ("momentum",), "adamw": ("exp_avg", "exp_avg_sq")}


@dataclass
class _Parameter:
    """One parameter of this rank, with views that all share its memory layout."""

    sharded: Sharded
    model: torch.nn.Parameter
    master: torch.Tensor
    rule: Rule
    momenta: dict[str, torch.Tensor]

    def cut_axis(self) -> int | None:
        """The axis of its matrices, -2 or -1, along which tensor parallelism cuts them; None if it does not."""
        fragments = pieces(self.sharded)[0].axis_fragmentations
        whole = {-2: self.rule.num_matrices, -1: 1}
        return next((axis for axis, uncut in whole.items() if fragments[axis] > uncut), None)

    def tensor_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the slices of its matrices."""
        if getattr(self.model, "allreduce", True):
            return parallel_state.get_tensor_model_parallel_group()
        return parallel_state.get_expert_tensor_parallel_group()

    @property
    def gradient(self) -> torch.Tensor:
        return self.model.main_grad  # type: ignore[attr-defined]


class ReplicatedOptimizer:
    """Muon and AdamW over this rank's model chunks (arXiv 2502.16982, Algorithm 1 without its sharding)."""

    def __init__(self, models: list[GPTModel], config: Optimizer) -> None:
        self.config = config
        self.buffers: dict[str, Sharded] = {}
        state = sharded_state(models)
        parameters = {key: value for key, value in state.items() if isinstance(value.data, torch.nn.Parameter)}
        self.buffers = {key: value for key, value in state.items() if key not in parameters}
        rules = route(list(parameters))
        self.parameters: dict[str, _Parameter] = {}
        for key, sharded in parameters.items():
            rule = rules[key] if config.name == "muon" else replace(rules[key], algorithm="adamw")
            model = sharded.data
            master = model.detach() if model.dtype is torch.float32 else model.detach().float()
            momenta = {name: torch.zeros_like(master) for name in MOMENTA[rule.algorithm]}
            self.parameters[key] = _Parameter(sharded, model, master, rule, momenta)

    def master_state(self) -> dict[str, Pieces]:
        """Master weights and router biases, under the checkpoint's names. Call `take_state` after writing to it."""
        masters = {key: pieces_of(p.sharded, p.master) for key, p in self.parameters.items()}
        return masters | {key: pieces_of(sharded) for key, sharded in self.buffers.items()}

    def momentum_state(self) -> dict[str, Pieces]:
        """Momenta as whole tensors, under `optimizer.<momentum>.<parameter>`."""
        return {
            f"optimizer.{name}.{key}": pieces_of(p.sharded, momentum)
            for key, p in self.parameters.items()
            for name, momentum in p.momenta.items()
        }

    def take_state(self, state: dict[str, Pieces]) -> None:
        """Let the model follow `state`, the master state (with or without the momenta), after it was written to."""
        assert self.parameters.keys() <= state.keys()
        self._copy_masters_to_model()

    @torch.no_grad()
    def _copy_masters_to_model(self) -> None:
        """Round the master weights into the model."""
        for p in self.parameters.values():
            if p.model.dtype is not torch.float32:
                p.model.copy_(p.master)

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Norm of the whole gradient: every element counted on exactly one rank of the world."""
        total = torch.zeros((), dtype=torch.float64, device=torch.cuda.current_device())
        for p in self.parameters.values():
            if is_first_replica(p.sharded):
                total += p.gradient.norm(dtype=torch.float64) ** 2
        dist.all_reduce(total)
        return total.sqrt().item()

    @torch.no_grad()
    def step(self, learning_rate: float, step: int, gradient_norm: float) -> dict[str, torch.Tensor]:
        """Update the weights from the gradients, clipped to `clip_grad_norm`.

        Args:
            step: counted from 1; AdamW's bias correction depends on it.

        Returns:
            Per algorithm, the sum of squares and the count of the update's elements, for its RMS: [2] float64,
            over this rank's first replicas.
        """
        clip = self.config.clip_grad_norm
        scale = clip / (gradient_norm + 1e-6) if 0 < clip < gradient_norm else 1.0
        decay = 1 - learning_rate * self.config.weight_decay
        sums = {name: torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device()) for name in MOMENTA}
        muon = [p for p in self.parameters.values() if p.rule.algorithm == "muon"]
        updates = self._muon_updates(muon, scale)
        for p in self.parameters.values():
            update = next(updates) if p.rule.algorithm == "muon" else self._adamw_update(p, scale, step)
            p.master.mul_(decay).sub_(update, alpha=learning_rate)
            if is_first_replica(p.sharded):
                sums[p.rule.algorithm] += torch.stack(
                    [update.double().square().sum(), update.new_tensor(update.numel()).double()]
                )
        self._copy_masters_to_model()
        return sums

    def _adamw_update(self, p: _Parameter, scale: float, step: int) -> torch.Tensor:
        config, gradient = self.config, p.gradient * scale
        first = p.momenta["exp_avg"].lerp_(gradient, 1 - config.adamw_beta1)
        second = p.momenta["exp_avg_sq"].lerp_(gradient.square(), 1 - config.adamw_beta2)
        denominator = (second / (1 - config.adamw_beta2**step)).sqrt_().add_(config.adamw_eps)
        return first / (1 - config.adamw_beta1**step) / denominator

    def _muon_updates(self, parameters: list[_Parameter], scale: float):
        """0.2 * sqrt(max(rows, columns)) * orthogonalised momentum of every parameter, in order."""
        config = self.config
        wholes: list[torch.Tensor] = []
        for p in parameters:
            momentum = p.momenta["momentum"].mul_(config.momentum).add_(p.gradient, alpha=scale)
            direction = p.gradient * scale + config.momentum * momentum if config.nesterov else momentum
            wholes += [_gather(matrix, p) for matrix in _matrices(direction, p)]
        dtype = torch.bfloat16 if config.newton_schulz_dtype == "bfloat16" else torch.float32
        done = iter(orthogonalize_all(wholes, config.num_newton_schulz_steps, config.coefficients, dtype))
        for p in parameters:
            update = torch.empty_like(p.master)
            for part in _matrices(update, p):
                whole = next(done)
                part.copy_(_own_slice(whole, p)).mul_(config.rms_match * max(whole.shape[-2:]) ** 0.5)
            yield update


def _matrices(tensor: torch.Tensor, p: _Parameter) -> tuple[torch.Tensor, ...]:
    """The matrices stacked along the rows of a tensor laid out like `p`, as views."""
    return tensor.chunk(p.rule.num_matrices, dim=-2)


def _gather(matrix: torch.Tensor, p: _Parameter) -> torch.Tensor:
    """The whole of a matrix that tensor parallelism may have cut."""
    axis = p.cut_axis()
    if axis is None:
        return matrix
    group = p.tensor_parallel_group()
    slices = [torch.empty_like(matrix, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(slices, matrix.contiguous(), group=group)
    return torch.cat(slices, dim=axis)


def _own_slice(whole: torch.Tensor, p: _Parameter) -> torch.Tensor:
    """This rank's slice of a whole matrix."""
    axis = p.cut_axis()
    if axis is None:
        return whole
    group = p.tensor_parallel_group()
    return whole.chunk(group.size(), dim=axis)[group.rank()]
