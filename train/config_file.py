"""Reading the one configuration file: a DeepSpeed JSON whose key "simclr" holds what is ours.

A key "base" names another config, a preset or a file beside this one, of which this one changes what it says.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pydantic

from simclr_dali.model import migrations, mmpretrain_names
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config import LR_RULES, Config
from simclr_dali.train.simclr_block import wrong_value

PRESETS = Path(__file__).resolve().parent / "configs"


def load_config(name: str, overrides: list[str], data: str | None = None, run: str | None = None) -> Config:
    """Read config ``name`` (a path, or a preset of train/configs), apply ``key.key=value`` overrides and check it.

    Raises UserError with one sentence for the first thing that is wrong.
    """
    path, raw = _read_with_base(name)
    for override in overrides:
        _set(raw, override)
    simclr = raw.setdefault("simclr", {})
    if not isinstance(simclr, dict):
        raise UserError(f"{path}: simclr is {simclr!r}, but must be a block of keys")
    if data is not None:
        simclr["data"] = data
    if run is not None:
        simclr["run"] = run
    if simclr.get("run") in (None, ""):
        simclr["run"] = f"runs/{path.stem}"
    _resolve_optimizer(raw)
    _refuse_removed(path, raw)
    try:
        config = Config.model_validate(raw)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {_sentence(error)}") from error
    if not config.simclr.data:
        raise UserError(f"{path} names no data folder; give --data FOLDER, made by scripts/make_shards.sh")
    return config


def _read_with_base(name: str, folder: Path | None = None, seen: tuple[Path, ...] = ()) -> tuple[Path, dict[str, Any]]:
    """The config's path, and its keys over those of its base."""
    path, text = _read(name, folder)
    try:
        raw = json.loads(text, object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must be a JSON object")
    if path.resolve() in seen:
        raise UserError(f"{path} is its own base; name another one")
    base = raw.pop("base", None)
    if base is None:
        return path, raw
    if not isinstance(base, str):
        raise UserError(f"{path}: base is {base!r}; give the name of a config")
    return path, _merged(_read_with_base(base, path.parent, (*seen, path.resolve()))[1], raw)


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes``, block by block; a block of another type (of optimizer) is taken whole."""
    if "type" in base and str(changes.get("type", base["type"])).lower() != str(base["type"]).lower():
        return changes
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merged(base[key], value) if both else value
    return merged


def _refuse_removed(path: Path, raw: dict[str, Any]) -> None:
    for removed, why in migrations.REMOVED.items():
        block, key = migrations.block_of(raw, removed)
        if key in block:
            raise UserError(f"{path}: {removed} is {block[key]!r}, which there is no more ({why}); remove it")


def _read(name: str, folder: Path | None) -> tuple[Path, str]:
    """The config's path and text: a file of that name (in ``folder``, where a base is asked for), else a preset."""
    try:
        path = (folder or Path()) / name
        theirs = mmpretrain_names.PRESETS.get(mmpretrain_names.config_name(name))
        if path.is_file() and path.suffix == ".py" and theirs:
            raise UserError(
                f"config {name} is a file of mmpretrain, which is not read here; its name alone stands for the preset "
                f"{theirs}, and --set changes keys of that"
            )
        if not path.is_file():
            path = PRESETS / (theirs or name)
        if not path.is_file():
            presets = ", ".join(sorted(preset.name for preset in PRESETS.glob("*.json")))
            raise UserError(f"config {name} is neither a file nor a preset; the presets are {presets}")
        return path, path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config {name[:200]} cannot be read ({error}); give a JSON file in UTF-8") from error


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice in a block")
    return found


def _set(raw: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals:
        raise UserError(f"--set {override!r} has no '='; write it as --set simclr.epochs=100")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = text
    *parents, last = keys.split(".")
    block = raw
    for key in parents:
        block = block.setdefault(key, {})
        if not isinstance(block, dict):
            raise UserError(f"--set {override!r}: {key!r} is a value, not a block of the config")
    block[last] = value


def _resolve_optimizer(raw: dict[str, Any]) -> None:
    """Write the optimizer's name as we do, and its rate as a number. What is not as it should be is left as it is."""
    block = raw.get("optimizer")
    if not isinstance(block, dict):
        return
    names = {name.lower(): name for name in ("LARS", "SGD", "AdamW")}
    block["type"] = names.get(str(block.get("type")).lower(), block.get("type"))
    params, batch = block.get("params"), raw.get("train_batch_size")
    if not isinstance(params, dict) or params.get("lr") != "auto":
        return
    if isinstance(batch, int) and 0 < batch < 2**31:
        rule = raw["simclr"].get("lr_rule", "linear")
        if not isinstance(rule, str) or rule not in LR_RULES:
            raise UserError(
                f"optimizer.params.lr is 'auto', but simclr.lr_rule is {rule!r}; give a number, or one of the rules "
                f"{', '.join(LR_RULES)}"
            )
        params["lr"] = LR_RULES[rule](batch)


# What other trainers call it, or DeepSpeed where one key decides what it has three for.
_OTHER_NAMES = {
    "gradient_accumulation_steps": "train_micro_batch_size_per_gpu",
    "batch_size": "train_batch_size",
    "learning_rate": "optimizer.params.lr",
    "lr": "optimizer.params.lr",
    "base_lr": "optimizer.params.lr",
    "max_epochs": "simclr.epochs",
    "num_epochs": "simclr.epochs",
    "weight_decay": "optimizer.params.weight_decay",
    "tau": "simclr.temperature",
    "data_path": "simclr.data",
    "output_dir": "simclr.run",
    "num_workers": "simclr.loader_threads",
    "workers": "simclr.loader_threads",
    "crop_size": "simclr.image_size",
    "arch": "simclr.encoder.name",
    "optimizer": "optimizer",
    "backbone": "simclr.encoder.name",
}


def _nearest(key: str) -> str:
    """Which known key may be meant."""
    known = sorted(_known_keys(Config))
    last = key.rpartition(".")[2]
    if last in _OTHER_NAMES:
        return f"here it is called {_OTHER_NAMES[last]!r}"
    by_last = {path.rpartition(".")[2]: path for path in known}
    same = [path for path in known if path.rpartition(".")[2] == last]
    near = same or difflib.get_close_matches(key, known, 1, 0.8)
    near = near or [by_last[name] for name in difflib.get_close_matches(last, by_last, 1)]
    return f"did you mean {near[0]!r}?" if near else "see train/config.py and train/simclr_block.py for the known ones"


def _known_keys(block: type[pydantic.BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in block.model_fields.items():
        kinds = [field.annotation, *get_args(field.annotation)]
        blocks = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)]
        for inside in blocks:
            yield from _known_keys(inside, f"{prefix}{name}.")
        if not blocks:
            yield f"{prefix}{name}"


def _sentence(error: pydantic.ValidationError) -> str:
    first, *others = error.errors()
    key = ".".join(str(part) for part in first["loc"][:-1])
    if key in set(_known_keys(Config)):  # of several kinds, each of which has an error of its own
        kinds = [first, *(other for other in others if other["loc"][: len(first["loc"]) - 1] == first["loc"][:-1])]
        wanted = " or ".join(kind["msg"].removeprefix("Input should be ") for kind in kinds)
        return wrong_value(key, {**first, "msg": f"Input should be {wanted}"})
    if first["type"] == "union_tag_invalid":
        return f"optimizer.type is {first['ctx']['tag']!r}; choose one of {first['ctx']['expected_tags']}"
    location = first["loc"]
    if location[:1] == ("optimizer",):
        location = location[:1] + location[2:]  # without the name of the optimizer, which pydantic puts in
    key = ".".join(str(part) for part in location)
    if first["type"] == "extra_forbidden":
        return f"unknown key {key!r}; {_nearest(key)}"
    if first["type"] == "missing":
        return f"key {key!r} is missing"
    if first["type"] == "value_error":  # ours, which begins with the key inside of its block
        return f"{key}.{first['ctx']['error']}" if key else str(first["ctx"]["error"])
    return wrong_value(key, first)
