"""Runtimes of ONNX files: ONNX Runtime and OpenVINO, in float and in int8, and TensorRT. No torch at import."""

from __future__ import annotations

import contextlib
import io
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nas.measure.runtimes.eager import cpu_timer, cuda_timer
from nas.measure.runtimes.runtime import PreparedModel, Runtime, RuntimeRequest
from space.errors import refuse

if TYPE_CHECKING:
    from nas.measure.runtimes.runtime import Images


PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def open_session(path: Path, images: Any, *, device: str, threads: int, done: str) -> PreparedModel:
    """Open a file whose input is `images` and output `logits`, and bind it to images `[n,c,h,w]`.

    Inputs and outputs stay on the device while passes are timed. Refuses a device that this build of ONNX Runtime does
    not serve.
    """
    import onnxruntime

    kind, _, index = device.partition(":")
    provider = PROVIDERS[kind]
    if provider not in onnxruntime.get_available_providers():
        raise refuse("device", device, f"an ONNX Runtime with {provider}", "onnxruntime-gpu has it")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads spin while a network runs, as by default, but not on into the other network's block.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    providers: list[Any] = [(provider, {"device_id": int(index or 0)} if kind == "cuda" else {})]
    session = onnxruntime.InferenceSession(str(path), options, providers=providers)
    binding = session.io_binding()
    value = onnxruntime.OrtValue.ortvalue_from_numpy(images, kind, int(index or 0))
    binding.bind_ortvalue_input("images", value)
    binding.bind_output("logits", kind, int(index or 0))

    def once() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    def logits(of: Any) -> Any:
        return session.run(["logits"], {"images": of})[0]

    return PreparedModel(cpu_timer(once), logits, f"{done}; {provider}")


def _disable_telemetry() -> None:
    """Keep OpenVINO and NNCF from sending usage data: nobody agreed to it, and it forks."""
    try:
        from openvino_telemetry.backend.backend_ga4 import GA4Backend
    except ImportError:
        return
    GA4Backend.send = lambda *_, **__: None


def _exported(request: RuntimeRequest) -> Path:
    from nas.export.onnx import export_onnx

    return export_onnx(request.net, request.images, request.work / "net.onnx")


class OnnxFile(Runtime):
    """A runtime that executes an exported ONNX file; `changes` describes the file."""

    needs: ClassVar[tuple[str, ...]] = ("onnx", "onnxscript")
    dtypes: ClassVar[tuple[str, ...]] = ("float32",)
    changes = "ONNX"

    def stage(self, request: RuntimeRequest) -> Path:
        return _exported(request)


class OnnxRuntime(OnnxFile):
    """ONNX Runtime's own execution provider for the device, all graph optimisations on."""

    name = "onnxruntime"
    needs = ("onnxruntime", *OnnxFile.needs)
    executes = ("onnxruntime",)
    install = 'pip install -e ".[onnx]"'

    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        return open_session(
            request.staged or self.stage(request),
            request.images.numpy(),
            device=request.setting.device,
            threads=request.threads,
            done=self.changes,
        )


class OnnxRuntimeInt8(OnnxRuntime):
    """ONNX Runtime on weights and activations in int8, by its own static quantisation."""

    name = "onnxruntime-int8"
    devices = ("cpu",)
    tolerance = None
    calibrates = True
    changes = "ONNX; int8 weights a channel, uint8 activations (static, QDQ)"

    def stage(self, request: RuntimeRequest) -> Path:
        from nas.export.onnx import quantize_onnx

        source = _exported(request)
        made = quantize_onnx(source, request.work / "net-int8.onnx", request.calibration)
        source.unlink()
        return made


class OpenVino(OnnxFile):
    """OpenVINO's CPU plug-in, set for latency at the pinned number of threads."""

    name = "openvino"
    needs: ClassVar[tuple[str, ...]] = ("openvino", *OnnxFile.needs)
    executes: ClassVar[tuple[str, ...]] = ("openvino",)
    install = 'pip install -e ".[openvino]"'
    devices = ("cpu",)
    dtypes = Runtime.dtypes

    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        import openvino

        _disable_telemetry()
        core = openvino.Core()
        model = core.read_model(str(request.staged or self.stage(request)))
        hint = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[request.setting.dtype]
        compiled = core.compile_model(
            model,
            "CPU",
            {"INFERENCE_PRECISION_HINT": hint, "INFERENCE_NUM_THREADS": request.threads, "PERFORMANCE_HINT": "LATENCY"},
        )
        used = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        inference = compiled.create_infer_request()
        inference.set_input_tensor(0, openvino.Tensor(request.images.numpy()))

        def logits(images: Images) -> Images:
            found: Images = compiled(images)[0].astype("float32")
            return found

        done = f"{self.changes}; executes in {used}"
        return PreparedModel(cpu_timer(inference.infer), logits, done)


class OpenVinoInt8(OpenVino):
    """OpenVINO in int8, by NNCF's post-training quantisation for transformers."""

    name = "openvino-int8"
    needs = ("nncf", *OpenVino.needs)
    executes = ("openvino", "nncf")
    dtypes = ("float32",)
    tolerance = None
    calibrates = True
    changes = "ONNX; int8 by NNCF (post-training, transformer)"

    def stage(self, request: RuntimeRequest) -> Path:
        """Export, quantise, and save in OpenVINO's own format."""
        _disable_telemetry()
        import nncf
        import openvino

        logging.getLogger("nncf").setLevel(logging.ERROR)
        source = _exported(request)
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
            made = nncf.quantize(
                openvino.Core().read_model(str(source)),
                nncf.Dataset(list(request.calibration)),
                model_type=nncf.ModelType.TRANSFORMER,
                subset_size=len(request.calibration),
            )
        target = request.work / "net-int8.xml"
        openvino.save_model(made, str(target), compress_to_fp16=False)
        return target


class TensorRt(OnnxFile):
    """An engine that TensorRT built for this GPU from the exported network."""

    name = "tensorrt"
    needs = ("tensorrt", *OnnxFile.needs)
    executes = ("tensorrt",)
    install = 'pip install tensorrt -e ".[onnx]"'
    devices = ("cuda",)
    dtypes = Runtime.dtypes

    def prepare(self, request: RuntimeRequest) -> PreparedModel:
        """Export, build an engine, bind it to device memory that torch owns."""
        import tensorrt
        import torch

        source = request.staged or self.stage(request)
        log = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(log)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, log)
        if not parser.parse(source.read_bytes()):
            errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise RuntimeError(f"TensorRT does not take the network: {errors}")
        settings = builder.create_builder_config()
        flags = {"float16": tensorrt.BuilderFlag.FP16, "bfloat16": tensorrt.BuilderFlag.BF16}
        if request.setting.dtype in flags:
            settings.set_flag(flags[request.setting.dtype])
        with torch.cuda.device(request.setting.device):
            built = builder.build_serialized_network(network, settings)
            if built is None:
                raise RuntimeError("TensorRT built no engine")
            engine = tensorrt.Runtime(log).deserialize_cuda_engine(built)
            context = engine.create_execution_context()
        images = request.images.to(request.setting.device)
        out = torch.empty(tuple(engine.get_tensor_shape("logits")), device=request.setting.device)
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("logits", out.data_ptr())

        def once() -> None:
            context.execute_async_v3(torch.cuda.current_stream(request.setting.device).cuda_stream)

        def logits(of: Images) -> Images:
            kept = images.clone()
            images.copy_(torch.from_numpy(of))
            once()
            torch.cuda.synchronize(request.setting.device)
            found: Images = out.float().cpu().numpy().copy()
            images.copy_(kept)
            return found

        done = f"ONNX; engine in {request.setting.dtype}"
        return PreparedModel(cuda_timer(once, request.setting), logits, done)


RUNTIMES = (OnnxRuntime(), OnnxRuntimeInt8(), OpenVino(), OpenVinoInt8(), TensorRt())
