"""Typed results: dataclasses that go to JSON and back by the types of their fields."""

from __future__ import annotations

import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import lru_cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

Json = Any  # what json.dumps accepts


def to_json(value: Any) -> Json:
    """Dataclasses and dictionaries as objects, tuples and lists as arrays; the rest as it is."""
    if is_dataclass(value):
        return {field.name: to_json(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(kind: Any, stored: Json, where: str = "") -> Any:
    """The value of type ``kind`` that ``to_json`` made ``stored`` of.

    kind:  a dataclass, also a generic one with its parameters; tuple, list, dict, ``X | Y``, Literal; int, float,
           bool, str, None, or Any, which keeps what is stored. A field with a default may be absent.
    where: what is read, for the error.
    Raises ValueError, naming the field, for anything that is not of the type.
    """
    return _read(kind, stored, where or "the value", {})


def _read(kind: Any, stored: Json, where: str, variables: Mapping[Any, Any]) -> Any:
    kind = variables.get(kind, kind) if isinstance(kind, TypeVar) else kind
    origin, arguments = get_origin(kind) or kind, get_args(kind)
    if kind is Any:
        return stored
    if origin in (Union, types.UnionType):
        options = [option for option in arguments if option is not types.NoneType]
        if stored is None and len(options) < len(arguments):
            return None
        for option in options[:-1]:
            with suppress(ValueError):
                return _read(option, stored, where, variables)
        return _read(options[-1], stored, where, variables)
    if origin is Literal and stored in arguments:
        return stored
    if is_dataclass(origin) and isinstance(stored, dict):
        return _dataclass(origin, arguments, stored, where, variables)
    if origin in (tuple, list) and isinstance(stored, (list, tuple)):
        many = arguments[:1] * len(stored) if origin is list or arguments[1:] == (...,) else arguments
        if len(many) == len(stored):
            items = enumerate(zip(many, stored, strict=True))
            return origin(_read(item, each, f"{where}[{i}]", variables) for i, (item, each) in items)
    if origin in (dict, Mapping) and isinstance(stored, dict):
        name, item = arguments
        return {name(key): _read(item, each, f"{where}.{key}", variables) for key, each in stored.items()}
    if origin is float and isinstance(stored, int) and not isinstance(stored, bool):
        return float(stored)
    if isinstance(origin, type) and type(stored) is origin:
        return stored
    raise ValueError(f"{where}: expected {getattr(kind, '__name__', kind)}, got {stored!r:.60}")


def _dataclass(kind: Any, arguments: Any, stored: dict[str, Json], where: str, variables: Mapping[Any, Any]) -> Any:
    variables = dict(zip(getattr(kind, "__parameters__", ()), (variables.get(a, a) for a in arguments), strict=True))
    known = {field.name: field for field in fields(kind) if field.init}
    if unknown := sorted(stored.keys() - known):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}")
    needed = {name for name, field in known.items() if field.default is MISSING and field.default_factory is MISSING}
    if missing := sorted(needed - stored.keys()):
        raise ValueError(f"{where}: without {', '.join(missing)}")
    hints = _hints(kind)
    return kind(**{name: _read(hints[name], item, f"{where}.{name}", variables) for name, item in stored.items()})


_hints = lru_cache(get_type_hints)
