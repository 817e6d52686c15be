"""The file of results of a study: one entry for every run that has ended, written whole after each."""

import dataclasses
import json
import math
from collections.abc import Mapping
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
_SINCE = {"optimizer.rms_matching": "adjusted_lr"}
"""Settings that results of before them lack, and what they were meanwhile."""


@dataclass(frozen=True, kw_only=True)
class StudyResult(Generic[P]):
    """What a run of a study came to."""

    point: P
    diverged: str
    """Why it counts as diverged; empty if it does not."""
    loss: float | None
    """Over all held-out text, nats per token; None if it diverged."""
    steps: int
    tokens: int
    flops: float
    """Of the model in training, by `moonlight.plan.flops`."""
    seconds: float
    """Of its steps, by the clock."""
    svd_entropy: dict[str, float]
    """By group of matrices, the last that was watched."""
    update_rms: dict[str, float] = field(default_factory=dict)
    """By group of parameters, of the last step's update before the learning rate."""
    curve: list[list[float]] = field(default_factory=list)
    """Tokens seen, and the mean training loss since the point before: nats per token."""


def group_settings(study: Study[P], group: str) -> dict[str, Any]:
    """All that decides what the runs of a group come to, besides their point."""
    every = flatten(dataclasses.asdict(study.make_config(study.representative_run(group))))
    free = MUTABLE_SETTINGS | study.run_keys
    return {key: value for key, value in every.items() if not {key, key.split(".")[0]} & free}


def data_checksums(study: Study[P]) -> dict[str, str]:
    """Checksum of the text behind each source that is prepared here."""
    sources = study.first_run().data.mixture
    folders = {name: Path(source.path) for name, source in sources.items() if Path(source.path).is_dir()}
    return {name: str(load_manifest(folder).get("inputs_sha256", "")) for name, folder in folders.items()}


def read_results(study: Study[P]) -> dict[P, StudyResult[P]]:
    """What there is of a study, by point.

    Raises:
        UserError: the file is damaged, or of a study with other settings; the first that differs is named.
    """
    path = study.folder_path / RESULTS_FILE
    if not path.exists():
        return {}
    content = read_json(path, ("version", "settings", "data", "points"))
    if content["version"] != VERSION:
        raise UserError(f"{path} has version {content['version']}: this program reads version {VERSION}")
    try:
        results = [_from_entry(study, entry) for entry in content["points"]]
        there: dict[str, dict[str, Any]] = dict(content["settings"])
        assert isinstance(content["data"], dict)
        for result in results:
            number = result.loss is None or 0 < result.loss < math.inf
            assert number and (result.loss is None) == bool(result.diverged) and result.point.group in there
        assert len({result.point for result in results}) == len(results)
    except (KeyError, TypeError, ValueError, AssertionError):
        raise UserError(f"{path} is damaged: an entry of its points cannot be read; remove it to begin again") from None
    for name, digest in data_checksums(study).items():
        if content["data"].get(name, digest) != digest:
            raise UserError(
                f"{path} is of other text: that of {name} has checksum {str(content['data'][name])[:12]} there and "
                f"{digest[:12]} now; give this {study.kind} another name, or remove that folder"
            )
    for group, before in there.items():
        if group not in study.groups:
            raise UserError(
                f"{path} is of another {study.kind}: it has the {study.part} {group}, {study.path} has "
                f"{', '.join(study.groups)}; give this one another name"
            )
        now, before = json.loads(json.dumps(group_settings(study, group))), _SINCE | before
        for key in before | now:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{path} is of another recipe: at {study.part} {group}, {key} is {before.get(key)!r} there and "
                    f"{now.get(key)!r} now; give this {study.kind} another name, or remove that folder"
                )
    return {result.point: result for result in results}


def _from_entry(study: Study[P], entry: Mapping[str, Any]) -> StudyResult[P]:
    names = [one.name for one in dataclasses.fields(study.point_type)]
    point = study.point_type(**{name: entry[name] for name in names})
    return StudyResult(point=point, **{key: value for key, value in entry.items() if key not in names})


def write_results(study: Study[P], results: Mapping[P, StudyResult[P]]) -> None:
    """Write all results, in one step."""
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


def losses(results: Mapping[P, StudyResult[P]]) -> dict[P, float]:
    """Loss by point, infinite where a run diverged."""
    return {point: math.inf if result.loss is None else result.loss for point, result in results.items()}
