"""What lies beside an exported file: where its network comes from, what it reaches, how it is used, whose it is."""

from collections.abc import Mapping
from typing import Any

from metric_kd.deploy.export import INPUT, OUTPUT
from metric_kd.models import default_pixels

USAGE = {
    "onnx": """import numpy as np, onnxruntime
from PIL import Image, ImageOps

session = onnxruntime.InferenceSession("{file}")
image = np.asarray(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB")).transpose(2, 0, 1)[None]
embedding = session.run(None, {{"{input}": image}})[0]""",
    "pt2": """import numpy as np, torch
from PIL import Image, ImageOps

network = torch.export.load("{file}").module()
image = torch.tensor(np.asarray(ImageOps.exif_transpose(Image.open("image.jpg")).convert("RGB"))).permute(2, 0, 1)[None]
embedding = network(image{move})""",
}
"""Programs that embed one image, without this package; a run of them is a test."""


def contents(
    file: str,
    device: str,
    metadata: Mapping[str, str],
    run: Mapping[str, Any],
    config: Mapping[str, Any],
    measured: Any,
) -> dict[str, Any]:
    """The card as plain values. run: a run's card.json; config: its config.yaml; both may be empty. Paths are not told."""
    teacher = config.get("teacher_base") if config.get("teacher_load") else None
    return {
        "file": file,
        "network": dict(metadata),
        "contract": {
            "input": f"{INPUT}: (N, 3, H, W) uint8, RGB, any N, H and W; all images of a call have one size",
            "output": f"{OUTPUT}: (N, {metadata['embedding_size']}) float32"
            + (", of length 1" if metadata["normalised"] == "true" else "")
            + _space(metadata),
            "view": f"resized and cropped to {metadata['input_size']} px, and normalised, inside the graph",
            "orientation": "images are taken as stored: turn them by their EXIF entry before",
            "device": device,
        },
        "training": {
            "task": config.get("task"),
            "data": run.get("data") or {"name": config.get("dataset")},
            "losses": run.get("losses") or config.get("loss"),
            "teacher": teacher,
            "epochs": run.get("epochs") or config.get("epochs"),
            "seed": run.get("seed", config.get("seed")),
            "pretrained": config.get("pretrained"),
            "environment": run.get("environment"),
        },
        "metrics": {"selection": run.get("selection"), **(run.get("metrics") or {})},
        "export": measured,
        "licence": licence(metadata, config),
    }


def _space(metadata: Mapping[str, str]) -> str:
    """Whose vectors they can be compared with, where those of another network are meant."""
    if metadata.get("shares_space") != "true":
        return ""
    through = "" if metadata["bridge"] == "none" else f", through a {metadata['bridge']} bridge"
    return f", in the space of the teacher (weights {metadata['teacher']}){through}"


def licence(metadata: Mapping[str, str], config: Mapping[str, Any]) -> str:
    """What a user has to settle; nothing here can know it."""
    sentences = [
        "No licence comes with the weights: they are made from your images, and what those permit holds for them."
    ]
    chosen = config.get("pretrained", "false")
    if chosen != "false" and (chosen != "auto" or default_pixels(metadata["base"]) is not None):
        sentences.append(
            f"If training began from published weights (--pretrained {chosen}), those have a licence, and "
            "the images that they were trained on (ImageNet: research, non-commercial) have terms."
        )
    if config.get("teacher_load"):
        sentences.append("The same holds for the teacher's weights and images.")
    return " ".join(sentences)


def text(card: Mapping[str, Any], form: str) -> str:
    """The card in Markdown."""
    network, training = card["network"], card["training"]
    move = "" if card["contract"]["device"] == "cpu" else f'.to("{card["contract"]["device"]}")'
    usage = USAGE[form].format(file=card["file"], input=INPUT, move=move)
    lines = [
        f"# {network['name']}",
        "",
        f"{network['base']}, exported as {card['file']} by metric_kd {network['metric_kd']}.",
    ]
    lines += ["", "## Input and output", "", *(f"- {key}: {value}" for key, value in card["contract"].items())]
    lines += ["", "```python", usage, "```", "", "## Training", ""]
    lines += [f"- {key}: {value}" for key, value in _training(training).items()]
    lines += ["", "## Metrics", "", *_metrics(card["metrics"]), "", "## Export", ""]
    lines += [f"- {line}" for line in card["export"]["lines"]]
    lines += ["", *_table(card["export"]["rows"]), "", "## Licence", "", card["licence"], ""]
    lines += [f"Weights {network['weights']}; the file's SHA-256 is {card['export']['sha256']}.", ""]
    return "\n".join(lines)


def _training(training: Mapping[str, Any]) -> dict[str, Any]:
    data = training["data"]
    said = data.get("name") or "not known"
    for part in ("train", "test"):
        if part in data:
            said += f", {part}: {data[part][0]:,} images of {data[part][1]:,} classes"
    versions = training["environment"] or {}
    return {
        "data": said,
        "task": training["task"] or "not known",
        "losses": ", ".join(training["losses"] or ["not known"]),
        "teacher": training["teacher"] or "none",
        "epochs": training["epochs"] or "not known",
        "seed": "not known" if training["seed"] is None else training["seed"],
        "pretrained": training["pretrained"] or "not known",
        "versions": ", ".join(f"{key} {versions[key]}" for key in ("metric_kd", "python", "torch") if key in versions)
        or "not known",
    }


def _metrics(metrics: Mapping[str, Any]) -> list[str]:
    found = metrics.get("best") or {}
    if not found:
        return ["Not known."]
    return [f"- {key}: {100 * value:.2f}% ({metrics['selection']})" for key, value in found.items()]


def _table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown of what was measured, one line per way to run the network."""
    lines = ["| | MB | ms per image, one by one | ms per image, 64 at once | Recall@1 |", "|---|---|---|---|---|"]
    for row in rows:
        recall = "" if row["recall@1"] is None else f"{100 * row['recall@1']:.2f}"
        one, many = row["ms"]
        lines.append(f"| {row['name']} | {row['bytes'] / 1e6:.1f} | {one:.2f} | {many:.2f} | {recall} |")
    return lines
