"""`moonlight bench profile`: time of a training step by part of the model and kind of work.

One process trains steps of a recipe on random tokens under torch's profiler. Each operator's self time counts for the
part of the model that called the operator. A step cannot avoid the time of matrix products, so the other time is what
an optimization can save. The products' FLOP/s show the speed of the machine's library. The profiler adds overhead:
trust fractions more than totals, which `moonlight bench train-step` measures.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from moonlight import parallel
from moonlight.bench.monitors import NO_MONITORS, build_initialized, random_batches
from moonlight.bench.report import hardware
from moonlight.config.load import load_recipe
from moonlight.config.parallel import ParallelConfig
from moonlight.config.timeline import RunSchedule
from moonlight.files import make_folder, write_json
from moonlight.train.step import train_step

WARM_UP_STEPS = 3
UPDATE = "moonlight: update"
STEP = "moonlight: step"
PRODUCTS = {"aten::mm": 0, "aten::bmm": 0, "aten::_grouped_mm": 0, "aten::addmm": 1, "aten::baddbmm": 1}
"""Operator -> index of the left factor among its arguments; the right factor follows."""
COPIES = {"aten::copy_", "aten::cat", "aten::_foreach_copy_"}
HEAD, ATTENTION, EXPERTS, LINEAR = "head and loss", "attention", "routed experts", "other linear layers"
NEWTON_SCHULZ, REST_OF_UPDATE = "Newton-Schulz's products", "rest of the update"
OTHER = "norms, rope, routing, gradients"
PARTS = (HEAD, ATTENTION, EXPERTS, LINEAR, OTHER, NEWTON_SCHULZ, REST_OF_UPDATE)
"""Names of the parts, which are keys of the JSON file."""
CALLERS = {
    "LinearCrossEntropy": HEAD,
    "CpuAttention": ATTENTION,
    "scaled_dot_product": ATTENTION,
    "SortedExperts": EXPERTS,
    "LinearWith": LINEAR,
    "aten::linear": LINEAR,
    "MmBackward": LINEAR,
}
"""Text in the name of an operator or of one of its callers -> part."""


@dataclass
class ProfilePart:
    """One row of the profile: milliseconds of a step, and GFLOP of its products. Field names are JSON keys."""

    products_ms: float = 0.0
    copies_ms: float = 0.0
    other_ms: float = 0.0
    gflop: float = 0.0

    @property
    def ms(self) -> float:
        """Total milliseconds."""
        return self.products_ms + self.copies_ms + self.other_ms


def bench_profile(recipe: Path, overrides: list[str], steps: int, threads: int, json_path: Path | None = None) -> None:
    """Profile `steps` steps of the recipe in one process, print the time of each part, and write it to `json_path`."""
    config = replace(load_recipe(recipe, overrides), parallel=ParallelConfig(), monitor=NO_MONITORS)
    parallel.init_single_process()
    try:
        on_gpu = torch.cuda.is_available()
        if not on_gpu:
            torch.set_num_threads(threads)
        model_chunks, optimizer = build_initialized(config)
        step_schedule, batches = RunSchedule(config).at(2), random_batches(config)

        def mark_update() -> None:
            with record_function(UPDATE):
                pass

        def step() -> None:
            with record_function(STEP):
                train_step(model_chunks, optimizer, config, batches, step_schedule, before_update=mark_update)

        for _ in range(WARM_UP_STEPS):
            step()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]

        def profile_steps(count: int, record_shapes: bool) -> dict[str, ProfilePart]:
            with profile(activities=activities, record_shapes=record_shapes) as profiler:
                for _ in range(count):
                    step()
            return profile_parts(profiler.events() or [], count, on_gpu)

        # Recording shapes keeps tensors alive, which doubles the time of operators that reuse their memory.
        with_shapes, parts = profile_steps(1, True), profile_steps(steps, False)
        for name, part in parts.items():
            part.gflop = with_shapes[name].gflop
    finally:
        parallel.destroy_distributed()
    tokens = sum(batch.tokens.numel() for batch in batches)
    machine = hardware("cuda" if on_gpu else "cpu")
    title = f"{config.name}, {config.train.dtype}, a step of {tokens:,} tokens"
    _print(title, str(machine), parts)
    if json_path:
        make_folder(json_path.parent)
        json_parts = {name: asdict(part) for name, part in parts.items()}
        write_json(json_path, {"title": title, "machine": str(machine), "parts": json_parts})


def profile_parts(events: Sequence[Any], steps: int, on_gpu: bool) -> dict[str, ProfilePart]:
    """Sum the operators of `steps` profiled steps by part, per step: CPU time, or time of the GPU's kernels."""
    marks = [event.time_range.start for event in events if event.name == UPDATE]
    updates = [
        (mark, event.time_range.end)
        for event in events
        if event.name == STEP
        for mark in marks
        if event.time_range.start < mark < event.time_range.end
    ]
    assert len(updates) == steps
    parts = {name: ProfilePart() for name in PARTS}
    for event in events:
        name = event.name.removesuffix("_")
        is_product = name in PRODUCTS
        in_update = any(start <= event.time_range.start <= stop for start, stop in updates)
        update_part = NEWTON_SCHULZ if is_product else REST_OF_UPDATE
        part = parts[update_part if in_update else _find_part(event)]
        milliseconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3 / steps
        if is_product:
            part.products_ms += milliseconds
            if event.input_shapes and not _is_within_product(event):
                part.gflop += operations(name, event.input_shapes) / 1e9 / steps
        elif event.name in COPIES:
            part.copies_ms += milliseconds
        else:
            part.other_ms += milliseconds
    return parts


def _find_part(event: Any) -> str:
    """Return the part of an operator or of its nearest caller in CALLERS."""
    while event is not None:
        for text, part in CALLERS.items():
            if text in event.name:
                return part
        event = event.cpu_parent
    return OTHER


def _is_within_product(event: Any) -> bool:
    """Return whether a product called the operator: one product may call another."""
    while (event := event.cpu_parent) is not None:
        if event.name.removesuffix("_") in PRODUCTS:
            return True
    return False


def operations(name: str, shapes: Sequence[Sequence[int]]) -> float:
    """Return the floating-point operations of the product `name`, from the shapes of its arguments."""
    left, right = shapes[PRODUCTS[name] :][:2]
    return 2.0 * math.prod(left) * right[-1]


def _print(title: str, caption: str, parts: dict[str, ProfilePart]) -> None:
    table = Table(title=title, caption=caption)
    for name in ("part", "ms", "fraction", "products", "copies", "other", "GFLOP/s"):
        table.add_column(name, justify="left" if name == "part" else "right", no_wrap=True)
    total = ProfilePart(*(sum(getattr(part, name) for part in parts.values()) for name in asdict(ProfilePart())))
    for name, part in [*parts.items(), ("all", total)]:
        rate = f"{1e3 * part.gflop / part.products_ms:.0f}" if part.products_ms else ""
        times = (f"{value:.1f}" for value in (part.products_ms, part.copies_ms, part.other_ms))
        table.add_row(name, f"{part.ms:.1f}", f"{part.ms / total.ms:.0%}", *times, rate)
    Console(width=110).print(table)
