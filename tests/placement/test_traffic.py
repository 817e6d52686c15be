"""Network bytes and optimizer state: counted on fake ranks of the 16B recipe, and on real processes."""

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
class GroupOnRank:
    """One bucket group on one rank of a dry run."""

    rank: int
    """Rank in the process group of the buckets."""
    counted: tuple[float, float]
    """Bytes sent and received."""
    costs: list[OptimizerCost]
    """Planned cost of every rank of the group."""
    adamw: OptimizerCost
    num_buckets: int
    unevenness: float
    """Sum over buckets of the largest owner's elements, divided by the mean elements per rank.

    This bounds the time of the exchange relative to a ring.
    """


def largest(bucket):
    """Return the elements of the most loaded owner of a bucket."""
    owned = [0] * bucket.group.size()
    for shard in bucket.shards:
        owned[shard.owner_rank] += shard.numel
    return max(owned)


def count(config, world_size, rank):
    """Return the dense and the expert bucket group of a rank after one exchange, and its optimizer state in bytes."""
    with fake_rank(config, world_size, rank) as model_chunks:
        optimizer = build_optimizer(model_chunks, config)
        with CommCounter() as counter:
            exchange(optimizer)
        assert both(counter.stats(tensor_parallel_group(expert=False))) == (0, 0)
        bucket_groups = []
        for bucket_group in optimizer.data_parallel.bucket_groups:
            group = bucket_group.buckets[0].group
            shards = [shard for bucket in bucket_group.buckets for shard in bucket.shards]
            adamw = zero1_cost(sum(shard.numel for shard in shards), group.size(), config)
            costs = muon_costs(shards, group.size(), config)
            mean = sum(shard.numel for shard in shards) / group.size()
            uneven = sum(map(largest, bucket_group.buckets)) / mean
            bucket_groups.append(
                GroupOnRank(group.rank(), both(counter.stats(group)), costs, adamw, len(bucket_group.buckets), uneven)
            )
        return bucket_groups, optimizer.state_bytes()


def check_ranks(case, ranks):
    world_size, expert_parallel_size = WORLDS[case]
    config = big(f"parallel.expert_parallel_size={expert_parallel_size}")
    plan = make_plan(config, world_size)
    totals = [max(both(cost)) for cost in plan.optimizer_costs]
    largest_rank, smallest_rank = totals.index(max(totals)), totals.index(min(totals))
    for rank in dict.fromkeys([largest_rank, smallest_rank, *ranks]):
        bucket_groups, state = count(config, world_size, rank)
        for bucket_group in bucket_groups:
            assert bucket_group.counted == both(bucket_group.costs[bucket_group.rank])
            assert bucket_group.num_buckets >= 4
        assert (
            plan.optimizer_costs[rank].state
            == state
            == sum(bucket_group.costs[bucket_group.rank].state for bucket_group in bucket_groups)
        )
        assert both(plan.optimizer_costs[rank]) == tuple(
            map(sum, zip(*(bucket_group.counted for bucket_group in bucket_groups), strict=True))
        )
    bounds = (DENSE_BOUND[len(bucket_groups[0].costs)], EXPERT_BOUND)
    for bucket_group, bound in zip(bucket_groups, bounds, strict=True):
        ratios = [max(both(cost)) / bucket_group.adamw.sent for cost in bucket_group.costs]
        print(
            f"{len(ratios)} ranks, {bucket_group.num_buckets} buckets: at most {max(ratios):.4f}, mean "
            f"{sum(ratios) / len(ratios):.4f} of AdamW; largest regions {bucket_group.unevenness:.2f} means"
        )
        assert max(ratios) <= bound
        assert bucket_group.unevenness <= 1.75
        assert sum(cost.sent for cost in bucket_group.costs) == sum(cost.received for cost in bucket_group.costs)


@pytest.mark.parametrize("case", quick(WORLDS, "DP64-EDP16"))
def test_every_rank_sends_and_receives_little_more_than_under_adamw(case):
    """Plans of all ranks must stay near AdamW; the ranks that exchange the most and least are also counted."""
    check_ranks(case, [])


@pytest.mark.full
@pytest.mark.parametrize("case", WORLDS)
def test_planned_bytes_equal_counted_bytes_on_many_ranks(case):
    """Plan and count must agree on all ranks of the smaller cases, and on eight of the largest."""
    world_size, _ = WORLDS[case]
    check_ranks(case, range(0, world_size, 64 if world_size == 512 else 1))


@pytest.mark.parametrize(
    ("settings", "bound"),
    [
        ((), 0.72),
        (("optimizer.momentum_dtype=bfloat16",), 0.56),
        (("optimizer.master_weights=split",), 0.54),
        (("optimizer.momentum_dtype=bfloat16", "optimizer.master_weights=split"), 0.38),
    ],
)
def test_optimizer_state_is_smaller_than_with_adamw(settings, bound):
    for world_size in (8, 64):
        for expert_parallel_size in (1, 8):
            config = big(f"parallel.expert_parallel_size={expert_parallel_size}", *settings)
            plan = make_plan(config, world_size)
            state = [cost.state for cost in plan.optimizer_costs]
            ratio, imbalance = max(state) / plan.adamw[0].state, max(state) / (sum(state) / len(state))
            print(f"DP{world_size} EP{expert_parallel_size}: {ratio:.4f} of AdamW, max / mean {imbalance:.4f}")
            assert ratio <= bound


@pytest.mark.parametrize("settings", [("optimizer.momentum_dtype=bfloat16", "optimizer.master_weights=split"), ()])
def test_the_planned_state_equals_the_optimizer_state(settings):
    config = big(*settings)
    plan = make_plan(config, 8)
    for rank in (0, 5):
        with fake_rank(config, 8, rank) as model_chunks:
            assert build_optimizer(model_chunks, config).state_bytes() == plan.optimizer_costs[rank].state


def groups():
    return {
        "dense": data_parallel_group(expert=False),
        "expert": data_parallel_group(expert=True),
        "slices": tensor_parallel_group(expert=False),
        "expert slices": tensor_parallel_group(expert=True),
    }


def counted_exchange(config):
    """Return the stats of one exchange on this rank by group, and those of a full training step by bucket group."""
    model_chunks, optimizer = build(config)
    with CommCounter() as counter:
        exchange(optimizer)
    alone = {name: counter.stats(group) for name, group in groups().items()}
    with CommCounter() as counter:
        one_step(model_chunks, optimizer, config, 1)
        optimizer.data_parallel.finish_param_sync()
    step = {name: counter.stats(groups()[name]) for name in ("dense", "expert")}
    return alone, step


@pytest.mark.parametrize("layout", quick(["DP4", "EP2xDP2", "EP2xTP2-ETP2-4"], "EP2xTP2-ETP2-4"))
def test_real_processes_exchange_the_same_bytes_as_fake_ranks(pool, layout):
    world_size, parallel = LAYOUTS.get(layout) or (4, LAYOUTS["1"][1])
    # Buckets are small, so that there are several; three matrices are so large that four ranks must split them.
    config = recipe(replace(parallel, bucket_size=20_000))
    config = replace(config, model=replace(config.model, intermediate_size=2048))
    for rank, (real, step) in enumerate(pool.run(world_size, counted_exchange, config)):
        with fake_rank(config, world_size, rank) as model_chunks:
            optimizer = build_optimizer(model_chunks, config)
            with CommCounter() as counter:
                exchange(optimizer)
            for name, group in groups().items():
                assert counter.stats(group) == real[name], (rank, name)
            for bucket_group in optimizer.data_parallel.bucket_groups:
                group = bucket_group.buckets[0].group
                shards = [shard for bucket in bucket_group.buckets for shard in bucket.shards]
                if group.size() == 4 and bucket_group is optimizer.data_parallel.bucket_groups[0]:
                    assert any(shard.is_split for shard in shards)
                assert both(counter.stats(group)) == both(muon_costs(shards, group.size(), config)[group.rank()])
            assert real["expert"] == step["expert"]
            assert real["dense"].sent > 0
            # A step also reports the largest attention logit of each head, in one all-reduce.
            num_logits = (
                config.model.num_hidden_layers * config.model.num_attention_heads // parallel.tensor_parallel_size
            )
            ranks = groups()["dense"].size()
            assert step["dense"].collectives == real["dense"].collectives + 1
            assert step["dense"].sent == real["dense"].sent + 2 * (ranks - 1) / ranks * 4 * num_logits
            assert (real["slices"].sent > 0) == (parallel.tensor_parallel_size > 1)


def every_collective():
    """Return (name, counted, expected) bytes of each torch.distributed collective on this rank of four; float32."""
    world, rank = dist.group.WORLD, dist.get_rank()
    size, peers = 4, [peer for peer in range(4) if peer != rank]

    def ones(count):
        return torch.ones(count)

    def coalesced(collective, *makers):
        with dist._coalescing_manager(world):
            for _ in range(2):
                collective(*(maker() for maker in makers))

    def send_and_receive():
        operations = [dist.P2POp(dist.isend, ones(8), peer) for peer in peers[:1]]
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
        "send and receive": (send_and_receive, 32, {0: 96, 1: 32}.get(rank, 0)),
        "barrier": (dist.barrier, 0, 0),
    }
    counts = []
    for name, (call, sent, received) in calls.items():
        with CommCounter() as counter:
            call()
        counts.append((name, both(counter.stats(world)), (sent, received)))
    return counts


def test_every_collective_is_counted(pool):
    for counts in pool.run(4, every_collective):
        for name, counted, expected in counts:
            assert counted == expected, name


def functional_collective():
    from torch.distributed._functional_collectives import all_reduce

    with CommCounter(), pytest.raises(AssertionError, match="is an unsupported collective"):
        all_reduce(torch.ones(2), "sum", dist.group.WORLD)


def test_an_unknown_collective_is_an_error(pool):
    pool.run(1, functional_collective)
