"""The rules that tie the peak of the learning rate to the batch."""

import math

# SimCLR (Chen et al. 2020), section 2.1 and appendix B.1, by name: global batch -> peak learning rate.
LR_RULES = {
    "linear": lambda batch: 0.3 * batch / 256,
    "sqrt": lambda batch: 0.075 * math.sqrt(batch),
}
LR_FORMULAS = {"linear": "0.3 B/256", "sqrt": "0.075 sqrt(B)"}
