"""What lies in a source and is not packed."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

_NAMES = 20  # kept of each reason, where nothing is lost


@dataclass
class LeftOut:
    """What lies in a source and is not packed: how many by reason, and names.

    Of pictures that are lost every name is kept; of the rest the first twenty of each reason.
    """

    counts: Counter[str] = field(default_factory=Counter)
    names: dict[str, list[str]] = field(default_factory=dict)
    lost: Counter[str] = field(default_factory=Counter)

    def add(self, reason: str, name: str, *, lost: bool = False) -> None:
        """Count one; lost: it was meant to be a sample."""
        self.counts[reason] += 1
        self.lost[reason] += lost
        names = self.names.setdefault(reason, [])
        if lost or len(names) < _NAMES:
            names.append(name)

    def as_report(self) -> list[dict[str, Any]]:
        """For report.json: per reason the count, how many of them are lost samples, and names."""
        return [
            {"reason": reason, "count": count, "lost": self.lost[reason], "names": self.names[reason]}
            for reason, count in sorted(self.counts.items())
        ]

    def __str__(self) -> str:
        """``3 no label, 2 rubbish of file managers``; the commonest reasons first."""
        most = self.counts.most_common(6)
        rest = sum(self.counts.values()) - sum(count for _, count in most)
        return ", ".join([f"{count:,} {reason}" for reason, count in most] + ([f"{rest:,} others"] if rest else []))
