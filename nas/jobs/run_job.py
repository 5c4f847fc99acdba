"""The one place where a job meets torch: kind -> function of a plain specification."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from nas.core.io import disk_refusal
from nas.core.progress import Tick, no_tick
from nas.jobs.job import Job, Result, out_of_memory
from space.errors import InputError

log = logging.getLogger(__name__)

Values = dict[str, Any]


def run_job(job: Job, tick: Tick = no_tick) -> Result:
    """Do one job. Whatever goes wrong becomes a failed result with a reason in one line."""
    started = time.monotonic()
    try:
        values = _function_of(job.kind)(job.spec, tick)
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


def _function_of(kind: str) -> Callable[[Mapping[str, Any], Tick], Values]:
    found = _KINDS[kind]
    if not isinstance(found, str):
        return found
    module, _, name = found.partition(":")
    function: Callable[[Mapping[str, Any], Tick], Values] = getattr(import_module(module), name)
    return function


def _since(started: float) -> float:
    return time.monotonic() - started


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if out_of_memory(error):
        return f"out of memory: {text[:160]}"
    return f"{type(error).__name__}: {text[:200]}"


_KINDS: dict[str, str | Callable[[Mapping[str, Any], Tick], Values]] = {
    "hello": "nas.measure.jobs:hello",
    "measure": "nas.measure.jobs:measure",
    "stage": "nas.measure.jobs:stage",
    "peak-memory": "nas.measure.jobs:peak_memory",
    "fastest-batch": "nas.measure.jobs:fastest_batch",
    "accuracy": "nas.measure.jobs:accuracy",
    "count": "nas.measure.jobs:count",
    "teacher": "nas.distill.teacher_job:teacher",
    "relabel": "nas.labels.jobs:relabel",
    "check-labels": "nas.labels.jobs:check_labels",
    "begin-labels": "nas.labels.jobs:begin_labels",
    "labels": "nas.labels.jobs:build_labels",
    "open-labels": "nas.labels.jobs:open_labels",
    "verify-labels": "nas.labels.jobs:verify_labels",
    "ask-teacher": "nas.labels.jobs:ask_teacher",
    "merge-labels": "nas.labels.jobs:merge_labels",
    "train": "nas.distill.train_job:train",
    "score": "nas.distill.score_job:score",
    "pace": "nas.train.pace_job:pace",
    "heads": "nas.train.heads_job:heads",
    "zero-cost": "nas.distill.zero_cost_job:zero_cost",
    "importance": "nas.distill.importance_job:importance",
    "inherit": "nas.distill.importance_job:inherit_weights",
}
