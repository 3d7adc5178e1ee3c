"""A hand-made night of publication: what prepare and score leave, without either job."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from deltalake import DeltaTable

from ncf_dist import contracts
from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import write_parts
from ncf_dist.publish.pipeline import publish
from ncf_dist.rollback.pipeline import rollback
from ncf_dist.stage import Outcome, stored

ITEMS = ["apple", "bread", "cheese", "dates", "eggs", "figs"]
SEEN = {"ann": [0, 1], "bob": [2], "cat": [0, 5], "dan": [3, 4]}
HELD_OUT = {"ann": [2], "bob": [3], "cat": [], "dan": []}
COLUMNS = contracts.recommendations(pa.string(), pa.string()).columns
REQUIRED = ("users", "beats_popularity")
"""These nights are made by hand, without evaluate."""
Row = tuple[Any, int, str, float, str, str]


def good(model: str = "m1") -> list[Row]:
    """Two unseen items a user, best first."""
    offers = {
        "ann": ["dates", "eggs"],
        "bob": ["figs", "apple"],
        "cat": ["bread", "cheese"],
        "dan": ["apple", "bread"],
    }
    return [
        (user, rank + 1, item, 1.0 - rank / 2, model, "model")
        for user, items in offers.items()
        for rank, item in enumerate(items)
    ]


class Night:
    """A hand-made prepare run and score run of one ds."""

    def __init__(self, root: Path, ds: str = "2026-01-31", numbers: bool = False, lake: str | None = None) -> None:
        """lake: a URL in place of the folder `lake` under root."""
        self.root, self.ds, self.numbers = root, ds, numbers
        self.id_type = pa.int64() if numbers else pa.string()
        self.lake = Lake(lake or str(root / "lake"))
        self.sections: dict[str, Any] = {}
        self.config = self.configured()

    def configured(self, **publish: Any) -> Config:
        """The config with settings of the section `publish`."""
        tree = {
            "paths": {"lake": self.lake.root, "work": str(self.root / "work")},
            "input": {"path": "unused"},
            "publish": {"require": REQUIRED, **publish},
        }
        return Config.model_validate({**tree, **self.sections})

    def _made_with(self, **sections: Any) -> None:
        """What the runs were made with, the night's config says from now on."""
        self.sections |= sections
        self.config = Config.model_validate({**self.config.model_dump(), **self.sections})

    def prepare(
        self,
        unseen: tuple[str, ...] = (),
        strategy: str = "leave-one-out",
        spread: int = 1,
        last: int = 0,
        forget: str | None = None,
        **more: Any,
    ) -> Manifest:
        """`unseen`: users of the side table without an index. The last interaction of the n-th user is n days before
        ds. Of the users' numbers every `spread`-th has one, and the `last` ones have none: the others are forgotten.
        forget: digest of the list of people who were. more: facts."""
        numbers = [number * spread for number in range(len(SEEN))]
        users = {"user_id": [self.id(user) for user in SEEN], "user_idx": numbers}
        items = {"item_id": [self.id(item) for item in ITEMS], "item_idx": list(range(len(ITEMS)))}
        history = {
            "user_idx": users["user_idx"],
            "item_idx": list(SEEN.values()),
            "test_item_idx": list(HELD_OUT.values()),
        }
        tables = {
            contracts.user_index(self.id_type): users,
            contracts.item_index(self.id_type): items,
            contracts.HISTORY: history,
            contracts.INTERACTIONS: self._interactions(spread),
            contracts.unseen_users(self.id_type): {"user_id": [self.id(user) for user in unseen]},
        }
        self._made_with(split={"strategy": strategy})
        facts = {"users": len(SEEN) * spread + last, "items": len(ITEMS), **more}
        filled = {c: [pa.table(t, schema=c.schema)] for c, t in tables.items()}
        prepare = self._run("prepare", "p1", filled, facts, {} if forget is None else {"forget": forget})
        self._run("train", "t1", {}, {}, {"prepare": "p1"})
        return prepare

    def _interactions(self, spread: int) -> dict[str, list[Any]]:
        night, day = np.datetime64(self.ds, "us").astype(int), 86_400 * 10**6
        pairs = [
            (number, item, split)
            for number, user in enumerate(SEEN)
            for split, items in ((0, SEEN[user]), (2, HELD_OUT[user]))
            for item in items
        ]
        user, item, split = (list(column) for column in zip(*pairs, strict=True))
        times = [int(night) - number * day for number in user]
        user = [number * spread for number in user]
        return {"user_idx": user, "item_idx": item, "rating": [1.0] * len(user), "timestamp": times, "split": split}

    def score(
        self,
        rows: list[Row] | None = None,
        key: str = "s1",
        cuts: tuple[int, ...] = (4,),
        train: str = "t1",
        **facts: Any,
    ) -> Manifest:
        """`cuts`: the rows at which a new file begins. train: key of the model's run."""
        form = facts.get("form", "long")
        contract = contracts.recommendations(self.id_type, self.id_type)
        rows = [(self.id(r[0]), r[1], self.id(r[2]), *r[3:]) for r in (good() if rows is None else rows)]
        edges = [0, *cuts, len(rows)]
        parts = [rows[start:end] for start, end in itertools.pairwise(edges)]
        named = [[dict(zip(contract.columns, row, strict=True)) for row in part] for part in parts]
        if form == "lists":
            contract, named = contracts.recommendations(self.id_type, self.id_type, "lists"), list(map(as_lists, named))
        tables = [pa.Table.from_pylist(part, schema=contract.schema) for part in named]
        known = {
            "k": 2,
            "form": form,
            "active_since": None,
            "fallback_days": 30,
            "items": {},
            "users": 4,
            "short_users": 0,
            "model_version": "m1",
            "seen": "all",
            "prepare_run": "p1",
        }
        self._made_with(**facts.pop("config", {}))
        inputs = {"train": train, "prepare": "p1"}
        return self._run("score", key, {contract: tables}, known | facts, inputs)

    def evaluate(
        self,
        interval: tuple[float, float] | None = (0.01, 0.02),
        key: str = "e1",
        train: str = "t1",
        report: dict[str, Any] | None = None,
    ) -> Manifest:
        """A run of evaluate; `interval` of its headline metric against popularity. report: another metrics.json."""
        inputs = {"train": train, "prepare": "p1"}
        run = self._run("evaluate", key, {contracts.RANKS: []}, {}, inputs)
        row = {"with": "popularity", "protocol": "full", "metric": "ndcg@10", "difference": 0.0, "interval": interval}
        Path(run.root, "metrics.json").write_text(json.dumps(report or {"ks": [5, 10], "comparisons": [row]}))
        return run

    def id(self, name: str) -> Any:
        """The customer's id: a name, or a number that may be negative."""
        return sum(ord(letter) * 256**at for at, letter in enumerate(name)) - 2**31 if self.numbers else name

    def publish(self) -> tuple[str, int]:
        outcome = publish(self.config, self.ds)
        return outcome.status, outcome.extra["version"]

    def offer(self, model: str) -> None:
        """A run of score whose rows and key say which one it is: `m2` has the key `s2`."""
        self.score(good(model), key=model.replace("m", "s"), model_version=model)

    def rollback(self, to: int | str = "PREVIOUS") -> Outcome:
        return rollback(self.configured(rollback_to=to), self.ds)

    def copied(self, root: Path) -> Night:
        """The same night, with all that is in its lake, at another place."""
        shutil.copytree(self.lake.root, root / "lake")
        night = Night(root, self.ds, self.numbers)
        night._made_with(**self.sections)
        return night

    @property
    def table(self) -> Path:
        return Path(self.lake.root, "recommendations")

    def latest(self) -> dict[str, Any]:
        return dict(json.loads((self.table / "latest.json").read_text()))

    def read(self, ds: str | None = None) -> list[Row]:
        """What a reader of the Delta log sees of a night."""
        scan = DeltaTable(str(self.table)).scan(predicate=f"ds = '{ds or self.ds}'")
        return sorted(
            tuple(row.values()) for row in duckdb.from_arrow(scan).select(*COLUMNS).to_arrow_table().to_pylist()
        )

    def _run(
        self,
        stage: str,
        key: str,
        tables: dict[Any, list[pa.Table]],
        facts: dict[str, Any],
        inputs: dict[str, Any],
    ) -> Manifest:
        runs = self.lake.stage(self.ds, stage)
        run = runs.begin(key)
        written = {contract.name: write_parts(parts, run, contract) for contract, parts in tables.items()}
        return runs.finish(
            Manifest(
                stage=stage,
                ds=self.ds,
                run_key=key,
                root=run,
                config=stored(stage, self.config),
                inputs=inputs,
                tables=written,
                facts=facts,
            )
        )


def as_lists(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the long form as the other one's."""
    offer = ("rank", "item_id", "score", "reason")
    return [
        {"user_id": user, "items": [{name: row[name] for name in offer} for row in mine], "model_version": version}
        for (user, version), group in itertools.groupby(rows, lambda row: (row["user_id"], row["model_version"]))
        if (mine := list(group))
    ]


def changed(row: int, **columns: Any) -> list[Row]:
    """The good rows with one of them changed."""
    rows = good()
    rows[row] = tuple(columns.get(name, value) for name, value in zip(COLUMNS, rows[row], strict=True))
    return rows
