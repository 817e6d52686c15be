"""Properties of the shipped ladders."""

from pathlib import Path

import pytest

from moonlight.plan.flops import count_parameters
from moonlight.studies.ladder import OPTIMIZERS, load_ladder
from moonlight.studies.study import train_flops

ROOT = Path(__file__).parents[2]
LADDERS = sorted((ROOT / "configs" / "scaling").glob("*.yaml"))


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_shipped_ladders_grow(path):
    """Ladders have at least five sizes of growing FLOPs, both optimizers, and more than one seed."""
    ladder = load_ladder(path)
    configs = [ladder.make_config(ladder.representative_run(size)) for size in ladder.sizes]
    flops = [train_flops(config) for config in configs]
    assert ladder.name == path.stem and len(configs) >= 5 and len(ladder.seeds) >= 2
    assert flops == sorted(set(flops)) and flops[-1] > 15 * flops[0]
    assert {point.optimizer for point in ladder.pending_runs({})} == set(OPTIMIZERS)
    dense = path.stem.endswith("dense")
    assert all(config.model.has_experts is not dense for config in configs)
    tokens_per_parameter = 20 if ladder.needs_gpu else 10
    for config in configs:
        tokens = config.train.train_steps * config.train.global_batch_size * config.data.sequence_length
        assert tokens == pytest.approx(
            tokens_per_parameter * count_parameters(config.model).activated_with_head, rel=0.01
        )
    # At each position, the dense and the MoE ladder have about equal FLOPs.
    other = load_ladder(path.with_name(path.name.replace("dense", "moe")))
    other_flops = [train_flops(other.make_config(other.representative_run(size))) for size in other.sizes]
    assert flops == pytest.approx(other_flops, rel=0.06)
