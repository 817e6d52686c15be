"""Monitors against plain numpy on saved weights and recorded routes, in every kind of layout; how often they come."""

import dataclasses
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moonlight.config.monitor import MonitorConfig
from moonlight.config.parallel import ParallelConfig
from moonlight.config.timeline import RunSchedule
from moonlight.dist_checkpoint import hf_mapping
from moonlight.errors import UserError
from moonlight.hardware import peak_flops_per_second
from moonlight.optim.svd_entropy import svd_entropy
from moonlight.placement.param_groups import MATRIX_GROUPS, MONITOR_GROUPS, find_monitor_group
from moonlight.plan.flops import train_flops_per_token
from moonlight.train.metrics import METRICS_FILE, read_metrics, to_line
from moonlight.train.monitors import is_due
from tests.support.layouts import (
    LAYOUTS,
    assemble,
    build,
    collect,
    flatten,
    flatten_gradients,
    make_run,
    one_step,
    recipe,
    train_run,
)
from tests.support.suites import quick

ALWAYS = MonitorConfig(every_steps=1, svd_entropy_every_steps=1)
STEPS = 3
HF_GROUPS = {
    "q_proj": "attention_qo",
    "q_a_proj": "attention_qo",
    "q_b_proj": "attention_qo",
    "o_proj": "attention_qo",
    "kv_a_proj_with_mqa": "attention_kv",
    "kv_b_proj": "attention_kv",
    "embed_tokens": "embedding",
    "lm_head": "head",
    "gate": "router",
}
"""By the second to last word of a Hugging Face name."""


def hugging_face_group(name):
    """The group of a tensor, worked out from its Hugging Face name; None for router biases."""
    if name.endswith("e_score_correction_bias"):
        return None
    if "norm" in name:
        return "norms"
    if ".shared_experts." in name:
        return "shared_experts"
    if ".experts." in name:
        return "experts"
    return HF_GROUPS.get(name.split(".")[-2], "dense")


def hugging_face_tensors(model, whole):
    """(group, name, float64 values) of every Hugging Face tensor in the whole tensors of a checkpoint."""
    for row in hf_mapping.tensor_mappings(model):
        if row.key in whole:
            for part in row.hf_tensors:
                if (group := hugging_face_group(part.name)) is not None:
                    yield group, part.name, whole[row.key][part.index].astype(np.float64)


def rms_by_group(model, whole):
    sums, counts = dict.fromkeys(MONITOR_GROUPS, 0.0), dict.fromkeys(MONITOR_GROUPS, 0)
    for group, _, values in hugging_face_tensors(model, whole):
        sums[group] += (values**2).sum()
        counts[group] += values.size
    return {group: math.sqrt(sums[group] / counts[group]) for group in MONITOR_GROUPS if counts[group]}


def slow_entropy(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    shares = values**2 / (values**2).sum()
    shares = shares[shares > 0]
    return -(shares * np.log(shares)).sum() / np.log(min(matrix.shape))


def entropy_by_group(model, whole):
    """Mean over matrices; of a layer's experts the first, and those after a third and two thirds."""
    sampled = {f".experts.{number * model.num_experts // 3}." for number in range(3)}
    found = {}
    for group, name, values in hugging_face_tensors(model, whole):
        if group in MATRIX_GROUPS and (group != "experts" or any(part in name for part in sampled)):
            found.setdefault(group, []).append(slow_entropy(values))
    return {group: float(np.mean(values)) for group, values in found.items()}


def watched_steps(run):
    """Results of the first steps, and what they are compared with: masters around the last, its gradients, routes."""
    from moonlight.train.forward_backward import find_routers

    models, optimizer = build(run)
    optimizer.data_parallel.finish_param_sync()
    results, routed, gradients = [], [], []
    for router in find_routers(models):
        router.register_forward_hook(lambda router, _, out: routed.append((router.layer_number, out[1].clone())))
    finish = optimizer.data_parallel.finish_grad_sync

    def look():
        finish()
        gradients[:] = flatten_gradients(optimizer)

    optimizer.data_parallel.finish_grad_sync = look
    for step in range(1, STEPS + 1):
        before = flatten(optimizer.master_state_dict())
        routed.clear()
        result = one_step(models, optimizer, run, step)
        results.append(dataclasses.asdict(result))
    optimizer.data_parallel.finish_param_sync()
    counts = {}
    for layer, chosen in routed:
        counts[layer] = counts.get(layer, 0) + chosen.flatten().bincount(minlength=run.model.num_experts).numpy()
    return {
        "results": results,
        "before": before,
        "after": flatten(optimizer.master_state_dict()),
        "weights": collect(models),
        "gradients": list(gradients),
        "counts": counts,
    }


PP4 = {"PP4": (4, ParallelConfig(pipeline_parallel_size=4))}
CASES = {
    **{name: {"layout": name} for name in LAYOUTS},
    "adamw": {"layout": "DP2", "optimizer": {"name": "adamw"}},
    "per_head": {"layout": "TP2", "optimizer": {"matrices": "per_head"}},
    "stage without layers": {"layout": "PP4", "model": {"num_hidden_layers": 3}},
    "stage without layers, clipped": {
        "layout": "PP4",
        "model": {"num_hidden_layers": 3},
        "optimizer": {"qk_clip": 1e3},
    },
    "tied": {"layout": "PP2", "model": {"tie_word_embeddings": True}},
    "q_lora": {"layout": "TP2", "model": {"q_lora_rank": 12}},
    "split": {"layout": "DP2", "optimizer": {"master_weights": "split"}, "train": {"dtype": "bfloat16"}},
}


@pytest.mark.parametrize(
    "case", quick(CASES, "EP2xTP2-ETP2-4", "adamw", "per_head", "stage without layers, clipped", "split")
)
def test_monitors_equal_numpy(pool, case):
    settings = CASES[case]
    processes, parallel = (LAYOUTS | PP4)[settings["layout"]]
    run = recipe(**settings.get("train", {}))
    run = replace(run, model=replace(run.model, **settings.get("model", {})))
    run = replace(run, parallel=replace(parallel, bucket_size=run.parallel.bucket_size), monitor=ALWAYS)
    run = replace(run, optimizer=replace(run.optimizer, **settings.get("optimizer", {})))
    answers = pool.run(processes, watched_steps, run)
    before, after, gradients, weights = (
        assemble([answer[name] for answer in answers]) for name in ("before", "after", "gradients", "weights")
    )
    result = answers[0]["results"][-1]
    for answer in answers:
        other = answer["results"][-1]
        assert all(other[key] == result[key] for key in result if key != "monitors")
        assert other["monitors"] == result["monitors"]
    watched = result["monitors"]
    assert watched["svd_entropies"] == pytest.approx(entropy_by_group(run.model, weights), abs=1e-5)
    # Masters and weights differ by bfloat16's rounding, if at all: that much in matrices of 8 rows.
    tolerance = 1e-4 if run.train.dtype == "bfloat16" else 1e-5
    assert watched["svd_entropies"] == pytest.approx(entropy_by_group(run.model, after), abs=tolerance)
    assert watched["weight_rms"] == pytest.approx(rms_by_group(run.model, after), rel=1e-5)
    rate = RunSchedule(run).at(STEPS).learning_rate
    updates = {
        key: (before[key].astype(np.float64) * (1 - rate * run.optimizer.weight_decay) - after[key]) / rate
        for key in gradients
    }
    # The weights are float32, and one update is a small part of them.
    assert result["update_rms"] == pytest.approx(rms_by_group(run.model, updates), rel=1e-5, abs=2e-6)
    counts = {
        group: sum(v.size for g, _, v in hugging_face_tensors(run.model, gradients) if g == group)
        for group in MONITOR_GROUPS
    }
    norms = {group: rms * math.sqrt(counts[group]) for group, rms in rms_by_group(run.model, gradients).items()}
    assert result["gradient_norms"] == pytest.approx(norms, rel=1e-5)
    assert result["gradient_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    check_loads(run, processes, answers, watched["loads"], result)


def check_loads(run, processes, answers, loads, result):
    """Every rank routes its own tokens; the loads are of all of them."""
    totals = {}
    tensor_size = run.parallel.tensor_parallel_size
    for rank, answer in enumerate(answers):
        for layer, counts in answer["counts"].items():
            # Under sequence parallelism each tensor-parallel rank routes its part of the sequence.
            assert counts.sum() * processes // run.parallel.pipeline_parallel_size == 8 * 32 * 2, (rank, tensor_size)
            totals[layer] = totals.get(layer, 0) + counts
    expected = np.array([totals[layer] for layer in sorted(totals)], dtype=np.float64)
    assert expected.sum(1).tolist() == [8 * 32 * 2] * (run.model.num_hidden_layers - run.model.first_k_dense_replace)
    np.testing.assert_allclose(loads, expected / expected.mean(1, keepdims=True), rtol=1e-6)
    assert result["dead_experts"] == (expected == 0).sum()
    assert result["max_load"] == pytest.approx(np.max(loads), rel=1e-6)


def starved(run):
    """The first step of a model one of whose experts nobody may choose."""
    from moonlight.train.forward_backward import find_routers

    models, optimizer = build(run)
    for router in find_routers(models):
        router.expert_bias[3] = -100.0
    return dataclasses.asdict(one_step(models, optimizer, run, 1))


@pytest.mark.parametrize("layout", ["1", "EP2xPP2"])
def test_experts_without_tokens_are_dead(pool, layout):
    processes, parallel = LAYOUTS[layout]
    for result in pool.run(processes, starved, recipe(parallel)):
        assert result["dead_experts"] >= 3
        assert [loads[3] for loads in result["monitors"]["loads"]] == [0, 0, 0]


def test_the_entropy_of_known_spectra():
    assert svd_entropy(torch.eye(5)) == pytest.approx(1)
    assert svd_entropy(torch.ones(4, 7)) == pytest.approx(0, abs=1e-12)
    assert svd_entropy(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(0.5)
    assert math.isnan(svd_entropy(torch.zeros(3, 3))) and math.isnan(svd_entropy(torch.full((2, 2), math.inf)))


@pytest.mark.parametrize("shape", [(64, 96), (528, 192), (40, 40), (2, 700)])
def test_the_entropy_of_any_matrix_equals_numpys(shape):
    generator = np.random.default_rng(7)
    left, _ = np.linalg.qr(generator.normal(size=(shape[0], min(shape))))
    right, _ = np.linalg.qr(generator.normal(size=(shape[1], min(shape))))
    for decay in (0.0, 1.0, 3.0):
        matrix = (left * (1 + np.arange(min(shape))) ** -decay) @ right.T
        matrix = matrix.astype(np.float32)
        assert svd_entropy(torch.from_numpy(matrix)) == pytest.approx(slow_entropy(matrix.astype(np.float64)), abs=1e-6)


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2250),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_the_peak_of_a_gpu(name, tflops):
    assert peak_flops_per_second(name) == (tflops and tflops * 1e12)


def test_every_parameter_has_a_group():
    model_config = replace(recipe().model, q_lora_rank=12)
    for row in hf_mapping.tensor_mappings(model_config):
        if row.hf_tensors[0].init_kind != "bias":
            assert find_monitor_group(row.key) == hugging_face_group(row.hf_tensors[0].name)


def test_how_often():
    assert [step for step in range(1, 32) if is_due(step, 10)] == [1, 10, 20, 30]
    assert not any(is_due(step, 0) for step in range(1, 100))
    for wrong in ({"every_steps": 10, "svd_entropy_every_steps": 15}, {"every_steps": 0}, {"every_steps": -1}):
        with pytest.raises(UserError, match=r"monitor\."):
            MonitorConfig(**wrong)


def test_the_metrics_have_what_is_due(pool, data_folder, tokenizer_folder, tmp_path):
    run = make_run(tmp_path, data_folder, tokenizer_folder, train_steps=6)
    run = replace(run, monitor=MonitorConfig(every_steps=2, svd_entropy_every_steps=4, peak_tflops=0.5))
    pool.run(1, train_run, run)
    lines = (tmp_path / "1" / METRICS_FILE).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [list(entry) for entry in read_metrics(tmp_path / "1")] == [
        [key for key, value in entry.items() if not isinstance(value, list)] for entry in entries
    ]
    model_config = run.model
    for entry in entries:
        assert {f"optim/grad_norm/{group}" for group in MONITOR_GROUPS} <= entry.keys()
        assert {f"optim/update_rms/{group}" for group in MONITOR_GROUPS} <= entry.keys()
        flops = train_flops_per_token(model_config, run.data.sequence_length) * entry["speed/tokens_per_second"]
        assert entry["speed/model_tflops"] == pytest.approx(flops / 1e12)
        assert entry["speed/mfu"] == pytest.approx(flops / 0.5e12) and entry["moe/dead_experts"] >= 0
        watched, entropies = entry["step"] in (1, 2, 4, 6), entry["step"] in (1, 4)
        assert ("attention/max_logit" in entry) == ("optim/weight_rms/router" in entry) == watched
        assert ("optim/svd_entropy/experts" in entry) == entropies
        if watched:
            assert len(entry["attention/max_logit_by_layer"]) == model_config.num_hidden_layers
            layers = model_config.num_hidden_layers - model_config.first_k_dense_replace
            assert np.shape(entry["moe/load_by_expert"]) == (layers, model_config.num_experts)
            np.testing.assert_allclose(entry["moe/max_load_by_layer"], np.max(entry["moe/load_by_expert"], 1))
            np.testing.assert_allclose(
                entry["moe/load_spread_by_layer"], np.std(entry["moe/load_by_expert"], 1), rtol=1e-2, atol=1e-3
            )
            assert max(entry["moe/max_load_by_layer"]) == pytest.approx(entry["moe/max_load"], rel=1e-3)
            assert entry["memory/peak_bytes"] > 10**8


def test_what_is_not_finite_is_null():
    line = to_line({"step": 1, "loss/train": math.nan, "list": [[1.0, math.inf], [2.0]], "stage": "one"})
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert entry == {"step": 1, "loss/train": None, "list": [[1.0, None], [2.0]], "stage": "one"}


def test_null_is_read_as_nan(tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(to_line({"step": 1, "loss/train": math.nan}))
    (entry,) = read_metrics(tmp_path)
    assert math.isnan(entry["loss/train"])


def test_no_monitor_at_all(pool, data_folder, tokenizer_folder, tmp_path):
    run = make_run(tmp_path, data_folder, tokenizer_folder, train_steps=2)
    run = replace(run, monitor=MonitorConfig(every_steps=0, svd_entropy_every_steps=0), parallel=ParallelConfig())
    pool.run(1, train_run, run)
    for entry in read_metrics(tmp_path / "1"):
        assert not [key for key in entry if "by_layer" in key or "weight_rms" in key or "max_logit" in key]
