"""Gradients to their owners and weights back: the exchange between data-parallel ranks, in buckets.

A bucket is a run of parameters. What travels is laid out by owner: the rows that rank 0 owns, then rank 1's, and so
on, regions of unequal size without padding. Gradients go by an uneven all-to-all and are summed by the owner, in
float32 and in the order of the ranks: the payload of a ring reduce-scatter. Weights return the same way: that of an
all-gather. A large bucket, or one whose largest region is far above the mean, goes in several rounds, so that buffers
stay small.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moonlight.optim.parameters import LocalParam
from moonlight.placement.owners import MAX_IN_FLIGHT, RowShard, comm_rounds

Finish = Callable[[], None]


@dataclass(frozen=True)
class CommRound:
    """One all-to-all: for every rank, a slice of its region of the bucket."""

    gradients: list[torch.Tensor]
    """Flat views of this rank's gradient sums, in the order of the owners."""
    weights: list[list[torch.Tensor]]
    """Flat views of this rank's weights, by owner."""
    sizes: list[int]
    """Elements of each owner."""
    start: int
    """Where its slice begins in this rank's own region."""


class Bucket:
    """Parameters that travel together. After a reduction, `gradients` holds the sums of this rank's own rows."""

    def __init__(
        self, parameters: Sequence[LocalParam], fragments: Sequence[RowShard], group: dist.ProcessGroup
    ) -> None:
        self.parameters, self.fragments, self.group = list(parameters), list(fragments), group
        by_index = {parameter.index: parameter for parameter in parameters}
        regions: list[list[RowShard]] = [[] for _ in range(group.size())]
        for fragment in fragments:
            regions[fragment.owner_rank].append(fragment)
        self.owned_shards = regions[group.rank()]
        self.rounds: list[CommRound] = []
        if group.size() == 1:
            self.gradients = [by_index[f.param_index].grad_2d[f.start : f.stop] for f in self.owned_shards]
            return
        sizes = [sum(fragment.numel for fragment in region) for region in regions]
        for start, in_round in comm_rounds(sizes):
            slices = [
                list(_flat_slices(region, by_index, start, start + size))
                for region, size in zip(regions, in_round, strict=True)
            ]
            self.rounds.append(
                CommRound(
                    gradients=[gradient for owner in slices for gradient, _ in owner],
                    weights=[[weight for _, weight in owner] for owner in slices],
                    sizes=in_round,
                    start=min(start, sizes[group.rank()]),
                )
            )
        self.grad_shard = torch.zeros(sizes[group.rank()], dtype=torch.float32, device=parameters[0].torch_param.device)
        parts = self.grad_shard.split([fragment.numel for fragment in self.owned_shards])
        self.gradients = [
            part.view(-1, fragment.columns) for part, fragment in zip(parts, self.owned_shards, strict=True)
        ]

    def start_reduce_scatter(self, round_: CommRound) -> Finish:
        """Send a round of gradients; the result waits for those of the others and sums them."""
        ranks, mine = self.group.size(), round_.sizes[self.group.rank()]
        packed = torch.cat(round_.gradients)
        received = packed.new_empty(ranks * mine)
        work = dist.all_to_all_single(received, packed, [mine] * ranks, round_.sizes, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            shard = self.grad_shard[round_.start : round_.start + mine]
            torch.sum(received.view(ranks, mine), dim=0, dtype=torch.float32, out=shard)

        return finish

    def start_all_gather(self, round_: CommRound) -> Finish:
        """Send this rank's weights of a round to all others; the result waits for theirs and writes them."""
        ranks, rank = self.group.size(), self.group.rank()
        mine = round_.sizes[rank]
        incoming = [0 if owner == rank else size for owner, size in enumerate(round_.sizes)]
        outgoing = [0 if reader == rank else mine for reader in range(ranks)]
        views = [view for owner, views in enumerate(round_.weights) if owner != rank for view in views]
        like = self.parameters[0].torch_param.detach()
        packed = torch.cat(round_.weights[rank]).repeat(ranks - 1) if mine else like.new_empty(0)
        received = like.new_empty(sum(incoming))
        work = dist.all_to_all_single(received, packed, incoming, outgoing, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            if views:  # none where this rank alone owns the round
                torch._foreach_copy_(views, list(received.split([view.numel() for view in views])))

        return finish


def _flat_slices(
    region: Sequence[RowShard], parameters: dict[int, LocalParam], start: int, stop: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(gradient, weight) views of the elements [start, stop) of a region."""
    for fragment in region:
        low, high = max(start, 0), min(stop, fragment.numel)
        if low < high:
            parameter, first = parameters[fragment.param_index], fragment.start * fragment.columns
            flat = slice(first + low, first + high)
            yield parameter.grad_2d.view(-1)[flat], parameter.weight_2d.view(-1)[flat]
        start, stop = start - fragment.numel, stop - fragment.numel


class BucketGroup:
    """The buckets of one process group, in the order in which a backward pass completes them.

    Every rank exchanges them in this one order, whatever order its own hooks fire in, so ranks never wait for each
    other in a circle. Weights return in the opposite order, in which a forward pass needs them.
    """

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets = buckets
        self._bucket_of = {p.torch_param: index for index, bucket in enumerate(buckets) for p in bucket.parameters}
        self._waiting: list[set[torch.nn.Parameter]] = []
        self._next = 0
        self._to_gather: deque[tuple[int, CommRound]] = deque()
        self._in_flight: deque[tuple[int, Finish]] = deque()

    def start_backward(self) -> None:
        """Expect a gradient of every parameter."""
        self._waiting = [{p.torch_param for p in bucket.parameters} for bucket in self.buckets]
        self._next = 0

    def register_grad_ready(self, parameter: torch.nn.Parameter) -> None:
        """The gradient sum of a parameter is complete: send every bucket whose turn has come."""
        self._waiting[self._bucket_of[parameter]].discard(parameter)
        while self._next < len(self.buckets) and not self._waiting[self._next]:
            self._reduce_next()

    def finish_grad_sync(self) -> None:
        """Send what has not been sent (a parameter may have had no gradient), and wait for all."""
        while self._next < len(self.buckets):
            self._reduce_next()
        self._finish_down_to(0)

    def start_param_sync(self) -> None:
        """This rank's own weights are new: begin to send them."""
        numbered = reversed(list(enumerate(self.buckets)))
        self._to_gather = deque((number, round_) for number, bucket in numbered for round_ in bucket.rounds)
        self._gather_ahead()

    def wait_for_param(self, parameter: torch.nn.Parameter) -> None:
        """Before a parameter is used: wait for its bucket, and send ahead the next ones."""
        if self._in_flight:
            self.finish_param_sync(self._bucket_of[parameter])

    def finish_param_sync(self, bucket: int = 0) -> None:
        """Wait for the weights of all buckets down to this one."""
        while self._in_flight and self._in_flight[0][0] >= bucket:
            self._in_flight.popleft()[1]()
            self._gather_ahead()

    def _gather_ahead(self) -> None:
        while self._to_gather and len(self._in_flight) < MAX_IN_FLIGHT:
            number, round_ = self._to_gather.popleft()
            self._in_flight.append((number, self.buckets[number].start_all_gather(round_)))

    def _reduce_next(self) -> None:
        if self._next == 0:
            self.finish_param_sync()  # of parameters that no forward pass has used
        bucket = self.buckets[self._next]
        for round_ in bucket.rounds:
            self._finish_down_to(MAX_IN_FLIGHT - 1)
            self._in_flight.append((self._next, bucket.start_reduce_scatter(round_)))
        self._next += 1

    def _finish_down_to(self, count: int) -> None:
        while len(self._in_flight) > count:
            self._in_flight.popleft()[1]()
