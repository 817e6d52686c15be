"""Outputs of a run: metrics.jsonl, TensorBoard, the progress line and the loss curve."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from moonlight.errors import UserError, attach_path
from moonlight.files import atomic_write_text, write_figure

METRICS_FILE = "metrics.jsonl"
CURVE_FILE = "loss.png"
UNREPEATABLE = ("speed/", "time/", "memory/")
"""Prefixes of keys that differ between two runs of the same recipe; all other keys repeat bit-identically."""

SECONDS_BETWEEN_LINES = 10.0
"""Interval of the plain progress lines."""
SMOOTHING = 0.1
"""Weight of the newest step in the speed that the progress line shows."""


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the objects in a run's metrics.jsonl, without their lists by layer and expert, which may be large.

    A last line that a crash truncated is skipped, and null becomes NaN. Without the file, the result is empty.

    Raises:
        UserError: a line is not JSON.
    """
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    return [
        {key: math.nan if value is None else value for key, value in entry.items() if not isinstance(value, list)}
        for _, entry in _complete_lines(path)
    ]


def _complete_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            try:
                entry = json.loads(line)
            except ValueError:
                raise UserError(f"{path} is corrupt: line {number} is not JSON; remove that line") from None
            yield line, entry


def to_line(entry: dict[str, Any]) -> bytes:
    """Return one line of metrics.jsonl. Values that are not finite become null, because JSON cannot represent them."""

    def to_finite(value: Any) -> Any:
        if isinstance(value, list):
            return [to_finite(element) for element in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    clean = {key: to_finite(value) for key, value in entry.items()}
    return json.dumps(clean, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def scalars(entry: dict[str, Any]) -> dict[str, float]:
    """Return the scalar metrics of a step's object, without lists, text and the step itself."""
    return {key: value for key, value in entry.items() if isinstance(value, int | float) and key != "step"}


class MetricsWriter:
    """Write one JSON object a step, and the same scalars to TensorBoard. Only rank 0 creates one."""

    def __init__(self, folder: Path, step: int) -> None:
        """Continue after `step`: delete the later steps that a killed run wrote, because they run again."""
        self._path = folder / METRICS_FILE
        lines = _complete_lines(self._path) if self._path.exists() else iter(())
        kept = b"".join(line for line, entry in lines if entry["step"] <= step)
        atomic_write_text(self._path, kept.decode())
        self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        """Bytes that the disk has not accepted yet."""
        self._board = self._open_board(step + 1)

    def write(self, entry: dict[str, Any]) -> None:
        """Append one step's object.

        Raises:
            OSError: not everything was written. A later call writes the rest, except to TensorBoard.
        """
        self._unwritten += to_line(entry)
        self._write_pending()
        try:
            from tensorboard.compat.proto.summary_pb2 import Summary

            values = [Summary.Value(tag=key, simple_value=value) for key, value in scalars(entry).items()]
            self._board.file_writer.add_summary(Summary(value=values), entry["step"])
        except OSError:  # the writer's thread has ended
            self._board = self._open_board(entry["step"] + 1)
            raise

    def sync(self) -> None:
        """Flush to disk, before a checkpoint that makes these steps final. Raises OSError, as `write` does."""
        self._write_pending()
        with attach_path(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        try:
            self._write_pending()
            self._board.close()
        finally:
            self._file.close()

    def _open_board(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self._path.parent / "tensorboard"), purge_step=step)

    def _write_pending(self) -> None:
        with attach_path(self._path):
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]


class ProgressLine:
    """A live progress line on a terminal; a plain line every few seconds otherwise."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        self._console = Console(stderr=True)
        self._total = total_steps
        self._printed_at = 0.0
        self._speed = 0.0
        self._progress: Progress | None = None
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task("starting", total=total_steps, completed=first_step)

    def update(self, entry: dict[str, Any], seconds_left: float) -> None:
        """Show a step's metrics."""
        speed = entry["speed/tokens_per_second"]
        self._speed += (speed - self._speed) * (SMOOTHING if self._speed else 1.0)
        text = f"loss {entry['loss/train']:.4f}  {self._speed:,.0f} tokens/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=entry["step"], description=text)
        elif time.monotonic() - self._printed_at > SECONDS_BETWEEN_LINES or entry["step"] == self._total:
            self._printed_at = time.monotonic()
            self._console.print(
                f"step {entry['step']}/{self._total}  {text}  {seconds_left:.0f} s left",
                highlight=False,
                soft_wrap=True,
            )

    def note(self, text: str) -> None:
        """Print a line that stays on the screen."""
        (self._progress.console if self._progress else self._console).print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()


def draw_loss_curve(entries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Plot training and validation loss, learning rate and batch size over tokens, to the PNG file `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    def over_tokens(axes: Any, key: str, **style: Any) -> None:
        points = [entry for entry in entries if key in entry]
        axes.plot([entry["consumed_tokens"] / 1e6 for entry in points], [entry[key] for entry in points], **style)

    figure, (loss, rate) = pyplot.subplots(
        2, 1, figsize=(8, 6), dpi=120, sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    over_tokens(loss, "loss/train", linewidth=0.8, alpha=0.7, label="training")
    over_tokens(loss, "loss/validation", marker="o", markersize=4, label="validation")
    over_tokens(rate, "optim/lr", color="tab:green", clip_on=False)
    rate.set_ylim(bottom=0)
    sizes = {entry.get("optim/global_batch_size", 0) for entry in entries}
    if len(sizes) > 1:
        batch = rate.twinx()
        over_tokens(batch, "optim/global_batch_size", color="tab:gray", linestyle="--", drawstyle="steps-pre")
        batch.set_ylim(0, 1.1 * max(sizes))
        batch.set_ylabel("sequences a step", color="tab:gray")
    for before, entry in pairwise(entries):
        if (stage := entry.get("stage")) != before.get("stage"):
            for axes in (loss, rate):
                axes.axvline(before["consumed_tokens"] / 1e6, color="black", linewidth=0.8, linestyle=":")
            position = (before["consumed_tokens"] / 1e6, 1)
            loss.annotate(f" {stage}", position, xycoords=("data", "axes fraction"), va="top", fontsize=8)
    loss.set_ylabel("loss (nats per token)")
    loss.set_title(title)
    loss.legend(loc="lower left")
    loss.grid(alpha=0.3)
    rate.set_xlabel("tokens (millions)")
    rate.set_ylabel("learning rate", color="tab:green")
    rate.ticklabel_format(axis="y", scilimits=(0, 0))
    rate.grid(alpha=0.3)
    write_figure(path, figure)
