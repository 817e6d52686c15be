"""What every command does that makes the runs of studies: its checks, its plan, and the runs."""

import contextlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from moonlight.config.timeline import RunSchedule
from moonlight.errors import UserError
from moonlight.files import folder_lock
from moonlight.plan.flops import count_parameters
from moonlight.studies.results import StudyResult, losses, read_results
from moonlight.studies.study import P, Study, total_flops, train_flops

T = TypeVar("T")
S = TypeVar("S", bound=Study)


def run_and_report(
    studies: Sequence[S], conclude: Callable[[S, dict[Any, StudyResult[Any]]], T], *, run_none: bool, dry_run: bool
) -> dict[str, T]:
    """Do what each study lacks, then give it with all its results to `conclude`, its folder locked meanwhile.

    Args:
        run_none: take what results there are.
        dry_run: print what would run, and conclude nothing.

    Returns:
        What `conclude` made of each, by its name.
    """
    check_apart(studies)
    known = [read_results(study) for study in studies]
    if dry_run:
        for study, results in zip(studies, known, strict=True):
            print(plan_text(study, results))
        return {}
    if not run_none:
        from moonlight.studies.train import find_corpus

        check_gpu(studies)
        for study in studies:
            find_corpus(study)
    concluded = {}
    for study in studies:
        with folder_lock(study.folder_path) if not run_none else contextlib.nullcontext():
            concluded[study.name] = conclude(study, read_results(study) if run_none else run_all(study))
    return concluded


def check_apart(studies: Sequence[Study]) -> None:
    """Raise UserError if two would write into one folder."""
    homes = Counter(study.folder_path for study in studies)
    if twice := [str(home) for home, count in homes.items() if count > 1]:
        raise UserError(f"two {studies[0].kind}s have the folder {twice[0]}: give them different names")


def check_gpu(studies: Sequence[Study]) -> None:
    """Raise UserError if one needs a GPU and there is none."""
    if needing := [study for study in studies if study.needs_gpu]:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"{needing[0].kind} {needing[0].path} needs a GPU, and this machine has none: leave it out")


def run_all(study: Study[P]) -> dict[P, StudyResult[P]]:
    """Do what a study still lacks, and return all its results; its folder must be locked."""
    from moonlight.studies.train import prepare_data, train_all

    prepare_data(study)
    results = read_results(study)  # after the text is there, so that results of another text are refused
    print(plan_text(study, results), flush=True)
    train_all(study, results)
    return results


def plan_text(study: Study[P], results: Mapping[P, StudyResult[P]]) -> str:
    """Tokens and FLOPs of each group of a study, and what is still to be done."""
    lines = [f"{study.name}: {len(results)} runs done", "", f"| {study.part} | parameters | activated, with head |"]
    lines[-1] += " tokens | steps | FLOPs of a run |"
    lines.append("|---|---|---|---|---|---|")
    for group in study.groups:
        config = study.make_config(study.representative_run(group))
        counts, timeline = count_parameters(config.model), RunSchedule(config)
        tokens = timeline.num_sequences * config.data.sequence_length
        lines.append(
            f"| {group} | {counts.total:,} | {counts.activated_with_head:,} | {tokens:,} | {timeline.num_steps:,} | "
            f"{train_flops(config):.3g} |"
        )
    missing = study.pending_runs(losses(results))
    flops = total_flops(study, missing)
    lines += ["", f"at least {len(missing)} runs are to be done, {flops:.3g} FLOPs"] if missing else ["", "all done"]
    return "\n".join([*lines, ""])
