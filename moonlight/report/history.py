"""Everything that a report reads from the folder of one run."""

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
from moonlight.train.events import EVENTS_FILE, read_events
from moonlight.train.metrics import METRICS_FILE

CONFIG_FILE = "config.yaml"
EVALUATION_FILE = "evaluation.json"
MAX_NUMBERS = 8
"""Maximum number of corrupt lines that a warning lists."""


@dataclass(kw_only=True)
class RunHistory:
    """Recipe, events, metrics and evaluation of one run."""

    folder: Path
    name: str
    recipe_text: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    """config.yaml as plain values; empty if it cannot be read."""
    config: RunConfig | None = None
    """The parsed recipe; None if this version cannot parse it."""
    events: list[dict[str, Any]] = field(default_factory=list)
    metrics: RunMetrics | None = None
    """None if no step finished."""
    written: float = 0.0
    """Modification time of metrics.jsonl, in seconds since 1970."""
    evaluation: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def total_steps(self) -> int | None:
        """Number of steps of the recipe; None if unknown."""
        if self.config is not None:
            return RunSchedule(self.config).num_steps
        steps = self.setting("train", "train_steps")
        return steps if type(steps) is int and steps > 0 else None

    @property
    def first_expert_layer(self) -> int:
        """Index of the first layer with experts, from 0; 0 if unknown."""
        layer = self.setting("model", "first_k_dense_replace")
        if type(layer) is not int:
            layer = self.config.model.first_k_dense_replace if self.config else 0
        return layer

    def setting(self, section: str, key: str) -> Any:
        """Return one value of the recipe; None if absent."""
        values = self.recipe.get(section)
        return values.get(key) if isinstance(values, dict) else None


def check_folder(folder: Path) -> None:
    """Raise UserError unless `folder` is the folder of a run."""
    if not folder.exists():
        raise UserError(f"run {folder} does not exist: give the folder of a run, such as runs/quickstart")
    if not folder.is_dir():
        raise UserError(f"run {folder} is a file: give the folder of a run, such as runs/quickstart")
    if not any((folder / name).exists() for name in (CONFIG_FILE, METRICS_FILE)):
        raise UserError(f"{folder} is not a run: it has neither {CONFIG_FILE} nor {METRICS_FILE}. Give runs/<name>")


def load_history(folder: Path, num_runs: int) -> RunHistory:
    """Read the folder of a run. Unreadable parts are left out and become warnings of the result.

    Args:
        num_runs: runs on the page; each gets an equal part of its size.

    Raises:
        UserError: `folder` is not the folder of a run.
        OSError: metrics.jsonl or events.jsonl cannot be read.
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
    _warn_about_metrics(history)
    return history


def _load_recipe(history: RunHistory) -> None:
    path = history.folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
        recipe = yaml.safe_load(text)
        if not isinstance(recipe, dict):
            raise ValueError("not a mapping")
    except (OSError, yaml.YAMLError, ValueError, RecursionError) as error:
        if isinstance(error, OSError):
            problem = f"cannot be read ({error.strerror})"
        else:
            problem = f"is corrupt ({' '.join(str(error).split())[:150]})"
        history.warnings.append(f"{path} {problem}: the page has no recipe and numbers expert layers from 0")
        return
    history.recipe_text, history.recipe = text, recipe
    try:
        history.config = parse_run_config(recipe)
        RunSchedule(history.config)
    except UserError:  # from another version: shown as it is
        history.config = None


def _load_events(history: RunHistory) -> None:
    path = history.folder / EVENTS_FILE
    if not path.exists():
        return
    with attach_path(path):
        events = read_events(history.folder)
        lines = sum(1 for line in path.read_bytes().splitlines() if line.strip())
    history.events = [event for event in events if isinstance(event, dict) and isinstance(event.get("event"), str)]
    if lost := lines - len(history.events):
        history.warnings.append(f"{path}: {lost} of {lines} lines cannot be read and are left out")


def _load_evaluation(history: RunHistory) -> None:
    path = history.folder / EVALUATION_FILE
    if not path.exists():
        return
    try:
        content = json.loads(path.read_bytes())
        if not isinstance(content, dict):
            raise ValueError("not a JSON object")
        history.evaluation = content
    except (OSError, ValueError, RecursionError) as error:
        history.warnings.append(f"{path} cannot be read ({user_message(error) or error}) and is left out")


def _warn_about_metrics(history: RunHistory) -> None:
    path, metrics = history.folder / METRICS_FILE, history.metrics
    if metrics is None:
        return
    if metrics.scan.corrupt_lines:
        numbers = [str(number) for number in metrics.scan.corrupt_lines]
        more = f" and {len(numbers) - MAX_NUMBERS} more" if len(numbers) > MAX_NUMBERS else ""
        what = "line" if len(numbers) == 1 else "lines"
        listed = ", ".join(numbers[:MAX_NUMBERS])
        history.warnings.append(f"{path}: left out corrupt {what} {listed}{more} (not a JSON object with a step)")
    if metrics.scan.truncated:
        history.warnings.append(
            f"{path}: the last line is incomplete and left out; the page ends at step {metrics.last['step']:,}"
        )
    if metrics.scan.repeated:
        history.warnings.append(
            f"{path}: {metrics.scan.repeated:,} lines are of steps repeated later, as after a restart; "
            "the page shows the last line of each step"
        )
    if mismatched := [key for key, heatmap in metrics.maps.items() if heatmap.num_mismatched]:
        history.warnings.append(
            f"{path}: lists of {', '.join(mismatched)} whose shape differs from the first are left out"
        )
    if metrics.dropped:
        history.warnings.append(f"{path}: {len(metrics.dropped):,} metrics beyond the maximum number are left out")
