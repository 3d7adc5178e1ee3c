"""Other libraries' SASRec beside our model of histories, on the split of conf/ml-1m-5core-history.yaml.

    .venv/bin/python -m benchmarks.sequence_peers [--seeds 1 2 3] [--minutes 14] [--rectools PYTHON] [--recbole PYTHON]
        [--ours] [--add]

PYTHON: the interpreter of an environment of its own, with rectools[torch] or RecBole 1.2.1. Each trains for `minutes`
of wall clock (with --ours for as long as ours took, if `minutes` are not given) on all cores of this machine, from all
but each user's latest item, in the order of the file; then it ranks the whole catalogue but what the user has seen.
Settings are the libraries' own defaults, but for the length of histories: 200 items in RecTools, as published
comparisons on MovieLens-1M have it. RecBole trains on a row an item, so its default of 50 is all that the minutes
allow. HR@10 and NDCG@10 are counted here, from each one's ten items. --ours: the committed config, which takes as many
minutes as it takes. Prints one table and writes benchmarks/results/sequence_peers.json, after each of them; --add keeps
what the results have of other seeds and other models.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from benchmarks.history import sequential_places
from benchmarks.ncf import run
from ncf_dist import contracts
from ncf_dist.machine import cores, processor
from ncf_dist.manifests import Manifest, read_manifest
from ncf_dist.parquet import read_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks/results/sequence_peers.json"
CONFIG, CORE = "ml-1m-5core-history", 5

RECTOOLS = """
import datetime, json, sys, time
import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
folder, minutes, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
rows = pd.read_csv(folder + "/train.csv")
rows = rows.rename(columns={"user": Columns.User, "item": Columns.Item, "place": Columns.Datetime})
rows[Columns.Datetime] = pd.to_datetime(rows[Columns.Datetime], unit="s")
rows[Columns.Weight] = 1
seed_everything(seed)
def trainer():
    return Trainer(max_time=datetime.timedelta(minutes=minutes), max_epochs=-1, logger=False, accelerator="cpu",
                   enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
dataset = Dataset.construct(rows)
model = SASRecModel(session_max_len=200, get_trainer_func=trainer)
start = time.monotonic()
model.fit(dataset)
seconds = time.monotonic() - start
found = model.recommend(users=rows[Columns.User].unique(), dataset=dataset, k=10, filter_viewed=True)
found = found.rename(columns={Columns.User: "user", Columns.Item: "item", Columns.Rank: "rank"})
found[["user", "item", "rank"]].to_csv(folder + "/lists.csv", index=False)
print("RESULT" + json.dumps({"seconds": seconds, "epochs": model.fit_trainer.current_epoch}))
"""

RECBOLE = """
import json, sys, time
import numpy as np
import pandas as pd
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.utils import init_seed
folder, minutes, seed = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
config = Config(model="SASRec", dataset="ml", config_dict={
    "data_path": folder, "load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id", "TIME_FIELD": "timestamp", "train_neg_sample_args": None, "use_gpu": False,
    "show_progress": False, "state": "ERROR", "seed": seed,
    "eval_args": {"split": {"LS": "test_only"}, "group_by": "user", "order": "TO", "mode": "full"}})
init_seed(seed, True)
dataset = create_dataset(config)
train, _, test = data_preparation(config, dataset)
model = SASRec(config, train.dataset)
optimiser = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
start, steps = time.monotonic(), 0
left = lambda: time.monotonic() - start < 60 * minutes
while left():
    for batch in train:
        optimiser.zero_grad()
        model.calculate_loss(batch).backward()
        optimiser.step()
        steps += 1
        if not left():
            break
seconds = time.monotonic() - start
model.eval()
rows = pd.read_csv(folder + "/train.csv")
users, items = dataset.field2id_token["user_id"], dataset.field2id_token["item_id"]
number = {token: place for place, token in enumerate(items)}
seen = {user: [number[str(item)] for item in part if str(item) in number]
        for user, part in rows.groupby("user")["item"]}
lists = []
with torch.no_grad():
    for batch in test:
        interaction = batch[0]
        scores = model.full_sort_predict(interaction)
        scores[:, 0] = -torch.inf
        who = [int(users[u]) for u in interaction["user_id"].tolist()]
        for row, user in enumerate(who):
            scores[row, seen[user]] = -torch.inf
        for user, best in zip(who, scores.topk(10).indices.tolist()):
            lists += [(user, int(items[item]), rank) for rank, item in enumerate(best, 1)]
pd.DataFrame(lists, columns=["user", "item", "rank"]).to_csv(folder + "/lists.csv", index=False)
print("RESULT" + json.dumps({"seconds": seconds, "epochs": steps / len(train)}))
"""

PEERS: dict[str, tuple[str, str]] = {
    "RecTools SASRec, softmax": ("rectools", RECTOOLS),
    "RecBole SASRec": ("recbole", RECBOLE),
}
"""Name → (library, program)."""


def read_ratings(path: Path) -> pd.DataFrame:
    """MovieLens-1M's file: (user, item, rating, time in s)."""
    return pd.read_csv(path, sep="::", engine="python", names=["user", "item", "rating", "time"])


def split_of(ratings: Path) -> tuple[pd.DataFrame, dict[int, int]]:
    """(user, item, place) of the train rows, and each user's test item, by the protocol itself: computed from the raw
    file, so that it also says whether prepare keeps to it."""
    rows = read_ratings(ratings)
    before = 0
    while before != (before := len(rows)):
        for column in ("user", "item"):
            rows = rows[rows.groupby(column)[column].transform("size") >= CORE]
    rows = rows.sort_values(["user", "time"], kind="stable")
    rows["place"] = rows.groupby("user").cumcount()
    last = ~rows.duplicated("user", keep="last")
    return rows.loc[~last, ["user", "item", "place"]], dict(
        zip(rows.loc[last, "user"], rows.loc[last, "item"], strict=True)
    )


def check_prepare(prepare: Manifest, test: dict[int, int]) -> None:
    """Ends the benchmark unless prepare holds out the same items."""
    held, users, items = (
        pa.concat_tables([read_table(path) for path in prepare.files(name)]).to_pandas()
        for name in (contracts.TEST.name, "user_index", "item_index")
    )
    named = held.merge(users, on="user_idx").merge(items, on="item_idx")
    found = dict(zip(named["user_id"].astype(int), named["item_id"].astype(int), strict=True))
    if found != test:
        sys.exit(
            f"prepare holds out {len(found)} rows, {len(found.items() ^ test.items())} of them others; needed the same"
        )


def figures(lists: pd.DataFrame, test: dict[int, int]) -> dict[str, float]:
    """HR@10 and NDCG@10 over all users with a test item."""
    hits = lists[lists["item"] == lists["user"].map(test)]
    gains = 1 / np.log2(1 + hits["rank"].to_numpy(np.float64))
    return {"hr@10": len(hits) / len(test), "ndcg@10": float(gains.sum()) / len(test)}


def run_peer(
    name: str, python: str, rows: pd.DataFrame, minutes: float, seed: int
) -> tuple[pd.DataFrame, dict[str, float]]:
    """(its lists, seconds and epochs of its training)."""
    _, program = PEERS[name]
    with tempfile.TemporaryDirectory() as folder:
        rows.to_csv(f"{folder}/train.csv", index=False)
        (Path(folder) / "ml").mkdir()
        # The order of the rows as a time, so that equal times keep the order of the file.
        named = {"user": "user_id:token", "item": "item_id:token", "place": "timestamp:float"}
        # RecBole's split takes each user's latest row away: one that stands for the test item, which is not told.
        closing = rows.groupby("user", as_index=False).agg(item=("item", "first"), place=("place", "max"))
        closing["place"] += 1
        inter = pd.concat([rows, closing]).rename(columns=named)
        inter.to_csv(f"{folder}/ml/ml.inter", sep="\t", index=False)
        command = [python, "-c", program, folder, str(minutes), str(seed)]
        done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        return pd.read_csv(f"{folder}/lists.csv"), json.loads(line.removeprefix("RESULT"))


def run_ours(files: Path, seed: int, test: dict[int, int], train: bool) -> dict[str, float]:
    """Our figures, if asked for; that prepare holds out the same rows, in any case."""
    with tempfile.TemporaryDirectory() as lake:
        settings = sequential_places(files, lake, seed)
        prepared = run("prepare", CONFIG, settings)
        check_prepare(read_manifest(str(Path(lake) / prepared["runs"]["prepare"])), test)
        if not train:
            return {}
        trained = run("train", CONFIG, settings)
        judged = run("evaluate", CONFIG, settings)["metrics"]
    return {"hr@10": judged["full.hr@10"], "ndcg@10": judged["full.ndcg@10"], "seconds": trained["wall"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rectools", metavar="PYTHON")
    parser.add_argument("--recbole", metavar="PYTHON")
    parser.add_argument("--ours", action="store_true", help="train ours, too")
    parser.add_argument("--add", action="store_true", help="keep the others that the results have")
    args = parser.parse_args()
    files = Path(os.environ.get("NCF_DATA_DIR", ROOT / "../shared/data")).resolve() / "ml-1m"
    if not files.is_dir():
        sys.exit(f"{files} is not there; needed MovieLens-1M: set NCF_DATA_DIR")
    rows, test = split_of(files / "ratings.dat")
    print(f"{len(rows):,} train rows of {len(test):,} users, {rows['item'].nunique():,} items", file=sys.stderr)
    machine = f"{cores()} cores, {processor()}"
    told: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text()) if args.add and RESULTS.exists() else {}

    def keep(seed: int, name: str, values: dict[str, float]) -> None:
        told.setdefault(str(seed), {})[name] = {**values, "machine": machine}
        RESULTS.write_text(json.dumps(told, indent=1) + "\n")
        print(f"seed {seed}, {name}: {values}", file=sys.stderr)

    for number, seed in enumerate(args.seeds):
        minutes: float = args.minutes or 14
        # prepare holds out the same rows for every seed.
        if (args.ours or number == 0) and (ours := run_ours(files, seed, test, args.ours)):
            minutes = args.minutes or ours["seconds"] / 60
            keep(seed, "ours", ours)
        for name, (library, _) in PEERS.items():
            if python := getattr(args, library):
                lists, training = run_peer(name, python, rows, minutes, seed)
                keep(seed, name, figures(lists, test) | training)
    print(f"MovieLens-1M, 5-core, each user's latest item, whole catalogue, seeds {' '.join(told)}")
    for name in dict.fromkeys(name for models in told.values() for name in models):
        of_name = [models[name] for models in told.values() if name in models]
        line = []
        for figure in (key for key in of_name[0] if key != "machine"):
            values = [model[figure] for model in of_name]
            spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
            line.append(f"{figure} {statistics.mean(values):.4f}{spread}")
        print(f"{name:<26}{len(of_name)} seeds   {'   '.join(line)}")


if __name__ == "__main__":
    main()
