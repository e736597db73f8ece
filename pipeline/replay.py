"""A batch kept to be looked at later: which samples it was made of, and what their views drew."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from simclr_dali.pipeline.draws import Draws, Recipe, draw_views
from simclr_dali.pipeline.order import Ids
from simclr_dali.shards.durable import write_durably
from simclr_dali.shards.errors import UserError
from simclr_dali.shards.manifest import ShardSet


@dataclass(frozen=True)
class Replay:
    """A batch of a run, and all that its views depend on."""

    data: str
    """Where the shards are."""
    manifest: str
    """Fingerprint of their set."""
    about: dict[str, Any]
    """Step, rank and reason, for the reader."""
    seed: int
    epoch: int
    size: int
    """Side of the views, in pixels."""
    interpolation: str
    recipes: tuple[Recipe, ...]
    ids: Ids
    """As planned; damaged samples were replaced."""

    def draws(self, shards: ShardSet, shown: Ids | None = None) -> list[Draws]:
        """What each view drew. shown: the samples that stood in for damaged ones, and those that did not."""
        rows = shards.samples[self.ids if shown is None else shown]
        width, height = rows["width"].astype(np.int64), rows["height"].astype(np.int64)
        return draw_views(self.recipes, self.seed, self.epoch, self.ids, width, height)


def write(path: Path, replay: Replay, shards: ShardSet) -> None:
    """Keep the batch and its draws, readable, in a JSON file. Raises UserError where the disk refuses."""
    draws = replay.draws(shards)
    samples = [
        {"id": int(sample), "where": shards.where(int(sample)), "views": [_row(view, row) for view in draws]}
        for row, sample in enumerate(replay.ids)
    ]
    head = {field.name: getattr(replay, field.name) for field in fields(replay) if field.name not in ("recipes", "ids")}
    content = {**head, "recipes": [recipe.model_dump(mode="json") for recipe in replay.recipes], "samples": samples}
    write_durably(path, (json.dumps(content, indent=1) + "\n").encode())


def read(path: Path, shards: ShardSet | None = None) -> Replay:
    """What :func:`write` kept. With ``shards``, also checks that they are the set it was made of and draw the same.

    Raises UserError where the file is missing, is none of ours, or is of another set or version.
    """
    try:
        content = json.loads(path.read_text())
        recipes = tuple(Recipe.model_validate(recipe) for recipe in content.pop("recipes"))
        samples = content.pop("samples")
        replay = Replay(**content, recipes=recipes, ids=np.array([sample["id"] for sample in samples], np.int64))
        kept_draws = [sample["views"] for sample in samples]
    except OSError as error:
        raise UserError(
            f"cannot read {path} ({error.strerror}); give a file bad-step-*.json of a run folder"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(f"{path} is no kept batch ({error}); give a file bad-step-*.json of a run folder") from error
    if shards is not None:
        if shards.fingerprint != replay.manifest:
            raise UserError(f"{path} was made of another data set than {shards.folder} (the manifests differ)")
        if not all(0 <= sample < len(shards) for sample in replay.ids):
            raise UserError(f"{path} names samples that {shards.folder} does not have; give an untouched file")
        draws = replay.draws(shards)
        for row, views in enumerate(kept_draws):
            # Only what the file holds: steps that were added since it was written are drawn by no recipe in it.
            made = [{key: _row(view, row).get(key) for key in kept} for kept, view in zip(views, draws, strict=True)]
            if views != made or not all(views):
                raise UserError(f"{path} holds other draws than this version makes; use the version that wrote it")
    return replay


def _row(draws: Draws, row: int) -> dict[str, Any]:
    return {field.name: getattr(draws, field.name)[row].tolist() for field in fields(draws)}
