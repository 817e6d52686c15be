"""Everything that the folder of one run tells."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moonlight.config.load import parse_run_config
from moonlight.config.run import RunConfig
from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError, attach_path, user_message
from moonlight.report.metrics import RunMetrics, load_run_metrics
from moonlight.train.metrics import METRICS_FILE
from moonlight.train.run_log import EVENTS_FILE, read_events

CONFIG_FILE = "config.yaml"
EVALUATION_FILE = "evaluation.json"
MAX_NUMBERS = 8
"""Of damaged lines that a warning lists."""


@dataclass(kw_only=True)
class RunHistory:
    """One run."""

    folder: Path
    name: str
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    """config.yaml as plain values; empty if it cannot be read."""
    run: RunConfig | None = None
    """The same checked; None if this version of the recipe does not know it."""
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: RunMetrics | None = None
    """None if no step was finished."""
    written: float = 0.0
    """When metrics.jsonl was last written, in seconds since 1970."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int | None:
        """Steps that the recipe wants, if it can tell."""
        if self.run is not None:
            return RunSchedule(self.run).num_steps
        steps = self.setting("train", "train_steps")
        return steps if type(steps) is int and steps > 0 else None

    @property
    def first_expert_layer(self) -> int:
        """Number of the first layer with experts, counted from 0; 0 if that is not known."""
        layer = self.setting("model", "first_k_dense_replace")
        if type(layer) is not int:
            layer = self.run.model.first_k_dense_replace if self.run else 0
        return layer

    def setting(self, section: str, key: str) -> Any:
        """One value of the recipe; None if it is not there."""
        values = self.recipe.get(section)
        return values.get(key) if isinstance(values, dict) else None


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is that of a run."""
    if not folder.exists():
        raise UserError(f"run {folder} does not exist: give the folder of a run, such as runs/quickstart")
    if not folder.is_dir():
        raise UserError(f"run {folder} is a file: give the folder of a run, such as runs/quickstart")
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        raise UserError(f"{folder} is no run: it has neither {CONFIG_FILE} nor {METRICS_FILE}: give runs/<name>")


def load_history(folder: Path, num_runs: int) -> RunHistory:
    """Read a run's folder; what is damaged in it is said in the warnings of the result.

    Args:
        num_runs: how many share the page.

    Raises:
        UserError: `folder` is none of a run.
    """
    check_folder(folder)
    history = RunHistory(folder=folder, name=folder.resolve().name)
    _load_recipe(history)
    _load_events(history)
    path = folder / METRICS_FILE
    if path.exists():
        with attach_path(path):
            history.metrics = load_run_metrics(path, num_runs)
            history.written = path.stat().st_mtime
    _load_evaluation(history)
    _warn_of_metrics(history)
    return history


def _load_recipe(history: RunHistory) -> None:
    path = history.folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        if not isinstance(recipe, dict):
            raise ValueError("it is no mapping of keys")
    except OSError as error:
        history.warnings.append(
            f"{path} cannot be read ({error.strerror}): no recipe here, and layers with experts count from 0"
        )
        return
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:150]
        history.warnings.append(f"{path} is damaged ({reason}): no recipe here, and layers with experts count from 0")
        return
    history.recipe_text, history.recipe = text, recipe
    try:
        history.run = parse_run_config(recipe)
        RunSchedule(history.run)
    except UserError:  # of another version: it is shown as it is
        history.run = None


def _load_events(history: RunHistory) -> None:
    path = history.folder / EVENTS_FILE
    if not path.exists():
        return
    with attach_path(path):
        found = read_events(history.folder)
        lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    history.events = [event for event in found if isinstance(event, dict) and isinstance(event.get("event"), str)]
    if lost := lines - len(history.events):
        history.warnings.append(f"{path}: {lost} of {lines} lines could not be read, and are left out")


def _load_evaluation(history: RunHistory) -> None:
    path = history.folder / EVALUATION_FILE
    if not path.exists():
        return
    try:
        found = json.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError("it is no object")
        history.evaluation = found
    except (OSError, ValueError, RecursionError) as error:
        history.warnings.append(f"{path} cannot be read ({user_message(error) or error}): it is left out")


def _warn_of_metrics(history: RunHistory) -> None:
    path, metrics = history.folder / METRICS_FILE, history.metrics
    if metrics is None:
        return
    if metrics.scan.damaged:
        numbers = [str(number) for number in metrics.scan.damaged]
        more = f" and {len(numbers) - MAX_NUMBERS} more" if len(numbers) > MAX_NUMBERS else ""
        what = "line" if len(numbers) == 1 else "lines"
        listed = ", ".join(numbers[:MAX_NUMBERS])
        history.warnings.append(f"{path}: {what} {listed}{more} damaged (no JSON object with a step), left out")
    if metrics.scan.cut:
        history.warnings.append(
            f"{path}: the last line is not complete, and left out; the page goes up to step {metrics.last['step']:,}"
        )
    if metrics.scan.repeated:
        history.warnings.append(
            f"{path}: {metrics.scan.repeated:,} lines are of steps that come again later, as after a restart; "
            "the last line of a step counts"
        )
    if strange := [key for key, it in metrics.maps.items() if it.strange]:
        history.warnings.append(f"{path}: lists of {', '.join(strange)} with another shape than the first are left out")
    if metrics.dropped:
        history.warnings.append(f"{path}: {len(metrics.dropped):,} figures beyond the first of their kind are left out")
