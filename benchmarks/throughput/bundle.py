"""A folder that a board without torch can measure: ONNX files and one script."""

from __future__ import annotations

import shutil
import tempfile
import zipapp
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nas
import space
from benchmarks.throughput.flags import ThroughputPlan
from benchmarks.throughput.networks import Net
from nas.core.io import write_json
from nas.core.progress import Console
from nas.measure.bundle import LIST
from nas.measure.runtimes import check_setting
from space import Context
from space.errors import refuse

SCRIPT = "throughput.pyz"

CARRIED = (
    *("__init__.py", "core/__init__.py", "core/table.py", "core/cli.py", "core/io.py"),
    *("core/requirement.py", "measure/__init__.py", "measure/bundle.py"),
    *("measure/fingerprint.py", "measure/intervals.py"),
    *("measure/measurement.py", "measure/interleave.py", "measure/device_table.py"),
    *("measure/interference.py", "measure/runtimes/__init__.py", "measure/runtimes/runtime.py"),
    *("measure/runtimes/eager.py", "measure/runtimes/from_onnx.py"),
)
"""What of `nas` the script needs: nothing of it imports torch."""


def write_bundle(folder: Path, nets: Sequence[Net], plan: ThroughputPlan, console: Console) -> dict[str, Any]:
    """Export every network and pack the script; returns what was written.

    A bundle that was interrupted goes on with the files that are missing. Raises `InputError`.
    """
    for setting in plan.settings:
        if plan.auto or setting.runtime != "onnxruntime" or setting.dtype != "float32":
            batch = "auto" if plan.auto else setting.batch
            got = f"--runtime {setting.runtime} --dtype {setting.dtype} --batch {batch}"
            want = "--runtime onnxruntime in float32 and batches by number, which is what a board without torch runs"
            raise refuse("--bundle", got, want, "name them")
        check_setting(setting)
    if plan.reference is None:
        raise refuse("--reference", "none", "a network that every other is timed beside")
    if folder.exists() and not folder.is_dir():
        raise refuse("--bundle", folder, "a folder")
    batches = sorted({setting.batch for setting in plan.settings})
    wanted = [*nets, *([] if plan.reference in nets else [plan.reference])]
    sizes = [Context(img_size=s, num_classes=plan.config.num_classes) for s in plan.sizes]
    _check_space(folder, wanted, sizes, len(batches))
    folder.mkdir(parents=True, exist_ok=True)
    listed = []
    console.start(float(len(wanted) * len(sizes) * len(batches)))
    try:
        for ctx in sizes:
            for batch in batches:
                for net in wanted:
                    listed.append(_export(folder, net, ctx, batch, net == plan.reference))
                    console.describe(net.name)
                    console.advance(1.0)
    finally:
        console.stop()
    write_json(folder / LIST, {"networks": listed})
    _pack(folder / SCRIPT)
    size = sum(path.stat().st_size for path in folder.iterdir())
    console.line(f"copy {folder} ({size / 1e6:.0f} MB) to the device; it needs Python 3.10, numpy and")
    console.line(f"onnxruntime; there: python {SCRIPT} --out device.csv")
    return {"bundle": str(folder), "networks": len(listed), "bytes": size}


def _check_space(folder: Path, nets: Sequence[Net], sizes: Sequence[Context], batches: int) -> None:
    """Refuse a bundle that the disk cannot take."""
    counts = [net.counts(ctx) for ctx in sizes for net in nets]
    need = sum(batches * 4 * count["params"] for count in counts if count is not None)
    place = next(p for p in (folder, *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if need * 1.1 > free:
        got, want = f"{need / 1e9:.1f} GB of networks", f"at most the {free / 1e9:.1f} GB free"
        raise refuse("--bundle", got, want, "ask for a smaller --sample")


def _export(folder: Path, net: Net, ctx: Context, batch: int, reference: bool) -> dict[str, Any]:
    import torch

    from nas.export.onnx import export_onnx
    from nas.measure.jobs import build
    from nas.measure.throughput import private_copy

    name = f"{net.key(ctx)}-px{ctx.img_size}-b{batch}.onnx"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = private_copy(build(net.spec(ctx), ctx), "cpu")
    if not (folder / name).is_file():
        images = torch.zeros(batch, ctx.in_chans, ctx.img_size, ctx.img_size)
        export_onnx(model, images, folder / name)
    return {
        **net.columns(ctx),
        "params": sum(p.numel() for p in model.parameters()),
        "macs": (net.counts(ctx) or {}).get("macs"),
        "batch": batch,
        "file": name,
        "reference": reference,
    }


def _pack(target: Path) -> None:
    """Pack the script: one file that Python runs, made of this package's own modules."""
    with tempfile.TemporaryDirectory(prefix="bundle-") as text:
        source = Path(text)
        root = Path(nas.__file__).parent
        for name in CARRIED:
            (source / "nas" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, source / "nas" / name)
        shutil.copytree(Path(space.__file__).parent, source / "space", ignore=shutil.ignore_patterns("__pycache__"))
        (source / "__main__.py").write_text("import sys\n\nfrom nas.measure.bundle import main\n\nsys.exit(main())\n")
        zipapp.create_archive(source, target, interpreter="/usr/bin/env python3")
