"""Matrices that no rank holds whole: brought together, orthogonalised by one rank, and handed back.

There are two reasons, and both may hold. Rows of a matrix larger than a mean share are owned by several data-parallel
ranks; its home gathers them. And tensor parallelism cuts matrices into slices (or repeats them on every rank); data-
parallel owners are the same on all tensor-parallel ranks, so the slices of one matrix lie with tensor-parallel peers,
of whom one is chosen.
"""

from collections.abc import Callable, Sequence

import torch

from moonlight.optim.exchange import Exchange, Job
from moonlight.optim.owned import Owned
from moonlight.optim.parameters import Parameter, tensor_parallel_group
from moonlight.optim.partition import Fragment, newton_schulz_cost, newton_schulz_owners
from moonlight.optim.wire import Lane

Orthogonalize = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class Gathered:
    """The matrices of one lane of which this rank holds parts. `members` are its rows of them, in the order of
    `run`."""

    def __init__(
        self, lane: Lane, parameters: Sequence[Parameter], shared: Sequence[Owned], dtype: torch.dtype
    ) -> None:
        """`shared`: what this rank owns that is not local to it, in any lane; `dtype` of what travels."""
        group, rank = lane.buckets[0].group, lane.buckets[0].group.rank()
        cut: dict[tuple[int, int], list[Fragment]] = {}
        for bucket in lane.buckets:
            for fragment in bucket.fragments:
                if fragment.is_cut:
                    cut.setdefault((fragment.parameter, fragment.matrix_start), []).append(fragment)
        keys = sorted(cut)
        jobs = [_rows_job(cut[key]) for key in keys]
        of_lane = {parameter.index for bucket in lane.buckets for parameter in bucket.parameters}
        mine = sorted(
            (owned for owned in shared if owned.fragment.parameter in of_lane),
            key=lambda owned: (owned.fragment.parameter, owned.fragment.start),
        )
        self._cut = [owned for owned in mine if owned.fragment.is_cut]
        self._whole = [owned for owned in mine if not owned.fragment.is_cut]
        self.members = self._cut + self._whole
        expert = lane.buckets[0].parameters[0].is_expert
        slices_group = tensor_parallel_group(expert)
        at_home = [(parameters[key[0]], job.shape) for key, job in zip(keys, jobs, strict=True) if job.owner == rank]
        self._home_is_sliced = [parameter.slicing != "alone" for parameter, _ in at_home]
        at_home = [(parameter, shape) for parameter, shape in at_home if parameter.slicing != "alone"]
        for owned in self._whole:
            shape = (owned.fragment.matrix_rows, owned.fragment.columns)
            at_home += [(owned.parameter, shape)] * len(owned.matrices(owned.gradient))
        shapes = [parameter.whole_shape(rows) for parameter, (rows, _) in at_home]
        costs = [newton_schulz_cost(rows, columns) for rows, columns in shapes]
        owners = newton_schulz_owners(costs, slices_group.size())
        like = torch.empty(0, dtype=dtype, device=lane.buckets[0].parameters[0].model.device)
        self._rows = Exchange(group, jobs, like)
        self._slices = Exchange(
            slices_group,
            [
                _slices_job(parameter, shape, owner, slices_group.size())
                for (parameter, _), shape, owner in zip(at_home, shapes, owners, strict=True)
            ],
            like,
        )

    def run(self, directions: Sequence[torch.Tensor], orthogonalize: Orthogonalize) -> list[torch.Tensor]:
        """The orthogonalised rows of every member, from their directions; a collective of both groups."""
        cut = len(self._cut)
        homes = self._rows.collect(directions[:cut])
        sliced = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if is_sliced]
        for owned, direction in zip(self._whole, directions[cut:], strict=True):
            sliced += owned.matrices(direction)
        alone = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if not is_sliced]
        results = orthogonalize(alone + self._slices.collect(sliced))
        back = iter(self._slices.distribute(results[len(alone) :]))
        finished = iter(results[: len(alone)])
        homes = [next(back) if is_sliced else next(finished) for is_sliced in self._home_is_sliced]
        updates = self._rows.distribute(homes)
        for owned in self._whole:
            updates.append(torch.cat([next(back) for _ in owned.matrices(owned.gradient)]))
        return updates


def _rows_job(fragments: Sequence[Fragment]) -> Job:
    first = fragments[0]
    parts = tuple((f.owner, f.start - first.matrix_start, f.stop - first.matrix_start) for f in fragments)
    return Job((first.matrix_rows, first.columns), owner=first.home, axis=-2, parts=parts)


def _slices_job(parameter: Parameter, shape: tuple[int, int], owner: int, num_slices: int) -> Job:
    if parameter.slicing == "replicated":
        return Job(shape, owner)
    each = shape[parameter.cut_axis] // num_slices
    parts = tuple((rank, rank * each, (rank + 1) * each) for rank in range(num_slices))
    return Job(shape, owner, parameter.cut_axis, parts)
