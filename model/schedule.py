"""Learning rate by step."""

import math


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of ``step`` (from 0): linear up to ``peak`` in ``warmup_steps``, then a cosine to 0 at ``total_steps``.

    google-research/simclr, model_util.py, WarmUpAndCosineDecay. Raises ValueError for a step before the first.
    """
    if step < 0:
        raise ValueError(f"step is {step}; steps count from 0")
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
