"""Steps that `moonlight scaling` and `moonlight ablate` share: check the studies, print the plan, train the runs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError
from moonlight.files import folder_lock
from moonlight.plan.flops import count_parameters
from moonlight.studies.results import StudyResult, losses, markdown_table, read_results
from moonlight.studies.study import P, Study, total_flops, train_flops

T = TypeVar("T")
S = TypeVar("S", bound=Study)


def run_and_report(
    studies: Sequence[S], conclude: Callable[[S, dict[Any, StudyResult[Any]]], T], *, run_none: bool, dry_run: bool
) -> dict[str, T]:
    """Train the pending runs of each study, then call `conclude(study, results)`, with the study's folder locked.

    Args:
        run_none: skip training and use existing results, without the lock.
        dry_run: print the plan of each study only.

    Returns:
        The result of `conclude` by the study's name; empty after a dry run.

    Raises:
        UserError: two studies have one folder, results or text are invalid, a GPU is missing, or a run failed.
    """
    counts = Counter(study.folder_path for study in studies)
    if duplicates := [str(folder) for folder, count in counts.items() if count > 1]:
        raise UserError(f"two {studies[0].kind}s have the folder {duplicates[0]}: give them different names")
    stored = [read_results(study) for study in studies]
    if dry_run:
        for study, results in zip(studies, stored, strict=True):
            print(plan_text(study, results))
        return {}
    if not run_none:
        from moonlight.studies.train import find_corpus

        for study in studies:
            _check_gpu(study)
        for study in studies:
            find_corpus(study)
    concluded = {}
    for study in studies:
        with folder_lock(study.folder_path) if not run_none else contextlib.nullcontext():
            concluded[study.name] = conclude(study, read_results(study) if run_none else run_all(study))
    return concluded


def _check_gpu(study: Study) -> None:
    """Raise UserError if the study needs a GPU and this machine has none."""
    if study.needs_gpu:
        import torch

        if not torch.cuda.is_available():
            raise UserError(
                f"{study.kind} {study.path} needs a GPU and this machine has none: remove it from the command"
            )


def run_all(study: Study[P]) -> dict[P, StudyResult[P]]:
    """Train the pending runs of a study and return all results. The caller must lock the study's folder."""
    from moonlight.studies.train import prepare_data, train_all

    prepare_data(study)
    results = read_results(study)  # after the data is prepared, to reject results of different text
    print(plan_text(study, results), flush=True)
    train_all(study, results)
    return results


def plan_text(study: Study[P], results: Mapping[P, StudyResult[P]]) -> str:
    """Return a table of tokens and FLOPs of each group of a study, and the number of pending runs."""
    rows = []
    for group in study.groups:
        config = study.make_config(study.representative_run(group))
        counts, timeline = count_parameters(config.model), RunSchedule(config)
        tokens = timeline.num_sequences * config.data.sequence_length
        numbers = (counts.total, counts.activated_with_head, tokens, timeline.num_steps)
        rows.append([group, *(f"{number:,}" for number in numbers), f"{train_flops(config):.3g}"])
    pending = study.pending_runs(losses(results))
    state = f"at least {len(pending)} runs are pending, {total_flops(study, pending):.3g} FLOPs"
    header = (study.part, "parameters", "activated, with head", "tokens", "steps", "FLOPs of a run")
    title = f"{study.name}: {len(results)} runs done"
    return "\n\n".join([title, markdown_table(header, rows), state if pending else "all done"]) + "\n"
