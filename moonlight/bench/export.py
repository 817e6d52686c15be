"""`moonlight bench export`: CPU time and memory of export and import, compared with transformers' save_pretrained.

The model is Moonlight-16B-A3B in full width with a few layers and random bfloat16 weights. Each measurement runs in a
separate process, like a user's command; the cases take turns. The process reports the CPU time of the call, without
imports and without the peer's loading of the model. The parent polls its anonymous memory, without the page cache.
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from moonlight.bench.report import BenchResult, cpu_seconds, hardware, iter_rounds, print_results, time_ratio
from moonlight.config.load import load_recipe
from moonlight.files import check_space, write_sums
from moonlight.hardware import GIB
from moonlight.plan.flops import count_parameters

CPU_TIME_BAR = 1 / 0.7
"""CPU time of save_pretrained and the checksums of its files, over that of an export with checksums."""
ALONE_BAR, ALONE_AIM = 1.4, 2.0
"""The same without the peer's checksums."""
MEMORY_ABOVE_SHARD_BYTES = 1.5 * GIB
POLL_SECONDS = 0.005
COPIES_ON_DISK, BYTES_PER_PARAMETER = 4, 2


def bench_export(rounds: int, layers: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Run the benchmark, print its table, and return whether every result passed."""
    config = load_recipe(recipe, [f"model.num_hidden_layers={layers}"])
    check_space(Path.cwd(), COPIES_ON_DISK * BYTES_PER_PARAMETER * count_parameters(config.model).total)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as temporary_folder:
        folder = Path(temporary_folder)
        source, checkpoint = folder / "hf", folder / "checkpoint"
        make_source(config.model, source)
        largest_shard = max(file.stat().st_size for file in source.glob("*.safetensors"))
        cases = (
            ("import", source, checkpoint),
            ("save_pretrained", source, folder / "peer"),
            ("export", checkpoint, folder / "ours"),
        )
        seconds: dict[str, list[list[float]]] = {case: [] for case, _, _ in cases}
        peaks = dict.fromkeys(seconds, 0)
        same = True
        for _ in iter_rounds(rounds, warms_up=False):
            for case, case_source, out in cases:
                shutil.rmtree(out, ignore_errors=True)
                case_seconds, peak = _measure(case, case_source, out)
                seconds[case].append(case_seconds)
                peaks[case] = max(peaks[case], peak)
            same = same and _same_tensors(folder / "ours", folder / "peer")
    imports, exports = ([values[0] for values in seconds[case]] for case in ("import", "export"))
    peers, checksums = map(list, zip(*seconds["save_pretrained"], strict=True))
    limit = largest_shard + MEMORY_ABOVE_SHARD_BYTES
    with_sums = [peer + checksum for peer, checksum in zip(peers, checksums, strict=True)]
    results = [
        time_ratio("export, CPU time, save_pretrained and sums", exports, with_sums, CPU_TIME_BAR, same, "s"),
        time_ratio("export, CPU time, save_pretrained alone", exports, peers, ALONE_BAR, same, "s", ALONE_AIM),
    ]
    for case in ("import", "export"):
        ours, bar, fits = peaks[case] / GIB, limit / GIB, peaks[case] <= limit
        result = BenchResult(f"{case}, peak memory", "GiB", ours, bar, limit / peaks[case], "", ">= 1", fits)
        results.append(replace(result, own_limit=True))
    notes = [
        f"peer of export: save_pretrained of a loaded model ({statistics.median(peers):.2f} s) and, because an export "
        f"has them, SHA-256 checksums of its files ({statistics.median(checksums):.2f} s)",
        f"limit of memory: the largest shard ({largest_shard / GIB:.2f} GiB) and 1.5 GiB",
        f"import: {statistics.median(imports):.2f} s of CPU time",
        f"tensors of export and save_pretrained: {'bit-identical' if same else 'DIFFERENT'}",
    ]
    return print_results("Export and import", results, hardware("cpu"), notes, json_path)


def make_source(model: object, out: Path, dtype: str = "bfloat16") -> None:
    """Write a random model (a ModelConfig) with transformers' `save_pretrained`, with nonzero router biases."""
    import torch
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from checkpoints.hf_config import hf_config

    config = hf_config(model, dtype=dtype)  # type: ignore[arg-type]
    torch.manual_seed(0)
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        peer = DeepseekV3ForCausalLM(DeepseekV3Config(**config))
    finally:
        torch.set_default_dtype(torch.float32)
    for layer in peer.model.layers[peer.config.first_k_dense_replace :]:
        layer.mlp.gate.e_score_correction_bias.data = torch.randn(peer.config.n_routed_experts) / 10
    peer.save_pretrained(out, max_shard_size="5GB")


def _same_tensors(ours: Path, peer: Path) -> bool:
    from checkpoints.hf_folder import open_folder

    our_tensors, peer_tensors = open_folder(ours).tensors, open_folder(peer).tensors
    return our_tensors.keys() == peer_tensors.keys() and all(
        bool((our_tensors[name].read() == peer_tensors[name].read()).all())
        and our_tensors[name].shape == peer_tensors[name].shape
        for name in our_tensors
    )


def _measure(case: str, source: Path, out: Path) -> tuple[list[float], int]:
    """Return CPU seconds of the call (for the peer, also of checksums) and the peak anonymous memory in bytes."""
    command = [sys.executable, "-m", "moonlight.bench.export", case, str(source), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if match := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
            peak = max(peak, 1024 * int(match[1]))
        time.sleep(POLL_SECONDS)
    assert process.stdout is not None
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed with exit code {process.returncode}")
    return json.loads(process.stdout.read().splitlines()[-1]), peak


def _call(case: str, source: Path, out: Path) -> list[float]:
    if case == "import":
        from checkpoints.hf_import import import_folder

        return [cpu_seconds(lambda: import_folder(source, out))]
    if case == "export":
        from checkpoints.export import export

        return [cpu_seconds(lambda: export(source, out, dtype="bfloat16"))]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    save_seconds = cpu_seconds(lambda: model.save_pretrained(out, max_shard_size="5GB"))
    return [save_seconds, cpu_seconds(lambda: write_sums(out))]


if __name__ == "__main__":
    print(json.dumps(_call(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
