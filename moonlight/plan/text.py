"""What a recipe would do on N processes: which rule and which rank each parameter gets, state per rank, bytes per step.

Nothing is trained and no memory is taken: the model is built dry, one pipeline stage after the other.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from moonlight import mapping
from moonlight.config import Run
from moonlight.dry_run import dry_run
from moonlight.flops import count_parameters, train_flops_per_token
from moonlight.model.shards import pieces, sharded_state
from moonlight.optim.data_parallel import place
from moonlight.optim.parameters import Parameter, data_parallel_group, find_parameters
from moonlight.optim.partition import Fragment
from moonlight.optim.routing import matrix_heights, rules_of
from moonlight.optim.shares import Share, adamw_share, shares
from moonlight.timeline import Timeline

WIDE = 200
"""Columns where there is no terminal to fit: one line for each parameter."""

LONGEST_LIST = 14
"""Characters of a list of ranks."""


@dataclass(frozen=True)
class Line:
    """One parameter of the whole model."""

    key: str
    """Name in checkpoints."""
    shape: tuple[int, ...]
    algorithm: str
    decay: bool
    matrices: dict[tuple[int, int], int]
    """Shape -> count of what is orthogonalised; empty for AdamW."""
    owners: tuple[int, ...]
    """Ranks of its data-parallel group (for experts, of their own) that own rows of it."""


@dataclass(frozen=True)
class Plan:
    """The whole recipe."""

    run: Run
    lines: list[Line]
    ranks: list[Share]
    """Of every rank of the world."""
    adamw: list[Share]
    """The same under AdamW with sharded state (ZeRO-1)."""
    num_router_biases: int

    def num_parameters(self, algorithm: str) -> int:
        """Elements that one algorithm updates."""
        return sum(math.prod(line.shape) for line in self.lines if line.algorithm == algorithm)

    @property
    def num_matrices(self) -> int:
        """Matrices that Muon orthogonalises in a step."""
        return sum(sum(line.matrices.values()) for line in self.lines)


def make_plan(run: Run, world_size: int) -> Plan:
    """Plan a recipe for `world_size` processes.

    Raises:
        UserError: the layout or the batch does not divide the processes.
    """
    run.check_batches(world_size)
    stages = run.parallel.pipeline_parallel_size
    lines: list[Line] = []
    ranks: list[Share] = []
    adamw: list[Share] = []
    for stage in range(stages):
        with dry_run(run, world_size, stage * world_size // stages) as models:
            parameters = find_parameters(sharded_state(models), rules_of(run.optimizer, run.model))
            lanes, baselines = [], []
            owners: dict[int, set[int]] = {}
            for expert in (False, True):
                own = [parameter for parameter in parameters if parameter.is_expert == expert]
                size = data_parallel_group(expert).size()
                buckets = place(own, size, run.parallel.bucket_size)
                fragments = [fragment for _, found in buckets for fragment in found]
                _add_owners(owners, fragments)
                twice = {parameter.index: parameter.model.numel() for parameter in own if parameter.on_two_stages}
                lanes.append(shares(fragments, size, run, twice))
                numel = sum(parameter.model.numel() for parameter in own)
                baselines.append([adamw_share(numel, size, run, sum(twice.values()))] * size)
            lines += [_line(parameter, owners[parameter.index]) for parameter in parameters if not parameter.is_copy]
        ranks += of_world(run, world_size, lanes)
        adamw += of_world(run, world_size, baselines)
    biases = sum(math.prod(row.shape) for row in mapping.table(run.model) if row.parts[0].kind == "bias")
    return Plan(run, lines, ranks, adamw, biases)


def _add_owners(owners: dict[int, set[int]], fragments: Iterable[Fragment]) -> None:
    for fragment in fragments:
        owners.setdefault(fragment.parameter, set()).add(fragment.owner)


def _line(parameter: Parameter, owners: set[int]) -> Line:
    shape, rule = tuple(pieces(parameter.sharded)[0].global_shape), parameter.rule
    heights = matrix_heights(rule, shape) if rule.algorithm == "muon" else []
    matrices = Counter((height, shape[-1]) for height in heights)
    return Line(parameter.key, shape, rule.algorithm, rule.decay, dict(matrices), tuple(sorted(owners)))


def of_world(run: Run, world_size: int, lanes: Sequence[Sequence[Share]]) -> list[Share]:
    """Of every rank of one pipeline stage: its dense and its expert share together, in Megatron's order of ranks."""
    parallel = run.parallel
    dense, expert = lanes
    inner = parallel.expert_tensor_parallel_size * parallel.expert_parallel_size
    found = []
    for rank in range(world_size // parallel.pipeline_parallel_size):
        d, e = dense[rank // parallel.tensor_parallel_size], expert[rank // inner]
        found.append(Share(d.sent + e.sent, d.received + e.received, d.state + e.state))
    return found


def print_plan(plan: Plan, *, parameters: bool, console: Console | None = None) -> None:
    """The summary and, if asked for, before it a table of every parameter.

    Into a file or a pipe goes one line for each parameter; on a terminal, layers are headings, so that names fit.
    """
    console = console or Console()
    wide = not console.is_terminal
    if wide:
        console.width = WIDE
    if parameters:
        table = Table("parameter", "shape", "rule", "decay", "matrices", "owner", box=None, padding=(0, 1, 0, 0))
        table.columns[0].overflow = "fold"
        layer = ""
        for line in plan.lines:
            name = line.key
            if not wide and (found := re.match(r"decoder\.layers\.\d+\.", name)):
                if found[0] != layer:
                    layer = found[0]
                    table.add_row(layer)
                name = "  " + name.removeprefix(layer)
            matrices = (", " if wide else "\n").join(f"{n} of {_shape(shape)}" for shape, n in line.matrices.items())
            decay = "yes" if line.decay else "no"
            table.add_row(name, _shape(line.shape), line.algorithm, decay, matrices, ranges(line.owners))
        console.print(table)
        console.print("owner: among data-parallel ranks; for experts, among expert-data-parallel ranks\n")
    for text in summary(plan):
        console.print(text, soft_wrap=True, highlight=False)


def summary(plan: Plan) -> list[str]:
    """Parameters, arithmetic, optimizer state and bytes of a step, one line each."""
    run, counts, length = plan.run, count_parameters(plan.run.model), plan.run.data.sequence_length
    flops = train_flops_per_token(run.model, length)
    timeline = Timeline(run)
    tokens = timeline.num_sequences * length
    muon, adamw = plan.num_parameters("muon"), plan.num_parameters("adamw")
    state, base_state = [r.state for r in plan.ranks], max(a.state for a in plan.adamw)
    wire, base_wire = [max(r.sent, r.received) for r in plan.ranks], max(a.sent for a in plan.adamw)
    mean_state, mean_wire = sum(state) / len(state), sum(wire) / len(wire)
    return [
        f"on {len(plan.ranks)} processes",
        f"parameters: {muon + adamw + plan.num_router_biases:,}: Muon {muon:,} in {plan.num_matrices:,} matrices, "
        f"AdamW {adamw:,}, router biases {plan.num_router_biases:,}",
        f"activated by a token: {counts.activated_with_head:,}, without the head {counts.activated:,}",
        f"training: {flops:.4g} FLOPs per token at sequence length {length:,}; {tokens:,} tokens and "
        f"{flops * tokens:.3g} FLOPs in {timeline.num_steps:,} steps",
        f"optimizer state of a rank: {_gb(max(state))} at most, {_gb(mean_state)} on average; "
        f"AdamW (ZeRO-1): {_gb(base_state)}{_ratio(max(state), base_state)}",
        f"sent or received (the larger) by a rank in a step: {_gb(max(wire))} at most, {_gb(mean_wire)} on average; "
        f"AdamW (ZeRO-1): {_gb(base_wire)}{_ratio(max(wire), base_wire)}",
    ]


def ranges(ranks: Sequence[int]) -> str:
    """Rising numbers in short: 0-3,7; or, were that long, how many lie from the first to the last: 20 in 0-63."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][1] == rank - 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
    return text if len(text) <= LONGEST_LIST else f"{len(ranks)} in {ranks[0]}-{ranks[-1]}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _gb(count: float) -> str:
    """Bytes each way, or kept, in units of 10^9 or 10^6."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def _ratio(count: float, base: float) -> str:
    return f", a ratio of {count / base:.3f}" if base else ""
