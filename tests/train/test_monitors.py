"""Monitors must equal plain numpy on saved weights and recorded routes, in every kind of layout, when they are due."""

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
"""Monitor group by the second to last component of a Hugging Face name."""


def hugging_face_group(name):
    """Return the group of a tensor from its Hugging Face name; None for router biases."""
    if name.endswith("e_score_correction_bias"):
        return None
    if "norm" in name:
        return "norms"
    if ".shared_experts." in name:
        return "shared_experts"
    if ".experts." in name:
        return "experts"
    return HF_GROUPS.get(name.split(".")[-2], "dense")


def hugging_face_tensors(model_config, full):
    """Yield (group, name, float64 values) of every Hugging Face tensor in a checkpoint's full tensors."""
    for mapping in hf_mapping.tensor_mappings(model_config):
        if mapping.key in full:
            for hf_tensor in mapping.hf_tensors:
                if (group := hugging_face_group(hf_tensor.name)) is not None:
                    yield group, hf_tensor.name, full[mapping.key][hf_tensor.index].astype(np.float64)


def rms_by_group(model_config, full):
    sums, counts = dict.fromkeys(MONITOR_GROUPS, 0.0), dict.fromkeys(MONITOR_GROUPS, 0)
    for group, _, values in hugging_face_tensors(model_config, full):
        sums[group] += (values**2).sum()
        counts[group] += values.size
    return {group: math.sqrt(sums[group] / counts[group]) for group in MONITOR_GROUPS if counts[group]}


def slow_entropy(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    fractions = values**2 / (values**2).sum()
    fractions = fractions[fractions > 0]
    return -(fractions * np.log(fractions)).sum() / np.log(min(matrix.shape))


def entropy_by_group(model_config, full):
    """Return the mean entropy of each group; of a layer's experts, sample the first and those at 1/3 and 2/3."""
    sampled = {f".experts.{index * model_config.num_experts // 3}." for index in range(3)}
    entropies = {}
    for group, name, values in hugging_face_tensors(model_config, full):
        if group in MATRIX_GROUPS and (group != "experts" or any(expert in name for expert in sampled)):
            entropies.setdefault(group, []).append(slow_entropy(values))
    return {group: float(np.mean(values)) for group, values in entropies.items()}


def monitored_steps(config):
    """Return the results of the first steps, and the data of the last: masters before and after, gradients, routes."""
    from moonlight.train.forward_backward import find_routers

    model_chunks, optimizer = build(config)
    optimizer.data_parallel.finish_param_sync()
    results, routed, gradients = [], [], []
    for router in find_routers(model_chunks):
        router.register_forward_hook(lambda router, _, out: routed.append((router.layer_number, out[1].clone())))
    finish = optimizer.data_parallel.finish_grad_sync

    def finish_and_record():
        finish()
        gradients[:] = flatten_gradients(optimizer)

    optimizer.data_parallel.finish_grad_sync = finish_and_record
    for step in range(1, STEPS + 1):
        before = flatten(optimizer.master_state_dict())
        routed.clear()
        result = one_step(model_chunks, optimizer, config, step)
        results.append(dataclasses.asdict(result))
    optimizer.data_parallel.finish_param_sync()
    counts = {}
    for layer, chosen in routed:
        counts[layer] = counts.get(layer, 0) + chosen.flatten().bincount(minlength=config.model.num_experts).numpy()
    return {
        "results": results,
        "before": before,
        "after": flatten(optimizer.master_state_dict()),
        "weights": collect(model_chunks),
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
    config = recipe(**settings.get("train", {}))
    config = replace(config, model=replace(config.model, **settings.get("model", {})))
    config = replace(config, parallel=replace(parallel, bucket_size=config.parallel.bucket_size), monitor=ALWAYS)
    config = replace(config, optimizer=replace(config.optimizer, **settings.get("optimizer", {})))
    answers = pool.run(processes, monitored_steps, config)
    before, after, gradients, weights = (
        assemble([answer[name] for answer in answers]) for name in ("before", "after", "gradients", "weights")
    )
    result = answers[0]["results"][-1]
    for answer in answers:
        other = answer["results"][-1]
        assert all(other[key] == result[key] for key in result if key != "monitors")
        assert other["monitors"] == result["monitors"]
    monitors = result["monitors"]
    assert monitors["svd_entropies"] == pytest.approx(entropy_by_group(config.model, weights), abs=1e-5)
    # Masters and weights differ at most by bfloat16 rounding: up to 1e-4 in matrices of 8 rows.
    tolerance = 1e-4 if config.train.dtype == "bfloat16" else 1e-5
    assert monitors["svd_entropies"] == pytest.approx(entropy_by_group(config.model, after), abs=tolerance)
    assert monitors["weight_rms"] == pytest.approx(rms_by_group(config.model, after), rel=1e-5)
    rate = RunSchedule(config).at(STEPS).learning_rate
    updates = {
        key: (before[key].astype(np.float64) * (1 - rate * config.optimizer.weight_decay) - after[key]) / rate
        for key in gradients
    }
    # The weights are float32, and one update is small compared with them.
    assert result["update_rms"] == pytest.approx(rms_by_group(config.model, updates), rel=1e-5, abs=2e-6)
    counts = {
        group: sum(v.size for g, _, v in hugging_face_tensors(config.model, gradients) if g == group)
        for group in MONITOR_GROUPS
    }
    norms = {group: rms * math.sqrt(counts[group]) for group, rms in rms_by_group(config.model, gradients).items()}
    assert result["gradient_norms"] == pytest.approx(norms, rel=1e-5)
    assert result["gradient_norm"] == pytest.approx(math.hypot(*norms.values()), rel=1e-5)
    check_loads(config, processes, answers, monitors["loads"], result)


def check_loads(config, processes, answers, loads, result):
    """Check the counts of each rank's tokens, and the loads over the tokens of all ranks."""
    totals = {}
    tensor_size = config.parallel.tensor_parallel_size
    for rank, answer in enumerate(answers):
        for layer, counts in answer["counts"].items():
            # Under sequence parallelism each tensor-parallel rank routes its part of the sequence.
            assert counts.sum() * processes // config.parallel.pipeline_parallel_size == 8 * 32 * 2, (rank, tensor_size)
            totals[layer] = totals.get(layer, 0) + counts
    expected = np.array([totals[layer] for layer in sorted(totals)], dtype=np.float64)
    assert expected.sum(1).tolist() == [8 * 32 * 2] * (
        config.model.num_hidden_layers - config.model.first_k_dense_replace
    )
    np.testing.assert_allclose(loads, expected / expected.mean(1, keepdims=True), rtol=1e-6)
    assert result["dead_experts"] == (expected == 0).sum()
    assert result["max_load"] == pytest.approx(np.max(loads), rel=1e-6)


def step_with_starved_expert(config):
    """Return the result of a first step in which no token can choose expert 3."""
    from moonlight.train.forward_backward import find_routers

    model_chunks, optimizer = build(config)
    for router in find_routers(model_chunks):
        router.expert_bias[3] = -100.0
    return dataclasses.asdict(one_step(model_chunks, optimizer, config, 1))


@pytest.mark.parametrize("layout", ["1", "EP2xPP2"])
def test_experts_without_tokens_are_dead(pool, layout):
    processes, parallel = LAYOUTS[layout]
    for result in pool.run(processes, step_with_starved_expert, recipe(parallel)):
        assert result["dead_experts"] >= 3
        assert [loads[3] for loads in result["monitors"]["loads"]] == [0, 0, 0]


def test_svd_entropy_of_known_spectra():
    assert svd_entropy(torch.eye(5)) == pytest.approx(1)
    assert svd_entropy(torch.ones(4, 7)) == pytest.approx(0, abs=1e-12)
    assert svd_entropy(torch.diag(torch.tensor([1.0, 1.0, 0.0, 0.0]))) == pytest.approx(0.5)
    assert math.isnan(svd_entropy(torch.zeros(3, 3))) and math.isnan(svd_entropy(torch.full((2, 2), math.inf)))


@pytest.mark.parametrize("shape", [(64, 96), (528, 192), (40, 40), (2, 700)])
def test_svd_entropy_of_any_matrix_equals_numpy(shape):
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
def test_peak_flops_of_a_gpu(name, tflops):
    assert peak_flops_per_second(name) == (tflops and tflops * 1e12)


def test_every_parameter_has_a_group():
    model_config = replace(recipe().model, q_lora_rank=12)
    for mapping in hf_mapping.tensor_mappings(model_config):
        if mapping.hf_tensors[0].init_kind != "bias":
            assert find_monitor_group(mapping.key) == hugging_face_group(mapping.hf_tensors[0].name)


def test_monitors_are_due_at_their_interval():
    assert [step for step in range(1, 32) if is_due(step, 10)] == [1, 10, 20, 30]
    assert not any(is_due(step, 0) for step in range(1, 100))
    for invalid in ({"every_steps": 10, "svd_entropy_every_steps": 15}, {"every_steps": 0}, {"every_steps": -1}):
        with pytest.raises(UserError, match=r"monitor\."):
            MonitorConfig(**invalid)


def test_metrics_contain_the_monitors_that_are_due(pool, data_folder, tokenizer_folder, tmp_path):
    config = make_run(tmp_path, data_folder, tokenizer_folder, train_steps=6)
    config = replace(config, monitor=MonitorConfig(every_steps=2, svd_entropy_every_steps=4, peak_tflops=0.5))
    pool.run(1, train_run, config)
    lines = (tmp_path / "1" / METRICS_FILE).read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [list(entry) for entry in read_metrics(tmp_path / "1")] == [
        [key for key, value in entry.items() if not isinstance(value, list)] for entry in entries
    ]
    model_config = config.model
    for entry in entries:
        assert {f"optim/grad_norm/{group}" for group in MONITOR_GROUPS} <= entry.keys()
        assert {f"optim/update_rms/{group}" for group in MONITOR_GROUPS} <= entry.keys()
        flops = train_flops_per_token(model_config, config.data.sequence_length) * entry["speed/tokens_per_second"]
        assert entry["speed/model_tflops"] == pytest.approx(flops / 1e12)
        assert entry["speed/mfu"] == pytest.approx(flops / 0.5e12) and entry["moe/dead_experts"] >= 0
        is_monitored, has_entropies = entry["step"] in (1, 2, 4, 6), entry["step"] in (1, 4)
        assert ("attention/max_logit" in entry) == ("optim/weight_rms/router" in entry) == is_monitored
        assert ("optim/svd_entropy/experts" in entry) == has_entropies
        if is_monitored:
            assert len(entry["attention/max_logit_by_layer"]) == model_config.num_hidden_layers
            layers = model_config.num_hidden_layers - model_config.first_k_dense_replace
            assert np.shape(entry["moe/load_by_expert"]) == (layers, model_config.num_experts)
            np.testing.assert_allclose(entry["moe/max_load_by_layer"], np.max(entry["moe/load_by_expert"], 1))
            np.testing.assert_allclose(
                entry["moe/load_spread_by_layer"], np.std(entry["moe/load_by_expert"], 1), rtol=1e-2, atol=1e-3
            )
            assert max(entry["moe/max_load_by_layer"]) == pytest.approx(entry["moe/max_load"], rel=1e-3)
            assert entry["memory/peak_bytes"] > 10**8


def test_nonfinite_values_are_written_as_null():
    line = to_line({"step": 1, "loss/train": math.nan, "list": [[1.0, math.inf], [2.0]], "stage": "one"})
    entry = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert entry == {"step": 1, "loss/train": None, "list": [[1.0, None], [2.0]], "stage": "one"}


def test_null_is_read_as_nan(tmp_path):
    (tmp_path / METRICS_FILE).write_bytes(to_line({"step": 1, "loss/train": math.nan}))
    (entry,) = read_metrics(tmp_path)
    assert math.isnan(entry["loss/train"])


def test_no_monitor_at_all(pool, data_folder, tokenizer_folder, tmp_path):
    config = make_run(tmp_path, data_folder, tokenizer_folder, train_steps=2)
    config = replace(config, monitor=MonitorConfig(every_steps=0, svd_entropy_every_steps=0), parallel=ParallelConfig())
    pool.run(1, train_run, config)
    for entry in read_metrics(tmp_path / "1"):
        assert not [key for key in entry if "by_layer" in key or "weight_rms" in key or "max_logit" in key]
