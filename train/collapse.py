"""Notices a run whose embeddings say nothing about their pictures, which no loss curve shows at a glance."""

import math
from collections.abc import Iterable, Mapping

STEPS = 100
_NEAR = 1e-3  # of a cosine to 1 or -1


class CollapseWatch:
    """Looks at the cosines that NT-Xent reports, and speaks once, after STEPS steps in a row of the same collapse."""

    def __init__(self) -> None:
        self._steps = {"same": 0, "opposite": 0}
        self._told = False

    def warning(self, rows: Iterable[Mapping[str, float]]) -> str | None:
        """What to tell after the steps of ``rows``; None where nothing is wrong, or it was told before."""
        for row in rows:
            positive, hardest = row.get("positive", math.nan), row.get("hardest_negative", math.nan)
            seen = {"same": positive > 1 - _NEAR and hardest > 1 - _NEAR, "opposite": positive < _NEAR - 1}
            self._steps = {kind: self._steps[kind] + 1 if seen[kind] else 0 for kind in seen}
            if max(self._steps.values()) >= STEPS and not self._told:
                self._told = True
                return _TEXTS[max(self._steps, key=lambda kind: self._steps[kind])]
        return None


_TEXTS = {
    "same": f"WARNING: for {STEPS} steps all images have had the same embedding (positive and hardest negative are 1): "
    "the run learns nothing any more; stop it, lower the learning rate or lengthen the warm-up, and begin anew",
    "opposite": f"WARNING: for {STEPS} steps the two views of each image have been opposites (positive is -1): "
    "BatchNorm sees too few images at a time, or the views are fed wrongly; stop the run and raise the micro-batch",
}
