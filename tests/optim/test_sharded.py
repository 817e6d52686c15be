"""The sharded optimizer must equal one slow process with full matrices, on equal gradients, in every layout."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from moonlight.dist_checkpoint import hf_mapping
from tests.support.layouts import LAYOUTS, ParallelConfig, assemble, recipe
from tests.support.reference import slow_scale
from tests.support.suites import quick
from tests.support.synthetic import normal_gradient, updates, weights_after, zero_experts

STEPS = 20
A, B, C = 3.4445, -4.7750, 2.0315


def float32_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Orthogonalize one matrix in five steps (arXiv 2502.16982, eq. 1), with products and sums fused as in BLAS."""
    tall = matrix.shape[0] > matrix.shape[1]  # the smaller Gram matrix is on the right
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        gram = x.T @ x if tall else x @ x.T
        mixed = torch.addmm(gram, gram, gram, beta=B, alpha=C)
        x = torch.addmm(x, x, mixed, beta=A) if tall else torch.addmm(x, mixed, x, beta=A)
    return x


def bfloat16_newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """Run the plain loop that optimizers use on one matrix at a time: cast, normalize, iterate."""
    x = matrix.bfloat16()
    x = x.T if x.shape[0] > x.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = A * x + (B * gram + C * gram @ gram) @ x
    return (x.T if matrix.shape[0] > matrix.shape[1] else x).float()


def hugging_face_matrices(config) -> dict[str, list[tuple]]:
    """Return the index of every Muon matrix in its full tensor, one per matrix of a Hugging Face folder."""
    on_adamw = ("embedding.word_embeddings.weight", "output_layer.weight")
    return {
        mapping.key: [hf_tensor.index for hf_tensor in mapping.hf_tensors]
        for mapping in hf_mapping.tensor_mappings(config.model)
        if mapping.hf_tensors[0].init_kind == "matrix" and mapping.key not in on_adamw
    }


def head_matrices(config) -> dict[str, list[tuple]]:
    """Return these indices with query and key-value up-projections split by head and by nope, rope and value rows."""
    indices, model_config = hugging_face_matrices(config), config.model
    heights = {
        "linear_q_proj.weight": (model_config.qk_nope_head_dim, model_config.qk_rope_head_dim),
        "linear_q_up_proj.weight": (model_config.qk_nope_head_dim, model_config.qk_rope_head_dim),
        "linear_kv_up_proj.weight": (model_config.qk_nope_head_dim, model_config.v_head_dim),
    }
    for key in indices:
        if rows := heights.get(key.rpartition("self_attention.")[2]):
            ends = np.cumsum(rows * model_config.num_attention_heads)
            indices[key] = [(slice(end - height, end),) for end, height in zip(ends, rows * 99, strict=False)]
    return indices


def slow_updates(config, newton_schulz=float32_newton_schulz, indices=None, gradient=normal_gradient, steps=STEPS):
    """Yield the updates and gradient norm of each step, one full matrix at a time.

    Each update is momentum, Nesterov, orthogonalization, scale.
    """
    indices = indices or hugging_face_matrices(config)
    shapes = {
        mapping.key: mapping.shape
        for mapping in hf_mapping.tensor_mappings(config.model)
        if mapping.hf_tensors[0].init_kind != "bias"
    }
    momenta = {key: torch.zeros(shapes[key]) for key in indices}
    for step in range(1, steps + 1):
        gradients = {key: gradient(key, shape, step) for key, shape in shapes.items()}
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients.values()))
        scale = min(1.0, config.optimizer.clip_grad_norm / (norm + 1e-6))
        expected = {}
        for key, matrices in indices.items():
            clipped = gradients[key] * scale
            momenta[key] = 0.95 * momenta[key] + clipped
            direction = torch.add(clipped, momenta[key], alpha=0.95)
            expected[key] = np.full(shapes[key], np.nan)
            for index in matrices:
                expert = direction.dim() == 3  # stored as [in, out], and rounded in that order
                matrix = direction[index].T.contiguous() if expert else direction[index]
                orthogonal = newton_schulz(matrix).double().numpy()
                update = slow_scale(orthogonal, config.optimizer.rms_matching, config.model.hidden_size)
                expected[key][index] = update.T if expert else update
        yield expected, norm


def full_updates(answers) -> list[dict[str, np.ndarray]]:
    """Return what the layout subtracted in every step, as full tensors."""
    histories = [answer["history"] for answer in answers]
    return updates([assemble(list(weights)) for weights in zip(*histories, strict=True)])


def relative(value, reference):
    norm = np.linalg.norm(reference)
    return float(np.linalg.norm(value - reference) / norm) if norm else float(np.linalg.norm(value))


def check(answers, reference, config, indices=None, tolerance=1e-6):
    """Check every tensor's update in every step, the norms, and the number of Newton-Schulz runs."""
    errors = {}
    for layout_update, (expected, _) in zip(full_updates(answers), reference, strict=True):
        for key, update in expected.items():
            errors[key] = max(errors.get(key, 0.0), relative(layout_update[key], update))
    assert not {key: error for key, error in errors.items() if not error <= tolerance}
    for answer in answers:
        assert answer["norms"] == pytest.approx([norm for _, norm in reference], rel=1e-6)
    num_orthogonalized = sum(answer["matrices"] for answer in answers)
    assert num_orthogonalized == sum(map(len, (indices or hugging_face_matrices(config)).values()))


@pytest.fixture(scope="module")
def reference():
    """Reference updates of twenty steps, with gradients clipped about fourfold."""
    steps = list(slow_updates(recipe()))
    assert all(norm > 3 for _, norm in steps)
    return steps


@pytest.mark.parametrize(
    "layout", quick(LAYOUTS, "DP4", "TP2-ETP2", "PP2-interleaved", "EP2xTP2-ETP2-4", "EP2xTP2xPP2")
)
def test_updates_of_twenty_steps_equal_one_slow_process(pool, reference, layout):
    world_size, parallel = LAYOUTS[layout]
    check(pool.run(world_size, weights_after, recipe(parallel), STEPS), reference, recipe())


def wide(parallel=ParallelConfig(), **optimizer):  # noqa: B008
    """Return a config with a wide dense layer.

    At DP2 and DP4 its matrices exceed the mean elements per rank, so they are split by rows.
    """
    config = recipe(parallel)
    optimizer = {"newton_schulz_dtype": "float32"} | optimizer
    return replace(
        config,
        model=replace(config.model, intermediate_size=4096),
        optimizer=replace(config.optimizer, **optimizer),
        parallel=replace(parallel, bucket_size=20_000),
    )


@pytest.mark.parametrize(
    ("world_size", "parallel"),
    quick(
        [
            (4, ParallelConfig()),
            (4, ParallelConfig(tensor_parallel_size=2)),
            (4, ParallelConfig(pipeline_parallel_size=2)),
        ],
        (4, ParallelConfig(tensor_parallel_size=2)),
        (4, ParallelConfig(pipeline_parallel_size=2)),
    ),
)
def test_large_matrices_are_split_between_owners_and_orthogonalized_in_full(pool, world_size, parallel):
    answers = pool.run(world_size, weights_after, wide(parallel), 5)
    assert sum(answer["split"] for answer in answers) > 0
    check(answers, list(slow_updates(wide(), steps=5)), wide())


@pytest.mark.parametrize(
    ("q_lora_rank", "layout"),
    quick(itertools.product((None, 24), ("1", "TP2", "DP4", "EP2xTP2")), (None, "DP4"), (24, "TP2"), (24, "EP2xTP2")),
)
def test_per_head_matrices(pool, layout, q_lora_rank):
    world_size, parallel = LAYOUTS[layout]
    config = replace(
        recipe(parallel),
        model=replace(recipe().model, q_lora_rank=q_lora_rank),
        optimizer=replace(recipe().optimizer, matrices="per_head"),
    )
    indices = head_matrices(config)
    answers = pool.run(world_size, weights_after, config, 3)
    # Batches of these small matrices are summed in another order than single matrices.
    check(answers, list(slow_updates(config, indices=indices, steps=3)), config, indices, tolerance=2e-6)


@pytest.mark.parametrize(
    ("matching", "layout"),
    quick(
        itertools.product(("update_norm", "baseline"), ("1", "DP4", "TP2", "EP2xTP2-ETP2-4", "PP2", "EP2xDP2")),
        ("update_norm", "EP2xTP2-ETP2-4"),
        ("update_norm", "PP2"),
        ("baseline", "EP2xDP2"),
        ("baseline", "TP2"),
    ),
)
def test_each_rms_matching_uses_full_matrices(pool, layout, matching):
    """In any layout the RMS must be that of the full matrix, and the hidden size that of the full model."""
    world_size, parallel = LAYOUTS[layout]
    config = replace(recipe(parallel), optimizer=replace(recipe().optimizer, rms_matching=matching))
    check(pool.run(world_size, weights_after, config, 3), list(slow_updates(config, steps=3)), config)


@pytest.mark.parametrize(
    "parallel",
    quick([ParallelConfig(), ParallelConfig(tensor_parallel_size=2)], ParallelConfig(tensor_parallel_size=2)),
)
def test_the_rms_of_a_split_matrix_is_that_of_the_full_matrix(pool, parallel):
    config = wide(parallel, rms_matching="update_norm")
    answers = pool.run(4, weights_after, config, 3)
    assert sum(answer["split"] for answer in answers) > 0
    check(answers, list(slow_updates(wide(rms_matching="update_norm"), steps=3)), config)


def update_errors(layout_updates, reference) -> list[float]:
    """Return the relative errors of every tensor's update in every step."""
    return [
        relative(layout_update[key], update)
        for layout_update, (expected, _) in zip(layout_updates, reference, strict=True)
        for key, update in expected.items()
    ]


@pytest.fixture(scope="module")
def plain_errors(reference):
    """Errors of the plain bfloat16 loop."""
    return update_errors((plain for plain, _ in slow_updates(recipe(), bfloat16_newton_schulz)), reference)


@pytest.mark.parametrize(
    "layout", quick(["1", "DP4", "TP2", "EP2xTP2-ETP2-4", "PP2", "EP2xDP2"], "DP4", "TP2", "PP2", "EP2xTP2-ETP2-4")
)
def test_bfloat16_is_no_worse_than_the_plain_loop(pool, reference, plain_errors, layout):
    world_size, parallel = LAYOUTS[layout]
    config = replace(recipe(parallel), optimizer=replace(recipe().optimizer, newton_schulz_dtype="bfloat16"))
    errors = update_errors(full_updates(pool.run(world_size, weights_after, config, STEPS)), reference)
    assert np.mean(errors) <= np.mean(plain_errors)
    assert np.max(errors) <= np.max(plain_errors)


@pytest.mark.parametrize(
    "layout",
    quick(
        ["1", "DP2", "DP4", "TP2", "PP2-interleaved", "EP2xTP2-4", "EP2xDP2"],
        "DP4",
        "TP2",
        "PP2-interleaved",
        "EP2xTP2-4",
    ),
)
def test_adamw_for_every_parameter_equals_torch(pool, layout):
    world_size, parallel = LAYOUTS[layout]
    config = replace(recipe(parallel), optimizer=replace(recipe().optimizer, name="adamw"))
    answers = pool.run(world_size, weights_after, config, STEPS)
    weights = [assemble(list(chunks)) for chunks in zip(*(answer["history"] for answer in answers), strict=True)]
    first = {key: torch.from_numpy(value).double() for key, value in weights[0].items() if "bias" not in key}
    parameters = {key: torch.nn.Parameter(value.clone()) for key, value in first.items()}
    adamw = torch.optim.AdamW(parameters.values(), lr=1.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, STEPS + 1):
        scale = 1.0 / (answers[0]["norms"][step - 1] + 1e-6)
        for key, parameter in parameters.items():
            parameter.grad = normal_gradient(key, tuple(parameter.shape), step).double() * scale
        adamw.step()
        for key, parameter in parameters.items():
            assert relative(weights[step][key], parameter.detach().numpy()) <= 1e-6, (step, key)
    assert sum(answer["matrices"] for answer in answers) == 0


def test_an_expert_without_tokens_only_decays(pool):
    """With zero gradient and zero momentum the update must be exactly the weight decay."""
    for layout in ("1", "EP2xDP2"):
        world_size, parallel = LAYOUTS[layout]
        answers = pool.run(world_size, weights_after, recipe(parallel), 2, zero_experts)
        before, once, twice = (
            assemble(list(chunks)) for chunks in zip(*(answer["history"] for answer in answers), strict=True)
        )
        for key in before:
            if ".experts." in key:
                decayed = torch.from_numpy(before[key]) * 0.9
                np.testing.assert_array_equal(once[key], decayed)
                np.testing.assert_array_equal(twice[key], decayed * 0.9)
            assert np.isfinite(twice[key]).all()
