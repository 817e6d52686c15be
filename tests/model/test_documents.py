"""Documents packed in one sequence must equal transformers on each alone; every layout must equal one process."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from moonlight.model.attention import max_logits
from tests.support.comparisons import check_gradients
from tests.support.hugging_face import fuse_experts
from tests.support.layouts import LAYOUTS, assemble, build, collect, first_gradients, recipe

EOS = 0


def separated(config, mask=True, reset=True):
    return replace(config, data=replace(config.data, mask_documents=mask, reset_positions=reset))


def packed(seed, sequences=3, length=48):
    """Return sequences of documents of 1 to 20 tokens; all but the last end with EOS."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(1, 96, size=(sequences, length))
    for sequence in tokens:
        sequence[np.cumsum(generator.integers(1, 20, size=8)).clip(max=length - 1)] = EOS
    return torch.from_numpy(tokens)


def document_spans(sequence):
    """Yield (start, stop) of each document, by a scan."""
    start = 0
    for index, token in enumerate(sequence.tolist()):
        if token == EOS or index == len(sequence) - 1:
            yield start, index + 1
            start = index + 1


def test_document_ids_and_positions_equal_a_scan():
    from moonlight.model.latent_attention import positions_in_documents
    from moonlight.train.forward_backward import compute_document_ids

    tokens = packed(1)
    tokens[0, :2] = EOS  # documents of one token
    documents = compute_document_ids(tokens, EOS)
    positions = positions_in_documents(documents)
    assert documents.dtype == torch.int32
    for row, sequence in enumerate(tokens):
        for index, (start, stop) in enumerate(document_spans(sequence)):
            assert (documents[row, start:stop] == index).all()
            assert (positions[row, start:stop] == torch.arange(stop - start)).all()


def forward(config, tokens):
    """Return logits [batch, sequence, vocabulary] and the weights."""
    from moonlight.train.forward_backward import compute_document_ids

    (model,), _ = build(config)
    model.eval()
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    with torch.no_grad():
        logits = model(tokens, positions, compute_document_ids(tokens, EOS))
    return logits.numpy(), collect([model])


def test_packed_documents_have_the_logits_of_each_alone(pool):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config
    from moonlight.dist_checkpoint import hf_mapping

    config, tokens = separated(recipe()), packed(2)
    ((logits, weights),) = pool.run(1, forward, config, tokens)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**hf_config(config.model))).float().eval()
    full = assemble([weights])
    state = {
        hf_tensor.name: torch.from_numpy(full[mapping.key])[hf_tensor.index]
        for mapping in hf_mapping.tensor_mappings(config.model)
        for hf_tensor in mapping.hf_tensors
    }
    model.load_state_dict(fuse_experts(state, config.model))
    compared = 0
    for row, sequence in enumerate(tokens):
        for start, stop in document_spans(sequence):
            with torch.no_grad():
                expected = model(sequence[None, start:stop]).logits[0].numpy()
            assert np.abs(logits[row, start:stop] - expected).max() <= 1e-4
            compared += 1
    assert compared > 12
    ((plain, _),) = pool.run(1, forward, recipe(), tokens)
    assert np.abs(plain - logits).max() > 1e-2


@pytest.mark.parametrize(("mask", "reset"), [(True, False), (False, True)])
def test_each_option_acts_alone(pool, mask, reset):
    """A changed first token must change the logits of later documents without the mask, and not with it.

    Compared with no option, each option must change only the logits after the first document.
    """
    tokens = packed(3)
    other = tokens.clone()
    other[:, 0] = (tokens[:, 0] % 95) + 1
    first = [next(document_spans(sequence))[1] for sequence in tokens]
    config = separated(recipe(), mask, reset)
    ((one, _),), ((two, _),), ((plain, _),) = (
        pool.run(1, forward, *arguments) for arguments in ((config, tokens), (config, other), (recipe(), tokens))
    )
    for row, stop in enumerate(first):
        later = np.abs(one[row, stop:] - two[row, stop:]).max()
        assert later == 0 if mask else later > 1e-4
        # The logits of the first document are unchanged; those after it change.
        assert np.abs(one[row, :stop] - plain[row, :stop]).max() <= 1e-5
        assert np.abs(one[row, stop:] - plain[row, stop:]).max() > 1e-4


@pytest.fixture(scope="module")
def reference(pool):
    (answer,) = pool.run(1, first_gradients, separated(recipe()))
    return answer | {name: assemble([answer[name]]) for name in ("weights", "gradients")}


@pytest.mark.parametrize("layout", ["DP2", "TP2", "PP2", "PP2-interleaved", "EP2xTP2-4"])
def test_gradients_equal_one_process(pool, reference, layout):
    world_size, parallel = LAYOUTS[layout]
    check_gradients(pool.run(world_size, first_gradients, separated(recipe(parallel))), reference)


@pytest.mark.parametrize(("layout", "micro_batch_size"), [("1", 1), ("TP2", 4)])
def test_gradients_do_not_depend_on_the_micro_batch(pool, reference, layout, micro_batch_size):
    world_size, parallel = LAYOUTS[layout]
    config = separated(recipe(parallel, micro_batch_size=micro_batch_size))
    check_gradients(pool.run(world_size, first_gradients, config), reference)


def test_the_largest_logit_is_within_a_document():
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
    for logits_at_once in (24 * 3 * 5, 2**25):
        result = max_logits(query, key, 0.3, logits_at_once, documents)
        assert torch.allclose(result, expected, rtol=1e-6)
    assert (max_logits(query, key, 0.3) > expected).any()
