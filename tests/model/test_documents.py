"""Documents of one sequence kept apart: against transformers on each alone, and every layout against one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moonlight.model.attention import max_logits
from tests.support.comparisons import check_gradients
from tests.support.hugging_face import fuse_experts
from tests.support.layouts import LAYOUTS, assemble, build, collect, first_gradients, recipe

EOS = 0


def apart(run, mask=True, reset=True):
    return replace(run, data=replace(run.data, mask_documents=mask, reset_positions=reset))


def packed(seed, sequences=3, length=48):
    """Sequences of documents of 1 to 20 tokens, each ended by EOS but the last."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 96, size=(sequences, length))
    for sequence in tokens:
        sequence[np.cumsum(generator.integers(1, 20, size=8)).clip(max=length - 1)] = EOS
    return torch.from_numpy(tokens)


def documents_of(sequence):
    """(start, stop) of each document, by walking."""
    start = 0
    for place, token in enumerate(sequence.tolist()):
        if token == EOS or place == len(sequence) - 1:
            yield start, place + 1
            start = place + 1


def test_numbers_and_positions_equal_a_walk():
    from moonlight.model.latent_attention import positions_in_documents
    from moonlight.train.forward_backward import compute_document_ids

    tokens = packed(1)
    tokens[0, :2] = EOS  # documents of one token
    documents = compute_document_ids(tokens, EOS)
    positions = positions_in_documents(documents)
    assert documents.dtype == torch.int32
    for row, sequence in enumerate(tokens):
        for number, (start, stop) in enumerate(documents_of(sequence)):
            assert (documents[row, start:stop] == number).all()
            assert (positions[row, start:stop] == torch.arange(stop - start)).all()


def forward(run, tokens):
    """Logits [batch, sequence, vocabulary] and the weights."""
    from moonlight.train.forward_backward import compute_document_ids

    (model,), _ = build(run)
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, compute_document_ids(tokens, EOS))
    return logits.numpy(), collect([model])


def test_packed_documents_have_the_logits_of_each_alone(pool):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config
    from moonlight.dist_checkpoint import hf_mapping

    run, tokens = apart(recipe()), packed(2)
    ((logits, weights),) = pool.run(1, forward, run, tokens)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(run.model))).float().eval()
    whole = assemble([weights])
    state = {
        part.name: torch.from_numpy(whole[row.key])[part.index]
        for row in hf_mapping.tensor_mappings(run.model)
        for part in row.hf_tensors
    }
    model.load_state_dict(fuse_experts(state, run.model))
    compared = 0
    for row, sequence in enumerate(tokens):
        for start, stop in documents_of(sequence):
            with torch.no_grad():
                expected = model(sequence[None, start:stop]).logits[0].numpy()
            assert np.abs(logits[row, start:stop] - expected).max() <= 1e-4
            compared += 1
    assert compared > 12
    ((plain, _),) = pool.run(1, forward, recipe(), tokens)
    assert np.abs(plain - logits).max() > 1e-2


@pytest.mark.parametrize(("mask", "reset"), [(True, False), (False, True)])
def test_each_option_acts_alone(pool, mask, reset):
    """The token before a document changes what the document sees of it, or not."""
    tokens = packed(3)
    other = tokens.clone()
    other[:, 0] = (tokens[:, 0] % 95) + 1
    first = [next(documents_of(sequence))[1] for sequence in tokens]
    run = apart(recipe(), mask, reset)
    ((one, _),), ((two, _),), ((plain, _),) = (
        pool.run(1, forward, *arguments) for arguments in ((run, tokens), (run, other), (recipe(), tokens))
    )
    for row, stop in enumerate(first):
        later = np.abs(one[row, stop:] - two[row, stop:]).max()
        assert later == 0 if mask else later > 1e-4
        # Nothing changes in the first document, something does in those after it.
        assert np.abs(one[row, :stop] - plain[row, :stop]).max() <= 1e-5
        assert np.abs(one[row, stop:] - plain[row, stop:]).max() > 1e-4


@pytest.fixture(scope="module")
def reference(pool):
    (answer,) = pool.run(1, first_gradients, apart(recipe()))
    return answer | {name: assemble([answer[name]]) for name in ("weights", "gradients")}


@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2", "PP2-interleaved", "EP2xTP2-4"])
def test_gradients_equal_one_process(pool, reference, layout):
    world_size, parallel = LAYOUTS[layout]
    check_gradients(pool.run(world_size, first_gradients, apart(recipe(parallel))), reference)


@pytest.mark.parametrize(("layout", "micro_batch_size"), [("1", 1), ("TP2", 4)])
def test_gradients_do_not_depend_on_the_micro_batch(pool, reference, layout, micro_batch_size):
    world_size, parallel = LAYOUTS[layout]
    run = apart(recipe(parallel, micro_batch_size=micro_batch_size))
    check_gradients(pool.run(world_size, first_gradients, run), reference)


def test_the_largest_logit_is_one_within_a_document():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(24, 2, 3, 8, generator=generator) for _ in range(2))
    documents = torch.tensor([[0] * 5 + [1] * 19, [0] * 24])
    expected = torch.full((3,), -np.inf)
    for batch in range(2):
        for row in range(24):
            for column in range(row + 1):
                if documents[batch, row] == documents[batch, column]:
                    pair = 0.3 * (query[row, batch] * key[column, batch]).sum(-1)
                    expected = torch.maximum(expected, pair)
    for at_once in (24 * 3 * 5, 2**25):
        found = max_logits(query, key, 0.3, at_once, documents)
        assert torch.allclose(found, expected, rtol=1e-6)
    assert (max_logits(query, key, 0.3) > expected).any()
