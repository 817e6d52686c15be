"""The planned activations against what autograd keeps of a real forward pass."""

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


def run_of(parallel, case):
    """A model of widths that all differ."""
    changes = CASES[case]
    run = recipe(parallel, **changes.get("train", {}))
    model = {"num_hidden_layers": 3, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 12, "vocab_size": 192}
    model["moe_intermediate_size"] = 32  # torch wants rows of experts in multiples of 16 bytes, also of half an expert
    return replace(
        run,
        model=replace(run.model, **model | changes.get("model", {})),
        data=replace(run.data, **changes.get("data", {})),
    )


def kept(run):
    """Bytes of distinct storages that autograd keeps after one forward pass, by layer (3 is the head), and the pairs
    of tokens and experts that came to each layer's experts."""
    from moonlight.train.forward_backward import find_routers, release_autograd_graph

    models, optimizer = build(run)
    (model,) = models
    batch = local_batches(run, 0)[0]
    for router in find_routers(models):
        router.aux_loss_weight = 1e-3
    given = [batch.tokens, batch.labels, batch.loss_mask, *([] if batch.document_ids is None else [batch.document_ids])]
    skip = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *given]}
    seen, pairs = {}, []
    layer = 0

    def enter(number):
        def hook(*_):
            nonlocal layer
            layer = number

        return hook

    for number, module in enumerate([*model.decoder.layers, model.decoder.final_layernorm]):
        module.register_forward_pre_hook(enter(number))
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
    # Some are free again by now, until their backward pass makes them again.
    found = [sum(storage.nbytes() for layer, storage in seen.values() if layer == number) for number in range(4)]
    with optimizer.data_parallel.no_sync():
        loss.backward()  # or the graph, whose hooks name the model, keeps every group and its threads
    release_autograd_graph([model])
    return found, pairs


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
def test_what_autograd_keeps(pool, layout, case):
    world_size, parallel = LAYOUTS[layout]
    run = run_of(parallel, case)
    # The first pass through a layer that is made again has no graph to keep the angles, which are kept anyhow.
    angles = 0 if "layer" in run.train.recompute_modules else angles_bytes(run, token_counts(run))
    for sizes, pairs in pool.run(world_size, kept, run):
        for number in range(3):
            tokens = token_counts(run, pairs=pairs[number - 1] if number else 0)
            planned = list(layer_activations(run, tokens, with_experts=number > 0, on_cpu=True))
            total = sum(saved.bytes for saved in planned) + (angles if number == 0 else 0)
            # The first layer has the embedding, which keeps 9 bytes a token under tensor parallelism.
            embedding = 9 * tokens.total if parallel.tensor_parallel_size > 1 and number == 0 else 0
            assert total + embedding == sizes[number], (number, planned)
        planned = sum(saved.bytes for saved in head_activations(run, token_counts(run)))
        assert planned == sizes[3]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_layers_have_one_mask_of_documents(dtype):
    """A GPU's attention, of three layers and of two micro-batches, with torch's flash kernel for a CPU."""
    run = recipe(dtype=dtype)
    run = replace(run, data=replace(run.data, mask_documents=True))
    tokens = token_counts(run)
    shape = tokens.sequence_length, tokens.total // tokens.sequence_length
    # Three heads, so that nothing but the mask has its size.
    query = torch.ones(*shape, 3, 16, dtype=getattr(torch, dtype), requires_grad=True)
    sdpa.attention(query, query, query, 0.25, torch.zeros(shape[::-1]))  # the kernel is chosen
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
        masks = [size for _, size in sizes.values() if size == mask_bytes(run, tokens)]
        assert len(masks) == micro_batches


@pytest.mark.parametrize(("modules", "masks"), (((), 2), (("mlp_act",), 2), (("layer",), 1)))
def test_a_stage_has_a_mask_for_every_pass_in_flight(modules, masks):
    """Whatever the number of its layers; the third of four stages is two passes ahead."""
    run = run_of(ParallelConfig(pipeline_parallel_size=4), "mask of documents")
    run = replace(run, train=replace(run.train, recompute_modules=modules))
    plain = replace(run, data=replace(run.data, mask_documents=False))
    for on_cpu in (False, True):
        for layers in (4, 8):
            with_mask, without = (
                stage_activations(
                    replace(each, model=replace(each.model, num_hidden_layers=layers)), 2, 8, on_cpu=on_cpu
                )
                for each in (run, plain)
            )
            assert with_mask[1] == without[1] == 2
            assert with_mask[0] - without[0] == (0 if on_cpu else masks * 64 * 32 * 4)


def peak_kept(run):
    """Most bytes that autograd keeps at once on this rank, over a whole forward and backward pass."""
    from moonlight.train.forward_backward import forward_backward

    models, optimizer = build(run)
    batches = local_batches(run, 0)
    optimizer.data_parallel.zero_grad_buffer()
    skip = {p.untyped_storage().data_ptr() for model in models for p in model.parameters()}
    skip |= {t.untyped_storage().data_ptr() for batch in batches for t in (batch.tokens, batch.labels, batch.loss_mask)}
    live, peak, known = 0, 0, weakref.WeakSet()

    def drop(size):
        nonlocal live
        live -= size

    def pack(tensor):
        nonlocal live, peak
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in skip and storage not in known:
            known.add(storage)
            weakref.finalize(storage, drop, storage.nbytes())
            live += storage.nbytes()
            peak = max(peak, live)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward_backward(models, run, batches)
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
def test_what_a_whole_pass_keeps(pool, layout, modules):
    """All experts are chosen, so every micro-batch keeps the same; the schedule decides how many are there."""
    world_size, parallel = LAYOUTS.get(layout) or (4, ParallelConfig(pipeline_parallel_size=4))
    run = run_of(parallel, "all experts chosen, wide")
    run = replace(
        run,
        model=replace(run.model, num_hidden_layers=4),
        train=replace(run.train, global_batch_size=16, micro_batch_size=2, recompute_modules=modules),
    )
    count = 16 // 2 // parallel.data_parallel_size(world_size)
    for rank, peak in enumerate(pool.run(world_size, peak_kept, run)):
        stage = rank * parallel.pipeline_parallel_size // world_size
        planned, in_flight = stage_activations(run, stage, count, on_cpu=True)
        print(layout, rank, in_flight, peak, planned / peak)
        assert planned == pytest.approx(peak, rel=0.03)


@pytest.mark.parametrize(("case", "element", "gradient"), [("float32", 4, 0), ("bfloat16", 2, 4 * 96 * 32)])
def test_while_the_loss_is_made(case, element, gradient):
    """Half a vocabulary of 192: logits of all 64 tokens, and of no more than 2^24 elements."""
    run = run_of(LAYOUTS["TP2"][1], case)
    assert loss_workspace(run, token_counts(run)) == 64 * 96 * element + gradient
    long = replace(run, train=replace(run.train, micro_batch_size=2**13, global_batch_size=2**13))
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
