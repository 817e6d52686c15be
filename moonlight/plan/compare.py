"""Comparison of a plan with a dry run, which counts the real model and optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from moonlight.plan.build import RunPlan
from moonlight.plan.comm_counter import CommStats
from moonlight.plan.dry_run import DryRunCounts
from moonlight.plan.text import format_bytes

TOLERANCE = 0.01
"""Maximum relative difference of optimizer state and of the exchange of gradients and weights."""


@dataclass(frozen=True)
class PlanCheck:
    """One quantity, as planned and as counted."""

    name: str
    planned: float
    counted: float
    tolerance: float | None
    """Maximum relative difference; None: printed only, not checked."""

    @property
    def difference(self) -> float:
        """Absolute difference relative to the counted value."""
        return abs(self.planned - self.counted) / max(1.0, abs(self.counted))

    @property
    def agrees(self) -> bool:
        return self.tolerance is None or self.difference <= self.tolerance


def compare_with_dry_run(plan: RunPlan, rank: int, counted: DryRunCounts) -> list[PlanCheck]:
    """Compare every quantity of one rank that both plan and dry run contain."""
    planned, memory, stage = plan.ranks[rank], plan.memories[rank], plan.rank_stage(rank)
    optimizer_cost = planned.optimizer_cost
    checks = [
        PlanCheck("parameters of the rank", stage.num_elements, counted.num_parameters, 0.0),
        PlanCheck("weights", stage.weights, counted.weights, 0.0),
        PlanCheck("buffers", stage.buffers, counted.buffers, TOLERANCE),
        PlanCheck("gradient sums", stage.gradient_sums, counted.gradient_sums, 0.0),
        PlanCheck("gradient shards", planned.gradient_shards, counted.gradient_shards, TOLERANCE),
        PlanCheck("optimizer state", optimizer_cost.state, counted.optimizer, TOLERANCE),
        PlanCheck("all of it between steps", memory.state, counted.all_state, TOLERANCE),
        PlanCheck("exchange buffers", planned.exchange_buffers, counted.exchange_buffers, None),
        PlanCheck("workspace of the update", planned.update, counted.update, None),
    ]
    # The plan counts gradients that tensor-parallel peers sum as slices.
    peers = [counted.gradient_stats[group] for group in ("slices", "expert slices")]
    summed = sum(stats.sent for stats in peers), sum(stats.received for stats in peers)
    gradients, matrices = _totals(counted.gradient_stats), _totals(counted.matrix_stats)
    slices = planned.dense.slices + planned.expert.slices
    for name, comm_bytes, (sent, received) in (
        ("gradients", optimizer_cost.gradients, (gradients[0] - summed[0], gradients[1] - summed[1])),
        ("matrices and slices", optimizer_cost.matrices + slices, (matrices[0] + summed[0], matrices[1] + summed[1])),
        ("weights", optimizer_cost.weights, _totals(counted.weight_stats)),
    ):
        checks.append(PlanCheck(f"{name} sent", comm_bytes.sent, sent, TOLERANCE))
        checks.append(PlanCheck(f"{name} received", comm_bytes.received, received, TOLERANCE))
    return checks


def print_checks(checks: list[PlanCheck], rank: int, console: Console) -> None:
    """Print plan and dry run side by side."""
    table = Table(f"dry run of rank {rank:,}", "plan", "counted", "difference", "", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify = "right"
    for check in checks:
        is_count = check.name.startswith("parameters")
        numbers = [f"{value:,.0f}" if is_count else format_bytes(value) for value in (check.planned, check.counted)]
        verdict = "unchecked" if check.tolerance is None else "" if check.agrees else "DIFFERS"
        table.add_row(check.name, *numbers, f"{check.difference:.2%}", verdict)
    console.print()
    console.print(table, highlight=False)
    verdict = "the plan agrees with the dry run"
    if differing := [check.name for check in checks if not check.agrees]:
        verdict = f"the plan differs from the dry run: {', '.join(differing)}"
    console.print(
        f"{verdict}. The dry run counts the real model and optimizer on meta tensors and a fake process group. It "
        "omits forward and backward pass and the gradient norm.",
        highlight=False,
    )


def checks_to_json(checks: list[PlanCheck], rank: int) -> dict[str, Any]:
    """Return the numbers of the table by name, for `--json`."""
    return {
        "rank": rank,
        "agrees": all(check.agrees for check in checks),
        "figures": {
            check.name.replace(" ", "_"): {
                "planned": check.planned,
                "counted": check.counted,
                "relative_difference": check.difference,
            }
            for check in checks
        },
    }


def _totals(stats: Mapping[str, CommStats]) -> tuple[float, float]:
    """Return bytes (sent, received) summed over groups."""
    return sum(group.sent for group in stats.values()), sum(group.received for group in stats.values())
