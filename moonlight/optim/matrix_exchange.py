"""Newton-Schulz for matrices that no rank holds in full: gather to one owner rank, orthogonalize, scatter back.

A matrix is in shards for one of two reasons, or for both:

- Several data-parallel ranks own rows of it, because it is larger than the mean region. One of them is its home rank.
- Tensor parallelism shards it: each tensor-parallel rank has a slice of its rows or of its columns.

`MatrixExchange` moves the shards of many matrices in one group: one uneven all-to-all to the owner ranks, and one
back. Only the owner rank computes, so Newton-Schulz runs once per matrix in the job.

`SplitMatrices` applies two such exchanges to the matrices of a bucket group. First the home ranks gather rows from the
data-parallel group. Then the tensor-parallel ranks gather slices, each for some of the matrices, balanced by
Newton-Schulz work. The results return in the opposite order. Matrices that tensor parallelism replicates take the
second exchange too: each is orthogonalized on one of the ranks, and sent to the others.
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
    """One matrix of an exchange. Every rank of the group lists the same matrices in the same order."""

    shape: tuple[int, int]
    """Of the full matrix."""
    owner: int
    """Rank in the group that orthogonalizes it."""
    dim: int = -2
    """Dimension that is sharded: -2 or -1."""
    input_slices: tuple[tuple[int, int, int], ...] = ()
    """(rank, start, stop) of each slice along `dim`. Empty: every rank holds the full matrix and needs the full
    result."""

    def output_slices(self, num_ranks: int) -> Iterator[tuple[int, int, int]]:
        """Yield (rank, start, stop) of the result's slice that each rank needs."""
        yield from self.input_slices or ((rank, 0, self.shape[self.dim]) for rank in range(num_ranks))

    def narrow(self, matrix: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return a slice of the full matrix, as a view."""
        return matrix.narrow(self.dim, start, stop - start)


class MatrixExchange:
    """Gather and scatter of the matrices of one group.

    A rank passes and receives its shards in the order of those `matrices` of which it holds a shard.
    """

    def __init__(self, group: dist.ProcessGroup, matrices: Sequence[ExchangedMatrix], like: torch.Tensor) -> None:
        """`like` has the dtype and device in which shards are sent."""
        self.group, self.matrices, self._empty = group, list(matrices), like.new_empty(0)
        self._slices = [
            {rank: (start, stop) for rank, start, stop in matrix.output_slices(group.size())}
            for matrix in self.matrices
        ]

    def gather_to_owners(self, shards: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the full matrices that this rank orthogonalizes, from the `shards` of all ranks. Collective."""
        rank = self.group.rank()
        outgoing, incoming = self._per_rank(), self._per_rank()
        full_matrices, local_shards = [], iter(shards)
        for matrix, slices in zip(self.matrices, self._slices, strict=True):
            shard = next(local_shards) if rank in slices else None
            if matrix.owner == rank:
                full = self._empty.new_empty(matrix.shape)
                full_matrices.append(full)
                assert shard is not None
                matrix.narrow(full, *slices[rank]).copy_(shard)
                for source, _, _ in matrix.input_slices:
                    if source != rank:
                        incoming[source].append(matrix.narrow(full, *slices[source]))
            elif shard is not None and matrix.input_slices:
                outgoing[matrix.owner].append(shard)
        self._all_to_all(outgoing, incoming)
        return full_matrices

    def scatter_from_owners(self, results: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return this rank's shards of the results. Collective.

        `results` are the full matrices that this rank orthogonalized, in the order of `gather_to_owners`.
        """
        rank = self.group.rank()
        outgoing, incoming = self._per_rank(), self._per_rank()
        shards, local_results = [], iter(results)
        for matrix, slices in zip(self.matrices, self._slices, strict=True):
            if matrix.owner == rank:
                result = next(local_results)
                for target, (start, stop) in slices.items():
                    if target != rank:
                        outgoing[target].append(matrix.narrow(result, start, stop))
                shards.append(matrix.narrow(result, *slices[rank]))
            elif rank in slices:
                shape = list(matrix.shape)
                shape[matrix.dim] = slices[rank][1] - slices[rank][0]
                shards.append(self._empty.new_empty(shape))
                incoming[matrix.owner].append(shards[-1])
        self._all_to_all(outgoing, incoming)
        return shards

    def _per_rank(self) -> list[list[torch.Tensor]]:
        return [[] for _ in range(self.group.size())]

    def _all_to_all(self, outgoing: list[list[torch.Tensor]], incoming: list[list[torch.Tensor]]) -> None:
        """Send the tensors of `outgoing`, by target rank, and fill those of `incoming`, by source rank."""
        if not self.matrices or self.group.size() == 1:
            return
        packed = torch.cat(
            [self._empty, *(tensor.flatten().to(self._empty.dtype) for tensors in outgoing for tensor in tensors)]
        )
        incoming_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in incoming]
        received = self._empty.new_empty(sum(incoming_sizes))
        outgoing_sizes = [sum(tensor.numel() for tensor in tensors) for tensors in outgoing]
        dist.all_to_all_single(received, packed, incoming_sizes, outgoing_sizes, group=self.group)
        targets = [tensor for tensors in incoming for tensor in tensors]
        values = received.split([target.numel() for target in targets])
        for target, flat in zip(targets, values, strict=True):
            target.copy_(flat.view(target.shape))


Orthogonalize = Callable[[Sequence[torch.Tensor]], list[torch.Tensor]]


class SplitMatrices:
    """The matrices of one bucket group of which this rank owns shards.

    `shards` are its rows of these matrices, in the order that `orthogonalize_shards` takes and returns.
    """

    def __init__(
        self,
        bucket_group: BucketGroup,
        parameters: Sequence[LocalParam],
        incomplete: Sequence[OwnedShard],
        dtype: torch.dtype,
    ) -> None:
        """Plan both exchanges. All ranks of both groups compute the same plan from shapes and owner ranks.

        Args:
            parameters: of this rank, indexed by `LocalParam.index`.
            incomplete: the shards that this rank owns and that are not `is_complete`, of any bucket group.
            dtype: in which shards are sent.
        """
        group, rank = bucket_group.buckets[0].group, bucket_group.buckets[0].group.rank()
        split: dict[tuple[int, int], list[RowShard]] = {}
        for bucket in bucket_group.buckets:
            for shard in bucket.shards:
                if shard.is_split:
                    split.setdefault((shard.param_index, shard.matrix_start), []).append(shard)
        keys = sorted(split)
        row_matrices = [_matrix_of_rows(split[key]) for key in keys]
        indices = {parameter.index for bucket in bucket_group.buckets for parameter in bucket.parameters}
        local = sorted(
            (owned for owned in incomplete if owned.shard.param_index in indices),
            key=lambda owned: (owned.shard.param_index, owned.shard.start),
        )
        self._split_by_rows = [owned for owned in local if owned.shard.is_split]
        self._tp_sharded = [owned for owned in local if not owned.shard.is_split]
        self.shards = self._split_by_rows + self._tp_sharded
        is_expert = bucket_group.buckets[0].parameters[0].is_expert
        tp_group = tensor_parallel_group(is_expert)
        # What this rank holds after the first exchange, as (parameter, shape of its slice).
        at_home = [
            (parameters[key[0]], matrix.shape)
            for key, matrix in zip(keys, row_matrices, strict=True)
            if matrix.owner == rank
        ]
        self._home_is_sliced = [parameter.tp_mode != "unsharded" for parameter, _ in at_home]
        sliced = [(parameter, shape) for parameter, shape in at_home if parameter.tp_mode != "unsharded"]
        for owned in self._tp_sharded:
            shape = (owned.shard.matrix_rows, owned.shard.columns)
            sliced += [(owned.param, shape)] * len(owned.matrices(owned.grad))
        shapes = [parameter.full_matrix_shape(rows) for parameter, (rows, _) in sliced]
        costs = [newton_schulz_cost(rows, columns) for rows, columns in shapes]
        owners = balance_by_cost(costs, tp_group.size())
        like = torch.empty(0, dtype=dtype, device=bucket_group.buckets[0].parameters[0].torch_param.device)
        self._row_exchange = MatrixExchange(group, row_matrices, like)
        self._slice_exchange = MatrixExchange(
            tp_group,
            [
                _matrix_of_slices(parameter, shape, owner, tp_group.size())
                for (parameter, _), shape, owner in zip(sliced, shapes, owners, strict=True)
            ],
            like,
        )

    def orthogonalize_shards(
        self, directions: Sequence[torch.Tensor], orthogonalize: Orthogonalize
    ) -> list[torch.Tensor]:
        """Return the orthogonalized rows of every shard of `shards`. A collective of both groups.

        Args:
            directions: momentum directions [rows, columns], one for each of `shards`.
            orthogonalize: maps full matrices to their orthogonal factors, on the rank that gathered them.
        """
        num_split = len(self._split_by_rows)
        homes = self._row_exchange.gather_to_owners(directions[:num_split])
        sliced = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if is_sliced]
        for owned, direction in zip(self._tp_sharded, directions[num_split:], strict=True):
            sliced += owned.matrices(direction)
        full = [matrix for matrix, is_sliced in zip(homes, self._home_is_sliced, strict=True) if not is_sliced]
        results = orthogonalize(full + self._slice_exchange.gather_to_owners(sliced))
        slice_results = iter(self._slice_exchange.scatter_from_owners(results[len(full) :]))
        full_results = iter(results[: len(full)])
        homes = [next(slice_results) if is_sliced else next(full_results) for is_sliced in self._home_is_sliced]
        updates = self._row_exchange.scatter_from_owners(homes)
        for owned in self._tp_sharded:
            updates.append(torch.cat([next(slice_results) for _ in owned.matrices(owned.grad)]))
        return updates


def _matrix_of_rows(shards: Sequence[RowShard]) -> ExchangedMatrix:
    """A matrix whose rows several data-parallel ranks own."""
    first = shards[0]
    slices = tuple((s.owner_rank, s.start - first.matrix_start, s.stop - first.matrix_start) for s in shards)
    return ExchangedMatrix((first.matrix_rows, first.columns), owner=first.home_rank, dim=-2, input_slices=slices)


def _matrix_of_slices(parameter: LocalParam, shape: tuple[int, int], owner: int, num_slices: int) -> ExchangedMatrix:
    """A matrix that tensor parallelism shards or replicates; `shape` is that of the full matrix."""
    if parameter.tp_mode == "replicated":
        return ExchangedMatrix(shape, owner)
    size = shape[parameter.tp_dim] // num_slices
    slices = tuple((rank, rank * size, (rank + 1) * size) for rank in range(num_slices))
    return ExchangedMatrix(shape, owner, parameter.tp_dim, slices)
