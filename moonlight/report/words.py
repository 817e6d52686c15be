"""Text of numbers, durations and times on the page."""

from datetime import UTC, datetime

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_number(value: float | None, digits: int = 3) -> str:
    """Return a number with a unit prefix, such as 1.23M for 1234567; a dash for None."""
    if value is None:
        return "–"
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Return seconds in their two largest units, such as 3 h 20 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days:,} d {hours} h"


def format_time(time: object) -> str:
    """Return seconds since 1970 as date and time in UTC; an empty string if `time` is not valid."""
    if isinstance(time, bool) or not isinstance(time, int | float):
        return ""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def flatten_items(tree: object, prefix: str = "") -> list[tuple[str, str]]:
    """Return nested mappings as (dotted key, text of the value); a list is one value."""
    if not isinstance(tree, dict) or not tree:
        return [(prefix, "none" if tree is None or tree == {} else str(tree))]
    return [
        pair for key, value in tree.items() for pair in flatten_items(value, f"{prefix}.{key}" if prefix else str(key))
    ]
