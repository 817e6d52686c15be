"""Data sets of the tasks: from the Hub, a local folder, or our own beside the task. Missing ones are named first."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from moonlight.errors import UserError

TASKS = Path(__file__).with_name("tasks")


def self_made(name: str, **_: Any) -> Any:
    """The data set of `eval/tasks/<name>.jsonl`: a row's `split`, by default test, says where it belongs.

    The harness calls this for tasks with `custom_dataset`.
    """
    from datasets import Dataset, DatasetDict

    splits: dict[str, list[dict[str, Any]]] = {}
    for line in (TASKS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        splits.setdefault(row.pop("split", "test"), []).append(row)
    return DatasetDict({split: Dataset.from_list(rows) for split, rows in splits.items()})


def leaves(index: Mapping[str, Any], task: str) -> Iterable[dict[str, Any]]:
    """Configurations of the tasks that a task, group or tag of the harness consists of, from its index by name."""
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
    """Data sets on the Hub (owner/name) that a task needs, each once."""
    paths = [config["dataset_path"] for config in leaves(index, task) if "custom_dataset" not in config]
    return list(dict.fromkeys(paths))


def check_local(wanted: Mapping[str, Sequence[str]], data_dir: Path) -> None:
    """Raise UserError unless every data set, given by benchmark, has its folder below `data_dir`."""
    missing = [(title, name) for title, names in wanted.items() for name in names if not (data_dir / name).is_dir()]
    if missing:
        title, name = missing[0]
        rest = [name for _, name in missing[1:]]
        others = f"; also missing: {', '.join(rest)}" if rest else ""
        raise UserError(
            f"{title} needs the data set {name}: put it into {data_dir / name} ({how_to_get(name, data_dir)}){others}"
        )


def local_copy(name: str, data_dir: Path) -> dict[str, Any]:
    """What a task's configuration needs to take a data set from a folder.

    `datasets` keeps what it has read under the folder's name, and takes that for any folder of the name. Here each has
    a cache of its own, for its files as they are now.
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
    """What is said of a data set that could not be loaded, or lacks what the benchmark needs.

    `untried` are those that would have come next.
    """
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    if "scripts are no longer supported" in reason:
        return UserError(
            f"{title}: the data set {name} is a script ({reason}), which is never run: put its files into "
            f"{data_dir / name if data_dir else f'DIR/{name} and give --data-dir DIR'}, as docs/evaluation.md shows"
        )
    if data_dir is not None:
        return UserError(
            f"{title}: {data_dir / name} does not hold the data set {name} ({reason}): {how_to_get(name, data_dir)}"
        )
    others = f"; needed too, and not tried: {', '.join(untried)}" if untried else ""
    return UserError(
        f"{title} needs the data set {name}, which is not here and did not come from the Hub ({reason}): "
        f"{how_to_get(name)} where there is a network, and give --data-dir DIR{others}"
    )


def how_to_get(name: str, data_dir: Path | None = None) -> str:
    """The command that copies a data set into a folder."""
    return f"hf download {name} --repo-type dataset --local-dir {data_dir or 'DIR'}/{name}"
