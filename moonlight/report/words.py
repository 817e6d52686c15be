"""Numbers, durations and times as the page writes them."""

from datetime import UTC, datetime

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def format_number(value: float | None, digits: int = 3) -> str:
    """1234567 as 1.23M; a dash for None."""
    if value is None:
        return "–"
    for size, unit in _UNITS:
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"


def duration(seconds: float) -> str:
    """Seconds in the two largest units that say something."""
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
    """Seconds since 1970 as a date and a time of day; nothing if they are no such time."""
    if isinstance(time, bool) or not isinstance(time, int | float):
        return ""
    try:
        return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (OverflowError, ValueError, OSError):
        return ""


def flatten_items(tree: object, prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as dotted keys and the text of their values; a list is one value."""
    if not isinstance(tree, dict) or not tree:
        return [(prefix, "none" if tree is None or tree == {} else str(tree))]
    return [
        pair for key, value in tree.items() for pair in flatten_items(value, f"{prefix}.{key}" if prefix else str(key))
    ]
