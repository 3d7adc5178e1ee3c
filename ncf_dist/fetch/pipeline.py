"""The job fetch: puts a dataset into `<lake>/raw/<dataset>` (or `fetch.to`), for `input.path`.

Spark makes `synthetic` (synthetic.py); GroupLens' datasets are downloaded (download.py) or taken from `fetch.from`, and
unpacked (grouplens.py). The result does not depend on ds. A target whose manifest has the same key is left as it is,
without Spark and without network.
"""

from __future__ import annotations

import logging
import os
import posixpath

from pyspark.sql import SparkSession

from ncf_dist import config as settings
from ncf_dist import files, manifests
from ncf_dist.config import Config
from ncf_dist.errors import ConfigError, InputError
from ncf_dist.fetch import synthetic
from ncf_dist.fetch.delivery import DeliveredFile, Delivery, commit, find, staging, store
from ncf_dist.fetch.download import BASE_URL, download, md5_of
from ncf_dist.fetch.grouplens import ARCHIVES, Archive, folder_files, opened
from ncf_dist.fetch.lines import LINES_PER_FILE, write_lines
from ncf_dist.lake import Lake
from ncf_dist.spark_io import spark_session
from ncf_dist.stage import Outcome

SYNTHETIC_TABLES = {"ratings": "ratings.dat", "movies": "movies.dat", "users": "users.dat"}
log = logging.getLogger(__name__)


def fetch(config: Config, ds: str) -> Outcome:
    """Make or take `config.fetch.dataset`. Raises ConfigError, InputError, BusyRun: nothing was delivered."""
    lake = Lake(config.paths.lake)
    target = files.resolve(config.fetch.to) if config.fetch.to else lake.path("raw", config.fetch.dataset)
    try:
        if posixpath.join(target, "").startswith(posixpath.join(lake.root, "")):
            lake.check_writable()
        if config.fetch.dataset == "synthetic":
            return _make(config, target)
        return _take(ARCHIVES[config.fetch.dataset], config, target)
    except OSError as error:
        raise InputError(
            f"fetch to {target} stopped: {error}; needed files it can read and a place it can write: "
            "fix that, or set fetch.to"
        ) from error


def _make(config: Config, target: str) -> Outcome:
    chosen = {
        name: getattr(config.fetch, name) for name in ("dataset", "users", "items", "clusters", "mean_ratings_per_user")
    }
    key = manifests.run_key("fetch", "", {**chosen, "seed": config.seed}, {})
    if done := find(target, key):
        return done.outcome(target, "already-done")
    with staging(target) as folder, spark_session("ncf-fetch", config.spark) as spark:
        parts = write_synthetic(spark, folder, config.fetch, config.seed)
        delivery = Delivery(key, "synthetic", "movielens-dat", SYNTHETIC_TABLES, tuple(parts))
        commit(target, folder, delivery)
    return delivery.outcome(target, "done")


def write_synthetic(
    spark: SparkSession, folder: str, fetch: settings.Fetch, seed: int, lines_per_file: int = LINES_PER_FILE
) -> list[DeliveredFile]:
    """Write the three tables of the synthetic log to `folder`."""
    ids, slots = spark.range(fetch.users), spark.range(fetch.items)
    users_per_file = max(1, lines_per_file // fetch.mean_ratings_per_user)
    ratings, movies, users = (
        synthetic.ratings(ids, fetch, seed),
        synthetic.movies(slots, fetch, seed),
        synthetic.users(ids, seed),
    )
    return [
        *write_lines(
            ratings,
            folder,
            SYNTHETIC_TABLES["ratings"],
            fetch.users,
            users_per_file,
            ("user", "timestamp", "item"),
        ),
        *write_lines(movies, folder, SYNTHETIC_TABLES["movies"], fetch.items, lines_per_file, ("item",)),
        *write_lines(users, folder, SYNTHETIC_TABLES["users"], fetch.users, lines_per_file, ("user",)),
    ]


def _take(archive: Archive, config: Config, target: str) -> Outcome:
    source = _source(config.fetch.source) if config.fetch.source else None
    if source is None:
        origin = {"md5": archive.md5}
    else:
        origin = {"files": files.fingerprint(folder_files(source, archive) if os.path.isdir(source) else [source])}
    key = manifests.run_key("fetch", "", {"dataset": archive.name}, origin)
    if done := find(target, key):
        return done.outcome(target, "already-done")
    if source is None:
        downloads = posixpath.join(files.resolve(config.paths.work), "downloads")
        path = download(f"{BASE_URL}/{archive.name}.zip", archive.md5, downloads)
    else:
        path = source
        if os.path.isfile(path) and (found := md5_of(path)) != archive.md5:
            log.warning(
                "%s has MD5 %s, GroupLens publishes %s for %s; taking it as it is",
                path,
                found,
                archive.md5,
                archive.name,
            )
    return _unpack(path, archive, key, target).outcome(target, "done")


def _unpack(path: str, archive: Archive, key: str, target: str) -> Delivery:
    with opened(path, archive) as files, staging(target) as folder:
        parts = []
        for name, opener in sorted(files.items()):
            with opener() as stream:
                parts.append(store(stream, folder, name))
        tables = {table: name for table, name in archive.tables.items() if name in files}
        delivery = Delivery(key, archive.name, archive.format, tables, tuple(parts))
        commit(target, folder, delivery)
    return delivery


def _source(text: str) -> str:
    """`fetch.from` as a local path that exists. Raises ConfigError, InputError."""
    path = files.resolve(text)
    if not files.is_local(path):
        raise ConfigError(f"fetch.from is {text!r}; needed a zip or a folder on this machine: copy it here first")
    if not os.path.exists(path):
        raise InputError(
            f"fetch.from {path} does not exist; needed a zip of GroupLens or an unpacked folder: "
            "fix fetch.from, or leave it out to download"
        )
    return path
