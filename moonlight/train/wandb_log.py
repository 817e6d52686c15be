"""Optional logging to Weights & Biases, from a thread, so that a network failure does not stop training."""

import dataclasses
import importlib.util
import os
import queue
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from moonlight.config.run import RunConfig
from moonlight.errors import UserError
from moonlight.files import atomic_write_text, make_folder

INIT_TIMEOUT_SECONDS = 30.0
FINISH_TIMEOUT_SECONDS = 60.0
"""How long the end of a run waits for metrics that are still being sent."""
LEAVE_TIMEOUT_SECONDS = 5.0
"""The same for a run that fails, or that is stopped and has a short grace period."""


def check_installed(config: RunConfig) -> None:
    """Raise UserError if the recipe sets `monitor.wandb_project` and the package wandb is not installed."""
    if config.monitor.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"monitor.wandb_project is {config.monitor.wandb_project!r}, but the package wandb is not installed: "
            "run pip install wandb, or remove the setting"
        )


class WandbLogger:
    """Send metrics to one Weights & Biases run. A failure is logged once, with `warn`, and ends the sending."""

    def __init__(self, folder: Path, config: RunConfig, warn: Callable[[str], None]) -> None:
        """Start the thread. `folder` is the folder of the run; unsent metrics are stored in its subfolder wandb/."""
        self._folder, self._config, self._warn = folder, config, warn
        self._entries: queue.SimpleQueue[dict[str, Any] | int] = queue.SimpleQueue()
        """Metrics of steps; last, the exit code."""
        self._failure = ""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, scalars: dict[str, Any], step: int) -> None:
        """Queue the scalar metrics of one step."""
        self._warn_failure("training continues without it, and all metrics are in metrics.jsonl")
        if self._thread.is_alive():
            self._entries.put(scalars | {"step": step})

    def close(self, *, finished: bool) -> None:
        """Wait until all metrics are sent, at most 90 s, or 5 s if the run was stopped or failed."""
        self._entries.put(0 if finished else 1)
        self._thread.join(INIT_TIMEOUT_SECONDS + FINISH_TIMEOUT_SECONDS if finished else LEAVE_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self._failure = "Weights & Biases did not receive all metrics in time"
        self._warn_failure("all metrics are in metrics.jsonl")

    def _warn_failure(self, consequence: str) -> None:
        if self._failure:
            text, self._failure = self._failure, ""
            self._warn(f"{text}; {consequence}")

    def _work(self) -> None:
        try:
            import wandb

            # Do not prompt for a key: the run may be unattended.
            if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
                raise ValueError("no API key is configured (WANDB_API_KEY, or wandb login)")
            settings = wandb.Settings(
                init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS, console="off", silent=True
            )
            wandb_run = wandb.init(
                project=self._config.monitor.wandb_project,
                name=self._config.name,
                id=self._identifier(),
                resume="allow",
                dir=self._folder,
                config=dataclasses.asdict(self._config),
                settings=settings,
            )
            # After a restart, steps repeat, which the step counter of Weights & Biases would reject.
            wandb_run.define_metric("step", hidden=True)
            wandb_run.define_metric("*", step_metric="step")
            while isinstance(entry := self._entries.get(), dict):
                wandb_run.log(entry)
            wandb_run.finish(exit_code=entry)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._failure = f"Weights & Biases cannot be used: {reason}"

    def _identifier(self) -> str:
        """Return an identifier that is unique to this run and the same for every start of it."""
        path = self._folder / "wandb" / "identifier"
        if not path.exists():
            make_folder(path.parent)
            atomic_write_text(path, secrets.token_hex(8) + "\n")
        return path.read_text().strip()
