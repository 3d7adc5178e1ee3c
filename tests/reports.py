"""Made-up data of report.html for nights of many kinds. No Spark: the numbers are hashes of their names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from ncf_dist.contracts import DAY
from ncf_dist.evaluate.periods import period_codes, period_name, unit_of
from ncf_dist.evaluate.report.profile import by_period

REPLICATES = 1000
TITLES = {
    "plain": "Film {0} (19{0:02})",
    "long": "The exceedingly long and winding story of the traveller number {0} who, having set out in the spring, did "
    "not come home before the autumn (19{0:02})",
    "word": "Rindfleischetikettierungsüberwachungsaufgabenübertragungsgesetzgebungsverfahrensordnung{0}",
    "umlauts": "Die fabelhafte Welt der Ämter: Größe, Öl & Übermut {0} (19{0:02})",
    "right_to_left": "شجرة الليمون رقم {0}",
}
FIRST_DAY = 10_957
"""1 January 2000."""


def number(*name: object, low: float = 0.0, high: float = 1.0) -> float:
    digest = hashlib.sha256(repr(name).encode()).digest()
    return low + (high - low) * int.from_bytes(digest[:6], "big") / 2**48


def ranking(strength: float, ks: Sequence[int]) -> dict[str, float]:
    """Metrics of the whole catalogue with one held-out item a user."""
    found = {"mrr": strength * 0.8}
    for k in ks:
        hit = min(1.0, strength * (0.6 + k / 12))
        values = {"hr": hit, "recall": hit, "precision": hit / k, "ndcg": hit * 0.6, "map": hit * 0.5}
        found |= {f"{name}@{k}": value for name, value in values.items()}
    return found


def around(values: dict[str, float], half: float) -> dict[str, list[float]]:
    return {name: [value - half, value + half] for name, value in values.items()}


def comparison(
    other: str, protocol: str, metric: str, difference: float, half: float | None, p: float | None = None
) -> dict[str, Any]:
    interval = None if half is None else [difference - half, difference + half]
    if p is None and half is not None:
        p = 2 / (REPLICATES + 1) if abs(difference) > half else 0.3
    return {"with": other, "protocol": protocol, "metric": metric, "difference": difference, "interval": interval,
            "p": p}  # fmt: skip


def night(
    baselines: dict[str, float] | None = None,
    *,
    days: int = 5 * 365,
    segments: int = 6,
    titles: str = "plain",
    explicit: bool = False,
    ks: tuple[int, ...] = (5, 10, 20),
) -> dict[str, Any]:
    """A whole report. baselines: how strong each is, the model being 0.2; days: how long the log spans; explicit: the
    model predicts ratings, too, beside the mean, biases and ALS."""
    baselines = {"popularity": 0.1} if baselines is None else baselines
    full = ranking(0.2, ks)
    candidates = {
        "auc": 0.87,
        **{m: min(1.0, 2.2 * v) for m, v in full.items() if m[:2] in ("hr", "nd", "mr")},
    }
    data: dict[str, Any] = {
        "ds": "2026-01-31",
        "model_version": "neumf-0123456789ab",
        "feedback": "explicit" if explicit else "implicit",
        "ks": list(ks),
        "n_users": 6040,
        "n_rows": 6040,
        "full": full,
        "candidates": candidates,
        "lists": {f"{name}@10": number(name) for name in ("coverage", "novelty", "gini", "popularity_bias")},
        "intervals": {"full": around(full, 0.008), "candidates": around(candidates, 0.01)},
        "baselines": {},
        "comparisons": [],
        "scores": {
            "edges": [i / 4 for i in range(41)],
            "all": [round(1000 * np.exp(-((i - 10) ** 2) / 20)) for i in range(40)],
            "held_out": [round(100 * np.exp(-((i - 22) ** 2) / 40)) for i in range(40)],
            "first": [round(90 * np.exp(-((i - 30) ** 2) / 16)) for i in range(40)],
        },
        "segments": made_segments(segments, days),
        "examples": [made_user(n, titles) for n in range(10)],
        "profile": made_profile(days),
        "training": {
            "epochs": [{"epoch": e, "loss": 0.3 + 0.3 / (e + 1), "ndcg@10": 0.2 - 0.1 / (e + 1), "hr@10": 0.4}
                       for e in range(12)],
            "curve": [[e, s, 0.3 + 0.3 / (e + 1) + number(e, s, high=0.1), 1] for e in range(12) for s in range(20)],
            "best_epoch": 9,
        },
        "resources": [
            {"stage": "prepare", "seconds": 52.3, "facts": {"rows/s": 19124.0, "bytes stored": 31 * 2**20}},
            {"stage": "train", "seconds": 413, "facts": {"epochs": 12, "samples/s": 7.9e6, "waiting for data": 0.02}},
            {"stage": "evaluate", "seconds": 21, "facts": {"users/s": 290.0}},
        ],
        "peak_memory_bytes": 812 * 2**20,
        "lineage": {
            "inputs": [{"name": "interactions", "path": "lake/demo/raw/ratings.dat", "fingerprint": "f00d" * 8}],
            "index": None,
            "runs": {"prepare": "d81c403d8fd33af5", "train": "fb0e35a29d122191", "evaluate": "bc1a8238445cb988"},
            "weights_sha256": "0123abcd" * 8,
            "config": {"negatives": {"candidates": 99}, "evaluate": {"bootstrap": REPLICATES}},
            "versions": {"ncf_dist": "0.1.0", "torch": "2.13.0"},
            "seed": 1,
        },
    }  # fmt: skip
    if explicit:
        data |= {"rating": {"mse": 0.7512, "rmse": 0.7512**0.5, "mae": 0.6812}}
        data["intervals"]["rating"] = around(data["rating"], 0.007)
        for name, rmse in (("mean", 1.1257), ("biases", 0.9402), ("als", 0.8671)):
            add_baseline(data, name, "rating", {"mse": rmse**2, "rmse": rmse, "mae": 0.78 * rmse}, 0.009)
    for name, strength in baselines.items():
        add_baseline(data, name, "full", ranking(strength, ks), 0.008)
    return data


def add_baseline(data: dict[str, Any], name: str, protocol: str, values: dict[str, float], half: float) -> None:
    found = data["baselines"].setdefault(name, {"intervals": {}})
    found[protocol] = values
    found["intervals"][protocol] = around(values, half)
    if protocol == "full":
        found["candidates"] = {"auc": 0.7, **{m: 2 * v for m, v in values.items() if m[:2] in ("hr", "nd", "mr")}}
        found["lists"] = {metric: number(name, metric) for metric in data["lists"]}
    for metric, value in values.items():
        if metric.partition("@")[0] in ("hr", "ndcg", "recall", "mrr", "mse", "rmse", "mae"):
            data["comparisons"].append(comparison(name, protocol, metric, data[protocol][metric] - value, 0.005))


def made_segments(count: int, days: int) -> dict[str, Any]:
    def row(kind: str, n: int, name: str) -> dict[str, Any]:
        ndcg = number(kind, n, low=0.05, high=0.4)
        return {
            "name": name,
            "users": round(number("users", kind, n, low=1, high=9000)),
            "full": {"hr@10": ndcg * 1.7, "ndcg@10": ndcg},
            "popularity": {"hr@10": ndcg, "ndcg@10": number("theirs", kind, n, low=0.01, high=ndcg)},
            "intervals": {"ndcg@10": [ndcg * 0.9, ndcg * 1.1]},
        }

    unit = unit_of(FIRST_DAY * DAY, (FIRST_DAY + days - 1) * DAY)
    first, last = period_codes(np.array([FIRST_DAY, FIRST_DAY + days - 1]) * DAY, unit).tolist()
    decile = "decile {0}, items with 1,{0:03}–2,{0:03}"
    return {
        "activity": [row("a", n, f"{5 * 2**n}–{5 * 2 ** (n + 1) - 1} items") for n in range(count)],
        "item_popularity": [row("p", n, decile.format(n + 1)) for n in range(min(10, 2 * count))],
        unit: [row("t", code, period_name(code, unit)) for code in range(first, last + 1)],
    }


def made_user(n: int, titles: str) -> dict[str, Any]:
    def item(i: int, **more: Any) -> dict[str, Any]:
        return {"item_id": i, "title": TITLES[titles].format(i % 100), **more}

    return {
        "user_id": f"u{n}",
        "liked": [item(20 * n + i, rating=5 - i / 2) for i in range(5)] if n else [],
        "held_out": [item(20 * n + 7, rank=1042 * (n % 3) + 3)],
        "recommended": [item(20 * n + 4 + i, rank=i + 1) for i in range(10)],
    }


def made_profile(days: int) -> dict[str, Any]:
    by_day = {FIRST_DAY + day: round(number("day", day, low=50, high=900)) for day in range(days)}
    return {
        "users": 6040,
        "items": 3706,
        "interactions": 1000209,
        "density": 0.0447,
        "rows": {
            "input": 1000300,
            "accepted": 1000209,
            "duplicates": 31,
            "quarantined": {"needed 4 fields": 35, "user_id is null": 25},
        },
        "quarantine_samples": [
            {
                "reason": "needed 4 fields",
                "file": "a/path/of/a/log/part-00017.dat",
                "place": 17,
                "raw": "1::2",
            },
            {"reason": "user_id is null", "file": "a.dat", "place": 3, "raw": "::17::4::" + "9" * 200},
        ],
        "long_tail": [[1, 0.1], [5, 0.31], [10, 0.44], [20, 0.62], [50, 0.9], [100, 1.0]],
        "activity": {
            "edges": [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000],
            "users": [3, 9, 40, 800, 2100, 1900, 900, 200, 9],
        },
        "item_counts": {"edges": [1, 2, 5, 10, 20, 50, 100], "items": [120, 300, 420, 500, 800, 900]},
        "by_time": by_period(by_day),
    }


FOUR = {"popularity": 0.1, "ease": 0.21, "item_knn": 0.17, "als": 0.201}
KINDS: dict[str, dict[str, Any]] = {
    "one": {},
    "four": {"baselines": FOUR},
    "none": {"baselines": {}},
    "explicit": {"explicit": True},
    "explicit_four": {"explicit": True, "baselines": FOUR},
    "three_days": {"days": 3, "segments": 1},
    "six_weeks": {"days": 42, "segments": 2},
    "forty_years": {"days": 40 * 365, "segments": 9},
    "one_segment": {"segments": 1},
    "k_one": {"ks": (1, 10)},
    **{f"titles_{name}": {"titles": name} for name in TITLES},
}
"""Arguments of `night` by the kind of night."""
EMPTY = ("scores", "segments", "examples", "profile", "training", "resources", "lineage")


def kinds() -> dict[str, dict[str, Any]]:
    """The data of a report of each kind; `empty` has nothing but what every evaluation has."""
    found = {name: night(**arguments) for name, arguments in KINDS.items()}
    found["empty"] = {name: value for name, value in night({}).items() if name not in EMPTY}
    return found
