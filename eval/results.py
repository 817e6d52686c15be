"""Results as a Markdown table with published scores, and as a plot over the tokens that checkpoints have seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.suites import COLUMNS, HELD_OUT, Benchmark
from moonlight.files import write_figure

CURVE_FILE = "curve.png"
NUM_COLORS = 10
"""Length of matplotlib's color cycle; the lines after it are dashed."""


@dataclass(frozen=True)
class EvaluatedModel:
    """An evaluated folder."""

    label: str
    folder: Path
    tokens: int | None
    """Tokens seen in training; None if the folder does not record it."""


Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Label of a model -> name of a benchmark -> result."""


def table(benchmarks: Sequence[Benchmark], models: Sequence[EvaluatedModel], results: Results) -> str:
    """Return the results of a suite as Markdown. Scores are in percent, except bits per byte; code may lack one."""
    published_names = [name for name in COLUMNS if any(name in benchmark.published for benchmark in benchmarks)]
    heads = ["benchmark", "shots", *(model.label for model in models)]
    rows = [[*heads, *(f"{name} (published)" for name in published_names)]]
    for benchmark in benchmarks:
        entries = [results[model.label].get(benchmark.name) for model in models]
        scores = [_score(benchmark, entry) if entry else "not run" for entry in entries]
        published = [
            f"{benchmark.published[name]:.1f}" if name in benchmark.published else "–" for name in published_names
        ]
        shots = f"{benchmark.shots}{'' if benchmark.stated else '*'}"
        rows.append([benchmark.title, shots, *scores, *published])
    return _markdown(rows, _notes(benchmarks, results))


def held_out_table(models: Sequence[EvaluatedModel], results: Results) -> str:
    """Return bits per byte of each data folder for each model and for compressors, as Markdown."""
    rows = [["held-out text", "bytes", *(model.label for model in models), "gzip -9", "xz -9"]]
    first = results[models[0].label]
    for name, entry in first.items():
        scores = [f"{results[model.label][name]['score']:.3f}" for model in models]
        compressors = [f"{entry['compressed'][program]:.3f}" for program in ("gzip", "xz")]
        rows.append([name, f"{entry['bytes']:,}", *scores, *compressors])
    length = next(iter(first.values()))["sequence_length"]
    note = f"Bits per byte; lower is better. All tokens of the text are scored, in windows of {length:,} tokens."
    return _markdown(rows, [note])


def _markdown(rows: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    """Return a table with notes below it; the first row is the header; all columns but the first are right-aligned."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|" + "---:|" * (len(rows[0]) - 1), *lines[1:], "", *notes, ""])


def _score(benchmark: Benchmark, results: Mapping[str, Any]) -> str:
    if not benchmark.higher_is_better:
        return f"{results['score']:.3f}"
    error = "" if results["stderr"] is None else f" ± {100 * results['stderr']:.1f}"
    return f"{100 * results['score']:.1f}{error}"


def _notes(benchmarks: Sequence[Benchmark], results: Results) -> list[str]:
    """Return notes on how the scores were measured."""
    entries = [entry for by_name in results.values() for entry in by_name.values()]
    setups = sorted({f"{entry['made_with']['backend']} in {entry['made_with']['dtype']}" for entry in entries})
    versions = sorted({entry["made_with"]["harness"] for entry in entries})
    notes = [
        f"Measured with lm-evaluation-harness {', '.join(versions)} with {', '.join(setups)}; ± is one standard error."
    ]
    if any(benchmark.published for benchmark in benchmarks):
        notes.append("Published scores are the Moonlight paper's (arXiv 2502.16982), which does not state its prompts.")
    if any(not benchmark.stated for benchmark in benchmarks):
        notes.append("\\* The paper does not state these shots; the standard numbers are used.")
    if limits := sorted({entry["made_with"]["limit"] for entry in entries if entry["made_with"]["limit"]}):
        notes.append(
            f"**Only the first {limits[0]} items of each task were used: do not compare these scores with others.**"
        )
    done = set().union(*results.values())
    if titles := [benchmark.title for benchmark in benchmarks if benchmark.name not in done]:
        notes.append(f"Not run without `--allow-code`: {', '.join(titles)} (executing code that the model writes).")
    if truncated := [
        (label, entry) for label, by_name in results.items() for entry in by_name.values() if entry["truncated"]
    ]:
        parts = [
            f"{entry['truncated']} of {entry['items']} of {entry['title']} ({label})" for label, entry in truncated
        ]
        notes.append(f"Prompts longer than the context, truncated at the start: {', '.join(parts)}.")
    return [f"- {note}" for note in notes]


def draw_curve(path: Path, suite: str, models: Sequence[EvaluatedModel], results: Results) -> bool:
    """Plot scores over tokens seen, as PNG. Error bars are one standard error of the benchmark's items, if known.

    Returns:
        False if fewer than two models record different numbers of tokens; then no file is written.
    """
    points = sorted((model for model in models if model.tokens is not None), key=lambda model: model.tokens or 0)
    if len({model.tokens for model in points}) < 2:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter

    entries = results[points[0].label]
    kinds = [kind for kind in ("percent", "bits per byte") if any(_kind(entry) == kind for entry in entries.values())]
    figure, axes = pyplot.subplots(
        1, len(kinds), figsize=(6.8 * len(kinds), 4.2), dpi=120, squeeze=False, layout="constrained"
    )
    tokens = [model.tokens for model in points]
    for axis, kind in zip(axes[0], kinds, strict=True):
        scale = 100 if kind == "percent" else 1
        names = [name for name, entry in entries.items() if _kind(entry) == kind]
        for index, name in enumerate(names):
            model_entries = [results[model.label][name] for model in points]
            style = {"linestyle": "-" if index < NUM_COLORS else "--", "color": f"C{index % NUM_COLORS}"}
            errors = [scale * (entry.get("stderr") or 0) for entry in model_entries]
            scores, label = [scale * entry["score"] for entry in model_entries], entries[name]["title"]
            axis.errorbar(tokens, scores, errors, **style, elinewidth=0.6, marker="o", markersize=4, label=label)
        if kind == "percent":
            axis.set_ylim(bottom=max(axis.get_ylim()[0], -1))
        axis.set(xlabel="tokens seen", ylabel=kind)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda count, _: _short(count)))
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    title = "bits per byte of held-out text" if suite == HELD_OUT else f"{suite} suite"
    figure.suptitle(f"{title} over training")
    write_figure(path, figure)
    return True


def _short(count: float) -> str:
    """Return a number of tokens with a unit, such as 400K, 1.2M, 33B or 5.7T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:.4g}"


def _kind(entry: Mapping[str, Any]) -> str:
    return "bits per byte" if entry["metric"].startswith("bits_per_byte") else "percent"
