"""Prints docs/settings.md: every setting of the config, from the classes that check it. `make docs` writes the file."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from ncf_dist import config
from ncf_dist.config import Config
from ncf_dist.stage import LINE

Schema = Mapping[str, Any]
"""A JSON schema, as pydantic makes it of a section or a setting."""

HEAD = """\
# Settings

Every key of a config file, with its type, its default and its meaning. `make docs` writes this page from
`ncf_dist/config/`, where each key is declared; a test fails while the page is out of date.

A setting is written in YAML below its section, or given to a command: `--set train.epochs=5`. An unknown key, a value
of another type or a value out of range stops the command with exit code 2 and a message that names the key.

*Remakes prepare* means: a run of `prepare` is named by this setting too, so with another value the job makes a new run
instead of finding the old one, and so do the jobs that build on it. A setting without such a note changes no run that
exists.
"""
_wrapped = partial(textwrap.fill, width=120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


def reference() -> str:
    """docs/settings.md as text."""
    schema = Config.model_json_schema()
    documented = _docstrings()
    parts = [HEAD]
    whole = []
    for name, field in schema["properties"].items():
        section = _section(field, schema)
        if section is None:
            whole.append(_entry(name, field, False, documented["Config", name]))
        else:
            about = documented.get((section["title"], ""))
            parts.append(f"## {name}\n" + (f"\n{about}\n" if about else ""))
            parts += [_entry(*setting) for setting in _settings(name, section, schema, documented)]
    return "\n".join([*parts, "## Outside the sections\n", *whole])


def _settings(
    path: str, section: Schema, schema: Schema, documented: Mapping[tuple[str, str], str]
) -> Iterator[tuple[str, Schema, bool, str]]:
    """(key, schema, whether it is needed, meaning) of each setting of a section, those of sections within it too."""
    for name, field in section["properties"].items():
        key = f"{path}.{name}"
        yield key, field, name in section.get("required", ()), documented[section["title"], name]
        for further, inner in ((key, field), (f"{key}.NAME", _each(field))):
            if (within := _section(inner, schema)) is not None:
                yield from _settings(further, within, schema, documented)


def _entry(key: str, field: Schema, required: bool, meaning: str) -> str:
    facts = [f"**`{key}`**", _kind(field)]
    if required:
        facts.append("needed")
    elif not isinstance(field["default"], dict) or not field["default"]:
        facts.append(f"default `{_yaml(field['default'])}`")
    if remade := [stage for stage in LINE if _decides(key, stage)]:
        facts.append(f"remakes {', '.join(remade)}")
    text = " ".join(meaning.split())
    return f"{_wrapped(' · '.join(facts), initial_indent='- ')}\n\n{_wrapped(text, initial_indent='  ')}\n"


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump([value], default_flow_style=True, allow_unicode=True, width=10_000)).strip()[1:-1]


def _decides(key: str, stage: str) -> bool:
    section, _, setting = key.partition(".")
    rule = LINE[stage]
    return section in rule.sections and setting.split(".")[0] not in rule.passive.get(section, ())


def _kind(field: Schema) -> str:
    """{"type": "integer", "minimum": 1} → whole number ≥ 1"""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_kind(each) for each in field["anyOf"] if each.get("type") != "null"))
    if "enum" in field or "const" in field:
        return " or ".join(f"`{value}`" for value in field.get("enum") or [field["const"]])
    if "$ref" in field:
        return "a section"
    if "prefixItems" in field:
        return f"[{', '.join(_kind(each) for each in field['prefixItems'])}]"
    if field["type"] == "array":
        return f"[{_kind(field['items'])}, …]"
    if field["type"] == "object":
        return f"{_kind(_each(field))} by name"
    if "pattern" in field:
        return f"text like `{field['pattern']}`"
    kind = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {field[name]}" for name, sign in signs.items() if name in field]
    return " ".join([field.get("format") or kind[field["type"]], " and ".join(bounds)]).strip()


def _each(field: Schema) -> Schema:
    """The schema of a value where the field holds values by name; else an empty one."""
    by_name = [*field.get("patternProperties", {}).values(), field.get("additionalProperties")]
    return next((each for each in by_name if each), {})


def _section(field: Schema, schema: Schema) -> Schema | None:
    """The section that a field is, or may be."""
    for form in [field, *field.get("anyOf", ())]:
        if "$ref" in form:
            found: Schema = schema["$defs"][form["$ref"].rpartition("/")[2]]
            return found
    return None


def _docstrings() -> dict[tuple[str, str], str]:
    """(class, field) → the text below the field, (class, "") → the text of the class; read in the source."""
    found = {}
    for path in sorted(Path(config.__file__).parent.glob("*.py")):
        for section in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(section, ast.ClassDef):
                found[section.name, ""] = ast.get_docstring(section) or ""
                for field, text in zip(section.body, section.body[1:], strict=False):
                    if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr):
                        found[section.name, _key(field)] = ast.literal_eval(text.value)
    return found


def _key(field: ast.AnnAssign) -> str:
    """`source: str = Field(alias="from")` → from"""
    aliases = [
        ast.literal_eval(each.value)
        for each in ast.walk(field)
        if isinstance(each, ast.keyword) and each.arg == "alias"
    ]
    return str(aliases[0]) if aliases else ast.unparse(field.target)


if __name__ == "__main__":
    print(reference(), end="")
