"""`moonlight eval`: evaluate Hugging Face folders with a suite. Write JSON, a table and a plot; skip finished parts."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval import harness, heldout, items, results
from eval.folder import CONFIG_FILE, context_length, read_hf_config
from eval.results import EvaluatedModel
from eval.suites import HELD_OUT, SUITES, Benchmark, select_benchmarks
from moonlight.errors import UserError
from moonlight.files import SUMS_FILE, atomic_write_text, make_folder, sha256_checksum, write_json

RESULTS_FILE, TABLE_FILE = "results.json", "table.md"
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class EvalOptions:
    """Options of the command line."""

    suite: str
    tasks: tuple[str, ...] = ()
    data_dir: Path | None = None
    data: tuple[Path, ...] = ()
    """Prepared data folders, for the suite heldout."""
    backend: str = "transformers"
    dtype: str = "auto"
    batch_size: int = 8
    limit: int | None = None
    allow_code: bool = False
    sequence_length: int | None = None


@dataclass(frozen=True)
class EvalOutput:
    """Results of an evaluation: output folder, Markdown table, and path of the plot if it exists."""

    out: Path
    table: str
    curve: Path | None


def evaluate(folders: Sequence[Path], options: EvalOptions, out: Path | None = None) -> EvalOutput:
    """Evaluate folders one after the other; skip results of the same evaluation that are in `out`.

    Args:
        out: folder of the results; by default `evaluation/<suite>` next to the first model, with a limit
            `evaluation/<suite>-first-<limit>`.

    Returns:
        The folder of the results, the table, and the plot if at least two models record different numbers of tokens.

    Raises:
        UserError: a name, an option, a folder or a data set cannot be used; raised before a model is loaded.
    """
    benchmarks = select_benchmarks(options.suite, options.tasks)
    _check_options(options)
    models = _open_models(folders)
    name = options.suite if options.limit is None else f"{options.suite}-first-{options.limit}"
    out = out or models[0].folder.resolve().parent / "evaluation" / name
    if out.exists() and not out.is_dir():
        raise UserError(f"--out is {out}: it is a file, choose another folder")
    if options.suite == HELD_OUT:
        scores = _evaluate_held_out(models, options, out)
        table = results.held_out_table(models, scores)
    else:
        skipped = [benchmark.name for benchmark in benchmarks if benchmark.runs_code and not options.allow_code]
        if skipped and (options.tasks or len(skipped) == len(benchmarks)):
            raise UserError(f"{', '.join(skipped)} executes code that the model writes: allow it with --allow-code")
        for name in skipped:
            print(f"{name}: skipped, it executes code that the model writes; allow it with --allow-code", flush=True)
        selected = [benchmark for benchmark in benchmarks if benchmark.name not in skipped]
        scores = _evaluate_suite(models, selected, options, out)
        done = scores[models[0].label]
        rows = [benchmark for benchmark in SUITES[options.suite] if benchmark.name in {*done, *skipped}]
        table = results.table(rows, models, scores)
    record = [{"label": model.label, "tokens": model.tokens, "results": scores[model.label]} for model in models]
    write_json(out / RESULTS_FILE, {"suite": options.suite, "models": record})
    atomic_write_text(out / TABLE_FILE, table)
    curve = out / results.CURVE_FILE
    is_drawn = results.draw_curve(curve, options.suite, models, scores)
    return EvalOutput(out, table, curve if is_drawn else None)


def _check_options(options: EvalOptions) -> None:
    """Raise UserError for an option that is invalid, or that the suite does not have."""
    for name, value, accepted in (("backend", options.backend, harness.BACKENDS), ("dtype", options.dtype, DTYPES)):
        if value not in accepted:
            raise UserError(f"--{name} is {value!r}: accepted are {', '.join(accepted)}")
    for name, number in (("limit", options.limit), ("batch-size", options.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}: it must be at least 1")
    if options.data_dir is not None and not options.data_dir.is_dir():
        raise UserError(f"--data-dir is {options.data_dir}: no such folder; it must contain data sets as OWNER/NAME")
    if options.suite == HELD_OUT:
        if not options.data:
            raise UserError("--suite heldout needs --data: a folder of `moonlight data prepare`")
        if options.backend != "transformers":
            raise UserError(f"--backend is {options.backend!r}: the suite {HELD_OUT} runs with transformers")
        if options.limit is not None:
            raise UserError(f"--limit is {options.limit}: the suite {HELD_OUT} reads all of its text")
    elif options.data:
        raise UserError(f"--data is for --suite {HELD_OUT}: the suite {options.suite} has its own data sets")
    elif options.sequence_length is not None:
        raise UserError(f"--sequence-length is for --suite {HELD_OUT}: the suite {options.suite} has its own items")


def _open_models(folders: Sequence[Path]) -> list[EvaluatedModel]:
    """Check the folders and give each a unique label.

    Raises:
        UserError: a folder has no model or tokenizer, is given twice, or has the label of another one.
    """
    models: list[EvaluatedModel] = []
    for folder in folders:
        read_hf_config(folder)
        if not (folder / "tokenizer_config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face folder with a tokenizer: it has no tokenizer_config.json")
        path = folder.resolve()
        if path in {model.folder.resolve() for model in models}:
            raise UserError(f"{folder} is given twice: give each folder once")
        label = path.parent.name if path.name == "hf" else path.name
        if label in {model.label for model in models}:
            label = f"{path.parent.name}-{path.name}"
        if label in {model.label for model in models}:
            raise UserError(f"{folder} has the label {label}, as another folder: rename one of them")
        models.append(EvaluatedModel(label, folder, _training_count(folder, "consumed_tokens")))
    return models


def _training_count(folder: Path, key: str) -> int | None:
    """Return a count from export.json of an exported folder; None if absent."""
    try:
        count = json.loads((folder / "export.json").read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return count if type(count) is int else None


def _evaluate_suite(
    models: Sequence[EvaluatedModel], benchmarks: Sequence[Benchmark], options: EvalOptions, out: Path
) -> dict[str, Any]:
    """Return results of the harness by model and benchmark, including finished ones in `out`.

    Load all data before the first model, so that missing data is reported early.
    """
    suite = SUITES[options.suite]
    data_dir = None if options.data_dir is None else str(options.data_dir.resolve())
    plans = {
        model.label: {
            b.name: _made_with(model, options) | {"task": b.task, "shots": b.shots, "data_dir": data_dir} for b in suite
        }
        for model in models
    }
    selected = {benchmark.name for benchmark in benchmarks}
    finished = {label: _read_finished(out / label, plan, selected) for label, plan in plans.items()}
    pending = [b for b in benchmarks if any(b.name not in finished[model.label] for model in models)]
    loaded = harness.load_tasks(pending, options.data_dir) if pending else {}
    for model in models:
        context = context_length(model.folder)
        for benchmark in pending:
            longest = harness.longest_answer(loaded[benchmark.name])
            if context is not None and longest >= context:
                raise UserError(
                    f"{model.label} has a context of {context} tokens, {benchmark.title} lets it generate {longest}: "
                    "leave it out with --tasks"
                )
    for model in models:
        model_pending = [benchmark for benchmark in benchmarks if benchmark.name not in finished[model.label]]
        if not model_pending:
            print(f"{model.label}: already evaluated", flush=True)
            continue
        dtype = harness.resolved_dtype(model.folder, options.dtype)
        lm = harness.load_harness_model(model.folder, options.backend, dtype, options.batch_size)
        make_folder(out / model.label)
        for benchmark in model_pending:
            start = time.monotonic()
            tasks = loaded[benchmark.name]
            outcome = harness.run_benchmark(
                lm, benchmark, tasks, limit=options.limit, backend=options.backend, allow_code=options.allow_code
            )
            answers = items.sample_items(benchmark, outcome.samples)
            lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
            atomic_write_text(out / model.label / f"{benchmark.name}.items.jsonl", lines)
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
            finished[model.label][benchmark.name] = entry
            print(f"{model.label}, {benchmark.title}: {outcome.score:.4f} ({len(answers)} items)", flush=True)
        del lm
        harness.free_memory()
    shared = [b.name for b in suite if all(b.name in finished[model.label] for model in models)]
    return {model.label: {name: finished[model.label][name] for name in shared} for model in models}


def _evaluate_held_out(models: Sequence[EvaluatedModel], options: EvalOptions, out: Path) -> dict[str, Any]:
    """Return results of the suite heldout by model and data folder, including finished ones in `out`."""
    opened = {folder.resolve().name: heldout.open_held_out(folder) for folder in options.data}
    if len(opened) < len(options.data):
        raise UserError("--data has two folders of the same name: rename one of them")
    plans = {}
    for model in models:
        context = context_length(model.folder)
        length = options.sequence_length
        if length is None:
            length = _training_count(model.folder, "sequence_length") or context
        if length is None:
            raise UserError(f"{model.folder / CONFIG_FILE} has no max_position_embeddings: give --sequence-length")
        if not 1 <= length <= (context or length):
            raise UserError(f"--sequence-length is {length}: it must be from 1 to the {context} of {model.label}")
        for data in opened.values():
            heldout.check_same_tokenizer(data, model.folder)
        plans[model.label] = {
            name: _made_with(model, options)
            | {"data_sha256": sha256_checksum(data.folder / "manifest.json"), "sequence_length": length}
            for name, data in opened.items()
        }
    finished = {label: _read_finished(out / label, plan, set(plan)) for label, plan in plans.items()}
    for model in models:
        make_folder(out / model.label)
        for name, data in opened.items():
            if name in finished[model.label]:
                print(f"{model.label}, {name}: already evaluated", flush=True)
                continue
            start = time.monotonic()
            made_with, split = plans[model.label][name], data.split
            measured = heldout.measure_bits_per_byte(
                model.folder,
                data,
                dtype=made_with["dtype"],
                batch_size=options.batch_size,
                sequence_length=made_with["sequence_length"],
            )
            compressed = {kind: 8 * split[f"{kind}_bytes"] / split["compressed_text_bytes"] for kind in ("gzip", "xz")}
            entry = {
                "title": name,
                "metric": "bits_per_byte",
                "score": measured["bits_per_byte"],
                "loss": measured["loss"],
                **{key: split[key] for key in ("documents", "tokens", "bytes")},
                "compressed": compressed,
                "sequence_length": made_with["sequence_length"],
                "seconds": round(time.monotonic() - start, 1),
                "made_with": made_with,
            }
            write_json(out / model.label / f"{name}.json", entry)
            finished[model.label][name] = entry
            print(f"{model.label}, {name}: {entry['score']:.4f} bits per byte", flush=True)
    return finished


def _made_with(model: EvaluatedModel, options: EvalOptions) -> dict[str, Any]:
    """Return everything that determines a result, to recognize a finished one."""
    sums = model.folder / SUMS_FILE
    weights = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in model.folder.glob("*.*"))
    return {
        "suite": options.suite,
        "backend": options.backend,
        "dtype": harness.resolved_dtype(model.folder, options.dtype),
        "limit": options.limit,
        "harness": importlib.metadata.version("lm-eval"),
        "model": _weights_sum(sums) if sums.is_file() else json.loads(json.dumps(weights)),
    }


def _weights_sum(sums: Path) -> str:
    """Return the checksum of SHA256SUMS without the model card and plots, which evaluation results change."""
    lines = [line for line in sums.read_text(encoding="utf-8").splitlines() if not line.endswith((".md", ".png"))]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _read_finished(folder: Path, plan: dict[str, dict[str, Any]], selected: set[str]) -> dict[str, Any]:
    """Return the finished results of this evaluation, by name.

    Raises:
        UserError: the result file of a selected benchmark is corrupt, or from another evaluation.
    """
    finished = {}
    for name, made_with in plan.items():
        path = folder / f"{name}.json"
        if not path.exists():
            continue
        try:
            entry = json.loads(path.read_text(encoding="utf-8"))
            previous = entry["made_with"]
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path} is corrupt: remove it, or choose another --out") from None
        if previous != made_with and name in selected:
            changed = [key for key in made_with if previous.get(key) != made_with[key]]
            raise UserError(f"{path} has a different {', '.join(changed)}: choose another --out, or remove this file")
        if previous == made_with:
            finished[name] = entry
    return finished
