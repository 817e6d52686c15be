"""Ablations: the shipped files, a real one killed and resumed, and errors for bad files and bad runs."""

import json
import math
import signal
from pathlib import Path

import pytest
import yaml

from moonlight.data.prepare import prepare
from moonlight.errors import UserError
from moonlight.studies.ablation import AblationRun, load_ablation
from moonlight.studies.ablation_command import ablate
from moonlight.studies.ablation_text import ablation_caveats, course_table, loss_table, matrices_text, verdict
from moonlight.studies.outcome import curve_differences, variant_results
from moonlight.studies.results import StudyResult, read_results, write_results
from moonlight.studies.weights import matrix_kind
from tests.support.studies import call, call_interrupted, ended, steps_of, write_recipe

ROOT = Path(__file__).parents[2]
SHIPPED = sorted((ROOT / "configs" / "ablations").glob("*.yaml"))
VARIANTS = {
    "large": {"optimizer.rms_match": 0.4},
    "small": {"optimizer.rms_match": 0.1},
    "adamw": {"optimizer.name": "adamw"},
}


@pytest.fixture
def write(tmp_path, data_folder, tokenizer_folder):
    """Return a function that writes an ablation of a small recipe and returns its path."""
    write_recipe(tmp_path / "recipe.yaml", data_folder, tokenizer_folder)

    def make(**keys):
        tree = {"name": "test", "recipe": "recipe.yaml", "rates": [0.008], "variants": VARIANTS, "baseline": "small"}
        path = tmp_path / "ablation.yaml"
        path.write_text(yaml.safe_dump(tree | {"folder": str(tmp_path / "ablations")} | keys, sort_keys=False))
        return path

    return make


def result(trial, loss, **more):
    diverged = "" if math.isfinite(loss) else "the loss is not finite"
    fields = {"steps": 4, "tokens": 1024, "flops": 1e12, "seconds": 1.0, "svd_entropy": {"router": 0.5}}
    curve = [] if diverged else [[256.0 * number, loss + 1 / number] for number in range(1, 21)]
    fields |= {"curve": curve, "update_rms": {"router": 0.2}}
    return StudyResult(point=trial, diverged=diverged, loss=None if diverged else loss, **fields | more)


def make_results(ablation, losses):
    """Return a result for each run from `losses` by variant. Each further seed adds 0.1, or 0.12 in "large"."""
    return {
        trial: result(trial, losses[trial.variant] + (trial.seed - 1) * (0.12 if trial.variant == "large" else 0.1))
        for trial in ablation.pending_runs({})
    }


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_ablations_change_what_they_name(path):
    """Variants differ only in the optimizer and have one learning rate and at least two seeds."""
    ablation = load_ablation(path)
    assert ablation.name == path.stem and len(ablation.seeds) >= 2 and len(ablation.rates) == 1
    assert all(key.startswith("optimizer.") for settings in ablation.variants.values() for key in settings)
    config = ablation.first_config()
    assert config.schedule.decay == "cosine" and config.schedule.min_lr == 0
    trials = ablation.pending_runs({})
    assert len(trials) == len(ablation.variants) * len(ablation.seeds)
    assert {trial.seed for trial in trials[: len(ablation.variants)]} == {ablation.seeds[0]}


def test_shipped_ablations_cover_the_papers():
    assert [path.stem for path in SHIPPED] == [
        "coefficients",
        "per_head",
        "target_rms",
        "update_matching",
        "weight_decay",
    ]
    target = load_ablation(ROOT / "configs" / "ablations" / "target_rms.yaml")
    assert list(target.numbers.values()) == [0.05, 0.1, 0.2, 0.4, 0.8] and "adamw" in target.variants
    matching = load_ablation(ROOT / "configs" / "ablations" / "update_matching.yaml")
    configs = [matching.make_config(matching.representative_run(name)) for name in matching.variants]
    assert {config.optimizer.rms_matching for config in configs} == {"adjusted_lr", "update_norm", "baseline"}
    assert all(config.model.intermediate_size == 4 * config.model.hidden_size for config in configs)


def test_ablation_trains_each_variant(write, small_corpus, tokenizer_folder, tmp_path):
    """An ablation of two variants and one seed."""
    path = write_short(write, small_corpus, tokenizer_folder, tmp_path, {"train.validation_sequences": 64}, seeds=[1])
    ablation = load_ablation(path)
    process = call("ablate", path)
    assert process.returncode == 0, process.stderr
    check_trained(ablation, 2)
    text = (ablation.folder_path / "results.md").read_text()
    assert "| large | 0.008 |" in text and "RMS of the weights at the end" in text and "SVD entropy" in text


@pytest.mark.slow
def test_killed_ablation_trains_no_run_twice(write, small_corpus, tokenizer_folder, tmp_path):
    """An ablation of two variants and one seed, killed after its first result, trains no run again."""
    path = write_short(write, small_corpus, tokenizer_folder, tmp_path, {"train.validation_sequences": 64}, seeds=[1])
    ablation = load_ablation(path)
    process = call_interrupted(ablation, "ablate", path, ends=(signal.SIGKILL,))
    assert process.returncode == 0, process.stderr
    check_trained(ablation, 2)


def write_short(write, small_corpus, tokenizer_folder, tmp_path, settings=None, **keys):
    """Write an ablation of two variants and 40 steps; fewer steps give losses that count as diverged."""
    data = tmp_path / "data"  # unlike in `data_folder`, held-out text resembles the training text
    prepare([small_corpus], tokenizer_folder, data, validation_share=0.5)
    two = {name: VARIANTS[name] for name in ("large", "small")}
    settings = {"data.path": str(data), "train.train_steps": 40, "schedule.min_lr": 0.0} | (settings or {})
    return write(variants=two, varied="optimizer.rms_match", settings=settings, **keys)


def check_trained(ablation, count):
    """Check that all runs have a result, and that each trained every step once."""
    names = ended(ablation)
    assert sorted(names) == sorted(trial.name for trial in ablation.pending_runs({})) and len(names) == count
    for name in names:
        assert steps_of(ablation, name) == list(range(1, 41))


@pytest.mark.slow
def test_interrupted_ablation_resumes_and_trains_no_run_twice(write, small_corpus, tokenizer_folder, tmp_path):
    """An ablation of two variants and two seeds, interrupted twice, trains no run again."""
    path = write_short(write, small_corpus, tokenizer_folder, tmp_path, {"monitor.every_steps": 1}, side_by_side=2)
    ablation = load_ablation(path)
    process = call_interrupted(ablation, "ablate", path)
    assert process.returncode == 0, process.stderr
    check_trained(ablation, 4)
    results = read_results(ablation)
    weights = json.loads((ablation.folder_path / "weight_rms.json").read_text())
    for trial, run in results.items():
        metrics = (ablation.folder_path / "points" / trial.name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(metrics[-1])
        assert run.loss == last["loss/held_out"] and run.update_rms["dense"] == last["optim/update_rms/dense"]
        assert run.curve[-1] == [last["consumed_tokens"], last["loss/train"]] and len(run.curve) == 40
        # At the last step the learning rate is 0, so the monitored weights are the final ones.
        assert weights[trial.name]["router"] == pytest.approx(last["optim/weight_rms/router"], rel=1e-5)
        assert weights[trial.name]["attention key-value"] == pytest.approx(
            last["optim/weight_rms/attention_kv"], rel=1e-5
        )
        assert run.update_rms["dense"] == pytest.approx(VARIANTS[trial.variant]["optimizer.rms_match"], rel=0.2)
    text = (ablation.folder_path / "results.md").read_text()
    assert "| large | 0.008 |" in text and "RMS of the weights at the end" in text and "SVD entropy" in text
    plot = ablation.folder_path / "ablation.png"
    assert plot.read_bytes().startswith(b"\x89PNG")
    plot.unlink()
    again = call("ablate", path, "--draw-only")
    assert again.returncode == 0 and plot.exists() and (ablation.folder_path / "results.md").read_text() == text


def test_differences_pair_the_seeds(write):
    ablation = load_ablation(write(varied="optimizer.rms_match"))
    results = make_results(ablation, {"large": 4.0, "small": 4.2, "adamw": 4.5})
    outcomes = variant_results(ablation, results)
    table = loss_table(ablation, outcomes).splitlines()
    assert table[2] == "| large | 0.008 | 4.0600 | 4.0000 | 4.1200 | -0.1900 [-0.2000, -0.1800] | 1 |"
    assert table[3] == "| small | 0.008 | 4.2500 | 4.2000 | 4.3000 | baseline | 1 |"
    course = course_table(ablation, outcomes).splitlines()
    assert course[-1] == "| adamw | " + 4 * "+0.3000 [+0.3000, +0.3000] | " + "never |"
    assert "| large | 0.5000 |" in matrices_text(outcomes, {})
    tokens, less = curve_differences(outcomes["adamw"].runs, outcomes["small"].runs)[1]
    assert tokens == [256.0 * number for number in range(1, 21)] and less == pytest.approx([0.3] * 20)
    assert "smallest at 0.4, the upper end: not yet an optimum" in verdict(ablation, outcomes)
    assert ablation_caveats(ablation, outcomes) == []


def test_the_last_crossing_is_reported(write):
    """With one seed ahead for 11 of 20 points and the other for 13, the mean is ahead up to the twelfth."""
    ablation = load_ablation(write())
    results = make_results(ablation, {"large": 4.0, "small": 4.0, "adamw": 4.0})
    for seed, ahead in ((1, 11), (2, 13)):
        curve = [[1e6 * n, 4.0 + (-0.1 if n <= ahead else 0.1)] for n in range(1, 21)]
        results[AblationRun("large", 0.008, seed)] = result(AblationRun("large", 0.008, seed), 4.1, curve=curve)
        flat = [[tokens, 4.0] for tokens, _ in curve]
        results[AblationRun("small", 0.008, seed)] = result(AblationRun("small", 0.008, seed), 4.0, curve=flat)
    course = course_table(ablation, variant_results(ablation, results)).splitlines()
    assert len(course) == 3 and "| 0 to 25% | 25 to 50% | 50 to 75% | 75 to 100% |" in course[0]
    assert course[2].startswith("| large | -0.1000 [-0.1000, -0.1000] |") and course[2].endswith("| 12.00 |")


def test_an_optimum_has_two_ends_that_are_worse(write):
    variants = {str(rms): {"optimizer.rms_match": rms} for rms in (0.8, 0.05, 0.2)}
    ablation = load_ablation(write(variants=variants, baseline="0.2", varied="optimizer.rms_match"))
    assert list(ablation.numbers) == ["0.05", "0.2", "0.8"]
    outcomes = variant_results(ablation, make_results(ablation, {"0.05": 4.3, "0.2": 4.0, "0.8": 4.1}))
    assert verdict(ablation, outcomes).endswith(
        "smallest at 0.2; both ends are worse, at 0.05 by 0.3000 and at 0.8 by 0.1000."
    )


@pytest.mark.parametrize("varied", ["", "optimizer.rms_match"])
def test_diverged_and_missing_runs_are_reported_and_left_out(write, varied):
    path = write(varied=varied, rates=[0.004, 0.008, 0.016], seeds=[1, 2, 3])
    ablation = load_ablation(path)
    results = {}
    for trial in ablation.pending_runs({})[:-1]:
        bad = trial.variant == "adamw" or (trial.variant == "large" and trial.rate == 0.016 and trial.seed == 2)
        results[trial] = result(trial, math.inf if bad else 4 + trial.rate)
    outcomes = variant_results(ablation, results)
    assert outcomes["large"].best == 0.004 and outcomes["adamw"].best is None and not outcomes["adamw"].runs
    caveats = ablation_caveats(ablation, outcomes)
    assert sum("diverged" in line for line in caveats) == 3 * 3  # AdamW's eight, and one
    assert "small is best at 0.004, the lower edge of its learning rates." in caveats
    assert caveats[-1] == "1 runs are pending: adamw-lr0.016-seed3."
    table = loss_table(ablation, outcomes)
    assert "| large | 0.016 | diverged | 4.0160 | diverged | 4.0160 |" in table and "| **4.0040** |" in table
    write_results(ablation, results)
    ablate([path], draw_only=True, dry_run=False)
    assert (ablation.folder_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_results_of_another_recipe_or_ablation_are_refused(write):
    ablation = load_ablation(write())
    results = make_results(ablation, {"large": 4.0, "small": 4.2, "adamw": 4.5})
    write_results(ablation, results)
    assert read_results(ablation) == results
    more = VARIANTS | {"normed": {"optimizer.rms_matching": "update_norm"}}
    assert read_results(load_ablation(write(variants=more, seeds=[1, 2, 3], rates=[0.008, 0.016]))) == results
    changed = VARIANTS | {"large": {"optimizer.rms_match": 0.8}}
    for keys, words in (
        ({"settings": {"train.train_steps": 8}}, "train.train_steps is 4 in the file and 8 now"),
        ({"variants": changed}, "at variant large, optimizer.rms_match is 0.4 in the file and 0.8 now"),
        ({"variants": {name: VARIANTS[name] for name in ("large", "small")}}, "another ablation: it has the variant"),
    ):
        with pytest.raises(UserError, match=words):
            read_results(load_ablation(write(**keys)))


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"variants": {"a": {}}}, "variants has 1"),
        ({"variants": {"a": {}, "b": {}}, "baseline": "a"}, "variants a and b are the same run"),
        ({"variants": {"a": {}, "b": 3}}, "variants is"),
        ({"variants": {"a/b": {}, "b": {"train.train_steps": 5}}, "baseline": "b"}, "one folder name"),
        ({"variants": {"a": {}, "b": {"optimizer.rms_mach": 0.1}}, "baseline": "a"}, "optimizer.rms_match"),
        ({"variants": {"a": {}, "b": {"schedule.lr": 0.1}}, "baseline": "a"}, "variant b: schedule.lr is not free"),
        ({"settings": {"name": "x"}}, "name is not free"),
        ({"baseline": "none"}, "baseline is 'none': it must be one of large, small, adamw"),
        ({"baseline": None}, "baseline is missing"),
        ({"varied": "optimizer.name"}, "varied is 'optimizer.name'"),
        ({"varied": "model.hidden_size"}, "varied is 'model.hidden_size'"),
        ({"rates": []}, "rates is missing"),
        ({"rates": ["fast"]}, "rates is ['fast']"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"folder": 3}, "folder is 3: it must be text"),
        ({"sizes": {}}, "unknown key 'sizes'"),
        ({"recipe": "none.yaml"}, "none.yaml"),
    ],
)
def test_bad_ablations_are_refused(write, refuses, keys, words):
    refuses(["ablate", write(**keys), "--dry-run"], words)


def test_invalid_ablation_files_are_refused(write, refuses, tmp_path):
    path = write()
    refuses(["ablate", path, "--draw-only"], "no results yet")
    refuses(["ablate", path, path], "two ablations have the folder")
    refuses(["ablate", tmp_path / "none.yaml"], "none.yaml cannot be read")
    path.write_text("- a\n")
    refuses(["ablate", path], "the top level must be a mapping")


def test_every_matrix_has_a_kind():
    from moonlight.config.load import load_recipe
    from moonlight.dist_checkpoint import hf_mapping
    from moonlight.placement.param_groups import MATRIX_GROUPS, find_monitor_group

    kinds = {"attention_qo": {"attention query", "attention output"}, "attention_kv": {"attention key-value"}}
    kinds |= {"router": {"router"}} | {name: {"MLP"} for name in ("experts", "shared_experts", "dense")}
    for settings in ([], ["model.q_lora_rank=16"]):
        model_config = load_recipe(ROOT / "configs" / "scaling" / "recipes" / "cpu.yaml", settings).model
        matrix_kinds = {name: set() for name in MATRIX_GROUPS}
        for row in hf_mapping.tensor_mappings(model_config):
            for part in row.hf_tensors:
                if part.init_kind == "matrix" and (group := find_monitor_group(row.key)) in MATRIX_GROUPS:
                    matrix_kinds[group].add(matrix_kind(part.name))
        assert matrix_kinds == kinds
