"""What is ranked tonight, and with what: the upstream runs, the model, the items that may be offered, the files."""

from __future__ import annotations

import posixpath
from dataclasses import dataclass
from functools import partial
from typing import Any

from pyspark.sql import SparkSession

from ncf_dist import contracts
from ncf_dist.ancestry import Sizes, index_sizes
from ncf_dist.bundle import BUNDLE, Bundle, read_bundle, verify_weights
from ncf_dist.config import Config
from ncf_dist.earlier import come_since
from ncf_dist.engines import choose
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_schema
from ncf_dist.products import Products
from ncf_dist.recent import check_recent
from ncf_dist.refits import REFIT, in_place_of, said_of
from ncf_dist.score.items import ItemLists
from ncf_dist.score.spec import ScorePass
from ncf_dist.score.task_rows import active_from
from ncf_dist.spark_files import ROWS_PER_FILE
from ncf_dist.spark_io import on_one_executor
from ncf_dist.stage import Upstream, find_upstream

STAGE = "score"
MIN_FILES = 16
PAIRS_PER_FILE = 10**9
"""A task scores at least one file. This is about a minute of work, so a large job can use many slots."""


@dataclass(frozen=True)
class Plan:
    """Everything that decides the table, known before Spark starts."""

    config: Config
    prepare: Manifest
    train: Manifest
    bundle: Bundle
    contract: contracts.Contract
    lists: ItemLists
    since: Sizes | None = None
    """What has come since the model's night, which it does not know; None for a model of tonight."""
    refit: Manifest | None = None
    """The run of train that the bundle is of, where that is the refit of `train`."""

    @classmethod
    def of(cls, config: Config, ds: str, given: Upstream | None = None) -> Plan:
        """Raises ContractError and InputError as `pipeline.score` says."""
        lake = Lake(config.paths.lake)
        upstream = find_upstream(lake, config, ds, STAGE, given)
        prepare, train = upstream["prepare"], upstream["train"]
        refit = in_place_of(lake, config, ds, train)
        bundle = read_bundle(posixpath.join((refit or train).root, BUNDLE))
        verify_weights(bundle)  # Once a job; the workers trust them.
        since = come_since(lake, prepare, refit or train, bundle)
        if refit is not None and refit.ds == ds and since is not None and not any(since):
            since = None  # It was made from tables of its own, of this very night.
        check_recent(bundle, prepare)
        user_id, item_id = (
            read_schema(prepare.files(f"{kind}_index")[0]).field(f"{kind}_id").type for kind in ("user", "item")
        )
        contract = contracts.recommendations(user_id, item_id, config.score.form)
        return cls(config, prepare, train, bundle, contract, ItemLists.read(config.score), since, refit)

    @property
    def inputs(self) -> dict[str, Any]:
        """What the run is made from beside the config. `train` is the run that was judged."""
        refit = {} if self.refit is None else {REFIT: self.refit.run_key}
        return {"prepare": self.prepare.run_key, "train": self.train.run_key, **refit, **self.lists.fingerprint}

    @property
    def indexed(self) -> int:
        """How many user indexes were ever given, those of forgotten users included."""
        return index_sizes(self.prepare).users

    @property
    def n_files(self) -> int:
        """Files of the table: a function of the night's tables and the config alone, never of the cluster."""
        unseen = self.prepare.tables.get(contracts.UNSEEN_USERS)
        users = self.indexed + (unseen.rows if unseen and self.config.score.fallback_days is not None else 0)
        rows, pairs = users * self.config.score.k, users * self.bundle.n_items
        return max(MIN_FILES, -(-rows // ROWS_PER_FILE), -(-pairs // PAIRS_PER_FILE))

    @property
    def tasks(self) -> int:
        return self.config.score.tasks or self.n_files

    def spec(self, folder: str, products: Products) -> ScorePass:
        """What the workers need to write into `folder`."""
        items = tuple(self.prepare.files(contracts.ITEM_INDEX))
        return ScorePass(self.bundle, items, self.contract, folder, self.config.score, self.lists, products=products)

    def count_items(self) -> dict[str, Any]:
        """`ItemLists.count` of the items that the model knows."""
        return self.lists.count(self.prepare.files(contracts.ITEM_INDEX), self.bundle.n_items)

    def products(self, spark: SparkSession) -> Products:
        """How the executors multiply, from a probe on one of them."""
        asked = self.config.score.precision
        return Products.agreed(on_one_executor(spark, partial(choose, self.bundle, asked)), asked)

    def facts(self) -> dict[str, Any]:
        """What the audit compares the table with."""
        config, since = self.config.score, active_from(self.config.score, self.prepare.ds)
        refit = {}
        if self.refit is not None:
            refit = said_of(self.train, read_bundle(posixpath.join(self.train.root, BUNDLE)), self.refit)
        return refit | {
            "k": config.k,
            "form": config.form,
            "seen": config.seen,
            "active_since": since.isoformat() if since else None,
            "fallback_days": config.fallback_days,
            "model_version": self.bundle.model_version,
            "prepare_run": self.prepare.run_key,
        }
