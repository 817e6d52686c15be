"""Bytes on the wire and of optimizer state: counted on fake worlds of the 16B recipe, and on real processes."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from moonlight.config.load import load_recipe
from moonlight.optim.distributed_muon import build_optimizer
from moonlight.optim.parameters import data_parallel_group, tensor_parallel_group
from moonlight.placement.comm_bytes import OptimizerCost, muon_costs, zero1_cost
from moonlight.plan.build import make_plan
from moonlight.plan.comm_counter import CommCounter
from moonlight.plan.dry_run import fake_rank
from tests.support.layouts import LAYOUTS, build, one_step, recipe
from tests.support.suites import quick
from tests.support.traffic import both, exchange

BIG = Path(__file__).parents[2] / "configs/moonlight_16b_a3b/pretrain.yaml"
WORLDS = {"DP8-EDP8": (8, 1), "DP64-EDP16": (64, 4), "DP512-EDP64": (512, 8)}
"""Name -> (processes, expert-parallel size): sizes of the data-parallel group of dense and of expert parameters."""
DENSE_BOUND = {8: 1.10, 64: 1.10, 512: 1.35}
EXPERT_BOUND = 1.03


def big(*overrides):
    return load_recipe(BIG, overrides)


@dataclass
class LaneOfRank:
    """One lane on one rank of a dry run."""

    rank: int
    """In the lane's group."""
    counted: tuple[float, float]
    """Bytes sent and received."""
    shares: list[OptimizerCost]
    """Of every rank of the group, by the sums."""
    adamw: OptimizerCost
    num_buckets: int
    unevenness: float
    """Sum over buckets of the largest owner's elements, in means: how much longer than a ring the exchange may take."""


def largest(bucket):
    """Elements of the owner with most of a bucket."""
    owned = [0] * bucket.group.size()
    for fragment in bucket.shards:
        owned[fragment.owner_rank] += fragment.numel
    return max(owned)


def count(run, world_size, rank):
    """The dense and the expert lane of a rank after one exchange, and what its optimizer says it keeps."""
    with fake_rank(run, world_size, rank) as models:
        optimizer = build_optimizer(models, run)
        with CommCounter() as counter:
            exchange(optimizer)
        assert both(counter.stats(tensor_parallel_group(expert=False))) == (0, 0)
        lanes = []
        for lane in optimizer.data_parallel.bucket_groups:
            group = lane.buckets[0].group
            fragments = [fragment for bucket in lane.buckets for fragment in bucket.shards]
            adamw = zero1_cost(sum(fragment.numel for fragment in fragments), group.size(), run)
            found = muon_costs(fragments, group.size(), run)
            mean = sum(fragment.numel for fragment in fragments) / group.size()
            uneven = sum(map(largest, lane.buckets)) / mean
            lanes.append(LaneOfRank(group.rank(), both(counter.stats(group)), found, adamw, len(lane.buckets), uneven))
        return lanes, optimizer.state_bytes()


def check_ranks(world, ranks):
    world_size, expert_parallel_size = WORLDS[world]
    config = big(f"parallel.expert_parallel_size={expert_parallel_size}")
    plan = make_plan(config, world_size)
    totals = [max(both(share)) for share in plan.optimizer_costs]
    most, least = totals.index(max(totals)), totals.index(min(totals))
    for rank in dict.fromkeys([most, least, *ranks]):
        lanes, state = count(config, world_size, rank)
        for lane in lanes:
            assert lane.counted == both(lane.shares[lane.rank])
            assert lane.num_buckets >= 4
        assert plan.optimizer_costs[rank].state == state == sum(lane.shares[lane.rank].state for lane in lanes)
        assert both(plan.optimizer_costs[rank]) == tuple(map(sum, zip(*(lane.counted for lane in lanes), strict=True)))
    bounds = (DENSE_BOUND[len(lanes[0].shares)], EXPERT_BOUND)
    for lane, bound in zip(lanes, bounds, strict=True):
        worst = [max(both(share)) / lane.adamw.sent for share in lane.shares]
        print(
            f"{len(worst)} ranks, {lane.num_buckets} buckets: at most {max(worst):.4f}, mean "
            f"{sum(worst) / len(worst):.4f} of AdamW; largest regions {lane.unevenness:.2f} means"
        )
        assert max(worst) <= bound
        assert lane.unevenness <= 1.75
        assert sum(share.sent for share in lane.shares) == sum(share.received for share in lane.shares)


@pytest.mark.parametrize("world", quick(WORLDS, "DP64-EDP16"))
def test_every_rank_sends_and_receives_little_more_than_under_adamw(world):
    """Sums over owners give all ranks; those that exchange most and least are counted on the wire as well."""
    check_ranks(world, [])


@pytest.mark.full
@pytest.mark.parametrize("world", WORLDS)
def test_the_sums_are_what_is_counted_on_many_ranks(world):
    """All ranks of the smaller worlds, eight of the largest."""
    world_size, _ = WORLDS[world]
    check_ranks(world, range(0, world_size, 64 if world_size == 512 else 1))


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ((), 0.72),
        (("optimizer.momentum_dtype=bfloat16",), 0.56),
        (("optimizer.master_weights=split",), 0.54),
        (("optimizer.momentum_dtype=bfloat16", "optimizer.master_weights=split"), 0.38),
    ],
)
def test_optimizer_state_is_smaller_than_adamws(settings, bound):
    for world_size in (8, 64):
        for expert_parallel_size in (1, 8):
            config = big(f"parallel.expert_parallel_size={expert_parallel_size}", *settings)
            plan = make_plan(config, world_size)
            state = [share.state for share in plan.optimizer_costs]
            ratio, imbalance = max(state) / plan.adamw[0].state, max(state) / (sum(state) / len(state))
            print(f"DP{world_size} EP{expert_parallel_size}: {ratio:.4f} of AdamW, max / mean {imbalance:.4f}")
            assert ratio <= bound


@pytest.mark.parametrize("settings", [("optimizer.momentum_dtype=bfloat16", "optimizer.master_weights=split"), ()])
def test_the_planned_state_is_the_optimizers(settings):
    config = big(*settings)
    plan = make_plan(config, 8)
    for rank in (0, 5):
        with fake_rank(config, 8, rank) as models:
            assert build_optimizer(models, config).state_bytes() == plan.optimizer_costs[rank].state


def groups():
    return {
        "dense": data_parallel_group(expert=False),
        "expert": data_parallel_group(expert=True),
        "slices": tensor_parallel_group(expert=False),
        "expert slices": tensor_parallel_group(expert=True),
    }


def counted_exchange(run):
    """Of this rank of a real world: one exchange by group, and what a whole training step adds to it in the lanes."""
    models, optimizer = build(run)
    with CommCounter() as counter:
        exchange(optimizer)
    alone = {name: counter.stats(group) for name, group in groups().items()}
    with CommCounter() as counter:
        one_step(models, optimizer, run, 1)
        optimizer.data_parallel.finish_param_sync()
    step = {name: counter.stats(groups()[name]) for name in ("dense", "expert")}
    return alone, step


@pytest.mark.parametrize("layout", quick(["DP4", "EP2xDP2", "EP2xTP2-ETP2-4"], "DP4", "EP2xTP2-ETP2-4"))
def test_real_processes_exchange_what_fake_ones_do(pool, layout):
    world_size, parallel = LAYOUTS.get(layout) or (4, LAYOUTS["1"][1])
    # Small buckets, so that there are several, and three matrices so large that four ranks must cut them.
    run = recipe(replace(parallel, bucket_size=20_000))
    run = replace(run, model=replace(run.model, intermediate_size=2048))
    for rank, (real, step) in enumerate(pool.run(world_size, counted_exchange, run)):
        with fake_rank(run, world_size, rank) as models:
            optimizer = build_optimizer(models, run)
            with CommCounter() as counter:
                exchange(optimizer)
            for name, group in groups().items():
                assert counter.stats(group) == real[name], (rank, name)
            for lane in optimizer.data_parallel.bucket_groups:
                group = lane.buckets[0].group
                fragments = [fragment for bucket in lane.buckets for fragment in bucket.shards]
                if group.size() == 4 and lane is optimizer.data_parallel.bucket_groups[0]:
                    assert any(fragment.is_split for fragment in fragments)
                assert both(counter.stats(group)) == both(muon_costs(fragments, group.size(), run)[group.rank()])
            assert real["expert"] == step["expert"]
            assert real["dense"].sent > 0
            # A step reports the largest attention logit of each head besides, in one all-reduce.
            num_logits = run.model.num_hidden_layers * run.model.num_attention_heads // parallel.tensor_parallel_size
            ranks = groups()["dense"].size()
            assert step["dense"].collectives == real["dense"].collectives + 1
            assert step["dense"].sent == real["dense"].sent + 2 * (ranks - 1) / ranks * 4 * num_logits
            assert (real["slices"].sent > 0) == (parallel.tensor_parallel_size > 1)


def every_collective():
    """(name, sent, received) of each collective of torch.distributed on this rank of four, 4 bytes a number."""
    world, rank = dist.group.WORLD, dist.get_rank()
    size, others = 4, [other for other in range(4) if other != rank]

    def ones(count):
        return torch.ones(count)

    def coalesced(collective, *makers):
        with dist._coalescing_manager(world):
            for _ in range(2):
                collective(*(maker() for maker in makers))

    def peers():
        operations = [dist.P2POp(dist.isend, ones(8), other) for other in others[:1]]
        # Rank 0 sends to 1, and all others to 0.
        sources = [1, 2, 3] if rank == 0 else [0] if rank == 1 else []
        operations += [dist.P2POp(dist.irecv, ones(8), source) for source in sources]
        for work in dist.batch_isend_irecv(operations):
            work.wait()

    root = rank == 0
    uneven = [rank + 1] * size
    lists = [ones(8) for _ in range(size)]
    calls = {
        "all_reduce": (lambda: dist.all_reduce(ones(8)), 48, 48),
        "all_reduce coalesced": (lambda: coalesced(dist.all_reduce, lambda: ones(8)), 96, 96),
        "all_gather": (lambda: dist.all_gather(lists, ones(8)), 96, 96),
        "all_gather_into_tensor": (lambda: dist.all_gather_into_tensor(ones(32), ones(8)), 96, 96),
        "all_gather coalesced": (
            lambda: coalesced(dist.all_gather_into_tensor, lambda: ones(32), lambda: ones(8)),
            192,
            192,
        ),
        "reduce_scatter_tensor": (lambda: dist.reduce_scatter_tensor(ones(8), ones(32)), 96, 96),
        "reduce_scatter": (lambda: dist.reduce_scatter(ones(8), lists), 96, 96),
        "reduce_scatter coalesced": (
            lambda: coalesced(dist.reduce_scatter_tensor, lambda: ones(8), lambda: ones(32)),
            192,
            192,
        ),
        "all_to_all_single": (lambda: dist.all_to_all_single(ones(32), ones(32)), 96, 96),
        # Rank r sends s + 1 numbers to rank s, and receives r + 1 from each.
        "all_to_all_single uneven": (
            lambda: dist.all_to_all_single(ones(sum(uneven)), ones(10), uneven, [1, 2, 3, 4]),
            4 * (10 - rank - 1),
            4 * 3 * (rank + 1),
        ),
        "broadcast": (lambda: dist.broadcast(ones(8), 0), 96 if root else 0, 0 if root else 32),
        "reduce": (lambda: dist.reduce(ones(8), 0), 0 if root else 32, 96 if root else 0),
        "gather": (lambda: dist.gather(ones(8), lists if root else None), 0 if root else 32, 96 if root else 0),
        "scatter": (lambda: dist.scatter(ones(8), lists if root else None), 96 if root else 0, 0 if root else 32),
        "send and receive": (peers, 32, {0: 96, 1: 32}.get(rank, 0)),
        "barrier": (dist.barrier, 0, 0),
    }
    found = []
    for name, (call, sent, received) in calls.items():
        with CommCounter() as counter:
            call()
        found.append((name, both(counter.stats(world)), (sent, received)))
    return found


def test_every_collective_is_counted(pool):
    for found in pool.run(4, every_collective):
        for name, counted, expected in found:
            assert counted == expected, name


def functional_collective():
    from torch.distributed._functional_collectives import all_reduce

    with CommCounter(), pytest.raises(AssertionError, match="is an unsupported collective"):
        all_reduce(torch.ones(2), "sum", dist.group.WORLD)


def test_an_unknown_collective_is_an_error(pool):
    pool.run(1, functional_collective)
