"""Run logging by the first rank: metrics.jsonl, events.jsonl, TensorBoard, Weights & Biases, the terminal."""

import contextlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Self

from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint.async_save import SaveEvent
from moonlight.errors import user_message
from moonlight.train.events import EventLog
from moonlight.train.metrics import MetricsWriter, ProgressLine, scalars
from moonlight.train.step import StepResult
from moonlight.train.wandb_log import WandbLogger


class RunLogger:
    """The log of one run. Every rank has one and makes the same calls; only the first rank's writes.

    A context manager, which closes the files. A disk error never ends a run: lines stay in memory until they can be
    written, with one warning.
    """

    def __init__(self, folder: Path, config: RunConfig, step: int, total_steps: int, *, writes: bool) -> None:
        """Open the log of the run in `folder`.

        Args:
            step: last finished step. Metrics of later steps, which a killed run left, are dropped: those steps run
                again.
        """
        self._folder, self._total_steps = folder, total_steps
        self._last_step = config.train.stop_at_step or total_steps
        self._events = EventLog(folder, writes=writes)
        self._metrics = MetricsWriter(folder, step) if writes else None
        self._line = ProgressLine(total_steps, step) if writes else None
        self._step = step
        self._wandb = WandbLogger(folder, config, self.warn) if writes and config.monitor.wandb_project else None
        self._start_time, self._first_step = time.monotonic(), step
        self._warned = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exc_type: object, exc: object, tb: object) -> None:
        if self._wandb:
            self._wandb.close(finished=exc_type is None)
        if self._metrics and self._line:
            self._metrics.close()
            self._line.close()

    def print_line(self, text: str) -> None:
        """Print a line that stays on the terminal, above the progress line."""
        if self._line:
            self._line.note(text)

    def event(self, event: str, step: int, **details: Any) -> None:
        """Append to events.jsonl."""
        with self._keep_on_disk_error():
            self._events.add(event, step, **details)

    def warn(self, text: str) -> None:
        """Log a warning."""
        self.print_line(f"warning: {text}")
        self.event("warning", self._step, text=text)

    def started(
        self, step: int, start: dict[str, Any], *, resumed: bool, warnings: Iterable[str], changed: list[str]
    ) -> None:
        """Log the start of this process's part of the run.

        Args:
            start: host, layout and environment, for events.jsonl.
            warnings: of loading the checkpoint; each is a full line.
            changed: settings that --force changed.
        """
        for warning in warnings:
            self.event("warning", step, text=warning)
            self.print_line(warning)
        if resumed:
            self.print_line(f"{self._folder}: resuming after step {step} of {self._total_steps}")
        self.event("resumed" if resumed else "started", step, **start)
        if changed:
            self.event("forced", step, changed=changed)
            self.print_line(f"{self._folder}: resuming with other settings: {'; '.join(changed)}")

    def step(self, metrics: dict[str, Any]) -> None:
        """Append the metrics of a step, and show them."""
        self._step = metrics["step"]
        if self._metrics and self._line:
            with self._keep_on_disk_error():
                self._metrics.write(metrics)
            if self._wandb:
                self._wandb.write(scalars(metrics), metrics["step"])
            seconds_per_step = (time.monotonic() - self._start_time) / (metrics["step"] - self._first_step)
            self._line.update(metrics, seconds_per_step * (self._last_step - metrics["step"]))
        if "loss/validation" in metrics:
            self.print_line(f"step {metrics['step']}: validation loss {metrics['loss/validation']:.4f}")

    def spike(self, step: int, loss: float, score: float | None) -> None:
        """Log a loss spike."""
        self.event("spike", step, loss=loss, score=score)
        self.print_line(f"step {step}: loss spike, {loss:.4f} has score {score:.1f}")

    def rolled_back(self, step: int, spike_step: int, passed_over_sequences: int) -> None:
        """Log a rollback to `step` because of a spike, and drop the metrics of later steps."""
        self.print_line(f"step {spike_step}: rolled back to step {step}, skipping the data up to the spike")
        self.event("rolled back", step, spike=spike_step, passed_over_sequences=passed_over_sequences)
        if self._metrics:
            self._metrics.close()
            self._metrics = MetricsWriter(self._folder, step)
        self._start_time, self._first_step = time.monotonic(), step

    def skipped(self, step: int, result: StepResult) -> None:
        """Log a step that changed nothing."""
        loss, norm = result.loss, result.gradient_norm
        self.event("skipped", step, loss=str(loss), gradient_norm=str(norm))
        reason = "a spike" if result.is_spike else "not finite"
        self.print_line(f"step {step}: skipped ({reason}), loss {loss:.4f}, gradient norm {norm:.4f}")

    def attention_backends(self, step: int, texts: Iterable[str]) -> None:
        """Log the attention kernels that were selected for new shapes."""
        for text in texts:
            self.event("attention", step, text=text)
            self.print_line(text)

    def save_events(self, events: Iterable[SaveEvent]) -> None:
        """Log the outcome of saves."""
        for event in events:
            self.event(event.event, event.step, text=event.text)
            self.print_line(event.text)

    def stopped_by_signal(self, step: int) -> None:
        """Log that the run saved and stops because of SIGTERM."""
        self.event("stopped", step)
        self.print_line(f"{self._folder}: saved and stopped after step {step} (SIGTERM); rerun the command to resume")

    def ended(self, step: int) -> None:
        """Log the end of this process's part: all steps, or those up to train.stop_at_step."""
        if step < self._total_steps:
            self.print_line(f"{self._folder}: stopped after step {step} (train.stop_at_step); unset it to continue")
        self.event("finished" if step >= self._total_steps else "stopped", step)

    def flush(self) -> None:
        """Write the metrics to disk, before a checkpoint that makes these steps final."""
        if self._metrics:
            with self._keep_on_disk_error():
                self._metrics.sync()

    @contextlib.contextmanager
    def _keep_on_disk_error(self) -> Iterator[None]:
        """Warn once instead of ending the run if the disk takes no more; the lines stay in memory until it does."""
        try:
            yield
            self._warned = False
        except OSError as error:
            if not self._warned:
                reason = user_message(error) or error
                self.print_line(f"warning: {reason}; training continues, and keeps its metrics in memory until then")
            self._warned = True
