"""How blocks of code are found in the documents, and that each kind of mistake in one is seen."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from ncf_dist.errors import ConfigError
from tests.snippets import blocks, check, documented

TEXT = """
```python
1 / 0
```

<!-- not run: needs a cluster -->
```bash
make nothing
```

<!-- not run: -->

```yaml
a: 1
```
"""


def test_a_block_is_left_out_for_a_reason_only() -> None:
    found = [(block.line, block.language, block.skipped) for block in blocks(TEXT, "x.md")]
    assert found == [(3, "python", False), (8, "bash", True), (14, "yaml", False)]


def test_the_documents_have_blocks_to_try() -> None:
    found = documented()
    assert {block.language for block in found} >= {"python", "bash", "yaml"}
    assert sum(block.language == "python" for block in found) >= 3


BAD: dict[str, tuple[str, str, type[Exception]]] = {
    "python that raises": ("python", "1 / 0", ZeroDivisionError),
    "a night that is not there": ("python", "[row for row in [] if row]", AssertionError),
    "shell that is none": ("bash", "make demo | (", subprocess.CalledProcessError),
    "no such target": ("bash", "NCF_DATA_DIR=/data make ml-1m\nmake everything", AssertionError),
    "no such job": ("bash", "./spark-submit.sh bake --config my.yaml", AssertionError),
    "no such option": ("bash", "./spark-submit.sh train --config my.yaml --force", ConfigError),
    "no such setting": ("bash", "./spark-submit.sh train --config my.yaml --set train.epoch=3", ConfigError),
    "no such config": ("bash", "./spark-submit.sh train --config conf/nothing.yaml", AssertionError),
    "a job of spark-submit": ("bash", "spark-submit jobs/train.py --config my.yaml --force", ConfigError),
    "a wrong key": ("yaml", "train: {epoch: 3}", ConfigError),
    "JSON that is none": ("json", "{'a': 1}", ValueError),
    "a language that nobody tries": ("perl", "1", AssertionError),
}


@pytest.mark.parametrize("what", BAD)
def test_a_mistake_is_seen(what: str, tmp_path: Path) -> None:
    language, code, error = BAD[what]
    (block,) = blocks(f"```{language}\n{code}\n```\n", "x.md")
    with pytest.raises(error):
        check(block, tmp_path, {})


GOOD = {
    "python with what is given": ("python", "import os\nassert here == os.getcwd()\nhere"),
    "python that shows": ("python", "print(1)"),
    "a command that is not ours": ("bash", "git clone somewhere  # comment\ncd ncf-dist"),
    "jobs and targets": (
        "bash",
        "make demo     # a comment\nNCF_DATA_DIR=/data make ml-1m PYTHON=python3\n"
        "./spark-submit.sh train --config my.yaml --ds 2026-01-31 --set train.epochs=5 \\\n  --run x -- --conf a=b\n"
        "spark-submit jobs/score.py --config conf/demo.yaml --dry-run 2>log | tail -n 1",
    ),
    "a part of a config": ("yaml", "input: {format: csv, columns: {user: a, item: b}}\npaths: {work: w}"),
}


@pytest.mark.parametrize("what", GOOD)
def test_what_is_right_passes(what: str, tmp_path: Path) -> None:
    (block,) = blocks("```{}\n{}\n```\n".format(*GOOD[what]), "x.md")
    check(block, tmp_path, {"here": str(tmp_path)})
