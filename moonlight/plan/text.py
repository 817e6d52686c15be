"""Output of `moonlight plan`: tables for a terminal of 100 columns."""

import re
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from moonlight.plan.build import RunPlan, mean_memory
from moonlight.plan.figures import RESERVE, describe_layout, exchange_comm_bytes, rank_comm_bytes
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.plan.speed import bubble_fraction

WIDE = 200
"""Columns of the parameter list in a file or pipe: one line for each parameter."""

NARROW = 100
"""Columns of all other output in a file or pipe."""

MAX_LIST = 14
"""Maximum characters of a list of ranks."""

MEMORY_PARTS = {
    "weights": "of the model, in its dtype",
    "gradient_sums": "all parameters, in optimizer.gradient_dtype",
    "gradient_shards": "summed over ranks, rows it owns, float32",
    "masters": "master weights of the rows it owns",
    "momenta": "of the rows it owns",
    "buffers": "router biases and counts",
    "activations": "{micro_batches} in flight on stage {stage}",
    "loss": "a chunk of logits, the head's gradient",
    "exchange": "gradients or weights sent and received",
    "update": "Newton-Schulz and gathered matrices",
}

COMM_PARTS = {
    "gradients": "to their owners, in optimizer.gradient_dtype",
    "weights": "from their owners",
    "matrices": "shards of matrices gathered, results scattered",
    "slices": "tensor parallelism",
    "dispatch": "tokens to experts and back, uniform routing",
    "expert slices": "tensor parallelism of experts",
    "pipeline": "hidden states and their gradients",
}

SECONDS_PARTS = {
    "arithmetic": "forward and backward pass at {efficiency:g} of peak FLOP/s",
    "slices": "tensor parallelism, not overlapped",
    "dispatch": "tokens to experts and back, not overlapped",
    "bubble": "waiting for other stages, {bubble:.1%} of their time",
    "pipeline": "between stages, not overlapped",
    "gradients": "beyond the last micro-batch's backward pass",
    "newton_schulz": "on the most loaded rank",
    "matrices": "gathered and scattered, not overlapped",
    "weights": "beyond the first micro-batch's forward pass",
}


def print_plan(plan: RunPlan, *, parameters: bool, console: Console | None = None) -> None:
    """Print summary and tables; with `parameters`, first a table of every parameter.

    A file or pipe gets one line for each parameter. A terminal gets layers as headings, so that names fit.
    """
    console = console or Console()
    if parameters:
        _print_parameters(plan, console)
    if not console.is_terminal:
        console.width = NARROW
    soft_wrap = not console.is_terminal  # one fact per line, for filters
    for text in [*summary(plan), fit_text(plan)]:
        console.print(text, soft_wrap=soft_wrap, highlight=False)
    for table in (_memory_table(plan), _comm_table(plan), _seconds_table(plan)):
        console.print()
        console.print(table, highlight=False)
    console.print()
    for text in conclusions(plan):
        console.print(text, soft_wrap=soft_wrap, highlight=False)


def _print_parameters(plan: RunPlan, console: Console) -> None:
    wide = not console.is_terminal
    if wide:
        console.width = WIDE
    table = Table("parameter", "shape", "rule", "decay", "matrices", "owner", box=None, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    layer = ""
    for line in plan.params:
        name = line.key
        if not wide and (match := re.match(r"decoder\.layers\.\d+\.", name)):
            if match[0] != layer:
                layer = match[0]
                table.add_row(layer)
            name = "  " + name.removeprefix(layer)
        matrices = (", " if wide else "\n").join(f"{n} of {_shape(shape)}" for shape, n in line.matrices.items())
        decay = "yes" if line.decay else "no"
        table.add_row(name, _shape(line.shape), line.algorithm, decay, matrices, ranges(line.owners))
    console.print(table)
    console.print("owner: among data-parallel ranks; for experts, among expert-data-parallel ranks\n")


def summary(plan: RunPlan) -> list[str]:
    """Return layout, parameters, arithmetic and optimizer costs compared with AdamW, one line each."""
    config, counts, length = plan.config, count_parameters(plan.config.model), plan.config.data.sequence_length
    flops = train_flops_per_token(config.model, length)
    muon, adamw = plan.num_parameters("muon"), plan.num_parameters("adamw")
    state, base_state = [r.state for r in plan.optimizer_costs], max(a.state for a in plan.adamw)
    comm, base_comm = [max(r.sent, r.received) for r in plan.optimizer_costs], max(a.sent for a in plan.adamw)
    mean_state, mean_comm = sum(state) / len(state), sum(comm) / len(comm)
    return [
        f"{config.name} on {num_gpus(plan.world_size, plan.machine.name)}",
        f"layout: {describe_layout(plan)}",
        f"parameters: {muon + adamw + plan.num_router_biases:,}, including {plan.num_router_biases:,} router biases",
        f"optimizer: Muon for {muon:,} in {plan.num_matrices:,} matrices, AdamW for {adamw:,}",
        f"activated by a token: {counts.activated_with_head:,}, without the head {counts.activated:,}",
        f"training: {plan.num_tokens:,} tokens in {plan.timeline.num_steps:,} steps; {flops:.4g} FLOPs per token at "
        f"sequence length {length:,}",
        f"optimizer state of a rank: at most {format_bytes(max(state))}, mean {format_bytes(mean_state)}; "
        f"AdamW (ZeRO-1) {format_bytes(base_state)}{_ratio(max(state), base_state)}",
        f"optimizer communication of a rank and step: at most {format_bytes(max(comm))}, mean "
        f"{format_bytes(mean_comm)}; AdamW (ZeRO-1) {format_bytes(base_comm)}{_ratio(max(comm), base_comm)}",
    ]


def _memory_table(plan: RunPlan) -> Table:
    peak_memory, mean = plan.memories[plan.peak_rank], mean_memory(plan.memories)
    stage = plan.rank_stage(plan.peak_rank)
    count = stage.micro_batches_in_flight
    chunks = " of a chunk" * (plan.config.parallel.virtual_pipeline_parallel_size > 1)
    values = {"micro_batches": f"{count} micro-batch{'es' * (count != 1)}{chunks}", "stage": stage.index}
    table = _table("memory of a rank", f"most loaded, rank {plan.peak_rank:,}", "mean", "")
    for name, description in MEMORY_PARTS.items():
        if getattr(mean, name):
            numbers = (format_bytes(getattr(memory, name)) for memory in (peak_memory, mean))
            table.add_row(name.replace("_", " "), *numbers, description.format(**values))
    mean_peak = sum(memory.peak for memory in plan.memories) / len(plan.memories)
    table.add_row("peak", format_bytes(peak_memory.peak), format_bytes(mean_peak), _parts_of_peak(plan))
    return table


def _parts_of_peak(plan: RunPlan) -> str:
    memory = plan.memories[plan.peak_rank]
    if memory.update > memory.passes:
        return "sum during the update, without activations"
    smaller = "loss" if memory.exchange >= memory.loss else "exchange"
    return f"sum without {smaller} and update"


def _comm_table(plan: RunPlan) -> Table:
    table = _table("network bytes", "most loaded", "mean", "of a step, sent or received, the larger")
    for name, description in COMM_PARTS.items():
        by_rank = [rank_comm_bytes(plan, name, rank).larger for rank in range(len(plan.ranks))]
        if max(by_rank):
            table.add_row(name, format_bytes(max(by_rank)), format_bytes(sum(by_rank) / len(by_rank)), description)
            if name == "weights":
                for group, exchanged in zip(("dense parameters", "experts"), exchange_comm_bytes(plan), strict=True):
                    table.add_row(f"  of {group}", format_bytes(exchanged), "", "gradients and weights together")
    return table


def _seconds_table(plan: RunPlan) -> Table:
    seconds = plan.seconds
    table = _table("seconds of a step", f"batch {plan.global_batch_size:,}", "fraction", "")
    bubble = bubble_fraction(plan.config, plan.stages[0].num_micro_batches)
    for name, description in SECONDS_PARTS.items():
        value = getattr(seconds, name)
        if value or name in ("gradients", "weights"):
            text = description.format(bubble=bubble, efficiency=plan.machine.efficiency)
            table.add_row(name.replace("_", "-"), format_seconds(value), f"{value / seconds.total:.2%}", text)
    rate = plan.tokens_per_step / seconds.total
    speed = f"{rate:,.0f} tokens/s, {rate / plan.world_size:,.0f} a GPU"
    table.add_row("step", format_seconds(seconds.total), "", speed)
    return table


def conclusions(plan: RunPlan) -> list[str]:
    """Return Newton-Schulz, training time, checkpoint and assumptions, one line each."""
    machine, gpu, config = plan.machine, plan.machine.gpu, plan.config
    flops_by_rank = [cost.newton_schulz_flops for cost in plan.ranks]
    largest, mean = max(flops_by_rank), sum(flops_by_rank) / len(flops_by_rank)
    stage = plan.rank_stage(flops_by_rank.index(largest))
    batches = plan.timeline.steps_by_batch_size()
    steps = ", ".join(f"{count:,} steps of {size:,}" for size, count in batches.items())
    return [
        f"Newton-Schulz: {largest:.3g} FLOPs on the most loaded rank, {largest / (stage.flops + largest):.3%} of its "
        "step" + (f" and {largest / mean:.2f} times the mean" if mean else "; no matrices"),
        f"entire run: {format_duration(plan.total_seconds)} ({steps} sequences)",
        f"checkpoint: {format_bytes(plan.checkpoint_bytes)} of float32 masters and momenta, "
        f"{plan.checkpoint_bytes / machine.storage_bytes_per_second:,.1f} s at "
        f"{machine.storage_bytes_per_second / 1e9:g} GB/s" + (", during training" if config.train.async_save else ""),
        f"estimated, not measured: {machine.efficiency:g} of {gpu.peak_flops_per_second / 1e12:g} TFLOP/s; "
        f"{gpu.node_bytes_per_second / 1e9:g} GB/s in a node of 8 GPUs,",
        f"{gpu.network_bytes_per_second / 1e9:g} GB/s per GPU between nodes; docs/planning.md lists the limits",
    ]


def fit_text(plan: RunPlan) -> str:
    """Return one line that states whether the most loaded rank fits in GPU memory."""
    peak, memory_bytes = plan.memories[plan.peak_rank].peak, plan.machine.memory_bytes
    if peak > memory_bytes:
        return (
            f"DOES NOT FIT: the most loaded rank needs {format_bytes(peak)}, {format_bytes(peak - memory_bytes)} more "
            f"than the {format_bytes(memory_bytes)} of a GPU; use --suggest to search for a layout that fits"
        )
    if peak > memory_bytes * (1 - RESERVE):
        return (
            f"FITS BARELY: the most loaded rank needs {format_bytes(peak)} of {format_bytes(memory_bytes)}; "
            f"leave {RESERVE:.0%} free for memory that the plan does not model"
        )
    return f"fits: the most loaded rank needs {format_bytes(peak)} of {format_bytes(memory_bytes)}"


def _table(*columns: str) -> Table:
    table = Table(*columns, box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in table.columns[:3]:
        column.no_wrap = True
    for column in table.columns[1:3]:
        column.justify = "right"
    return table


def ranges(ranks: Sequence[int]) -> str:
    """Format ascending ranks as 0-3,7. A list longer than MAX_LIST becomes a count and a range: 20 in 0-63."""
    intervals: list[list[int]] = []
    for rank in ranks:
        if intervals and intervals[-1][1] == rank - 1:
            intervals[-1][1] = rank
        else:
            intervals.append([rank, rank])
    text = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in intervals)
    return text if len(text) <= MAX_LIST else f"{len(ranks)} in {ranks[0]}-{ranks[-1]}"


def _shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def format_bytes(count: float) -> str:
    """Format bytes in GB (10^9), MB (10^6) or kB (10^3)."""
    if count >= 1e9:
        return f"{count / 1e9:,.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e6 else f"{count / 1e3:.2f} kB"


def format_duration(seconds: float) -> str:
    """Format seconds as days, or as hours, minutes or seconds if they are less than one day."""
    if seconds >= 86400:
        return f"{seconds / 86400:,.2f} days"
    if seconds >= 3600:
        return f"{seconds / 3600:.2f} hours"
    return f"{seconds / 60:.2f} minutes" if seconds >= 60 else format_seconds(seconds)


def num_gpus(count: int, name: str) -> str:
    """Format a number of GPUs of one kind: "64 h100 GPUs"."""
    return f"{count:,} {name} {'GPU' if count == 1 else 'GPUs'}"


def format_seconds(seconds: float) -> str:
    """Format seconds with about four digits."""
    if 0 < seconds < 0.1:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds:.3f} s" if seconds < 10 else f"{seconds:,.2f} s"


def _ratio(count: float, base: float) -> str:
    return f", ratio {count / base:.3f}" if base else ""
