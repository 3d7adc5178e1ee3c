"""report.html: what stands on it is what the data says, and nothing in a log can change the page."""

from __future__ import annotations

import copy
import json
import math
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pyspark.sql import DataFrame, SparkSession

from ncf_dist.charts import svg, text
from ncf_dist.contracts import (
    DAY,
    HISTORY,
    INTERACTIONS,
    ITEM_STATS,
    QUARANTINE,
    Contract,
    item_index,
    items,
    user_index,
)
from ncf_dist.evaluate.periods import LONGEST, UNITS, period_codes, period_name, unit_of
from ncf_dist.evaluate.report.data import report_data, thinned
from ncf_dist.evaluate.report.examples import Offer, examples, offers, well_rated
from ncf_dist.evaluate.report.page import OPTIONAL, render, write_report
from ncf_dist.evaluate.report.profile import Counted, binned, by_period, long_tail, profile
from ncf_dist.evaluate.report.verdict import Verdict, verdicts
from ncf_dist.manifests import Manifest
from ncf_dist.parquet import write_parts
from ncf_dist.spark_io import read_table
from tests import reports

EVIL = "<script>alert(1)</script>\x00\"' onload=x \u202e"
VOID = {"meta", "br", "wbr"}


def metrics_of(best: float) -> dict[str, float]:
    names = ("hr", "recall", "precision", "ndcg", "map")
    return {
        "mrr": best / 2,
        **{f"{name}@{k}": best * k / 20 + i / 1000 for i, name in enumerate(names) for k in (5, 10)},
    }


def implicit() -> dict[str, Any]:
    """A report with every section."""
    model, popular = metrics_of(0.4), metrics_of(0.2)
    both = {"full": model, "candidates": {**model, "auc": 0.9}}
    theirs = {"full": popular, "candidates": {**popular, "auc": 0.6}}
    segment = {
        "name": "1–9 items",
        "users": 40,
        "full": {"hr@10": 0.3, "ndcg@10": 0.2},
        "popularity": {"hr@10": 0.1, "ndcg@10": 0.05},
        "intervals": {"ndcg@10": [0.1, 0.3]},
    }
    item = {"item_id": 7, "title": "Film 7 (1977)"}
    return {
        "ds": "2026-01-31",
        "model_version": "neumf-0123456789ab",
        "feedback": "implicit",
        "ks": [5, 10],
        "n_users": 1234,
        "n_rows": 2345,
        **both,
        "lists": {"coverage@10": 0.41, "gini@10": 0.87},
        "intervals": {name: {m: [v - 0.01, v + 0.01] for m, v in found.items()} for name, found in both.items()},
        "baselines": {"popularity": {**theirs, "lists": {"coverage@10": 0.02, "gini@10": 0.99}}},
        "comparisons": [
            {"with": "popularity", "protocol": "full", "metric": "ndcg@10", "difference": 0.1,
             "interval": [0.08, 0.12], "p": 0.0004},
        ],
        "segments": {
            "activity": [segment],
            "item_popularity": [{**segment, "name": "decile 1, items with 10–20"}],
            "month": [{**segment, "name": f"2000-{month:02}"} for month in range(1, 6)],
        },
        "scores": {"edges": [0, 1, 2, 3], "all": [50, 20, 10], "held_out": [1, 4, 5], "first": [0, 1, 9]},
        "beats_popularity": True,
        "examples": [
            {
                "user_id": "u1",
                "liked": [{**item, "rating": 4.5}],
                "held_out": [{**item, "item_id": 8, "title": "Film 8", "rank": 1042}],
                "recommended": [{**item, "rank": rank, "item_id": rank, "title": f"Film {rank}"} for rank in (1, 2, 8)],
            }
        ],
        "profile": {
            "users": 1234,
            "items": 321,
            "interactions": 98765,
            "density": 0.25,
            "rows": {"input": 100000, "accepted": 98765, "duplicates": 1200, "quarantined": {"needed 4 fields": 35}},
            "quarantine_samples": [{"reason": "needed 4 fields", "file": "a.dat", "place": 17, "raw": "1::2"}],
            "long_tail": [[1, 0.1], [10, 0.44], [100, 1.0]],
            "activity": {"edges": [1, 2, 5], "users": [1000, 234]},
            "item_counts": {"edges": [1, 2, 5, 10], "items": [1, 300, 20]},
            "by_time": {"unit": "month", "counts": [["2000-01", 50000], ["2000-02", 0], ["2000-03", 48765]]},
        },
        "training": {
            "epochs": [{"epoch": e, "loss": 0.5 - e / 10, "ndcg@10": 0.3 + e / 10, "hr@10": 0.6} for e in range(3)],
            "curve": [[e, s, 0.5, 0.001] for e in range(3) for s in range(5)],
            "best_epoch": 1,
        },
        "resources": [
            {"stage": "prepare", "seconds": 52.3, "facts": {"rows/s": 1912.4, "bytes stored": 3 * 2**20}},
            {"stage": "train", "seconds": 4000, "facts": {"waiting for data": 0.02}},
        ],
        "peak_memory_bytes": 5 * 2**20,
        "lineage": {
            "inputs": [{"name": "interactions", "path": "logs/a.dat", "fingerprint": "f00"}],
            "index": None,
            "runs": {"prepare": "p1", "train": "t1", "evaluate": "e1"},
            "weights_sha256": "0123abcd",
            "config": {"negatives": {"candidates": 99}},
            "versions": {"ncf_dist": "0.1.0", "torch": "2.13.0"},
            "seed": 1,
        },
    }  # fmt: skip


REQUIRED = ("ds", "model_version", "feedback", "ks", "n_users", "full")


def explicit() -> dict[str, Any]:
    """Ratings; no candidates, no baselines, nothing optional but the rating errors."""
    data = {name: value for name, value in implicit().items() if name in REQUIRED}
    return {**data, "feedback": "explicit", "rating": {"mse": 0.7512, "rmse": 0.8667, "mae": 0.6812}}


class Page(HTMLParser):
    """Tags that are balanced, their attributes, and the text outside of style."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.values: dict[str, tuple[str, str]] = {}
        """<data> elements: each key of data-key to (value, text)."""
        self.texts: list[str] = []
        self._key: tuple[str, str] | None = None
        self.feed(html)
        self.close()
        assert self.open == []

    @property
    def tags(self) -> set[str]:
        return {tag for tag, _, _ in self.attributes}

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> set[str | None]:
        return {value for _, name, value in self.attributes if name == "id"}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs] or [(tag, "", None)]
        if tag == "data":
            found = dict(attrs)
            self._key = (str(found["data-key"]), str(found["value"]))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            return
        if self._key and self.open[-1] == "data":
            keys, value = self._key
            self.values |= dict.fromkeys(keys.split(), (value, data))  # Metrics that say the same share a cell.
        self.texts.append(data)


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(implicit()))


# ---- the numbers ---------------------------------------------------------------------------------------------------


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,8}(@[1-9][0-9]?)?", fullmatch=True), st.floats(-10, 10, allow_nan=False), max_size=12
    )
)
@settings(max_examples=25, deadline=None)
def test_every_metric_is_on_the_page_as_it_is_in_the_data(more: dict[str, float]) -> None:
    """Whatever they are called; the exact value beside the one that is read."""
    data = implicit()
    data["full"] |= more
    values = Page(render(data)).values
    for group in ("full", "candidates", "lists"):
        for name, value in data[group].items():
            exact, read = values[f"model.{group}.{name}"]
            assert float(exact) == value
            assert float(read.replace("−", "-")) == pytest.approx(value, abs=0.5001e-4)
        for name, value in data["baselines"]["popularity"][group].items():
            if name in data[group]:
                assert float(values[f"popularity.{group}.{name}"][0]) == value


def test_figures_beside_the_metrics_are_the_data_s(page: Page) -> None:
    for wanted in (
        "2,345 held-out interactions",
        "NDCG@10 over the full catalogue is 0.2030 , 1.97 times popularity’s 0.1030",  # (.4 · 10/20 + .003) / (.2 · …)
        "+0.1000 , 95 % interval +0.0800 to +0.1200, p < 0.001",
        "0.1930–0.2130",
        "read 100,000 accepted 98,765 duplicates 1,200 quarantined 35",
        "density 25 %",
        "52.3 s rows/s 1,912 bytes stored 3 MiB",
        "1 h 6 min waiting for data 2 %",
        "at most 5 MiB",
        "needed 4 fields · a.dat, 17",
        "Film 8 rank 1,042",
        "4.5 ★",
        "this is one training, with seed 1",
    ):
        assert wanted in page.text, wanted


def test_what_was_held_out_is_marked_where_it_is_offered(page: Page) -> None:
    html = render(implicit())
    assert re.findall(r'<li class="hit"><b>(\d+)</b>', html) == ["8"]


@pytest.mark.parametrize(
    ("interval", "difference", "title"),
    [
        ([0.08, 0.12], 0.1, "The model beats popularity"),
        ([-0.01, 0.21], 0.1, "The model is not clearly better than popularity"),
        ([-0.2, -0.1], -0.15, "The model is worse than popularity"),
    ],
)
def test_the_verdict_is_the_interval_s(interval: list[float], difference: float, title: str) -> None:
    data = implicit()
    data["comparisons"][0] |= {"interval": interval, "difference": difference}
    assert f"<h1>{title}</h1>" in render(data)


def test_a_metric_in_which_popularity_is_ahead_is_named_in_the_verdict() -> None:
    data = implicit()
    data["full"]["map@5"] = 0.0
    html = render(data)
    assert "<h1>The model beats popularity, but not in every metric</h1>" in html
    assert "Not ahead in MAP@5." in Page(html).text


def test_without_a_baseline_nothing_is_claimed() -> None:
    found = Page(render(explicit()))
    assert "How the model did" in found.text
    assert "beats" not in found.text


def test_without_intervals_it_says_so() -> None:
    data = implicit()
    data["intervals"], data["comparisons"] = {}, []
    for segment in (s for kind in data["segments"].values() for s in kind):
        del segment["intervals"]
    found = Page(render(data)).text
    assert "no interval was computed" in found
    assert "bootstrap" not in found


# ---- the verdict names everybody ------------------------------------------------------------------------------------

OTHERS = ("popularity", "ease", "item_knn", "als", "neumf-0123456789ab")
SIDES = {"beaten": 0.02, "level": 0.002, "ahead": -0.02}
"""The gain over another, beside an interval of ± 0.005."""


def with_outcomes(sides: dict[str, str], protocol: str = "full") -> dict[str, Any]:
    """A report in which the model stands so to each of the others."""
    data = reports.night({})
    sign, metric = 1, "ndcg@10"
    if protocol == "rating":
        data["rating"] = {"mse": 0.75, "rmse": 0.75**0.5, "mae": 0.68}
        sign, metric = -1, "rmse"
    for name, side in sides.items():
        gain = SIDES[side]
        if "-" not in name:  # A model of another run has comparisons only.
            value = data[protocol][metric] - sign * gain
            data["baselines"][name] = {protocol: {metric: value}, "lists": {}}
        data["comparisons"].append(reports.comparison(name, protocol, metric, sign * gain, 0.005))
    return data


def named_in(title: str) -> tuple[list[str], list[str]]:
    """(whom the title says the model beats, whom it does not), in words."""

    def names(part: str) -> list[str]:
        return [name for name in re.split(r", | and | or ", part) if name]

    body = title.removeprefix("The model ")
    for start in ("does not beat ", "is not clearly better than ", "is worse than "):
        if body.startswith(start):
            return [], names(body.removeprefix(start))
    beaten, _, unbeaten = body.removeprefix("beats ").removesuffix(", but not in every metric").partition("; not ")
    return names(beaten), names(unbeaten)


@given(st.dictionaries(st.sampled_from(OTHERS), st.sampled_from(list(SIDES)), min_size=1),
       st.sampled_from(["full", "rating"]))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_verdict_names_each_of_the_others_once_and_on_its_side(sides: dict[str, str], protocol: str) -> None:
    html = render(with_outcomes(sides, protocol))
    title = re.search(r"<h1>(.*)</h1>", html)[1]  # type: ignore[index]
    beaten, unbeaten = named_in(title)
    wanted = {name: text.in_prose(name) for name in sides}
    assert sorted(beaten) == sorted(wanted[name] for name, side in sides.items() if side == "beaten")
    assert sorted(unbeaten) == sorted(wanted[name] for name, side in sides.items() if side != "beaten")
    words = {"beaten": "beaten", "level": "not clearly beaten", "ahead": "ahead of the model"}
    listed = re.findall(r'<li class="(\w+)"><b>([^<]+)</b>(?: [\d.]+)?, ([a-z ]+): <b>', html)
    if len(sides) > 1:
        assert sorted((name.lower(), side, word) for side, name, word in listed) == sorted(
            (wanted[name].lower(), side, words[side]) for name, side in sides.items()
        )


@pytest.mark.parametrize(
    ("sides", "title"),
    [
        ({"popularity": "beaten", "ease": "ahead", "als": "level"}, "The model beats popularity; not EASE or ALS"),
        ({"popularity": "beaten", "ease": "beaten"}, "The model beats popularity and EASE"),
        ({"popularity": "level", "ease": "ahead"}, "The model does not beat popularity or EASE"),
        ({"ease": "ahead", "als": "ahead"}, "The model is worse than EASE and ALS"),
    ],
)
def test_how_the_verdict_reads(sides: dict[str, str], title: str) -> None:
    assert f"<h1>{title}</h1>" in render(with_outcomes(sides))


def test_ratings_head_the_page_of_a_model_that_predicts_them() -> None:
    """Lower is better there; the ranking follows with a verdict of its own."""
    data = reports.night(explicit=True)
    found = Page(render(data)).text
    assert "The model beats the mean and biases; not ALS" in found
    assert "RMSE over the held-out ratings is 0.8667 (lower is better)" in found
    assert "In ranking the model beats popularity. NDCG@10 over the full catalogue is" in found
    assert found.index("RMSE over the") < found.index("NDCG@10 over the")


@given(st.floats(-1, 1), st.floats(0, 1), st.booleans())
def test_a_side_is_what_the_interval_leaves(difference: float, half: float, rating: bool) -> None:
    data = with_outcomes({"ease": "level"}, "rating" if rating else "full")
    data["comparisons"][-1] |= {"difference": difference, "interval": [difference - half, difference + half]}
    verdict: Verdict = verdicts({**OPTIONAL, **data}, {"full": {}, "rating": {}})[0]
    low, high = (-difference - half, -difference + half) if rating else (difference - half, difference + half)
    assert verdict.standings[0].side == ("beaten" if low > 0 else "ahead" if high < 0 else "level")


# ---- rows that say the same -----------------------------------------------------------------------------------------


def test_metrics_that_say_the_same_share_a_row() -> None:
    """One held-out item a user: Recall is HR; at K = 1 NDCG, MAP and Precision are, too. Nothing is lost."""
    data = reports.night(ks=(1, 10))
    for values in (data["full"], data["baselines"]["popularity"]["full"]):
        values |= dict.fromkeys(("ndcg@1", "hr@1", "recall@1", "precision@1", "map@1"), values["hr@1"])
    html = render(data)
    rows = re.findall(r'<th scope="row">([^<]+)((?: <small>= [^<]+</small>)+)</th>', html)
    folded = {name: re.findall("= ([^<]+)<", same) for name, same in rows}
    assert folded == {"NDCG@1": ["HR@1", "MAP@1", "Recall@1", "Precision@1"], "HR@10": ["Recall@10"]}
    values = Page(html).values
    assert all(float(values[f"model.full.{name}"][0]) == value for name, value in data["full"].items())


@pytest.mark.parametrize("change", [{"n_rows": 6041}, {"n_rows": None}, {"differs": True}])
def test_metrics_that_could_differ_keep_their_rows(change: dict[str, Any]) -> None:
    data = reports.night()
    if change.pop("differs", False):
        data["baselines"]["popularity"]["full"]["recall@10"] += 0.01
    else:
        data |= change
    assert "= Recall@10" not in render(data)


# ---- time ----------------------------------------------------------------------------------------------------------


@given(st.dictionaries(st.integers(-200_000, 200_000), st.integers(1, 10**6), min_size=1, max_size=40))
def test_periods_hold_every_interaction_in_order(by_day: dict[int, int]) -> None:
    """Years before and after 1970; only a log of more years than are shown loses the first ones."""
    found = by_period(by_day)
    names = [name for name, _ in found["counts"]]
    assert len(set(names)) == len(names) <= 200
    total = sum(count for _, count in found["counts"])
    years = (max(by_day) - min(by_day)) / 365
    assert total == sum(by_day.values()) if years < 190 else total <= sum(by_day.values())


@pytest.mark.parametrize(
    ("days", "unit", "first", "periods"),
    [(1, "day", "2000-01-01", 1), (3, "day", "2000-01-01", 3), (42, "week", "1999-12-27", 7),
     (365, "month", "2000-01", 12), (5 * 365, "month", "2000-01", 60), (20 * 365, "year", "2000", 20)],
)  # fmt: skip
def test_a_span_decides_the_unit(days: int, unit: str, first: str, periods: int) -> None:
    found = by_period({reports.FIRST_DAY + day: 2 for day in range(days)})
    assert (found["unit"], found["counts"][0][0], len(found["counts"])) == (unit, first, periods)


@given(st.integers(-(10**17), 10**17), st.sampled_from(UNITS))
def test_a_period_s_name_is_a_day_in_it(time: int, unit: str) -> None:
    code = int(period_codes(np.array([time]), unit)[0])
    name = np.datetime64(period_name(code, unit), "D").astype(np.int64)
    assert int(period_codes(np.array([name * DAY]), unit)[0]) == code


@given(st.integers(0, 10**16), st.integers(0, 10**16))
def test_the_unit_is_the_finest_that_holds_the_span(first: int, span: int) -> None:
    fits = [unit for unit in UNITS if span <= LONGEST.get(unit, math.inf)]
    assert unit_of(first, first + span) == fits[0]


@pytest.mark.parametrize("kind", ["three_days", "six_weeks", "one"])
def test_the_page_names_the_unit(kind: str) -> None:
    unit = {"three_days": "day", "six_weeks": "week", "one": "month"}[kind]
    found = Page(render(reports.kinds()[kind])).text
    for wanted in (f"By {unit} of the held-out item", f"Interactions by {unit}", f"Users in a {unit}: "):
        assert wanted in found
    assert ("A week is named by its Monday." in found) == (unit == "week")


# ---- any kind of night ----------------------------------------------------------------------------------------------


def running_text(html: str) -> str:
    """What a reader sees: tags of words are nothing, all others end a line."""
    html = re.sub(r"<(style|code|svg)\b.*?</\1>", "", html, flags=re.S)
    html = re.sub(r"</?(b|data|bdi|a|i)\b[^>]*>", "", html)
    return unescape(re.sub(r"<[^>]+>", "\n", html))


@pytest.mark.parametrize("kind", [*reports.KINDS, "empty", "implicit", "behind"])
def test_no_space_is_missing_and_none_is_too_many(kind: str) -> None:
    """Templates eat spaces around their tags: after a mark a word needs one, before a mark there is none."""
    data = implicit() if kind in ("implicit", "behind") else reports.kinds()[kind]
    if kind == "behind":
        data["comparisons"][0] |= {"interval": [-0.01, 0.21]}
        data["full"]["map@5"] = 0.0
    text = re.sub(r"\w+\.(dat|json)", "FILE", running_text(render(data)))
    text = re.sub(r"\d+(?:[.,]\d+)*", "1", text)
    assert re.findall(r"\S*[.,;:?!)%][A-Za-z]\S*", text) == []
    assert re.findall(r"\S*[a-z][A-Z]\S*|\S*[A-Za-z][+−]\d\S*", re.sub("kNN|MiB|KiB|GiB|nDCG", "", text)) == []
    assert re.findall(r"\w+[ \n]+[.,;:](?:\s|$)", text) == []
    assert re.findall(r"[.,;:]{2}", text.replace("…", "")) == []


@pytest.mark.parametrize("kind", [*reports.KINDS, "empty"])
def test_every_figure_names_its_axes_and_keeps_within_itself(kind: str) -> None:
    """Two axes of a line or column figure, one of a row of dots; no text is wider than a phone."""
    for figure in re.findall(r"<svg.*?</svg>", render(reports.kinds()[kind]), flags=re.S):
        axes = re.findall(r'class="axis">([^<]+)<', figure)
        assert len(axes) == (1 if "<circle" in figure else 2), figure[:200]
        for x, anchor, words in re.findall(r'<text x="([\d.-]+)"[^>]*text-anchor="(\w+)"[^>]*>([^<]*)<', figure):
            width = len(unescape(words)) * svg.CHARACTER
            left = float(x) - {"start": 0, "middle": width / 2, "end": width}[anchor]
            assert left >= -1
            assert left + width <= svg.WIDTH * 1.02, words


@pytest.mark.parametrize("kind", reports.KINDS)
def test_no_two_headings_read_the_same(kind: str) -> None:
    """A page with ratings and ranks compares the model with others twice, in two tables."""
    headings = re.findall(r"<h[1-3]>(.*?)</h[1-3]>", render(reports.kinds()[kind]))
    assert len(set(headings)) == len(headings)


@pytest.mark.parametrize(
    ("replicates", "read"), [(1000, "< 0.002"), (999, "≤ 0.002"), (200, "< 0.010"), (5000, "< 0.0004")]
)
def test_the_floor_of_the_bootstrap_is_named_as_a_bound(replicates: int, read: str) -> None:
    """p is never below 2 / (B + 1): what is printed must not say that it was found to be that."""
    data = reports.night()
    data["lineage"]["config"]["evaluate"]["bootstrap"] = replicates
    for row in data["comparisons"]:
        row["p"] = 2 / (replicates + 1)
    found = Page(render(data)).text
    assert f"p {read}" in found


@given(st.integers(20, 10**5), st.floats(0, 0.4))
def test_a_bound_on_p_holds(replicates: int, share: float) -> None:
    smaller = int(share * replicates)
    p = 2 * (smaller + 1) / (replicates + 1)
    read = text.p_text(p, 2 / (replicates + 1))
    bound = float(read.strip("<≤\xa0"))
    assert p <= bound + 1e-12 if read[0] in "<≤" else p == pytest.approx(bound, abs=0.000501)
    assert (read[0] in "<≤") == (smaller == 0 or p < 0.001)


def test_segments_show_how_many_users_they_have() -> None:
    data = reports.night()
    html = render(data)
    for row in (*data["segments"]["activity"], *data["segments"]["item_popularity"]):
        assert f">n {row['users']:,}<" in html


def test_a_user_who_rated_nothing_well_has_no_best_films() -> None:
    found = Page(render(reports.night())).text
    assert "User u0 Rated best Nothing rated well. Held out" in found


# ---- sections ------------------------------------------------------------------------------------------------------

SECTIONS = {
    "segments": "segments",
    "examples": "users",
    "training": "training",
    "profile": "data",
    "resources": "resources",
    "lineage": "lineage",
}


@pytest.mark.parametrize(("name", "section"), SECTIONS.items())
def test_a_section_is_there_where_its_data_is(page: Page, name: str, section: str) -> None:
    data = implicit()
    del data[name]
    found = Page(render(data))
    assert section in page.ids
    assert section not in found.ids
    assert ("a", "href", f"#{section}") in page.attributes
    assert ("a", "href", f"#{section}") not in found.attributes


def test_with_nothing_but_what_every_evaluation_has(page: Page) -> None:
    found = Page(render(explicit()))
    assert found.ids == {"metrics", "small-print"}
    assert found.values["model.rating.rmse"] == ("0.8667", "0.8667")
    assert {f"model.full.{name}" for name in explicit()["full"]} <= set(found.values)


@pytest.mark.parametrize("name", ["long_tail", "activity", "item_counts", "by_time", "quarantine_samples"])
def test_an_empty_part_of_the_profile_is_left_out(name: str) -> None:
    data = implicit()
    empty: dict[str, Any] = {"activity": {"edges": [], "users": []}, "item_counts": {"edges": [], "items": []}}
    data["profile"][name] = empty.get(name, [])
    assert len(render(data)) < len(render(implicit()))


def test_one_epoch_and_one_month_and_no_curve_can_be_drawn() -> None:
    data = implicit()
    data["training"] = {"epochs": data["training"]["epochs"][:1], "curve": [], "best_epoch": 0}
    data["segments"]["month"] = data["segments"]["month"][:1]
    data["profile"]["by_time"] = {"unit": "month", "counts": [["1999-12", 3]]}
    assert "nan" not in render(data)


def test_a_metric_that_is_not_defined_is_a_dash() -> None:
    data = implicit()
    data["candidates"]["auc"] = math.nan
    assert Page(render(data)).values["model.candidates.auc"][1] == "–"


# ---- nothing from outside, nothing that runs -----------------------------------------------------------------------


def with_evil_text(value: Any) -> Any:
    """Every string that comes from a log or a config, in titles, ids, file names, rows, reasons and names."""
    if isinstance(value, dict):
        return {k: with_evil_text(v) for k, v in value.items()}
    if isinstance(value, list):
        return [with_evil_text(v) for v in value]
    return f"{EVIL}{value}" if isinstance(value, str) else value


@pytest.mark.parametrize("name", ["examples", "profile", "segments", "lineage", "model_version", "resources"])
def test_text_from_a_log_stays_text(name: str) -> None:
    data = implicit()
    data[name] = with_evil_text(data[name])
    html = render(data)
    found = Page(html)
    assert found.tags == Page(render(implicit())).tags
    assert "script" not in found.tags
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert "\x00" not in html
    assert "\u202e" not in html
    assert "<script>alert(1)</script>\\x00" in found.text


def test_reasons_and_baselines_are_keys_and_stay_text() -> None:
    data = implicit()
    data["profile"]["rows"]["quarantined"] = {EVIL: 3}
    data["baselines"][EVIL] = copy.deepcopy(data["baselines"]["popularity"])
    data["comparisons"].append({**data["comparisons"][0], "with": EVIL})
    assert "script" not in Page(render(data)).tags


def test_a_user_s_item_without_a_title_shows_its_id() -> None:
    data = implicit()
    for row in data["examples"][0]["recommended"]:
        row |= {"title": None, "item_id": f"sku-{row['rank']}"}
    assert "sku-8" in Page(render(data)).text


@pytest.mark.parametrize("data", [implicit(), explicit()])
def test_the_page_is_one_file(data: dict[str, Any]) -> None:
    html = render(data)
    found = Page(html)
    assert not found.tags & {
        "script",
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "form",
        "use",
        "image",
        "foreignobject",
    }
    links = [value for _, name, value in found.attributes if name in ("href", "src", "xlink:href", "action")]
    assert {str(link)[0] for link in links} == {"#"}
    assert {str(link)[1:] for link in links} <= {str(i) for i in found.ids}
    assert "http" not in html.replace("http-equiv", "")
    assert "url(" not in html
    assert "@import" not in html
    assert len(html.encode()) < 600_000


def test_every_drawing_says_what_it_shows(page: Page) -> None:
    drawings = [value for tag, name, value in page.attributes if tag == "svg" and name == "aria-label"]
    assert len(drawings) == sum(tag == "svg" and name == "role" for tag, name, _ in page.attributes) >= 10
    assert all(drawings)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    data = implicit()
    path = write_report(str(tmp_path), data)
    assert path == f"{tmp_path}/report.html"
    assert Path(path).read_bytes() == render(json.loads(json.dumps(data))).encode()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


# ---- drawings and text ---------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.integers(2, 6))
@example(1.0, 400_401.0, 2)  # Twice 200,000 is not far enough, and a step of 500,000 is wider than the figure.
def test_ticks_are_within_and_evenly_spaced(low: float, width: float, about: int) -> None:
    high = low + width
    found = svg.ticks(low, high, about)
    slack = 1e-6 * max(1.0, abs(low), abs(high))
    assert 1 <= len(found) <= about + 1
    assert low - slack <= found[0] <= found[-1] <= high + slack
    assert np.allclose(np.diff(found), (found[-1] - found[0]) / max(1, len(found) - 1), atol=slack)


@pytest.mark.parametrize(
    ("function", "value", "wanted"),
    [
        (text.metric_text, -0.00123, "−0.0012"),
        (text.metric_text, None, "–"),
        (text.signed_text, 0.5, "+0.5000"),
        (text.p_text, 0.0004, "<\xa00.001"),
        (text.interval_text, [-0.1, 0.2], "−0.1000 to 0.2000"),
        (text.percent_text, 0.0527, "5.3 %"),
        (text.percent_text, 0.44, "44 %"),
        (text.seconds_text, 75.2, "1 min 15 s"),
        (text.seconds_text, 59.97, "1 min 0 s"),
        (text.bytes_text, 1023, "1,023 B"),
        (text.bytes_text, 5 * 2**30, "5 GiB"),
        (text.compact, 1_234_567, "1.23M"),
        (text.compact, -0.02, "−0.02"),
        (text.called, "hr@10", "HR@10"),
        (text.called, "fresh@3", "fresh@3"),
        (text.visible, "a\u202eb\x07 c\u200cd", "a\\u202eb\\x07 c\u200cd"),
    ],
)
def test_how_figures_are_written(function: Any, value: Any, wanted: str) -> None:
    assert function(value) == wanted


def test_the_curve_keeps_its_ends_when_thinned() -> None:
    assert thinned(list(range(1000)), 3) == [0, 500, 999]
    assert thinned([1, 2], 3) == [1, 2]


def test_the_long_tail_by_hand() -> None:
    """Ten items that anybody touched, 100 interactions: the top 10 % is the one with 55; 1 % is rounded up to it."""
    shares: dict[float, float] = dict(long_tail(np.array([0, 5, 55, 5, 5, 5, 5, 5, 5, 5, 5])))  # type: ignore[arg-type]
    assert (shares[1], shares[10], shares[20], shares[100]) == (0.55, 0.55, 0.60, 1.0)
    assert long_tail(np.zeros(3, dtype=np.int64)) == []


def test_bins_of_counts_by_hand() -> None:
    """Bins of 1, 2–4, 5–9 and so on; what is below 1 is in none."""
    assert binned([7, 0, 1, 4, 2, -1, 30], [10, 99, 1, 2, 4, 99, 3]) == ([1, 2, 5, 10, 20, 50], [1, 6, 10, 0, 3])
    assert binned([0], [5]) == binned([], []) == ([], [])


def test_what_counts_as_liking() -> None:
    """The middle of the scale, or the mean where that is lower: stars of 1 to 5, then plays with a long tail."""
    assert well_rated(Counted({}, (1.0, 5.0, 3.6))) == 3.0
    assert well_rated(Counted({}, (1.0, 900.0, 2.34567))) == 2.346
    assert well_rated(Counted({}, (1.0, 1.0, 1.0))) == 1.0
    assert well_rated(Counted({}, None)) == 0.0


# ---- a night -------------------------------------------------------------------------------------------------------

USERS, ITEMS = 30, 12
SECONDS_A_MONTH = 31 * 24 * 3600


def bad_row(number: int) -> dict[str, Any]:
    return {"file": "a", "place": number, "reason": "late" if number < 20 else EVIL, "raw": f"{EVIL}{number}"}


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> tuple[Manifest, Manifest]:
    """Hand-made runs of prepare and train. User u has items 0 … u mod 3 in train, rated 1 + item, then item 5 held out,
    all in January and February 1970."""
    root = tmp_path_factory.mktemp("night")
    rows = [
        {"user_idx": u, "item_idx": i, "rating": 1.0 + i, "timestamp": (1 + i * SECONDS_A_MONTH) * 10**6, "split": 0}
        for u in range(USERS)
        for i in range(u % 3 + 1)
    ]
    rows += [{"user_idx": u, "item_idx": 5, "rating": 9.0, "timestamp": 10**6, "split": 2} for u in range(USERS)]
    seen = [{"user_idx": u, "item_idx": list(range(u % 3 + 1)), "test_item_idx": [5]} for u in range(USERS)]
    counts = np.bincount([row["item_idx"] for row in rows if row["split"] == 0], minlength=ITEMS)
    tables: dict[Contract, list[dict[str, Any]]] = {
        INTERACTIONS: rows,
        HISTORY: seen,
        ITEM_STATS: [{"item_idx": i, "train_count": int(c)} for i, c in enumerate(counts)],
        QUARANTINE: [bad_row(n) for n in range(25)],
        user_index(pa.int64()): [{"user_idx": u, "user_id": 1000 + u} for u in range(USERS)],
        item_index(pa.string()): [{"item_idx": i, "item_id": f"sku-{i}"} for i in range(ITEMS)],
        items(pa.string()): [{"item_idx": i, "item_id": f"sku-{i}", "title": f"{EVIL}{i}"} for i in range(ITEMS - 1)],
    }
    stored = {}
    for contract, body in tables.items():
        columns = [{n: row[n] for n in contract.schema.names} for row in body]
        table, half = pa.Table.from_pylist(columns, schema=contract.schema), len(columns) // 2
        stored[contract.name] = write_parts([table.slice(0, half), table.slice(half)], str(root), contract)
    found = {"input": 175, "accepted": 90, "duplicates": 60, "quarantined": {"late": 20, EVIL: 5}}
    config = {
        "input": {"format": "csv", "columns": {"rating": "stars"}, "path": ["a", "b"], "items": {"path": "titles"}},
        "seed": 3,
    }
    prepare = Manifest(
        stage="prepare", ds="2026-01-31", run_key="p1", root=str(root), config=config,
        inputs={"interactions": "f1", "items": "f2", "index": None}, tables=stored,
        facts={"rows": found, "active_users": USERS, "users": USERS, "items": ITEMS}, metrics={}, seconds=50.0,
    )  # fmt: skip
    history = {"epochs": [{"epoch": 0, "loss": 0.5, "ndcg@10": 0.1}], "curve": [[0, 0, 0.6, 0.1]], "epoch": 0}
    (root / "history.json").write_text(json.dumps(history))
    train = Manifest(
        stage="train",
        ds="2026-01-31",
        run_key="t1",
        root=str(root),
        config={},
        inputs={"prepare": "p1"},
        tables={},
        facts={"sha256": "abc"},
        metrics={},
        seconds=9.0,
    )
    return prepare, train


def test_the_profile_of_a_night(spark: SparkSession, night: tuple[Manifest, Manifest]) -> None:
    counted = Counted.of(read_table(spark, night[0], INTERACTIONS))
    # 30 rows of 1, 20 of 2 and 10 of 3; those held out, of 9, are left out.
    assert counted.rated is not None
    assert np.allclose(counted.rated, (1.0, 3.0, 100 / 60))
    found = profile(spark, night[0], counted)
    # 10 users each have 1, 2 and 3 items before the one held out: 60 train rows and 30 held out.
    assert (found["users"], found["items"], found["interactions"]) == (USERS, 3, 90)
    assert found["density"] == 90 / (USERS * 3)
    assert found["activity"] == {"edges": [2, 5], "users": [30]}  # 2, 3 or 4 interactions
    assert found["item_counts"] == {"edges": [10, 20, 50], "items": [1, 2]}  # 30, 20 and 10 rows
    # 1 January, 1 February and 4 March 1970, 62 days apart: weeks, from the Mondays before.
    weeks = dict(found["by_time"]["counts"])
    assert found["by_time"]["unit"] == "week"
    assert {name: n for name, n in weeks.items() if n} == {"1969-12-29": 60, "1970-01-26": 20, "1970-03-02": 10}
    assert len(weeks) == 10
    samples = found["quarantine_samples"]
    assert len(samples) == 10
    assert [row["reason"] for row in samples[:4]] == [EVIL, "late"] * 2
    assert {row["place"] for row in samples} == {*range(5), *range(20, 25)}


def ranked_users(spark: SparkSession) -> DataFrame:
    """User u's held-out item 5 has rank u + 1."""
    return spark.createDataFrame(
        [(u, [5], [u + 1], [5, 11, 4]) for u in range(USERS)],
        "user_idx int, item_idx array<int>, full_rank array<int>, top array<int>",
    )


def test_example_users_are_drawn_by_the_seed(spark: SparkSession) -> None:
    ranks = ranked_users(spark)
    found = offers(ranks, 3, 2)
    first = list(found)
    assert len(first) == 10
    assert all(offer == Offer((5, 11), {5: user + 1}) for user, offer in found.items())
    assert first == list(offers(ranks.repartition(7), 3, 2))
    assert first[:4] == list(offers(ranks, 3, 2, 4))
    assert first != list(offers(ranks, 4, 2))
    assert sorted(offers(ranks, 3, 2, 99)) == list(range(USERS))


def test_a_night_on_a_page(spark: SparkSession, night: tuple[Manifest, Manifest]) -> None:
    """From the tables to the page: what each user liked best first, what was held out with its rank, what they get."""
    prepare, train = night
    counted = Counted.of(read_table(spark, prepare, INTERACTIONS))
    shown = examples(spark, prepare, ranked_users(spark), counted, seed=3, k=2)
    for user in shown:
        index = user["user_id"] - 1000
        # Rated 1 to 3 in all, 1.67 in the mean: what was rated 1 is not liked.
        assert [row["rating"] for row in user["liked"]] == [1.0 + i for i in reversed(range(1, index % 3 + 1))]
        assert user["held_out"] == [{"item_id": "sku-5", "title": f"{EVIL}5", "rank": index + 1}]
        assert [(row["rank"], row["item_id"], row["title"]) for row in user["recommended"]] == [
            (1, "sku-5", f"{EVIL}5"),
            (2, "sku-11", None),  # Not in the side table.
        ]
    metrics = {name: value for name, value in implicit().items() if name in REQUIRED}
    data = report_data(
        spark, prepare, train, metrics, counted, run_key="e1", config={"evaluate": {"ks": [5, 10]}}, seconds=2.0,
        examples=shown,
    )  # fmt: skip
    assert set(data) == {*REQUIRED, "examples", "profile", "training", "resources", "lineage"}
    assert data["lineage"]["inputs"] == [
        {"name": "interactions", "path": "a, b", "fingerprint": "f1"},
        {"name": "items", "path": "titles", "fingerprint": "f2"},
    ]
    assert [(row["stage"], row["seconds"]) for row in data["resources"]] == [
        ("prepare", 50.0),
        ("train", 9.0),
        ("evaluate", 2.0),
    ]
    assert data["resources"][0]["facts"]["rows/s"] == 175 / 50
    assert json.loads(json.dumps(data)) == data
    found = Page(render(data))
    assert "script" not in found.tags
    assert "sku-11" in found.text
    assert "Ten users" in found.text
