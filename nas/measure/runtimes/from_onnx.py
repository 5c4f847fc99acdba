"""Runtimes that take ONNX files: ONNX Runtime and OpenVINO, in float and in int8."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from nas.measure.runtimes.ort_session import open_session
from nas.measure.runtimes.runtime import Order, Ready, Runtime

if TYPE_CHECKING:
    from nas.measure.runtimes.runtime import Images


def _stay_here() -> None:
    """Keep OpenVINO and NNCF from sending usage data: nobody was asked, and each sending forks."""
    try:
        from openvino_telemetry.backend.backend_ga4 import GA4Backend
    except ImportError:
        return
    GA4Backend.send = lambda *_, **__: None


def _exported(order: Order) -> Path:
    from nas.export.onnx import export_onnx

    return export_onnx(order.net, order.images, order.work / "net.onnx")


class OnnxRuntime(Runtime):
    """ONNX Runtime's own execution provider for the device, all graph optimisations on."""

    name = "onnxruntime"
    needs = ("onnxruntime", "onnx", "onnxscript")
    executes = ("onnxruntime",)
    install = 'pip install -e ".[onnx]"'
    dtypes = ("float32",)

    def prepare(self, order: Order) -> Ready:
        """Export and open a session."""
        return open_session(
            order.staged or self.stage(order),
            order.images.numpy(),
            device=order.setting.device,
            threads=order.threads,
            done=self.says(),
        )

    def stage(self, order: Order) -> Path:
        """Export."""
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

    def stage(self, order: Order) -> Path:
        """Export and quantise."""
        from nas.export.onnx import quantize_onnx

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
    install = 'pip install -e ".[openvino]"'
    devices = ("cpu",)
    dtypes: ClassVar[tuple[str, ...]] = ("float32", "bfloat16", "float16")
    says: ClassVar[str] = "ONNX"

    def prepare(self, order: Order) -> Ready:
        """Export, convert, compile."""
        import openvino

        _stay_here()
        core = openvino.Core()
        model = core.read_model(str(order.staged or self.stage(order)))
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
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        request = compiled.create_infer_request()
        bound = openvino.Tensor(order.images.numpy())
        request.set_input_tensor(0, bound)
        from nas.measure.runtimes.eager import cpu_timer

        def logits(images: Images) -> Images:
            found: Images = compiled(images)[0].astype("float32")
            return found

        return Ready(cpu_timer(request.infer), logits, f"{self.says}; executes in {used}")

    def stage(self, order: Order) -> Path:
        """Export."""
        return _exported(order)


class OpenVinoInt8(OpenVino):
    """OpenVINO in int8, by NNCF's post-training quantisation for transformers."""

    name = "openvino-int8"
    needs = ("openvino", "nncf", "onnx", "onnxscript")
    executes = ("openvino", "nncf")
    dtypes = ("float32",)
    tolerance = None
    calibrates = True

    says = "ONNX; int8 by NNCF (post-training, transformer)"

    def stage(self, order: Order) -> Path:
        """Export, quantise, and save in OpenVINO's own format."""
        import contextlib
        import io
        import logging

        _stay_here()
        import nncf
        import openvino

        logging.getLogger("nncf").setLevel(logging.ERROR)
        source = _exported(order)
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            made = nncf.quantize(
                openvino.Core().read_model(str(source)),
                nncf.Dataset(list(order.calibration)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(order.calibration),
            )
        target = order.work / "net-int8.xml"
        openvino.save_model(made, str(target), compress_to_fp16=False)
        return target


RUNTIMES = (OnnxRuntime, OnnxRuntimeInt8, OpenVino, OpenVinoInt8)
