"""Buckets: reduce-scatter of gradients to their owner ranks, all-gather of the new weights.

A bucket is a list of consecutive parameters that are exchanged together. A rank owns some rows of each bucket: its
region. Regions differ in size, and none is padded.

- Gradients: each rank packs its gradients by owner rank and sends them in one uneven all-to-all. The owner rank sums
  what it receives in float32 and in rank order. This moves the bytes of a ring reduce-scatter.
- Weights: each owner rank sends its new rows to all other ranks in the same way. This moves the bytes of an all-gather.

A large bucket, or one whose largest region is far above the mean, is exchanged in several rounds. A round takes one
slice of every region, which bounds the send and receive buffers. `BucketGroup` orders the rounds of all buckets and
keeps at most MAX_IN_FLIGHT of them in flight.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from moonlight.optim.parameters import LocalParam
from moonlight.placement.owners import MAX_IN_FLIGHT, RowShard, comm_rounds

Finish = Callable[[], None]
"""Wait for an exchange in flight, then write its result."""


@dataclass(frozen=True)
class CommRound:
    """One all-to-all: a slice of every rank's region of the bucket."""

    grads: list[torch.Tensor]
    """Flat views of this rank's gradient sums, in the order of the owner ranks."""
    weights: list[list[torch.Tensor]]
    """Flat views of this rank's copy of the weights, for each owner rank."""
    sizes: list[int]
    """Number of elements of each owner rank's slice."""
    start: int
    """Offset of this rank's slice in its own region, in elements."""


class Bucket:
    """Parameters that are exchanged together.

    After a reduce-scatter, `grads` holds the sums over all ranks for the rows that this rank owns, in the order of
    `owned_shards`: float32 views of `grad_shard`. A group of one rank sends nothing, so `grads` are views of its own
    gradient sums, in their dtype.
    """

    def __init__(self, parameters: Sequence[LocalParam], shards: Sequence[RowShard], group: dist.ProcessGroup) -> None:
        """`shards`: the rows of `parameters` with their owner ranks, equal on all ranks of `group`."""
        self.parameters, self.shards, self.group = list(parameters), list(shards), group
        by_index = {parameter.index: parameter for parameter in parameters}
        regions: list[list[RowShard]] = [[] for _ in range(group.size())]
        for shard in shards:
            regions[shard.owner_rank].append(shard)
        self.owned_shards = regions[group.rank()]
        self.rounds: list[CommRound] = []
        if group.size() == 1:
            self.grads = [by_index[s.param_index].grad_2d[s.start : s.stop] for s in self.owned_shards]
            return
        region_sizes = [sum(shard.numel for shard in region) for region in regions]
        for start, sizes in comm_rounds(region_sizes):
            slices = [
                list(_flat_slices(region, by_index, start, start + size))
                for region, size in zip(regions, sizes, strict=True)
            ]
            self.rounds.append(
                CommRound(
                    grads=[grad for of_owner in slices for grad, _ in of_owner],
                    weights=[[weight for _, weight in of_owner] for of_owner in slices],
                    sizes=sizes,
                    start=min(start, region_sizes[group.rank()]),
                )
            )
        device = parameters[0].torch_param.device
        self.grad_shard = torch.zeros(region_sizes[group.rank()], dtype=torch.float32, device=device)
        flat_grads = self.grad_shard.split([shard.numel for shard in self.owned_shards])
        self.grads = [flat.view(-1, s.columns) for flat, s in zip(flat_grads, self.owned_shards, strict=True)]

    def start_reduce_scatter(self, comm_round: CommRound) -> Finish:
        """Send the gradients of a round to their owner ranks.

        The returned function waits for the gradients of all ranks and writes their sum into `grad_shard`.
        """
        num_ranks, local_size = self.group.size(), comm_round.sizes[self.group.rank()]
        packed = torch.cat(comm_round.grads)
        received = packed.new_empty(num_ranks * local_size)
        work = dist.all_to_all_single(
            received, packed, [local_size] * num_ranks, comm_round.sizes, group=self.group, async_op=True
        )

        def finish() -> None:
            work.wait()
            sums = self.grad_shard[comm_round.start : comm_round.start + local_size]
            torch.sum(received.view(num_ranks, local_size), dim=0, dtype=torch.float32, out=sums)

        return finish

    def start_all_gather(self, comm_round: CommRound) -> Finish:
        """Send this rank's new weights of a round to all other ranks.

        The returned function waits for the weights of the other ranks and writes them into the model.
        """
        num_ranks, rank = self.group.size(), self.group.rank()
        local_size = comm_round.sizes[rank]
        incoming = [0 if owner == rank else size for owner, size in enumerate(comm_round.sizes)]
        outgoing = [0 if reader == rank else local_size for reader in range(num_ranks)]
        targets = [view for owner, views in enumerate(comm_round.weights) if owner != rank for view in views]
        like = self.parameters[0].torch_param.detach()
        packed = torch.cat(comm_round.weights[rank]).repeat(num_ranks - 1) if local_size else like.new_empty(0)
        received = like.new_empty(sum(incoming))
        work = dist.all_to_all_single(received, packed, incoming, outgoing, group=self.group, async_op=True)

        def finish() -> None:
            work.wait()
            if targets:  # empty if this rank alone owns the round
                torch._foreach_copy_(targets, list(received.split([target.numel() for target in targets])))

        return finish


def _flat_slices(
    region: Sequence[RowShard], parameters: dict[int, LocalParam], start: int, stop: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield flat (gradient, weight) views of the elements [start, stop) of a region."""
    for shard in region:
        shard_start, shard_stop = max(start, 0), min(stop, shard.numel)
        if shard_start < shard_stop:
            parameter, offset = parameters[shard.param_index], shard.start * shard.columns
            flat = slice(offset + shard_start, offset + shard_stop)
            yield parameter.grad_2d.view(-1)[flat], parameter.weight_2d.view(-1)[flat]
        start, stop = start - shard.numel, stop - shard.numel


class BucketGroup:
    """The buckets of one process group, in the order in which a backward pass completes them.

    Every rank exchanges the buckets in this order, whatever the order of its own hooks, so the ranks cannot deadlock.
    Weights return in the opposite order, in which a forward pass uses them.

    One queue holds the rounds in flight, oldest first. Gradients and weights are never in flight at the same time: the
    first reduce-scatter of a backward pass waits for all weights.
    """

    def __init__(self, buckets: list[Bucket]) -> None:
        self.buckets = buckets
        self._bucket_index = {p.torch_param: index for index, bucket in enumerate(buckets) for p in bucket.parameters}
        self._missing_grads: list[set[torch.nn.Parameter]] = []
        self._next_bucket = 0
        self._to_gather: deque[tuple[int, CommRound]] = deque()
        self._in_flight: deque[tuple[int, Finish]] = deque()

    def start_backward(self) -> None:
        """Start a backward pass: every parameter still lacks its gradient."""
        self._missing_grads = [{p.torch_param for p in bucket.parameters} for bucket in self.buckets]
        self._next_bucket = 0

    def register_grad_ready(self, torch_param: torch.nn.Parameter) -> None:
        """Mark the gradient sum of a parameter as complete, and send each bucket that is complete and next in order."""
        self._missing_grads[self._bucket_index[torch_param]].discard(torch_param)
        while self._next_bucket < len(self.buckets) and not self._missing_grads[self._next_bucket]:
            self._start_next_reduce_scatter()

    def finish_grad_sync(self) -> None:
        """Send the remaining buckets, whose parameters may have no gradient, and wait for all sums."""
        while self._next_bucket < len(self.buckets):
            self._start_next_reduce_scatter()
        self._finish_until(0)

    def start_param_sync(self) -> None:
        """Start to send this rank's new weights, last bucket first."""
        indexed = reversed(list(enumerate(self.buckets)))
        self._to_gather = deque((index, comm_round) for index, bucket in indexed for comm_round in bucket.rounds)
        self._start_all_gathers()

    def wait_for_param(self, torch_param: torch.nn.Parameter) -> None:
        """Wait for the weights of a parameter's bucket, and start the next rounds. Called before a module uses them."""
        if self._in_flight:
            self.finish_param_sync(self._bucket_index[torch_param])

    def finish_param_sync(self, bucket_index: int = 0) -> None:
        """Wait for the weights of all buckets from the last one down to `bucket_index`."""
        while self._in_flight and self._in_flight[0][0] >= bucket_index:
            self._in_flight.popleft()[1]()
            self._start_all_gathers()

    def _start_all_gathers(self) -> None:
        while self._to_gather and len(self._in_flight) < MAX_IN_FLIGHT:
            index, comm_round = self._to_gather.popleft()
            self._in_flight.append((index, self.buckets[index].start_all_gather(comm_round)))

    def _start_next_reduce_scatter(self) -> None:
        if self._next_bucket == 0:
            self.finish_param_sync()  # for parameters that no forward pass has used
        bucket = self.buckets[self._next_bucket]
        for comm_round in bucket.rounds:
            self._finish_until(MAX_IN_FLIGHT - 1)
            self._in_flight.append((self._next_bucket, bucket.start_reduce_scatter(comm_round)))
        self._next_bucket += 1

    def _finish_until(self, count: int) -> None:
        """Finish the oldest rounds until at most `count` are in flight."""
        while len(self._in_flight) > count:
            self._in_flight.popleft()[1]()
