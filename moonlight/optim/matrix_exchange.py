"""Matrices whose parts lie on several ranks: every part to one owner, who orthogonalises, and the results back.

Parts are slices of tensor parallelism, or rows that several data-parallel ranks own of one matrix. Both ways are one
uneven all-to-all. Nobody but the owner computes, so Newton-Schulz runs once per matrix in the world.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moonlight.optim.buckets import BucketGroup
from moonlight.optim.parameters import LocalParam, OwnedShard, tensor_parallel_group
from moonlight.placement.owners import RowShard, balance_by_cost, newton_schulz_cost


@dataclass(frozen=True)
class ExchangedMatrix:
    """One matrix. Every rank of the group lists the same jobs in the same order."""

    shape: tuple[int, int]
    owner: int
    dim: int = -2
    input_slices: tuple[tuple[int, int, int], ...] = ()
    """(rank, start, stop) of each slice along `axis`; empty: every rank has the whole matrix, and wants the result."""

    def output_slices(self, num_ranks: int) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of what each rank wants of the result."""
        yield from self.input_slices or ((rank, 0, self.shape[self.dim]) for rank in range(num_ranks))

    def narrow(self, matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A slice of the whole matrix."""
        return matrix.narrow(self.dim, start, stop - start)


class MatrixExchange:
    """The jobs of one group. A rank's parts are given and returned in the order of the jobs that it has a part of."""

    def __init__(self, group: dist.ProcessGroup, jobs: Sequence[ExchangedMatrix], like: torch.Tensor) -> None:
        """`like` has the dtype and device of what travels."""
        self.group, self.jobs, self._empty = group, list(jobs), like.new_empty(0)
        self._slices = [{rank: (a, b) for rank, a, b in job.output_slices(group.size())} for job in self.jobs]

    def gather_to_owners(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The whole matrices of the jobs that this rank owns, from everybody's `parts`."""
        me = self.group.rank()
        outgoing, incoming = self._nothing(), self._nothing()
        wholes, given = [], iter(parts)
        for job, slices in zip(self.jobs, self._slices, strict=True):
            part = next(given) if me in slices else None
            if job.owner == me:
                whole = self._empty.new_empty(job.shape)
                wholes.append(whole)
                assert part is not None
                job.narrow(whole, *slices[me]).copy_(part)
                for rank, _, _ in job.input_slices:
                    if rank != me:
                        incoming[rank].append(job.narrow(whole, *slices[rank]))
            elif part is not None and job.input_slices:
                outgoing[job.owner].append(part)
        self._swap(outgoing, incoming)
        return wholes

    def scatter_from_owners(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's parts of the results; `results` are whole, of the jobs that this rank owns."""
        me = self.group.rank()
        outgoing, incoming = self._nothing(), self._nothing()
        parts, given = [], iter(results)
        for job, slices in zip(self.jobs, self._slices, strict=True):
            if job.owner == me:
                result = next(given)
                for rank, (start, stop) in slices.items():
                    if rank != me:
                        outgoing[rank].append(job.narrow(result, start, stop))
                parts.append(job.narrow(result, *slices[me]))
            elif me in slices:
                shape = list(job.shape)
                shape[job.dim] = slices[me][1] - slices[me][0]
                parts.append(self._empty.new_empty(shape))
                incoming[job.owner].append(parts[-1])
        self._swap(outgoing, incoming)
        return parts

    def _nothing(self) -> list[list[torch.Tensor]]:
        return [[] for _ in range(self.group.size())]

    def _swap(self, outgoing: list[list[torch.Tensor]], incoming: list[list[torch.Tensor]]) -> None:
        """Fill the tensors of `incoming`, by source, from those of `outgoing`, by reader, of all ranks."""
        if not self.jobs or self.group.size() == 1:
            return
        packed = torch.cat([self._empty, *(tensor.flatten().to(self._empty.dtype) for to in outgoing for tensor in to)])
        sizes = [sum(tensor.numel() for tensor in source) for source in incoming]
        received = self._empty.new_empty(sum(sizes))
        sent = [sum(tensor.numel() for tensor in to) for to in outgoing]
        dist.all_to_all_single(received, packed, sizes, sent, group=self.group)
        targets = [tensor for source in incoming for tensor in source]
        parts = received.split([target.numel() for target in targets])
        for target, part in zip(targets, parts, strict=True):
            target.copy_(part.view(target.shape))


Orthogonalize = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class SplitMatrices:
    """The matrices of one lane of which this rank holds parts. `members` are its rows of them, in the order of
    `run`."""

    def __init__(
        self, lane: BucketGroup, parameters: Sequence[LocalParam], shared: Sequence[OwnedShard], dtype: torch.dtype
    ) -> None:
        """`shared`: what this rank owns that is not local to it, in any lane; `dtype` of what travels."""
        group, rank = lane.buckets[0].group, lane.buckets[0].group.rank()
        cut: dict[tuple[int, int], list[RowShard]] = {}
        for bucket in lane.buckets:
            for fragment in bucket.fragments:
                if fragment.is_split:
                    cut.setdefault((fragment.param_index, fragment.matrix_start), []).append(fragment)
        keys = sorted(cut)
        jobs = [_rows_job(cut[key]) for key in keys]
        of_lane = {parameter.index for bucket in lane.buckets for parameter in bucket.parameters}
        mine = sorted(
            (owned for owned in shared if owned.shard.param_index in of_lane),
            key=lambda owned: (owned.shard.param_index, owned.shard.start),
        )
        self._cut = [owned for owned in mine if owned.shard.is_split]
        self._whole = [owned for owned in mine if not owned.shard.is_split]
        self.shards = self._cut + self._whole
        expert = lane.buckets[0].parameters[0].is_expert
        slices_group = tensor_parallel_group(expert)
        at_home = [(parameters[key[0]], job.shape) for key, job in zip(keys, jobs, strict=True) if job.owner == rank]
        self._home_is_sliced = [parameter.tp_mode != "unsharded" for parameter, _ in at_home]
        at_home = [(parameter, shape) for parameter, shape in at_home if parameter.tp_mode != "unsharded"]
        for owned in self._whole:
            shape = (owned.shard.matrix_rows, owned.shard.columns)
            at_home += [(owned.param, shape)] * len(owned.matrices(owned.gradient))
        shapes = [parameter.full_matrix_shape(rows) for parameter, (rows, _) in at_home]
        costs = [newton_schulz_cost(rows, columns) for rows, columns in shapes]
        owners = balance_by_cost(costs, slices_group.size())
        like = torch.empty(0, dtype=dtype, device=lane.buckets[0].parameters[0].torch_param.device)
        self._rows = MatrixExchange(group, jobs, like)
        self._slices = MatrixExchange(
            slices_group,
            [
                _slices_job(parameter, shape, owner, slices_group.size())
                for (parameter, _), shape, owner in zip(at_home, shapes, owners, strict=True)
            ],
            like,
        )

    def orthogonalize_shards(
        self, directions: Sequence[torch.Tensor], orthogonalize: Orthogonalize
    ) -> list[torch.Tensor]:
        """The orthogonalised rows of every member, from their directions; a collective of both groups."""
        cut = len(self._cut)
        homes = self._rows.gather_to_owners(directions[:cut])
        sliced = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if is_sliced]
        for owned, direction in zip(self._whole, directions[cut:], strict=True):
            sliced += owned.matrices(direction)
        alone = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if not is_sliced]
        results = orthogonalize(alone + self._slices.gather_to_owners(sliced))
        back = iter(self._slices.scatter_from_owners(results[len(alone) :]))
        finished = iter(results[: len(alone)])
        homes = [next(back) if is_sliced else next(finished) for is_sliced in self._home_is_sliced]
        updates = self._rows.scatter_from_owners(homes)
        for owned in self._whole:
            updates.append(torch.cat([next(back) for _ in owned.matrices(owned.gradient)]))
        return updates


def _rows_job(fragments: Sequence[RowShard]) -> ExchangedMatrix:
    first = fragments[0]
    parts = tuple((f.owner_rank, f.start - first.matrix_start, f.stop - first.matrix_start) for f in fragments)
    return ExchangedMatrix((first.matrix_rows, first.columns), owner=first.home_rank, dim=-2, input_slices=parts)


def _slices_job(parameter: LocalParam, shape: tuple[int, int], owner: int, num_slices: int) -> ExchangedMatrix:
    if parameter.tp_mode == "replicated":
        return ExchangedMatrix(shape, owner)
    each = shape[parameter.tp_dim] // num_slices
    parts = tuple((rank, rank * each, (rank + 1) * each) for rank in range(num_slices))
    return ExchangedMatrix(shape, owner, parameter.tp_dim, parts)
