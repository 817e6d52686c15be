"""Ladders: their pending runs, resuming after interruptions, and errors for bad files and bad runs."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.data.prepare import prepare
from moonlight.errors import UserError
from moonlight.studies.ladder import OPTIMIZERS, Ladder, LadderRun, load_ladder
from moonlight.studies.results import StudyResult, read_results, write_results
from moonlight.studies.scaling_text import best_losses, grid_table, ladder_caveats
from moonlight.studies.train import divergence
from tests.support.bad_input import check_line
from tests.support.studies import call, call_interrupted, ended, steps_of, write_recipe

SIZES = {"small": {"model.hidden_size": 32}, "large": {"model.hidden_size": 48}, "huge": {"model.hidden_size": 64}}


@pytest.fixture
def write(tmp_path, data_folder, tokenizer_folder):
    """Return a function that writes a ladder of dense models of a small recipe and returns its path."""
    write_recipe(tmp_path / "recipe.yaml", data_folder, tokenizer_folder, first_k_dense_replace=4)

    def make(**keys):
        tree = {"name": "test", "recipe": "recipe.yaml", "rates": [0.004, 0.008, 0.016], "sizes": SIZES}
        path = tmp_path / "ladder.yaml"
        path.write_text(yaml.safe_dump(tree | {"folder": str(tmp_path / "scaling")} | keys))
        return path

    return make


def result(point, loss, flops=1e12):
    diverged = "" if math.isfinite(loss) else "the loss is not finite"
    return StudyResult(
        point=point,
        diverged=diverged,
        loss=None if diverged else loss,
        steps=4,
        tokens=1024,
        flops=flops,
        seconds=1.0,
        svd_entropy={},
    )


def make_loss(point, best):
    """Return a loss that is quadratic in the log learning rate, with a small offset per seed."""
    return 4.0 + math.log2(point.rate / best[point.optimizer]) ** 2 + 0.01 * point.seed


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 0.1), st.floats(1e-3, 0.1), st.randoms(use_true_random=False))
def test_any_order_of_results_leads_to_the_same_runs(muon, adamw, random):
    rates = {"rates": (0.004, 0.008, 0.016), "most_rates": 30, "seeds": (1, 2, 3)}
    ladder = Ladder(path=Path("ladder.yaml"), name="test", recipe="recipe.yaml", sizes=SIZES, **rates)
    best = {"muon": muon, "adamw": adamw}
    outcomes = []
    for shuffled in (False, True):
        losses = {}
        while missing := ladder.pending_runs(losses):
            assert not losses.keys() & set(missing)
            point = random.choice(missing) if shuffled else missing[0]
            losses[point] = make_loss(point, best)
        outcomes.append(losses)
    assert outcomes[0] == outcomes[1]
    for size in SIZES:
        for name in OPTIMIZERS:
            rates = sorted(
                point.rate for point in outcomes[0] if (point.size, point.optimizer, point.seed) == (size, name, 1)
            )
            chosen = {
                point.rate for point in outcomes[0] if (point.size, point.optimizer, point.seed) == (size, name, 3)
            }
            assert len(chosen) == 1 and rates[0] < min(chosen) < rates[-1]


def test_diverged_runs_are_reported_and_left_out(write):
    ladder = load_ladder(write(seeds=[1, 2]))
    best = {"muon": 0.008, "adamw": 0.008}
    results = {}
    while missing := ladder.pending_runs({point: r.loss or math.inf for point, r in results.items()}):
        for point in missing:
            bad = point.rate > 0.01 or (point.size == "huge" and point.optimizer == "adamw" and point.seed == 2)
            results[point] = result(point, math.inf if bad else make_loss(point, best))
    cells = best_losses(ladder, results)
    assert cells["muon"]["huge"].losses == (4.01, 4.02)
    assert cells["adamw"]["huge"].losses == (4.01,)
    caveats = ladder_caveats(ladder, results)
    assert sum("diverged" in line for line in caveats) == 7
    assert any(line.startswith("huge-adamw-lr0.008-seed2 diverged") for line in caveats)
    assert not any("not yet an optimum" in line for line in caveats)
    assert grid_table(ladder, results).count("diverged") == 7


def test_a_best_rate_at_the_edge_is_reported(write):
    ladder = load_ladder(write(most_rates=3, seeds=[1]))
    results = {
        point: result(point, make_loss(point, {"muon": 0.1, "adamw": 0.008})) for point in ladder.pending_runs({})
    }
    caveats = ladder_caveats(ladder, results)
    assert sum("Muon is best at 0.016, the upper edge of the grid: not yet an optimum" in line for line in caveats) == 3
    assert len(caveats) == 3


def test_results_are_kept_and_results_of_other_settings_refused(write):
    ladder = load_ladder(write())
    results = {point: result(point, 4.5) for point in ladder.pending_runs({})[:3]}
    write_results(ladder, results)
    assert read_results(ladder) == results
    # In results older than a setting, the setting has its default.
    file = ladder.folder_path / "results.json"
    content = json.loads(file.read_text())
    for size_settings in content["settings"].values():
        del size_settings["optimizer.rms_matching"]
    file.write_text(json.dumps(content))
    assert read_results(ladder) == results
    # A longer grid, more seeds and more sizes keep the existing results.
    more = load_ladder(write(rates=[0.002, 0.004], seeds=[1, 2, 3], sizes=SIZES | {"more": {"train.train_steps": 9}}))
    assert read_results(more) == results
    for keys, words in (
        ({"sizes": SIZES | {"large": {"model.hidden_size": 40}}}, "model.hidden_size is 48 in the file and 40 now"),
        ({"settings": {"train.train_steps": 8}}, "train.train_steps is 4 in the file and 8 now"),
        ({"sizes": {"small": SIZES["small"]}}, "another ladder"),
    ):
        with pytest.raises(UserError, match=words):
            read_results(load_ladder(write(**keys)))


def test_results_of_other_text_are_refused(write):
    ladder = load_ladder(write())
    write_results(ladder, {point: result(point, 4.5) for point in ladder.pending_runs({})[:1]})
    path = ladder.folder_path / "results.json"
    content = json.loads(path.read_text())
    ((name, digest),) = content["data"].items()
    path.write_text(json.dumps(content | {"data": {name: digest[::-1]}}))
    with pytest.raises(UserError, match=f"different text: the checksum of {name}"):
        read_results(ladder)


CORRUPT = '{"version": %s, "settings": {}, "data": {}, "points": %s}'


@pytest.mark.parametrize("content", ["", "[]", "{", '{"version": 1}', CORRUPT % (9, "[]"), CORRUPT % (1, "[{}]")])
def test_corrupt_results_are_refused(write, content):
    ladder = load_ladder(write())
    ladder.folder_path.mkdir(parents=True)
    (ladder.folder_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=r"results\.json"):
        read_results(ladder)


@pytest.mark.parametrize("change", [{"optimizer": "sgd"}, {"loss": -3.0}, {"loss": 0.0}, {"seed": 2}])
def test_impossible_results_are_refused(write, change):
    """Refused are an unknown optimizer, a loss that is not positive, and two results of one run (seed 2)."""
    ladder = load_ladder(write(seeds=[1, 2]))
    first = ladder.pending_runs({})[0]
    write_results(ladder, {point: result(point, 4.5) for point in (first, replace(first, seed=2))})
    assert len(read_results(ladder)) == 2
    path = ladder.folder_path / "results.json"
    content = json.loads(path.read_text())
    content["points"][0] |= change
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="an entry of its points cannot be read"):
        read_results(ladder)


@pytest.mark.parametrize(
    "keys, words",
    [
        ({"sizes": {"a": {"model.hiden_size": 3}}}, "model.hidden_size"),
        ({"rates": [0.1, -1]}, "rates is"),
        ({"rates": [0.1, 0.1]}, "rates is"),
        ({"seeds": []}, "seeds"),
        ({"seeds": [1.5]}, "seeds is"),
        ({"factor": 1}, "factor is 1"),
        ({"most_rates": 2}, "most_rates is 2"),
        ({"sizes": []}, "sizes is missing"),
        ({"sizes": {"a": 3}}, "sizes is"),
        ({"nmae": "x"}, "unknown key 'nmae'"),
        ({"name": "a/b"}, "one folder name"),
        ({"recipe": "none.yaml"}, "none.yaml"),
        ({"settings": {"schedule.lr": 0.1}}, "schedule.lr is not free: the ladder"),
        ({"sizes": {"a": SIZES["small"], "b": SIZES["small"]}}, "sizes a and b are the same run"),
    ],
)
def test_bad_ladders_are_refused(write, refuses, keys, words):
    refuses(["scaling", write(**keys)], words)


def test_too_few_results_for_a_fit(write, refuses):
    path = write(sizes={"small": SIZES["small"]}, most_rates=3, seeds=[1])
    ladder = load_ladder(path)
    refuses(["scaling", path, "--fit-only"], "no results yet")
    write_results(ladder, {point: result(point, 4.5) for point in ladder.pending_runs({})})
    process = call("scaling", path, "--fit-only")
    check_line(process.returncode, process.stderr, ["1 sizes", "at least 3"])


def test_conditions_of_divergence(write):
    ladder = load_ladder(write())
    config = ladder.make_config(LadderRun("small", "muon", 0.004, 1))
    entry = {"step": 4, "optim/skipped_steps": 0, "loss/held_out": 5.0}
    assert divergence([entry], config) == ""
    assert "not finite" in divergence([entry | {"loss/held_out": math.nan}], config)
    assert "guessing" in divergence([entry | {"loss/held_out": 6.94}], config)
    config = replace(config, train=replace(config.train, train_steps=40))
    steps = [{"step": step, "optim/skipped_steps": max(0, step - 5)} for step in range(1, 16)]
    assert "no finite step" in divergence(steps, config)
    assert divergence(steps[:-1], config) == ""  # the run ended for another reason
    assert divergence([], config) == ""


@pytest.mark.slow
def test_interrupted_ladder_resumes_and_trains_no_run_twice(write, small_corpus, tokenizer_folder, tmp_path):
    """A ladder killed after its first result and stopped after its second keeps all finished runs."""
    small = SIZES["small"] | {"train.train_steps": 40}  # fewer steps give losses that count as diverged
    data = tmp_path / "data"  # unlike in `data_folder`, held-out text resembles the training text
    prepare([small_corpus], tokenizer_folder, data, validation_share=0.5)
    path = write(
        sizes={"small": small},
        rates=[0.004, 0.008],
        most_rates=2,
        seeds=[1],
        side_by_side=2,
        settings={"data.path": str(data)},
    )
    ladder = load_ladder(path)
    process = call_interrupted(ladder, "scaling", path)
    check_line(process.returncode, process.stderr, ["1 sizes"])
    assert len(ended(ladder)) == 4
    again = call("scaling", path)
    assert "all done" in again.stdout and again.returncode == 2
    # Only each optimizer's best run keeps its checkpoints.
    assert len(list((ladder.folder_path / "points").glob("*/checkpoints"))) == 2
    spectra = json.loads((ladder.folder_path / "svd_entropy.json").read_text())
    assert len(spectra) == 2
    for entropies in spectra.values():
        assert len(entropies) == 4 * 7 and all(0.5 < value <= 1 for value in entropies.values())
    assert "| attention_qo | 8 |" in again.stdout and "| dense | 12 |" in again.stdout
    assert (ladder.folder_path / "svd_entropy.png").read_bytes().startswith(b"\x89PNG")
    for name in ended(ladder):
        assert steps_of(ladder, name) == list(range(1, 41))
