"""Recipes: every shipped recipe must load and resolve to itself; errors must name the key."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moonlight.config.load import load_recipe, parse_run_config, to_yaml
from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError

ROOT = Path(__file__).parents[2]
STUDIES = [ROOT / "configs" / name for name in ("scaling", "ablations")]
RECIPES = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent not in STUDIES)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipe_resolves_to_itself(path, tmp_path):
    config = load_recipe(path)
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_recipe(resolved) == config
    config.check_batches(config.parallel.num_processes)


def test_base_and_overrides_apply_in_order(tmp_path):
    recipe = tmp_path / "child.yaml"
    recipe.write_text(f"base: {ROOT / 'configs' / 'quickstart.yaml'}\nname: child\ntrain:\n  seed: 7\n")
    config = load_recipe(recipe, ["train.seed=8", "schedule.lr=1e-4"])
    parent = load_recipe(ROOT / "configs" / "quickstart.yaml")
    assert (config.name, config.train.seed, config.schedule.lr) == ("child", 8, 1e-4)
    assert config.model == parent.model


def test_circular_base_is_refused(tmp_path):
    recipe = tmp_path / "self.yaml"
    recipe.write_text("base: self.yaml\n")
    with pytest.raises(UserError, match="includes itself"):
        load_recipe(recipe)


def test_missing_key_is_named():
    with pytest.raises(UserError, match="recipe key model is missing"):
        parse_run_config({"name": "x"})


@settings(max_examples=200, deadline=None)
@given(
    warmup=st.integers(0, 50),
    total=st.integers(51, 500),
    decay=st.sampled_from(["cosine", "linear", "constant"]),
    floor=st.floats(0, 1),
)
def test_learning_rate_rises_to_its_peak_and_falls_to_its_floor(warmup, total, decay, floor):
    schedule_overrides = [
        f"schedule.{key}={value}" for key, value in (("lr", 1.0), ("min_lr", floor), ("decay", decay))
    ]
    overrides = [*schedule_overrides, f"schedule.warmup_steps={warmup}", f"train.train_steps={total}"]
    schedule = RunSchedule(load_recipe(ROOT / "configs" / "quickstart.yaml", overrides))
    rates = [schedule.at(step).learning_rate for step in range(1, total + 1)]
    rising, falling = rates[:warmup], rates[warmup:]
    assert rising == sorted(rising) and (not rising or rising[-1] == 1.0)
    assert falling == sorted(falling, reverse=True)
    assert all(floor <= rate <= 1.0 for rate in falling)
    assert rates[-1] == (1.0 if decay == "constant" else pytest.approx(floor))


def test_a_model_may_be_all_dense_but_not_without_dense_layers():
    recipe = ROOT / "configs" / "quickstart.yaml"
    assert load_recipe(recipe).model.has_experts
    assert not load_recipe(recipe, ["model.first_k_dense_replace=4"]).model.has_experts
    for count in (0, 5):
        with pytest.raises(UserError, match=f"first_k_dense_replace is {count}: it must be from 1 to 4"):
            load_recipe(recipe, [f"model.first_k_dense_replace={count}"])
