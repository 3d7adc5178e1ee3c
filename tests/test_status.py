"""The job status: what a person reads of the last nights is what happened in them."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from ncf_dist import attempts, cli
from ncf_dist.attempts import Record, Stage
from ncf_dist.lake import Lake
from ncf_dist.rollback.pipeline import rollback
from ncf_dist.status.nights import Night as Shown
from ncf_dist.status.nights import last_nights
from ncf_dist.status.page import page
from ncf_dist.status.table import text_table
from tests.published import Night, good


def tried(lake: Lake, ds: str, number: int = 0, **fields: Any) -> None:
    """A record of an attempt."""
    name = f"{ds.replace('-', '')}T01020{number}-1"
    known = {"attempt": name, "job": "nightly", "ds": ds, "began": f"{ds}T01:02:03+00:00", "code": attempts.code()}
    attempts._write(lake, Record(**{**known, "outcome": "done", "seconds": 100.0, **fields}))


def stages(**rows: int) -> dict[str, Stage]:
    return {"prepare": Stage(status="done", rows=rows, bytes={"interactions": 1000, "train": 24})}


def scored(value: float, popularity: float = 0.1) -> dict[str, float]:
    return {"full.ndcg@5": 0.9, "full.ndcg@10": value, "popularity.full.ndcg@10": popularity}


@pytest.fixture
def week(tmp_path: Path) -> Night:
    """Seven nights: good, refused, good after a crash, lost, rolled back, an experiment, tonight's input is bad."""
    for number, ds in ((1, "2026-01-01"), (3, "2026-01-03"), (5, "2026-01-05")):
        night = Night(tmp_path, ds)
        night.prepare()
        night.score(good(f"m{number}"), model_version=f"m{number}")
        night.publish()
    rollback(night.config, "2026-01-05")
    lake = night.lake
    tried(lake, "2026-01-01", metrics=scored(0.2), stages=stages(interactions=98, quarantine=2), table_version=0)
    refused = {"churn": {"value": 0.9, "bound": 0.5, "outcome": "refused"}, "age": {"value": 1, "outcome": "passed"}}
    of_publish = {**stages(interactions=50), "publish": Stage(status="refused")}
    tried(lake, "2026-01-02", outcome="refused", exit_code=4, metrics=scored(0.15), gates=refused, stages=of_publish,
          error="ds 2026-01-02 is not published: churn …")  # fmt: skip
    tried(lake, "2026-01-03", 1, outcome="failed", error="no room", stages={"train": Stage(status="failed")})
    tried(lake, "2026-01-03", 2, metrics=scored(0.25), warnings=["age: …"])
    tried(lake, "2026-01-03", 3, outcome="already-done", seconds=8.0)
    tried(lake, "2026-01-04", outcome="lost", seconds=None, stages={"train": Stage()})
    tried(lake, "2026-01-05", 1, metrics=scored(0.3), run_key="s1")
    tried(lake, "2026-01-05", 2, job="rollback", seconds=1.0)
    tried(lake, "2026-01-06", run="trial", metrics=scored(0.9))
    compared = scored(0.22) | {"champion.full.ndcg@10": 0.23}
    tried(lake, "2026-01-07", outcome="failed", error="input log.csv <b>has</b>\n12 bad lines " + 20 * "and more ",
          metrics=compared, stages={"prepare": Stage(status="failed")})  # fmt: skip
    return night


def nights(week: Night, most: int = 30) -> dict[str, Shown]:
    return {night.ds[-2:]: night for night in last_nights(week.lake, "recommendations", most)}


def test_each_night_is_shown_with_what_became_of_it(week: Night) -> None:
    found = nights(week)
    assert list(found) == ["01", "02", "03", "04", "05", "07"], "an experiment is no night"
    first = found["01"]
    assert (first.outcome, first.published and first.published.version, first.rows) == ("done", 0, 8)
    assert (first.value, first.popularity, first.champion) == (0.2, 0.1, None)
    assert (first.interactions, first.quarantined, first.bytes) == (98, 0.02, 1024)
    refused = found["02"]
    assert (refused.outcome, refused.failed, refused.refused, refused.churn) == ("refused", "publish", ["churn"], 0.9)
    assert refused.published is None
    assert refused.champion == pytest.approx(0.15 - 0.2)
    assert not refused.paired
    again = found["03"]
    assert (again.outcome, again.failed, again.attempts, again.seconds) == ("already-done", None, 3, 208.0)
    assert again.champion == pytest.approx(0.25 - 0.2), "the night before was not published"
    assert (found["04"].outcome, found["04"].failed) == ("lost", "train")
    assert (found["05"].undone, found["05"].published) == (True, None)
    assert found["07"].champion == pytest.approx(0.22 - 0.23)
    assert found["07"].paired


def test_every_refusal_of_a_night_is_listed(tmp_path: Path) -> None:
    """Also those of attempts before the last one, and that of a model in whose place the champion ranked."""
    lake, ds = Lake(str(tmp_path)), "2026-01-01"

    def refused(*gates: str) -> dict[str, Any]:
        return {"gates": {gate: {"outcome": "refused"} for gate in gates}}

    tried(lake, ds, 1, outcome="refused", exit_code=4, error="volume: …", **refused("volume", "age"))
    tried(lake, ds, 2, outcome="refused", exit_code=4, error="churn: …", **refused("churn"))
    tried(lake, ds, 3, outcome="failed", exit_code=3, error="no room")
    [night] = last_nights(lake, "recommendations", 1)
    assert [(one.gates, one.error) for one in night.refusals] == [
        *((["age", "volume"], "volume: …"), (["churn"], "churn: …"))
    ]
    assert text_table([night]).splitlines()[-1].endswith("no room; earlier: age, volume, churn")
    tried(lake, ds, 4, **refused("champion"))
    [night] = last_nights(lake, "recommendations", 1)
    assert (night.outcome, night.refused, night.refusals[-1].error) == ("done", ["champion"], None)
    assert text_table([night]).splitlines()[-1].endswith("champion; earlier: age, volume, churn")


def test_a_night_names_the_model_that_ranked(tmp_path: Path) -> None:
    """Not one that was trained or judged by itself after it; before anybody is ranked, the one that will."""
    lake, ds = Lake(str(tmp_path)), "2026-01-01"
    ranked = {"train": Stage(status="done"), "score": Stage(status="done")}
    for number, (version, ran, shown) in enumerate(
        [("mf-1", {}, "mf-1"), ("mf-2", ranked, "mf-2"), ("mf-3", {}, "mf-2"), (None, ranked, "mf-2")]
    ):
        tried(lake, ds, number, model_version=version, stages=ran)
        assert [night.model_version for night in last_nights(lake, "recommendations", 1)] == [shown]


def test_the_table_tells_the_story_in_a_line_a_night(week: Night) -> None:
    lines = text_table(list(nights(week).values())).splitlines()
    assert [re.split(r"  +", line)[1] for line in lines] == [
        *("outcome", "done", "refused (publish)", "done", "lost (train)", "undone", "failed (prepare)")
    ]
    assert re.search(r"2026-01-02  refused \(publish\) +– +0\.1500 +\+0\.0500 +~−0\.0500 +– +50 .* churn$", lines[2])
    assert lines[6].endswith("…")
    assert "\n" not in lines[6]
    assert "NDCG@10" in lines[0]


def test_the_last_nights_are_shown_and_compared_with_the_one_before_them(week: Night) -> None:
    found = nights(week, 4)
    assert list(found) == ["03", "04", "05", "07"]
    assert nights(week, 5)["02"].champion == pytest.approx(0.15 - 0.2)


class _Page(html.parser.HTMLParser):
    """Every tag that is opened is closed, and what refers to something outside is kept."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_needs_nothing_beside_it_and_shows_trends(week: Night) -> None:
    text = page(list(nights(week).values()), "recommendations", "now")
    read = _Page(text)
    assert read.open == []
    assert read.outside == []
    assert "script" not in read.tags
    assert "url(" not in text
    assert "<b>has</b>" not in text, "what a log says is text"
    assert "&lt;b&gt;has" in text
    assert read.tags.count("svg") == 5, "metric, rows, interactions, time, bytes: what two nights or more have"
    assert text.index("2026-01-07") < text.index("2026-01-01")
    assert "Readers see 2 of them, the newest of 2026-01-03." in text


@pytest.mark.parametrize("count", [0, 1, 2, 60])
def test_any_number_of_nights_can_be_drawn(count: int) -> None:
    found = [
        Shown(f"2026-{1 + n // 28:02d}-{1 + n % 28:02d}", 1, "done", metric="full.ndcg@10", value=0.2, seconds=1.0 + n)
        for n in range(count)
    ]
    read = _Page(page(found, "t", "now"))
    assert read.open == []
    assert read.tags.count("svg") == (2 if count > 1 else 0)
    assert len(text_table(found).splitlines()) == 1 + count


def test_the_job_writes_the_page_and_prints_a_table_or_json(
    week: Night, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    tree = week.config.model_dump(mode="json")
    config.write_text(yaml.safe_dump({name: tree[name] for name in ("paths", "input")}))
    assert cli.main(["status", "--config", str(config)]) == 0
    out, err = capsys.readouterr()
    assert "2026-01-04  lost (train)" in err
    last = json.loads(out)
    assert (last["status"], last["metrics"]) == ("done", {"status.nights": 6, "status.published": 2})
    assert "2026-01-04" in Path(last["outputs"]["page"]).read_text()
    assert cli.main(["status", "--config", str(config), "--json", "--set", "status.nights=2"]) == 0
    shown, last_line = capsys.readouterr().out.splitlines()
    assert [night["ds"] for night in json.loads(shown)["nights"]] == ["2026-01-05", "2026-01-07"]
    assert json.loads(last_line)["job"] == "status"


def test_an_empty_lake_has_no_nights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(yaml.safe_dump({"paths": {"lake": str(tmp_path / "lake")}, "input": {"path": "x"}}))
    assert cli.main(["status", "--config", str(config)]) == 0
    assert "has no nights yet" in capsys.readouterr().err
