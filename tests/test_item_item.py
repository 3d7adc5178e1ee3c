"""Item-to-item matrices are their formulas, cut and whole; a file of them comes back or is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ncf_dist.contracts import STEP_UNIT
from ncf_dist.item_item import rows as item_rows
from ncf_dist.item_item.counts import follow_rows, train_rows_of
from ncf_dist.item_item.part import Part, dense_scores, product_scores
from ncf_dist.item_item.rows import ItemRows, from_entries, largest

ITEMS = 9


def whole(rows: ItemRows) -> np.ndarray:
    """(I, I) float64, the column included."""
    found = np.zeros((rows.n_items, rows.n_items))
    for item in range(rows.n_items):
        entries = slice(int(rows.offsets[item]), int(rows.offsets[item + 1]))
        found[item, rows.items[entries].numpy()] = rows.values[entries].numpy()
    return found + (0 if rows.column is None else rows.column.double().numpy())


def counted(seed: int, density: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """(T (I, I) in steps of 1 / 2520, train rows (I,)); nobody has the last item."""
    rng = np.random.default_rng(seed)
    times = rng.integers(1, 9 * STEP_UNIT, (ITEMS, ITEMS)) * (rng.random((ITEMS, ITEMS)) < density)
    times[-1] = times[:, -1] = 0
    rows = rng.integers(1, 50, ITEMS)
    rows[-1] = 0
    return times, rows


def table_of(times: np.ndarray, order: np.ndarray | slice = slice(None)) -> pa.Table:
    item, following = (places[order] for places in np.nonzero(times))
    columns = {"item_idx": item.astype(np.int32), "next_item_idx": following.astype(np.int32)}
    return pa.table({**columns, "weight": times[item, following]})


@settings(deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.5, 20.0]))
def test_what_follows_is_the_logarithm_of_its_odds(seed: int, smoothing: float) -> None:
    """log p(b | a) - ½ log p(b), but for a constant of a's that orders nothing."""
    times, train_rows = counted(seed)
    shares = np.maximum(train_rows, 0.5) / train_rows.sum()
    t = times / STEP_UNIT
    likely = (t + smoothing * shares) / (t.sum(1, keepdims=True) + smoothing)
    wanted = np.log(likely) - 0.5 * np.log(shares)
    constant = np.log(smoothing / (t.sum(1) + smoothing))
    found = whole(follow_rows([table_of(times)], train_rows, smoothing))
    np.testing.assert_allclose(found, wanted - constant[:, None], atol=1e-5)


@settings(deadline=None)
@given(st.integers(0, 99))
def test_a_pair_that_was_not_kept_loses_its_own_term_alone(seed: int) -> None:
    times, train_rows = counted(seed)
    every = follow_rows([table_of(times)], train_rows)
    dropped = np.random.default_rng(seed + 1).random(times.shape) < 0.5
    found = whole(follow_rows([table_of(np.where(dropped, 0, times))], train_rows))
    assert every.column is not None
    left = np.broadcast_to(every.column.numpy(), found.shape)
    np.testing.assert_array_equal(found, np.where(dropped, left, whole(every)))


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 5))
def test_files_in_any_order_give_the_same_rows(seed: int, files: int) -> None:
    times, train_rows = counted(seed)
    order = np.random.default_rng(seed).permutation(int((times > 0).sum()))
    parts = [table_of(times, part) for part in np.array_split(order, files)]
    one, several = follow_rows([table_of(times)], train_rows), follow_rows(parts, train_rows)
    for name, tensor in one.tensors("t").items():
        assert torch.equal(tensor, several.tensors("t")[name]), name
    for item in range(ITEMS):
        entries = one.items[one.offsets[item] : one.offsets[item + 1]]
        assert (entries.diff() > 0).all()


def test_items_without_pairs_or_rows() -> None:
    rows = follow_rows([], np.zeros(3, np.int64))
    assert (rows.offsets.tolist(), rows.items.tolist()) == ([0, 0, 0, 0], [])
    assert rows.column is not None
    assert rows.column.isfinite().all()
    totals = pa.table({"item_idx": pa.array([2, 0], pa.int32()), "train_rows": [7, 5], "weight": [1, 1]})
    assert train_rows_of([totals], 4).tolist() == [5, 0, 7, 0]


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 12))
def test_the_largest_of_a_row_are_kept(seed: int, kept: int) -> None:
    rng = np.random.default_rng(seed)
    matrix = rng.permutation(ITEMS**2).reshape(ITEMS, ITEMS) - ITEMS**2 / 2 + 0.25  # All of different sizes.
    matrix[rng.random(matrix.shape) < 0.3] = 0
    found = whole(largest(torch.from_numpy(matrix).float(), kept))
    least = np.sort(np.abs(matrix), axis=1)[:, -min(kept, ITEMS)][:, None]
    np.testing.assert_array_equal(found, np.where(np.abs(matrix) >= least, matrix, 0).astype(np.float32))


@settings(deadline=None)
@given(st.integers(0, 99), st.integers(1, 6), st.sampled_from([0.5, 2.0, 1e9]))
def test_a_part_is_its_formula(seed: int, last: int, half_life: float) -> None:
    rng = np.random.default_rng(seed)
    times, train_rows = counted(seed)
    rows = follow_rows([table_of(times)], train_rows)
    rows = rows if seed % 2 else ItemRows(rows.offsets, rows.items, rows.values)
    part = Part("counts", 0.7, half_life, last, rows)
    length = rng.integers(0, 5, 6)
    items = rng.integers(0, ITEMS, (6, 4))
    found = dense_scores(part, torch.from_numpy(items), torch.from_numpy(length)).numpy()
    matrix, wanted = whole(rows), np.zeros((6, ITEMS))
    for user in range(6):
        latest = items[user, : length[user]][::-1][:last]
        for age, item in enumerate(latest):
            wanted[user] += 0.7 * 0.5 ** (age / half_life) * matrix[item]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    by_product = product_scores(part, torch.from_numpy(items), torch.from_numpy(length)).numpy()
    np.testing.assert_allclose(by_product, wanted, atol=1e-4)


def small() -> ItemRows:
    rows = from_entries(np.array([0, 0, 2]), np.array([2, 1, 0]), np.array([1.0, 2.0, 3.0]), 3)
    return ItemRows(rows.offsets, rows.items, rows.values, torch.arange(3.0))


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_tensors_come_back(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(item_rows, "ENTRIES_A_BLOCK", block)
    tensors = small().tensors("counts")
    again = ItemRows.of_tensors("counts", tensors, 3)
    assert all(torch.equal(tensor, again.tensors("counts")[name]) for name, tensor in tensors.items())
    assert ItemRows.of_tensors("counts", {n: t for n, t in tensors.items() if "column" not in n}, 3).column is None


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("offsets", None, r"counts\.offsets is missing"),
        ("offsets", torch.tensor([0, 2, 2]), r"counts\.offsets is torch\.int64 \[3\], needed torch\.int64 \[4\]"),
        ("offsets", torch.tensor([0, 2, 1, 3]), r"counts\.offsets do not ascend from 0 to the 3 entries"),
        ("offsets", torch.tensor([1, 2, 2, 3]), r"counts\.offsets do not ascend"),
        ("offsets", torch.tensor([0, 2, 2, 2]), r"counts\.offsets do not ascend"),
        ("items", torch.tensor([1, 2, 3], dtype=torch.int32), r"counts\.items are not all from 0 to 2"),
        ("items", torch.tensor([-1, 2, 0], dtype=torch.int32), r"counts\.items are not all from 0 to 2"),
        ("items", torch.tensor([2, 1, 0], dtype=torch.int32), r"counts\.items do not ascend within a row"),
        ("items", torch.tensor([1, 1, 0], dtype=torch.int32), r"counts\.items do not ascend within a row"),
        ("items", torch.tensor([1, 2, 0]), r"counts\.items is torch\.int64 \[3\], needed torch\.int32 \[3\]"),
        ("values", torch.zeros(2), r"counts\.items is torch\.int32 \[3\], needed torch\.int32 \[2\]"),
        ("column", torch.zeros(2), r"counts\.column is torch\.float32 \[2\], needed torch\.float32 \[3\]"),
    ],
)
@pytest.mark.parametrize("block", [1, 2, 100])
def test_tensors_that_are_no_matrix_are_refused_by_name(
    name: str, tensor: torch.Tensor | None, message: str, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(item_rows, "ENTRIES_A_BLOCK", block)
    tensors = small().tensors("counts")
    if tensor is None:
        del tensors[f"counts.{name}"]
    else:
        tensors[f"counts.{name}"] = tensor
    with pytest.raises(ValueError, match=message):
        ItemRows.of_tensors("counts", tensors, 3)
