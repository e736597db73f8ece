"""The named protocols of a linear probe, each as its source states it.

Numbers of different protocols are not comparable to the half point. What a run changes (batch, epochs) is reported
beside its name.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

from simclr_dali.model import mmpretrain_names


@dataclass(frozen=True)
class Schedule:
    """A classifier trained on augmented views through the frozen encoder, for a number of epochs.

    Views are random crops (area 0.08 to 1) and flips. The learning rate has no warm-up and falls to 0 by a cosine.
    """

    optimizer: str
    """"lars" (nothing excluded), "sgd" or "nesterov"."""
    lr_per_256: float
    """Peak learning rate at batch 256; it grows in proportion to the batch."""
    batch: int
    weight_decay: float
    epochs: int
    cosine: str
    """Whether the rate is set anew each "step" or each "epoch"."""
    init_std: float
    """Standard deviation of the first weights, normal; 0 starts at zero."""
    interpolation: str
    source: str
    """The paper or file that states the protocol."""
    momentum: float = 0.9
    decay_bias: bool = True
    """Whether weight_decay includes the bias."""

    @property
    def lr(self) -> float:
        return self.lr_per_256 * self.batch / 256

    def changed(
        self, batch: int | None, epochs: int | None, own_epochs: int | None = None
    ) -> tuple["Schedule", dict[str, Any]]:
        """With another batch or number of epochs, and what differs from the protocol because of it.

        own_epochs: the protocol's, where they depend on the data.
        """
        own = replace(self, epochs=own_epochs or self.epochs)
        other = replace(own, batch=batch or own.batch, epochs=epochs or own.epochs)
        before, after = asdict(own), asdict(other)
        return other, {key: after[key] for key in before if before[key] != after[key]}


SCHEDULES = {
    "mmpretrain-lars-90e": Schedule(
        optimizer="lars", lr_per_256=0.1, batch=4096, weight_decay=0.0, epochs=90, cosine="epoch", init_std=0.01,
        interpolation="bilinear",
        source="open-mmlab/mmpretrain, configs/simclr/benchmarks/resnet50_8xb512-linear-coslr-90e_in1k.py",
    ),
    "google-sgd-90e": Schedule(
        optimizer="nesterov", lr_per_256=0.1, batch=4096, weight_decay=1e-6, epochs=90, cosine="step", init_std=0.0,
        interpolation="bicubic",
        source="google-research/simclr, README.md (linear evaluation) and model_util.py; Chen et al. 2020, B.6; its "
        "TensorFlow resizes without antialiasing, we with it",
    ),
    "moco-sgd-90e": Schedule(
        optimizer="sgd", lr_per_256=0.1, batch=1024, weight_decay=0.0, epochs=90, cosine="epoch", init_std=0.01,
        interpolation="bilinear",
        source="facebookresearch/moco-v3, main_lincls.py",
    ),
}  # fmt: skip
# Of eval/finetune.py; the encoder is not frozen. The epochs depend on the share of the labels.
FINETUNE = Schedule(
    optimizer="nesterov", lr_per_256=0.05, batch=4096, weight_decay=0.0, epochs=30, cosine="step", init_std=0.0,
    interpolation="bicubic", source="Chen et al. 2020, appendix B.5",
)  # fmt: skip
FAST, SWEEP = "fast", "sweep"
ABOUT = {
    FAST: "features of each image's central view, extracted once; multinomial logistic regression, by L-BFGS, at a "
    "fixed weight decay on features of variance 1",
    SWEEP: "features of each image's central view, extracted once; 100 classifiers trained side by side at as many "
    "learning rates and weight decays, the best on a tenth of train kept aside; that setting once more on all of it. "
    "The batches, and with them the last digits, depend on the number of processes",
    **{name: schedule.source for name, schedule in SCHEDULES.items()},
}
NAMES = tuple(ABOUT)


def protocol_name(text: str) -> str:
    """The type of an argument that is one of NAMES, or mmpretrain's name of its config."""
    return mmpretrain_names.PROTOCOLS.get(mmpretrain_names.config_name(text), text)
