"""`moonlight bench monitors`: cost of the monitors at their default cadence, as a fraction of a training step.

One process trains recipes of this repository on random tokens, at a learning rate too small to change a weight. It
times in turns a step without monitors and each part that monitors add: writing metrics, attention logits of one
micro-batch, norms and loads, SVD entropies. The average cost per step follows from the cadence. The gate: losses with
and without monitors are bit-identical, and entropies agree with numpy.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import moonlight.megatron_compat  # noqa: F401  (stand-ins, before Megatron)

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from moonlight import parallel
from moonlight.bench.report import BenchResult, hardware, print_results
from moonlight.config.load import load_recipe
from moonlight.config.monitor import MonitorConfig
from moonlight.config.parallel import ParallelConfig
from moonlight.config.run import RunConfig
from moonlight.config.schedule import ScheduleConfig
from moonlight.config.timeline import RunSchedule
from moonlight.dist_checkpoint.state import TrainState
from moonlight.model.attention import max_logits
from moonlight.model.build import build_model
from moonlight.model.shards import init_weights
from moonlight.optim.distributed_muon import DistributedMuon, build_optimizer
from moonlight.optim.svd_entropy import svd_entropy
from moonlight.train.forward_backward import MicroBatch, find_attentions, find_routers
from moonlight.train.metrics import MetricsWriter
from moonlight.train.monitors import collect_monitors
from moonlight.train.step import StepResult, train_step
from moonlight.train.step_metrics import step_metrics

BAR_PERCENT = 1.0
NO_MONITORS = MonitorConfig(every_steps=0, svd_entropy_every_steps=0)
NO_ENTROPIES = MonitorConfig(every_steps=1, svd_entropy_every_steps=0)
ALL_MONITORS = MonitorConfig(every_steps=1, svd_entropy_every_steps=1)
RECIPES = {
    "quickstart": ("configs/quickstart.yaml", {}, 10),
    # On a CPU, a step of the recipe's 262,144 tokens takes an hour. The cost of monitors does not grow with tokens, so
    # their fraction of a short step is larger.
    "0.1B, 3 of its 9 layers, 2,048 tokens": (
        "configs/moonlight_family/a0.1b.yaml",
        {"model.num_hidden_layers": 3, "data.sequence_length": 1024, "train.global_batch_size": 2},
        1,
    ),
}
"""Name -> recipe, overrides, factor of the number of rounds: short steps need more rounds."""
STEP = 2
"""The first step is always monitored, so the benchmark uses the second."""
ENTROPY_TOLERANCE = 1e-5
PARTS = ("step", "metrics", "all metrics", "logits", "monitors", "entropies")
"""Timed parts: a step, its metrics without and with monitors, attention logits, monitors without and with entropies."""


def bench_monitors(rounds: int, json_path: Path | None = None) -> bool:
    """Run the benchmark, print its table, and return whether every result passed."""
    results, notes = [], []
    for name, (path, overrides, rounds_factor) in RECIPES.items():
        config = load_recipe(Path(path), [f"{key}={value}" for key, value in overrides.items()])
        config = replace(
            config, parallel=ParallelConfig(), schedule=ScheduleConfig(lr=1e-30, router_bias_update_rate=0.0)
        )
        parallel.init_single_process()
        try:
            times, passed = _measure(config, rounds * rounds_factor)
        finally:
            parallel.destroy_distributed()
        results.append(_result(name, times, passed))
        ms = {part: 1e3 * statistics.median(part_times) for part, part_times in times.items()}
        notes.append(
            f"{name}: a step {ms['step']:.0f} ms, its metrics {ms['metrics']:.2f} ms; in a monitored step, attention "
            f"logits {ms['logits']:.1f} ms, other monitors {ms['monitors']:.1f} ms, metrics "
            f"{ms['all metrics']:.2f} ms; SVD entropies {ms['entropies']:.0f} ms; gate "
            f"{'passed' if passed else 'FAILED'}"
        )
    notes.append("ours: average time added to a step; peer: the step; ratio: percent")
    return print_results("Monitors at their default cadence", results, hardware("cpu"), notes, json_path)


def _measure(config: RunConfig, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Return seconds of each of PARTS in every round, and whether the gate passed."""
    model_chunks, optimizer = build_initialized(config)
    step_schedule = RunSchedule(config).at(STEP)
    state = TrainState(step=STEP, consumed_sequences=step_schedule.end)
    batches = random_batches(config)
    attention_inputs: list[tuple[torch.Tensor, torch.Tensor]] = []
    for attention in find_attentions(model_chunks):
        attention.register_forward_pre_hook(
            lambda _, args: attention_inputs.append((args[0].detach(), args[1].detach()))
        )
    group = parallel_state.get_pipeline_model_parallel_group()
    plain, monitored, with_entropies = (
        replace(config, monitor=monitor) for monitor in (NO_MONITORS, NO_ENTROPIES, ALL_MONITORS)
    )
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    losses = set()
    with tempfile.TemporaryDirectory() as temporary_folder:
        metrics = MetricsWriter(Path(temporary_folder), 0)

        def write_metrics(step_config: RunConfig, result: StepResult) -> None:
            metrics.write(step_metrics(state, step_config, step_schedule, result, 1.0))

        def timed(name: str, call: Callable[[], Any]) -> Any:
            started = time.perf_counter()
            result = call()
            times[name].append(time.perf_counter() - started)
            return result

        for _ in range(rounds + 1):
            attention_inputs.clear()
            result = timed("step", partial(train_step, model_chunks, optimizer, plain, batches, step_schedule))
            timed("metrics", partial(write_metrics, plain, result))
            inputs = attention_inputs[: len(find_attentions(model_chunks))]  # of the first micro-batch
            timed("logits", partial(_logits, inputs))
            routers = find_routers(model_chunks)
            counts = torch.ones(len(routers), config.model.num_experts)
            collect = partial(
                collect_monitors, optimizer, step=STEP, routers=routers, counts=counts, pipeline_group=group
            )
            timed("monitors", partial(collect, monitored))
            timed("entropies", partial(collect, with_entropies))
            monitored_result = train_step(model_chunks, optimizer, monitored, batches, step_schedule)
            timed("all metrics", partial(write_metrics, monitored, monitored_result))
            losses |= {result.loss, monitored_result.loss}
        metrics.close()
    matrices = [
        parameter.weight_2d
        for parameter in optimizer.data_parallel.parameters
        if parameter.key.endswith(("router.weight", "linear_kv_down_proj.weight"))
    ]
    entropies_agree = all(abs(svd_entropy(matrix) - _numpy_entropy(matrix)) < ENTROPY_TOLERANCE for matrix in matrices)
    # The first round warms up.
    return {part: part_times[1:] for part, part_times in times.items()}, entropies_agree and len(losses) == 1


def _logits(inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for query, key in inputs:
        max_logits(query, key, 1.0)


def build_initialized(config: RunConfig) -> tuple[list[GPTModel], DistributedMuon]:
    """Return the model chunks with random weights and their optimizer, in a world that is already initialized."""
    parallel.init_model_parallel(config.parallel, config.train.seed)
    model_chunks = build_model(config)
    optimizer = build_optimizer(model_chunks, config)
    with optimizer.loading_masters() as masters:
        init_weights(masters, config.model, config.train.seed)
    return model_chunks, optimizer


def random_batches(config: RunConfig) -> list[MicroBatch]:
    """Return the micro-batches of a global batch of random tokens, the same in every call.

    Tokens and labels are int64 [micro-batch size, sequence length], loss masks float32 ones of the same shape.
    """
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = (config.train.global_batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return [
        MicroBatch(part[:, :-1], part[:, 1:], torch.ones_like(part[:, 1:], dtype=torch.float32))
        for part in tokens.split(config.train.micro_batch_size)
    ]


def _numpy_entropy(matrix: torch.Tensor) -> float:
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    fractions = values**2 / (values**2).sum()
    return float(-(fractions * np.log(fractions)).sum() / np.log(len(fractions)))


def _result(name: str, times: dict[str, list[float]], passed: bool) -> BenchResult:
    """Return the average cost of monitors per step, in percent of a step without them.

    The result is computed from medians, the spread from single rounds.
    """
    cadence = MonitorConfig()

    def cost(
        step: float, metrics: float, all_metrics: float, logits: float, monitors: float, entropies: float
    ) -> float:
        """Return added seconds per step: metrics in every step, monitors and entropies at their cadence."""
        monitored = logits + monitors + all_metrics - metrics
        return metrics + monitored / cadence.every_steps + (entropies - monitors) / cadence.svd_entropy_every_steps

    rounds = [cost(*values) / values[0] for values in zip(*(times[part] for part in PARTS), strict=True)]
    medians = [statistics.median(times[part]) for part in PARTS]
    percent = 100 * cost(*medians) / medians[0]
    steps = times["step"]
    return BenchResult(
        name,
        "ms",
        1e3 * cost(*medians),
        1e3 * medians[0],
        percent,
        f"{100 * min(rounds):.2f}..{100 * max(rounds):.2f}",
        f"<= {BAR_PERCENT:.0f} %",
        passed and percent <= BAR_PERCENT,
        ours_rounds=tuple(1e3 * fraction * step for fraction, step in zip(rounds, steps, strict=True)),
        peer_rounds=tuple(1e3 * step for step in steps),
        ratio_rounds=tuple(100 * fraction for fraction in rounds),
        own_limit=True,
    )
