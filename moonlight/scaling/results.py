"""The file of results of a ladder: one entry for every run that has ended, written whole after each."""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from moonlight.data.manifest import load_manifest
from moonlight.errors import UserError
from moonlight.files import make_folder, read_json, write_json
from moonlight.scaling.ladder import Ladder, Point
from moonlight.train.run_folder import FREE_TO_CHANGE, flat

RESULTS_FILE = "results.json"
VERSION = 1
OF_THE_POINT = frozenset({"name", "optimizer.name", "schedule.lr", "train.seed"})
"""Settings in which the points of one size differ."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a run of the ladder came to."""

    size: str
    optimizer: str
    rate: float
    seed: int
    diverged: str
    """Why it counts as diverged; empty if it does not."""
    loss: float | None
    """Over all held-out text, nats per token; None if it diverged."""
    steps: int
    tokens: int
    flops: float
    """Of the model in training, by `moonlight.flops`."""
    seconds: float
    """Of its steps, by the clock."""
    svd_entropy: dict[str, float]
    """By group of matrices, the last that was watched."""

    @property
    def point(self) -> Point:
        return Point(self.size, self.optimizer, self.rate, self.seed)


def settings_of(ladder: Ladder, size: str) -> dict[str, Any]:
    """All that decides what the runs of a size come to, besides their point."""
    every = flat(dataclasses.asdict(ladder.run(ladder.first_point(size))))
    free = FREE_TO_CHANGE | OF_THE_POINT
    return {key: value for key, value in every.items() if not {key, key.split(".")[0]} & free}


def data_of(ladder: Ladder) -> dict[str, str]:
    """Checksum of the text behind each source that is prepared here."""
    sources = ladder.run(ladder.first_point(next(iter(ladder.sizes)))).data.mixture
    folders = {name: Path(source.path) for name, source in sources.items() if Path(source.path).is_dir()}
    return {name: str(load_manifest(folder).get("inputs_sha256", "")) for name, folder in folders.items()}


def read_results(ladder: Ladder) -> dict[Point, Result]:
    """What there is of a ladder, by point.

    Raises:
        UserError: the file is damaged, or of a ladder with other settings; the first that differs is named.
    """
    path = ladder.home / RESULTS_FILE
    if not path.exists():
        return {}
    content = read_json(path, ("version", "settings", "data", "points"))
    if content["version"] != VERSION:
        raise UserError(f"{path} has version {content['version']}: this program reads version {VERSION}")
    try:
        results = [Result(**entry) for entry in content["points"]]
        there: dict[str, dict[str, Any]] = dict(content["settings"])
        assert isinstance(content["data"], dict)
        for result in results:
            number = result.loss is None or math.isfinite(result.loss)
            assert number and (result.loss is None) == bool(result.diverged) and result.size in there
    except (TypeError, ValueError, AssertionError):
        raise UserError(f"{path} is damaged: an entry of its points cannot be read; remove it to begin again") from None
    for name, digest in data_of(ladder).items():
        if content["data"].get(name, digest) != digest:
            raise UserError(
                f"{path} is of other text: that of {name} has checksum {str(content['data'][name])[:12]} there and "
                f"{digest[:12]} now; give this ladder another name, or remove that folder"
            )
    for size, before in there.items():
        if size not in ladder.sizes:
            raise UserError(
                f"{path} is of another ladder: it has the size {size}, {ladder.path} has {', '.join(ladder.sizes)}; "
                "give this one another name"
            )
        now = json.loads(json.dumps(settings_of(ladder, size)))
        for key in before | now:
            if before.get(key) != now.get(key):
                raise UserError(
                    f"{path} is of another recipe: at size {size}, {key} is {before.get(key)!r} there and "
                    f"{now.get(key)!r} now; give this ladder another name, or remove that folder"
                )
    return {result.point: result for result in results}


def write_results(ladder: Ladder, results: Mapping[Point, Result]) -> None:
    """Write all results, in one step."""
    content = {
        "version": VERSION,
        "ladder": ladder.name,
        "settings": {size: settings_of(ladder, size) for size in ladder.sizes},
        "data": data_of(ladder),
        "points": [asdict(result) for result in results.values()],
    }
    make_folder(ladder.home)
    write_json(ladder.home / RESULTS_FILE, content)


def losses(results: Mapping[Point, Result]) -> dict[Point, float]:
    """Loss by point, infinite where a run diverged."""
    return {point: math.inf if result.loss is None else result.loss for point, result in results.items()}
