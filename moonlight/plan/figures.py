"""A plan as numbers by name, for `--json` and for whoever compares: bytes, FLOPs and seconds."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from moonlight.placement.comm_bytes import CommBytes
from moonlight.plan.build import RunPlan, mean_memory
from moonlight.plan.flops import count_parameters, train_flops_per_token
from moonlight.plan.speed import bubble_fraction

RESERVE = 0.06
"""Share of a GPU's memory that a plan leaves for what it does not know."""

FLOWS = ("gradients", "weights", "matrices", "slices", "dispatch", "expert slices", "pipeline")
"""Kinds of bytes on the wire."""


def layout(plan: RunPlan) -> str:
    """The sizes of a layout in short."""
    parallel = plan.config.parallel
    names = {
        "TP": parallel.tensor_parallel_size,
        "PP": parallel.pipeline_parallel_size,
        "VPP": parallel.virtual_pipeline_parallel_size,
        "EP": parallel.expert_parallel_size,
        "ETP": parallel.expert_tensor_parallel_size,
    }
    sizes = " ".join(f"{name}{size}" for name, size in names.items())
    return (
        f"{sizes}, data parallel {parallel.data_parallel_size(plan.world_size)}, "
        f"{plan.stages[0].num_micro_batches} micro-batches of {plan.config.train.micro_batch_size} a step"
    )


def rank_comm_bytes(plan: RunPlan, name: str) -> Callable[[int], CommBytes]:
    """The bytes on the wire of one kind, of each rank."""

    def of(rank: int) -> CommBytes:
        member = plan.ranks[rank]
        if name == "matrices":
            return member.share.matrices + member.dense.slices + member.expert.slices
        if name in ("gradients", "weights"):
            return getattr(member.share, name)
        return plan.rank_stage(rank).flows[name]

    return of


def exchange_comm_bytes(plan: RunPlan) -> tuple[float, float]:
    """Gradients and weights of the busiest rank, dense and expert parameters apart."""
    dense = max((m.dense.share.gradients + m.dense.share.weights).larger for m in plan.ranks)
    expert = max((m.expert.share.gradients + m.expert.share.weights).larger for m in plan.ranks)
    return dense, expert


def plan_to_json(plan: RunPlan) -> dict[str, Any]:
    """Everything that the tables show."""
    config, machine = plan.config, plan.machine
    counts = count_parameters(config.model)
    fullest = plan.memories[plan.peak_rank]
    works = [member.newton_schulz_flops for member in plan.ranks]
    flows = {name: [rank_comm_bytes(plan, name)(rank) for rank in range(len(plan.ranks))] for name in FLOWS}
    dense, expert = exchange_comm_bytes(plan)

    def memory_of(memory: Any) -> dict[str, float]:
        return {f"{part}_bytes": value for part, value in asdict(memory).items()} | {"peak_bytes": memory.peak}

    mean = memory_of(mean_memory(plan.memories))
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
            "fullest": memory_of(fullest),
            "mean": mean,
            "gpu_bytes": machine.memory_bytes,
            "usable_memory_bytes": machine.memory_bytes * (1 - RESERVE),
            "fits": fullest.peak <= machine.memory_bytes,
            "fits_with_reserve": fullest.peak <= machine.memory_bytes * (1 - RESERVE),
        },
        "optimizer": {
            "state_bytes": max(share.state for share in plan.optimizer_costs),
            "state_mean_bytes": sum(share.state for share in plan.optimizer_costs) / len(plan.optimizer_costs),
            "adamw_state_bytes": max(share.state for share in plan.adamw),
        },
        "wire_per_step": {
            name.replace(" ", "_"): {
                "busiest_bytes": max(flow.larger for flow in of_ranks),
                "mean_bytes": sum(flow.larger for flow in of_ranks) / len(of_ranks),
            }
            for name, of_ranks in flows.items()
        }
        | {"dense_exchange_busiest_bytes": dense, "expert_exchange_busiest_bytes": expert},
        "newton_schulz": {
            "busiest_flops": max(works),
            "mean_flops": sum(works) / len(works),
            "share_of_step_flops": max(work / (work + plan.rank_stage(rank).flops) for rank, work in enumerate(works)),
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
