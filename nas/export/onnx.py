"""ONNX files of fixed resolution, by torch's exporter; int8 by ONNX Runtime's tools."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Images = npt.NDArray[np.float32]

OPSET = 20
"""Old enough for the runtimes of deployed boards (ONNX Runtime 1.17 and later)."""


def export_onnx(model: nn.Module, images: Tensor, target: Path, *, any_batch: bool = False) -> Path:
    """Write a network in eval mode as `target`, for images of exactly this shape `[n, c, h, w]`.

    With `any_batch` the number of images is left open (two or more are given). The input is called
    `images`, the output `logits`. Weights are inside the file. What the exporter raises comes
    through.
    """
    aside = target.with_name(target.name + ".part")
    open_batch = ({0: torch.export.Dim("batch")},) if any_batch else None
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            model,
            (images,),
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=open_batch,
            verbose=False,
        )
        assert program is not None
        program.save(str(aside), external_data=False)
    aside.replace(target)
    return target


def quantize_onnx(source: Path, target: Path, calibration: Sequence[Images]) -> Path:
    """Write an int8 version of an ONNX file by ONNX Runtime's static post-training quantisation.

    `calibration` are batches of the file's own shape. Weights are int8 a channel, activations
    uint8 by the range seen, in QDQ form.
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
