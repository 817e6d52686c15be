"""Saving checkpoints while training goes on.

Each rank has a thread that copies what the rank owns to host memory, and then writes its file. Until the copy is there
the state must not change, so the next update waits for it, and forward and backward pass do not. Threads make no
collective call, which would mix with those of training: each leaves a small report beside its file, and the one of rank
0 completes the checkpoint once it has read all of them. Whatever goes wrong on any rank ends with no trace of that
checkpoint, a warning, and the next save as if nothing had been.
"""

import contextlib
import dataclasses
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan

from moonlight.config.run import RunConfig
from moonlight.dist_checkpoint.chunks import CheckpointedOptimizer, LocalChunks
from moonlight.dist_checkpoint.lifecycle import apply_retention, commit_checkpoint, partial_path, remove_partial
from moonlight.dist_checkpoint.state import TrainState, step_folder
from moonlight.dist_checkpoint.tensors import TENSOR_ALIGNMENT, WrittenFile, plan_save, write_file, write_index
from moonlight.errors import UserError, user_message


class HostStagingBuffer:
    """Host memory for the rectangles that a rank writes, kept from save to save.

    Fresh memory would cost more time than the copy does, and so would turning what lies transposed, which is therefore
    left to the writing thread. With CUDA the memory is page-locked, and copies take their turn among other kernels.
    """

    def __init__(self, plan: SavePlan, tensors: dict[str, LocalChunks]) -> None:
        sources = {item.index: tensors[item.index.fqn].__get_tensor_shard__(item.index) for item in plan.items}
        room = [-(-source.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for source in sources.values()]
        memory = torch.zeros(sum(room), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._at: dict[MetadataIndex, torch.Tensor] = {}
        begin = 0
        for (index, source), nbytes in zip(sources.items(), room, strict=True):
            strides = torch.empty_like(source, device="meta").stride()  # of the same order, without gaps
            values = memory[begin : begin + source.nbytes].view(source.dtype)
            self._at[index] = values.as_strided(source.shape, strides)
            begin += nbytes

    def stage(self, parts: Iterable[dict[str, LocalChunks]]) -> None:
        """Copy all rectangles; they are there when this returns."""
        left = set(self._at)
        for key, pieces in (item for part in parts for item in part.items()):
            for offset, values in pieces.chunks:
                index = MetadataIndex(key, offset)
                if index in left:  # else another rank writes it
                    self._at[index].copy_(values, non_blocking=True)
                    left.remove(index)
        assert not left, left
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def get(self, index: MetadataIndex) -> torch.Tensor:
        """One rectangle."""
        return self._at[index]


SECONDS_BETWEEN_LOOKS = 0.02
WORTH_SAYING_SECONDS = 0.5
"""Of waiting for the save before."""
PAUSE, DURATION = "time/save_pause_seconds", "time/save_seconds"


class _Failed(Exception):
    """A rank could not write its part; the text is the reason."""


@dataclass(frozen=True)
class SaveEvent:
    """What became of a save."""

    event: str
    """For events.jsonl: saved, save failed, save waited for, or warning."""
    step: int
    """Of the checkpoint."""
    text: str


@dataclass(frozen=True)
class _Save:
    """A save under way."""

    final: Path
    state: TrainState
    started: float

    @property
    def part(self) -> Path:
        return partial_path(self.final)

    def report(self, rank: int) -> Path:
        """Where a rank says what became of its file."""
        return self.part / f"report-{rank:05d}.json"


class AsyncCheckpointer:
    """Saves the checkpoints of one run. All ranks make one, and call its methods at the same steps."""

    def __init__(
        self, checkpoints: Path, config: RunConfig, optimizer: CheckpointedOptimizer, tokenizer_sha256: str
    ) -> None:
        """Plan who writes what, and take the memory for copies: this rank's share of the checkpoint.

        Args:
            checkpoints: the folder of the run's checkpoints. What killed processes left unfinished in it is removed.
            tokenizer_sha256: checksum of the tokenizer that made the run's tokens, for whoever exports the model.
        """
        self._checkpoints, self._config, self._optimizer = checkpoints, config, optimizer
        self._tokenizer_sha256 = tokenizer_sha256
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            remove_partial(checkpoints)
        tensors = optimizer.state_dict_metadata()
        self._plan = plan_save(tensors)
        # Also of split masters: float32 of all is more than a GPU has room for.
        copies = config.train.async_save or config.optimizer.master_weights == "split"
        self._copies = HostStagingBuffer(self._plan.local, tensors) if copies else None
        self._thread: threading.Thread | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._may_change = threading.Event()
        """Whether the copy is there."""
        self._may_change.set()
        self._give_up = threading.Event()
        self._why_given_up = ""
        self._error: Exception | None = None
        """Of this rank in the last save."""
        self._failure = ""
        """What is said of the last save if it failed; on rank 0."""
        self._lock = threading.Lock()
        self._messages: list[SaveEvent] = []
        self._figures: dict[str, float] = {}

    def save(self, state: TrainState) -> float:
        """Save a checkpoint after `state.step`; with train.async_save, begin to.

        The state must not change before `before_update` has been called. A save that fails is told of by `poll` and
        `finish`.

        Returns:
            Seconds that training paused.
        """
        started = time.monotonic()
        if (waited := self._settle()) > WORTH_SAYING_SECONDS:
            self._say("save waited for", state.step, f"training waited {waited:.1f} s for the save before to end")
        save = _Save(step_folder(self._checkpoints, state.step), state, started)
        if self._made_part(save):
            self._may_change.clear()
            self._thread = threading.Thread(target=self._work, args=(save,), daemon=True)
            self._thread.start()
            if not self._config.train.async_save:
                self._settle()
        return self._paused_since(started)

    def wait_until_staged(self) -> None:
        """Wait until the state may change again. No collective call."""
        started = time.monotonic()
        if not self._may_change.is_set():
            self._may_change.wait()
            self._paused_since(started)

    def _paused_since(self, started: float) -> float:
        pause = time.monotonic() - started
        with self._lock:
            self._figures[PAUSE] = self._figures.get(PAUSE, 0.0) + pause
        return pause

    def pop_events(self) -> list[SaveEvent]:
        """What to tell the user since the last call, on rank 0: which saves ended, well or not. No collective call."""
        if self._error is not None and not isinstance(self._error, (OSError, _Failed)):
            raise self._error  # a defect, and not a matter of the disk
        with self._lock:
            messages, self._messages = self._messages, []
        return messages

    def pop_metrics(self) -> dict[str, float]:
        """For the metrics, since the last call: how long training paused, and how long the save took that ended."""
        with self._lock:
            figures, self._figures = self._figures, {}
        return figures

    def wait(self) -> None:
        """Wait until the last save has ended, well or not. All ranks call it."""
        self._settle()

    def finalize(self) -> None:
        """Wait until the last save has ended. All ranks call it.

        Raises:
            UserError: it failed; on all ranks.
        """
        self._settle()
        failure = [self._failure]
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise UserError(
                f"{failure[0]}; then start again: training goes on from the checkpoint before"
            ) from self._error

    def cancel(self) -> None:
        """Give up a save that is under way, when a run ends with an error. No collective call."""
        self._give_up.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _settle(self) -> float:
        """Wait for the threads of all ranks, and return how long that took here.

        Rank 0's may be waiting for a report that another rank could not even write.
        """
        if self._thread is None:
            return 0.0
        started = time.monotonic()
        if self._rank != 0:
            self._thread.join()
        reasons = [""] * self._world_size
        dist.all_gather_object(reasons, _reason(self._error) if self._rank != 0 else "")
        if failed := next((rank for rank, reason in enumerate(reasons) if reason), None):
            self._why_given_up = f"process {failed}: {reasons[failed]}"
            self._give_up.set()
        self._thread.join()
        self._thread = None
        dist.barrier()
        if self._rank == 0 and self._failure:
            remove_partial(self._checkpoints)  # what other ranks still wrote when it was removed
        return time.monotonic() - started

    def _made_part(self, save: _Save) -> bool:
        """Make the folder that all ranks write into; False, on all, if that failed."""
        self._failure, self._error, self._why_given_up = "", None, ""
        self._give_up.clear()
        if self._rank == 0:
            try:
                shutil.rmtree(save.part, ignore_errors=True)
                save.part.mkdir(parents=True)
            except OSError as error:
                self._failed(save, error)
        made = [not self._failure]
        dist.broadcast_object_list(made)
        return made[0]

    def _work(self, save: _Save) -> None:
        """What the thread of each rank does."""
        try:
            values_at = self._copied()
            written = write_file(save.part, self._plan.local, values_at, self._give_up.is_set)
            report = dataclasses.asdict(written)
        except Exception as error:
            self._error = error
            report = {"error": _reason(error)}
        path = save.report(self._rank)
        try:
            path.with_suffix(".part").write_text(json.dumps(report), encoding="utf-8")
            path.with_suffix(".part").replace(path)
        except OSError as error:  # then rank 0 will know when all ranks meet the next time
            self._error = self._error or error
        if self._rank == 0:
            self._complete(save)

    def _copied(self) -> Callable[[MetadataIndex], torch.Tensor]:
        """Where the values lie that are to be written: in copies, or where they are if training waits."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # each thread has its own
            if self._copies:
                self._copies.stage(self._optimizer.iter_state_dicts())
                return self._copies.get
            tensors = self._optimizer.master_state_dict() | self._optimizer.optimizer_state_dict()
            return lambda index: tensors[index.fqn].__get_tensor_shard__(index)
        finally:
            self._may_change.set()

    def _complete(self, save: _Save) -> None:
        """Make a checkpoint of the files of all ranks, or remove them."""
        try:
            written = self._written_by_all(save)
            files = write_index(save.part, self._plan, written)
            for rank in range(self._world_size):
                save.report(rank).unlink()
            content = {
                "state": dataclasses.asdict(save.state),
                "recipe": dataclasses.asdict(self._config),
                "tokenizer_sha256": self._tokenizer_sha256,
                "files": files,
            }
            commit_checkpoint(save.part, save.final, content)
        except Exception as error:
            self._error = self._error or error
            self._failed(save, _Failed(self._why_given_up) if self._why_given_up else error)
            return
        seconds = time.monotonic() - save.started
        nbytes = sum(file["bytes"] for file in files.values())
        text = f"checkpoint {save.final.name}: {nbytes / 1e6:,.1f} MB saved in {seconds:.1f} s"
        self._say("saved", save.state.step, text)
        with self._lock:
            self._figures[DURATION] = seconds
        try:
            apply_retention(save.final, self._config.train)
        except OSError as error:
            text = f"warning: old checkpoints beside {save.final} could not be removed: {error}"
            self._say("warning", save.state.step, text)

    def _written_by_all(self, save: _Save) -> list[WrittenFile]:
        """What the ranks report, once all have.

        Raises:
            _Failed: one could not write, or this save was given up.
        """
        reports: dict[int, dict[str, Any]] = {}
        while missing := [rank for rank in range(self._world_size) if rank not in reports]:
            there = {path.name for path in save.part.iterdir()}
            for rank in missing:
                if (path := save.report(rank)).name in there:
                    reports[rank] = json.loads(path.read_text(encoding="utf-8"))
            if len(reports) < self._world_size and self._give_up.wait(SECONDS_BETWEEN_LOOKS):
                raise _Failed("given up")
        for rank, report in sorted(reports.items()):
            if "error" in report:
                raise _Failed(f"process {rank}: {report['error']}")
        return [WrittenFile(**reports[rank]) for rank in range(self._world_size)]

    def _failed(self, save: _Save, error: Exception) -> None:
        """Leave nothing of a save, and say why."""
        room = ""
        with contextlib.suppress(OSError):  # the disk may have gone altogether
            free = shutil.disk_usage(next(place for place in save.part.parents if place.is_dir())).free
            room = f", {free} bytes are free on its disk"
        self._failure = f"checkpoint {save.final} could not be written{room}: {_reason(error)}"
        shutil.rmtree(save.part, ignore_errors=True)
        text = f"warning: {self._failure}; training goes on, and the next save is tried as usual"
        self._say("save failed", save.state.step, text)

    def _say(self, event: str, step: int, text: str) -> None:
        with self._lock:
            self._messages.append(SaveEvent(event, step, text))


def _reason(error: Exception | None) -> str:
    """The cause of a failure, and what helps; empty for none."""
    if error is None:
        return ""
    if isinstance(error, OSError):
        # The file that it names is gone, and had another name than the user knows.
        return user_message(OSError(error.errno, error.strerror)) or error.strerror or repr(error)
    return str(error) if isinstance(error, _Failed) else repr(error)
