"""Memory that an update needs besides the state, and the arithmetic of Newton-Schulz, from a rank's matrices alone."""

from dataclasses import dataclass, field

from moonlight.config.run import RunConfig
from moonlight.placement.comm_bytes import direction_bytes
from moonlight.placement.owners import AT_ONCE, GRAM_FROM_SIDE, newton_schulz_cost

Shape = tuple[int, int]


@dataclass
class Matrices:
    """What one rank orthogonalises and updates. Counts may be fractions, where they are means over ranks."""

    local: dict[Shape, float] = field(default_factory=dict)
    """Matrices that are whole here, by shape."""
    gathered: dict[Shape, float] = field(default_factory=dict)
    """Matrices that are brought together here."""
    elements_of_members: float = 0
    """Elements owned here of matrices that are brought together somewhere."""
    elements_of_adamw: float = 0

    def add(self, shape: Shape, count: float, *, is_local: bool) -> None:
        """So many matrices more."""
        kind = self.local if is_local else self.gathered
        kind[shape] = kind.get(shape, 0) + count

    @property
    def whole_elements(self) -> float:
        """Elements of the matrices that are whole here."""
        return sum(shape[0] * shape[1] * count for shape, count in self.local.items())

    def flops(self, config: RunConfig) -> float:
        """Floating-point operations of Newton-Schulz in a step: two products of n^2 m and one of n^3 in each of its
        steps, as they are written: neither symmetry nor shared Gram matrices are counted."""
        both = [*self.local.items(), *self.gathered.items()]
        cost = sum(newton_schulz_cost(*shape) * count for shape, count in both)
        return 2 * cost * config.optimizer.num_newton_schulz_steps


def update_bytes(matrices: Matrices, config: RunConfig) -> float:
    """Most bytes that `DistributedMuon.step` needs at once for these matrices, by what it holds in each part.

    Matrices that are whole are updated in batches: their directions in float32, then Newton-Schulz.
    Those that are brought together are all there at once, with their slices and their results.
    """
    element = direction_bytes(config)
    whole = matrices.whole_elements
    batch = min(whole, max([AT_ONCE, *(shape[0] * shape[1] for shape in matrices.local)]))
    local = 4 * batch + _newton_schulz(matrices.local, element)
    brought = sum(shape[0] * shape[1] * count for shape, count in matrices.gathered.items())
    members = matrices.elements_of_members
    collected = 4 * members + element * brought
    gathered = collected + max(
        element * (members + brought),  # slices on the wire
        element * brought + _newton_schulz(matrices.gathered, element),
        element * (brought + members),  # results, and those of the rows owned here
    )
    adamw = (4 + 4 + 4) * min(matrices.elements_of_adamw, AT_ONCE)
    return max(local, gathered if brought + members else 0, adamw)


def _newton_schulz(shapes: dict[Shape, float], element: int) -> float:
    """Of the batch that needs most.

    Large matrices in bfloat16 (float16 inside): the batch and four matrices of its short side for each, two if it is
    square, then a second copy and one of these. Others: a batch of them and their quotient in float32 while they are
    rounded, then two copies and two Gram matrices.
    """
    most = 0.0
    for (rows, columns), count in shapes.items():
        numel = min(rows * columns * count, max(AT_ONCE, rows * columns))
        short, long = sorted((rows, columns))
        gram = short / long
        if short >= GRAM_FROM_SIDE and element == 2:
            needed = 2 * numel * max(1 + (4 if short < long else 2) * gram, 2 + gram)
        else:
            needed = 4 * numel + numel * max(4 + element, element * (2 + 2 * gram))
        most = max(most, needed)
    return most
