"""Direct reads that bypass the page cache must return the file's bytes for any start and length."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from checkpoints.reader import open_checkpoint
from checkpoints.shards import ShardEntry, _read_ahead
from moonlight.dist_checkpoint import hf_mapping
from moonlight.dist_checkpoint.chunks import LocalChunks
from moonlight.dist_checkpoint.direct_io import DIRECT_IO_ALIGNMENT, direct_xxh3_checksum, read_direct
from moonlight.dist_checkpoint.index import StoredTensors
from moonlight.dist_checkpoint.tensors import save_tensors
from moonlight.files import xxh3_checksum

BYTES = torch.arange(5 * DIRECT_IO_ALIGNMENT + 77).to(torch.uint8).numpy().tobytes()
EDGES = [
    0,
    1,
    DIRECT_IO_ALIGNMENT - 1,
    DIRECT_IO_ALIGNMENT,
    DIRECT_IO_ALIGNMENT + 1,
    len(BYTES) - 1,
    len(BYTES),
    len(BYTES) + DIRECT_IO_ALIGNMENT,
]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("direct") / "file"
    path.write_bytes(BYTES)
    return path


@given(
    start=st.sampled_from(EDGES) | st.integers(0, len(BYTES)),
    nbytes=st.sampled_from(EDGES) | st.integers(0, len(BYTES)),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_any_part_of_a_file(file, start, nbytes):
    assert read_direct(file, start, nbytes).tobytes() == BYTES[start : start + nbytes]


def test_a_file_system_without_direct_io_is_read_through_the_cache():
    path = Path("/proc/version")
    with pytest.raises(OSError, match="Invalid argument"):
        os.open(path, os.O_RDONLY | os.O_DIRECT)
    full = path.read_bytes()
    assert read_direct(path, 0, len(full) + 50).tobytes() == full
    assert read_direct(path, 5, 9).tobytes() == full[5:14]


def test_checksums_are_the_same(file, tmp_path):
    assert direct_xxh3_checksum(file) == xxh3_checksum(file)
    empty = tmp_path / "empty"
    empty.touch()
    assert direct_xxh3_checksum(empty) == xxh3_checksum(empty)


def test_any_part_of_a_stored_chunk(tmp_path):
    full = torch.arange(4 * 6 * 5.0).view(4, 6, 5)
    chunks = [
        ((expert, 0, column), full[expert : expert + 2, :, column : column + 3 - column // 3])
        for expert in (0, 2)
        for column in (0, 3)
    ]
    save_tensors(tmp_path, {"experts": LocalChunks((4, 6, 5), chunks)})
    stored = StoredTensors(tmp_path)
    for offset, sizes in stored.chunks("experts").items():
        chunk = stored.mmap_chunk("experts", offset, sizes)
        for index in (
            (0, slice(1, 4), slice(0, 2)),
            (1, slice(0, 6), slice(1, 2)),
            (slice(1, 2), slice(2, 3), slice(0, 1)),
            (slice(0, 2), slice(0, 6), slice(0, 2)),
        ):
            assert stored.read_chunk("experts", offset, sizes, index).equal(chunk[index]), (offset, index)


def test_rows_of_every_tensor_equal_those_of_the_full_tensor(tiny_run):
    checkpoint = open_checkpoint(tiny_run.folder)
    for mapping in hf_mapping.tensor_mappings(checkpoint.model_config):
        for hf_tensor in mapping.hf_tensors:
            full = checkpoint.read_hf_tensor(mapping, hf_tensor)
            start, stop = len(full) // 3, max(len(full) // 3 + 1, len(full) - 1)
            assert checkpoint.read_hf_tensor(mapping, hf_mapping.slice_rows(hf_tensor, start, stop)).equal(
                full[start:stop]
            ), hf_tensor.name


def test_reading_ahead_keeps_the_order_and_propagates_errors():
    hf_tensor = hf_mapping.HFTensor(name="x", shape=(10,))
    entry = ShardEntry(
        hf_mapping.TensorMapping(key="x", shape=(10,), hf_tensors=(hf_tensor,)), hf_tensor, torch.float32
    )
    row_slices = [replace(entry, hf_tensor=hf_mapping.slice_rows(hf_tensor, row, row + 1)) for row in range(10)]
    values = torch.arange(10.0)

    def read(row_slice):
        index = row_slice.hf_tensor.index[0]
        if index.start == 7:
            raise OSError("gone")
        return values[index]

    seen = []
    with pytest.raises(OSError, match="gone"):
        for row_slice, result in _read_ahead(row_slices, read):
            assert result.equal(values[row_slice.hf_tensor.index[0]])
            seen.append(row_slice.hf_tensor.index[0].start)
    assert seen == list(range(7))
