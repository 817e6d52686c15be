"""Data sets of the tasks: from the Hub, from a local folder, or from a file in `eval/tasks/`."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moonlight.errors import UserError

TASKS = Path(__file__).with_name("tasks")


def self_made(name: str, **_: Any) -> Any:
    """Load the data set `eval/tasks/<name>.jsonl`; the field `split` of a row names its split, by default test.

    The harness calls this for tasks with `custom_dataset`.
    """
    from datasets import Dataset, DatasetDict

    splits: dict[str, list[dict[str, Any]]] = {}
    for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        splits.setdefault(row.pop("split", "test"), []).append(row)
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def leaves(index: Mapping[str, Any], task: str) -> Iterable[dict[str, Any]]:
    """Yield the configurations of all tasks in a task, group or tag of the harness.

    Args:
        index: index of the harness, by name.
    """
    config = index[task].cfg
    if config is None:  # a tag: a name for several tasks
        for member in sorted(index[task].tags):
            yield from leaves(index, member)
        return
    if "group" not in config:
        yield config
        return
    for member in config["task"]:
        yield from leaves(index, member if isinstance(member, str) else member.get("task") or member["group"])


def hub_names(index: Mapping[str, Any], task: str) -> list[str]:
    """Return the Hub names (owner/name) of the data sets of a task, each once."""
    paths = [config["dataset_path"] for config in leaves(index, task) if "custom_dataset" not in config]
    return list(dict.fromkeys(paths))


def check_local(names_by_title: Mapping[str, Sequence[str]], data_dir: Path) -> None:
    """Raise UserError unless every data set, listed by benchmark title, has its folder in `data_dir`."""
    missing = [
        (title, name) for title, names in names_by_title.items() for name in names if not (data_dir / name).is_dir()
    ]
    if missing:
        title, name = missing[0]
        others = f"; also missing: {', '.join(name for _, name in missing[1:])}" if missing[1:] else ""
        raise UserError(
            f"{title} needs the data set {name}: put it into {data_dir / name} ({how_to_get(name, data_dir)}){others}"
        )


def local_copy(name: str, data_dir: Path) -> dict[str, Any]:
    """Return the changes of a task's configuration that read a data set from a folder.

    `datasets` caches by folder name only, so two folders of the same name would share a cache. Here the cache depends
    on the path and the current files of the folder.
    """
    import datasets

    folder = (data_dir / name).resolve()
    files = sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*.*"))
    digest = hashlib.sha256(json.dumps([str(folder), files]).encode()).hexdigest()[:16]
    cache = Path(datasets.config.HF_DATASETS_CACHE) / f"moonlight-{digest}"
    return {"dataset_path": str(folder), "dataset_kwargs": {"cache_dir": str(cache)}}


def unreachable(
    title: str, name: str, error: Exception, data_dir: Path | None, untried: Sequence[str] = ()
) -> UserError:
    """Return the error for a data set that cannot be loaded, or that lacks data of the benchmark.

    `untried` are the data sets that were not tried because of the error.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "scripts are no longer supported" in reason:
        return UserError(
            f"{title}: the data set {name} is a script ({reason}), which is not run: put its files into "
            f"{data_dir / name if data_dir else f'DIR/{name} and give --data-dir DIR'}, as docs/evaluation.md shows"
        )
    if data_dir is not None:
        return UserError(
            f"{title}: {data_dir / name} is not the data set {name} ({reason}): {how_to_get(name, data_dir)}"
        )
    others = f"; also needed, and not tried: {', '.join(untried)}" if untried else ""
    return UserError(
        f"{title} needs the data set {name}, which is not cached and cannot be loaded from the Hub ({reason}): run "
        f"{how_to_get(name)} on a machine with network, and give --data-dir DIR{others}"
    )


def how_to_get(name: str, data_dir: Path | None = None) -> str:
    """Return the command that downloads a data set to a folder."""
    return f"hf download {name} --repo-type dataset --local-dir {data_dir or 'DIR'}/{name}"
