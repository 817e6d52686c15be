"""What every command does that makes the runs of studies: its checks, its plan, and the runs."""

from collections import Counter
from collections.abc import Mapping, Sequence

from moonlight.errors import UserError
from moonlight.flops import count_parameters
from moonlight.scaling.results import Result, losses, read_results
from moonlight.scaling.study import P, Study, flops_of, train_flops
from moonlight.timeline import Timeline


def check_apart(studies: Sequence[Study]) -> None:
    """Raise UserError if two would write into one folder."""
    homes = Counter(study.home for study in studies)
    if twice := [str(home) for home, count in homes.items() if count > 1]:
        raise UserError(f"two {studies[0].kind}s have the folder {twice[0]}: give them different names")


def check_gpu(studies: Sequence[Study]) -> None:
    """Raise UserError if one needs a GPU and there is none."""
    if needing := [study for study in studies if study.needs_gpu]:
        import torch

        if not torch.cuda.is_available():
            raise UserError(f"{needing[0].kind} {needing[0].path} needs a GPU, and this machine has none: leave it out")


def run_all(study: Study[P]) -> dict[P, Result[P]]:
    """Do what a study still lacks, and return all its results; its folder must be locked."""
    from moonlight.scaling.train import prepare_data, train_all

    results = read_results(study)
    prepare_data(study)
    print(plan_text(study, results), flush=True)
    train_all(study, results)
    return results


def plan_text(study: Study[P], results: Mapping[P, Result[P]]) -> str:
    """Tokens and FLOPs of each group of a study, and what is still to be done."""
    lines = [f"{study.name}: {len(results)} runs done", "", f"| {study.part} | parameters | activated, with head |"]
    lines[-1] += " tokens | steps | FLOPs of a run |"
    lines.append("|---|---|---|---|---|---|")
    for group in study.groups:
        run = study.run(study.first_point(group))
        counts, timeline = count_parameters(run.model), Timeline(run)
        tokens = timeline.num_sequences * run.data.sequence_length
        lines.append(
            f"| {group} | {counts.total:,} | {counts.activated_with_head:,} | {tokens:,} | {timeline.num_steps:,} | "
            f"{train_flops(run):.3g} |"
        )
    missing = study.wanted(losses(results))
    flops = flops_of(study, missing)
    lines += ["", f"at least {len(missing)} runs are to be done, {flops:.3g} FLOPs"] if missing else ["", "all done"]
    return "\n".join([*lines, ""])
