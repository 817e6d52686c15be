"""Packing: every conversation once, with the same loss and gradients as one conversation a sequence."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moonlight.data.loader import ChatTrainDataset, ChatValDataset
from moonlight.data.packing import pack
from moonlight.data.prepare_chat import prepare_chat
from moonlight.data.tokenizer import Tokenizer
from tests.support.chats import tuning_recipe, whole_set_gradients, write_chats
from tests.support.comparisons import check_gradients
from tests.support.layouts import LAYOUTS, assemble


@given(st.integers(1, 60).flatmap(lambda length: st.tuples(st.just(length), st.lists(st.integers(1, length)))))
def test_every_conversation_is_packed_once_and_fits(case):
    length, lengths = case
    sequences = pack(lengths, length)
    assert sorted(index for sequence in sequences for index in sequence) == list(range(len(lengths)))
    totals = [sum(lengths[index] for index in sequence) for sequence in sequences]
    assert all(0 < total <= length for total in totals)
    # No two sequences fit into one, so all but one are more than half full.
    assert sum(total * 2 <= length for total in totals) <= 1


def test_packing_fills_sequences():
    lengths = np.random.default_rng(0).integers(5, 200, size=5000).tolist()
    assert sum(lengths) / (len(pack(lengths, 512)) * 512) > 0.99


@pytest.fixture(scope="module")
def folders(tokenizer_folder, tmp_path_factory):
    """The same conversations, packed in one folder and one a sequence in the other."""
    parent = tmp_path_factory.mktemp("chats")
    chats = write_chats(parent / "chats.jsonl")
    for name, packing in (("packed", True), ("apart", False)):
        prepare_chat(
            [chats], tokenizer_folder, parent / name, sequence_length=128, validation_share=0.2, packing=packing
        )
    return parent


def test_windows_hold_the_rendered_conversations(folders, tokenizer_folder):
    """Each conversation of a packed window has the tokens and mask of one unpacked conversation."""
    eos_id = Tokenizer.load(tokenizer_folder).eos_id
    packed = ChatTrainDataset(folders / "packed", 128, eos_id, seed=1)
    apart = ChatTrainDataset(folders / "apart", 128, eos_id, seed=1)
    alone = {}
    for index in range(apart.num_windows):
        tokens, mask, documents = apart.window(index)
        length = int((documents == 0).sum())
        assert (documents[length:] == 1).all() and (tokens[length:] == eos_id).all() and not mask[length - 1 :].any()
        alone.setdefault(tuple(tokens[:length]), []).append(mask[: length - 1].tolist())
    assert packed.num_windows < apart.num_windows * 0.6
    for index in range(packed.num_windows):
        tokens, mask, documents = packed.window(index)
        assert (tokens.dtype, mask.dtype, documents.dtype) == (np.int64, np.float32, np.int32)
        used = int(packed.stream.lengths[packed._firsts[index] : packed._firsts[index + 1]].sum())
        padding = documents[used] if used < 128 else documents.max() + 1
        assert not mask[max(used - 1, 0) :].any() and (tokens[used:] == eos_id).all()
        for document in range(padding):
            (positions,) = np.nonzero(documents == document)
            start, stop = positions[0], positions[-1] + 1
            masks = alone[tuple(tokens[start:stop])]
            assert mask[start : stop - 1].tolist() == masks.pop()
            assert mask[stop - 1] == 0  # no position predicts the next conversation's first token
    assert not any(alone.values())


def test_an_epoch_has_every_window_once_and_epochs_differ(folders):
    one, other = (ChatTrainDataset(folders / "packed", 128, 2, seed=seed) for seed in (1, 2))
    count = one.num_windows
    epochs = [[one[start + index].tokens.tobytes() for index in range(count)] for start in (0, count)]
    windows = sorted(one.window(index).tokens.tobytes() for index in range(count))
    assert sorted(epochs[0]) == sorted(epochs[1]) == windows
    assert epochs[0] != epochs[1]
    assert [other[index].tokens.tobytes() for index in range(count)] != epochs[0]


def test_validation_pads_past_its_end(folders):
    samples = ChatValDataset(folders / "packed", 128, 2)
    assert len(samples) >= 1 and samples[len(samples) - 1].mask.any() and not samples[len(samples)].mask.any()


@pytest.fixture(scope="module")
def unpacked(pool, folders, tokenizer_folder):
    (answer,) = pool.run(1, whole_set_gradients, tuning_recipe(folders / "apart", tokenizer_folder))
    return answer | {name: assemble([answer[name]]) for name in ("weights", "gradients")}


@pytest.mark.parametrize(("layout", "micro_batch_size"), [("1", 2), ("1", 8), ("DP2", 2), ("TP2", 2)])
def test_packed_and_unpacked_have_the_same_loss_and_gradients(
    pool, folders, tokenizer_folder, unpacked, layout, micro_batch_size
):
    """Loss and gradients are equal at equal weights, without the auxiliary loss, which depends on the packing."""
    world_size, parallel = LAYOUTS[layout]
    config = tuning_recipe(folders / "packed", tokenizer_folder, parallel=parallel, micro_batch_size=micro_batch_size)
    answers = pool.run(world_size, whole_set_gradients, config)
    assert answers[0]["windows"] < unpacked["windows"]
    assert answers[0]["count"] == unpacked["count"] > 100
    check_gradients(answers, unpacked)


def test_a_prompt_token_has_no_gradient(pool, folders, tokenizer_folder):
    """Changed prompt labels leave loss and gradients bit-identical; changed answer labels do not."""
    config = tuning_recipe(folders / "packed", tokenizer_folder)
    answers = {change: pool.run(1, whole_set_gradients, config, change)[0] for change in ("", "prompt", "learnt")}
    assert answers["prompt"]["loss"] == answers[""]["loss"] != answers["learnt"]["loss"]
    for one, other, third in zip(*(answers[change]["gradients"] for change in ("", "prompt", "learnt")), strict=True):
        assert one[3].tobytes() == other[3].tobytes(), one[0]
        assert "expert_bias" in one[0] or one[3].tobytes() != third[3].tobytes() or not one[3].any(), one[0]
