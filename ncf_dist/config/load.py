"""A config file read: YAML, `--set section.key=value` overrides, and mistakes said in the words of the file."""

from __future__ import annotations

import datetime as dt
import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ncf_dist.config.tree import Config
from ncf_dist.errors import ConfigError


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read `path` (YAML), apply `section.key=value` overrides, validate.

    Raises ConfigError: no such file, not YAML, an override that is not `section.key=value`,
    an unknown key, a bad value.
    """
    tree = _read_yaml(Path(path))
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate(_filled(tree, Config))
    except ValidationError as error:
        raise ConfigError(f"{path}: {_mistakes(error)}") from None


def changed(config: Config, settings: Mapping[str, Any]) -> Config:
    """The config with other values of these settings, by their whole names. Raises ConfigError."""
    tree = config.model_dump(mode="json", by_alias=True)
    for name, value in settings.items():
        *above, key = name.split(".")
        section = tree
        for part in above:
            if not isinstance(section.get(part), dict):
                section[part] = {}
            section = section[part]
        section[key] = value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_mistakes(error)) from None


def parse_ds(text: str | None, allow_future: bool = False) -> str:
    """`--ds` as an ISO date; default: today in UTC. Raises ConfigError: no date, or one after tomorrow without
    `allow_future`."""
    today = dt.datetime.now(dt.timezone.utc).date()
    if text is None:
        return today.isoformat()
    try:
        if (day := dt.date.fromisoformat(text)).isoformat() == text:
            # What is published of a night in the future is newer than every night until then.
            if allow_future or day <= today + dt.timedelta(days=1):
                return text
            raise ConfigError(
                f"--ds is {text}, and today is {today} (UTC); needed tomorrow at the latest, as readers would take it "
                "for the newest night until then: correct it, or add --allow-future for a backtest"
            )
    except ValueError:
        pass
    raise ConfigError(f"--ds is {text!r}; needed a date that exists, written YYYY-MM-DD, for example 2026-01-31")


class _Loader(yaml.SafeLoader):
    """YAML lets a key be written twice and keeps the last; a config that does so is a mistake."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice[0]} is there twice; needed once", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(
            f"config {path} cannot be read ({error.strerror}); give --config a YAML file such as conf/demo.yaml"
        ) from None
    # Of a day that no month has, and of an alias within itself, PyYAML says the latter two.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"config {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(
            f"config {path} holds {type(tree).__name__}; needed sections such as `paths:` and `input:`, "
            "see conf/demo.yaml"
        )
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override!r}; needed section.key=value, for example --set train.epochs=5")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    for part in parts[:-1]:
        child = tree.setdefault(part, {})
        if child is None:
            child = tree[part] = {}
        if not isinstance(child, dict):
            raise ConfigError(
                f"--set {override!r}: {part} is not a section; known sections: {', '.join(Config.model_fields)}"
            )
        tree = child
    tree[parts[-1]] = value


def _mistakes(error: ValidationError) -> str:
    """Each mistake as: key, what we got, what was needed. A key that may have one of several forms is said once."""
    said: dict[str, list[str]] = {}
    for each in error.errors():
        names, keys = _place(each["loc"])
        name = ".".join(names)
        if each["type"] == "extra_forbidden":
            near = difflib.get_close_matches(names[-1], keys, n=1, cutoff=0.5)
            hint = f"did you mean {'.'.join([*names[:-1], near[0]])}?" if near else f"known here: {', '.join(keys)}"
            said.setdefault(f"unknown key {name} ({hint})", [])
        elif each["type"] == "missing":
            said.setdefault(f"{name} is missing; add it, conf/demo.yaml shows how", [])
        elif each["type"] == "value_error":
            said.setdefault(str(each["ctx"]["error"]), [])
        else:
            needed = f"needed a section with {', '.join(keys)}" if each["type"] == "model_type" else each["msg"]
            found = said.setdefault(f"{name} is {each['input']!r}", [])
            found += [text for text in [needed[0].lower() + needed[1:]] if text not in found]
    return "; ".join(f"{what}: {', or '.join(needed)}" if needed else what for what, needed in said.items())


def _place(loc: Iterable[str | int]) -> tuple[list[str], list[str]]:
    """(the key that an error of pydantic is about, the keys known in its section). Of the names in `loc` those are left
    out that tell which form of a value pydantic tried: they are no keys."""
    names: list[str] = []
    known: list[str] = []
    kind: Any = Config
    keyed = False  # Whether the part before is a key of a table: `[key]` after it says that the key itself is wrong.
    for part in loc:
        section = _section(kind)
        table = next((form for form in _forms(kind) if get_origin(form) is dict), None)
        if section is not None and not (part == "[key]" and keyed):
            fields = {field.alias or name: field for name, field in section.model_fields.items()}
            found = fields.get(str(part))
            names, known, kind = [*names, str(part)], list(fields), found.annotation if found else None
        elif table is not None:
            names, kind, keyed = [*names, str(part)], get_args(table)[1], True
            continue
        elif isinstance(part, int):
            names, kind = [*names, str(part)], None
        keyed = False
    section = _section(kind)
    if section is not None:
        known = [field.alias or name for name, field in section.model_fields.items()]
    return names, known


def _forms(kind: Any) -> list[Any]:
    """The forms that a value of this type may have: `Annotated[A | B, …]` → A, B."""
    if get_origin(kind) is Annotated:
        return _forms(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return [form for each in get_args(kind) for form in _forms(each)]
    return [kind]


def _section(kind: Any) -> type[BaseModel] | None:
    return next((form for form in _forms(kind) if isinstance(form, type) and issubclass(form, BaseModel)), None)


def _filled(tree: dict[str, Any], model: type[BaseModel]) -> dict[str, Any]:
    """A section with nothing in it (all its keys commented out) has its defaults."""
    filled = dict(tree)
    for name, field in model.model_fields.items():
        key = field.alias or name
        section = _section(field.annotation)
        if section is None or key not in tree:
            continue
        if tree[key] is None and type(None) not in _forms(field.annotation):
            filled[key] = {}
        elif isinstance(tree[key], dict):
            filled[key] = _filled(tree[key], section)
    return filled
