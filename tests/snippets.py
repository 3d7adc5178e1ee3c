"""The fenced code blocks of README and docs/, and how each kind of them is tried."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ncf_dist import cli
from ncf_dist.config import load_config

ROOT = Path(__file__).parent.parent
PROSE = ("", "text", "console")
"""Languages of blocks that show output, and are no code."""
_BLOCK = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```[ ]*$", re.MULTILINE | re.DOTALL)
_NOT_RUN = re.compile(r"<!--\s*not run:\s*(?!\s|-->)(?:(?!-->).)+-->\s*\Z", re.DOTALL)
"""Above a block, with the reason: then it is not tried. Nothing else leaves one out."""


@dataclass(frozen=True)
class Block:
    """file: relative to the repository; line: of its first line of code."""

    file: str
    line: int
    language: str
    code: str
    skipped: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def blocks(text: str, file: str) -> Iterator[Block]:
    """Every fenced block of a Markdown text."""
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code")) + 1
        skipped = bool(_NOT_RUN.search(text, 0, found.start()))
        yield Block(file, line, found["language"], found["code"], skipped)


def documented() -> list[Block]:
    """All blocks of README and docs/ that are code and are not left out."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    found = [block for file in files for block in blocks(file.read_text(), str(file.relative_to(ROOT)))]
    return [block for block in found if block.language not in PROSE and not block.skipped]


def check(block: Block, folder: Path, names: Mapping[str, Any]) -> None:
    """Try a block. Python is run in `folder` with `names`; the other languages are checked for what they name."""
    if block.language in ("python", "py"):
        run_python(block, folder, names)
    elif block.language in ("bash", "sh", "shell"):
        check_shell(block.code, folder)
    elif block.language == "yaml":
        _check_config(yaml.safe_load(block.code), [], folder)
    elif block.language == "json":
        json.loads(block.code)
    else:
        raise AssertionError(
            f"{block}: nothing here tries {block.language}; needed python, bash, yaml, json or text, or a line "
            "`<!-- not run: why -->` above it"
        )


# ---- python ---------------------------------------------------------------------------------------------------------


def run_python(block: Block, folder: Path, names: Mapping[str, Any]) -> None:
    """As a notebook would: with `folder` as the working folder, and the last line's value, if any, shown. What it
    shows must not be empty."""
    tree = ast.parse(block.code, str(block))
    last = end if isinstance(end := tree.body[-1], ast.Expr) else None
    tree.body = tree.body[: -1 if last else None]
    space: dict[str, Any] = {**names, "__name__": "__main__"}
    shown = io.StringIO()
    with _working_in(folder), contextlib.redirect_stdout(shown):
        exec(compile(tree, str(block), "exec"), space)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), str(block), "eval"), space)
            if value is not None:
                assert not hasattr(value, "__len__") or len(value), f"{block} ends with nothing: {value!r}"
                print(value)
    assert shown.getvalue().strip() or last is None, f"{block} shows nothing"


@contextlib.contextmanager
def _working_in(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def spark_in(spark: Any, folder: Path) -> Iterator[None]:
    """Spark's relative paths begin at `folder`, as in a session that was started there."""
    files = spark._jvm.org.apache.hadoop.fs.FileSystem.get(spark._jsc.hadoopConfiguration())
    path = spark._jvm.org.apache.hadoop.fs.Path
    before = files.getWorkingDirectory()
    files.setWorkingDirectory(path(str(folder)))
    try:
        yield
    finally:
        files.setWorkingDirectory(before)


# ---- the others: what they name is there ----------------------------------------------------------------------------


def check_shell(code: str, folder: Path) -> None:
    """The syntax; and of each command of ours that there is such a target, job, file, option and setting. Whatever
    else a command line holds is not looked at."""
    subprocess.run(["bash", "-n"], input=code, text=True, check=True, capture_output=True)
    for text in code.replace("\\\n", " ").splitlines():
        words = shlex.split(text, comments=True)
        while words and re.fullmatch(r"\w+=.*", words[0]):
            words = words[1:]
        words = words[: next((at for at, word in enumerate(words) if re.fullmatch(r"[|;&<>].*|\d>.*", word)), None)]
        if words[:1] == ["make"]:
            _check_make([word for word in words[1:] if "=" not in word and not word.startswith("-")])
        elif words and Path(words[0]).name in ("spark-submit.sh", "ncf-dist"):
            _check_job(words[1:], folder)
        elif words and Path(words[0]).name == "spark-submit" and (jobs := [w for w in words if w.startswith("jobs/")]):
            _check_job([Path(jobs[0]).stem, *words[words.index(jobs[0]) + 1 :]], folder)


def _check_make(targets: list[str]) -> None:
    known = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert set(targets) <= set(known), f"make has {known}, not all of {targets}"


def _check_job(words: list[str], folder: Path) -> None:
    """JOB and its arguments. A config in conf/ must be there; `my.yaml` and the like are the reader's own."""
    job = words[0]
    assert job in cli.JOBS, f"there is no job {job}"
    own = words[1 : words.index("--")] if "--" in words else words[1:]
    arguments = cli.parser(job).parse_args(own)
    assert not arguments.config.startswith("conf/") or (ROOT / arguments.config).exists(), arguments.config
    _check_config({}, cli.overrides(arguments), folder)


def _check_config(tree: dict[str, Any], overrides: list[str], folder: Path) -> None:
    """A part of a config, and what a command line changes of it."""
    path = folder / "checked.yaml"
    path.write_text(json.dumps(_merged({"paths": {"lake": "lake"}, "input": {"path": "log"}}, tree)))
    load_config(path, overrides)


def _merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    both = {key for key in first.keys() & second.keys() if isinstance(first[key], dict)}
    return {**first, **second, **{key: _merged(first[key], second[key]) for key in both}}
