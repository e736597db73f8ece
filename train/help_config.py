"""The fields of a configuration and what they mean, for simclr-dali pretrain --help-config [KEY]."""

import difflib
import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple, get_args

import pydantic
from pydantic_core import PydanticUndefined

from simclr_dali.model.simclr import ENCODERS
from simclr_dali.shards.errors import UserError
from simclr_dali.train.config import CONSTANTS, Config

_WIDTH = 110


class Key(NamedTuple):
    """A field of the configuration."""

    path: str
    values: str
    """Its type, or its values where they are few."""
    default: str
    about: str


def help_config(key: str = "") -> str:
    """What the field ``key`` means, or those of a block, or ("") all of them. Raises UserError where there is none."""
    every = list(keys(Config))
    found = [one for one in every if not key or one.path == key or one.path.startswith(f"{key}.")]
    if not found:
        near = difflib.get_close_matches(key, [one.path for one in every], 1, 0.4)
        ends = [one.path for one in every if one.path.endswith(f".{key}")]
        hint = f"; did you mean {(ends or near)[0]}?" if ends or near else ""
        raise UserError(f"there is no key {key!r} in a configuration{hint}")
    parts = []
    for one in found:
        about = textwrap.fill(one.about, _WIDTH, initial_indent="    ", subsequent_indent="    ")
        parts.append(f"{one.path}: {one.values}{one.default}\n{about}")
    if not key:
        constants = ", ".join(f"{path} ({value!r})" for path, value in CONSTANTS.items())
        parts.append(f"DeepSpeed's keys that may stand there with the one value they have: {constants}")
    return "\n".join(parts)


def keys(model: type[pydantic.BaseModel], prefix: str = "") -> Iterator[Key]:
    """The fields of a block and of the blocks in it, in their order."""
    for name, field in model.model_fields.items():
        path, about = f"{prefix}{name}", " ".join((field.description or "").split())
        blocks = [kind for kind in _members(field.annotation) if _is_block(kind)]
        if not blocks:
            default = "" if field.default is PydanticUndefined else f" = {shown(field.default)}"
            yield Key(path, values(field.annotation), default, about)
            continue
        if len(blocks) > 1:  # told apart by their type
            kinds = [get_args(block.model_fields["type"].annotation)[0] for block in blocks]
            yield Key(f"{path}.type", " | ".join(kinds), "", "Which optimizer; its params differ by it.")
            yield from _params(path, dict(zip(kinds, blocks, strict=True)))
            continue
        if about:
            yield Key(path, "a block", "", about)
        if path != "simclr.views.second":  # which has the same fields once more
            yield from keys(blocks[0], f"{path}.")
        if path == "simclr.encoder":
            yield Key(f"{path}.*", "", "", f"The fields of the encoder's description; names are {', '.join(ENCODERS)}.")


def _params(path: str, blocks: dict[str, type[pydantic.BaseModel]]) -> Iterator[Key]:
    """The params of all optimizers, each with those that have it."""
    found: dict[str, Key] = {}
    of: dict[str, list[str]] = {}
    for kind, block in blocks.items():
        for one in keys(block.model_fields["params"].annotation, f"{path}.params."):  # type: ignore[arg-type]
            found.setdefault(one.path, one)
            of.setdefault(one.path, []).append(kind)
    for key, one in found.items():
        only = "" if len(of[key]) == len(blocks) else f" Of {' and '.join(of[key])}."
        yield one._replace(about=one.about + only)


def _members(annotation: Any) -> list[Any]:
    """A type, or those of a union, or what is inside of Annotated."""
    arguments = get_args(annotation)
    if isinstance(annotation, type) or not arguments:
        return [annotation]
    return [member for argument in arguments for member in _members(argument)]


def _is_block(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, pydantic.BaseModel)


def values(annotation: Any) -> str:
    """A type in words."""
    text = pydantic.TypeAdapter(annotation).json_schema() if annotation is not None else {}
    return _of_schema(text)


def _of_schema(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(_of_schema(one) for one in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(map(shown, schema["enum"]))
    if "const" in schema:
        return shown(schema["const"])
    if schema.get("type") == "array":
        if "prefixItems" in schema:
            return f"[{', '.join(map(_of_schema, schema['prefixItems']))}]"
        return f"list of {_of_schema(schema.get('items') or {})}"
    names = {"integer": "integer", "number": "number", "string": "text", "boolean": "true | false", "null": "null"}
    return names.get(str(schema.get("type")), "value")


def shown(value: Any) -> str:
    """A value as it stands in JSON."""
    return json.dumps(value)
