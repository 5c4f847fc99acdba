"""A trained teacher: what is known of it, and the function from inputs to logits that it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from nas.core.io import read_json
from nas.export.teacher_net import TeacherNet, create
from nas.export.weights import load_into, load_weights, place, weights_digest
from space.errors import refuse

SCHEMA = 1


@dataclass(frozen=True)
class TeacherInfo:
    """A teacher at hand, as plain values.

    `folder` holds weights.safetensors and info.json; `id` names it for people, `digest` hashes its
    weights; `model` and `kwargs` are the timm call; `mean`, `std`, `input_size` (None: as given)
    are its own inputs', `student_mean` and `student_std` those it is given. `holdout_top1` is a
    share, with its standard error over `holdout_images` (none without ground truth).
    """

    folder: str
    id: str
    digest: str
    model: str
    kwargs: Mapping[str, Any]
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    input_size: int | None
    student_mean: tuple[float, ...]
    student_std: tuple[float, ...]
    epochs: int
    holdout_top1: float
    holdout_top1_se: float
    holdout_images: int
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Give plain JSON, the inverse of `from_dict`."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @staticmethod
    def from_dict(value: Mapping[str, Any]) -> TeacherInfo:
        """Read plain JSON."""
        read: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in value.items()}
        return TeacherInfo(**read)


def read_teacher(folder: Path) -> TeacherInfo:
    """Read what is known of the teacher in a folder. Raises InputError."""
    path, what = folder / "info.json", "a teacher of this toolkit"
    data = read_json(path, what)
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        schema = data.get("schema") if isinstance(data, dict) else None
        raise refuse(str(folder), f"schema {schema}", f"schema {SCHEMA}", "delete it")
    try:
        return TeacherInfo.from_dict({**data["info"], "folder": str(folder)})
    except (KeyError, TypeError, ValueError) as error:
        got = f"{type(error).__name__}: {error}"
        raise refuse(str(path), got, what, "delete the folder") from None


def load_teacher(
    info: TeacherInfo, device: str = "cpu", precision: str = "float32", *, stay: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Open a teacher: student-normalised [B, 3, S, S] -> logits float32 [B, C] on the CPU.

    Always eval mode; with `stay` the logits stay on the teacher's device; `precision` "bfloat16" or
    "float16" runs the net under autocast, whose logits become float32 before anything else is done
    with them. Weights that are not those of `info` are refused.
    """
    path = Path(info.folder) / "weights.safetensors"
    state = load_weights(path, name="teacher")
    if weights_digest(state) != info.digest:
        raise refuse("teacher", f"other weights in {path}", info.digest[:12], "delete the folder")
    inner = create(info.model, info.kwargs, info.num_classes)
    load_into(inner, state, name="teacher")
    student = (info.student_mean, info.student_std)
    net = TeacherNet(inner, student, (info.mean, info.std), info.input_size)
    place(net, device).eval()

    def logits(inputs: torch.Tensor) -> torch.Tensor:
        kind = getattr(torch, precision)
        autocast = torch.autocast(device.split(":")[0], dtype=kind, enabled=kind != torch.float32)
        with torch.no_grad(), autocast:
            out: torch.Tensor = net(to_device(inputs, device))
        return out.float() if stay else out.float().cpu()

    return logits


def to_device(inputs: torch.Tensor, device: str) -> torch.Tensor:
    """Move inputs to a device, in the layout that nets there are in."""
    return inputs.to(device, memory_format=torch.channels_last, non_blocking=True)
