"""Learning rate by step, and the rules that tie its peak to the batch."""

import math

# SimCLR (Chen et al. 2020), section 2.1 and appendix B.1, by name: global batch -> peak learning rate.
LR_RULES = {
    "linear": lambda batch: 0.3 * batch / 256,
    "sqrt": lambda batch: 0.075 * math.sqrt(batch),
}
LR_FORMULAS = {"linear": "0.3 B/256", "sqrt": "0.075 sqrt(B)"}


def learning_rate(step: int, peak: float, warmup_steps: int, total_steps: int) -> float:
    """The rate of ``step`` (from 0): linear up to ``peak`` in ``warmup_steps``, then a cosine to 0 at ``total_steps``.

    google-research/simclr, model_util.py, WarmUpAndCosineDecay.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return peak * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
