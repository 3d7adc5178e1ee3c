"""The published table as a state machine (tests/test_published_table.py) that is cleaned, too, at any moment and killed
while it is: readers see what a dict says, every version that stays is whole, and what can be undone still can."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from deltalake import DeltaTable
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, precondition, rule, run_state_machine_as_test

from ncf_dist.clean.pipeline import clean
from ncf_dist.clean.steps import STEPS
from ncf_dist.config import Retention
from ncf_dist.errors import InputError
from ncf_dist.publish.log import DeltaLog
from tests.test_published_table import COMMON, NIGHTS, Killed, Table, at, dies, nights


class Cleaned(Table):
    """first: the oldest version that the cleans so far were to leave readable."""

    def clean(self, most: int) -> None:
        night = self.nights[NIGHTS[0]]
        bounds = Retention(days=0, nights=3, versions=most, published=None)
        self.first = max(self.first, self.version - most + 1)
        clean(night.config.model_copy(update={"retention": bounds}), night.ds)

    def reaches(self, ds: str) -> bool:
        """Whether all that a rollback of this night would look at is still there."""
        explains = max((version for version, _, _ in self.past[ds] if version <= self.first), default=0)
        return self.first == 0 or self.target(ds)[0] >= explains

    @precondition(lambda self: self.version >= 0)
    @rule(most=st.integers(1, 6))
    def is_cleaned(self, most: int) -> None:
        self.clean(most)

    @precondition(lambda self: self.version >= 0)
    @rule(most=st.integers(1, 6), step=st.sampled_from(sorted(STEPS)))
    def is_killed_while_it_is_cleaned(self, most: int, step: str) -> None:
        with at(step, dies), contextlib.suppress(Killed):
            self.clean(most)

    @rule(ds=nights)
    def rolls_back(self, ds: str) -> None:
        if ds not in self.live and self.is_rolled_back(ds) and self.past[ds][-1][0] < self.first:
            # What took the night out may be known no more; then there is nothing to undo, which is said.
            with contextlib.suppress(InputError):
                assert self.nights[ds].rollback().status == "already-done"
                self.settles()
        elif ds not in self.live or self.is_rolled_back(ds) or self.reaches(ds):
            super().rolls_back(ds)

    @precondition(lambda self: self.version > self.first)
    @rule(ds=nights, data=st.data())
    def rolls_back_to(self, ds: str, data: st.DataObject) -> None:
        super().rolls_back_to(ds, data)

    @rule(ds=nights, step=st.sampled_from(["begun", "checked", "verified", "committing", "committed", "described"]))
    def is_killed_while_rolling_back(self, ds: str, step: str) -> None:
        if ds in self.live and self.reaches(ds):
            super().is_killed_while_rolling_back(ds, step)

    @rule(ds=nights, at_byte=st.integers(4, 200))
    def does_not_go_back_to_a_damaged_file(self, ds: str, at_byte: int) -> None:
        if ds in self.live and self.reaches(ds):
            super().does_not_go_back_to_a_damaged_file(ds, at_byte)

    @precondition(lambda self: bool(self.live) and self.first == 0)
    @rule(ds=nights)
    def loses_the_end_of_its_log(self, ds: str) -> None:
        """A checkpoint stands for entries that are gone."""
        super().loses_the_end_of_its_log(ds)

    @invariant()
    def every_version_that_stays_is_whole(self) -> None:
        root = str(self.nights[NIGHTS[0]].table)
        for version in range(self.first, self.version + 1):
            names = DeltaTable(root, version=version).file_uris()
            assert all(Path(name).exists() for name in names), version
        if self.version >= 0:
            log = DeltaLog(root)
            assert all(log.explain(log.opened(), ds) is not None for ds in self.live)


def test_readers_see_what_a_dict_says_while_it_is_cleaned() -> None:
    run_state_machine_as_test(
        Cleaned, settings=settings(max_examples=8, stateful_step_count=15, derandomize=True, **COMMON)
    )


@pytest.mark.soak
def test_readers_see_what_a_dict_says_while_it_is_cleaned_for_long() -> None:
    run_state_machine_as_test(Cleaned, settings=settings(max_examples=300, stateful_step_count=30, **COMMON))
