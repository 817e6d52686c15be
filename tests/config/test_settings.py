"""The settings page must have every key and be up to date."""

import dataclasses
from pathlib import Path

import pytest

from moonlight.config.checks import field_types
from moonlight.config.optimizer import OptimizerConfig
from moonlight.config.settings import field_docstrings, list_sections, settings_page
from moonlight.config.train import TrainConfig
from moonlight.errors import UserError

ROOT = Path(__file__).parents[2]


def test_the_page_is_up_to_date():
    page = (ROOT / "docs/settings.md").read_text(encoding="utf-8")
    assert page == settings_page(list_sections()), "run: moonlight settings --markdown > docs/settings.md"


def test_every_key_has_a_description():
    """The class describes a section; every other key must have a docstring."""
    missing = [
        f"{section.name}.{setting.name}"
        for section in list_sections()
        for setting in section.keys
        if not setting.meaning
    ]
    assert not missing
    assert set(field_docstrings(TrainConfig)) == {field.name for field in dataclasses.fields(TrainConfig)}


def test_a_row_has_type_default_unit_and_meaning():
    rows = {f"{section.name}.{row.name}": row for section in list_sections() for row in section.keys}
    assert rows["optimizer.name"].type == "`muon`, `adamw`" and rows["optimizer.name"].default == "muon"
    assert rows["train.grace_seconds"].unit == "s" and rows["train.grace_seconds"].type == "float, greater than 0"
    assert rows["train.global_batch_size"].default == "" and rows["train.global_batch_size"].unit == "sequences"
    assert rows["model.q_lora_rank"].type == "int, greater than 0, or null"
    assert rows["train.batch_growth.N.after_tokens"].unit == "tokens"


@pytest.mark.parametrize("name", [name for name, kind in field_types(OptimizerConfig).items() if kind.choices])
def test_an_unknown_choice_is_refused_and_the_choices_are_named(name):
    choices = field_types(OptimizerConfig)[name].choices
    with pytest.raises(
        UserError, match=f"optimizer.{name} is 'nonsense': accepted are {', '.join(map(repr, choices))}"
    ):
        OptimizerConfig(**{name: "nonsense"})
