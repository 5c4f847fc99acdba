"""Runtimes that take ONNX files: ONNX Runtime and OpenVINO, in float and in int8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nas.measure.runtimes.base import Order, Ready, Runtime
from nas.measure.runtimes.session import open_session

if TYPE_CHECKING:
    from nas.measure.runtimes.base import Images


def _exported(order: Order) -> Path:
    from nas.exporting.onnx import export_onnx

    return export_onnx(order.model, order.images, order.work / "net.onnx")


class OnnxRuntime(Runtime):
    """ONNX Runtime's own execution provider for the device, all graph optimisations on."""

    name = "onnxruntime"
    needs = ("onnxruntime", "onnx", "onnxscript")
    executes = ("onnxruntime",)
    install = 'pip install "vision-contraction[onnx]"'
    dtypes = ("float32",)

    def prepare(self, order: Order) -> Ready:
        """Export and open a session."""
        return open_session(
            self.file(order),
            order.images.numpy(),
            device=order.setting.device,
            threads=order.threads,
            done=self.says(),
        )

    def file(self, order: Order) -> Path:
        """Write the file to run."""
        return _exported(order)

    def says(self) -> str:
        """Say what was done to the network."""
        return "ONNX"


class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime on weights and activations in int8, by its own static quantisation."""

    name = "onnxruntime-int8"
    devices = ("cpu",)
    tolerance = None
    calibrates = True

    def file(self, order: Order) -> Path:
        """Export and quantise."""
        from nas.exporting.onnx import quantize_onnx

        source = _exported(order)
        made = quantize_onnx(source, order.work / "net-int8.onnx", order.calibration)
        source.unlink()
        return made

    def says(self) -> str:
        """Say what was done to the network."""
        return "ONNX; int8 weights a channel, uint8 activations (static, QDQ)"


class OpenVino(Runtime):
    """OpenVINO's CPU plug-in, set for latency at the pinned number of threads."""

    name = "openvino"
    needs: ClassVar[tuple[str, ...]] = ("openvino", "onnx", "onnxscript")
    executes: ClassVar[tuple[str, ...]] = ("openvino",)
    install = 'pip install "vision-contraction[openvino]"'
    devices = ("cpu",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")

    def prepare(self, order: Order) -> Ready:
        """Export, convert, compile."""
        import openvino

        core = openvino.Core()
        source = _exported(order)
        model, done = self.changed(core.read_model(str(source)), order)
        hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[order.setting.dtype]
        compiled = core.compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": hint,
                "INFERENCE_NUM_THREADS": order.threads,
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
        source.unlink()
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        done += f"; executes in {used}"
        request = compiled.create_infer_request()
        bound = openvino.Tensor(order.images.numpy())
        request.set_input_tensor(0, bound)
        from nas.measure.runtimes.eager import cpu_timer

        def logits(images: Images) -> Images:
            found: Images = compiled(images)[0].astype("float32")
            return found

        return Ready(cpu_timer(request.infer), logits, done)

    def changed(self, model: Any, order: Order) -> tuple[Any, str]:
        """Change the converted network; returns it and what was done."""
        return model, "ONNX"


class OpenVinoInt8(OpenVino):
    """OpenVINO in int8, by NNCF's post-training quantisation for transformers."""

    name = "openvino-int8"
    needs = ("openvino", "nncf", "onnx", "onnxscript")
    executes = ("openvino", "nncf")
    dtypes = ("float32",)
    tolerance = None
    calibrates = True

    def changed(self, model: Any, order: Order) -> tuple[Any, str]:
        """Quantise."""
        import contextlib
        import io
        import logging

        import nncf

        logging.getLogger("nncf").setLevel(logging.ERROR)
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            made = nncf.quantize(
                model,
                nncf.Dataset(list(order.calibration)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(order.calibration),
            )
        return made, "ONNX; int8 by NNCF (post-training, transformer)"


RUNTIMES = (OnnxRuntime, OnnxRuntimeInt8, OpenVino, OpenVinoInt8)
