"""Export a trained model of a run: `python -m nas.export RUN --to timm --out DIR`.

SOURCE is the folder of a finished run or training, a model's JSON in it (best.json, models/02-7069321.json), the
weights beside one, an exported folder, or another program's checkpoint: one that names a timm model of a family, or one
of a published arch. `timm`: a folder in the Hugging Face hub's layout, which plain timm and transformers load, as a
classifier or as a backbone. `onnx`: a file for any number of images; `torch`: a program of torch.export. An export is
read back and compared with the network before it is kept.
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

from nas.core.cli import Parser, exit_status
from space.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from nas.export.saved_model import SavedModel

WRITTEN = {"config.json", "model.safetensors", "class_map.txt", "README.md"}
"""The files of an exported folder; a folder with any other file is not overwritten."""
TOLERANCE = 1e-4
FUSED_TOLERANCE = 1e-5
"""Largest difference of logits, as a share of the largest one."""
BATCH = 16


def build_parser() -> Parser:
    """Return the parser."""
    parser = Parser("python -m nas.export", description=__doc__)
    add = parser.add_argument
    add("source", metavar="SOURCE", help="a run's folder, a model's JSON, or its weights")
    add("--to", required=True, choices=("timm", "onnx", "torch"), help="the form")
    add("--out", required=True, metavar="PATH", help="a folder (timm), FILE.onnx, FILE.pt2 (torch)")
    add("--fused", action="store_true", help="fold batch norms into their convolutions (not timm)")
    add("--opset", type=int, metavar="N", help="onnx: of the file")
    add("--batch", type=int, default=BATCH, help=f"images a pass when timing ({BATCH})")
    add("--no-measure", dest="measure", action="store_false", help="onnx: do not time the file")
    add("--json", action="store_true", help="end with one line of JSON")
    return parser


def _check_out(given: argparse.Namespace) -> Path:
    """Check `--out` and the flags before anything is read. Raises InputError."""
    out = Path(given.out)
    suffix = {"onnx": ".onnx", "torch": ".pt2"}.get(given.to)
    if suffix is not None and out.suffix != suffix:
        raise refuse("--out", given.out, f"a file that ends in {suffix}")
    if given.to == "timm" and given.fused:
        raise refuse("--fused", "with --to timm", "onnx or torch", "timm has no such network")
    if given.opset is not None and given.to != "onnx":
        raise refuse("--opset", f"with --to {given.to}", "--to onnx")
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
    """Export to a temporary folder, read back, compare, move into place, time; return the result.

    An earlier export stays until the new one has been compared. Raises InputError.
    """
    from nas.export.load import find_network

    out = _check_out(given)
    named = find_network(given.source, "SOURCE")
    saved = named.saved()
    try:
        with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as beside:
            result = _export(given, saved, Path(beside) / out.name)
            if out.is_dir():
                os.replace(out, Path(beside) / "earlier")
            os.replace(Path(beside) / out.name, out)
    except OSError as error:
        raise refuse("--out", given.out, "a place to write to", error.strerror or "") from error
    unnamed = f"its {saved.context.num_classes} classes carry no names, and the export names none"
    result |= {"out": str(out), "notes": [*named.notes, *([] if saved.classes else [unnamed])]}
    if given.to == "onnx" and given.measure:
        result |= _measure(saved, out, given.batch)
    return result


def _export(given: argparse.Namespace, saved: SavedModel, out: Path) -> dict[str, Any]:
    """Write the export as `out` and compare its logits with the network's."""
    import torch

    ctx = saved.context
    shape = (max(2, given.batch), ctx.in_chans, ctx.img_size, ctx.img_size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result: dict[str, Any] = {
        "to": given.to,
        "key": saved.family.key(saved.arch, ctx),
        "params": saved.family.count_params(saved.arch, ctx),
    }
    model = saved.build()
    if given.to == "timm":
        from nas.export.hub import export_timm

        export_timm(saved, out)
        return {**result, "difference": _difference(model, _read_timm(out), images, 0.0)}
    network = model
    if given.fused:
        from nas.export.fuse import fuse_batch_norms

        network = saved.build()
        result["folded"] = fuse_batch_norms(network, images[:2])
        result["folding_difference"] = _difference(model, network, images, FUSED_TOLERANCE)
    again = _onnx(saved, network, images, out, given.opset) if given.to == "onnx" else _program(network, images, out)
    return {**result, "difference": _difference(model, again, images, TOLERANCE)}


def _read_timm(out: Path) -> Callable[[Tensor], Tensor]:
    import timm

    network: nn.Module = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    return network


def _onnx(
    saved: SavedModel, network: nn.Module, images: Tensor, out: Path, opset: int | None
) -> Callable[[Tensor], Tensor]:
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        remedy = 'pip install -e ".[onnx]"'
        raise refuse("--to", "onnx", "onnx, onnxscript and onnxruntime", remedy) from error
    import torch

    from nas.export.onnx import OPSET, export_onnx, metadata_of, opsets

    served = opsets()
    want = f"{served[0]} to {served[-1]}, which the installed exporter writes"
    if opset is not None and opset not in served:
        raise refuse("--opset", opset, want)
    export_onnx(network, images, out, any_batch=True, opset=opset or OPSET, metadata=metadata_of(saved))
    try:
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has its own kinds
        got = f"{opset or OPSET}, which ONNX Runtime {onnxruntime.__version__} does not run ({type(error).__name__})"
        raise refuse("--opset", got, want, "try a lower one") from error
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _program(network: nn.Module, images: Tensor, out: Path) -> Callable[[Tensor], Tensor]:
    import torch

    from nas.export.torch_export import export_program

    export_program(network, images, out)
    return torch.export.load(out).module()


def _difference(model: nn.Module, again: Callable[[Tensor], Tensor], images: Tensor, most: float) -> float:
    """Return the largest difference on batches of one, two and more; refuse more than `most`."""
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


def _measure(saved: SavedModel, out: Path, batch: int) -> dict[str, Any]:
    """Time the exported file, interleaved with the network in eager mode: one visit, without an interval."""
    from nas.core.requirement import Setting
    from nas.measure.throughput import prepare, time_prepared

    model, ctx = saved.build(), saved.context
    file = prepare(model, ctx=ctx, setting=Setting("cpu", "onnxruntime", batch=batch), staged=out)
    eager = prepare(model, ctx=ctx, setting=Setting("cpu", "eager", batch=batch))
    measured = time_prepared([file], eager)[0]
    names = ("images_per_s", "ratio", "batch", "threads", "fingerprint")
    return {"throughput": {name: getattr(measured, name) for name in names}}


def _print_result(result: dict[str, Any]) -> None:
    for note in result["notes"]:
        print(note)
    print(f"{result['out']}: {result['params']:,} parameters")
    if "folded" in result:
        moved = f"logits moved by {result['folding_difference']:.1e}"
        print(f"{result['folded']} batch norms folded, {moved}")
    print(f"read back: logits differ by {result['difference']:.1e} of the largest")
    pace = result.get("throughput")
    if pace is not None:
        print(
            f"ONNX Runtime: {pace['images_per_s']:.1f} images/s at batch {pace['batch']}, {pace['ratio']:.2f} times "
            "eager, in this one process; python -m benchmarks.throughput gives an interval"
        )
    if result["to"] == "onnx":
        from nas.export.onnx import RECIPE

        print(
            f"the class of an image, with Pillow, numpy and ONNX Runtime:\n{RECIPE.format(file=result['out'])}", end=""
        )
    if result["to"] == "timm":
        print(f'load it with: timm.create_model("local-dir:{result["out"]}", pretrained=True)')


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit status: 0, or 2 for bad input."""

    def work() -> int:
        given = build_parser().parse_args(argv)
        with contextlib.redirect_stdout(sys.stderr) if given.json else contextlib.nullcontext():
            result = export(given)
            _print_result(result)
        if given.json:
            print(json.dumps(result))
        return 0

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
