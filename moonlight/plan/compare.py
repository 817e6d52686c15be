"""A plan beside what a dry run counted on the real model and optimizer: each checks the other."""

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
"""Of optimizer state and of the exchange of gradients and weights."""


@dataclass(frozen=True)
class PlanCheck:
    """One figure of both."""

    name: str
    planned: float
    counted: float
    tolerance: float | None
    """Largest relative difference that is accepted; None: shown only."""

    @property
    def difference(self) -> float:
        """Relative to what was counted."""
        return abs(self.planned - self.counted) / max(1.0, abs(self.counted))

    @property
    def agrees(self) -> bool:
        return self.tolerance is None or self.difference <= self.tolerance


def compare_with_dry_run(plan: RunPlan, rank: int, counted: DryRunCounts) -> list[PlanCheck]:
    """Every figure that both know, of one rank."""
    member, memory, stage = plan.ranks[rank], plan.memories[rank], plan.rank_stage(rank)
    share = member.share
    rows = [
        PlanCheck("parameters of the rank", stage.num_elements, counted.num_parameters, 0.0),
        PlanCheck("weights", stage.weights, counted.weights, 0.0),
        PlanCheck("buffers", stage.buffers, counted.buffers, TOLERANCE),
        PlanCheck("gradient sums", stage.gradient_sums, counted.gradient_sums, 0.0),
        PlanCheck("gradient shards", member.gradient_shards, counted.gradient_shards, TOLERANCE),
        PlanCheck("optimizer state", share.state, counted.optimizer, TOLERANCE),
        PlanCheck("all of it between steps", memory.state, counted.all_state, TOLERANCE),
        PlanCheck("exchange buffers", member.exchange_buffers, counted.exchange_buffers, None),
        PlanCheck("workspace of the update", member.update, counted.update, None),
    ]
    # Gradients that tensor-parallel peers add up stand with the slices in the plan.
    peers = [counted.gradients_on_wire[group] for group in ("slices", "expert slices")]
    added = sum(wire.sent for wire in peers), sum(wire.received for wire in peers)
    gradients, matrices = _sums(counted.gradients_on_wire), _sums(counted.matrices_on_wire)
    slices = member.dense.slices + member.expert.slices
    for name, flow, (sent, received) in (
        ("gradients", share.gradients, (gradients[0] - added[0], gradients[1] - added[1])),
        ("matrices and slices", share.matrices + slices, (matrices[0] + added[0], matrices[1] + added[1])),
        ("weights", share.weights, _sums(counted.weights_on_wire)),
    ):
        rows.append(PlanCheck(f"{name} sent", flow.sent, sent, TOLERANCE))
        rows.append(PlanCheck(f"{name} received", flow.received, received, TOLERANCE))
    return rows


def print_comparison(rows: list[PlanCheck], rank: int, console: Console) -> None:
    """Plan and dry run side by side."""
    table = Table(f"dry run of rank {rank:,}", "plan", "counted", "difference", "", box=None, padding=(0, 2, 0, 0))
    for column in table.columns[1:4]:
        column.justify = "right"
    for row in rows:
        is_count = row.name.startswith("parameters")
        numbers = [f"{value:,.0f}" if is_count else format_bytes(value) for value in (row.planned, row.counted)]
        verdict = "shown only" if row.tolerance is None else "" if row.agrees else "DIFFERS"
        table.add_row(row.name, *numbers, f"{row.difference:.2%}", verdict)
    console.print()
    console.print(table, highlight=False)
    wrong = [row.name for row in rows if not row.agrees]
    verdict = f"the plan differs from the real thing: {', '.join(wrong)}" if wrong else "the plan agrees with it"
    console.print(
        f"{verdict}. Counted on the real model and optimizer, on meta tensors and a fake process group; left out: "
        "forward and backward pass, the norm of the gradient.",
        highlight=False,
    )


def comparison_figures(rows: list[PlanCheck], rank: int) -> dict[str, Any]:
    """The same as numbers by name."""
    return {
        "rank": rank,
        "agrees": all(row.agrees for row in rows),
        "figures": {
            row.name.replace(" ", "_"): {
                "planned": row.planned,
                "counted": row.counted,
                "relative_difference": row.difference,
            }
            for row in rows
        },
    }


def _sums(wires: Mapping[str, CommStats]) -> tuple[float, float]:
    return sum(wire.sent for wire in wires.values()), sum(wire.received for wire in wires.values())
