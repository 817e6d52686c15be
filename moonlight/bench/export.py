"""`moonlight bench export`: CPU time and memory of export and import, beside transformers' save_pretrained.

The model is Moonlight-16B-A3B in full width, cut to a few layers, with random weights in bfloat16. Every measurement is
a process of its own, as a user's command is; the cases take turns. A process says what CPU time the one call took,
imports and the peer's loading of the model apart; its anonymous memory (page cache excluded) is watched from outside.
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
from collections.abc import Callable
from pathlib import Path

from moonlight.bench.report import BenchResult, hardware, print_results, time_ratio, told_rounds
from moonlight.config.load import load_recipe
from moonlight.files import check_space, write_sums
from moonlight.plan.flops import count_parameters

CPU_TIME_BAR = 1 / 0.7
"""Of save_pretrained and the sums of its files, over an export with its sums."""
ALONE_BAR, ALONE_AIM = 1.4, 2.0
"""The same without the sums of the peer."""
MEMORY_ABOVE_SHARD_BYTES = 1.5 * 2**30
SECONDS_BETWEEN_LOOKS = 0.005
GIB = 2**30
COPIES_ON_DISK, BYTES_A_PARAMETER = 4, 2


def bench_export(rounds: int, layers: int, recipe: Path, json_path: Path | None = None) -> bool:
    """Measure, print the table, and return whether every gate and bar has passed."""
    config = load_recipe(recipe, [f"model.num_hidden_layers={layers}"])
    check_space(Path.cwd(), COPIES_ON_DISK * BYTES_A_PARAMETER * count_parameters(config.model).total)
    with tempfile.TemporaryDirectory(dir=".", prefix=".bench-") as place:
        folder = Path(place)
        source, checkpoint = folder / "hf", folder / "checkpoint"
        make_source(config.model, source)
        largest = max(file.stat().st_size for file in source.glob("*.safetensors"))
        imports, exports, peers, sums = [], [], [], []
        peaks = {"import": 0, "export": 0}
        same = True
        for _ in told_rounds(rounds, warms_up=False):
            shutil.rmtree(checkpoint, ignore_errors=True)
            found, peak = _measure("import", source, checkpoint)
            imports.append(found[0])
            peaks["import"] = max(peaks["import"], peak)
            found, _ = _measure("save_pretrained", source, folder / "peer")
            peers.append(found[0])
            sums.append(found[1])
            found, peak = _measure("export", checkpoint, folder / "ours")
            exports.append(found[0])
            peaks["export"] = max(peaks["export"], peak)
            same = same and _same_tensors(folder / "ours", folder / "peer")
            shutil.rmtree(folder / "ours")
            shutil.rmtree(folder / "peer")
    limit = largest + MEMORY_ABOVE_SHARD_BYTES
    figures = [
        time_ratio(
            "export, CPU time, save_pretrained and sums",
            exports,
            [peer + digest for peer, digest in zip(peers, sums, strict=True)],
            CPU_TIME_BAR,
            same,
            "s",
        ),
        time_ratio("export, CPU time, save_pretrained alone", exports, peers, ALONE_BAR, same, "s", ALONE_AIM),
        *(
            BenchResult(
                f"{case}, peak memory",
                "GiB",
                peak / GIB,
                limit / GIB,
                limit / peak,
                "",
                ">= 1",
                peak <= limit,
                own_limit=True,
            )
            for case, peak in peaks.items()
        ),
    ]
    notes = [
        f"the peer of export: save_pretrained of a loaded model ({statistics.median(peers):.2f} s) and, since exports "
        f"have them, SHA-256 sums of its files ({statistics.median(sums):.2f} s)",
        f"in the place of a peer of memory: the largest shard ({largest / GIB:.2f} GiB) and 1.5 GiB",
        f"import: {statistics.median(imports):.2f} s of CPU time",
        f"tensors of export and save_pretrained: {'the same bytes' if same else 'DIFFERENT'}",
    ]
    return print_results("Export and import", figures, hardware("cpu"), notes, json_path)


def make_source(model: object, out: Path, dtype: str = "bfloat16") -> None:
    """A random model as `save_pretrained` writes it, router biases that are not zero included."""
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

    mine, theirs = open_folder(ours).tensors, open_folder(peer).tensors
    return mine.keys() == theirs.keys() and all(
        bool((mine[name].read() == theirs[name].read()).all()) and mine[name].shape == theirs[name].shape
        for name in mine
    )


def _measure(case: str, source: Path, out: Path) -> tuple[list[float], int]:
    """CPU seconds of the call (and of sums, for the peer), and the process's peak of anonymous memory."""
    command = [sys.executable, "-m", "moonlight.bench.export", case, str(source), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    peak = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        if match := re.search(r"RssAnon:\s+(\d+) kB", status.read_text()):
            peak = max(peak, 1024 * int(match[1]))
        time.sleep(SECONDS_BETWEEN_LOOKS)
    assert process.stdout is not None
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return json.loads(process.stdout.read().splitlines()[-1]), peak


def _call(case: str, source: Path, out: Path) -> list[float]:
    if case == "import":
        from checkpoints.hf_import import import_folder

        return [_cpu_seconds(lambda: import_folder(source, out))]
    if case == "export":
        from checkpoints.export import export

        return [_cpu_seconds(lambda: export(source, out, dtype="bfloat16"))]
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16)
    saving = _cpu_seconds(lambda: model.save_pretrained(out, max_shard_size="5GB"))
    return [saving, _cpu_seconds(lambda: write_sums(out))]


def _cpu_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    call()
    return time.process_time() - start


if __name__ == "__main__":
    print(json.dumps(_call(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))))
