"""`moonlight plan`: run the command with its options and print the result."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from moonlight.config.checks import require
from moonlight.config.load import load_recipe
from moonlight.errors import UserError
from moonlight.plan.build import make_plan
from moonlight.plan.figures import plan_to_json
from moonlight.plan.hardware import hardware_model
from moonlight.plan.suggest import suggest
from moonlight.plan.suggest_text import print_suggestions, suggestions_to_json
from moonlight.plan.text import print_plan


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Options of `moonlight plan`, documented in moonlight/cli/train.py."""

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
        """Raise UserError for a value out of range and for options that require or exclude each other."""
        require(self.gpus is None or self.gpus >= 1, f"--gpus is {self.gpus}: it must be at least 1")
        require(self.rank is None or self.dry_run, f"--rank is {self.rank}: it requires --dry-run")
        for other, is_set in (("--dry-run", self.dry_run), ("--parameters", self.parameters)):
            require(
                not (self.suggest and is_set),
                f"--suggest and {other} are both set: use {other} with one suggested layout",
            )
        require(
            not (self.json and self.parameters),
            "--json and --parameters are both set: the parameter list is text only; set one of them",
        )


def run_plan(recipe: Path, overrides: Sequence[str], options: PlanOptions) -> bool:
    """Print the plan, suggestions or dry run that `options` select. Return False if a dry run differs from the plan.

    Raises:
        UserError: options, recipe or layout are invalid, or no layout fits.
    """
    options.check()
    hardware = hardware_model(options.gpu, options.gpu_memory_gb, options.efficiency, options.storage_gb_per_second)
    config = load_recipe(recipe, overrides)
    world_size = config.parallel.num_processes if options.gpus is None else options.gpus
    if options.suggest:
        suggestions = suggest(config, world_size, hardware)
        if options.json:
            _print_json(suggestions_to_json(suggestions))
        else:
            print_suggestions(suggestions)
        return True
    try:
        plan = make_plan(config, world_size, hardware)
    except UserError as error:
        raise UserError(f"{error}; --suggest searches layouts for {world_size}") from None
    rank = options.rank or 0
    require(0 <= rank < world_size, f"--rank is {rank}: the world has {world_size} processes, 0 to {world_size - 1}")
    content = plan_to_json(plan) if options.json else {}
    if not options.json:
        print_plan(plan, parameters=options.parameters)
    agrees = True
    if options.dry_run:
        from moonlight.plan.compare import checks_to_json, compare_with_dry_run, print_checks
        from moonlight.plan.dry_run import count_rank

        checks = compare_with_dry_run(plan, rank, count_rank(config, world_size, rank))
        agrees = all(check.agrees for check in checks)
        if options.json:
            content["dry_run"] = checks_to_json(checks, rank)
        else:
            print_checks(checks, rank, Console())
    if options.json:
        _print_json(content)
    return agrees


def _print_json(content: dict[str, Any]) -> None:
    print(json.dumps(_round_bytes(content), indent=2))


def _round_bytes(value: Any, name: str = "") -> Any:
    """Return `value` with all numbers under keys that end with "bytes" rounded to integers."""
    if isinstance(value, dict):
        return {key: _round_bytes(inner, key) for key, inner in value.items()}
    if isinstance(value, list):
        return [_round_bytes(inner, name) for inner in value]
    return round(value) if isinstance(value, float) and name.endswith("bytes") else value
