"""A MovieLens-shaped log with a planted answer: taste clusters under a popularity long tail.

All choices are made by `sampling.hash64_column(seed, SYNTHETIC, choice, …)`:

- Item slot s (0-based) is in cluster `s mod C` with rank `s div C`; a fixed permutation turns slots into
  1-based ids.
- A user has one taste cluster, and half of the users a second one. A draw is global noise with probability
  NOISE, else from a taste cluster (the first with probability FIRST_TASTE). Noise picks its cluster as the
  users pick theirs, so it follows popularity.
- Within a cluster of n items the rank is Zipf-Mandelbrot with exponent 1: density 1 / (rank + HEAD), by its
  inverse `HEAD (((n + HEAD) / HEAD)^u - 1)` for u in (0, 1) (Mandelbrot 1953), so no join with the items is
  needed.
- A user rates `5 + (mean - 5) 2 (u^(-1/3) - 1)` items: a Pareto tail (exponent 3) with that mean, cut at 60
  % of the catalogue. Three times as many are drawn and repeats dropped, so no (user, item) pair comes
  twice; heavy users of small catalogues end below their number, and the mean comes out some percent lower
  (56 for 60 by default).
- Ratings 1 to 5 are higher in the taste clusters. A user's times increase strictly and end before 2024.

Cost is linear in the ratings: each user's draws are one array, and nothing is shuffled but for writing.
`pow` is Java's StrictMath in Spark, the same on every machine. Clusters show as genres, so a person sees
whether a user gets what they like; genre names are unlike for up to 18 clusters, pairs of them for up to
324.
"""

from __future__ import annotations

import math
from enum import IntEnum

from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F

from ncf_dist import config as settings
from ncf_dist.fetch.titles import genres, title
from ncf_dist.sampling import Purpose, hash64_column

NOISE = 0.35
FIRST_TASTE = 0.7
SECOND_TASTE_SHARE = 0.5
CLUSTER_SKEW = 1.2
HEAD = 2.0
EXTRA_DRAWS = 3
MIN_RATINGS = 5
BEGIN, LAST_START, END = 1_609_459_200, 1_688_169_600, 1_704_067_200
"""2021-01-01, 2023-07-01, 2024-01-01 (UTC): a user starts in [BEGIN, LAST_START) and is done before END."""


class Choice(IntEnum):
    """Keeps the choices apart. Values are part of the data: never renumber."""

    ACTIVITY = 1
    FIRST_TASTE = 2
    SECOND_TASTE = 3
    HAS_SECOND = 4
    SOURCE = 5
    CLUSTER = 6
    RANK = 7
    ORDER = 8
    RATING = 9
    START = 10
    TIME = 11
    YEAR = 12
    GENDER = 13
    AGE = 14
    OCCUPATION = 15
    ZIP = 16


def ratings(users: DataFrame, fetch: settings.Fetch, seed: int) -> DataFrame:
    """Columns user, item, rating, timestamp (all bigint) for the `id`s (0-based) of `users`."""
    user = F.col("id")
    tastes = users.select(
        user,
        _count(fetch, seed, user).alias("count"),
        _cluster(fetch, _uniform(seed, Choice.FIRST_TASTE, user)).alias("first"),
        F.when(
            _uniform(seed, Choice.HAS_SECOND, user) < SECOND_TASTE_SHARE,
            _cluster(fetch, _uniform(seed, Choice.SECOND_TASTE, user)),
        )
        .otherwise(_cluster(fetch, _uniform(seed, Choice.FIRST_TASTE, user)))
        .alias("second"),
        (F.lit(BEGIN) + _below(LAST_START - BEGIN, seed, Choice.START, user)).alias("start"),
    )
    draws = F.sequence(F.lit(1).cast("bigint"), F.col("count") * EXTRA_DRAWS)
    clusters = F.transform(draws, lambda draw: _drawn_cluster(fetch, seed, draw))
    slots = F.transform(clusters, lambda cluster, position: _drawn_slot(fetch, seed, cluster, position + 1))
    chosen = F.slice(F.array_distinct(slots), 1, F.col("count").cast("int"))
    keyed = F.transform(
        chosen,
        lambda slot: F.struct(hash64_column(*_key(seed, Choice.ORDER), user, slot).alias("order"), slot.alias("slot")),
    )
    in_order = tastes.select("id", "first", "second", "start", F.array_sort(keyed).alias("slots"))
    rows = in_order.select(
        "id",
        "first",
        "second",
        "start",
        F.size("slots").cast("bigint").alias("n"),
        F.posexplode("slots").alias("position", "entry"),
    )
    slot = F.col("entry.slot")
    gap = F.floor((F.lit(END) - F.col("start")) / F.col("n"))
    time = F.col("start") + F.col("position") * gap + F.pmod(hash64_column(*_key(seed, Choice.TIME), user, slot), gap)
    return rows.select(
        (user + 1).alias("user"),
        item_id(fetch.items, slot).alias("item"),
        _rating(fetch, seed, slot).alias("rating"),
        time.alias("timestamp"),
    )


def movies(slots: DataFrame, fetch: settings.Fetch, seed: int) -> DataFrame:
    """Columns item (bigint), title (with its year), genres (joined by `|`) for the slots `id` of `slots`."""
    slot = F.col("id")
    cluster, rank = F.pmod(slot, F.lit(fetch.clusters)), F.floor(slot / fetch.clusters)
    year = F.lit(1950) + _below(74, seed, Choice.YEAR, slot)
    return slots.select(
        item_id(fetch.items, slot).alias("item"),
        F.concat(title(cluster, rank), F.lit(" ("), year.cast("string"), F.lit(")")).alias("title"),
        genres(cluster).alias("genres"),
    )


def users(ids: DataFrame, seed: int) -> DataFrame:
    """Columns user, gender, age, occupation, zip, in MovieLens' codes, for the `id`s (0-based) of `ids`."""
    user = F.col("id")
    ages = F.array(*[F.lit(age) for age in (1, 18, 25, 35, 45, 50, 56)])
    return ids.select(
        (user + 1).alias("user"),
        F.when(_uniform(seed, Choice.GENDER, user) < 0.5, "F").otherwise("M").alias("gender"),
        F.element_at(ages, (_below(7, seed, Choice.AGE, user) + 1).cast("int")).alias("age"),
        _below(21, seed, Choice.OCCUPATION, user).alias("occupation"),
        F.lpad(_below(100_000, seed, Choice.ZIP, user).cast("string"), 5, "0").alias("zip"),
    )


def item_id(n_items: int, slot: Column) -> Column:
    """1-based item id of a slot: a permutation, so that ids tell neither cluster nor popularity."""
    step = max(1, round(n_items * 0.6180339887498949))
    while math.gcd(step, n_items) != 1:
        step += 1
    return (
        F.pmod(
            slot * F.lit(step).cast("bigint") + F.lit(n_items // 3).cast("bigint"),
            F.lit(n_items).cast("bigint"),
        )
        + 1
    )


def _count(fetch: settings.Fetch, seed: int, user: Column) -> Column:
    """How many items a user rates."""
    excess = 2.0 * (F.pow(_uniform(seed, Choice.ACTIVITY, user), F.lit(-1.0 / 3.0)) - 1.0)
    wanted = F.floor(F.lit(MIN_RATINGS + 0.5) + excess * float(fetch.mean_ratings_per_user - MIN_RATINGS))
    return F.least(wanted, F.lit(fetch.most_ratings_per_user).cast("bigint"))


def _drawn_cluster(fetch: settings.Fetch, seed: int, draw: Column) -> Column:
    """The cluster of draw number `draw` of user `id`, whose own clusters are in `first` and `second`."""
    source = _uniform(seed, Choice.SOURCE, F.col("id"), draw)
    return (
        F.when(source < NOISE, _cluster(fetch, _uniform(seed, Choice.CLUSTER, F.col("id"), draw)))
        .when(source < NOISE + (1.0 - NOISE) * FIRST_TASTE, F.col("first"))
        .otherwise(F.col("second"))
    )


def _drawn_slot(fetch: settings.Fetch, seed: int, cluster: Column, draw: Column) -> Column:
    """The item slot of that draw: Zipf-Mandelbrot within its cluster."""
    last = F.floor((F.lit(fetch.items - 1).cast("bigint") - cluster) / fetch.clusters)
    spread = F.pow((last + (1.0 + HEAD)) / HEAD, _uniform(seed, Choice.RANK, F.col("id"), draw))
    rank = F.least(F.floor((spread - 1.0) * HEAD), last)
    return rank * F.lit(fetch.clusters).cast("bigint") + cluster


def _cluster(fetch: settings.Fetch, uniform: Column) -> Column:
    """A cluster in 0..C-1; lower ones are somewhat more popular."""
    return F.least(
        F.floor(F.pow(uniform, F.lit(CLUSTER_SKEW)) * float(fetch.clusters)),
        F.lit(fetch.clusters - 1).cast("bigint"),
    )


def _rating(fetch: settings.Fetch, seed: int, slot: Column) -> Column:
    """1 to 5: about 4.1 on average in the user's clusters, about 2.8 elsewhere."""
    cluster = F.pmod(slot, F.lit(fetch.clusters).cast("bigint"))
    liked = (cluster == F.col("first")) | (cluster == F.col("second"))
    bend = F.when(liked, 0.4).otherwise(1.2)
    return F.floor(F.pow(_uniform(seed, Choice.RATING, F.col("id"), slot), bend) * 5.0) + 1


def _key(seed: int, choice: Choice) -> tuple[int, int, int]:
    return seed, int(Purpose.SYNTHETIC), int(choice)


def _uniform(seed: int, choice: Choice, *parts: Column) -> Column:
    """A double in (0, 1), exact: the middle of one of 2^52 equal cells."""
    return (F.shiftrightunsigned(hash64_column(*_key(seed, choice), *parts), 12) + F.lit(0.5)) / F.lit(float(2**52))


def _below(bound: int, seed: int, choice: Choice, *parts: Column) -> Column:
    """An integer in 0..bound-1 (bigint)."""
    return F.pmod(hash64_column(*_key(seed, choice), *parts), F.lit(bound).cast("bigint"))
