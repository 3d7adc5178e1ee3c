"""The usual way to prepare implicit feedback in Spark, the peer of benchmarks/prepare.py.

Read CSV with a schema, drop duplicates, StringIndexer for both ids, leave-one-out with a window, negatives by
rejection in Arrow batches, Parquet. No checks, no quarantine, no candidates.

    spark-submit benchmarks/_usual_prepare.py LOG OUTPUT
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
from pyspark.ml.feature import StringIndexer
from pyspark.sql import SparkSession, Window
from pyspark.sql import functions as F

NEGATIVES = 4


def main(log: str, output: str) -> None:
    spark = SparkSession.builder.appName("usual").getOrCreate()
    rows = spark.read.csv(log, header=True, schema="userId long, movieId long, rating float, timestamp long")
    rows = rows.dropDuplicates(["userId", "movieId"])
    indexer = StringIndexer(inputCols=["userId", "movieId"], outputCols=["user_idx", "item_idx"])
    model = indexer.fit(rows)
    n_items = len(model.labelsArray[1])
    indexed = model.transform(rows).selectExpr("int(user_idx) as user_idx", "int(item_idx) as item_idx", "timestamp")
    latest = Window.partitionBy("user_idx").orderBy(F.desc("timestamp"))
    ranked = indexed.withColumn("place", F.row_number().over(latest)).cache()
    ranked.where("place = 1").select("user_idx", "item_idx").write.parquet(f"{output}/test")
    by_user = ranked.where("place > 1").groupBy("user_idx").agg(F.collect_list("item_idx").alias("items"))

    def sample(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rng = np.random.default_rng(1)
        for batch in batches:
            users, items, negatives = [], [], []
            for user, own in zip(batch["user_idx"].to_pylist(), batch["items"].to_pylist(), strict=True):
                drawn = rng.integers(0, n_items, (len(own), NEGATIVES))
                bad = np.isin(drawn, own)
                while bad.any():
                    drawn[bad] = rng.integers(0, n_items, int(bad.sum()))
                    bad = np.isin(drawn, own)
                users.append(np.full(len(own), user))
                items.append(own)
                negatives.append(drawn)
            if users:
                columns = {"user_idx": np.concatenate(users), "item_idx": np.concatenate(items)}
                drawn = np.concatenate(negatives)
                columns |= {f"neg_{slot}": drawn[:, slot] for slot in range(NEGATIVES)}
                yield pa.RecordBatch.from_pydict({name: pa.array(c).cast(pa.int32()) for name, c in columns.items()})

    schema = ", ".join(["user_idx int", "item_idx int", *(f"neg_{slot} int" for slot in range(NEGATIVES))])
    by_user.mapInArrow(sample, schema).write.parquet(f"{output}/train")
    spark.stop()


if __name__ == "__main__":
    main(*sys.argv[1:3])
