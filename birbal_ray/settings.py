"""Strict configuration: YAML file, then `--set key.path=value`, then explicit flags."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar, get_args

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range; the message names where it came from."""


_POWER_OF_TEN = re.compile(r"[-+]?(?:0|[1-9][0-9]*)(?:\.[0-9]*)?[eE][0-9]+")


class Settings(BaseModel):
    """Base of every configuration section: frozen, and an unknown key is an error.

    RENAMED: old name of a key of this section → its name. Old ones are taken; `load_config` warns of them.
    """

    RENAMED: ClassVar[Mapping[str, str]] = {}

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """A copy in which dotted keys have other values. They are not checked: they come from code, not from a user."""
        copy = self
        for key, value in changes.items():
            name, _, rest = key.partition(".")
            copy = copy.model_copy(update={name: getattr(copy, name).replace({rest: value}) if rest else value})
        return copy

    @model_validator(mode="before")
    @classmethod
    def _take_old_names(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        taken = dict(values)
        for old, new in cls.RENAMED.items():
            if old in taken and new in taken:
                message = f"{old!r} is the old name of {new!r}, and both are set; leave the old one out"
                raise PydanticCustomError("old_key", "{message}", {"message": message, "key": old})
            if old in taken:
                taken[new] = taken.pop(old)
        return taken

    @field_validator("*", mode="before")
    @classmethod
    def _only_numbers_as_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        field = cls.model_fields[info.field_name or ""]
        kinds = set(get_args(field.annotation) or [field.annotation])
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError("input should be a number; YAML reads true, yes, on, false, no, off as truth values")
        is_number = kinds <= {int, float, type(None)} and not any(
            isinstance(m, BeforeValidator) for m in field.metadata
        )
        if not isinstance(value, str) or not is_number or not re.search(r"\d", value):
            return value
        if _POWER_OF_TEN.fullmatch(value):  # in YAML text, as a commit may look like that
            return float(value)
        raise ValueError("input should be a number, without quotes or leading zeros")


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(value: object) -> float | None:
    """`24h`, `90m`, `1h30m`, `45s`, `1d` or a number of seconds, as seconds; None stays None."""
    if value is None or isinstance(value, (int, float)):
        return value
    text = str(value).strip().lower()
    if re.fullmatch(r"\d+(\.\d+)?(e\d+)?", text):
        return float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])\s*", text)
    if not parts or "".join(f"{number}{unit}" for number, unit in parts) != re.sub(r"\s", "", text):
        raise ValueError("a duration like 24h, 90m, 1h30m or 45s is wanted")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def write_duration(seconds: float) -> str:
    """The shortest setting of at least that length, in whole minutes from two on: `95s`, `17m`, `6h40m`."""
    minutes = math.ceil(seconds / 60)
    if minutes <= 2:
        return f"{math.ceil(seconds)}s"
    return f"{minutes}m" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


Duration = Annotated[float, BeforeValidator(seconds_of)]

SettingsType = TypeVar("SettingsType", bound=Settings)
ValueType = TypeVar("ValueType")


def load_config(
    schema: type[SettingsType],
    file: str | Path | None = None,
    assignments: Iterable[str] = (),
    flags: Mapping[str, Any] | None = None,
    sections: Mapping[str, str | Path] = {},
) -> SettingsType:
    """Build `schema` from a YAML file, `key.path=value` assignments, flags; later ones win.

    `flags` maps a dotted path to a value; None values are skipped (the flag was not given). `sections` maps a section
    to a YAML file that holds its settings instead of `file`.
    Raises ConfigError whose message names the origin, the key, what was found and the nearest
    known key. Prints a warning of each old key, with its origin, on stderr.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if file is not None:
        values = read_yaml_mapping(file)
        origins = dict.fromkeys(flatten(values), str(file))
    for name, place in sections.items():
        values[name] = read_yaml_mapping(place)
        others = {key: origin for key, origin in origins.items() if key.partition(".")[0] != name}
        origins = others | dict.fromkeys(flatten(values[name], f"{name}."), str(place))
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not key.strip():
            raise ConfigError(f"--set {assignment}: expected key.path=value")
        value = _parse_yaml(text, f"--set {assignment}", "the value is not YAML")
        _assign(values, key.strip(), value, f"--set {assignment}")
        origins[key.strip()] = f"--set {assignment}"
    for key, value in (flags or {}).items():
        if value is not None:
            _assign(values, key, value, f"flag for {key}")
            origins[key] = "command line"
    given = [f"{key}." for key in flatten(values)]
    for prefix, section in _sections(schema).items():
        for old, new in section.RENAMED.items():
            if any(one.startswith(f"{prefix}{old}.") for one in given):
                origin = _origin(f"{prefix}{old}", origins)
                origins.setdefault(f"{prefix}{new}", origin)
                place = ": ".join(filter(None, [origin, prefix.rstrip("."), f"{old!r} is now {new!r}"]))
                print(f"{place}; the old name is accepted until the next release", file=sys.stderr)
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        raise ConfigError(explain(schema, error, origins)) from None


def read_yaml_mapping(file: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError when it is absent, no YAML, or no mapping."""
    try:
        text = Path(file).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read ({one_line(error)})") from None
    values = _parse_yaml(text, str(file), "not valid YAML")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{file}: expected a mapping at the top, found {type(values).__name__}")
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`; lists stay values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat.update(flatten(value, f"{path}."))
        else:
            flat[path] = value
    return flat


def canonical_hash(value: Any) -> str:
    """sha256 (hex) of the value's JSON with sorted keys; equal values hash equally on any machine."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_of(content: bytes | Path) -> str:
    """sha256 (hex) of bytes, or of a file on this machine."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def one_line(error: object) -> str:
    """A text, an error's for instance, without its line breaks."""
    return " ".join(str(error).split())


def format_value(value: object) -> str:
    """A value as a message shows it: in one line, cut after 60 characters."""
    text = one_line(value)
    return text if len(text) <= 60 else f"{text[:59]}…"


def require(value: ValueType | None, flag: str) -> ValueType:
    """The value of a setting that must be given. Raises ConfigError naming its flag."""
    if value is None or value == "":
        raise ConfigError(f"{flag} is required (or set it in the --config file)")
    return value


def nearest(word: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` for the closest known word, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" (did you mean {matches[0]!r}?)" if matches else ""


def _assign(values: dict[str, Any], path: str, value: Any, origin: str) -> None:
    *parents, leaf = path.split(".")
    node = values
    for parent in parents:
        child = node.setdefault(parent, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{origin}: {parent!r} is a value ({child!r}), not a section")
        node[parent] = node = dict(child)  # an anchor's section is also that of its aliases
    node[leaf] = value


def _sections(schema: type[Settings], prefix: str = "") -> dict[str, type[Settings]]:
    """The schema and the sections in it, by what stands before their keys: "", "engine.", …"""
    found = {prefix: schema}
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            found |= _sections(field.annotation, f"{prefix}{name}.")
    return found


_TAGS = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """yaml.safe_load, but dates, 12:00 and 0010, which YAML 1.1 changes, stay text, and so do all keys."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Join a section's own keys, which win, to those that it merges (<<), of which the first win.

        PyYAML 6.0.4 takes the last of these. Raises MarkedYAMLError for a key that stands twice.
        """
        own: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            sections, problem = value.value if isinstance(value, yaml.SequenceNode) else [value], ""
            if not isinstance(key, yaml.ScalarNode):
                problem = "a list or a section can't be a key"
            elif key.value in own:
                lines = f"{own[key.value][0].start_mark.line + 1} and {key.start_mark.line + 1}"
                problem = f"{key.value!r} stands twice, in lines {lines}; make one section of them"
            elif key.tag != f"{_TAGS}merge":
                key.tag, own[key.value] = f"{_TAGS}str", (key, value)
            elif not all(isinstance(section, yaml.MappingNode) for section in sections):
                problem = "<< merges sections"
            else:
                for section in sections:
                    self.flatten_mapping(section)
                    merged = {one.value: (one, its) for one, its in section.value} | merged
            if problem:
                raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
        node.value = list((merged | own).values())


_NUMBER = r"(?:0|[1-9][0-9_]*)"
_RESOLVED = {  # the first that matches; 12e4567 is none: a commit may look like that
    f"{_TAGS}int": rf"[-+]?{_NUMBER}$",
    f"{_TAGS}float": rf"[-+]?(?:{_NUMBER}(?:\.[0-9_]*)?|\.[0-9][0-9_]*)(?:[eE][-+][0-9]+)?$"
    r"|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$",
}
_NOT_RESOLVED = {*_RESOLVED, f"{_TAGS}timestamp", f"{_TAGS}value"}
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in resolvers if pair[0] not in _NOT_RESOLVED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.yaml_constructors = {  # no other tag (!!set, !!binary, !name) is one of a setting
    tag: make
    for tag, make in yaml.SafeLoader.yaml_constructors.items()
    if tag is None or tag.removeprefix(_TAGS) in {"null", "bool", "int", "float", "str", "seq", "map"}
}
for _tag, _pattern in _RESOLVED.items():
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), list("-+.0123456789"))


def _parse_yaml(text: str, origin: str, complaint: str) -> Any:
    """The value of a YAML text. Raises ConfigError with the `complaint` for what is no YAML."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        return None if node is None else loader.construct_object(node, deep=True)  # refuses what holds itself
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        about = filter(None, [f"line {mark.line + 1}" if mark else None, error.context, error.problem])
        reason = ": ".join(map(one_line, about))
    except (yaml.YAMLError, RecursionError, ValueError, LookupError) as error:  # `!!int many`
        reason = one_line(error)
    raise ConfigError(f"{origin}: {complaint} ({reason})")


def explain(schema: type[Settings], error: ValidationError, origins: Mapping[str, str] = {}) -> str:
    """What is wrong with the settings given to a schema, in one line. `origins`: dotted key → where it comes from."""
    return "; ".join(_explain(schema, problem, origins) for problem in error.errors())


def _explain(schema: type[Settings], problem: Any, origins: Mapping[str, str]) -> str:
    path = ".".join(str(part) for part in problem["loc"])
    old_key = problem["ctx"]["key"] if problem["type"] == "old_key" else None
    origin = _origin(".".join(filter(None, [path, old_key])), origins)
    prefix = f"{origin}: " if origin else ""
    if problem["type"] == "extra_forbidden":
        *parents, leaf = problem["loc"]
        section = _sections(schema).get("".join(f"{parent}." for parent in parents))
        return f"{prefix}unknown key {path!r}{nearest(str(leaf), section.model_fields if section else ())}"
    if problem["type"] == "missing":
        return f"{prefix}{path!r} is required"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "literal_error":
        message += nearest(str(problem["input"]), re.findall("'(.+?)'", problem["ctx"]["expected"]))
    if isinstance(problem["input"], Mapping):  # of a section as such, all of its settings
        about = f"{path}: " if path else ""
    else:
        about = f"{path} = {problem['input']!r}: "
    return f"{prefix}{about}{message[:1].lower() + message[1:]}"


def _origin(path: str, origins: Mapping[str, str]) -> str:
    near = (key for key in origins if key.startswith(f"{path}.") or path.startswith(f"{key}."))
    return origins.get(path) or origins.get(next(near, ""), "")
