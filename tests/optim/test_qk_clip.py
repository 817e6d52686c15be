"""Recorded attention logits must equal float64, and MuonClip a reference that scales full weights head by head."""

import dataclasses
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moonlight.config.schedule import ScheduleConfig
from moonlight.model.attention import CausalAttention, max_logits
from moonlight.optim.qk_clip import logit_factors
from moonlight.train.metrics import read_metrics
from tests.support.layouts import LAYOUTS, assemble, build, flatten, make_run, one_step, recipe, train_run
from tests.support.suites import quick


def wide_recipe(layout="1", qk_clip=0.0, q_lora_rank=None, optimizer=None, **train):
    """Return a config of the small model with initial weights large enough for logits of about ten."""
    config = recipe(LAYOUTS[layout][1], **train)
    return replace(
        config,
        model=replace(config.model, initializer_range=0.3, q_lora_rank=q_lora_rank),
        optimizer=replace(config.optimizer, qk_clip=qk_clip, **(optimizer or {})),
    )


def slow_maxima(query, key, scale):
    """Return the largest causal logit of each head in float64: [sequence, batch, heads, dim] -> [heads]."""
    logits = scale * np.einsum("sbhd,tbhd->bhst", query.double().numpy(), key.double().numpy())
    logits[..., ~np.tri(len(query), dtype=bool)] = -np.inf
    return logits.max((0, 2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("length", "batch", "heads", "logits_at_once"),
    [(64, 2, 3, 2**20), (64, 1, 4, 64 * 4 * 16), (61, 3, 2, 900), (5, 1, 2, 1)],
)
def test_maximum_equals_all_logits_in_float64(length, batch, heads, logits_at_once, dtype):
    generator = torch.Generator().manual_seed(length)
    query, key = (torch.randn(length, batch, heads, 12, generator=generator).to(dtype) for _ in range(2))
    result = max_logits(query, key, 0.3, logits_at_once)
    assert result.dtype is torch.float32
    np.testing.assert_allclose(result, slow_maxima(query.float(), key.float(), 0.3), rtol=1e-6)


def test_attention_records_only_the_requested_training_passes():
    attention = CausalAttention(softmax_scale=0.5)
    inputs = [[torch.randn(6, 2, 3, size) for size in (4, 4, 8)] for _ in range(3)]
    expected = [slow_maxima(query, key, 0.5) for query, key, _ in inputs]

    def record_maxima(passes):
        attention.record(passes)
        for query, key, value in inputs:
            attention(query, key, value, None)
        return attention.max_logits.numpy()

    for passes in (1, 2, 3):
        np.testing.assert_allclose(record_maxima(passes), np.max(expected[:passes], 0), rtol=1e-6)
    assert not attention.state_dict()
    with torch.no_grad():
        assert record_maxima(3) == -math.inf
    attention.eval()
    assert record_maxima(3) == -math.inf


def test_only_finite_logits_above_the_threshold_shrink():
    factors = logit_factors(torch.tensor([[-9.0, 1.0, 2.0], [4.0, 8.0, math.inf]]), 2.0)
    assert factors.tolist() == [[1, 1, 1], [0.5, 0.25, 1]]


def record_inputs(model_chunks, what):
    """Return a list that gets (layer, `what` of the core attention's inputs) in every forward pass."""
    from moonlight.train.forward_backward import find_attentions

    records = []
    for attention in find_attentions(model_chunks):
        attention.register_forward_pre_hook(
            lambda module, args: records.append((module.layer_number, what(module, args)))
        )
    return records


def train_and_record(config, steps=1, recording=True):
    """Return masters and results of the first steps, and the last float64 maxima [micro_batches, layers, heads]."""
    from moonlight.train.forward_backward import find_attentions

    model_chunks, optimizer = build(config)
    slow = record_inputs(
        model_chunks, lambda module, args: slow_maxima(args[0].detach(), args[1].detach(), module.softmax_scale)
    )
    if not recording:
        for attention in find_attentions(model_chunks):
            attention.record = lambda passes: None
    results = []
    for step in range(1, steps + 1):
        slow.clear()
        result = one_step(model_chunks, optimizer, config, step)
        results.append(dataclasses.asdict(result) | {"max_logit": result.max_logit})
    optimizer.data_parallel.finish_param_sync()
    layers = sorted({layer for layer, _ in slow})
    maxima = np.stack([[maxima for index, maxima in slow if index == layer] for layer in layers], axis=1)
    return {"masters": flatten(optimizer.master_state_dict()), "results": results, "maxima": maxima}


def one_process(pool, config, *args):
    (answer,) = pool.run(1, train_and_record, config, *args)
    return answer | {"masters": assemble([answer["masters"]])}


def median_threshold(maxima):
    """Return a threshold that half of the heads exceed."""
    largest = np.sort(maxima.max(0).flatten())
    middle = len(largest) // 2
    assert largest[middle] > 1.001 * largest[middle - 1]
    return float(largest[middle - 1 : middle + 1].mean())


def reference_clip(masters, maxima, threshold, model_config):
    """Apply MuonClip to full float64 tensors by loops over layers and heads; `maxima` is [layers, heads]."""
    masters = {key: value.astype(np.float64) for key, value in masters.items()}
    nope, rope = model_config.qk_nope_head_dim, model_config.qk_rope_head_dim
    value = model_config.v_head_dim
    query = "linear_q_up_proj" if model_config.q_lora_rank else "linear_q_proj"
    for layer, heads in enumerate(maxima):
        queries = masters[f"decoder.layers.{layer}.self_attention.{query}.weight"]
        keys = masters[f"decoder.layers.{layer}.self_attention.linear_kv_up_proj.weight"]
        for head, largest in enumerate(heads):
            if largest > threshold:
                first = head * (nope + rope)
                queries[first : first + nope] *= math.sqrt(threshold / largest)
                queries[first + nope : first + nope + rope] *= threshold / largest
                first = head * (nope + value)
                keys[first : first + nope] *= math.sqrt(threshold / largest)
    return masters


def largest_error(masters, reference):
    assert masters.keys() == reference.keys()
    return max(
        float(np.linalg.norm(value - reference[key]) / max(np.linalg.norm(reference[key]), 1e-12))
        for key, value in masters.items()
    )


VARIANTS = {
    "direct": {},
    "q_lora": {"q_lora_rank": 12},
    "bfloat16": {"dtype": "bfloat16"},
    "split": {"dtype": "bfloat16", "optimizer": {"master_weights": "split"}},
    "per_head": {"optimizer": {"matrices": "per_head"}},
    "adamw": {"optimizer": {"name": "adamw"}},
}


@pytest.mark.parametrize("variant", quick(VARIANTS, "q_lora", "split", "adamw"))
def test_clipped_step_is_the_plain_step_then_the_reference_clip(pool, variant):
    options = VARIANTS[variant]
    off = one_process(pool, wide_recipe(**options))
    maxima = off["maxima"].max(0)
    threshold = median_threshold(off["maxima"])
    on = one_process(pool, wide_recipe(qk_clip=threshold, **options))
    assert on["results"][0]["clipped_heads"] == maxima.size // 2 == (maxima > threshold).sum()
    assert on["results"][0]["max_logit"] == pytest.approx(maxima.max(), rel=1e-6)
    assert on["results"][0]["max_logits"] == pytest.approx(maxima.max(-1), rel=1e-6)
    expected = reference_clip(off["masters"], maxima, threshold, wide_recipe(**options).model)
    assert largest_error(on["masters"], off["masters"]) > 0.01
    assert largest_error(on["masters"], expected) < 1e-6
    for key, value in off["masters"].items():
        untouched = (expected[key] == value).reshape(len(value), -1).all(-1) if value.size else []
        assert (on["masters"][key][untouched] == value[untouched]).all(), key


def logits_before_and_after_step(config):
    """Return maxima [layers, heads] in a step, and with the same inputs to each layer's attention after it."""
    from moonlight.train.forward_backward import find_attentions

    model_chunks, optimizer = build(config)
    inputs = []
    for module in [module for model in model_chunks for module in model.modules() if hasattr(module, "core_attention")]:
        module.register_forward_pre_hook(
            lambda module, args, kwargs: inputs.append((module, args, kwargs)), with_kwargs=True
        )
    one_step(model_chunks, optimizer, config, 1)
    before = np.stack([attention.max_logits.numpy() for attention in find_attentions(model_chunks)])
    for attention in find_attentions(model_chunks):
        attention.record(len(inputs))
    for module, args, kwargs in list(inputs):
        module(*(arg.detach() if torch.is_tensor(arg) else arg for arg in args), **kwargs)
    return before, np.stack([attention.max_logits.numpy() for attention in find_attentions(model_chunks)])


@pytest.mark.parametrize("q_lora_rank", [None, 12])
def test_logits_of_the_same_inputs_end_at_the_threshold(pool, q_lora_rank):
    threshold = median_threshold(one_process(pool, wide_recipe(q_lora_rank=q_lora_rank))["maxima"])
    config = replace(wide_recipe(qk_clip=threshold, q_lora_rank=q_lora_rank), schedule=ScheduleConfig(lr=1e-30))
    ((before, after),) = pool.run(1, logits_before_and_after_step, config)
    clipped = before > threshold
    assert clipped.any() and not clipped.all()
    np.testing.assert_allclose(after[clipped], threshold, rtol=1e-4)
    np.testing.assert_array_equal(after[~clipped], before[~clipped])


@pytest.fixture(scope="module")
def references(pool):
    """Threshold, and two clipped steps of one process, by variant."""
    by_variant = {}
    for name in ("direct", "per_head", "adamw"):
        threshold = median_threshold(one_process(pool, wide_recipe(**VARIANTS[name]))["maxima"])
        by_variant[name] = threshold, one_process(pool, wide_recipe(qk_clip=threshold, **VARIANTS[name]), 2)
    return by_variant


LAYOUT_CASES = [(layout, "direct") for layout in ("DP2", "TP2", "PP2", "PP2-interleaved", "EP2xTP2", "EP2xTP2-4")]


@pytest.mark.parametrize(
    ("layout", "variant"),
    quick(
        [*LAYOUT_CASES, ("DP2", "per_head"), ("DP2", "adamw")],
        ("DP2", "per_head"),
        ("TP2", "direct"),
        ("PP2-interleaved", "direct"),
        ("EP2xTP2-4", "direct"),
    ),
)
def test_layouts_clip_like_one_process(pool, references, layout, variant):
    threshold, reference = references[variant]
    config = wide_recipe(layout, qk_clip=threshold, **VARIANTS[variant])
    answers = pool.run(LAYOUTS[layout][0], train_and_record, config, 2)
    for answer in answers:
        for result, expected in zip(answer["results"], reference["results"], strict=True):
            assert result["clipped_heads"] == expected["clipped_heads"] > 0
            assert result["max_logit"] == pytest.approx(expected["max_logit"], rel=1e-5)
    assert largest_error(assemble([answer["masters"] for answer in answers]), reference["masters"]) < 1e-5


def test_without_clipping_the_first_micro_batch_is_recorded_and_weights_do_not_change(pool):
    off = one_process(pool, wide_recipe())
    assert off["results"][0]["max_logit"] == pytest.approx(off["maxima"][0].max(), rel=1e-6)
    assert off["results"][0]["clipped_heads"] == 0
    assert off["maxima"].max() != off["maxima"][0].max()
    unrecorded = one_process(pool, wide_recipe(), 1, False)
    assert unrecorded["results"][0]["max_logit"] == -math.inf
    for key, value in off["masters"].items():
        assert value.tobytes() == unrecorded["masters"][key].tobytes(), key


@pytest.mark.parametrize("layout", quick(["DP2", "TP2", "PP2", "EP2xTP2"], "PP2", "EP2xTP2"))
def test_without_clipping_every_layout_records_the_same(pool, layout):
    """With one micro-batch per rank the records cover the full batch, so layouts must agree."""
    processes, parallel = LAYOUTS[layout]
    micro_batch_size = 8 // parallel.data_parallel_size(processes)
    (reference,) = pool.run(1, train_and_record, wide_recipe(micro_batch_size=8))
    for answer in pool.run(processes, train_and_record, wide_recipe(layout, micro_batch_size=micro_batch_size)):
        assert answer["results"][0]["max_logit"] == pytest.approx(reference["results"][0]["max_logit"], rel=1e-5)


def steps_with_nan(config):
    """Run two steps; in the first, rank 1 has a query weight that is NaN."""
    import torch.distributed as dist

    model_chunks, optimizer = build(config)
    before = flatten(optimizer.master_state_dict())
    weight = model_chunks[0].decoder.layers[0].self_attention.linear_q_proj.weight.data
    original = weight.clone()
    if dist.get_rank() == 1:
        weight[0, 0] = math.nan
    first = one_step(model_chunks, optimizer, config, 1)
    weight.copy_(original)
    after = flatten(optimizer.master_state_dict())
    second = one_step(model_chunks, optimizer, config, 1)
    return before, after, first, second


def test_a_skipped_step_clips_nothing_and_keeps_no_records(pool):
    answers = pool.run(2, steps_with_nan, wide_recipe("DP2", qk_clip=1.0))
    (expected,) = pool.run(1, train_and_record, wide_recipe(qk_clip=1.0))
    for _, _, first, second in answers:
        assert first.skipped and first.max_logit == math.inf and first.clipped_heads == 0
        assert not second.skipped
        assert second.max_logit == pytest.approx(expected["results"][0]["max_logit"], rel=1e-5)
        assert second.clipped_heads == expected["results"][0]["clipped_heads"] == 16
    before, after = (assemble([answer[index] for answer in answers]) for index in (0, 1))
    for key, value in before.items():
        assert value.tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize("qk_clip", [0.0, 1e-3])
def test_metrics_report_the_logits(pool, data_folder, tokenizer_folder, tmp_path, qk_clip):
    config = make_run(tmp_path, data_folder, tokenizer_folder, train_steps=2)
    config = replace(config, optimizer=replace(config.optimizer, qk_clip=qk_clip))
    pool.run(1, train_run, config)
    first, second = read_metrics(tmp_path / "1")
    # Without clipping only monitored steps record them, and the second step is not monitored.
    assert first["attention/max_logit"] > 1e-3 and ("attention/max_logit" in second) == (qk_clip > 0)
    assert first.get("attention/clipped_heads") == (16 if qk_clip else None)
    assert ("attention/clipped_heads" in second) == (qk_clip > 0)
