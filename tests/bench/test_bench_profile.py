"""Profile of a training step: real steps, with matrix-product FLOPs compared to exact counts."""

import json
import subprocess
import sys

import pytest

from moonlight.bench import profile

VOCABULARY, HIDDEN, TOKENS, LAYERS = 256, 64, 3 * 32, 2
TINY = (
    f"model.vocab_size={VOCABULARY}",
    f"model.hidden_size={HIDDEN}",
    f"model.num_hidden_layers={LAYERS}",
    "data.sequence_length=32",
    "train.global_batch_size=3",
    "train.micro_batch_size=1",
)


def test_product_flops_are_assigned_to_the_right_part(tmp_path):
    out = tmp_path / "profile.json"
    command = [sys.executable, "-m", "moonlight.cli", "bench", "profile", "configs/quickstart.yaml", *TINY]
    output = subprocess.run(
        [*command, "--steps", "2", "--json", str(out)], capture_output=True, text=True, check=True
    ).stdout
    content = json.loads(out.read_text())
    parts = content["parts"]
    assert "96 tokens" in content["title"] and all(name in output for name in parts)
    # For each token: the logits, the gradient of the hidden states, the gradient of the weight.
    assert parts[profile.HEAD]["gflop"] == pytest.approx(3 * 2 * TOKENS * HIDDEN * VOCABULARY / 1e9, rel=1e-6)
    # Query, output, key-value down- and up-projections, and the MLPs: one forward and two backward products.
    attention = HIDDEN * (4 * 48 + 64 + 16) + 64 * 4 * (32 + 32) + 4 * 32 * HIDDEN
    rest = 3 * HIDDEN * (512 + 96) + HIDDEN * 8  # dense layer and shared expert, router
    linear = 3 * 2 * TOKENS * (LAYERS * attention + rest)
    assert parts[profile.LINEAR]["gflop"] == pytest.approx(linear / 1e9, rel=1e-6)
    assert parts[profile.OTHER]["gflop"] == 0
    for name in (profile.ATTENTION, profile.EXPERTS, profile.NEWTON_SCHULZ):
        assert parts[name]["gflop"] > 0 and parts[name]["products_ms"] > 0
    assert parts[profile.REST_OF_UPDATE]["other_ms"] > 0 == parts[profile.REST_OF_UPDATE]["products_ms"]


def test_flops_of_matrix_products():
    assert profile.operations("aten::mm", [[3, 4], [4, 5], [3, 5]]) == 2 * 3 * 4 * 5
    assert profile.operations("aten::addmm", [[3, 5], [3, 4], [4, 5], [], []]) == 2 * 3 * 4 * 5
    assert profile.operations("aten::bmm", [[7, 3, 4], [7, 4, 5]]) == 2 * 7 * 3 * 4 * 5
