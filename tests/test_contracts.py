"""The tables between stages: one that does not fit names the column, both types and the job to rerun."""

from __future__ import annotations

import pyarrow as pa
import pytest

from ncf_dist import contracts
from ncf_dist.contracts import Contract
from ncf_dist.errors import ContractError

ALL = (
    contracts.user_index(pa.string()),
    contracts.item_index(pa.int64()),
    contracts.items(pa.int64()),
    contracts.INTERACTIONS,
    contracts.HISTORY,
    contracts.ITEM_STATS,
    contracts.VALIDATION,
    contracts.TEST,
    contracts.QUARANTINE,
    contracts.train(per_positive=2, draws=3),
    contracts.recommendations(pa.string(), pa.int64()),
)


@pytest.mark.parametrize("contract", ALL, ids=lambda contract: contract.name)
def test_a_contract_accepts_itself_has_its_key_and_no_nulls(contract: Contract) -> None:
    contract.check(contract.schema)
    assert set(contract.key) <= set(contract.columns)
    assert not any(field.nullable for field in contract.schema)


def test_names_are_unique() -> None:
    assert len({contract.name for contract in ALL}) == len(ALL)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ({"item_idx": pa.int32()}, r"column train_count is missing \(found item_idx\)"),
        ({}, r"column item_idx is missing \(found none\)"),
        ({"item_idx": pa.int64(), "train_count": pa.int64()}, "column item_idx is int64, needed int32"),
        (
            {"train_count": pa.int64(), "item_idx": pa.int32()},
            "columns are train_count, item_idx; needed exactly item_idx, train_count",
        ),
        (
            {"item_idx": pa.int32(), "train_count": pa.int64(), "extra": pa.int8()},
            "columns are item_idx, train_count, extra; needed exactly item_idx, train_count",
        ),
    ],
)
def test_a_mismatch_names_table_column_found_wanted_and_job(found: dict[str, pa.DataType], message: str) -> None:
    with pytest.raises(ContractError, match=f"^table item_stats: {message}; rerun the job prepare$"):
        contracts.ITEM_STATS.check(pa.schema(list(found.items())))


def test_the_name_of_a_lists_item_does_not_matter_but_its_type_does() -> None:
    def history(element: pa.Field) -> pa.Schema:
        lists = {"item_idx": pa.list_(element), "test_item_idx": pa.list_(element)}
        return pa.schema({"user_idx": pa.int32(), **lists})

    contracts.HISTORY.check(history(pa.field("item", pa.int32())))
    with pytest.raises(ContractError, match="column item_idx is .*int64.*, needed .*int32"):
        contracts.HISTORY.check(history(pa.field("element", pa.int64(), nullable=False)))


def test_the_fingerprint_follows_names_types_and_order() -> None:
    schemas = [
        [("a", pa.int32()), ("b", pa.int64())],
        [("b", pa.int64()), ("a", pa.int32())],
        [("a", pa.int64()), ("b", pa.int64())],
        [("a", pa.int32()), ("c", pa.int64())],
        [("a", pa.int32())],
    ]
    assert len({contracts.schema_fingerprint(pa.schema(schema)) for schema in schemas}) == len(schemas)
    assert contracts.train(2, 3).fingerprint == contracts.train(2, 3).fingerprint


def test_the_train_table_of_ratings_and_of_online_negatives() -> None:
    assert contracts.train(2, 3, explicit=True).columns == ["user_idx", "item_idx", "rating"]
    assert contracts.train(2, 0).columns == contracts.train(0, 3).columns == ["user_idx", "item_idx"]
    assert contracts.VALIDATION.columns == ["user_idx", "item_idx", "rating", "candidates"]


def test_the_train_table_has_one_column_a_draw_and_slot() -> None:
    negatives = ["neg_0_0", "neg_0_1", "neg_1_0", "neg_1_1", "neg_2_0", "neg_2_1"]
    assert contracts.train(per_positive=2, draws=3).columns == ["user_idx", "item_idx", *negatives]
