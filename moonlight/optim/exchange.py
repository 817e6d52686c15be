"""Matrices whose parts lie on several ranks: every part to one owner, who orthogonalises, and the results back.

Parts are slices of tensor parallelism, or rows that several data-parallel ranks own of one matrix. Both ways are one
uneven all-to-all. Nobody but the owner computes, so Newton-Schulz runs once per matrix in the world.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Job:
    """One matrix. Every rank of the group lists the same jobs in the same order."""

    shape: tuple[int, int]
    owner: int
    axis: int = -2
    parts: tuple[tuple[int, int, int], ...] = ()
    """(rank, start, stop) of each slice along `axis`; empty: every rank has the whole matrix, and wants the result."""

    def slices(self, num_ranks: int) -> Iterator[tuple[int, int, int]]:
        """(rank, start, stop) of what each rank wants of the result."""
        yield from self.parts or ((rank, 0, self.shape[self.axis]) for rank in range(num_ranks))

    def cut(self, matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A slice of the whole matrix."""
        return matrix.narrow(self.axis, start, stop - start)


class Exchange:
    """The jobs of one group. A rank's parts are given and returned in the order of the jobs that it has a part of."""

    def __init__(self, group: dist.ProcessGroup, jobs: Sequence[Job], like: torch.Tensor) -> None:
        """`like` has the dtype and device of what travels."""
        self.group, self.jobs, self._empty = group, list(jobs), like.new_empty(0)
        self._slices = [{rank: (a, b) for rank, a, b in job.slices(group.size())} for job in self.jobs]

    def collect(self, parts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
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
                job.cut(whole, *slices[me]).copy_(part)
                for rank, _, _ in job.parts:
                    if rank != me:
                        incoming[rank].append(job.cut(whole, *slices[rank]))
            elif part is not None and job.parts:
                outgoing[job.owner].append(part)
        self._swap(outgoing, incoming)
        return wholes

    def distribute(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """This rank's parts of the results; `results` are whole, of the jobs that this rank owns."""
        me = self.group.rank()
        outgoing, incoming = self._nothing(), self._nothing()
        parts, given = [], iter(results)
        for job, slices in zip(self.jobs, self._slices, strict=True):
            if job.owner == me:
                result = next(given)
                for rank, (start, stop) in slices.items():
                    if rank != me:
                        outgoing[rank].append(job.cut(result, start, stop))
                parts.append(job.cut(result, *slices[me]))
            elif me in slices:
                shape = list(job.shape)
                shape[job.axis] = slices[me][1] - slices[me][0]
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
