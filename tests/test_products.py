"""Products do not depend on the position: in every process that imports the project, in every branch of MKL, and where
they would, nothing is scored or trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pyspark.sql import SparkSession
from torch import Tensor
from torch.nn import functional

from ncf_dist import engines, products
from ncf_dist.bundle import Bundle
from ncf_dist.config import Config, Model
from ncf_dist.errors import ConfigError
from ncf_dist.models import MF, RankingSide, Users, build_model
from ncf_dist.products import Products
from ncf_dist.scoring import ModelScorer
from ncf_dist.scoring import blocks as kernel
from ncf_dist.spark_io import on_one_executor
from ncf_dist.train.spec import Spec
from ncf_dist.train.worker import train_rank
from ncf_dist.train.world import World

ROOT = Path(__file__).parent.parent

PROGRAM = """
import json, os, sys
{before}
import ncf_dist
mode = os.environ["MKL_CBWR"]
import torch
from torch.nn import functional
from ncf_dist import engines, products
from ncf_dist.errors import NcfError
torch.set_num_threads(1)
torch.manual_seed(1)
dependent = False
for inputs in range(5, 40):  # The law by itself: one row, everywhere.
    for outputs in (4, 6, 8, 10):
        rows = torch.randn(1, inputs).expand(256, inputs).contiguous()
        dependent |= len(functional.linear(rows, torch.randn(outputs, inputs)).unique(dim=0)) > 1
message = None
try:
    products.check()
except NcfError as error:
    message = str(error)
print(json.dumps([mode, dependent, message]))
"""


def fresh(before: str = "") -> tuple[str, bool, str | None]:
    """(mode, whether products depend on the position, what the canary says) of a new interpreter that no parent has
    prepared, as a Spark worker on another machine is."""
    env = {name: value for name, value in os.environ.items() if name != products.MODE}
    command = [sys.executable, "-c", PROGRAM.format(before=before)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    mode, dependent, message = json.loads(done.stdout.splitlines()[-1])
    return mode, dependent, message


FLAGS = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
MODE_HERE = "AUTO" if "avx512f" in FLAGS.split() else "AVX2,STRICT"


def test_importing_the_project_is_enough() -> None:
    assert fresh() == (MODE_HERE, False, None)


def test_torch_may_be_imported_before() -> None:
    """As the linter orders imports: MKL asks for its mode at the first product."""
    assert fresh("import torch") == (MODE_HERE, False, None)


def test_after_a_product_it_is_too_late_and_refused() -> None:
    """On a processor where MKL's default mode breaks the law, as on AMD's; elsewhere nothing is to be refused."""
    _, dependent, message = fresh("import torch\ntorch.randn(64, 64) @ torch.randn(64, 64)")
    assert (message is not None) == dependent
    if message:
        assert "has other bits in another row or column on this processor" in message
        assert "import ncf_dist before torch is used; or start the process with MKL_CBWR=COMPATIBLE" in message


def test_a_branch_of_the_users_own_is_lawful_or_refused() -> None:
    """AVX2 by itself breaks the law on Intel processors with AVX-512, and on no other that was tried."""
    mode, dependent, message = fresh('os.environ["MKL_CBWR"] = "AVX2"')
    assert mode == "AVX2"
    assert (message is not None) == dependent


def test_where_a_gpu_multiplies_the_processor_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """A training on it must not end for the sake of a CPU that it does not use."""

    def refused() -> str:
        raise ConfigError("other bits in another row")

    monkeypatch.setattr(products, "check", refused)
    assert products.facts("cuda:0") == {"mode": os.environ[products.MODE], "bits": ""}
    with pytest.raises(ConfigError):
        products.facts("cpu")


LAWS = """
import os, sys
from ncf_dist import products
assert os.environ["MKL_CBWR"] == sys.argv[1], "a mode of the user's own stays"
import torch
torch.set_num_threads(1)
from tests import test_scoring as laws
for name in ("mlp", "neumf"):
    laws.test_a_score_does_not_depend_on_the_call(name, "fp32")
laws.test_what_is_not_eligible_scores_lowest_and_the_others_keep_their_bits("mlp")
laws.test_a_recommendation_does_not_depend_on_the_call("embedding_nn")
"""


@pytest.mark.parametrize("branch", ["AUTO", "AVX2,STRICT", "AVX512", "COMPATIBLE"])
def test_the_laws_of_scoring_hold_in_each_branch(branch: str) -> None:
    """A sample; a branch that the processor lacks is another one."""
    env = {**os.environ, products.MODE: branch}
    done = subprocess.run([sys.executable, "-c", LAWS, branch], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- a position that matters is noticed, on any processor --------------------------------------------------


def off_at(row: int, product: Any) -> Any:
    """`product` with the last bit of one row changed."""

    def planted(*args: Any, **options: Any) -> Tensor:
        found = product(*args, **options)
        found[row] = torch.nextafter(found[row], found.new_tensor(torch.inf))
        return found

    return planted


@pytest.mark.parametrize(("module", "name", "row"), [(functional, "linear", 255), (torch, "mm", -1)])
def test_one_bit_in_one_row_is_refused(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, row: int) -> None:
    products.check.__wrapped__()
    monkeypatch.setattr(module, name, off_at(row, getattr(module, name)))
    with pytest.raises(ConfigError, match="a float32 product .* has other bits in another row"):
        products.check.__wrapped__()


class Leaning(MF):
    """Scores depend on the row of the block."""

    def ranking_users(self, user: Tensor) -> RankingSide:
        side = super().ranking_users(user)
        return side._replace(dot=side.dot + torch.arange(len(user))[:, None])


def test_a_model_whose_scores_lean_is_refused() -> None:
    with pytest.raises(ConfigError, match="a score of this model has other bits in another row"):
        ModelScorer(Leaning(9, 20, 4, biases=False), 20)


def test_a_rank_refuses_before_it_reads_anything(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch, "mm", off_at(0, torch.mm))
    products.check.cache_clear()
    config = Config.model_validate({"paths": {"lake": str(tmp_path), "work": str(tmp_path)}, "input": {"path": "log"}})
    with pytest.raises(ConfigError, match="has other bits in another row"):
        train_rank(Spec(config.model_dump_json(by_alias=True), "nowhere", str(tmp_path)), World())


def test_the_canary_draws_nothing_and_keeps_the_threads() -> None:
    before, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert products.check.__wrapped__() == products.facts()["bits"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.get_num_threads() == threads


# ---- which library, which precision ------------------------------------------------------------------------


def bundle_of(name: Any = "mf", factors: int = 8, **fields: Any) -> Bundle:
    return Bundle("", Model(name=name, factors=factors, **fields), f"{name}-1", 20, 30, "", {})


@pytest.mark.parametrize(
    ("bundle", "width"),
    [(bundle_of(), 8), (bundle_of(biases=True), 10), (bundle_of("gmf"), 9), (bundle_of("neumf", layers=(8, 4)), 10)],
)
def test_the_width_is_that_of_the_scorers_products(bundle: Bundle, width: int) -> None:
    """Biases are two more columns; what is left of a tower is one."""
    assert engines.dot_width(bundle) == width
    block = ModelScorer(build_model(bundle.model, 20, 30), 30).block
    assert block.item_dot.shape[1] == width


def test_the_quicker_of_equal_libraries_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the timing says, one with other bits is not: a busy machine must not decide a table's bytes."""
    seconds = iter([1.0, 0.8, 1.0, 0.95, 1.0, 0.1])
    monkeypatch.setattr(engines, "_seconds", lambda make: next(seconds))
    monkeypatch.setattr(engines, "_same_bits", lambda width: True)
    assert [engines.engine_for(8) for _ in range(2)] == ["onednn", "mkl"]
    monkeypatch.setattr(engines, "_same_bits", lambda width: False)
    assert engines.engine_for(8) == "mkl"


def test_either_library_gives_the_same_scores() -> None:
    """Where the probe says that they do; there the setting that rounds to bf16 elsewhere is not touched."""
    model = build_model(Model(name="neumf", factors=32, layers=(16, 8)), 300, 2000)
    if not engines._same_bits(engines.dot_width(bundle_of("neumf", 32, layers=(16, 8)))):
        with pytest.raises(ConfigError, match="differently here"):
            ModelScorer(model, 2000, engine="onednn")
        return
    users = torch.arange(300)
    wanted = ModelScorer(model, 2000).scores(Users(users))
    before = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    assert torch.equal(ModelScorer(model, 2000, engine="onednn").scores(Users(users)), wanted)
    assert torch.equal(ModelScorer(model, 2000, engine="onednn").scores(Users(users[77:78])), wanted[77:78])
    assert torch.backends.mkldnn.matmul.fp32_precision == before  # type: ignore[attr-defined]


def test_an_executor_whose_library_rounds_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    multiply = kernel.multiply

    def planted(a: Tensor, b: Tensor, out: Tensor, precision: str, engine: str) -> Tensor:
        found = multiply(a, b, out, precision, "mkl")
        return found if engine == "mkl" else torch.nextafter(found, found.new_tensor(torch.inf))

    monkeypatch.setattr(kernel, "multiply", planted)
    model = build_model(bundle_of().model, 20, 30)
    ModelScorer(model, 30)
    with pytest.raises(ConfigError, match="oneDNN and MKL round .* differently here .* executors of one kind"):
        ModelScorer(model, 30, engine="onednn")


def test_bf16_is_taken_where_it_is_to_be_had(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    for there, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(engines, "rounds", lambda width, there=there: there)
        found = Products.agreed(engines.choose(bundle_of(), "bf16"), "bf16")
        assert (found.precision, found.mode, found.bits) == (precision, os.environ[products.MODE], products.check())
        assert ("the executors have no such products" in caplog.text) == (not there)
    with pytest.raises(ConfigError, match="this executor has no bf16 products .* or score.precision=fp32"):
        engines.must_round(8)


def test_rounding_is_told_from_another_order_of_summation(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN sums many factors in another order than MKL, which are other bits, too."""
    for rounding in (True, False):

        def planted(
            a: Tensor, b: Tensor, out: Tensor, precision: str, engine: str, rounding: bool = rounding
        ) -> Tensor:
            if precision == "fp32":
                return torch.mm(a, b)
            return a.bfloat16().float() @ b.bfloat16().float() if rounding else a.flip(1) @ b.flip(0)

        monkeypatch.setattr(kernel, "multiply", planted)
        assert [engines.rounds(width) for width in (8, 64, 500)] == [rounding] * 3


def test_several_kinds_of_processor_are_said(caplog: pytest.LogCaptureFixture) -> None:
    found = Products("AVX2", "a", "onednn")
    assert found.facts([{"bits": "a"}, {"bits": None}, {"bits": "a"}])["executors"] == ["a"]
    assert not caplog.text
    assert found.facts([{"bits": "a"}, {"bits": "b"}])["executors"] == ["a", "b"]
    assert "the executors have 2 kinds of processor" in caplog.text


def test_what_an_executor_finds_reaches_the_driver(spark: SparkSession) -> None:
    found = Products.agreed(on_one_executor(spark, partial(engines.choose, bundle_of(), "fp32")))
    assert (found.mode, found.bits) == (os.environ[products.MODE], products.check())

    def refuses() -> dict[str, Any]:
        raise ConfigError("no such products")

    with pytest.raises(ConfigError, match="^no such products$"):
        on_one_executor(spark, refuses)
