"""The boundaries of the architecture, proved in a fresh interpreter;
import-linter proves the static half in `make check`."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, PIPELINE_LINES, FUNCTION_LINES = 400, 150, 50

# packages that importing these modules must not load; one interpreter a row
FORBIDDEN = {
    ("pyspark", "py4j"): ("train.worker", "train.pipeline", "train.loaders"),
    ("pandas",): ("train.worker",),  # It costs each rank most of a second.
    # Torch alone costs the process that drives a night two seconds.
    ("torch", "petastorm"): (
        *("prepare.pipeline", "fetch.pipeline", "score.pipeline", "evaluate.pipeline"),
        *("nightly.pipeline", "sweep.pipeline"),
    ),
    ("torch", "petastorm", "pyspark"): ("cli", "publish.pipeline", "doctor.pipeline", "train.pipeline"),
}


def _loaded(statement: str, packages: tuple[str, ...]) -> str:
    program = f"{statement}\nimport sys; print(*[p for p in {packages!r} if p in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.mark.parametrize(("packages", "modules"), FORBIDDEN.items())
def test_importing_a_stage_does_not_load_another_stages_engine(
    packages: tuple[str, ...], modules: tuple[str, ...]
) -> None:
    assert _loaded("import " + ", ".join(f"ncf_dist.{m}" for m in modules), packages) == ""


def test_the_check_itself_sees_an_engine_that_was_loaded() -> None:
    assert _loaded("import torch", ("torch",)) == "torch"


def test_every_call_of_petastorm_is_in_one_file() -> None:
    users = [
        p.relative_to(ROOT)
        for p in (ROOT / "ncf_dist").rglob("*.py")
        if "import petastorm" in p.read_text() or "from petastorm" in p.read_text()
    ]
    assert users == [Path("ncf_dist/train/loaders.py")]


def _sent_to_executors() -> list[tuple[Path, str]]:
    """(file, entry point) of every call of on_executor in the package."""
    calls = [
        (path.relative_to(ROOT), node)
        for path in (ROOT / "ncf_dist").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "on_executor"
    ]
    return [(path, ast.literal_eval(call.args[0])) for path, call in calls]


def test_what_is_sent_to_executors_is_a_function_of_the_same_package() -> None:
    """import-linter and mypy cannot see these names."""
    sent = _sent_to_executors()
    assert sent
    for path, entry in sent:
        assert entry.startswith(f"{'.'.join(path.parent.parts)}."), f"{path} sends {entry}"
        assert callable(pkgutil.resolve_name(entry)), f"{path} sends {entry}"


def test_only_files_knows_the_file_system() -> None:
    users = [p.name for p in (ROOT / "ncf_dist").rglob("*.py") if "import fsspec" in p.read_text()]
    assert users == ["files.py"]


def test_no_file_and_no_function_is_too_long_to_be_read_in_one_go() -> None:
    """Rather than raise a limit, give what is too long a part that has a name."""
    long = []
    for path in (ROOT / "ncf_dist").rglob("*.py"):
        text = path.read_text()
        most = PIPELINE_LINES if path.name == "pipeline.py" else FILE_LINES
        if (lines := len(text.splitlines())) > most:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines, needed at most {most}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None:
                lines = node.end_lineno - node.lineno + 1
                if lines > FUNCTION_LINES:
                    long.append(
                        f"{path.relative_to(ROOT)}: {node.name} has {lines} lines, needed at most {FUNCTION_LINES}"
                    )
    assert long == []
