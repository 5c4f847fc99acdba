"""The golden outcome: same trials, counts, statuses, winner and scores as when it was recorded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from golden.produce import EXPECTED, HERE, SCORES

TOLERANCE = 0.02
"""Nats of a loss and share of a score: what other processors and torch versions round to."""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("golden")
    environment = {**os.environ, "GOMP_SPINCOUNT": "10000"}
    command = [sys.executable, str(HERE / "produce.py"), str(out)]
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    found: dict[str, Any] = json.loads((out / "outcome.json").read_text())
    return found


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(EXPECTED.read_text())
    return found


def without_scores(trial: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in trial.items() if name not in SCORES}


def test_trials_and_winner_are_as_recorded(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    found = [without_scores(trial) for trial in outcome["trials"]]
    assert found == [without_scores(trial) for trial in expected["trials"]]
    assert outcome["winner"] == expected["winner"]
    assert outcome["exported"] == expected["exported"]


def test_nothing_was_timed_anew(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    assert outcome["measurements"] == expected["measurements"]


def test_scores_are_as_recorded(outcome: dict[str, Any], expected: dict[str, Any]) -> None:
    for found, recorded in zip(outcome["trials"], expected["trials"], strict=True):
        for name in SCORES:
            if recorded[name] is None:
                assert found[name] is None
            else:
                assert found[name] == pytest.approx(recorded[name], abs=TOLERANCE)
    assert outcome["score"]["soft_loss"] == pytest.approx(expected["score"]["soft_loss"], abs=TOLERANCE)
    for found, recorded in zip(outcome["training"], expected["training"], strict=True):
        assert found == pytest.approx(recorded, abs=TOLERANCE)
