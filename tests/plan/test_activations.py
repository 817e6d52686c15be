"""Planned activations equal what autograd saves in a real forward pass."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch

from moonlight.config.parallel import ParallelConfig
from moonlight.model import sdpa
from moonlight.plan.activations import (
    angles_bytes,
    head_activations,
    layer_activations,
    loss_workspace,
    mask_bytes,
    micro_batches_in_flight,
    stage_activations,
    token_counts,
)
from tests.support.layouts import LAYOUTS, build, local_batches, recipe
from tests.support.suites import quick

CASES = {
    "float32": {},
    "bfloat16": {"train": {"dtype": "bfloat16"}},
    "bfloat16, float32 residual": {"train": {"dtype": "bfloat16", "fp32_residual_connection": True}},
    "q_lora": {"model": {"q_lora_rank": 24}},
    "bfloat16, q_lora": {"model": {"q_lora_rank": 24}, "train": {"dtype": "bfloat16"}},
    "all experts chosen, wide": {"model": {"num_experts_per_tok": 8, "moe_intermediate_size": 96}},
    "mask of documents": {"data": {"mask_documents": True}},
    "float32, made again": {"train": {"recompute_modules": ("layernorm", "mlp_act", "mla_up_proj")}},
    "bfloat16, mla_up_proj": {
        "model": {"q_lora_rank": 24},
        "train": {"dtype": "bfloat16", "recompute_modules": ("mla_up_proj",)},
    },
    "bfloat16, layernorm": {"train": {"dtype": "bfloat16", "recompute_modules": ("layernorm",)}},
    "bfloat16, mlp_act": {"train": {"dtype": "bfloat16", "recompute_modules": ("mlp_act",)}},
    "layer": {"train": {"recompute_modules": ("layer",)}},
    "layer, bfloat16, float32 residual": {
        "train": {"dtype": "bfloat16", "fp32_residual_connection": True, "recompute_modules": ("layer",)}
    },
    "positions of documents": {"data": {"mask_documents": True, "reset_positions": True}},
}


def make_config(parallel, case):
    """Return a config whose model widths all differ."""
    changes = CASES[case]
    config = recipe(parallel, **changes.get("train", {}))
    model = {"num_hidden_layers": 3, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "vocab_size": 192}
    model["moe_intermediate_size"] = 32  # torch requires expert rows in multiples of 16 bytes, even of half an expert
    return replace(
        config,
        model=replace(config.model, **model | changes.get("model", {})),
        data=replace(config.data, **changes.get("data", {})),
    )


def saved_bytes(config):
    """Return the bytes that autograd saves in one forward pass by layer, and the token-expert pairs of each layer.

    Each storage counts once. Layer 3 is the head.
    """
    from moonlight.train.forward_backward import find_routers, release_autograd_graph

    model_chunks, optimizer = build(config)
    (model,) = model_chunks
    batch = local_batches(config, 0)[0]
    for router in find_routers(model_chunks):
        router.aux_loss_weight = 1e-3
    inputs = [
        batch.tokens,
        batch.labels,
        batch.loss_mask,
        *([] if batch.document_ids is None else [batch.document_ids]),
    ]
    skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *inputs]}
    seen, pairs = {}, []
    layer = 0

    def enter(index):
        def hook(*_):
            nonlocal layer
            layer = index

        return hook

    for index, module in enumerate([*model.decoder.layers, model.decoder.final_layernorm]):
        module.register_forward_pre_hook(enter(index))
    for module in model.decoder.layers[1:]:
        module.mlp.experts.register_forward_pre_hook(lambda _, args: pairs.append(args[2].numel()))

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip:
            seen.setdefault(storage._cdata, (layer, storage))
        return tensor

    positions = torch.arange(batch.tokens.shape[1]).expand_as(batch.tokens)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(batch.tokens, positions, batch.document_ids, labels=batch.labels, loss_mask=batch.loss_mask)
    # Some storages are already freed, until the backward pass recomputes them.
    layer_bytes = [sum(storage.nbytes() for layer, storage in seen.values() if layer == index) for index in range(4)]
    with optimizer.data_parallel.no_sync():
        loss.backward()  # otherwise the graph's hooks keep the model, its process groups and their threads alive
    release_autograd_graph([model])
    return layer_bytes, pairs


@pytest.mark.parametrize(
    ("case", "layout"),
    quick(
        itertools.product(CASES, ("1", "TP2", "TP2-ETP2", "EP2", "EP2xTP2-4", "EP2xTP2-ETP2-4")),
        *((case, "1") for case in CASES),
        ("bfloat16, q_lora", "TP2"),
        ("float32", "EP2"),
        ("float32, made again", "EP2xTP2-ETP2-4"),
        ("layer, bfloat16, float32 residual", "EP2xTP2-ETP2-4"),
        ("mask of documents", "EP2xTP2-ETP2-4"),
    ),
)
def test_saved_bytes_of_each_layer(pool, layout, case):
    world_size, parallel = LAYOUTS[layout]
    config = make_config(parallel, case)
    # The first pass through a recomputed layer has no graph that saves the angles; they stay alive anyway.
    angles = 0 if "layer" in config.train.recompute_modules else angles_bytes(config, token_counts(config))
    for sizes, pairs in pool.run(world_size, saved_bytes, config):
        for index in range(3):
            tokens = token_counts(config, pairs=pairs[index - 1] if index else 0)
            planned = list(layer_activations(config, tokens, with_experts=index > 0, on_cpu=True))
            total = sum(saved.bytes for saved in planned) + (angles if index == 0 else 0)
            # The first layer has the embedding, which saves 9 bytes per token under tensor parallelism.
            embedding = 9 * tokens.total if parallel.tensor_parallel_size > 1 and index == 0 else 0
            assert total + embedding == sizes[index], (index, planned)
        planned = sum(saved.bytes for saved in head_activations(config, token_counts(config)))
        assert planned == sizes[3]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_layers_share_one_document_mask(dtype):
    """Three attention layers save one mask per micro-batch, with the GPU's code on torch's flash kernel for CPU."""
    config = recipe(dtype=dtype)
    config = replace(config, data=replace(config.data, mask_documents=True))
    tokens = token_counts(config)
    shape = tokens.sequence_length, tokens.total // tokens.sequence_length
    # Three heads, so that nothing but the mask has its size.
    query = torch.ones(*shape, 3, 16, dtype=getattr(torch, dtype), requires_grad=True)
    sdpa.attention(query, query, query, 0.25, torch.zeros(shape[::-1]))  # the first call selects the kernel
    sizes = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = storage, storage.nbytes()
        return tensor

    for micro_batches in (1, 2):
        documents = torch.zeros(shape[::-1], dtype=torch.int64)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            for _ in range(3):
                sdpa.attention(query, query, query, 0.25, documents)
        masks = [size for _, size in sizes.values() if size == mask_bytes(config, tokens)]
        assert len(masks) == micro_batches


@pytest.mark.parametrize(("modules", "masks"), (((), 2), (("mlp_act",), 2), (("layer",), 1)))
def test_a_stage_has_one_mask_per_micro_batch_in_flight(modules, masks):
    """The mask bytes do not depend on the number of layers. The third of four stages is two micro-batches ahead."""
    config = make_config(ParallelConfig(pipeline_parallel_size=4), "mask of documents")
    config = replace(config, train=replace(config.train, recompute_modules=modules))
    plain = replace(config, data=replace(config.data, mask_documents=False))
    for on_cpu in (False, True):
        for layers in (4, 8):
            with_mask, without = (
                stage_activations(
                    replace(case, model=replace(case.model, num_hidden_layers=layers)), 2, 8, on_cpu=on_cpu
                )
                for case in (config, plain)
            )
            assert with_mask[1] == without[1] == 2
            assert with_mask[0] - without[0] == (0 if on_cpu else masks * 64 * 32 * 4)


def peak_saved_bytes(config):
    """Return the peak of the bytes that autograd saves on this rank in a full forward and backward pass."""
    from moonlight.train.forward_backward import forward_backward

    model_chunks, optimizer = build(config)
    batches = local_batches(config, 0)
    optimizer.data_parallel.zero_grad_buffer()
    skip = {p.untyped_storage().data_ptr() for model in model_chunks for p in model.parameters()}
    skip |= {t.untyped_storage().data_ptr() for batch in batches for t in (batch.tokens, batch.labels, batch.loss_mask)}
    live, peak, seen = 0, 0, weakref.WeakSet()

    def drop(size):
        nonlocal live
        live -= size

    def pack(tensor):
        nonlocal live, peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip and storage not in seen:
            seen.add(storage)
            weakref.finalize(storage, drop, storage.nbytes())
            live += storage.nbytes()
            peak = max(peak, live)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_backward(model_chunks, config, batches)
    return peak


@pytest.mark.parametrize(
    ("modules", "layout"),
    quick(
        itertools.product(((), ("layer",)), ("1", "PP2", "PP4", "PP2-interleaved", "EP2xPP2")),
        ((), "1"),
        ((), "PP2-interleaved"),
        (("layer",), "PP4"),
        (("layer",), "EP2xPP2"),
    ),
)
def test_peak_saved_bytes_of_a_full_pass(pool, layout, modules):
    """The peak equals the plan. With all experts chosen, it depends only on the micro-batches in flight."""
    world_size, parallel = LAYOUTS.get(layout) or (4, ParallelConfig(pipeline_parallel_size=4))
    config = make_config(parallel, "all experts chosen, wide")
    config = replace(
        config,
        model=replace(config.model, num_hidden_layers=4),
        train=replace(config.train, global_batch_size=16, micro_batch_size=2, recompute_modules=modules),
    )
    count = 16 // 2 // parallel.data_parallel_size(world_size)
    for rank, peak in enumerate(pool.run(world_size, peak_saved_bytes, config)):
        stage = rank * parallel.pipeline_parallel_size // world_size
        planned, in_flight = stage_activations(config, stage, count, on_cpu=True)
        print(layout, rank, in_flight, peak, planned / peak)
        assert planned == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("case", "element", "gradient"), [("float32", 4, 0), ("bfloat16", 2, 4 * 96 * 32)])
def test_loss_workspace(case, element, gradient):
    """The workspace is the logits of all 64 tokens over half a vocabulary of 192, at most 2^24 elements."""
    config = make_config(LAYOUTS["TP2"][1], case)
    assert loss_workspace(config, token_counts(config)) == 64 * 96 * element + gradient
    long = replace(config, train=replace(config.train, micro_batch_size=2**13, global_batch_size=2**13))
    assert loss_workspace(long, token_counts(long)) == 2**24 // 96 * 96 * element + gradient


@pytest.mark.parametrize(
    ("stages", "virtual", "stage", "micro_batches", "expected"),
    [
        (1, 1, 0, 8, 1),
        (4, 1, 0, 8, 4),
        (4, 1, 3, 8, 1),
        (4, 1, 0, 2, 2),
        (2, 2, 0, 8, 5),
        (2, 2, 1, 8, 3),
        (4, 2, 0, 4, 8),
    ],
)
def test_micro_batches_in_flight(stages, virtual, stage, micro_batches, expected):
    assert micro_batches_in_flight(stages, virtual, stage, micro_batches) == expected
