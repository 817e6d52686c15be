"""Steps with a nonfinite gradient must change nothing on any rank; too many in a row must end the training."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from moonlight.config.run import RunConfig
from tests.support.bad_input import check_line
from tests.support.layouts import LAYOUTS, assemble, build, collect, flatten, one_step, recipe
from tests.support.suites import quick


def train_with_poison(config: RunConfig, poison: float) -> dict[str, Any]:
    """Train three steps; in the second, one element of one gradient on the last rank is `poison`."""
    import torch.distributed as dist

    from moonlight.train.forward_backward import find_routers

    model_chunks, optimizer = build(config)
    history = []
    for step in (1, 2, 3):
        parameter = optimizer.data_parallel.parameters[-1].torch_param

        def poison_gradient(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[0] = poison
            return gradient

        is_poisoned = step == 2 and dist.get_rank() == dist.get_world_size() - 1
        handle = parameter.register_hook(poison_gradient) if is_poisoned else None
        result = one_step(model_chunks, optimizer, config, step)
        if handle is not None:
            handle.remove()
        optimizer.data_parallel.finish_param_sync()
        history.append(
            {
                "result": result,
                "weights": collect(model_chunks),
                "momenta": flatten(optimizer.optimizer_state_dict()),
                "counts": [router.tokens_per_expert.sum().item() for router in find_routers(model_chunks)],
            }
        )
    return {"history": history}


@pytest.mark.parametrize(
    ("layout", "poison"),
    quick(
        itertools.product(("1", "DP4", "PP2", "EP2xTP2-4", "EP2xDP2"), (math.nan, math.inf)),
        ("1", math.inf),
        ("DP4", math.nan),
        ("PP2", math.inf),
        ("EP2xTP2-4", math.nan),
    ),
)
def test_one_nonfinite_gradient_on_one_rank_skips_the_step_on_all(pool, layout, poison):
    world_size, parallel = LAYOUTS[layout]
    answers = pool.run(world_size, train_with_poison, recipe(parallel), poison)
    for answer in answers:
        assert [entry["result"].skipped for entry in answer["history"]] == [False, True, False]
        assert not math.isfinite(answer["history"][1]["result"].gradient_norm)
        assert answer["history"][1]["result"].update_rms == {}
        assert not any(count for entry in answer["history"] for count in entry["counts"])
        for name in ("weights", "momenta"):  # router biases are among the weights
            first, second, third = (answer["history"][step][name] for step in range(3))
            for before, after in zip(first, second, strict=True):
                np.testing.assert_array_equal(before[3], after[3], err_msg=before[0])
            assert any((before[3] != after[3]).any() for before, after in zip(second, third, strict=True))
    assemble([answer["history"][2]["weights"] for answer in answers])  # all ranks agree again


def train_with_infinite_loss(config: RunConfig) -> dict[str, Any]:
    """Train three steps; in the second, one loss on the last rank is infinite and the gradients are unchanged."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    model_chunks, optimizer = build(config)
    weights, results = [], []
    for step in (1, 2, 3):
        is_poisoned = step == 2 and dist.get_rank() == dist.get_world_size() - 1
        assert not is_poisoned or parallel_state.is_pipeline_last_stage()
        handle = (
            model_chunks[-1].register_forward_hook(lambda module, inputs, losses: losses + math.inf)
            if is_poisoned
            else None
        )
        results.append(one_step(model_chunks, optimizer, config, step))
        if handle is not None:
            handle.remove()
        optimizer.data_parallel.finish_param_sync()
        weights.append(collect(model_chunks))
    return {"results": results, "weights": weights}


@pytest.mark.parametrize("layout", ["1", "PP2", "EP2xDP2"])
def test_a_nonfinite_loss_skips_the_step(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    for answer in pool.run(world_size, train_with_infinite_loss, recipe(parallel)):
        assert [result.skipped for result in answer["results"]] == [False, True, False]
        assert math.isinf(answer["results"][1].loss) and math.isfinite(answer["results"][1].gradient_norm)
        first, second, third = answer["weights"]
        for before, after in zip(first, second, strict=True):
            np.testing.assert_array_equal(before[3], after[3], err_msg=before[0])
        assert any((before[3] != after[3]).any() for before, after in zip(second, third, strict=True))


def test_training_ends_after_too_many_skipped_steps_in_a_row(tiny_run, tmp_path, as_worker, capfd, monkeypatch):
    """A learning rate beyond float32 corrupts the weights in the first step; later gradients are nonfinite."""
    import json
    import sys

    from moonlight.cli.main import main

    overrides = ["schedule.lr=1e38", "schedule.warmup_steps=0", "train.max_skipped_steps_in_a_row=2", "name=wild"]
    overrides += ["train.train_steps=20", f"runs_folder={tmp_path}"]
    monkeypatch.setattr(sys, "argv", ["moonlight", "pretrain", str(tiny_run.recipe), *overrides])
    with pytest.raises(SystemExit) as exit_info:
        main()
    words = ("wild", "2 in a row", "train.max_skipped_steps_in_a_row", "schedule.lr")
    check_line(exit_info.value.code, capfd.readouterr().err.splitlines()[-1] + "\n", words)
    entries = [json.loads(line) for line in (tmp_path / "wild" / "metrics.jsonl").read_text().splitlines()]
    assert [entry["optim/skipped_steps"] for entry in entries] == [0, 1, 2]
