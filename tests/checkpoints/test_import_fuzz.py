"""Random corruption of a Hugging Face folder's small files: the import succeeds or exits with a one-line error."""

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.hf_import import import_folder
from checkpoints.reader import open_checkpoint
from moonlight.errors import UserError, user_message
from tests.support.hugging_face import make_folder

FILES = ("config.json", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json", "header")
WORDS = (
    b"null",
    b"true",
    b"-1",
    b"1e400",
    b"NaN",
    b'"',
    b"{",
    b"[",
    b"}",
    b"]",
    b",",
    b":",
    b"0",
    b"9" * 10,
    b"9" * 30,
)
"""JSON fragments to insert into a file."""


@pytest.fixture(scope="module")
def source(fast_folder, tmp_path_factory):
    """A very small model in shards, with a fast tokenizer."""
    from moonlight.data.tokenizer import Tokenizer

    folder = tmp_path_factory.mktemp("fuzz") / "hf"
    make_folder(
        folder,
        max_shard_size="30KB",
        vocab_size=Tokenizer.load(fast_folder).num_text_ids,
        hidden_size=4,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        n_routed_experts=2,
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(fast_folder / name, folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


@st.composite
def changes(draw):
    """Draw (position as a fraction of the file, number of bytes removed, bytes inserted)."""
    return draw(st.floats(0, 1)), draw(st.integers(0, 12)), draw(st.sampled_from(WORDS) | st.binary(max_size=12))


def one_byte(fraction, byte):
    return [(fraction, 1, bytes([byte]))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    edits=st.builds(one_byte, st.floats(0, 1), st.integers(0, 255)) | st.lists(changes(), min_size=1, max_size=4),
)
def test_random_corruption(source, name, edits):
    with tempfile.TemporaryDirectory() as parent:
        folder, out = Path(parent) / "hf", Path(parent) / "checkpoint"
        shutil.copytree(source, folder)
        path = folder / name if name != "header" else sorted(folder.glob("*.safetensors"))[0]
        raw = path.read_bytes()
        stop = len(raw) if name != "header" else 8 + int.from_bytes(raw[:8], "little")
        head, rest = raw[:stop], raw[stop:]
        for fraction, num_removed, new in edits:
            offset = int(fraction * (len(head) - 1)) if head else 0
            head = head[:offset] + new + head[offset + num_removed :]
        path.write_bytes(head + rest)
        try:
            assert import_folder(folder, out)
        except (UserError, OSError) as error:
            line = user_message(error)
            if line is None:
                raise
            assert line.isprintable()
            assert [entry.name for entry in Path(parent).iterdir()] == ["hf"]
        else:
            open_checkpoint(out)
            assert sorted(entry.name for entry in Path(parent).iterdir()) == ["checkpoint", "hf"]
