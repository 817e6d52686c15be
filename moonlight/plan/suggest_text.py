"""Output of `moonlight plan --suggest`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.plan.build import RunPlan, make_plan
from moonlight.plan.figures import LAYOUT_KEYS, RESERVE, describe_layout
from moonlight.plan.speed import bubble_fraction
from moonlight.plan.suggest import Suggestions
from moonlight.plan.text import NARROW, fit_text, format_bytes, format_seconds, num_gpus


def print_suggestions(suggestions: Suggestions, console: Console | None = None) -> None:
    """Print a table of the best layouts, the settings of the first, and why the other layouts are excluded."""
    console = console or Console()
    if not console.is_terminal:
        console.width = NARROW
    machine = suggestions.machine
    console.print(
        f"{suggestions.config.name} on {num_gpus(suggestions.world_size, machine.name)}: "
        f"{suggestions.num_fitting:,} of {suggestions.num_layouts:,} layouts fit\n"
        f"memory: at most {1 - RESERVE:.0%} of {format_bytes(machine.memory_bytes)}; "
        f"time: estimated, arithmetic at {machine.efficiency:g} of peak FLOP/s",
        highlight=False,
    )
    columns = (*LAYOUT_KEYS, "micro-batch", "step", "tokens/s", "days", "bubble", "memory")
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns:
        column.justify = "right"
    for plan in suggestions.best:
        table.add_row(*_cells(plan))
    console.print()
    console.print(table, highlight=False)
    console.print()
    if recipe_text := recipe_layout_text(suggestions):
        console.print(recipe_text, highlight=False, soft_wrap=True)
    recipe_overrides = overrides(suggestions.config)
    changed = [override for override in overrides(suggestions.best[0].config) if override not in recipe_overrides]
    settings = " ".join(changed) or "those of the recipe"
    # One line of any length, to copy.
    console.print(f"settings of the first layout: {settings}", highlight=False, soft_wrap=True)
    console.print("TP, PP, VPP, EP, ETP: tensor, pipeline, virtual pipeline, expert, expert-tensor parallel size")
    console.print("\nexcluded layouts, by reason:", highlight=False)
    reasons = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    reasons.add_column(justify="right")
    for count, reason in suggestions.reasons:
        reasons.add_row(f"{count:,}", reason)
    console.print(reasons, highlight=False)


def overrides(config: RunConfig) -> list[str]:
    """Return the overrides that select this layout, in the form `key=value`."""
    sizes = [f"parallel.{key}={getattr(config.parallel, key)}" for key in LAYOUT_KEYS.values()]
    return [*sizes, f"train.micro_batch_size={config.train.micro_batch_size}"]


def recipe_layout_text(suggestions: Suggestions) -> str:
    """Return the recipe's layout, its step time and whether it fits; empty if the layout does not divide the GPUs."""
    try:
        plan = make_plan(suggestions.config, suggestions.world_size, suggestions.machine)
    except UserError:
        return ""
    return f"layout of the recipe: {describe_layout(plan)}: {format_seconds(plan.seconds.total)}\n{fit_text(plan)}"


def suggestions_to_json(suggestions: Suggestions) -> dict[str, Any]:
    """Return the suggestions as numbers by name, for `--json`."""
    return {
        "recipe": suggestions.config.name,
        "gpus": suggestions.world_size,
        "gpu": suggestions.machine.name,
        "usable_memory_bytes": suggestions.machine.memory_bytes * (1 - RESERVE),
        "layouts": suggestions.num_layouts,
        "fitting_layouts": suggestions.num_fitting,
        "best": [
            {
                "overrides": overrides(plan.config),
                "step_seconds": plan.seconds.total,
                "tokens_per_second": plan.tokens_per_step / plan.seconds.total,
                "total_seconds": plan.total_seconds,
                "bubble_share": bubble_fraction(plan.config, plan.stages[0].num_micro_batches),
                "fullest_rank_bytes": plan.memories[plan.peak_rank].peak,
            }
            for plan in suggestions.best
        ],
        "reasons": [{"layouts": count, "reason": reason} for count, reason in suggestions.reasons],
    }


def _cells(plan: RunPlan) -> list[str]:
    seconds = plan.seconds.total
    return [
        *(str(getattr(plan.config.parallel, key)) for key in LAYOUT_KEYS.values()),
        str(plan.config.train.micro_batch_size),
        format_seconds(seconds),
        f"{plan.tokens_per_step / seconds:,.0f}",
        f"{plan.total_seconds / 86400:,.2f}",
        f"{bubble_fraction(plan.config, plan.stages[0].num_micro_batches):.1%}",
        format_bytes(plan.memories[plan.peak_rank].peak),
    ]
