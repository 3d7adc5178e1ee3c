"""Ranks of a block of users, on an executor: one row a user and scorer of the table `ranks`.

Full catalogue: every held-out item is ranked among all items but those the user has in train and validation.
Candidates: each among its own 1 + N (the NCF protocol): how many beat it and how many tie with it.

A task holds the scorers, one block of users and one file's rows, and nothing of the size users x items. The model and
item_to_item take the memory that `scoring.ModelScorer` states, popularity 4 bytes an item, ALS 4 x rank, EASE and item
k-nearest-neighbours 4 bytes for each pair of items, which `evaluate.gram_bytes` bounds, and 4 for each item and user of
a block. A block takes 1 MiB of scores, some 15 MiB while they are counted, and at most 20 bytes for each of 8 x 256 x K
scores. Blocks are cut within a file, and a file is a function of the user, so no number depends on how Spark deals the
rows to tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ncf_dist.bundle import Bundle, load_model, load_parts
from ncf_dist.champion import CHAMPION
from ncf_dist.contracts import RANKS, VALIDATION_SPLIT
from ncf_dist.errors import ScoresNotFinite
from ncf_dist.evaluate.baselines import LATEST, item_factors, item_to_item, item_weights, recent_counts
from ncf_dist.evaluate.histogram import Histogram
from ncf_dist.evaluate.known import known_users, where_known
from ncf_dist.evaluate.lists import train_counts
from ncf_dist.evaluate.spec import ALS_USER, EvaluationPass
from ncf_dist.models import Users
from ncf_dist.models.latest import latest
from ncf_dist.recent import COLUMN, recent_rows
from ncf_dist.scoring import Lists, ModelScorer, PopularityScorer, Scores, by_item, rank, scores_of
from ncf_dist.scoring import blocks as kernel
from ncf_dist.spark_files import FileSink, runs_of
from ncf_dist.spark_io import Pass, stats_batch

Score = Callable[["Judged"], Scores]


@dataclass(frozen=True)
class Judged:
    """A block of U users with S held-out items and C candidates. held: item_idx by user; candidates: by held-out item;
    rating, timestamp: (S,). als: (U, D) factors or None. recent: rows of contracts.RECENT, or None."""

    users: Users
    seen: Lists
    held: Lists
    rating: pa.Array
    timestamp: pa.Array
    candidates: Lists
    als: Tensor | None
    recent: pa.Table | None = None

    def looking_back(self, length: int, n_items: int | None = None) -> Users:
        """The users with their `length` latest train and validation items, of those below `n_items`; 0: without."""
        if not length:
            return self.users
        assert self.recent is not None
        return replace(self.users, latest=latest(self.recent, VALIDATION_SPLIT, length, n_items))

    @classmethod
    def of(cls, table: pa.Table) -> Judged:
        """Rows (user_idx, seen list, held_out list of (item_idx, rating, timestamp, candidates)), and where they are
        there ALS factors and `recent`."""
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        held_out = columns["held_out"]
        items = held_out.flatten()
        sizes = held_out.value_lengths().to_numpy(zero_copy_only=False)
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        als = None
        if ALS_USER in columns:
            flat = columns[ALS_USER].flatten().to_numpy(zero_copy_only=False).astype(np.float32)
            als = torch.from_numpy(flat.reshape(table.num_rows, -1))
        return cls(
            Users(torch.from_numpy(columns["user_idx"].to_numpy().astype(np.int64))),
            Lists.of(columns["seen"]),
            Lists(items.field("item_idx").to_numpy().astype(np.int64), offsets),
            items.field("rating"),
            items.field("timestamp"),
            Lists.of(items.field("candidates")),
            als,
            recent_rows(columns[COLUMN]) if COLUMN in columns else None,
        )


def evaluation_pass(spec: EvaluationPass) -> Pass:
    """For mapInArrow: rows (_file, …) as `Judged.of` reads them, ascending in (_file, user_idx), in; one row `stats`
    (JSON: files written, histograms of the model's scores, first and last timestamp if any is set) a task out."""

    def run(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        torch.set_num_threads(1)
        sink = FileSink(spec.folder, RANKS.schema, rows_per_file=2**31)
        histograms = {"all": Histogram(), "held_out": Histogram(), "first": Histogram()}
        scorers: dict[str, Score] = {}
        times: list[int] = []
        unknown = 0
        for file, table in blocks(batches, kernel.USERS):
            scorers = scorers or make_scorers(spec)
            judged = Judged.of(table)
            known = judged.timestamp.to_numpy()[judged.timestamp.to_numpy() != 0]
            times = [*times, int(known.min()), int(known.max())] if len(known) else times
            unknown += int((~known_users(judged, spec.bundle)).sum()) if spec.earlier else 0
            rows = [
                rank_users(name, score, judged, spec.longest, histograms if name == "model" else None)
                for name, score in scorers.items()
            ]
            sink.add(file, pa.concat_tables(rows).sort_by([(column, "ascending") for column in RANKS.key]))
        stats = {
            "unknown_users": unknown,
            "times": [min(times), max(times)] if times else [],
            "files": [vars(info) for info in sink.close()],
            "scores": {name: histogram.as_json() for name, histogram in histograms.items()},
        }
        yield stats_batch(stats)

    return run


def blocks(batches: Iterable[pa.RecordBatch], size: int) -> Iterator[tuple[int, pa.Table]]:
    """(file, `size` rows of it; the last block of a file has what is left), however the rows were batched."""
    held: pa.Table | None = None
    held_file = -1
    for batch in batches:
        for file, start, end in runs_of(batch.column("_file").to_numpy()):
            part = pa.Table.from_batches([batch.slice(start, end - start)])
            if held is not None and file != held_file:
                yield from _cut(held_file, held, size)
                held = None
            held, held_file = part if held is None else pa.concat_tables([held, part]), file
            whole_blocks = held.num_rows // size * size
            yield from _cut(file, held.slice(0, whole_blocks), size)
            held = held.slice(whole_blocks)
    if held is not None:
        yield from _cut(held_file, held, size)


def _cut(file: int, table: pa.Table, size: int) -> Iterator[tuple[int, pa.Table]]:
    for start in range(0, table.num_rows, size):
        yield file, table.slice(start, size)


def make_scorers(spec: EvaluationPass) -> dict[str, Score]:
    """The model and the baselines by name."""
    bundle = spec.bundle
    model = ModelScorer(load_model(bundle), bundle.n_items, engine=spec.products.engine, parts=load_parts(bundle))
    own = model_scores(model, bundle.looks_back)
    if spec.earlier:
        popular = PopularityScorer(train_counts(spec.stats_files))
        own = where_known(own, partial(popularity_scores, popular), bundle, spec.n_items)
    scorers: dict[str, Score] = {"model": own}
    for name, files in spec.baselines:
        scorers[name] = BASELINES[name](spec, files)
    if spec.champion is not None:
        scorers[CHAMPION] = _champion(spec, spec.champion)
    return scorers


def _champion(spec: EvaluationPass, bundle: Bundle) -> Score:
    """The model of an earlier night, on tonight's users and items."""
    own = model_scores(ModelScorer(load_model(bundle), bundle.n_items, parts=load_parts(bundle)), bundle.looks_back)
    popular = PopularityScorer(train_counts(spec.stats_files))
    return where_known(own, partial(popularity_scores, popular), bundle, spec.n_items)


def model_scores(scorer: ModelScorer, looks_back: int = 0) -> Score:
    """looks_back: how many latest items of a user the scorer needs."""

    def scores(judged: Judged) -> Scores:
        users = judged.looking_back(looks_back, scorer.n_items)
        return Scores(scorer.n_items, partial(scorer.of, users), partial(scorer.blocks, users))

    return scores


def _popularity(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    scorer = PopularityScorer(train_counts(spec.stats_files))
    return lambda judged: popularity_scores(scorer, len(judged.users))


def popularity_scores(scorer: PopularityScorer, users: int) -> Scores:
    return by_item(scorer.n_items, lambda items: scorer.places[items].expand(users, -1))


def _recent_popularity(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    scorer = PopularityScorer(recent_counts(files, train_counts(spec.stats_files)))
    return lambda judged: popularity_scores(scorer, len(judged.users))


def _item_to_item(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    return model_scores(item_to_item(files[0], spec.n_items, spec.config), min(LATEST, spec.kept))


def _item_knn(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    scorer = item_weights(files[0])
    return lambda judged: at_once(scorer.scores(judged.seen))


def _ease(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    half_life = spec.config.ease_half_life
    if half_life is None:
        return _item_knn(spec, files)
    scorer = item_weights(files[0])

    def scores(judged: Judged) -> Scores:
        latest = judged.looking_back(spec.kept).latest
        assert latest is not None
        return at_once(scorer.by_age(latest, half_life))

    return scores


def at_once(every: Tensor) -> Scores:
    """(U, I), where the weights are (I, I) anyhow."""
    return by_item(every.shape[1], lambda items: every[:, items])


def _als(spec: EvaluationPass, files: tuple[str, ...]) -> Score:
    scorer = item_factors(files, spec.n_items)

    def scores(judged: Judged) -> Scores:
        assert judged.als is not None
        return by_item(spec.n_items, partial(scorer.of, judged.als))

    return scores


BASELINES: dict[str, Callable[[EvaluationPass, tuple[str, ...]], Score]] = {
    "popularity": _popularity,
    "recent_popularity": _recent_popularity,
    "item_to_item": _item_to_item,
    "ease": _ease,
    "item_knn": _item_knn,
    "als": _als,
}


def rank_users(
    name: str, score: Score, judged: Judged, longest: int, histograms: dict[str, Histogram] | None = None
) -> pa.Table:
    """Rows of `ranks` of one block and one scorer. histograms: what counts the scores of unseen items (`all`), of
    held-out ones and of those ranked first. Raises ValueError for scores that are not finite."""
    scores, held, among = score(judged), judged.held, judged.candidates
    own = scores_of(scores, held)
    if not np.isfinite(own[held.values < (scores.n_known or scores.n_items)]).all():
        # No score is greater than NaN: such a model would rank every held-out item first.
        raise ScoresNotFinite(
            f"{name} gives held-out items scores that are not finite; needed finite ones: train again"
        )
    count = histograms["all"].add if histograms is not None else lambda block: None
    ranked = rank(scores, judged.seen, held, own, (held.row[among.row], among.values), longest, count)
    greater = np.bincount(among.row, weights=ranked.candidates > own[among.row], minlength=len(own))
    equal = np.bincount(among.row, weights=ranked.candidates == own[among.row], minlength=len(own))
    offered = torch.isfinite(ranked.values)
    if histograms is not None:
        histograms["held_out"].add(own)
        histograms["first"].add(ranked.values[:, 0].numpy())

    def lists(values: np.ndarray | pa.Array) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(held.offsets, pa.int32()), pa.array(values))

    lengths = np.concatenate([[0], np.cumsum(offered.sum(1).numpy())])
    columns = {
        "user_idx": pa.array(judged.users.index.numpy()),
        "scorer": pa.array([name] * len(judged.users)),
        "seen_items": pa.array(np.diff(judged.seen.offsets)),
        "item_idx": lists(held.values),
        "timestamp": lists(judged.timestamp),
        "rating": lists(judged.rating),
        "score": lists(own),
        "full_rank": lists(1 + ranked.before),
        "candidates": lists(np.diff(among.offsets)),
        "greater": lists(greater.astype(np.int64)),
        "equal": lists(equal.astype(np.int64)),
        "top": pa.ListArray.from_arrays(pa.array(lengths, pa.int32()), pa.array(ranked.items[offered].numpy())),
    }
    return pa.table([pa.array(columns[f.name]).cast(f.type) for f in RANKS.schema], schema=RANKS.schema)
