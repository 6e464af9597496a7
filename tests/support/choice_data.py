"""Made-up sets of choices in their published layouts."""

import json
from pathlib import Path

import eval_data


def sugarcrepe(root: Path, count: int = 7) -> Path:
    """`add_att.json`; keys are not contiguous, two rows share an image."""
    rows = {}
    for i in range(count):
        eval_data.write_image(root / "val2017" / f"{i // 2:012d}.jpg", i // 2)
        rows[str(3 * i)] = {
            "filename": f"{i // 2:012d}.jpg",
            "caption": f"thing {i}",
            "negative_caption": f"other {i % 4}",
        }
    (root / "add_att.json").write_text(json.dumps(rows))
    return root / "add_att.json"


def winoground(root: Path, count: int = 5) -> Path:
    lines = []
    for i in range(count):
        for j in (0, 1):
            eval_data.write_image(root / "images" / f"ex_{i}_img_{j}.png", 2 * i + j)
        row = {f"image_{j}": f"ex_{i}_img_{j}" for j in (0, 1)} | {f"caption_{j}": f"cap {i} {j}" for j in (0, 1)}
        lines.append(json.dumps(row | {"id": i, "tag": f"tag {i}", "collapsed_tag": ("Object", "Relation")[i % 2]}))
    (root / "examples.jsonl").write_text("\n".join(lines) + "\n")
    return root / "examples.jsonl"


def naturalbench(root: Path, count: int = 6) -> Path:
    rows = []
    for i in range(count):
        for j in (0, 1):
            eval_data.write_image(root / "images" / f"{i}_{j}.jpg", 2 * i + j)
        names = {f"image_{j}": f"{i}_{j}.jpg" for j in (0, 1)}
        rows.append({"index": i, **names, "caption_0": f"natural {i}", "caption_1": f"bench {i}"})
    (root / "metadata.json").write_text(json.dumps(rows))
    return root / "metadata.json"


def aro(root: Path, kind: str, counts: dict[str, int]) -> Path:
    """Relations or attributes, `counts` items of each class."""
    rows = []
    for name, count in counts.items():
        for _ in range(count):
            i = len(rows)
            eval_data.write_image(root / "images" / f"{i % 3}.jpg", i % 3)
            row = dict(image_path=f"{i % 3}.jpg", bbox_x=2 + i % 5, bbox_y=3, bbox_w=21, bbox_h=17 + i % 3)
            row |= dict(true_caption=f"true {i}", false_caption=f"false {i}")
            own = {"relation_name": name} if kind == "relation" else {"attributes": name.split("_")}
            rows.append(row | own)
    (root / f"visual_genome_{kind}.json").write_text(json.dumps(rows))
    return root / f"visual_genome_{kind}.json"


def whatsup(root: Path, kind: str = "images", sets: int = 3) -> Path:
    words = (
        ("left_of", "right_of", "on", "under") if kind == "images" else ("left_of", "right_of", "in-front_of", "behind")
    )
    rows = []
    for i in range(sets):
        for word in words:
            name = f"cup{i}_{word}_chair.jpeg"
            eval_data.write_image(root / f"controlled_{kind}" / name, len(rows))
            others = [w for w in words if w != word]
            options = [f"cup {i} {w} a chair" for w in (word, *others)]
            rows.append(dict(image_path=f"data/controlled_{kind}/{name}", caption_options=options))
    (root / f"controlled_{kind}_dataset.json").write_text(json.dumps(rows))
    return root / f"controlled_{kind}_dataset.json"


def whatsup_qa(root: Path, kind: str, count: int = 5) -> Path:
    rows = []
    for i in range(count):
        name = f"val2017/{i + 30:012d}.jpg" if kind.startswith("coco") else f"vg_images/{i + 30}.jpg"
        eval_data.write_image(root / name, i)
        rows.append([i + 30, f"a thing on the left {i}", f"a thing on the right {i}"])
    (root / f"{kind}.json").write_text(json.dumps(rows))
    return root / f"{kind}.json"


def valse(root: Path, count: int = 8) -> Path:
    rows = {}
    for i in range(count):
        eval_data.write_image(root / "VISUAL7W" / f"v{i}.jpg", i)
        votes = {"foil": i % 2, "caption": i % 4, "other": 0}
        rows[f"existence_{i}"] = dict(
            dataset="VISUAL7W", image_file=f"v{i}.jpg", caption=f"there are {i}", foil=f"there are no {i}", mturk=votes
        )
    (root / "existence.json").write_text(json.dumps(rows))
    return root / "existence.json"
