"""The one place where a job meets torch: kind -> function of a plain specification."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from nas.files import disk_refusal
from nas.jobs import Job, Result, Tick, no_tick
from nas.runner import heads, importance, labels, measuring, pace, score, train, zero_cost
from space.errors import InputError

log = logging.getLogger(__name__)

Values = dict[str, Any]


def run_job(job: Job, tick: Tick = no_tick) -> Result:
    """Do one job. Whatever goes wrong becomes a failed result with a reason in one line."""
    started = time.monotonic()
    try:
        function = _KINDS[job.kind]
        values = function(job.spec, tick)
    except InputError as error:
        return Result(job.key, False, {"input_error": True}, str(error), _since(started))
    except MemoryError:
        return Result(job.key, False, {}, "out of memory", _since(started))
    except Exception as error:
        full = disk_refusal(error)
        if full is not None:  # no candidate's fault: the run stops, and goes on where there is room
            return Result(job.key, False, {"input_error": True}, str(full), _since(started))
        log.debug("job %s failed", job.key, exc_info=True)
        traceback.print_exc()
        return Result(job.key, False, {}, _reason(error), _since(started))
    return Result(job.key, True, values, None, _since(started))


def _since(started: float) -> float:
    return time.monotonic() - started


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if measuring.out_of_memory(error):
        return f"out of memory: {text[:160]}"
    return f"{type(error).__name__}: {text[:200]}"


_KINDS: dict[str, Callable[[Mapping[str, Any], Tick], Values]] = {
    "hello": measuring.hello,
    "measure": measuring.measure,
    "stage": measuring.stage,
    "peak-memory": measuring.peak_memory,
    "fastest-batch": measuring.fastest_batch,
    "accuracy": measuring.accuracy,
    "count": measuring.count,
    "teacher": labels.teacher,
    "relabel": labels.relabel,
    "check-labels": labels.check_labels,
    "begin-labels": labels.begin_labels,
    "labels": labels.build_labels,
    "open-labels": labels.open_labels,
    "verify-labels": labels.verify_labels,
    "ask-teacher": labels.ask_teacher,
    "merge-labels": labels.merge_labels,
    "train": train.train,
    "score": score.score,
    "pace": pace.pace,
    "heads": heads.heads,
    "zero-cost": zero_cost.zero_cost,
    "importance": importance.importance,
    "inherit": importance.inherit_weights,
}
