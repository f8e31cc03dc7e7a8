"""What all configurations share: strict sections, and reading them from a JSON file with command-line overrides."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from star_dist.errors import UserError
from star_dist.files import read_text
from star_dist.object_store import check_endpoint

Fraction = Annotated[float, Field(ge=0, le=1)]
Momentum = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Name = Annotated[str, Field(min_length=1)]

HOLDS_A_KEY = "holds_a_key"  # the kind of a problem whose value must not be shown


def _without_keys(endpoint: str) -> str:
    try:
        return check_endpoint(endpoint)
    except UserError as error:
        raise PydanticCustomError(HOLDS_A_KEY, "{reason}", {"reason": str(error)}) from None


Endpoint = Annotated[str, AfterValidator(_without_keys)]


def _of_a_file_system(folder: str) -> str:
    if "://" in folder:
        raise ValueError("must be a folder of a file system")
    return folder


LocalFolder = Annotated[Name, AfterValidator(_of_a_file_system)]


class Section(BaseModel):
    # JSON has no word for infinity and NaN: what is written with one could not be read again.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the option, its value and what to change."""


AnyConfig = TypeVar("AnyConfig", bound=Section)


def load_config(kind: type[AnyConfig], path: str | os.PathLike[str], overrides: Sequence[str] = ()) -> AnyConfig:
    """Reads a JSON file, applies `section.key=value` overrides (values are JSON, or else plain strings), validates.

    Raises:
        ConfigError: no such file, no JSON, an unknown key, a wrong type, or values that do not fit together.
    """
    try:
        text = read_text(Path(path), f"config {path}")
    except UserError as error:
        raise ConfigError(str(error)) from None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold one JSON object, got {type(values).__name__}")
    for override in overrides:
        _apply_override(values, override)
    return parse_config(kind, values, source=str(path))


def parse_config(kind: type[AnyConfig], values: dict[str, Any], source: str = "config") -> AnyConfig:
    """Validates values that are already in memory; `source` names them in errors (see `load_config`)."""
    try:
        return kind.model_validate_json(json.dumps(values))
    except ValidationError as error:
        lines = [_describe(kind, problem) for problem in error.errors()]
        raise ConfigError(f"{source}: " + "; ".join(lines)) from None


def dump_config(config: Section) -> str:
    """The complete configuration, defaults included, as JSON text."""
    return config.model_dump_json(indent=2)


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"override {override!r} is not of the form section.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *sections, last = key.split(".")
    for depth, name in enumerate(sections):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise ConfigError(f"override {override!r}: {'.'.join(sections[: depth + 1])} is a value, not a section")
    values[last] = value


def _describe(kind: type[Section], problem: Any) -> str:
    """One validation problem of pydantic as a sentence with the dotted key and the value."""
    location = ".".join(str(part) for part in problem["loc"])
    if problem["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        nearest = difflib.get_close_matches(location, _dotted_keys(kind), n=1, cutoff=0.4)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        return f"unknown key {location}{hint}"
    if problem["type"] == "missing":
        return f"{location} is missing"
    message = problem["msg"].removeprefix("Value error, ")
    if not location:
        return message
    if problem["type"] == HOLDS_A_KEY:
        return f"{location}: {message}"
    value = json.dumps(problem["input"], default=str)
    return f"{location}: {message[0].lower()}{message[1:]}, got {value if len(value) < 80 else value[:77] + '...'}"


def _dotted_keys(kind: Any, prefix: str = "") -> list[str]:
    fields = getattr(kind, "model_fields", None) or getattr(kind, "__dataclass_fields__", None) or {}
    keys = []
    for name, field in fields.items():
        keys.append(prefix + name)
        annotation = getattr(field, "annotation", None)
        keys += _dotted_keys(annotation, f"{prefix}{name}.") if isinstance(annotation, type) else []
    return keys
