"""The folder of a full training: settings, checkpoint, log, curve, result and saved models."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nas.core.cli import resume_flags
from nas.core.io import read_object, remove_leftovers, write_atomic, write_json
from nas.core.table import Writer
from nas.train.evaluate import SCORES
from space.errors import refuse

LOG_COLUMNS = (
    *("epoch", "lr", "train_loss"),
    *(f"{prefix}holdout_{name}" for prefix in ("", "ema_") for name in SCORES),
    *("best_of", "images", "images_per_s", "seconds", "peak_mem_bytes"),
)
SETTINGS, RESULT = "train.json", "result.json"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"


@dataclass(frozen=True)
class TrainFolder:
    """The folder of a full training and its files."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        """The checkpoint's path."""
        return self.path / "checkpoint.safetensors"

    def check_new(self) -> None:
        """Refuse a folder that holds anything. Raises InputError."""
        used = self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir())
        if used or (self.path.exists() and not self.path.is_dir()):
            remedy = "name another folder"
            if (self.path / SETTINGS).is_file():
                remedy = f"go on with it: {resume_flags(self.path)}; or {remedy}"
            raise refuse("--out", self.path, "a folder that is new or empty", remedy)

    def write_settings(self, settings: Mapping[str, Any]) -> None:
        """Create the folder and write `train.json`. Raises InputError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            write_json(self.path / SETTINGS, dict(settings))
        except OSError as error:
            raise refuse("--out", f"{self.path} ({error.strerror})", "a place to write") from None

    def read_settings(self) -> dict[str, Any]:
        """Read `train.json`. Raises InputError."""
        schema = {"config": dict, "machine": dict}
        return read_object(self.path / SETTINGS, "the folder of a training by nas.train", schema)

    def read_result(self) -> dict[str, Any] | None:
        """Read `result.json`; None before the training's end. Raises InputError."""
        path = self.path / RESULT
        if not path.is_file():
            return None
        result = read_object(path, "how a training ended", {"status": str})
        if result["status"] not in ("finished", "diverged"):
            raise refuse(str(path), "another format", "what nas.train wrote", "remove it, and --resume")
        return result

    def forget_result(self) -> None:
        """Remove `result.json`: the training goes on."""
        with self.lock():
            (self.path / RESULT).unlink(missing_ok=True)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Be the only process that writes here. Raises InputError if another one does."""
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout:
            raise refuse("training", self.path, "one that no other process does", "wait for it, or end it") from None
        except OSError as error:
            raise refuse("--out", f"{self.path} ({error.strerror})", "a place to write") from None
        try:
            remove_leftovers(self.path)
            yield
        finally:
            lock.release()

    def write_log(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write `log.csv` and `curve.png` from the rows of all epochs."""
        out = io.StringIO()
        writer = Writer(out, LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path / "log.csv", out.getvalue().encode())
        if rows:
            write_atomic(self.path / "curve.png", draw_curve(rows))


class TensorBoardLog:
    """A TensorBoard log beside the CSV, if the package is installed."""

    def __init__(self, folder: Path, first_epoch: int) -> None:
        self.writer: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return
        make: Any = SummaryWriter
        # What a killed process wrote of later epochs is hidden by what follows.
        self.writer = make(str(folder / "tensorboard"), purge_step=first_epoch)

    def add(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of an epoch."""
        if self.writer is None:
            return
        for name in LOG_COLUMNS:
            if isinstance(row.get(name), (int, float)) and name != "epoch":
                group = "holdout" if "holdout" in name else "train"
                self.writer.add_scalar(f"{group}/{name}", row[name], row["epoch"])
        self.writer.flush()

    def close(self) -> None:
        """Close the log."""
        if self.writer is not None:
            self.writer.close()


def draw_curve(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a figure of losses, accuracy and learning rate by epoch, as PNG."""
    figure = Figure(figsize=(9.0, 3.4), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    loss, top, rate = figure.subplots(1, 3)
    epochs = [row["epoch"] for row in rows]
    mark = "." if len(rows) < 40 else ""
    loss.plot(epochs, [r["train_loss"] for r in rows], mark, color=BLUE, ls="-", label="training")
    series = [("", "holdout", ORANGE)]
    if "ema_holdout_loss" in rows[-1]:
        series.append(("ema_", "holdout, averaged weights", GREEN))
    for prefix, label, colour in series:
        found = [row[f"{prefix}holdout_loss"] for row in rows]
        loss.plot(epochs, found, mark, color=colour, ls="-", label=label)
        share = [100 * row[f"{prefix}holdout_top1"] for row in rows]
        error = [100 * row[f"{prefix}holdout_top1_se"] for row in rows]
        top.plot(epochs, share, mark, color=colour, ls="-", label=label)
        low, high = ([s + sign * e for s, e in zip(share, error, strict=True)] for sign in (-1, 1))
        top.fill_between(epochs, low, high, color=colour, alpha=0.2, lw=0)
    rate.plot(epochs, [row["lr"] for row in rows], mark, color=BLUE, ls="-")
    for axes, name in (
        (loss, "loss, nats"),
        (top, "holdout top-1, % (band: one standard error)"),
        (rate, "learning rate at the epoch's end"),
    ):
        axes.set_title(name, fontsize=9, loc="left")
        axes.set_xlabel("epoch", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    loss.legend(fontsize=8, frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
