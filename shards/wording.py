"""Numbers and names in sentences: ``1 class``, ``2 classes``, ``35.2 MB``, ``a, b and 3 more``."""

from collections.abc import Sequence


def counted(number: int, noun: str, plural: str = "") -> str:
    """``1 class``, ``2 classes``."""
    return f"{number:,} {noun if number == 1 else plural or f'{noun}s'}"


def listed(names: Sequence[str], most: int, between: str = ", ") -> str:
    """``a, b and 3 more``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return between.join(names[:most]) + more


def of_classes(classes: int) -> str:
    """``of 10 classes``, or that there are no labels."""
    return f"of {counted(classes, 'class', 'classes')}" if classes else "without labels"


def size_text(size: float) -> str:
    """Bytes as kB, MB or GB with three digits that say something."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if size >= factor:
            return f"{size / factor:,.3g} {unit}" if size < 1000 * factor else f"{size / factor:,.0f} {unit}"
    return f"{size / 1e3:,.3g} kB"


def printable(name: str) -> str:
    """A file's name for a picture or a terminal; bytes that are no text become escapes."""
    return name.encode("utf-8", "backslashreplace").decode()
