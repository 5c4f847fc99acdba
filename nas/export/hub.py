"""A folder in the Hugging Face hub's layout, which plain timm loads."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nas.export.saved_model import SavedModel

USAGE = """\
```python
import json, numpy as np, timm
from PIL import Image, ImageOps
image = ImageOps.exif_transpose(Image.open(open("photo.jpg", "rb")))  # upright, as in training
if image.mode[0] == "I":  # 16 or 32 bits: white is {white}, as in the training images
    grey = np.asarray(image).astype(float).clip(0, {white})
    image = Image.fromarray((grey * 255 / {white}).round().astype("uint8"))
model = timm.create_model("local-dir:{folder}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
best = model(transform(image.convert("RGB"))[None]).argmax().item()
print(json.load(open("{folder}/config.json"))["label_names"][best])
```"""
"""A prediction on an image file, read as `nas.data.decode.as_rgb` does; `{folder}` is the export's folder,
`{white}` that of deep grey."""

BACKBONE = """\
```python
backbone = timm.create_model("local-dir:{folder}", pretrained=True, features_only=True)
maps = backbone(images)   # strides: {strides}; channels: {channels}
```"""


TIMM_VALIDATION = """\
timm's own validation script sorts class folders by another rule (1, 2, 10), so it is given the order of the classes:
`python validate.py --model local-dir:{folder} --pretrained --class-map {folder}/class_map.txt --data-dir IMAGES`
(with `--input-key ".jpg;.png;.webp"` for files of other endings than .jpg, .jpeg and .png, which it leaves out).
It takes the folder that an image lies in for its class and leaves out images of other folders. It does not turn
pictures by EXIF and cuts off more than 8 bits; transformers does the latter too."""

NO_CLASS_MAP = """\
timm's own validation script sorts class folders by another rule (1, 2, 10), and no class map for it holds names with
line breaks or with blanks at their ends: rename these classes to use it."""

TRANSFORMERS = """\
```python
from transformers import pipeline
print(pipeline("image-classification", model="{folder}")("photo.jpg"))
```"""

CLASS_MAP = "class_map.txt"
_OWN = {
    *("input_size", "fixed_input_size", "interpolation", "crop_pct", "crop_mode", "mean", "std"),
    *("num_classes", "first_conv", "classifier", "custom_load"),
}
"""What is written of timm's description of the model's name; the rest (tag, license, paper) is of other weights."""


def export_timm(saved: SavedModel, out: Path) -> Path:
    """Write config.json, model.safetensors, class_map.txt and README.md (the model card) in a new folder `out`."""
    from timm.models import save_for_hf

    out.mkdir()
    _, kwargs = saved.timm_call
    model = saved.build()
    names = {"label_names": saved.classes} if saved.classes else {}
    save_for_hf(model, str(out), model_config=names, model_args=kwargs, safe_serialization=True)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    described = {k: v for k, v in config["pretrained_cfg"].items() if k in _OWN}
    config["pretrained_cfg"] = {**described, **saved.preprocessing, "pool_size": None}
    # timm and transformers take the number of classes from the root; transformers refuses a second one.
    del config["model_args"]["num_classes"]
    if "grey_bits" in saved.record:
        config["grey_bits"] = saved.grey_bits
    (out / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    if saved.classes and _in_lines(saved.classes):
        (out / CLASS_MAP).write_text("".join(f"{name}\n" for name in saved.classes), encoding="utf-8")
    (out / "README.md").write_text(card(saved, model, out), encoding="utf-8")
    return out


def _in_lines(names: Sequence[str]) -> bool:
    """Return whether timm, which strips lines, reads the names back from lines."""
    return all(name == name.strip() and not {"\n", "\r"} & set(name) for name in names)


def card(saved: SavedModel, model: Any, out: Path) -> str:
    """Return the model card: arch, data, scores, throughput with its device, lineage, usage."""
    values = (saved.run.get("config"), saved.record.get("throughput"), saved.record.get("score"))
    config, throughput, score = (value if isinstance(value, dict) else {} for value in values)
    maps = dict.fromkeys((f["reduction"], f["num_chs"]) for f in model.feature_info)
    strides, channels = ([pair[at] for pair in maps] for at in (0, 1))
    # Another program's weights may name no classes.
    usage = USAGE if saved.classes else re.sub(r"print\(.*\)", "print(best)", USAGE)
    validation = TIMM_VALIDATION.format(folder=out.name) if _in_lines(saved.classes) else NO_CLASS_MAP
    lines = [
        "---",
        "library_name: timm",
        "pipeline_tag: image-classification",
        "tags: [image-classification, timm, transformers]",
        "---",
        f"# {saved.family.label(saved.arch)}",
        "",
        _sentence(saved, config),
        "",
        *_bullets("Scores", _scores(score)),
        *_bullets("Throughput", _throughput(throughput)),
        *_bullets("Lineage", _lineage(saved, config)),
        "## A prediction",
        "",
        usage.format(folder=out.name, white=2**saved.grey_bits - 1),
        "",
        "With transformers:",
        "",
        TRANSFORMERS.format(folder=out.name),
        "",
        *((validation, "") if saved.classes else ()),
        "## As a backbone",
        "",
        BACKBONE.format(folder=out.name, strides=strides, channels=channels),
        "",
    ]
    return "\n".join(lines)


def _sentence(saved: SavedModel, config: Any) -> str:
    size, counted = saved.context.img_size, (saved.arch, saved.context)
    params, macs = saved.family.count_params(*counted), saved.family.count_macs(*counted)
    parts = f"{params:,} parameters, {macs / 1e6:,.0f} M multiply-adds"
    data = config.get("data")
    where = f" Trained on `{Path(str(data)).name}`." if data else ""
    many = saved.context.num_classes
    return f"{parts}, for images of {size} x {size} pixels and {many} classes.{where}"


def _bullets(title: str, lines: list[str]) -> list[str]:
    return [f"## {title}", "", *(f"- {line}" for line in lines), ""] if lines else []


def _scores(score: Any) -> list[str]:
    found = []
    for name, key in (("test top-1", "test_top1"), ("holdout top-1", "holdout_top1"), ("holdout top-1", "top1")):
        value, error = score.get(key), score.get(f"{key}_se")
        if isinstance(value, int | float):
            spread = f" +- {error:.1%}" if isinstance(error, int | float) else ""
            many = f" on {score.get('test_n', '?')} images" if key == "test_top1" else ""
            found.append(f"{name}: {value:.1%}{spread}{many}")
    if isinstance(score.get("soft_loss"), int | float):
        found.append(f"soft loss on the holdout: {score['soft_loss']:.4f}")
    return found


def _throughput(measured: Any) -> list[str]:
    real = ("images_per_s", "images_per_s_lo", "images_per_s_hi")
    if not all(isinstance(measured.get(name), int | float) for name in real):
        return []
    names = ("runtime", "dtype", "batch", "threads", "device", "fingerprint")
    known = {name: measured.get(name, "?") for name in names}
    where = "{runtime}, {dtype}, batch {batch}, {threads} threads".format(**known)
    interval = f"[{measured['images_per_s_lo']:.1f}, {measured['images_per_s_hi']:.1f}]"
    lines = [
        f"{measured['images_per_s']:.1f} images/s {interval} on {known['device']} ({where}; "
        f"device fingerprint {known['fingerprint']})"
    ]
    if isinstance(measured.get("ratio"), int | float):
        lines.append(f"{measured['ratio']:.2f} times the seed's, timed in turns with it")
    return lines


def _lineage(saved: SavedModel, config: Any) -> list[str]:
    if not config:
        return []
    recipe = config.get("recipe")
    if isinstance(recipe, dict):
        origin = Path(str(config.get("arch_from", "?")))
        start = Path(str(config.get("init", "?"))).name
        return [
            f"arch of {'/'.join(origin.parts[-2:])}, trained from {start}",
            f"recipe {recipe.get('name')}, {recipe.get('epochs')} epochs, whole batches of "
            f"{recipe.get('batch_size')}, random seed {config.get('random_seed')}",
        ]
    target = config.get("target_params")
    reached = f" of family {saved.family.name} to {target:,} parameters" if isinstance(target, int) else ""
    return [
        f"contracted from the seed {Path(str(config.get('seed', ''))).stem}{reached}",
        f"strategy {config.get('strategy')}, random seed {config.get('random_seed')}",
    ]
