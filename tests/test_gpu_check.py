"""benchmarks/gpu_check.py, which must run where a GPU is and this project's environment is not: here on a CPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Row
from ncf_dist.train.losses import LOSSES

ROOT = Path(__file__).parent.parent
# Runs the script as such a machine would, where these packages cannot be imported.
WITHOUT = """
import runpy, sys

class Refused:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("pyspark", "py4j", "petastorm", "deltalake"):
            raise ModuleNotFoundError(f"{name} is not on this machine")

sys.meta_path.insert(0, Refused())
sys.argv = sys.argv[1:]
runpy.run_path(f"benchmarks/{sys.argv[0]}", run_name="__main__")
"""


@pytest.mark.slow
def test_all_checks_are_well_on_a_cpu_without_spark_petastorm_and_deltalake(tmp_path: Path) -> None:
    path = tmp_path / "found.json"
    command = [sys.executable, "-c", WITHOUT, "gpu_check.py", "--device", "cpu", "--results", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    groups: dict[str, list[dict[str, Any]]] = {name: [] for name in gpu_check.CHECKS}
    for row in found["checks"]:
        assert row["ok"]
        assert row["value"] <= row["bound"]
        groups[row["group"]].append(row)
    pairs = {row["check"].rpartition(":")[0] for row in groups["gradients"]}
    assert pairs == {f"{model}, {loss}" for model in gpu_check.MODELS for loss in LOSSES}
    assert len(groups["training"]) == 6, "three objectives in fp32 and bf16"
    assert len(groups["scoring"]) == 2 * 3 * len(gpu_check.MODELS)
    assert groups["resume"][0]["value"] == 0, "on a CPU to the bit"
    assert all(row["check"] in done.stdout for row in found["checks"])
    assert f"{len(found['checks'])} of {len(found['checks'])} checks are well" in done.stdout


@pytest.mark.slow
def test_the_recipe_for_gpus_runs_on_a_cpu_without_them(tmp_path: Path) -> None:
    """The tables that it makes up are those that the job train accepts."""
    path = tmp_path / "found.json"
    options = ["--device", "cpu", "--backend", "arrow", "--log", "0.0005", "--epochs", "2", "--results", str(path)]
    command = [sys.executable, "-c", WITHOUT, "train_gpu.py", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": "."})
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert len(found["epochs"]) == 2
    assert found["samples_per_s"] == found["epochs"][1]["samples_per_s"] > 0


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_a_check_that_fails_or_ends_in_an_error_is_told_and_exits_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(device: str) -> Iterator[Row]:
        yield Row("within", 1.0, 1.0)
        yield Row("beyond", 1.1, 1.0)
        yield Row("not a number", math.nan, 1.0)
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_check, "CHECKS", {"wrong": wrong})
    assert gpu_check.main(["--device", "cpu", "--results", str(tmp_path / "found.json")]) == 1
    rows = json.loads((tmp_path / "found.json").read_text())["checks"]
    assert [row["ok"] for row in rows] == [True, False, False, False]
    assert rows[-1]["error"] == "RuntimeError: no kernel image"
    assert "1 of 4 checks are well" in capsys.readouterr().out


def test_a_device_that_computes_something_else_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One weight's gradient, a thousandth too large; and scores of a model whose first factor is lost."""
    step, ranked = gpu_check.step, gpu_check.ranked
    calls: list[str] = []

    def off(name: str, loss: str, device: str, **options: Any) -> Any:
        """The first of the three that are compared, which is the device's."""
        value, gradients = step(name, loss, device, **options)
        calls.append(device)
        if len(calls) % 3 == 1:
            first = next(iter(gradients.values()))
            first.view(-1)[first.abs().argmax()] *= 1.001
        return value, gradients

    def lossy(model: Any, device: str, eligible: Any, seen: Any) -> Any:
        calls.append(device)
        if len(calls) % 2:
            with torch.no_grad():
                next(model.parameters())[:, 0] = 0
        return ranked(model, device, eligible, seen)

    monkeypatch.setattr(gpu_check, "MODELS", {"mf": gpu_check.MODELS["mf"]})
    monkeypatch.setattr(gpu_check, "step", off)
    rows = list(gpu_check.gradients("cpu"))
    assert [row.ok for row in rows] == [True, False] * len(LOSSES)
    monkeypatch.setattr(gpu_check, "ranked", lossy)
    calls.clear()
    assert not next(gpu_check.scoring("cpu")).ok
