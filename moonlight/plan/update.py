"""Temporary memory of an optimizer update and FLOPs of Newton-Schulz, from the shapes of a rank's matrices."""

from dataclasses import dataclass, field

from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import direction_bytes
from moonlight.placement.owners import GRAM_FROM_SIDE, MAX_UPDATE_ELEMENTS, newton_schulz_cost

Shape = tuple[int, int]


@dataclass
class Matrices:
    """Matrices that one rank orthogonalizes and updates. Counts are fractions if they are means over ranks."""

    local: dict[Shape, float] = field(default_factory=dict)
    """Shape -> count of the matrices that the rank holds in full."""
    gathered: dict[Shape, float] = field(default_factory=dict)
    """Shape -> count of the matrices that the rank gathers from their shards."""
    sharded_elements: float = 0
    """Elements that the rank owns of matrices that some rank gathers."""
    adamw_elements: float = 0

    def add(self, shape: Shape, count: float, *, is_local: bool) -> None:
        """Add `count` matrices of one shape."""
        counts = self.local if is_local else self.gathered
        counts[shape] = counts.get(shape, 0) + count

    @property
    def local_elements(self) -> float:
        """Elements of the matrices that the rank holds in full."""
        return sum(shape[0] * shape[1] * count for shape, count in self.local.items())

    def flops(self, config: RunConfig) -> float:
        """Return the floating-point operations of Newton-Schulz in an optimizer step.

        Each Newton-Schulz step is counted as two products of n^2 m and one of n^3. The count ignores the savings from
        symmetry and shared Gram matrices.
        """
        counts = [*self.local.items(), *self.gathered.items()]
        cost = sum(newton_schulz_cost(*shape) * count for shape, count in counts)
        return 2 * cost * config.optimizer.num_newton_schulz_steps


def update_bytes(matrices: Matrices, config: RunConfig) -> float:
    """Return the peak bytes of `DistributedMuon.step` for these matrices, the maximum over its parts.

    The optimizer updates local matrices in batches: directions in float32, then Newton-Schulz. It holds all gathered
    matrices simultaneously, with their slices and results.
    """
    element = direction_bytes(config)
    batch = min(matrices.local_elements, max([MAX_UPDATE_ELEMENTS, *(shape[0] * shape[1] for shape in matrices.local)]))
    local = 4 * batch + _newton_schulz(matrices.local, element)
    full = sum(shape[0] * shape[1] * count for shape, count in matrices.gathered.items())
    sharded = matrices.sharded_elements
    held = 4 * sharded + element * full
    gathered = held + max(
        element * (sharded + full),  # slices in flight
        element * full + _newton_schulz(matrices.gathered, element),
        element * (full + sharded),  # results in full, and results of this rank's rows
    )
    adamw = (4 + 4 + 4) * min(matrices.adamw_elements, MAX_UPDATE_ELEMENTS)
    return max(local, gathered if full + sharded else 0, adamw)


def _newton_schulz(shapes: dict[Shape, float], element: int) -> float:
    """Return the bytes of the batch that needs the most.

    Large matrices in bfloat16 (float16 inside) need the batch and, for each matrix, four square matrices of its short
    side (two if it is square), then a second copy of the batch and one of these. Other matrices need the batch and its
    quotient in float32 for the rounding, then two copies and two Gram matrices.
    """
    largest = 0.0
    for (rows, columns), count in shapes.items():
        numel = min(rows * columns * count, max(MAX_UPDATE_ELEMENTS, rows * columns))
        short, long = sorted((rows, columns))
        gram = short / long
        if short >= GRAM_FROM_SIDE and element == 2:
            needed = 2 * numel * max(1 + (4 if short < long else 2) * gram, 2 + gram)
        else:
            needed = 4 * numel + numel * max(4 + element, element * (2 + 2 * gram))
        largest = max(largest, needed)
    return largest
