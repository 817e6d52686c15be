"""Checks of recipe values, each of which says what would be accepted. All raise `UserError`."""

from moonlight.errors import UserError


def require(condition: bool, message: str) -> None:
    """Raise `message` unless `condition`."""
    if not condition:
        raise UserError(message)


def positive(section: str, **values: float) -> None:
    """Every value is greater than 0."""
    for name, value in values.items():
        require(value > 0, f"{section}.{name} is {value}: it must be greater than 0")


def one_of(name: str, value: object, accepted: tuple[object, ...]) -> None:
    """The value is one of those accepted."""
    require(value in accepted, f"{name} is {value!r}: accepted are {', '.join(map(repr, accepted))}")
