"""ONNX files of fixed resolution, by torch's exporter; int8 by ONNX Runtime's tools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from nas.export.saved_model import SavedModel
from space.errors import refuse

Images = npt.NDArray[np.float32]

OPSET = 20
"""Old enough for the runtimes of deployed boards (ONNX Runtime 1.17 and later)."""

RECIPE = """\
import json, numpy as np, onnxruntime; from PIL import Image, ImageOps
net = onnxruntime.InferenceSession("{file}", providers=["CPUExecutionProvider"]); about = \
net.get_modelmeta().custom_metadata_map; size, side, mean, std, classes, white = (json.loads(about[name]) \
for name in ("img_size", "resize", "mean", "std", "classes", "white"))
image = ImageOps.exif_transpose(Image.open(open("photo.jpg", "rb"))); image = (image if image.mode[0] != "I" else \
Image.fromarray((np.clip(np.asarray(image).astype(float), 0, white) * 255 / white).round().astype("uint8")))\
.convert("RGB"); image = image.resize([side * n // min(image.size) for n in \
image.size], Image.Resampling[about["interpolation"].upper()]); image = image.crop([round((n - size) / 2) + more \
for more in (0, size) for n in image.size])
best = net.run(None, {{"images": np.float32((np.asarray(image) / 255 - mean) / std).transpose(2, 0, 1)[None]}})[0]\
.argmax(); print(classes[best] if classes else best)
"""
"""Three lines that name the class of an image file as evaluation does; `{file}` is the ONNX file.

The file is opened here: given its path, Pillow scrambles uncompressed TIFFs that are turned by EXIF."""


def opsets() -> range:
    """Return the opsets that the installed exporter writes; asked for others, it writes another one without a word."""
    from onnxscript.version_converter import _version_converter as converter

    ends = (getattr(converter, f"SUPPORTED_{end}_ONNX_OPSET", OPSET) for end in ("MIN", "MAX"))
    lowest, highest = ends
    return range(int(lowest), int(highest) + 1)


def metadata_of(saved: SavedModel) -> dict[str, str]:
    """Return what an ONNX file carries of its model: names and plain text, numbers and lists as JSON."""
    seen, context = saved.preprocessing, saved.context
    values = {
        "classes": saved.classes,
        "img_size": context.img_size,
        "resize": math.floor(context.img_size / seen["crop_pct"]),
        **{name: seen[name] for name in ("mean", "std", "crop_pct")},
        "white": 2**saved.grey_bits - 1,
        "params": saved.family.count_params(saved.arch, context),
        "arch": saved.family.to_dict(saved.arch),
    }
    plain = {"interpolation": str(seen["interpolation"]), "family": saved.family.name}
    plain |= {"version": version("vision-contraction"), "producer": "vision-contraction"}
    return {**{name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}, **plain}


def export_onnx(
    model: nn.Module,
    images: Tensor,
    target: Path,
    *,
    any_batch: bool = False,
    opset: int = OPSET,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a network in eval mode as `target`, for images of exactly this shape `[n, c, h, w]`.

    With `any_batch` the number of images is left open (two or more are given). What the exporter raises comes through.
    """
    aside = target.with_name(target.name + ".part")
    open_batch = ({0: torch.export.Dim("batch")},) if any_batch else None
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=opset,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=open_batch,
            verbose=False,
        )
        assert program is not None
        written = program.model.opset_imports.get("")
        if written != opset:
            raise refuse("--opset", f"{opset}, and a file of opset {written}", "an opset that the exporter writes")
        program.model.metadata_props.update(metadata or {})
        program.save(str(aside), external_data=False)
    aside.replace(target)
    return target


def quantize_onnx(source: Path, target: Path, calibration: Sequence[Images]) -> Path:
    """Write an int8 version of an ONNX file by ONNX Runtime's static quantisation, in QDQ form.

    `calibration` are batches of the file's own shape. Weights are int8 a channel, activations uint8 by the range seen.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._batches = iter(calibration)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch}

    cleaned = target.with_name(target.name + ".cleaned")
    with _quiet():
        quant_pre_process(str(source), str(cleaned), skip_symbolic_shape=True)
        quantize_static(
            str(cleaned),
            str(target),
            Reader(),
            # Softmax and the sums of attention stay in float, as transformers need them.
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
    cleaned.unlink(missing_ok=True)
    return target


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    # Exporters report their progress on standard output and warn about what does not matter here.
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
