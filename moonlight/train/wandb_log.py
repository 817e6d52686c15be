"""Weights & Biases, for whoever asks for it: a thread hands it the metrics, so that a dead network stops nothing."""

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
"""How long the end of a run waits for what is still on its way."""
LEAVE_TIMEOUT_SECONDS = 5.0
"""The same where a run is stopped, whose grace time is short, or fails."""


def check_installed(config: RunConfig) -> None:
    """Raise UserError if the recipe asks for Weights & Biases and its package is not there."""
    if config.monitor.wandb_project and importlib.util.find_spec("wandb") is None:
        raise UserError(
            f"monitor.wandb_project is {config.monitor.wandb_project!r}, and the package wandb is not installed: "
            "pip install wandb, or leave the setting out"
        )


class WandbLogger:
    """Sends metrics to one run there. Whatever fails is said once, by `warn`, and nothing is sent from then on."""

    def __init__(self, folder: Path, config: RunConfig, warn: Callable[[str], None]) -> None:
        """`folder` of the run; what is not sent yet lies in its subfolder wandb/."""
        self._folder, self._config, self._warn = folder, config, warn
        self._entries: queue.SimpleQueue[dict[str, Any] | int] = queue.SimpleQueue()
        """At the end the exit code."""
        self._failure = ""
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def write(self, scalars: dict[str, Any], step: int) -> None:
        """Hand over one step's numbers."""
        self._say_failure("training goes on without it, and its metrics are in metrics.jsonl")
        if self._thread.is_alive():
            self._entries.put(scalars | {"step": step})

    def close(self, *, finished: bool) -> None:
        """Wait, not for ever, until all is sent; a short time only if the run is stopped or fails."""
        self._entries.put(0 if finished else 1)
        self._thread.join(INIT_TIMEOUT_SECONDS + FINISH_TIMEOUT_SECONDS if finished else LEAVE_TIMEOUT_SECONDS)
        if self._thread.is_alive():
            self._failure = "Weights & Biases has not taken everything in time"
        self._say_failure("all metrics are in metrics.jsonl")

    def _say_failure(self, but: str) -> None:
        if self._failure:
            text, self._failure = self._failure, ""
            self._warn(f"{text}; {but}")

    def _work(self) -> None:
        try:
            import wandb

            # It must not ask for a key: nobody may be there to answer.
            if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False):
                raise ValueError("no API key is configured (WANDB_API_KEY, or wandb login)")
            settings = wandb.Settings(
                init_timeout=INIT_TIMEOUT_SECONDS, finish_timeout=FINISH_TIMEOUT_SECONDS, console="off", silent=True
            )
            there = wandb.init(
                project=self._config.monitor.wandb_project,
                name=self._config.name,
                id=self._identifier(),
                resume="allow",
                dir=self._folder,
                config=dataclasses.asdict(self._config),
                settings=settings,
            )
            # After a restart steps come again, which its own counter would refuse.
            there.define_metric("step", hidden=True)
            there.define_metric("*", step_metric="step")
            while isinstance(entry := self._entries.get(), dict):
                there.log(entry)
            there.finish(exit_code=entry)
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._failure = f"Weights & Biases cannot be used: {reason}"

    def _identifier(self) -> str:
        """The same for every start of this run, and of no other."""
        path = self._folder / "wandb" / "identifier"
        if not path.exists():
            make_folder(path.parent)
            atomic_write_text(path, secrets.token_hex(8) + "\n")
        return path.read_text().strip()
