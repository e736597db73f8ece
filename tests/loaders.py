"""Loaders of a local split, in the few words that a test has for them."""

from collections.abc import Sequence
from typing import Any

from simclr_dali.pipeline.batch_plan import BatchPlan
from simclr_dali.pipeline.draws import Recipe
from simclr_dali.pipeline.files import LocalFiles, Split
from simclr_dali.pipeline.graph import LoaderConfig
from simclr_dali.pipeline.kept_pictures import KeptPictures
from simclr_dali.pipeline.loader import MAX_BAD_FRACTION, TwoViews
from simclr_dali.pipeline.order import Order
from simclr_dali.pipeline.subset import Subset
from simclr_dali.shards.manifest import ShardSet


def local(shards: ShardSet) -> Split:
    """A set that lies on the disk."""
    return Split(shards, lambda: LocalFiles(shards))


def two_views(
    split: Split | ShardSet,
    order: Order | Subset,
    recipes: Recipe | Sequence[Recipe],
    config: LoaderConfig,
    *,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    kept: KeptPictures | None = None,
    **plan: Any,
) -> TwoViews:
    """plan: fields of BatchPlan."""
    split = split if isinstance(split, Split) else local(split)
    return TwoViews(split, BatchPlan(order, **plan), recipes, config, max_bad_fraction=max_bad_fraction, kept=kept)
