"""Show a published table to a person: ten users, what they liked, and what they get, with titles.

    python -m ncf_dist.demo --config conf/demo.yaml

Reads what any consumer can read (latest.json and the Parquet files it names) and, for titles and past likes,
this night's prepare run.
"""

from __future__ import annotations

import posixpath
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from ncf_dist import metrics
from ncf_dist.cli import parser
from ncf_dist.config import Config, load_config
from ncf_dist.contracts import INTERACTIONS, ITEM_INDEX, ITEMS, USER_INDEX, in_long_form
from ncf_dist.errors import ContractError, ExitCode, NcfError
from ncf_dist.files import exists, read_json
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import read_table

USERS = 10
LIKED = 4


@dataclass(frozen=True)
class Latest:
    """What this page uses of latest.json; `files` are relative to the table."""

    ds: str
    version: int
    model_version: str
    run_key: str
    rows: int
    files: list[str]


def show(config: Config) -> str:
    """The text: a block a user, then the paths of the table and of the report. Raises ContractError where nothing is
    published."""
    lake = Lake(config.paths.lake)
    root = lake.path(config.publish.table)
    latest = read_latest(root)
    score = lake.stage(latest.ds, "score").load(latest.run_key)
    prepare = lake.stage(latest.ds, "prepare").load(str(score.inputs["prepare"]))
    table = _some_users([posixpath.join(root, file) for file in latest.files])
    users = pc.unique(table["user_id"])
    titles = _titles(prepare)
    liked = _liked(prepare, users)
    lines = []
    for user in users.to_pylist():
        rows = table.filter(pc.equal(table["user_id"], user)).sort_by("rank").to_pylist()
        past = "; ".join(titles.get(i, str(i)) for i in liked.get(user, []))
        lines.append(f"user {user}   {'liked: ' + past if past else 'without a history: what is popular'}")
        lines += [
            f"   {row['rank']:>2}. {titles.get(row['item_id'], row['item_id'])}   {row['score']:.2f}" for row in rows
        ]
    lines.append("")
    lines.append(
        f"published: {root}  (ds {latest.ds}, version {latest.version}, {latest.rows:,} rows, "
        f"model {latest.model_version})"
    )
    if report := _report(lake, latest.ds, score):
        lines.append(f"report: {report}")
    return "\n".join(lines)


def read_latest(root: str) -> Latest:
    """What latest.json of the table at `root` says. Raises ContractError."""
    path = posixpath.join(root, "latest.json")
    if not exists(path):
        raise ContractError(f"{root} has no latest.json: nothing is published yet; run the job nightly first")
    try:
        return read_json(Latest, path, more_keys=True)
    except (OSError, ValueError) as error:
        raise ContractError(
            f"{path} cannot be read ({error}); needed what publish wrote: "
            "run the job publish again, which writes it anew"
        ) from None


def _report(lake: Lake, ds: str, score: Manifest) -> str | None:
    """The page of the newest run of evaluate that judged the model that `score` ranked with."""
    for run in lake.stage(ds, "evaluate").production():
        path = posixpath.join(run.root, metrics.PAGE)
        if run.inputs.get("train") == score.inputs.get("train") and exists(path):
            return path
    return None


def _some_users(files: list[str]) -> pa.Table:
    """The rows of the first USERS users: a file after the other until there are enough."""
    tables: list[pa.Table] = []
    for path in files:
        tables.append(in_long_form(read_table(path)))
        if len(pc.unique(pa.concat_tables(tables)["user_id"])) >= USERS:
            break
    table = pa.concat_tables(tables)
    return table.filter(pc.is_in(table["user_id"], value_set=pc.unique(table["user_id"]).slice(0, USERS)))


def _titles(prepare: Manifest) -> dict[object, str]:
    if ITEMS not in prepare.tables:
        return {}
    table = pa.concat_tables([read_table(path) for path in prepare.files(ITEMS)])
    return dict(zip(table["item_id"].to_pylist(), table["title"].to_pylist(), strict=True))


def _liked(prepare: Manifest, users: pa.Array) -> dict[object, list[object]]:
    """For each user the latest of the items they rated best."""
    index = pa.concat_tables([read_table(path) for path in prepare.files(USER_INDEX)])
    index = index.filter(pc.is_in(index["user_id"], value_set=users))
    items = pa.concat_tables([read_table(path) for path in prepare.files(ITEM_INDEX)])
    found: dict[object, list[object]] = {}
    for path in prepare.files(INTERACTIONS.name):
        rows = read_table(path, ["user_idx", "item_idx", "rating", "timestamp"])
        rows = (
            rows.filter(pc.is_in(rows["user_idx"], value_set=index["user_idx"].combine_chunks()))
            .join(index, "user_idx")
            .join(items, "item_idx")
        )
        rows = rows.sort_by([("rating", "descending"), ("timestamp", "descending"), ("item_idx", "ascending")])
        for row in rows.to_pylist():
            found.setdefault(row["user_id"], []).append(row["item_id"])
    return {user: best[:LIKED] for user, best in found.items()}


def main(argv: Sequence[str] | None = None) -> int:
    try:
        args = parser("demo").parse_args(argv)
        print(show(load_config(args.config, args.overrides)))
    except NcfError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return int(ExitCode.DONE)


if __name__ == "__main__":
    sys.exit(main())
