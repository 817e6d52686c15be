"""SVD entropies of both optimizers' best runs, paired matrix by matrix, by size and by group."""

from pathlib import Path

from moonlight.dist_checkpoint import hf_mapping
from moonlight.placement.param_groups import MATRIX_GROUPS, find_monitor_group
from moonlight.studies.ladder import LadderRun, load_ladder
from moonlight.studies.results import StudyResult
from moonlight.studies.scaling_picture import draw_entropies
from moonlight.studies.spectra import pair_entropies, spectra_text

LADDER = Path(__file__).parents[2] / "configs" / "scaling" / "cpu_moe.yaml"


def result(point, loss):
    fields = {"steps": 4, "tokens": 1024, "flops": 1e12, "seconds": 1.0, "svd_entropy": {}}
    return StudyResult(point=point, diverged="" if loss else "yes", loss=loss, **fields)


def test_matrices_are_paired_by_size_and_group(tmp_path):
    """Pairs cover the first size only, where Muon is higher except in the router. AdamW diverged at the second."""
    ladder = load_ladder(LADDER)
    first, second = list(ladder.sizes)[:2]
    points = [LadderRun(size, name, 0.008, 1) for size in (first, second) for name in ("muon", "adamw")]
    results = {point: result(point, None if point.name.startswith(f"{second}-adamw") else 4.0) for point in points}
    rows = hf_mapping.tensor_mappings(ladder.make_config(points[0]).model)
    groups = {
        part.name: find_monitor_group(row.key) for row in rows for part in row.hf_tensors if part.init_kind == "matrix"
    }
    names = [name for name, group in groups.items() if group in MATRIX_GROUPS]
    spectra = {
        points[0].name: {name: 0.5 if groups[name] == "router" else 0.9 for name in names},
        points[1].name: dict.fromkeys(names, 0.6) | {names[0]: float("nan")},
        points[2].name: dict.fromkeys(names, 0.9),
    }
    pairs = pair_entropies(ladder, results, spectra)
    assert len(pairs) == len(names) - 1 and {pair.size for pair in pairs} == {first}
    text = spectra_text(pairs)
    for line in (
        f"| {first} | 62 | 61 | 0.8935 | 0.6000 |",
        "| attention_qo | 3 | 3 | 0.9000 | 0.6000 |",
        "| attention_kv | 4 | 4 | 0.9000 | 0.6000 |",
        "| experts | 48 | 48 | 0.9000 | 0.6000 |",
        "| shared_experts | 3 | 3 | 0.9000 | 0.6000 |",
        "| router | 1 | 0 | 0.5000 | 0.6000 |",
        "| dense | 3 | 3 | 0.9000 | 0.6000 |",
        "The entropy is higher under Muon in 61 of 62 matrices, 98.4%.",
    ):
        assert line in text.splitlines(), line
    draw_entropies(pairs, tmp_path / "entropies.png")
    assert (tmp_path / "entropies.png").read_bytes().startswith(b"\x89PNG")
