"""The arithmetic of `docs/scale.md`: what labels for a billion images take, formula by formula."""

from __future__ import annotations

from dataclasses import dataclass

from nas.distill.codec import make_codec
from nas.distill.pieces import SEAL_BYTES, piece_records

IMAGES = 1_000_000_000
CLASSES = 21_841
KEY_BYTES = 16
JPEG_BYTES = 100_000
"""Assumed."""
GPUS = (8, 64, 512)
EPOCHS = (1, 10, 30, 90, 300)
VIEW_CORE_S = 3.4e-3
"""Measured on one CPU core: decode, crop and RandAugment of an image (`22k` preset)."""
GPU_HOURS_A_DEATH = 54 * 24 * 16_384 / 419
"""Interruptions of a training on 16,384 GPUs in 54 days (The Llama 3 Herd of Models, 2024)."""
NODE_GPUS = 8


@dataclass(frozen=True)
class Device:
    """An accelerator: dense bf16 TFLOP/s by its data sheet, and the share that a teacher reaches.

    The share is an assumption.
    """

    name: str
    peak_tflops: float
    reached: float = 0.45

    def images_per_s(self, macs: float) -> float:
        """Return images a second of a network of so many multiply-adds."""
        return self.reached * self.peak_tflops * 1e12 / (2 * macs)


DEVICES = (Device("H200", 989.0), Device("A100", 312.0))


def vit_macs(
    *, img_size: int = 224, patch: int = 14, width: int = 1024, depth: int = 24,
    classes: int = CLASSES,
) -> int:  # fmt: skip
    """Count the multiply-adds of a vision transformer with a class token; ViT-L/14 by default.

    Embedding, then 12 width^2 a token and 2 tokens^2 width of attention a block, then the head.
    """
    patches = (img_size // patch) ** 2
    tokens = patches + 1
    block = 12 * tokens * width**2 + 2 * tokens**2 * width
    return patches * 3 * patch**2 * width + depth * block + width * classes


def record_bytes(topk: int, classes: int = CLASSES) -> int:
    """Return the bytes of a packed record, as the codec has them."""
    return int(make_codec("packed", topk, classes).record_bytes)


def pieces_an_epoch(images: int = IMAGES) -> int:
    """Return how many files an epoch has."""
    return -(-images // piece_records(images))


def store_bytes(topk: int, epochs: int, images: int = IMAGES) -> int:
    """Return the bytes of a store: keys once, records and seals every epoch."""
    seals = SEAL_BYTES * pieces_an_epoch(images)
    return KEY_BYTES * images + epochs * (images * record_bytes(topk) + seals)


def gpu_hours(device: Device, epochs: int, images: int = IMAGES) -> float:
    """Return what asking the teacher takes."""
    return images * epochs / device.images_per_s(vit_macs()) / 3600


def piece_s(device: Device, images: int = IMAGES) -> float:
    """Return the seconds that one GPU takes for a piece."""
    return piece_records(images) / device.images_per_s(vit_macs())


def read_gb_per_s(device: Device, gpus: int) -> float:
    """Return the gigabytes of JPEG a second that so many GPUs eat."""
    return gpus * device.images_per_s(vit_macs()) * JPEG_BYTES / 1e9


def cores_a_gpu(device: Device) -> float:
    """Return the CPU cores that make views as fast as a GPU looks at them."""
    return device.images_per_s(vit_macs()) * VIEW_CORE_S


def deaths(device: Device, epochs: int) -> float:
    """Return the failures to expect in the whole building."""
    return gpu_hours(device, epochs) / GPU_HOURS_A_DEATH


def told() -> str:
    """Return all of it as lines of text."""
    lines = [
        f"ViT-L/14 at 224 px, {CLASSES:,} classes: {vit_macs() / 1e9:.2f} GMACs an image",
        f"pieces an epoch: {pieces_an_epoch():,} of {piece_records(IMAGES):,} records",
        f"key table: {KEY_BYTES * IMAGES / 1e9:.0f} GB",
    ]
    for topk in (10, 100):
        sizes = ", ".join(f"{e} epochs {store_bytes(topk, e) / 1e12:.3f} TB" for e in EPOCHS)
        lines.append(f"K = {topk}: {record_bytes(topk)} bytes a record; {sizes}")
    for device in DEVICES:
        speed = device.images_per_s(vit_macs())
        lines.append(
            f"{device.name}: {speed:,.0f} images/s, {piece_s(device):.1f} s a piece, "
            f"{cores_a_gpu(device):.1f} cores a GPU"
        )
        for epochs in EPOCHS:
            hours = gpu_hours(device, epochs)
            days = ", ".join(f"{n} GPUs {hours / n / 24:.2f} days" for n in GPUS)
            lines.append(
                f"  {epochs} epochs: {hours:,.0f} GPU-hours; {days}; "
                f"{deaths(device, epochs):.2f} failures"
            )
        reads = ", ".join(f"{n} GPUs {read_gb_per_s(device, n):.2f} GB/s" for n in GPUS)
        writes = ", ".join(
            f"K = {k} {512 * speed * record_bytes(k) / 1e6:.0f} MB/s" for k in (10, 100)
        )
        lines.append(f"  pixels: {reads}; labels of 512 GPUs: {writes}")
    return "\n".join(lines)
