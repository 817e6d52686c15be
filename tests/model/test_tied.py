"""Tied word embeddings: one matrix as embedding and head, in every layout, on disk, and in transformers."""

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from checkpoints.export import export
from checkpoints.verify import verify
from moonlight.config.load import load_recipe
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.index import read_index
from moonlight.dist_checkpoint.state import check_model, resolve_checkpoint
from moonlight.dist_checkpoint.tensors import TENSOR_ALIGNMENT
from moonlight.errors import UserError
from moonlight.optim.distributed_muon import build_optimizer
from moonlight.optim.parameters import data_parallel_group, embedding_group
from moonlight.plan.build import make_plan
from moonlight.plan.comm_counter import CommCounter
from moonlight.plan.dry_run import fake_rank
from tests.support.comparisons import check_gradients, relative
from tests.support.hugging_face import forward, fuse_experts
from tests.support.layouts import (
    LAYOUTS,
    assemble,
    build,
    first_gradients,
    global_batch,
    local_batches,
    make_run,
    one_step,
    recipe,
    restart,
    train_losses,
    train_run,
)
from tests.support.suites import quick
from tests.support.traffic import both, exchange

ROOT = Path(__file__).parents[2]
QUICKSTART = ROOT / "configs/quickstart.yaml"
BIG = ROOT / "configs/moonlight_16b_a3b/pretrain.yaml"
EMBEDDING = "embedding.word_embeddings.weight"
SPLIT_LAYOUTS = ["TP2", "PP2", "PP2-interleaved", "EP2", "DP2", "EP2xPP2", "EP2xTP2-4", "TP2xPP2"]
STEPS = 10


def tied(layout: str = "1", **train: Any):
    """Return the number of processes and the config of the other tests, with tied embeddings."""
    world_size, parallel = LAYOUTS[layout]
    config = recipe(parallel, **train)
    return world_size, replace(config, model=replace(config.model, tie_word_embeddings=True))


def transformers_model(weights: dict[str, np.ndarray], config) -> Any:
    """Return the same model in transformers, which ties the head itself."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config

    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(config.model))).float().eval()
    state = {}
    for mapping in hf_mapping.tensor_mappings(config.model):
        for hf_tensor in mapping.hf_tensors:
            value = torch.from_numpy(weights[mapping.key])[hf_tensor.index]
            state[hf_tensor.name] = value
    missing, unexpected = model.load_state_dict(fuse_experts(state, config.model), strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def test_logits_equal_transformers(pool):
    _, config = tied()
    tokens = torch.randint(0, config.model.vocab_size, (3, 48), generator=torch.Generator().manual_seed(0))
    ((logits, _, weights),) = pool.run(1, forward, config, tokens)
    with torch.no_grad():
        expected = transformers_model(assemble([weights]), config)(tokens).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-4
    assert np.abs(expected).max() > 0.1


def test_the_gradient_is_that_of_both_uses(pool):
    """The gradient must equal torch's gradient of transformers' tied model, without the auxiliary loss."""
    world_size, config = tied("PP2")
    config = replace(config, model=replace(config.model, aux_loss_alpha=0.0))
    answers = pool.run(world_size, first_gradients, config)
    model = transformers_model(assemble([answer["weights"] for answer in answers]), config)
    tokens, _ = global_batch(config, 0)
    loss = F.cross_entropy(model(tokens[:, :-1]).logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    assert answers[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    gradients = assemble([answer["gradients"] for answer in answers])
    assert relative(gradients[EMBEDDING], model.model.embed_tokens.weight.grad.numpy()) <= 1e-5


@pytest.fixture(scope="module")
def reference(pool):
    (answer,) = pool.run(1, first_gradients, tied()[1])
    result = answer | {name: assemble([answer[name]]) for name in ("weights", "gradients")}
    assert EMBEDDING in result["gradients"] and "output_layer.weight" not in result["gradients"]
    return result


@pytest.mark.parametrize("layout", quick(SPLIT_LAYOUTS, "TP2", "PP2-interleaved", "EP2xPP2"))
def test_first_step_gradients_equal_one_process(pool, reference, layout):
    world_size, config = tied(layout)
    answers = pool.run(world_size, first_gradients, config)
    weights = assemble([answer["weights"] for answer in answers])
    assert weights.keys() == reference["weights"].keys()
    for key, value in weights.items():
        assert value.tobytes() == reference["weights"][key].tobytes(), key
    check_gradients(answers, reference)


def results(config, steps: int) -> list[tuple[float, ...]]:
    """Return loss, gradient norm, and update RMS of every group, for the first steps."""
    model_chunks, optimizer = build(config)
    values = []
    for step in range(1, steps + 1):
        result = one_step(model_chunks, optimizer, config, step)
        values.append((result.loss, result.gradient_norm, *result.update_rms.values()))
    return values


@pytest.fixture(scope="module")
def reference_results(pool):
    (values,) = pool.run(1, results, tied()[1], STEPS)
    assert values[-1][0] < values[0][0]
    return values


@pytest.mark.parametrize("layout", quick(SPLIT_LAYOUTS, "TP2", "PP2"))
def test_losses_norms_and_updates_equal_one_process(pool, reference_results, layout):
    world_size, config = tied(layout)
    expected = np.array(reference_results)
    for values in pool.run(world_size, results, config, STEPS):
        np.testing.assert_allclose(np.array(values)[:, 0], expected[:, 0], rtol=1e-5)
        np.testing.assert_allclose(values, expected, rtol=2e-5)


def copies(config, steps: int) -> list[Any]:
    """Return this rank's tied weight, if any, before and after some steps, and the rows and state that it owns."""
    model_chunks, optimizer = build(config)
    embeddings = [parameter for parameter in optimizer.data_parallel.parameters if parameter.is_shared_embedding]
    before = [parameter.weight_2d.float().numpy().copy() for parameter in embeddings]
    for step in range(1, steps + 1):
        one_step(model_chunks, optimizer, config, step)
    optimizer.data_parallel.finish_param_sync()
    owned = [
        (
            owned.shard.start,
            owned.shard.stop,
            owned.is_primary_copy,
            [owned.master_weight.to_float32().numpy(), *owned.states],
        )
        for owned in optimizer.owned
        if owned.param.is_shared_embedding
    ]
    return [
        (old, p.weight_2d.float().numpy(), p.is_embedding_replica, owned)
        for p, old in zip(embeddings, before, strict=True)
    ]


@pytest.mark.parametrize(
    ("layout", "dtype"),
    quick(
        itertools.product(("PP2", "PP2-interleaved", "EP2xPP2", "TP2xPP2"), ("float32", "bfloat16")),
        ("PP2-interleaved", "float32"),
        ("TP2xPP2", "bfloat16"),
        ("EP2xPP2", "bfloat16"),
    ),
)
def test_both_copies_stay_bit_identical(pool, layout, dtype):
    world_size, config = tied(layout, dtype=dtype)
    if dtype == "bfloat16":
        config = replace(config, optimizer=replace(config.optimizer, master_weights="split"))
    answers = pool.run(world_size, copies, config, 5)
    first_stage, last_stage = answers[: world_size // 2], answers[world_size // 2 :]
    rows = 0
    for ((old, new, _, owned),), ((_, copy, is_copy, copy_owned),) in zip(first_stage, last_stage, strict=True):
        assert is_copy and new.tobytes() == copy.tobytes() and (new != old).any()
        for (start, stop, is_primary, state), (a, b, copy_is_primary, copy_state) in zip(
            owned, copy_owned, strict=True
        ):
            assert (start, stop) == (a, b) and is_primary and not copy_is_primary
            assert all(
                np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in zip(state, copy_state, strict=True)
            )
            rows += stop - start
    assert rows == config.model.vocab_size
    assert all(owned for ((_, _, _, owned),) in answers)  # every data-parallel rank owns a part


def used_weights(config) -> dict[str, Any]:
    """Return this rank's uses of the tied weight in the pass right after a step, and how many had a stale weight."""
    from moonlight.train.forward_backward import forward_backward

    model_chunks, optimizer = build(config)
    (parameter,) = [p for p in optimizer.data_parallel.parameters if p.key == EMBEDDING]
    old = parameter.weight_2d.clone()
    one_step(model_chunks, optimizer, config, 2)  # step 1 is monitored and would wait for all weights
    in_flight = sum(len(group._in_flight) for group in optimizer.data_parallel.bucket_groups)
    used: dict[str, list[torch.Tensor]] = {"embedding": [], "head": []}

    def record_embedding(module: torch.nn.Module, args: Any) -> None:
        used["embedding"].append(module.weight.detach().clone())

    def record_head(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        used["head"].append(kwargs["weight"].detach().clone())

    # These hooks are registered last, so that they run after the hooks that wait.
    for model in model_chunks:
        if model.pre_process:
            model.embedding.word_embeddings.register_forward_pre_hook(record_embedding)
        if model.post_process:
            model.output_layer.register_forward_pre_hook(record_head, with_kwargs=True)
    forward_backward(model_chunks, config, local_batches(config, 2), forward_only=True)
    optimizer.data_parallel.finish_param_sync()
    new = parameter.weight_2d
    assert not (new == old).all(-1).any()  # every row has changed, also the rows of other owners
    stale = {name: sum(not torch.equal(weight, new) for weight in weights) for name, weights in used.items()}
    return {"in flight": in_flight, "uses": {name for name in used if used[name]}, "stale": stale}


@pytest.mark.parametrize("layout", quick(["DP2", "DP4", "EP2xPP2"], "EP2xPP2"))
def test_both_uses_wait_for_the_weight(pool, layout):
    world_size, config = tied(layout)
    for rank, answer in enumerate(pool.run(world_size, used_weights, config)):
        assert answer["in flight"] > 0
        on_two_stages = "PP2" in layout
        assert answer["uses"] == ({("embedding", "head")[rank // 2]} if on_two_stages else {"embedding", "head"})
        assert answer["stale"] == {"embedding": 0, "head": 0}


@pytest.fixture(scope="module")
def later_losses(pool):
    """Losses of steps 4 to 8 of an uninterrupted run."""
    return pool.run(1, train_losses, tied()[1], 8)[0][3:]


@pytest.mark.parametrize(
    ("writer", "reader"),
    quick(
        [("PP2", "TP2"), ("TP2", "PP2"), ("EP2xPP2", "1"), ("1", "PP2-interleaved"), ("PP2-interleaved", "EP2xPP2")],
        ("PP2", "TP2"),
        ("PP2-interleaved", "EP2xPP2"),
    ),
)
def test_saved_in_one_layout_and_resumed_in_another(pool, tmp_path, later_losses, writer, reader):
    world_size, config = tied(writer)
    pool.run(world_size, restart, config, tmp_path, 3, False)
    folder = resolve_checkpoint(tmp_path)
    index = read_index(folder)
    keys = [key for key in index.state_dict_metadata if "embedding" in key or "output_layer" in key]
    assert sorted(keys) == [EMBEDDING, f"optimizer.exp_avg.{EMBEDDING}", f"optimizer.exp_avg_sq.{EMBEDDING}"]
    # A second copy would take space in the files, but the index covers every byte except the alignment.
    ends = dict.fromkeys((file.name for file in folder.glob("*.distcp")), 0)
    for info in sorted(index.storage_data.values(), key=lambda info: (info.relative_path, info.offset)):
        assert info.offset == -(-ends[info.relative_path] // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
        ends[info.relative_path] = info.offset + info.length
    assert ends == {file.name: file.stat().st_size for file in folder.glob("*.distcp")}
    world_size, config = tied(reader)
    for losses in pool.run(world_size, restart, config, tmp_path, 5, True):
        assert losses == pytest.approx(later_losses, rel=1e-5)


def test_plain_transformers_loads_an_export(pool, data_folder, tokenizer_folder, tmp_path):
    config = make_run(tmp_path / "runs", data_folder, tokenizer_folder, "PP2", train_steps=4)
    config = replace(config, model=replace(config.model, tie_word_embeddings=True))
    pool.run(2, train_run, config)
    folder, out = tmp_path / "runs" / config.name, tmp_path / "hf"
    export(folder, out)
    names = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    report = verify(folder, out)
    assert report.passed and report.tokens > 0, report
    script = (
        "import sys, torch; from transformers import AutoModelForCausalLM; from transformers.utils import logging; "
        "logging.disable_progress_bar(); model = AutoModelForCausalLM.from_pretrained(sys.argv[1]); "
        "assert model.lm_head.weight is model.model.embed_tokens.weight"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", script, str(out)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("path", "world_sizes", "settings"),
    [
        (QUICKSTART, [2, 4, 8], ["parallel.pipeline_parallel_size=2", "parallel.expert_parallel_size=1"]),
        (QUICKSTART, [2, 4], []),
        (BIG, [24, 48], ["parallel.pipeline_parallel_size=3", "parallel.tensor_parallel_size=2"]),
    ],
)
def test_a_plan_counts_the_embedding_once(path, world_sizes, settings):
    config = load_recipe(path, [*settings, "model.tie_word_embeddings=true", "train.micro_batch_size=1"])
    untied = replace(config.model, tie_word_embeddings=False)
    num_untied = sum(math.prod(mapping.shape) for mapping in hf_mapping.tensor_mappings(untied))
    for world_size in world_sizes:
        plan = make_plan(config, world_size)
        keys = [line.key for line in plan.params]
        assert len(keys) == len(set(keys)) and EMBEDDING in keys and "output_layer.weight" not in keys
        counted = plan.num_parameters("muon") + plan.num_parameters("adamw") + plan.num_router_biases
        assert counted == num_untied - untied.vocab_size * untied.hidden_size


def real_bytes(config) -> tuple[float, float]:
    """Return the bytes that this rank sends and receives in one exchange.

    They are between data-parallel ranks, and between both copies of the embedding.
    """
    _, optimizer = build(config)
    return count_bytes(optimizer)


def count_bytes(optimizer) -> tuple[float, float]:
    with CommCounter() as counter:
        exchange(optimizer)
    has_tied = any(parameter.is_shared_embedding for parameter in optimizer.data_parallel.parameters)
    groups = [data_parallel_group(expert=False), data_parallel_group(expert=True)]
    groups += [embedding_group()] if has_tied else []
    sent, received = zip(*(both(counter.stats(group)) for group in groups), strict=True)
    return sum(sent), sum(received)


def test_planned_bytes_and_state_equal_real_processes(pool):
    world_size, config = tied("EP2xPP2")
    plan = make_plan(config, world_size)
    for rank, real in enumerate(pool.run(world_size, real_bytes, config)):
        with fake_rank(config, world_size, rank) as model_chunks:
            optimizer = build_optimizer(model_chunks, config)
            assert count_bytes(optimizer) == real == both(plan.optimizer_costs[rank])
            assert optimizer.state_bytes() == plan.optimizer_costs[rank].state


def test_a_mismatched_checkpoint_is_refused_and_an_older_one_is_untied():
    config, content = recipe(), {"recipe": dataclasses.asdict(recipe())}
    del content["recipe"]["model"]["tie_word_embeddings"]
    check_model(Path("old"), content, config)
    with pytest.raises(UserError, match="tie_word_embeddings False there, True here"):
        check_model(Path("old"), content, tied()[1])
