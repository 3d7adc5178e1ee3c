"""What prepare says of the data for the gates: the numbers of the tables that it wrote, counted without Spark."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ncf_dist.config import Config
from ncf_dist.lake import Lake
from ncf_dist.manifests import Manifest
from ncf_dist.prepare import bins
from ncf_dist.prepare.profile import last_published
from ncf_dist.publish.data import Profile
from tests import nights
from tests.simulated import counts, rating_bins

DAY = 86_400
FIRST, SECOND = "2024-03-01", "2024-03-03"
NOON = 1_709_208_000  # 2024-02-29, 12:00 UTC


def write(log: Path, rows: list[tuple[str, str, float, int]], bad: int = 0) -> None:
    lines = [f"{user},{item},{rating},{time}" for user, item, rating, time in rows] + ["broken"] * bad
    log.write_text("u,i,r,t\n" + "\n".join(lines) + "\n")


@pytest.mark.usefixtures("spark")
def test_the_profile_is_what_the_tables_say(tmp_path: Path, make_config: Callable[..., Config]) -> None:
    rng = np.random.default_rng(5)
    ratings = (-2.0, 0.0, 0.5, 1.0, 3.5, 4.0, 4.5, 5.0, 90_000.0)
    rows = [
        (f"u{user}", f"i{item}", float(rng.choice(ratings)), NOON - DAY * int(rng.integers(5)))
        for user in range(30)
        for item in rng.choice(90, 8, replace=False)
    ]
    log = tmp_path / "log.csv"
    write(log, rows, bad=12)
    config = make_config(
        log,
        input={
            "format": "csv",
            "columns": {"user": "u", "item": "i", "rating": "r", "timestamp": "t"},
            "rating_range": None,
            "max_bad_fraction": 0.5,
        },
        negatives={"per_positive": 1, "draws": 1, "candidates": 3},
    )
    first = nights.run(config, FIRST)
    said = Profile.of(first.manifest)
    assert (said.new_users_a_day, said.vanished) == (None, None), "there is no night before"
    assert said.quarantine == 12 / (len(rows) + 12)
    assert said.age_days == pytest.approx((1_709_251_200 - max(row[3] for row in rows)) / DAY)
    stored = np.array(first.rows("interactions"), dtype=float)
    assert said.ratings == counts(rating_bins(stored[:, 2]))
    assert said.items == counts(stored[:, 1].astype(np.int64) % 64)
    assert sum(said.items.values()) == len(stored)

    # Two nights later a tenth of the users and of the items is gone, and four users are new.
    left = [row for row in rows if row[0] not in ("u1", "u2", "u3") and row[1] not in ("i5", "i6")]
    new = [(f"n{user}", f"i{item}", 1.0, NOON + DAY) for user in range(4) for item in range(10, 15)]
    late = [("u0", "i0", 1.0, NOON + 30 * DAY)]
    write(log, left + new + late)
    second = nights.run(config, SECOND)
    assert second.manifest.inputs["index"] == {"ds": FIRST, "run_key": first.manifest.run_key}
    said = Profile.of(second.manifest)
    gone = [row for row in rows if row not in left]
    assert said.vanished == pytest.approx(len(gone) / len(rows))
    assert said.new_users_a_day == 2.0
    assert said.quarantine == 0, "what is after the window is for later nights"
    assert json.loads(json.dumps(second.manifest.facts["profile"])) == second.manifest.facts["profile"]


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_bins_are_of_each_row_alone_and_add_up(ratings: list[float], cuts: list[int]) -> None:
    """Ratings against the formula that simulated nights have; and the rows may be cut into blocks in any way."""
    rating = np.array(ratings, np.float32)
    item, time = np.arange(len(rating)) * 37, np.arange(len(rating)) * 11 + 1
    assert bins.rating_bins(rating).tolist() == rating_bins(rating.astype(np.float64)).tolist()
    blocks = []
    for rows in np.split(np.arange(len(rating)), sorted(cut for cut in cuts if cut <= len(rating))):
        blocks.append(bins.Bins())
        blocks[-1].add(item[rows], rating[rows], time[rows])
    whole = bins.Bins.joined(json.loads(json.dumps([vars(block) for block in blocks])))
    assert whole.ratings == counts(rating_bins(rating.astype(np.float64)))
    assert whole.items == counts(item % 64)
    assert whole.newest == time[-1]


def test_bins_of_ratings_by_hand() -> None:
    """⌊7 log2 4⌋ = 14, and 15 more; 0.25 and less is in the first bin, 65,536 and more in the last."""
    assert bins.rating_bins(np.array([0, 4, -4, 1, 0.25, 0.001, 65_536, 1e9])).tolist() == [
        0,
        29,
        -29,
        15,
        1,
        1,
        127,
        127,
    ]
    halves = bins.rating_bins(np.arange(1, 11) / 2)
    assert (np.diff(halves) > 0).all(), "half stars are told apart"


def prepared(lake: Lake, ds: str, base: Manifest | None) -> Manifest:
    """A run of prepare that has no tables, whose index extends that of `base`."""
    runs, inputs = lake.stage(ds, "prepare"), {"index": {"ds": base.ds, "run_key": base.run_key} if base else None}
    root = runs.begin(f"p-{ds}")
    runs.finish(Manifest(stage="prepare", ds=ds, run_key=f"p-{ds}", root=root, config={}, inputs=inputs))
    return runs.newest()


def test_the_night_before_is_the_published_one_where_the_indexes_lead_to_it(tmp_path: Path) -> None:
    """A night that was refused is no measure of what has vanished since."""
    lake = Lake(str(tmp_path / "lake"))
    one = prepared(lake, FIRST, None)
    assert last_published(lake, "recommendations", None, FIRST) is None
    assert last_published(lake, "recommendations", one, SECOND) == one, "nothing is published"
    two = prepared(lake, "2024-03-02", one)
    score = Path(lake.root, "runs", FIRST, "score", "s1")
    score.mkdir(parents=True)
    said = {"stage": "score", "ds": FIRST, "run_key": "s1", "config": {}, "inputs": {"prepare": one.run_key}}
    (score / "manifest.json").write_text(json.dumps(said))
    latest = Path(lake.root, "recommendations", "latest.json")
    latest.parent.mkdir()
    for body, wanted in (
        ({"ds": FIRST, "run_key": "s1"}, one),
        ({"ds": FIRST, "run_key": "gone"}, two),
        ({"ds": SECOND, "run_key": "s1"}, two),
        ({}, two),
    ):
        latest.write_text(json.dumps(body))
        assert last_published(lake, "recommendations", two, SECOND) == wanted
    latest.write_text("{")
    assert last_published(lake, "recommendations", two, SECOND) == two
