"""`moonlight eval`: Hugging Face folders through a suite, results as JSON, table and curve. Finished parts are kept."""

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import harness, heldout, items, results
from eval.folder import context_length, read_hf_config
from eval.results import EvaluatedModel
from eval.suites import HELD_OUT, SUITES, Benchmark, select_benchmarks
from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, atomic_write_text, make_folder, sha256_checksum, write_json

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """What the command line asks for."""

    suite: str
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    data: tuple[Path, ...] = ()
    """Prepared folders, for the suite of held-out text."""
    backend: str = "transformers"
    dtype: str = "auto"
    batch_size: int = 8
    limit: int | None = None
    allow_code: bool = False
    sequence_length: int | None = None


@dataclass(frozen=True)
class EvalOutput:
    """What was measured, and where it was written."""

    out: Path
    table: str
    curve: Path | None


def evaluate(folders: Sequence[Path], options: EvalOptions, out: Path | None = None) -> EvalOutput:
    """Evaluate folders one after the other; what `out` holds of the same evaluation already is not done again.

    Returns:
        The folder of the results (by default `evaluation/<suite>` beside the first model, with a limit
        `evaluation/<suite>-first-<limit>`), the table, and the curve if at least two models say how many tokens they
        have seen.

    Raises:
        UserError: a name, an option, a folder or a data set cannot be used. Found before a model is loaded.
    """
    benchmarks = select_benchmarks(options.suite, options.tasks)
    _check(options)
    models = _models(folders)
    name = options.suite if options.limit is None else f"{options.suite}-first-{options.limit}"
    out = out or models[0].folder.resolve().parent / "evaluation" / name
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}: a file stands there, choose another folder")
    if options.suite == HELD_OUT:
        found = _held_out(models, options, out)
        table = results.held_out_table(models, found)
    else:
        left_out = [benchmark.name for benchmark in benchmarks if benchmark.runs_code and not options.allow_code]
        if left_out and (options.tasks or len(left_out) == len(benchmarks)):
            raise UserError(f"{', '.join(left_out)} executes code that the model writes: allow it with --allow-code")
        for name in left_out:
            print(f"{name}: not run, it executes code that the model writes; allow it with --allow-code", flush=True)
        asked = [benchmark for benchmark in benchmarks if benchmark.name not in left_out]
        found = _suite(models, asked, options, out)
        done = found[models[0].label]
        rows = [benchmark for benchmark in SUITES[options.suite] if benchmark.name in {*done, *left_out}]
        table = results.table(rows, models, found)
    record = [{"label": model.label, "tokens": model.tokens, "results": found[model.label]} for model in models]
    write_json(out / RESULTS_FILE, {"suite": options.suite, "models": record})
    atomic_write_text(out / TABLE_FILE, table)
    curve = out / results.CURVE_FILE
    drawn = results.draw_curve(curve, options.suite, models, found)
    return EvalOutput(out, table, curve if drawn else None)


def _check(options: EvalOptions) -> None:
    """Options that no suite can use, or not this one."""
    for name, value, accepted in (("backend", options.backend, harness.BACKENDS), ("dtype", options.dtype, DTYPES)):
        if value not in accepted:
            raise UserError(f"--{name} is {value!r}: accepted are {', '.join(accepted)}")
    for name, number in (("limit", options.limit), ("batch-size", options.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}: it must be at least 1")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError(f"--data-dir is {options.data_dir}: no such folder; it must hold data sets as OWNER/NAME")
    if options.suite == HELD_OUT:
        if not options.data:
            raise UserError("--suite heldout needs --data: a folder of `moonlight data prepare`")
        if options.backend != "transformers":
            raise UserError(f"--backend is {options.backend!r}: the suite {HELD_OUT} runs by transformers")
        if options.limit is not None:
            raise UserError(f"--limit is {options.limit}: the suite {HELD_OUT} reads all of its text")
    elif options.data:
        raise UserError(f"--data is for --suite {HELD_OUT}: the suite {options.suite} has data sets of its own")
    elif options.sequence_length is not None:
        raise UserError(f"--sequence-length is for --suite {HELD_OUT}: the suite {options.suite} has items of its own")


def _models(folders: Sequence[Path]) -> list[EvaluatedModel]:
    """The folders with labels that tell them apart, after a look at what must be in them."""
    models: list[EvaluatedModel] = []
    for folder in folders:
        read_hf_config(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"{folder} is no Hugging Face folder with a tokenizer: it has no tokenizer_config.json")
        place = folder.resolve()
        if place in {model.folder.resolve() for model in models}:
            raise UserError(f"{folder} is given twice: give each folder once")
        label = place.parent.name if place.name == "hf" else place.name
        if label in {model.label for model in models}:
            label = f"{place.parent.name}-{place.name}"
        if label in {model.label for model in models}:
            raise UserError(f"{folder} would be called {label} like another of the folders: rename one of them")
        models.append(EvaluatedModel(label, folder, _of_training(folder, "consumed_tokens")))
    return models


def _of_training(folder: Path, key: str) -> int | None:
    """A count that an export of ours states of its training."""
    try:
        count = json.loads((folder / "export.json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if type(count) is int else None


def _suite(
    models: Sequence[EvaluatedModel], benchmarks: Sequence[Benchmark], options: EvalOptions, out: Path
) -> dict[str, Any]:
    """Results of the harness by model and benchmark, those included that an earlier command left in `out`.

    Data is loaded before the first model, which may take long.
    """
    whole = SUITES[options.suite]
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    plans = {
        model.label: {
            b.name: _made_with(model, options) | {"task": b.task, "shots": b.shots, "data_dir": data_dir} for b in whole
        }
        for model in models
    }
    asked = {benchmark.name for benchmark in benchmarks}
    found = {label: _known(out / label, plan, asked) for label, plan in plans.items()}
    open_ones = [b for b in benchmarks if any(b.name not in found[model.label] for model in models)]
    loaded = harness.load_tasks(open_ones, options.data_dir) if open_ones else {}
    for model in models:
        context = context_length(model.folder)
        for benchmark in open_ones:
            longest = harness.longest_answer(loaded[benchmark.name])
            if context is not None and longest >= context:
                raise UserError(
                    f"{model.label} has a context of {context} tokens, {benchmark.title} lets it generate {longest}: "
                    "leave it out with --tasks"
                )
    for model in models:
        todo = [benchmark for benchmark in benchmarks if benchmark.name not in found[model.label]]
        if not todo:
            print(f"{model.label}: evaluated already", flush=True)
            continue
        dtype = harness.resolved_dtype(model.folder, options.dtype)
        lm = harness.load_harness_model(model.folder, options.backend, dtype, options.batch_size)
        make_folder(out / model.label)
        for benchmark in todo:
            start = time.monotonic()
            tasks = loaded[benchmark.name]
            outcome = harness.run_benchmark(
                lm, benchmark, tasks, limit=options.limit, backend=options.backend, allow_code=options.allow_code
            )
            answers = items.sample_items(benchmark, outcome.samples)
            atomic_write_text(out / model.label / f"{benchmark.name}.items.jsonl", items.to_lines(answers))
            entry = {
                "title": benchmark.title,
                "metric": benchmark.metric,
                "score": outcome.score,
                "stderr": outcome.stderr,
                "items": len(answers),
                "truncated": harness.count_truncated(lm, outcome.samples, tasks),
                "seconds": round(time.monotonic() - start, 1),
                "task_version": outcome.version,
                "made_with": plans[model.label][benchmark.name],
            }
            write_json(out / model.label / f"{benchmark.name}.json", entry)
            found[model.label][benchmark.name] = entry
            print(f"{model.label}, {benchmark.title}: {outcome.score:.4f} ({len(answers)} items)", flush=True)
        del lm
        harness.free_memory()
    shared = [b.name for b in whole if all(b.name in found[model.label] for model in models)]
    return {model.label: {name: found[model.label][name] for name in shared} for model in models}


def _held_out(models: Sequence[EvaluatedModel], options: EvalOptions, out: Path) -> dict[str, Any]:
    """Results of the suite of held-out text by model and data folder."""
    opened = {folder.resolve().name: heldout.open_held_out(folder) for folder in options.data}
    if len(opened) < len(options.data):
        raise UserError("--data has two folders of the same name: rename one of them")
    plans, lengths = {}, {}
    for model in models:
        context = context_length(model.folder)
        length = options.sequence_length
        if length is None:
            length = _of_training(model.folder, "sequence_length") or context
        if length is None:
            raise UserError(f"{model.folder / 'config.json'} states no context: give --sequence-length")
        if not 1 <= length <= (context or length):
            raise UserError(f"--sequence-length is {length}: it must be from 1 to the {context} of {model.label}")
        lengths[model.label] = length
        for data in opened.values():
            heldout.check_same_tokenizer(data, model.folder)
        plans[model.label] = {
            name: _made_with(model, options)
            | {"data_sha256": sha256_checksum(data.folder / "manifest.json"), "sequence_length": lengths[model.label]}
            for name, data in opened.items()
        }
    found = {label: _known(out / label, plan, set(plan)) for label, plan in plans.items()}
    for model in models:
        make_folder(out / model.label)
        for name, data in opened.items():
            if name in found[model.label]:
                print(f"{model.label}, {name}: evaluated already", flush=True)
                continue
            start = time.monotonic()
            measured = heldout.measure_bits_per_byte(
                model.folder,
                data,
                dtype=harness.resolved_dtype(model.folder, options.dtype),
                batch_size=options.batch_size,
                sequence_length=lengths[model.label],
            )
            entry = {
                "title": name,
                "metric": "bits_per_byte",
                "score": measured["bits_per_byte"],
                "loss": measured["loss"],
                "documents": data.documents,
                "tokens": data.tokens,
                "bytes": data.bytes,
                "compressed": data.compressed,
                "sequence_length": lengths[model.label],
                "seconds": round(time.monotonic() - start, 1),
                "made_with": plans[model.label][name],
            }
            write_json(out / model.label / f"{name}.json", entry)
            found[model.label][name] = entry
            print(f"{model.label}, {name}: {entry['score']:.4f} bits per byte", flush=True)
    return found


def _made_with(model: EvaluatedModel, options: EvalOptions) -> dict[str, Any]:
    """All that decides a result, so that a finished one is known again."""
    sums = model.folder / SUMS_FILE
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.folder.glob("*.*"))
    return {
        "suite": options.suite,
        "backend": options.backend,
        "dtype": harness.resolved_dtype(model.folder, options.dtype),
        "limit": options.limit,
        "harness": harness.version(),
        "model": _weights_sum(sums) if sums.is_file() else json.loads(json.dumps(weights)),
    }


def _weights_sum(sums: Path) -> str:
    """Checksum of the lines of SHA256SUMS that are not the model card's, which results change."""
    lines = [line for line in sums.read_text(encoding="utf-8").splitlines() if not line.endswith((".md", ".png"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _known(folder: Path, plan: dict[str, dict[str, Any]], asked: set[str]) -> dict[str, Any]:
    """Finished results of this very evaluation; raise UserError for those of another in place of what is asked."""
    known = {}
    for name, made_with in plan.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            before = entry["made_with"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is damaged: remove it, or choose another --out") from None
        if before != made_with and name in asked:
            changed = [key for key in made_with if before.get(key) != made_with[key]]
            raise UserError(
                f"{path} was made with another {', '.join(changed)}: choose another --out, or remove this file"
            )
        if before == made_with:
            known[name] = entry
    return known
