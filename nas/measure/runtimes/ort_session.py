"""An ONNX Runtime session ready to be timed. Needs numpy and onnxruntime alone: boards use it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nas.measure.runtimes.eager import cpu_timer
from nas.measure.runtimes.runtime import PreparedModel
from space.errors import refuse

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
