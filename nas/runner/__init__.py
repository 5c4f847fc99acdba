"""The one place where a job meets torch: kind -> function of a plain specification."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from nas.jobs import Job, Result, Tick, no_tick
from nas.runner import labels, train
from space import Context, get_family
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
        log.debug("job %s failed", job.key, exc_info=True)
        traceback.print_exc()
        return Result(job.key, False, {}, _reason(error), _since(started))
    return Result(job.key, True, values, None, _since(started))


def _since(started: float) -> float:
    return time.monotonic() - started


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    if "out of memory" in text.lower() or "can't allocate memory" in text.lower():
        return f"out of memory: {text[:160]}"
    return f"{type(error).__name__}: {text[:200]}"


def _context(spec: Mapping[str, Any]) -> Context:
    return Context(**spec["context"])


def _hello(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Look at the device: `{"fingerprint": {...}}`; an unknown one is bad input."""
    from nas.measure.fingerprint import take_fingerprint

    return {"fingerprint": take_fingerprint(spec["device"]).to_dict()}


def _measure(spec: Mapping[str, Any], tick: Tick) -> Values:
    """Time an arch as built, with fresh weights, against its reference."""
    import torch

    from nas.measure.throughput import measure

    family = get_family(spec["family"])
    context = _context(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(spec["random_seed"])
        model = family.build(family.arch(spec["arch"]), context)
        reference = None
        if spec["reference"] is not None:
            reference = family.build(family.arch(spec["reference"]), context)
    measured = measure(
        model,
        reference,
        ctx=context,
        batch=spec["batch"],
        dtype=spec["dtype"],
        device=spec["device"],
        blocks=spec["blocks"],
        max_blocks=spec["max_blocks"],
        ratio_at_least=spec["ratio_at_least"],
        images_per_s_at_least=spec["images_per_s_at_least"],
    )
    return measured.to_dict()


_KINDS: dict[str, Callable[[Mapping[str, Any], Tick], Values]] = {
    "hello": _hello,
    "measure": _measure,
    "teacher": labels.teacher,
    "relabel": labels.relabel,
    "begin-labels": labels.begin_labels,
    "labels": labels.build_labels,
    "open-labels": labels.open_labels,
    "verify-labels": labels.verify_labels,
    "ask-teacher": labels.ask_teacher,
    "merge-labels": labels.merge_labels,
    "train": train.train,
}
