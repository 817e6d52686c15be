"""The ladders that are shipped: what they promise of themselves."""

from pathlib import Path

import pytest

from moonlight.plan.flops import count_parameters
from moonlight.studies.ladder import OPTIMIZERS, load_ladder
from moonlight.studies.study import train_flops

ROOT = Path(__file__).parents[2]
LADDERS = sorted((ROOT / "configs" / "scaling").glob("*.yaml"))


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: path.stem)
def test_shipped_ladders_climb(path):
    """At least five sizes, each with more FLOPs than the one before; both optimizers; more than one seed."""
    ladder = load_ladder(path)
    runs = [ladder.make_config(ladder.representative_run(size)) for size in ladder.sizes]
    flops = [train_flops(config) for config in runs]
    assert ladder.name == path.stem and len(runs) >= 5 and len(ladder.seeds) >= 2
    assert flops == sorted(set(flops)) and flops[-1] > 15 * flops[0]
    assert {point.optimizer for point in ladder.pending_runs({})} == set(OPTIMIZERS)
    dense = path.stem.endswith("dense")
    assert all(run.model.has_experts is not dense for run in runs)
    each = 20 if ladder.needs_gpu else 10
    for run in runs:
        tokens = run.train.train_steps * run.train.global_batch_size * run.data.sequence_length
        assert tokens == pytest.approx(each * count_parameters(run.model).activated_with_head, rel=0.01)
    # A model of the same rank in the other kind costs a token about as much.
    other = load_ladder(path.with_name(path.name.replace("dense", "moe")))
    theirs = [train_flops(other.make_config(other.representative_run(size))) for size in other.sizes]
    assert flops == pytest.approx(theirs, rel=0.06)
