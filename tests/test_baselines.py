"""Baselines are what their papers say, and a whole run of evaluate with all of them is what NumPy counts from the
stored tables; on the NCF paper's files they give the published figures."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from pyspark.sql import SparkSession
from sklearn.metrics import ndcg_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from ncf_dist import config as settings
from ncf_dist import contracts
from ncf_dist.bundle import save_bundle
from ncf_dist.config import Config, Evaluate, Model
from ncf_dist.errors import ConfigError, ContractError
from ncf_dist.evaluate import baselines
from ncf_dist.evaluate.baselines import DotScorer, ItemItemScorer, item_factors
from ncf_dist.evaluate.fitting import check_gram
from ncf_dist.evaluate.pipeline import evaluate
from ncf_dist.item_item import gram as gram_module
from ncf_dist.item_item.gram import ease, gram, item_knn
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.models import GMF, Sequences
from ncf_dist.parquet import read_table, write_parquet
from ncf_dist.prepare.pipeline import prepare
from ncf_dist.scoring import Lists
from ncf_dist.stage import Outcome, StageRun, stored
from tests.conftest import SPARK

DS = "2026-01-31"
ALL = ["popularity", "recent_popularity", "item_to_item", "ease", "item_knn", "als"]
LENGTH = 12


def histories(users: int = 60, items: int = 12) -> list[list[int]]:
    """What each user has; some have nothing, nobody has the last item."""
    rng = np.random.default_rng(1)
    return [sorted(rng.permutation(items - 1)[: rng.integers(0, items - 2)].tolist()) for _ in range(users)]


def matrix(lists: list[list[int]], items: int) -> np.ndarray:
    x = np.zeros((len(lists), items))
    for user, found in enumerate(lists):
        x[user, found] = 1
    return x


def ragged(lists: list[list[int]]) -> Lists:
    values = np.array([item for found in lists for item in found], dtype=np.int64)
    return Lists(values, np.cumsum([0, *map(len, lists)], dtype=np.int64))


@pytest.mark.parametrize("block", [1, 7, 512])
def test_the_gram_matrix_is_counted_in_blocks(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(gram_module, "USERS_A_BLOCK", block)
    lists, x = histories(), matrix(histories(), 12)
    files = [ragged(part) for part in (lists[:25], lists[25:])]
    assert gram(((file.values, file.offsets) for file in files), 12).numpy().tolist() == (x.T @ x).tolist()


def ease_in_numpy(x: np.ndarray, ridge: float) -> np.ndarray:
    """Steck 2019, equation 8, written as there."""
    p = np.linalg.inv(x.T @ x + ridge * np.eye(x.shape[1]))
    b = p / -np.diag(p)
    np.fill_diagonal(b, 0)
    return b


def test_ease_is_its_formula() -> None:
    x = matrix(histories(), 12)
    found = ease(torch.from_numpy(x.T @ x), 3.0)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), ease_in_numpy(x, 3.0), atol=1e-6)
    np.testing.assert_allclose(
        ItemItemScorer(found).scores(ragged(histories())).numpy(), x @ ease_in_numpy(x, 3.0), atol=1e-5
    )


def test_item_knn_is_the_cosine_of_the_nearest() -> None:
    x = matrix(histories(), 12)
    wanted = cosine_similarity(x.T)
    np.fill_diagonal(wanted, 0)
    np.testing.assert_allclose(item_knn(torch.from_numpy(x.T @ x), 12, 0).numpy(), wanted, atol=1e-6)
    nearest = item_knn(torch.from_numpy(x.T @ x), 3, 0).numpy()
    for item in range(11):
        kept = np.flatnonzero(nearest[:, item])
        assert sorted(wanted[kept, item]) == sorted(wanted[:, item])[-3:]
    shrunk = item_knn(torch.from_numpy(x.T @ x), 12, 5.0).numpy()
    g = x.T @ x
    assert shrunk[0, 1] == pytest.approx(g[0, 1] / ((g[0, 0] * g[1, 1]) ** 0.5 + 5))


def test_a_user_is_scored_alike_in_any_company() -> None:
    torch.manual_seed(1)
    scorer, lists = ItemItemScorer(torch.randn(12, 12)), histories()
    together = scorer.scores(ragged(lists))
    for user, found in enumerate(lists):
        assert torch.equal(scorer.scores(ragged([found]))[0], together[user])


def test_what_users_did_last_is_worth_less_by_age() -> None:
    torch.manual_seed(1)
    weights, length = torch.randn(12, 12), torch.tensor([3, 0, 5])
    items = torch.tensor([[4, 2, 9, 0, 0], [0, 0, 0, 0, 0], [1, 1, 3, 0, 11]])
    found = ItemItemScorer(weights).by_age(Sequences(items, torch.zeros_like(items), length), 2.0)
    wanted = torch.zeros(3, 12)
    for user in range(3):
        for place in range(int(length[user])):
            wanted[user] += 0.5 ** ((length[user] - 1 - place) / 2.0) * weights[items[user, place]]
    torch.testing.assert_close(found, wanted)


def test_recent_popularity_orders_by_what_is_recent_then_by_all(tmp_path: Path) -> None:
    rows = {"item_idx": pa.array([3, 0], pa.int32()), "recent": pa.array([2, 1])}
    path = str(tmp_path / write_parquet(pa.table(rows), str(tmp_path), "recent.parquet").path)
    found = baselines.recent_counts((path,), np.array([5, 90, 7, 0]))
    assert np.argsort(-found).tolist() == [3, 0, 1, 2]


@pytest.mark.parametrize(
    ("evaluate", "more", "message"),
    [
        ({"baselines": ["item_to_item"]}, {}, r"has item_to_item and sequences\.length is 0.*prepare again"),
        ({"baselines": ["ease"], "ease_half_life": 5}, {}, r"ease_half_life is set and sequences\.length is 0"),
        (
            {"baselines": ["item_to_item"]},
            {"sequences": {"length": 9, "next_items": 0}},
            r"sequences\.next_items is 0.*prepare again",
        ),
        (
            {"baselines": ["recent_popularity"]},
            {"input": {"path": "x", "format": "csv", "columns": {"user": "u", "item": "i"}}},
            r"recent_popularity and input\.columns\.timestamp is not set",
        ),
    ],
)
def test_baselines_that_prepare_has_no_tables_for(evaluate: dict[str, Any], more: dict[str, Any], message: str) -> None:
    tree = {"paths": {"lake": "l", "work": "w"}, "input": {"path": "x"}, "evaluate": evaluate, **more}
    with pytest.raises(ValueError, match=message):
        Config.model_validate(tree)
    Config.model_validate({**tree, "evaluate": {"ease_half_life": 5.0}})  # Asked for by no baseline.


def test_items_without_factors_score_nothing(tmp_path: Path) -> None:
    rows = {
        "item_idx": pa.array([2, 0], pa.int32()),
        "factors": pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32())),
    }
    path = write_parquet(pa.table(rows), str(tmp_path), "items.parquet").path
    scorer = item_factors((str(tmp_path / path),), 3)
    assert isinstance(scorer, DotScorer)
    assert scorer.of(torch.tensor([[1.0, 10.0]]), torch.arange(3)).tolist() == [[3.0 + 40.0, 0.0, 1.0 + 20.0]]


def test_a_catalogue_too_large_for_a_gram_matrix_is_refused_with_the_sum() -> None:
    config = Evaluate(baselines=("popularity", "ease"), gram_bytes=3 * 8 * 1000**2)
    check_gram(config, 1000)
    with pytest.raises(ConfigError, match=r"ease: 1,001 items x 1,001 items x 8 bytes x 3 matrices = 24,048,024 bytes"):
        check_gram(config, 1001)
    check_gram(Evaluate(gram_bytes=1), 10**6)


# ---- a whole run -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A night that was prepared with two held-out items a user, a model nobody trained, and the run of evaluate."""

    config: Config
    outcome: Outcome

    def with_config(self, **values: Any) -> Config:
        return Config.model_validate({**self.config.model_dump(), "evaluate": values})

    def run(self, stage: str) -> Manifest:
        return Lake(self.config.paths.lake).stage(DS, stage).newest()

    def rows(self, stage: str, table: str) -> list[dict[str, Any]]:
        return [row for path in self.run(stage).files(table) for row in read_table(path).to_pylist()]

    @property
    def report(self) -> dict[str, Any]:
        return json.loads(Path(self.outcome.outputs["metrics"]).read_text())


def install(config: Config, key: str, n_users: int, n_items: int, seed: int) -> GMF:
    """An untrained GMF as the night's model."""
    lake = Lake(config.paths.lake)
    runs = lake.stage(DS, "train")
    torch.manual_seed(seed)
    model = GMF(n_users, n_items, 4, 1.0)
    run = runs.begin(key)
    save_bundle(f"{run}/bundle", model, Model(name="gmf", factors=4), n_users, n_items, {})
    prepared = lake.stage(DS, "prepare").newest().run_key
    runs.finish(
        Manifest(
            stage="train", ds=DS, run_key=key, root=run, config=stored("train", config), inputs={"prepare": prepared}
        )
    )
    return model


@pytest.fixture(scope="module")
def judged(spark: SparkSession, tmp_path_factory: pytest.TempPathFactory) -> Judged:
    folder, rng = tmp_path_factory.mktemp("judged"), np.random.default_rng(1)
    lines = [
        f"{user}::{item}::{rng.integers(1, 6)}::{1_700_000_000 + 40_000 * second}\n"
        for user in range(90)
        for second, item in enumerate(rng.permutation(40)[: rng.integers(4, 30)])
    ]
    (folder / "ratings.dat").write_text("".join(lines))
    config = Config.model_validate(
        {
            "paths": {"lake": str(folder / "lake"), "work": str(folder / "work")},
            "input": {"path": str(folder / "ratings.dat")},
            "split": {"strategy": "leave-k-out", "k": 2, "min_interactions": 5},
            "negatives": {"candidates": 8, "draws": 1},
            "sequences": {"length": LENGTH},
            "layout": {"min_files": 4},
            "evaluate": {
                "ks": [3, 10], "baselines": ALL, "bootstrap": 60, "ease_lambda": 5.0, "ease_half_life": 3.0,
                "als_rank": 4, "als_iterations": 2,
            },
            "spark": SPARK,
        }
    )  # fmt: skip
    prepare(config, DS)
    install(config, "t1", 90, 40, 1)
    return Judged(config, evaluate(config, DS))


def scores_of(judged: Judged) -> dict[str, np.ndarray]:
    """(U, I) of the model and the baselines that NumPy can do, in float64."""
    torch.manual_seed(1)
    model = GMF(90, 40, 4, 1.0)
    history = {row["user_idx"]: row["item_idx"] for row in judged.rows("prepare", "history")}
    x = matrix([history[user] for user in range(90)], 40)
    with torch.inference_mode():
        dot = model(torch.arange(90)[:, None], torch.arange(40)[None]).double().numpy()
    popular = np.tile(x.sum(0), (90, 1))
    known = [row for row in judged.rows("prepare", "interactions") if row["split"] != contracts.TEST_SPLIT]
    return {
        "model": dot,
        "popularity": popular,
        "recent_popularity": 1000 * np.tile(recent_counts(known), (90, 1)) + popular,
        "item_to_item": latest(known, 2.0) @ what_follows(known),
        "ease": latest(known, 3.0) @ ease_in_numpy(x, 5.0),
    }


Rows = list[dict[str, Any]]


def recent_counts(known: Rows) -> np.ndarray:
    """(I,) of the seven days that end with the last row."""
    end = max(row["timestamp"] for row in known)
    recent = [row["item_idx"] for row in known if row["timestamp"] > end - 7 * 86_400 * 10**6]
    assert 0 < len(recent) < len(known)
    return np.bincount(recent, minlength=40)


def in_order(known: Rows, user: int) -> Rows:
    return sorted((row for row in known if row["user_idx"] == user), key=lambda row: row["timestamp"])


def latest(known: Rows, half_life: float) -> np.ndarray:
    """(U, I) what each of a user's latest items is worth."""
    worth = np.zeros((90, 40))
    for user in range(90):
        for age, row in enumerate(in_order(known, user)[::-1][:LENGTH]):
            worth[user, row["item_idx"]] = 0.5 ** (age / half_life)
    return worth


def what_follows(known: Rows) -> np.ndarray:
    """(I, I) log(p(b | a) / p(b)^½) but for a constant of a's, of train rows at most 10 steps apart."""
    times, share = np.zeros((40, 40)), np.zeros(40)
    for user in range(90):
        rows = [row["item_idx"] for row in in_order(known, user) if row["split"] == contracts.TRAIN_SPLIT]
        for place, item in enumerate(rows):
            share[item] += 1
            for steps, after in enumerate(rows[place + 1 : place + 11], 1):
                times[item, after] += (2520 // steps) / 2520
    share /= share.sum()
    return np.log1p(times / (20 * share)) + 0.5 * np.log(share)


def test_every_figure_is_what_numpy_counts(judged: Judged) -> None:
    """From the tables of prepare and the scores alone: two held-out items a user, ranked among all that the user has
    not seen in train or validation, and each among its own candidates."""
    report = judged.report
    seen = {row["user_idx"]: set(row["item_idx"]) for row in judged.rows("prepare", "history")}
    test: dict[int, list[dict[str, Any]]] = {}
    for row in judged.rows("prepare", "test"):
        test.setdefault(row["user_idx"], []).append(row)
    assert {len(rows) for rows in test.values()} == {2}
    assert (report["n_users"], report["n_rows"]) == (len(test), 2 * len(test))
    for name, scores in scores_of(judged).items():
        found: dict[str, list[float]] = {}
        among: dict[str, list[float]] = {}
        listed: dict[int, set[int]] = {3: set(), 10: set()}
        for user, rows in test.items():
            unseen = [item for item in range(40) if item not in seen[user]]
            order = sorted(unseen, key=lambda item: (-round(scores[user, item], 5), item))
            held = {row["item_idx"] for row in rows}
            truth = np.array([[item in held for item in order]]).astype(int)
            ranks = sorted(order.index(item) + 1 for item in held)
            for k in (3, 10):
                top = truth[0, :k]
                listed[k] |= set(order[:k])
                found.setdefault(f"hr@{k}", []).append(float(top.any()))
                found.setdefault(f"recall@{k}", []).append(top.sum() / 2)
                found.setdefault(f"precision@{k}", []).append(top.sum() / k)
                found.setdefault(f"ndcg@{k}", []).append(ndcg_score(truth, -np.arange(len(order))[None], k=k))
                hits = [(j + 1) / rank for j, rank in enumerate(ranks) if rank <= k]
                found.setdefault(f"map@{k}", []).append(sum(hits) / 2)
            found.setdefault("mrr", []).append(1 / ranks[0])
            aucs, hits = [], []
            for row in rows:
                own, others = scores[user, row["item_idx"]], scores[user, row["candidates"]]
                greater, equal = (others > own + 1e-6).sum(), (np.abs(others - own) < 1e-6).sum()
                hits.append(float(1 + greater + equal / 2 <= 3))
                rounded = np.round([own, *others], 5)
                aucs.append(float(roc_auc_score([1] + [0] * len(others), rounded)))
            among.setdefault("hr@3", []).append(sum(hits) / 2)
            among.setdefault("auc", []).append(sum(aucs) / 2)
        mine = report if name == "model" else report["baselines"][name]
        assert mine["full"] == pytest.approx({metric: np.mean(values) for metric, values in found.items()}), name
        assert [mine["lists"][f"coverage@{k}"] for k in (3, 10)] == [len(listed[k]) / 40 for k in (3, 10)]
        for metric, values in among.items():
            assert mine["candidates"][metric] == pytest.approx(np.mean(values)), (name, metric)


def test_the_report_is_whole(judged: Judged) -> None:
    report, (tables, metrics) = judged.report, (judged.run("evaluate").tables, judged.outcome.metrics)
    assert list(report["baselines"]) == ALL
    for name in ALL:
        assert metrics[f"{name}.full.hr@10"] == report["baselines"][name]["full"]["hr@10"]
        assert {row["metric"] for row in report["comparisons"] if row["with"] == name} >= {"hr@10", "ndcg@10", "auc"}
    for protocol in ("full", "candidates"):
        for name, (low, high) in report["intervals"][protocol].items():
            assert low <= report[protocol][name] <= high, name
    for kind in ("activity", "item_popularity", "day"):
        assert report["segments"][kind]
        assert set(report["segments"][kind][0]) == {"name", "users", "full", "popularity", "intervals"}
    days = [row["name"] for row in report["segments"]["day"]]
    assert days == sorted(set(days))
    assert "2023-11-14" <= days[0] <= days[-1] <= "2023-11-28"  # 29 times 40,000 seconds are 13 days.
    scores = report["scores"]
    assert len(scores["edges"]) - 1 == len(scores["all"]) <= 64
    assert (sum(scores["first"]), sum(scores["held_out"])) == (report["n_users"], report["n_rows"])
    assert report["beats_popularity"] is judged.run("evaluate").facts["beats_popularity"]
    assert set(report["lists"]) == {
        f"{m}@{k}" for m in ("coverage", "novelty", "gini", "popularity_bias") for k in (3, 10)
    }
    assert tables["ranks"].rows == report["n_users"] * (1 + len(ALL))
    assert not (Path(judged.run("evaluate").root) / "baselines").exists()


def test_als_learned_something(judged: Judged) -> None:
    """Its scores are no constant, and it is not another baseline's twin."""
    full = {name: judged.report["baselines"][name]["full"]["mrr"] for name in ALL}
    assert len(set(full.values())) == len(ALL)


def test_partitions_change_no_figure(judged: Judged, tmp_path: Path) -> None:
    """Against the two of the night above. ALS apart, whose sums follow Spark's shuffles."""
    others = [name for name in ALL if name != "als"]
    config = Config.model_validate(
        {
            **judged.with_config(**{**judged.config.evaluate.model_dump(), "baselines": others}).model_dump(),
            "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path)},
            "spark": {**SPARK, "shuffle_partitions": 5},
        }
    )
    shutil.copytree(judged.config.paths.lake, config.paths.lake, ignore=shutil.ignore_patterns("evaluate"))
    again = Judged(config, evaluate(config, DS))
    for before, now in zip(ranks_by_file(judged), ranks_by_file(again), strict=True):
        assert [row for row in before if row["scorer"] != "als"] == now
    report, wanted = again.report, without_als(judged.report)
    assert report.keys() == wanted.keys()
    for name, value in wanted.items():
        assert report[name] == value, name


def ranks_by_file(judged: Judged) -> list[list[dict[str, Any]]]:
    return [read_table(path).to_pylist() for path in judged.run("evaluate").files("ranks")]


def without_als(report: dict[str, Any]) -> dict[str, Any]:
    baselines = {name: value for name, value in report["baselines"].items() if name != "als"}
    rows = [row for row in report["comparisons"] if row["with"] != "als"]
    return {**report, "baselines": baselines, "comparisons": rows}


def mrr(judged: Judged, scores: np.ndarray, x: np.ndarray) -> float:
    """Mean over users of 1 / the place of the better held-out item among the items that the user has not seen."""
    best: dict[int, float] = {}
    for row in judged.rows("prepare", "test"):
        user, item = row["user_idx"], row["item_idx"]
        place = 1 + int(((scores[user] > scores[user, item]) & (x[user] == 0)).sum())
        best[user] = max(best.get(user, 0.0), 1 / place)
    return float(np.mean(list(best.values())))


# ---- two runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def another_model(judged: Judged) -> Any:
    """Another model is the night's; afterwards the first one is again."""
    trained, evaluated = judged.run("train"), judged.run("evaluate")
    install(judged.config, "t2", 90, 40, 2)
    yield evaluated
    for stage, run in (("train", trained), ("evaluate", evaluated)):
        Lake(judged.config.paths.lake).stage(DS, stage).finish(run)  # The newest again.


def test_two_models_on_the_same_rows(judged: Judged, another_model: Manifest) -> None:
    """Named by the version of the other one."""
    config = judged.with_config(ks=[3, 10], compare=another_model.facts["model_version"], bootstrap=40)
    report = json.loads(Path(evaluate(config, DS).outputs["metrics"]).read_text())
    row = compared(report, judged, another_model)
    assert row["interval"][0] < row["difference"] < row["interval"][1]
    assert 0 < row["p"] <= 1
    assert evaluate(config, DS).status == "already-done"
    by_root = judged.with_config(ks=[3, 10], compare=another_model.root, bootstrap=40)
    stages = [StageRun("evaluate", each, DS, {"compare": another_model.run_key}) for each in (config, by_root)]
    assert len({stage.key for stage in stages}) == 2


def compared(report: dict[str, Any], judged: Judged, other: Manifest) -> dict[str, Any]:
    """The row of the comparison with the other model that is of mrr, whose difference is right."""
    version = other.facts["model_version"]
    rows = {row["metric"]: row for row in report["comparisons"] if (row["with"], row["protocol"]) == (version, "full")}
    assert rows["mrr"]["difference"] == pytest.approx(report["full"]["mrr"] - judged.report["full"]["mrr"])
    return dict(rows["mrr"])


def test_without_replicates_there_are_differences_but_no_intervals(judged: Judged, another_model: Manifest) -> None:
    """The other model is named by its run's folder; and EASE looks at whole histories, all items of one weight."""
    asked = ["popularity", "ease"]
    config = judged.with_config(compare=another_model.root, bootstrap=0, baselines=asked, ease_lambda=5.0)
    outcome = evaluate(config, DS)
    report = json.loads(Path(outcome.outputs["metrics"]).read_text())
    compared(report, judged, another_model)
    assert {row["with"] for row in report["comparisons"]} == {*asked, another_model.facts["model_version"]}
    x = matrix([row["item_idx"] for row in sorted(judged.rows("prepare", "history"), key=lambda r: r["user_idx"])], 40)
    assert report["baselines"]["ease"]["full"]["mrr"] == pytest.approx(mrr(judged, x @ ease_in_numpy(x, 5.0), x))
    assert all((row["interval"], row["p"]) == (None, None) for row in report["comparisons"])
    assert "intervals" not in report
    assert "no interval was computed" in Path(outcome.outputs["report"]).read_text()


def test_a_run_on_other_rows_is_refused(judged: Judged, another_model: Manifest, tmp_path: Path) -> None:
    copy = shutil.copytree(another_model.root, tmp_path / "run")
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["facts"]["judged_on"]["test"] = "another"
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ContractError, match=r"on other rows: test of its prepare run .* differ"):
        evaluate(judged.with_config(compare=str(copy)), DS)


@pytest.mark.parametrize(
    ("wanted", "error", "message"),
    [
        ("gmf-unknown", ContractError, "no run of evaluate in .* judged a model of that version"),
        (DS, ConfigError, "this very night"),
        ("2020-01-01", ContractError, "run the job evaluate first"),
    ],
)
def test_no_such_run(judged: Judged, wanted: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(judged.with_config(compare=wanted), DS)


def test_a_run_of_another_stage_is_refused(judged: Judged) -> None:
    with pytest.raises(ContractError, match="a run of train; needed one of evaluate"):
        evaluate(judged.with_config(compare=judged.run("train").root), DS)


# ---- the NCF paper's files ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_published_figures_on_the_papers_files(spark: SparkSession, data_dir: Path, tmp_path: Path) -> None:
    """Popularity and EASE (λ = 1000) as re-run by Ferrari Dacrema et al., TOIS 2021, on these very files."""
    folder = data_dir / "ncf-ml-1m"
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set NCF_DATA_DIR to a folder that holds ncf-ml-1m/")
    config = Config.model_validate(
        {
            "paths": {"lake": str(tmp_path / "lake"), "work": str(tmp_path / "work")},
            "input": {"path": str(folder / "ml-1m.train.rating"), "format": "movielens-tsv"},
            "split": {
                "strategy": "files",
                "test": str(folder / "ml-1m.test.rating"),
                "candidates": str(folder / "ml-1m.test.negative"),
                "validation": False,
            },
            "negatives": {"draws": 0},
            "evaluate": {"baselines": ["popularity", "ease"], "ease_lambda": 1000.0, "ks": [10], "bootstrap": 0},
            "spark": settings.Spark(**SPARK).model_dump(),
        }
    )
    prepared = prepare(config, DS)
    # 156 of 6,040 users have the positive among their own 99 candidates: it is left out of them.
    test = pa.concat_tables([read_table(str(path)) for path in sorted(Path(prepared.outputs["test"]).iterdir())])
    sizes = test.column("candidates").combine_chunks().value_lengths().to_numpy()
    assert (len(sizes), int((sizes == 98).sum())) == (6_040, 156)
    install(config, "t1", 6_040, 3_706, 1)
    metrics = evaluate(config, DS).metrics
    popularity = {
        "candidates.hr@10": 0.4538,
        "candidates.ndcg@10": 0.2543,
        "full.hr@10": 0.0414,
        "full.ndcg@10": 0.0204,
    }
    for name, value in popularity.items():
        assert metrics[f"popularity.{name}"] == pytest.approx(value, abs=0.001), name
    assert metrics["ease.candidates.hr@10"] == pytest.approx(0.718, abs=0.002)
    assert metrics["ease.candidates.ndcg@10"] == pytest.approx(0.451, abs=0.002)
