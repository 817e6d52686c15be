"""Results as a Markdown table beside published scores, and as a curve over the tokens that checkpoints have seen."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.suites import COLUMNS, HELD_OUT, Benchmark
from moonlight.files import write_figure

CURVE_FILE = "curve.png"
COLOURS = 10
"""That matplotlib takes in turn: the eleventh line has the first again."""


@dataclass(frozen=True)
class EvaluatedModel:
    """One evaluated folder."""

    label: str
    folder: Path
    tokens: int | None
    """That it had seen, if the folder says so."""


Results = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Label of a model -> name of a benchmark -> what was found."""


def table(benchmarks: Sequence[Benchmark], models: Sequence[EvaluatedModel], results: Results) -> str:
    """The results of a suite, as Markdown. Scores are percentages, but for bits per byte; code may have no result."""
    beside = [name for name in COLUMNS if any(name in benchmark.published for benchmark in benchmarks)]
    heads = ["benchmark", "shots", *(model.label for model in models), *(f"{name} (published)" for name in beside)]
    lines = ["| " + " | ".join(heads) + " |", "|---|---:|" + "---:|" * (len(heads) - 2)]
    for benchmark in benchmarks:
        entries = [results[model.label].get(benchmark.name) for model in models]
        own = [_score(benchmark, entry) if entry else "not run" for entry in entries]
        published = [f"{benchmark.published[name]:.1f}" if name in benchmark.published else "–" for name in beside]
        shots = f"{benchmark.shots}{'' if benchmark.stated else '*'}"
        lines.append("| " + " | ".join([benchmark.title, shots, *own, *published]) + " |")
    return "\n".join(lines) + "\n\n" + "\n".join(_notes(benchmarks, results)) + "\n"


def held_out_table(models: Sequence[EvaluatedModel], results: Results) -> str:
    """Bits per byte of each data folder under each model, beside compressors, as Markdown."""
    heads = ["held-out text", "bytes", *(model.label for model in models), "gzip -9", "xz -9"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    first = results[models[0].label]
    for name, found in first.items():
        own = [f"{results[model.label][name]['score']:.3f}" for model in models]
        beside = [f"{found['compressed'][program]:.3f}" for program in ("gzip", "xz")]
        lines.append("| " + " | ".join([name, f"{found['bytes']:,}", *own, *beside]) + " |")
    length = next(iter(first.values()))["sequence_length"]
    note = f"Bits per byte; lower is better. Every token of the text, in windows of {length:,} tokens."
    return "\n".join(lines) + f"\n\n{note}\n"


def _score(benchmark: Benchmark, results: Mapping[str, Any]) -> str:
    if not benchmark.higher_is_better:
        return f"{results['score']:.3f}"
    error = "" if results["stderr"] is None else f" ± {100 * results['stderr']:.1f}"
    return f"{100 * results['score']:.1f}{error}"


def _notes(benchmarks: Sequence[Benchmark], results: Results) -> list[str]:
    """What a reader has to know to trust the table."""
    found = [entry for by_name in results.values() for entry in by_name.values()]
    how = sorted({f"{entry['made_with']['backend']} in {entry['made_with']['dtype']}" for entry in found})
    versions = sorted({entry["made_with"]["harness"] for entry in found})
    notes = [
        f"Measured with lm-evaluation-harness {', '.join(versions)} through {', '.join(how)}; ± is one standard error."
    ]
    if any(benchmark.published for benchmark in benchmarks):
        notes.append("Published scores are the Moonlight paper's (arXiv 2502.16982), whose prompts are not known.")
    if any(not benchmark.stated for benchmark in benchmarks):
        notes.append("\\* The paper does not state these shots; they are the usual ones.")
    if limits := sorted({entry["made_with"]["limit"] for entry in found if entry["made_with"]["limit"]}):
        notes.append(f"**Only the first {limits[0]} items of each task were asked: no result to compare with others.**")
    done = set().union(*results.values())
    if titles := [benchmark.title for benchmark in benchmarks if benchmark.name not in done]:
        notes.append(f"Not run without `--allow-code`: {', '.join(titles)} (executing code that the model writes).")
    if cut := [
        (label, entry) for label, by_name in results.items() for entry in by_name.values() if entry["truncated"]
    ]:
        parts = [f"{entry['truncated']} of {entry['items']} of {entry['title']} ({label})" for label, entry in cut]
        notes.append(f"Prompts longer than the context, whose beginning was cut off: {', '.join(parts)}.")
    return [f"- {note}" for note in notes]


def draw_curve(path: Path, suite: str, models: Sequence[EvaluatedModel], results: Results) -> bool:
    """Scores over tokens as PNG, if at least two models say how many they have seen. Returns whether it was drawn.

    Bars are one standard error of the benchmark's items, where it is known.
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
            found = [results[model.label][name] for model in points]
            style = {"linestyle": "-" if index < COLOURS else "--", "color": f"C{index % COLOURS}"}
            errors = [scale * (one.get("stderr") or 0) for one in found]
            scores, label = [scale * one["score"] for one in found], entries[name]["title"]
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
    """A number of tokens as people write it: 400K, 1.2M, 33B, 5.7T."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= unit:
            return f"{count / unit:.4g}{letter}"
    return f"{count:.4g}"


def _kind(entry: Mapping[str, Any]) -> str:
    return "bits per byte" if entry["metric"].startswith("bits_per_byte") else "percent"
