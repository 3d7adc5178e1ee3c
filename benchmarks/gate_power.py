"""How often the gate `champion` refuses a challenger, by how much worse it is: the power of a paired bootstrap over
simulated users, with evaluate's own sums and publish's own rule. Writes docs/gate_power.svg.

    .venv/bin/python -m benchmarks.gate_power

A user's metric is Beta(0.5, 2) for the champion, of mean 0.2. The challenger's is less by a share of 0.2, and differs
by normal noise, such that 5 % are 3.3 standard errors of the mean over 4,000 users. No file of data is read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from ncf_dist.champion import CHAMPION
from ncf_dist.charts import svg
from ncf_dist.config import Gates
from ncf_dist.evaluate import summary
from ncf_dist.evaluate.segments import PopularityDeciles
from ncf_dist.evaluate.spec import FiguresPass
from ncf_dist.evaluate.sums import totals
from ncf_dist.publish.gates import Evaluated, Figures
from ncf_dist.publish.model import judge
from ncf_dist.stored import typed

USERS, ERRORS, MEAN, STATED = 4_000, 3.3, 0.2, 0.05
SEEDS, REPLICATES = 200, 400
WORSE = (0.0, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.10)


def compared(seed: int, worse: float) -> Figures:
    """metrics.json, as far as the gate reads it, of a challenger that is worse by this share."""
    rng = np.random.default_rng(seed)
    theirs = rng.beta(0.5, 2.0, USERS)
    noise = STATED * MEAN * np.sqrt(USERS) / ERRORS
    mine = theirs - worse * MEAN + noise * rng.standard_normal(USERS)
    columns = {"model/full/ndcg@10": mine, f"{CHAMPION}/full/ndcg@10": theirs}
    columns |= {f"{name}/full/n": np.ones(USERS) for name in ("model", CHAMPION)}
    nobody = PopularityDeciles((0,), (0,), (1,))
    spec = FiguresPass((), (), nobody, (10,), 10, False, (), seed + 1, REPLICATES)
    sums = totals(columns, np.arange(USERS), spec)
    body = {"ks": [10], **summary.of_scorer(sums, "model"), "comparisons": summary.comparisons(sums, [CHAMPION])}
    return typed(Figures, json.loads(json.dumps(body)), more_keys=True)


def refusals(worse: float, seeds: int) -> int:
    """In how many of so many nights the challenger is refused."""
    return sum(bool(judge(Gates(), Evaluated("", compared(seed, worse)))) for seed in range(seeds))


def main() -> int:
    shares = [refusals(worse, SEEDS) / SEEDS for worse in WORSE]
    print(f"{USERS:,} users, {STATED:.0%} worse = {ERRORS} standard errors, {SEEDS} seeds\n\nworse   refused")
    for worse, share in zip(WORSE, shares, strict=True):
        print(f"{worse:5.0%}   {share:7.1%}")
    curve = svg.Series(
        "", [(100 * worse, 100 * share) for worse, share in zip(WORSE, shares, strict=True)], style="data"
    )
    figure = svg.plot(
        "how often a worse challenger is refused",
        [curve],
        ("% worse than the champion", "% of nights in which it is refused"),
        from_zero=True,
        mark=(100 * STATED, f"{ERRORS} standard errors"),
    )
    Path(__file__).parent.parent.joinpath("docs/gate_power.svg").write_bytes(svg.document([figure]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
