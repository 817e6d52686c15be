"""Save checkpoints while training continues.

Each rank has a thread that copies the rank's state to host memory, then writes its file. The state must not change
until the copy is complete. So the next update waits for the copy; forward and backward passes do not.

Threads make no collective calls, because those would interleave with the collectives of training. Instead, each thread
leaves a small report next to its file, and the thread of rank 0 completes the checkpoint once it has read all reports.
If any rank fails, rank 0 deletes the partial checkpoint and logs a warning. The next save runs on schedule.
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
    """Host memory for the chunks that a rank writes, allocated once and reused by every save.

    Allocating new memory takes longer than the copy. Transposing does too, so the copy keeps each chunk's order of
    elements and the writing thread transposes. With CUDA the memory is page-locked, and copies are queued among other
    kernels.
    """

    def __init__(self, plan: SavePlan, tensors: dict[str, LocalChunks]) -> None:
        sources = {item.index: tensors[item.index.fqn].__get_tensor_shard__(item.index) for item in plan.items}
        padded_bytes = [-(-source.nbytes // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT for source in sources.values()]
        memory = torch.zeros(sum(padded_bytes), dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        self._chunks: dict[MetadataIndex, torch.Tensor] = {}
        start = 0
        for (index, source), nbytes in zip(sources.items(), padded_bytes, strict=True):
            strides = torch.empty_like(source, device="meta").stride()  # the same order of axes, without gaps
            values = memory[start : start + source.nbytes].view(source.dtype)
            self._chunks[index] = values.as_strided(source.shape, strides)
            start += nbytes

    def stage(self, state_dicts: Iterable[dict[str, LocalChunks]]) -> None:
        """Copy all chunks that this rank writes; return when the copies are complete."""
        remaining = set(self._chunks)
        for key, local_chunks in (item for state_dict in state_dicts for item in state_dict.items()):
            for offset, values in local_chunks.chunks:
                index = MetadataIndex(key, offset)
                if index in remaining:  # otherwise another rank writes it
                    self._chunks[index].copy_(values, non_blocking=True)
                    remaining.remove(index)
        assert not remaining, remaining
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    def get(self, index: MetadataIndex) -> torch.Tensor:
        """Return the staged copy of one chunk."""
        return self._chunks[index]


POLL_SECONDS = 0.02
"""Interval at which rank 0 looks for reports."""
MIN_REPORTED_WAIT_SECONDS = 0.5
"""Shortest wait for the previous save that is logged."""
PAUSE, DURATION = "time/save_pause_seconds", "time/save_seconds"
"""Metric keys."""


class _SaveFailed(Exception):
    """A rank could not write its file; the text is the reason."""


@dataclass(frozen=True)
class SaveEvent:
    """Outcome of a save."""

    event: str
    """Event name in events.jsonl: saved, save failed, save waited for, or warning."""
    step: int
    """Step of the checkpoint."""
    text: str


@dataclass(frozen=True)
class _Save:
    """A save in flight."""

    final: Path
    state: TrainState
    started: float

    @property
    def partial(self) -> Path:
        return partial_path(self.final)

    def report(self, rank: int) -> Path:
        """Return the path of a rank's report on its file."""
        return self.partial / f"report-{rank:05d}.json"


class AsyncCheckpointer:
    """Save the checkpoints of one run. Every rank creates one and calls its methods at the same steps."""

    def __init__(
        self, checkpoints: Path, config: RunConfig, optimizer: CheckpointedOptimizer, tokenizer_sha256: str
    ) -> None:
        """Plan which rank writes which chunks, and allocate host memory for this rank's chunks. Collective.

        Args:
            checkpoints: folder of the run's checkpoints. Partial checkpoints that killed processes left in it are
                deleted.
            tokenizer_sha256: checksum of the tokenizer that made the run's tokens; the export checks it.
        """
        self._checkpoints, self._config, self._optimizer = checkpoints, config, optimizer
        self._tokenizer_sha256 = tokenizer_sha256
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        if self._rank == 0:
            remove_partial(checkpoints)
        tensors = optimizer.state_dict_metadata()
        self._plan = plan_save(tensors)
        # Split master weights are staged too: the float32 copies of all of them do not fit in GPU memory.
        needs_staging = config.train.async_save or config.optimizer.master_weights == "split"
        self._staging = HostStagingBuffer(self._plan.local, tensors) if needs_staging else None
        self._thread: threading.Thread | None = None
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._staged = threading.Event()
        """Set when the copy is complete, so that the state may change."""
        self._staged.set()
        self._canceled = threading.Event()
        self._cancel_reason = ""
        self._error: Exception | None = None
        """Error of this rank in the last save."""
        self._failure = ""
        """Message about the last save if it failed; on rank 0."""
        self._lock = threading.Lock()
        self._events: list[SaveEvent] = []
        self._metrics: dict[str, float] = {}

    def save(self, state: TrainState) -> None:
        """Save a checkpoint after `state.step`; with train.async_save, only start the save. Collective.

        The caller must call `wait_until_staged` before it changes the state. `pop_events` and `finalize` report a save
        that failed.
        """
        started = time.monotonic()
        if (waited := self.wait()) > MIN_REPORTED_WAIT_SECONDS:
            self._add_event("save waited for", state.step, f"training waited {waited:.1f} s for the previous save")
        save = _Save(step_folder(self._checkpoints, state.step), state, started)
        if self._create_partial(save):
            self._staged.clear()
            self._thread = threading.Thread(target=self._work, args=(save,), daemon=True)
            self._thread.start()
            if not self._config.train.async_save:
                self.wait()
        self._paused_since(started)

    def wait_until_staged(self) -> None:
        """Wait until the state may change again. Not collective."""
        started = time.monotonic()
        if not self._staged.is_set():
            self._staged.wait()
            self._paused_since(started)

    def _paused_since(self, started: float) -> None:
        with self._lock:
            self._metrics[PAUSE] = self._metrics.get(PAUSE, 0.0) + time.monotonic() - started

    def pop_events(self) -> list[SaveEvent]:
        """Return the events since the last call: on rank 0, which saves succeeded or failed. Not collective."""
        if self._error is not None and not isinstance(self._error, (OSError, _SaveFailed)):
            raise self._error  # a bug, not a disk error
        with self._lock:
            events, self._events = self._events, []
        return events

    def pop_metrics(self) -> dict[str, float]:
        """Return, since the last call, the seconds that training paused and the seconds that a completed save took."""
        with self._lock:
            metrics, self._metrics = self._metrics, {}
        return metrics

    def finalize(self) -> None:
        """Wait until the last save has ended. Collective.

        Raises:
            UserError: the save failed; raised on all ranks.
        """
        self.wait()
        failure = [self._failure]
        dist.broadcast_object_list(failure)
        if failure[0]:
            raise UserError(
                f"{failure[0]}; then rerun the command to resume from the previous checkpoint"
            ) from self._error

    def cancel(self) -> None:
        """Cancel the save in flight when a run ends with an error. Not collective."""
        self._canceled.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> float:
        """Wait until the last save has succeeded or failed; return how many seconds this rank waited. Collective."""
        if self._thread is None:
            return 0.0
        started = time.monotonic()
        if self._rank != 0:  # the thread of rank 0 may be waiting for a report that another rank could not write
            self._thread.join()
        reasons = [""] * self._world_size
        dist.all_gather_object(reasons, _reason(self._error) if self._rank != 0 else "")
        if failed := next((rank for rank, reason in enumerate(reasons) if reason), None):
            self._cancel_reason = f"process {failed}: {reasons[failed]}"
            self._canceled.set()
        self._thread.join()
        self._thread = None
        dist.barrier()
        if self._rank == 0 and self._failure:
            remove_partial(self._checkpoints)  # files that other ranks wrote after rank 0 deleted the folder
        return time.monotonic() - started

    def _create_partial(self, save: _Save) -> bool:
        """Create the folder that all ranks write to; return False on all ranks if that failed."""
        self._failure, self._error, self._cancel_reason = "", None, ""
        self._canceled.clear()
        if self._rank == 0:
            try:
                shutil.rmtree(save.partial, ignore_errors=True)
                save.partial.mkdir(parents=True)
            except OSError as error:
                self._discard(save, error)
        created = [not self._failure]
        dist.broadcast_object_list(created)
        return created[0]

    def _work(self, save: _Save) -> None:
        """Write this rank's file and report; on rank 0, also complete the checkpoint. Runs in the thread."""
        try:
            get_values = self._stage()
            written = write_file(save.partial, self._plan.local, get_values, self._canceled.is_set)
            report = dataclasses.asdict(written)
        except Exception as error:
            self._error = error
            report = {"error": _reason(error)}
        path = save.report(self._rank)
        try:
            path.with_suffix(".part").write_text(json.dumps(report), encoding="utf-8")
            path.with_suffix(".part").replace(path)
        except OSError as error:  # rank 0 learns of it in the next collective call
            self._error = self._error or error
        if self._rank == 0:
            self._complete(save)

    def _stage(self) -> Callable[[MetadataIndex], torch.Tensor]:
        """Return a function from index to values: staged copies, or the state itself if training waits."""
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # the current device is per thread
            if self._staging:
                self._staging.stage(self._optimizer.iter_state_dicts())
                return self._staging.get
            tensors = self._optimizer.master_state_dict() | self._optimizer.optimizer_state_dict()
            return lambda index: tensors[index.fqn].__get_tensor_shard__(index)
        finally:
            self._staged.set()

    def _complete(self, save: _Save) -> None:
        """Complete the checkpoint from the files of all ranks, or delete them."""
        try:
            written = self._collect_reports(save)
            files = write_index(save.partial, self._plan, written)
            for rank in range(self._world_size):
                save.report(rank).unlink()
            content = {
                "state": dataclasses.asdict(save.state),
                "recipe": dataclasses.asdict(self._config),
                "tokenizer_sha256": self._tokenizer_sha256,
                "files": files,
            }
            commit_checkpoint(save.partial, save.final, content)
        except Exception as error:
            self._error = self._error or error
            self._discard(save, _SaveFailed(self._cancel_reason) if self._cancel_reason else error)
            return
        seconds = time.monotonic() - save.started
        nbytes = sum(file["bytes"] for file in files.values())
        text = f"checkpoint {save.final.name}: {nbytes / 1e6:,.1f} MB saved in {seconds:.1f} s"
        self._add_event("saved", save.state.step, text)
        with self._lock:
            self._metrics[DURATION] = seconds
        try:
            apply_retention(save.final, self._config.train)
        except OSError as error:
            text = f"warning: old checkpoints next to {save.final} could not be removed: {error}"
            self._add_event("warning", save.state.step, text)

    def _collect_reports(self, save: _Save) -> list[WrittenFile]:
        """Wait for the reports of all ranks and return them, in rank order.

        Raises:
            _SaveFailed: a rank could not write, or this save was canceled.
        """
        reports: dict[int, dict[str, Any]] = {}
        while missing := [rank for rank in range(self._world_size) if rank not in reports]:
            present = {path.name for path in save.partial.iterdir()}
            for rank in missing:
                if (path := save.report(rank)).name in present:
                    reports[rank] = json.loads(path.read_text(encoding="utf-8"))
            if len(reports) < self._world_size and self._canceled.wait(POLL_SECONDS):
                raise _SaveFailed("canceled")
        for rank, report in sorted(reports.items()):
            if "error" in report:
                raise _SaveFailed(f"process {rank}: {report['error']}")
        return [WrittenFile(**reports[rank]) for rank in range(self._world_size)]

    def _discard(self, save: _Save, error: Exception) -> None:
        """Delete the partial checkpoint and record the reason."""
        free_space = ""
        with contextlib.suppress(OSError):  # the disk may be unreachable
            free_bytes = shutil.disk_usage(next(path for path in save.partial.parents if path.is_dir())).free
            free_space = f" ({free_bytes} bytes are free on its disk)"
        self._failure = f"checkpoint {save.final} could not be written{free_space}: {_reason(error)}"
        shutil.rmtree(save.partial, ignore_errors=True)
        text = f"warning: {self._failure}; training continues, and the next save runs on schedule"
        self._add_event("save failed", save.state.step, text)

    def _add_event(self, event: str, step: int, text: str) -> None:
        with self._lock:
            self._events.append(SaveEvent(event, step, text))


def _reason(error: Exception | None) -> str:
    """Return the cause of a failure and how to fix it; an empty string for None."""
    if error is None:
        return ""
    if isinstance(error, OSError):
        # Omit the file name: it is inside the partial folder, which is deleted.
        return user_message(OSError(error.errno, error.strerror)) or error.strerror or repr(error)
    return str(error) if isinstance(error, _SaveFailed) else repr(error)
