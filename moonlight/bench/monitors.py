"""`moonlight bench monitors`: what the monitors cost at their default cadence, as a share of a training step.

One process trains recipes of this repository on random tokens at a learning rate too small to move a weight. In turns,
a step without monitors is timed, and everything that is done besides in a step with them: writing metrics, the
attention logits of one micro-batch, norms and loads, SVD entropies. The cost of a step on average follows from their
cadence. The gate: losses with and without monitors are the same bits, and entropies are numpy's.
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
from moonlight.optim.distributed_muon import build_optimizer
from moonlight.optim.svd_entropy import svd_entropy
from moonlight.train.forward_backward import MicroBatch, find_attentions, find_routers
from moonlight.train.metrics import MetricsWriter
from moonlight.train.monitors import collect_monitors
from moonlight.train.step import StepResult, train_step
from moonlight.train.step_metrics import step_metrics

BAR_PERCENT = 1.0
NEVER = MonitorConfig(every_steps=0, svd_entropy_every_steps=0)
OFTEN = MonitorConfig(every_steps=1, svd_entropy_every_steps=0)
ALWAYS = MonitorConfig(every_steps=1, svd_entropy_every_steps=1)
RECIPES = {
    "quickstart": ("configs/quickstart.yaml", {}, 10),
    # On a CPU a step of its 262,144 tokens would take an hour. Monitors cost the same beside more tokens, so this is
    # the harder case.
    "0.1B, 3 of its 9 layers, 2,048 tokens": (
        "configs/moonlight_family/a0.1b.yaml",
        {"model.num_hidden_layers": 3, "data.sequence_length": 1024, "train.global_batch_size": 2},
        1,
    ),
}
"""Name -> recipe, overrides, and how many rounds it takes for one of the others: short steps need more."""
STEP = 2
"""A step after the first, which is watched always."""
ENTROPY_TOLERANCE = 1e-5
PARTS = ("step", "told", "told watched", "logits", "watched", "entropies")


def bench_monitors(rounds: int, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    figures, notes = [], []
    for name, (path, overrides, more) in RECIPES.items():
        config = load_recipe(Path(path), [f"{key}={value}" for key, value in overrides.items()])
        config = replace(
            config, parallel=ParallelConfig(), schedule=ScheduleConfig(lr=1e-30, router_bias_update_rate=0.0)
        )
        parallel.init_single_process()
        try:
            times, passed = _measure(config, rounds * more)
        finally:
            parallel.destroy_distributed()
        figures.append(_figure(name, times, passed))
        ms = {part: 1e3 * statistics.median(found) for part, found in times.items()}
        notes.append(
            f"{name}: a step {ms['step']:.0f} ms, its metrics {ms['told']:.2f} ms; when watched, attention logits "
            f"{ms['logits']:.1f} ms, the rest {ms['watched']:.1f} ms, metrics {ms['told watched']:.2f} ms; SVD "
            f"entropies {ms['entropies']:.0f} ms; gate {'passed' if passed else 'FAILED'}"
        )
    notes.append("ours: added to a step on average; peer: the step; ratio: per cent")
    return print_results("Monitors at their default cadence", figures, hardware("cpu"), notes, json_path)


def _measure(config: RunConfig, rounds: int) -> tuple[dict[str, list[float]], bool]:
    """Seconds of each of PARTS in every round, and whether the gate was passed."""
    parallel.init_model_parallel(config.parallel, config.train.seed)
    models = build_model(config)
    optimizer = build_optimizer(models, config)
    with optimizer.loading_masters() as masters:
        init_weights(masters, config.model, config.train.seed)
    moment = RunSchedule(config).at(STEP)
    state = TrainState(step=STEP, consumed_sequences=moment.end)
    batches = random_batches(config)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for attention in find_attentions(models):
        attention.register_forward_pre_hook(lambda _, args: seen.append((args[0].detach(), args[1].detach())))
    group = parallel_state.get_pipeline_model_parallel_group()
    quiet, often, always = (replace(config, monitor=monitor) for monitor in (NEVER, OFTEN, ALWAYS))
    times: dict[str, list[float]] = {part: [] for part in PARTS}
    losses = set()
    with tempfile.TemporaryDirectory() as place:
        metrics = MetricsWriter(Path(place), 0)

        def tell(of: RunConfig, result: StepResult) -> None:
            metrics.write(step_metrics(state, of, moment, result, 1.0))

        for number in range(rounds + 1):
            clock = _Clock()
            seen.clear()
            result = clock.time("step", partial(train_step, models, optimizer, quiet, batches, moment))
            clock.time("told", partial(tell, quiet, result))
            inputs = seen[: len(find_attentions(models))]  # of the first micro-batch
            clock.time("logits", partial(_logits, inputs))
            counts = torch.ones(len(find_routers(models)), config.model.num_experts)
            routers = find_routers(models)
            look = partial(
                collect_monitors, optimizer, step=STEP, routers=routers, counts=counts, pipeline_group=group
            )
            clock.time("watched", partial(look, often))
            clock.time("entropies", partial(look, always))
            whole = train_step(models, optimizer, often, batches, moment)
            clock.time("told watched", partial(tell, often, whole))
            losses |= {result.loss, whole.loss}
            if number:  # the first round warms up
                for part in PARTS:
                    times[part].append(clock.seconds[part])
        metrics.close()
    matrices = [
        parameter.weight_2d
        for parameter in optimizer.data_parallel.parameters
        if parameter.key.endswith(("router.weight", "linear_kv_down_proj.weight"))
    ]
    exact = all(abs(svd_entropy(matrix) - _numpy_entropy(matrix)) < ENTROPY_TOLERANCE for matrix in matrices)
    return times, exact and len(losses) == 1


def _logits(inputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    for query, key in inputs:
        max_logits(query, key, 1.0)


class _Clock:
    """Seconds of calls, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        self.seconds[name] = time.perf_counter() - started
        return result


def random_batches(config: RunConfig) -> list[MicroBatch]:
    """Micro-batches of a global batch of random tokens, the same every time."""
    generator = torch.Generator().manual_seed(config.train.seed)
    shape = (config.train.global_batch_size, config.data.sequence_length + 1)
    tokens = torch.randint(0, config.model.vocab_size, shape, generator=generator)
    return [
        MicroBatch(part[:, :-1], part[:, 1:], torch.ones_like(part[:, 1:], dtype=torch.float32))
        for part in tokens.split(config.train.micro_batch_size)
    ]


def _numpy_entropy(matrix: torch.Tensor) -> float:
    values = np.linalg.svd(matrix.double().numpy(), compute_uv=False)
    shares = values**2 / (values**2).sum()
    return float(-(shares * np.log(shares)).sum() / np.log(len(shares)))


def _figure(name: str, times: dict[str, list[float]], passed: bool) -> BenchResult:
    """The mean cost of a step as a share of a step without monitors, from medians; its spread from single rounds."""
    cadence = MonitorConfig()

    def cost(step: float, told: float, told_watched: float, logits: float, watched: float, entropies: float) -> float:
        """Seconds a step: metrics are told in every one, the rest in some."""
        often = logits + watched + told_watched - told
        return told + often / cadence.every_steps + (entropies - watched) / cadence.svd_entropy_every_steps

    rounds = [cost(*values) / values[0] for values in zip(*(times[part] for part in PARTS), strict=True)]
    middle = [statistics.median(times[part]) for part in PARTS]
    percent = 100 * cost(*middle) / middle[0]
    spread = f"{100 * min(rounds):.2f}..{100 * max(rounds):.2f}"
    bar = f"<= {BAR_PERCENT:.0f} %"
    added = 1e3 * cost(*middle)
    steps = times["step"]
    return BenchResult(
        name,
        "ms",
        added,
        1e3 * middle[0],
        percent,
        spread,
        bar,
        passed and percent <= BAR_PERCENT,
        ours_rounds=tuple(1e3 * share * step for share, step in zip(rounds, steps, strict=True)),
        peer_rounds=tuple(1e3 * step for step in steps),
        ratio_rounds=tuple(100 * share for share in rounds),
        own_limit=True,
    )
