"""TensorRT, through ONNX."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from nas.measure.runtimes.runtime import Order, Ready, Runtime

if TYPE_CHECKING:
    from nas.measure.runtimes.runtime import Images


class TensorRt(Runtime):
    """An engine that TensorRT built for this GPU from the exported network."""

    name = "tensorrt"
    needs = ("tensorrt", "onnx", "onnxscript")
    executes = ("tensorrt",)
    install = 'pip install tensorrt -e ".[onnx]"'
    devices = ("cuda",)

    def stage(self, order: Order) -> Path:
        """Export."""
        from nas.export.onnx import export_onnx

        return export_onnx(order.net, order.images, order.work / "net.onnx")

    def prepare(self, order: Order) -> Ready:
        """Export, build an engine, bind it to device memory that torch owns."""
        import tensorrt
        import torch

        from nas.measure.runtimes.eager import cuda_timer

        source = order.staged or self.stage(order)
        log = tensorrt.Logger(tensorrt.Logger.ERROR)
        builder = tensorrt.Builder(log)
        network = builder.create_network(0)
        parser = tensorrt.OnnxParser(network, log)
        if not parser.parse(source.read_bytes()):
            said = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
            raise RuntimeError(f"TensorRT does not take the network: {said}")
        settings = builder.create_builder_config()
        flags = {"float16": tensorrt.BuilderFlag.FP16, "bfloat16": tensorrt.BuilderFlag.BF16}
        if order.setting.dtype in flags:
            settings.set_flag(flags[order.setting.dtype])
        with torch.cuda.device(order.setting.device):
            built = builder.build_serialized_network(network, settings)
            if built is None:
                raise RuntimeError("TensorRT built no engine")
            engine = tensorrt.Runtime(log).deserialize_cuda_engine(built)
            context = engine.create_execution_context()
        images = order.images.to(order.setting.device)
        out = torch.empty(tuple(engine.get_tensor_shape("logits")), device=order.setting.device)
        context.set_tensor_address("images", images.data_ptr())
        context.set_tensor_address("logits", out.data_ptr())

        def once() -> None:
            context.execute_async_v3(torch.cuda.current_stream(order.setting.device).cuda_stream)

        def logits(of: Images) -> Images:
            kept = images.clone()
            images.copy_(torch.from_numpy(of))
            once()
            torch.cuda.synchronize(order.setting.device)
            found: Images = out.float().cpu().numpy().copy()
            images.copy_(kept)
            return found

        done = f"ONNX; engine in {order.setting.dtype}"
        return Ready(cuda_timer(once, order.setting), logits, done)
