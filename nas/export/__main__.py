"""A trained model out of a run, for others to use: `python -m nas.export RUN --to timm --out DIR`.

SOURCE is the folder of a finished run, a model's JSON in it (best.json, family/02-7069321.json), or
the weights beside one. `timm`: a folder in the Hugging Face hub's layout, which plain timm loads,
as a classifier or as a backbone. `onnx`: a file for any number of images; `torch`: a program of
torch.export. Whatever is written is read back and compared with the network before it is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nas.core.cli import Parser, guarded
from nas.export.model import Left, left_by
from space.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

WRITTEN = {"config.json", "model.safetensors", "README.md"}
"""What an exported folder holds; one that holds anything else is not written over."""
TOLERANCE = 1e-4
FUSED_TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest one."""
BATCH = 16


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser(
        prog="python -m nas.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run's folder, a model's JSON, or its weights")
    add("--to", required=True, choices=("timm", "onnx", "torch"), help="the form")
    add("--out", required=True, metavar="PATH", help="a folder (timm), FILE.onnx, FILE.pt2 (torch)")
    add("--fused", action="store_true", help="fold batch norms into their convolutions (not timm)")
    add("--batch", type=int, default=BATCH, help=f"images a pass when timing ({BATCH})")
    add("--no-measure", dest="measure", action="store_false", help="onnx: do not time the file")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def _checked(given: argparse.Namespace) -> Path:
    """Refuse what cannot be written, before anything is read."""
    out = Path(given.out)
    suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(given.to)
    if suffix is not None and out.suffix != suffix:
        raise refuse("--out", given.out, f"a file that ends in {suffix}")
    if given.to == "timm" and given.fused:
        raise refuse("--fused", "with --to timm", "onnx or torch", "timm has no such network")
    if given.batch < 1:
        raise refuse("--batch", given.batch, "an integer >= 1")
    if not out.parent.is_dir():
        raise refuse("--out", given.out, "a place in a folder that exists", f"make {out.parent}")
    if suffix is not None and out.is_dir():
        raise refuse("--out", given.out, "a file", "it is a folder")
    if suffix is None and out.exists():
        others = {p.name for p in out.iterdir()} - WRITTEN if out.is_dir() else {out.name}
        if others:
            remedy = f"it holds {min(others)}; name a folder that is not there"
            raise refuse("--out", given.out, "a new folder, or an earlier export", remedy)
    return out


def export(given: argparse.Namespace) -> dict[str, Any]:
    """Export beside the place, read back, compare, move there, time; return what is told.

    What was there before stays until the new one has been compared.
    """
    out = _checked(given)
    left = left_by(Path(given.source))
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as beside:
            told = _exported(given, left, Path(beside) / out.name)
            if out.is_dir():
                os.replace(out, Path(beside) / "earlier")
            os.replace(Path(beside) / out.name, out)
    except OSError as error:
        raise refuse("--out", given.out, "a place to write to", error.strerror or "") from error
    told |= {"out": str(out)}
    if given.to == "onnx" and given.measure:
        told |= _timed(left, out, given.batch)
    return told


def _exported(given: argparse.Namespace, left: Left, out: Path) -> dict[str, Any]:
    """Write the form that is asked for as `out`, and compare what it says with the network."""
    import torch

    ctx = left.context
    shape = (max(2, given.batch), ctx.in_chans, ctx.img_size, ctx.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    told: dict[str, Any] = {
        "to": given.to,
        "key": left.family.key(left.arch, ctx),
        "params": left.family.count_params(left.arch, ctx),
    }
    model = left.build()
    if given.to == "timm":
        from nas.export.hub import export_timm

        export_timm(left, out)
        return {**told, "difference": _differs(model, _timm_again(out), images, 0.0)}
    network = model
    if given.fused:
        network = left.build()
        told["folded"] = _fuse(network, images)
        told["folding_difference"] = _differs(model, network, images, FUSED_TOLERANCE)
    again = _onnx(network, images, out) if given.to == "onnx" else _program(network, images, out)
    return {**told, "difference": _differs(model, again, images, TOLERANCE)}


def _fuse(network: nn.Module, images: Tensor) -> int:
    from nas.export.fuse import fuse_batch_norms

    return fuse_batch_norms(network, images[:2])


def _timm_again(out: Path) -> Callable[[Tensor], Tensor]:
    import timm

    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return lambda images: model(images)


def _onnx(network: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        remedy = 'pip install -e ".[onnx]"'
        raise refuse("--to", "onnx", "onnx, onnxscript and onnxruntime", remedy) from error
    import torch

    from nas.export.onnx import export_onnx

    export_onnx(network, images, out, any_batch=True)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _program(network: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor]:
    import torch

    from nas.export.torch_export import export_program

    export_program(network, images, out)
    module = torch.export.load(out).module()
    return lambda x: module(x)


def _differs(
    model: nn.Module, again: Callable[[Tensor], Tensor], images: Tensor, most: float
) -> float:
    """Compare on batches of one, two and more; what differs too much is refused."""
    import torch

    largest = 0.0
    with torch.no_grad():
        for count in sorted({1, 2, len(images)}):
            wanted, found = model(images[:count]), again(images[:count])
            scale = max(float(wanted.abs().max()), 1e-12)
            largest = max(largest, float((found - wanted).abs().max()) / scale)
    if not largest <= most:
        want = f"at most {most:g} of the largest logit"
        raise refuse("--to", f"logits that differ by {largest:.2g}", want, "nothing is written")
    return largest


def _timed(left: Left, out: Path, batch: int) -> dict[str, Any]:
    """Time the exported file in turns with the network in eager mode."""
    from nas.core.requirement import Setting
    from nas.measure.throughput import measure_prepared, prepare

    model = left.build()
    settings = (Setting("cpu", "onnxruntime", batch=batch), Setting("cpu", "eager", batch=batch))
    file, eager = (
        prepare(model, ctx=left.context, setting=s, staged=out if at == 0 else None)
        for at, s in enumerate(settings)
    )
    measured = measure_prepared(file, eager)
    names = (
        "images_per_s",
        "images_per_s_lo",
        "images_per_s_hi",
        "ratio",
        "ratio_lo",
        "ratio_hi",
        "batch",
        "threads",
        "fingerprint",
    )
    return {"throughput": {name: getattr(measured, name) for name in names}}


def _say(told: dict[str, Any]) -> None:
    print(f"{told['out']}: {told['params']:,} parameters")
    if "folded" in told:
        print(
            f"{told['folded']} batch norms folded, logits moved by {told['folding_difference']:.1e}"
        )
    print(f"read back: logits differ by {told['difference']:.1e} of the largest")
    pace = told.get("throughput")
    if pace is not None:
        print(
            f"ONNX Runtime: {pace['images_per_s']:.1f} images/s [{pace['images_per_s_lo']:.1f}, "
            f"{pace['images_per_s_hi']:.1f}] at batch {pace['batch']}, {pace['ratio']:.2f} "
            f"[{pace['ratio_lo']:.2f}, {pace['ratio_hi']:.2f}] times eager"
        )
    if told["to"] == "timm":
        print(f'load it with: timm.create_model("local-dir:{told["out"]}", pretrained=True)')


def main(argv: Sequence[str] | None = None) -> int:
    """Parse and export. Returns the exit status: 0, or 2 for bad input."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            told = export(given)
            _say(told)
        if given.json:
            print(json.dumps(told))
        return 0

    return guarded(work)


if __name__ == "__main__":
    sys.exit(main())
