"""`moonlight plan`: from the options of the command to what is printed."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moonlight.config.checks import require
from moonlight.config.load import load_recipe
from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.plan.build import make_plan
from moonlight.plan.figures import plan_to_json
from moonlight.plan.hardware import HardwareModel, hardware_model
from moonlight.plan.suggest import suggest
from moonlight.plan.suggest_text import print_suggestions, suggestions_to_json
from moonlight.plan.text import print_plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """The options of the command; docs in moonlight/cli/main.py."""

    gpus: int | None
    gpu: str
    gpu_memory_gb: float | None
    efficiency: float
    storage_gb_per_second: float
    parameters: bool
    suggest: bool
    json: bool
    dry_run: bool
    rank: int | None

    def check(self) -> None:
        """Options that need or exclude each other."""
        require(self.gpus is None or self.gpus >= 1, f"--gpus is {self.gpus}: it must be at least 1")
        require(self.rank is None or self.dry_run, f"--rank is {self.rank}: it needs --dry-run")
        for other, given in (("--dry-run", self.dry_run), ("--parameters", self.parameters)):
            require(
                not (self.suggest and given), f"--suggest and {other} are both given: plan a suggested layout by itself"
            )
        require(
            not (self.json and self.parameters), "--json and --parameters are both given: the list is text, give one"
        )


def run_plan(recipe: Path, overrides: Sequence[str], options: PlanOptions) -> bool:
    """Print what was asked for; False if a dry run differs from the plan.

    Raises:
        UserError: options, recipe or layout cannot be used; or no layout fits.
    """
    options.check()
    hardware = hardware_model(options.gpu, options.gpu_memory_gb, options.efficiency, options.storage_gb_per_second)
    config = load_recipe(recipe, overrides)
    world_size = config.parallel.num_processes if options.gpus is None else options.gpus
    if options.suggest:
        found = suggest(config, world_size, hardware)
        if options.json:
            _print_json(suggestions_to_json(found))
        else:
            print_suggestions(found)
        return True
    return _plan_one(config, world_size, hardware, options)


def _plan_one(config: RunConfig, world_size: int, hardware: HardwareModel, options: PlanOptions) -> bool:
    try:
        plan = make_plan(config, world_size, hardware)
    except UserError as error:
        raise UserError(f"{error}; --suggest searches layouts for {world_size}") from None
    rank = options.rank or 0
    require(0 <= rank < world_size, f"--rank is {rank}: the world has {world_size} processes, 0 to {world_size - 1}")
    content: dict[str, Any] = {}
    if options.json:
        content = plan_to_json(plan)
    else:
        print_plan(plan, parameters=options.parameters)
    agrees = True
    if options.dry_run:
        from moonlight.plan.compare import compare_with_dry_run, comparison_figures, print_comparison
        from moonlight.plan.dry_run import count_rank

        rows = compare_with_dry_run(plan, rank, count_rank(config, world_size, rank))
        agrees = all(row.agrees for row in rows)
        if options.json:
            content["dry_run"] = comparison_figures(rows, rank)
        else:
            print_comparison(rows, rank, Console())
    if options.json:
        _print_json(content)
    return agrees


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(_whole_bytes(content), indent=2))


def _whole_bytes(value: Any, name: str = "") -> Any:
    """Bytes as whole numbers, whatever mean or share they come from."""
    if isinstance(value, dict):
        return {key: _whole_bytes(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_whole_bytes(inner, name) for inner in value]
    return round(value) if isinstance(value, float) and name.endswith("bytes") else value
