"""The job that makes a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nas.core.progress import Tick


def teacher(spec: Mapping[str, Any], tick: Tick) -> dict[str, Any]:
    """Have the teacher: `{"info": ..., "says": line}`."""
    from nas.data import open_dataset
    from nas.distill.teacher import make_teacher
    from nas.export.teacher_net import parse_teacher

    info = make_teacher(
        parse_teacher(spec["teacher"]),
        open_dataset(Path(spec["dataset"])),
        Path(spec["cache"]),
        random_seed=spec["random_seed"],
        epochs=spec["teacher_epochs"],
        device=spec["device"],
        threads=spec["threads"],
        tick=tick,
    )
    notes = "".join(f"; {note}" for note in info.notes)
    says = (
        f"{info.id} ({info.model}), holdout top-1 {info.holdout_top1:.1%} +- "
        f"{info.holdout_top1_se:.1%}{notes}"
    )
    return {"info": info.to_dict(), "says": says}
