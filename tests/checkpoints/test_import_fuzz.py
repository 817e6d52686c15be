"""Any damage to the small files of a Hugging Face folder: import succeeds or ends with a line for people."""

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
"""What JSON may hold instead of what is there."""


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
    """(where, what is there less, what is there instead), where being a share of the file."""
    return draw(st.floats(0, 1)), draw(st.integers(0, 12)), draw(st.sampled_from(WORDS) | st.binary(max_size=12))


def one_byte(share, byte):
    return [(share, 1, bytes([byte]))]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    edits=st.builds(one_byte, st.floats(0, 1), st.integers(0, 255)) | st.lists(changes(), min_size=1, max_size=4),
)
def test_any_damage(source, name, edits):
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "hf", Path(place) / "checkpoint"
        shutil.copytree(source, folder)
        path = folder / name if name != "header" else sorted(folder.glob("*.safetensors"))[0]
        raw = path.read_bytes()
        end = len(raw) if name != "header" else 8 + int.from_bytes(raw[:8], "little")
        head, rest = raw[:end], raw[end:]
        for share, fewer, new in edits:
            at = int(share * (len(head) - 1)) if head else 0
            head = head[:at] + new + head[at + fewer :]
        path.write_bytes(head + rest)
        try:
            assert import_folder(folder, out)
        except (UserError, OSError) as error:
            line = user_message(error)
            if line is None:
                raise
            assert line.isprintable()
            assert [entry.name for entry in Path(place).iterdir()] == ["hf"]
        else:
            open_checkpoint(out)
            assert sorted(entry.name for entry in Path(place).iterdir()) == ["checkpoint", "hf"]
