"""The results file of a study: one entry for every finished run, rewritten atomically after each run."""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic

from moonlight.data.manifest import load_manifest
from moonlight.errors import UserError
from moonlight.files import make_folder, read_json, write_json
from moonlight.studies.study import P, Study
from moonlight.train.run_folder import MUTABLE_SETTINGS, flatten

RESULTS_FILE = "results.json"
VERSION = 1
_ADDED_SETTINGS = {"optimizer.rms_matching": "adjusted_lr"}
"""Settings missing from older results files, with the value that they had then."""


@dataclass(frozen=True, kw_only=True)
class StudyResult(Generic[P]):
    """Result of one run of a study. Field names are keys of results.json."""

    point: P
    diverged: str
    """Why the run counts as diverged; empty if it did not diverge."""
    loss: float | None
    """Loss over all held-out text, nats per token; None if the run diverged."""
    steps: int
    tokens: int
    flops: float
    """Training FLOPs of the model, from `moonlight.plan.flops`."""
    seconds: float
    """Wall time of all steps."""
    svd_entropy: dict[str, float]
    """By group of matrices, last monitored value."""
    update_rms: dict[str, float] = field(default_factory=dict)
    """By group of parameters, RMS of the last step's update before the learning rate."""
    curve: list[list[float]] = field(default_factory=list)
    """[tokens, mean training loss since the previous entry in nats per token]."""


def group_settings(study: Study[P], group: str) -> dict[str, Any]:
    """Return all settings that determine the results of a group's runs, without those that vary between its runs."""
    settings = flatten(dataclasses.asdict(study.make_config(study.representative_run(group))))
    excluded = MUTABLE_SETTINGS | study.run_keys
    return {key: value for key, value in settings.items() if not {key, key.split(".")[0]} & excluded}


def data_checksums(study: Study[P]) -> dict[str, str]:
    """Return the checksum of the input text of each data source that is prepared on this machine."""
    sources = study.first_config().data.mixture
    folders = {name: Path(source.path) for name, source in sources.items() if Path(source.path).is_dir()}
    return {name: str(load_manifest(folder).get("inputs_sha256", "")) for name, folder in folders.items()}


def read_results(study: Study[P]) -> dict[P, StudyResult[P]]:
    """Return the stored results by run; empty without a results file.

    Raises:
        UserError: the file is corrupt, or its study has different text or settings; the message names the first
            difference.
    """
    path = study.folder_path / RESULTS_FILE
    if not path.exists():
        return {}
    content = read_json(path, ("version", "settings", "data", "points"))
    if content["version"] != VERSION:
        raise UserError(
            f"{path} has version {content['version']}: the supported version is {VERSION}; rename this {study.kind}"
        )
    try:
        results = [_from_entry(study, entry) for entry in content["points"]]
        stored_settings: dict[str, dict[str, Any]] = dict(content["settings"])
        assert isinstance(content["data"], dict)
        for result in results:
            is_valid = result.loss is None or 0 < result.loss < math.inf
            assert is_valid and (result.loss is None) == bool(result.diverged) and result.point.group in stored_settings
        assert len({result.point for result in results}) == len(results)
    except (KeyError, TypeError, ValueError, AssertionError):
        raise UserError(f"{path} is corrupt: an entry of its points cannot be read; remove it to start again") from None
    for name, digest in data_checksums(study).items():
        if content["data"].get(name, digest) != digest:
            raise UserError(
                f"{path} has results of different text: the checksum of {name} is "
                f"{str(content['data'][name])[:12]} in the file and "
                f"{digest[:12]} now; rename this {study.kind}, or remove that folder"
            )
    for group, stored in stored_settings.items():
        if group not in study.groups:
            raise UserError(
                f"{path} has results of another {study.kind}: it has the {study.part} {group}, {study.path} has "
                f"{', '.join(study.groups)}; rename this {study.kind}"
            )
        current, stored = json.loads(json.dumps(group_settings(study, group))), _ADDED_SETTINGS | stored
        for key in stored | current:
            if stored.get(key) != current.get(key):
                raise UserError(
                    f"{path} has results of another recipe: at {study.part} {group}, {key} is {stored.get(key)!r} "
                    f"in the file and {current.get(key)!r} now; rename this {study.kind}, or remove that folder"
                )
    return {result.point: result for result in results}


def _from_entry(study: Study[P], entry: Mapping[str, Any]) -> StudyResult[P]:
    names = [field.name for field in dataclasses.fields(study.point_type)]
    point = study.point_type(**{name: entry[name] for name in names})
    return StudyResult(point=point, **{key: value for key, value in entry.items() if key not in names})


def write_results(study: Study[P], results: Mapping[P, StudyResult[P]]) -> None:
    """Write all results atomically."""
    entries = [dataclasses.asdict(result) for result in results.values()]
    content = {
        "version": VERSION,
        study.kind: study.name,
        "settings": {group: group_settings(study, group) for group in study.groups},
        "data": data_checksums(study),
        "points": [entry.pop("point") | entry for entry in entries],
    }
    make_folder(study.folder_path)
    write_json(study.folder_path / RESULTS_FILE, content)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(header), *lines[1:]])


def losses(results: Mapping[P, StudyResult[P]]) -> dict[P, float]:
    """Return the loss by run; infinite if the run diverged."""
    return {point: math.inf if result.loss is None else result.loss for point, result in results.items()}
