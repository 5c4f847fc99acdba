"""Measurements that a run begins with are all taken over, wherever it is killed meanwhile."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.faults.references import run_outcome
from nas.contract import contract
from nas.measure.measurement_table import MeasurementRow, MeasurementTable
from tests.conftest import Finished


def test_a_run_killed_while_it_takes_measurements_over_takes_the_rest(
    finished: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = finished.folder / "measurements.csv"
    append = MeasurementTable.append
    taken: list[MeasurementRow] = []

    def dying(self: MeasurementTable, row: MeasurementRow) -> None:
        if len(taken) == 2:
            raise KeyboardInterrupt
        taken.append(row)
        append(self, row)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(MeasurementTable, "append", dying)
        with pytest.raises(KeyboardInterrupt):
            contract(
                str(finished.folder.parent / "small.json"),
                "400K",
                out=out,
                effort="smoke",
                steps=2,
                candidates_per_step=4,
                threads=1,
                img_size=32,
                max_images=200,
                teacher_epochs=2,
                final_epochs=1,
                cache_dir=finished.cache,
                measurements=str(source),
            )
    assert len(MeasurementTable(out / "measurements.csv").rows) == 2
    contract(out=out, resume=True, cache_dir=finished.cache)
    assert MeasurementTable(out / "measurements.csv").rows == MeasurementTable(source).rows
    assert run_outcome(out) == run_outcome(finished.folder)
