"""The mean of a run's newest checkpoints equals numpy's mean, exports and verifies, and is computed once."""

from shutil import copytree

import numpy as np
import pytest

from checkpoints.average import average
from checkpoints.export import export
from checkpoints.reader import open_checkpoint
from checkpoints.verify import verify
from moonlight.dist_checkpoint import hf_mapping
from moonlight.errors import UserError
from moonlight.files import xxh3_checksum
from tests.support.bad_input import in_state

STEPS = (2, 4)


@pytest.fixture(scope="module")
def averaged(tiny_run, tmp_path_factory):
    out = tmp_path_factory.mktemp("averaged") / "mean"
    assert average(tiny_run.folder, 2, out) == list(STEPS)
    return out


def weights(checkpoint):
    """Return every tensor by its Hugging Face name."""
    rows = hf_mapping.tensor_mappings(checkpoint.model_config)
    return {part.name: checkpoint.read_hf_tensor(row, part).numpy() for row in rows for part in row.hf_tensors}


def test_average_is_the_float64_mean(tiny_run, averaged):
    averages = weights(open_checkpoint(averaged))
    num_changed = 0
    values = [weights(open_checkpoint(tiny_run.folder, step)) for step in STEPS]
    assert averages.keys() == values[0].keys() == values[1].keys()
    for name, value in averages.items():
        mean = np.mean([tensors[name].astype(np.float64) for tensors in values], axis=0)
        assert np.array_equal(value, mean.astype(np.float32)), name
        num_changed += not np.array_equal(values[0][name], values[1][name])
    assert num_changed > len(averages) / 2, "most tensors must differ between the two checkpoints"


def test_average_uses_only_the_newest_checkpoints(tiny_run, runs, tmp_path):
    """The mean of the last two of three checkpoints leaves the first out. Each checkpoint has equal weight."""
    folder = runs / "tiny" / "checkpoints"
    copytree(folder / "step-00000002", folder / "step-00000003")
    in_state(lambda content: content["state"].update(step=3))(folder / "step-00000003")
    assert average(runs / "tiny", 2, tmp_path / "two") == [3, 4]
    assert average(runs / "tiny", 3, tmp_path / "three") == [2, 3, 4]
    key = "embedding.word_embeddings.weight"
    older, newer = (open_checkpoint(tiny_run.folder, step).read(key).double() for step in STEPS)
    assert open_checkpoint(tmp_path / "two").read(key).equal(((older + newer) / 2).float())
    assert open_checkpoint(tmp_path / "three").read(key).equal(((older + older + newer) / 3).float())


def test_average_exports_and_verifies_and_its_card_names_the_steps(averaged, tiny_run, tmp_path):
    assert open_checkpoint(averaged).state == open_checkpoint(tiny_run.folder).state
    assert export(averaged, tmp_path / "hf")
    report = verify(averaged, tmp_path / "hf")
    assert report.passed and report.logit_difference <= 1e-4 < report.largest_logit
    assert not verify(tiny_run.folder, tmp_path / "hf", tensors_only=True).passed
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "Its weights are the mean of the checkpoints after steps 2, 4." in " ".join(card.split())


def test_a_second_call_does_nothing(averaged, tiny_run):
    before = {path: (path.stat().st_mtime_ns, xxh3_checksum(path)) for path in averaged.iterdir()}
    assert average(tiny_run.folder, 2, averaged) == []
    assert {path: (path.stat().st_mtime_ns, xxh3_checksum(path)) for path in averaged.iterdir()} == before


def test_a_corrupt_average_is_not_skipped_as_finished(averaged, tiny_run, tmp_path):
    out = copytree(averaged, tmp_path / "mean")
    file = out / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match="it is truncated"):
        average(tiny_run.folder, 2, out)
