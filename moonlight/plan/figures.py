"""Numbers of a plan by name, for `--json` and for the tables: bytes, FLOPs and seconds."""

from dataclasses import asdict
from typing import Any

from moonlight.placement.comm_bytes import CommBytes
from moonlight.plan.build import MemoryBreakdown, RunPlan, mean_memory
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.plan.speed import bubble_fraction

RESERVE = 0.06
"""Fraction of a GPU's memory to leave free for what the plan does not model."""

LAYOUT_KEYS = {
    "TP": "tensor_parallel_size",
    "PP": "pipeline_parallel_size",
    "VPP": "virtual_pipeline_parallel_size",
    "EP": "expert_parallel_size",
    "ETP": "expert_tensor_parallel_size",
}
"""Short name -> key of the recipe's section `parallel`."""

COMM_KINDS = ("gradients", "weights", "matrices", "slices", "dispatch", "expert slices", "pipeline")
"""Kinds of communication."""


def describe_layout(plan: RunPlan) -> str:
    """Return one line with the layout's parallel sizes and micro-batches."""
    parallel = plan.config.parallel
    sizes = " ".join(f"{name}{getattr(parallel, key)}" for name, key in LAYOUT_KEYS.items())
    return (
        f"{sizes}, data parallel {parallel.data_parallel_size(plan.world_size)}, "
        f"{plan.stages[0].num_micro_batches} micro-batches of {plan.config.train.micro_batch_size} a step"
    )


def rank_comm_bytes(plan: RunPlan, name: str, rank: int) -> CommBytes:
    """Return the bytes of one of COMM_KINDS that a rank sends and receives in a step."""
    cost = plan.ranks[rank]
    if name == "matrices":
        return cost.optimizer_cost.matrices + cost.dense.slices + cost.expert.slices
    if name in ("gradients", "weights"):
        return getattr(cost.optimizer_cost, name)
    return plan.rank_stage(rank).comm_bytes[name]


def exchange_comm_bytes(plan: RunPlan) -> tuple[float, float]:
    """Return the bytes of gradients and weights on the most loaded rank: (dense parameters, experts)."""
    dense = max((rank.dense.optimizer_cost.gradients + rank.dense.optimizer_cost.weights).larger for rank in plan.ranks)
    expert = max(
        (rank.expert.optimizer_cost.gradients + rank.expert.optimizer_cost.weights).larger for rank in plan.ranks
    )
    return dense, expert


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """Return all numbers of the tables as a JSON object."""
    config, machine = plan.config, plan.machine
    counts = count_parameters(config.model)
    peak_memory = plan.memories[plan.peak_rank]
    newton_schulz_flops = [cost.newton_schulz_flops for cost in plan.ranks]
    comm_bytes = {name: [rank_comm_bytes(plan, name, rank) for rank in range(len(plan.ranks))] for name in COMM_KINDS}
    dense, expert = exchange_comm_bytes(plan)

    def memory_to_json(memory: MemoryBreakdown) -> dict[str, float]:
        return {f"{part}_bytes": value for part, value in asdict(memory).items()} | {"peak_bytes": memory.peak}

    mean = memory_to_json(mean_memory(plan.memories))
    mean["peak_bytes"] = sum(memory.peak for memory in plan.memories) / len(plan.memories)
    return {
        "recipe": config.name,
        "gpus": plan.world_size,
        "gpu": machine.name,
        "parallel": asdict(config.parallel) | {"num_processes": plan.world_size},
        "data_parallel_size": config.parallel.data_parallel_size(plan.world_size),
        "micro_batch_size": config.train.micro_batch_size,
        "micro_batches_per_step": plan.stages[0].num_micro_batches,
        "global_batch_size": plan.global_batch_size,
        "parameters": {
            "total": counts.total,
            "activated_with_head": counts.activated_with_head,
            "muon": plan.num_parameters("muon"),
            "adamw": plan.num_parameters("adamw"),
            "router_biases": plan.num_router_biases,
            "muon_matrices": plan.num_matrices,
        },
        "memory": {
            "fullest_rank": plan.peak_rank,
            "fullest": memory_to_json(peak_memory),
            "mean": mean,
            "gpu_bytes": machine.memory_bytes,
            "usable_memory_bytes": machine.memory_bytes * (1 - RESERVE),
            "fits": peak_memory.peak <= machine.memory_bytes,
            "fits_with_reserve": peak_memory.peak <= machine.memory_bytes * (1 - RESERVE),
        },
        "optimizer": {
            "state_bytes": max(cost.state for cost in plan.optimizer_costs),
            "state_mean_bytes": sum(cost.state for cost in plan.optimizer_costs) / len(plan.optimizer_costs),
            "adamw_state_bytes": max(cost.state for cost in plan.adamw),
        },
        "wire_per_step": {
            name.replace(" ", "_"): {
                "busiest_bytes": max(rank_bytes.larger for rank_bytes in by_rank),
                "mean_bytes": sum(rank_bytes.larger for rank_bytes in by_rank) / len(by_rank),
            }
            for name, by_rank in comm_bytes.items()
        }
        | {"dense_exchange_busiest_bytes": dense, "expert_exchange_busiest_bytes": expert},
        "newton_schulz": {
            "busiest_flops": max(newton_schulz_flops),
            "mean_flops": sum(newton_schulz_flops) / len(newton_schulz_flops),
            "share_of_step_flops": max(
                flops / (flops + plan.rank_stage(rank).flops) for rank, flops in enumerate(newton_schulz_flops)
            ),
        },
        "pipeline_bubble_share": bubble_fraction(config, plan.stages[0].num_micro_batches),
        "step_seconds": asdict(plan.seconds) | {"total": plan.seconds.total},
        "efficiency": machine.efficiency,
        "peak_flops_per_second": machine.gpu.peak_flops_per_second,
        "flops_per_token": train_flops_per_token(config.model, config.data.sequence_length),
        "tokens_per_second": plan.tokens_per_step / plan.seconds.total,
        "steps_by_batch_size": {str(size): count for size, count in plan.timeline.steps_by_batch_size().items()},
        "tokens": plan.num_tokens,
        "total_seconds": plan.total_seconds,
        "checkpoint": {
            "bytes": plan.checkpoint_bytes,
            "seconds": plan.checkpoint_bytes / machine.storage_bytes_per_second,
        },
    }
