"""Segmentation: windows, synonyms, background and mIoU by hand; VOC's, ADE20K's and Cityscapes' layouts; bad files."""

import base64
import dataclasses
import io

import numpy as np
import pytest
import trees
from eval_data import FakeModel, eval_config, evaluated, patch, prepared, unit, write_image
from helpers import refused
from PIL import Image
from scipy import ndimage
from specs import EVAL_CLIP as CLIP

from diva_jax.evals import stats
from diva_jax.evals.tasks import segmentation

COUNT = 3


def save_labels(path, labels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8), mode)
    if mode == "P":
        image.putpalette([v for i in range(256) for v in (255 - i, i, i // 2)])
    image.save(path)


def labels_of(i, values, ignored=255):
    """Rectangles of these values, some ignored."""
    w, h = patch(i).size
    drawn = np.random.default_rng(i).choice(values, (3, 4))
    out = drawn.repeat(-(-h // 3), axis=0).repeat(-(-w // 4), axis=1)[:h, :w].copy()
    out[:3] = ignored
    return out


# Numbers of COCO's classes that COCO-Stuff does not use; a pixel's value is the class's number less one.
UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
STUFF = [n - 1 for n in range(1, 183) if n not in UNUSED]
VOC = ("JPEGImages/2007_{:06d}.jpg", "SegmentationClass/2007_{:06d}.png", range(21), 255)
CONTEXT = (VOC[0], "SegmentationClassContext/2007_{:06d}.png", range(60), 255)
ADE = ("images/validation/ADE_val_{}.jpg", "annotations/validation/ADE_val_{}.png", range(151), 0)
CITY = ("leftImg8bit/val/ulm/ulm_{}_0_leftImg8bit.png", "gtFine/val/ulm/ulm_{}_0_gtFine_labelTrainIds.png")
COCO = ("images/val2017/{:012d}.jpg", "annotations/val2017/{:012d}")
# Set -> (names of an image and its labels, their values, the ignored one, what a value says: a class, or less than 0).
LAYOUTS = {
    "voc20": (*VOC, lambda v: v - 1),
    "voc21": (*VOC, lambda v: v),
    "context59": (*CONTEXT, lambda v: v - 1),
    "context60": (*CONTEXT, lambda v: v),
    "ade20k": (*ADE, lambda v: v - 1),
    "coco_object": (COCO[0], COCO[1] + "_instanceTrainIds.png", range(81), 255, lambda v: v),
    "coco_stuff": (COCO[0], COCO[1] + ".png", STUFF, 255, lambda v: v - sum(n - 1 < v for n in UNUSED)),
    "cityscapes": (*CITY, range(19), 255, lambda v: v),
}


def write(root, name):
    """Writes a set, with the lists of PASCAL's and the names of ADE20K's classes."""
    image, label, values, ignored, _ = LAYOUTS[name]
    for i in range(COUNT):
        write_image(root / image.format(i), i)
        save_labels(root / label.format(i), labels_of(i, values, ignored), "P" if "Class" in label else "L")
    listed, lines = "\n".join(f"2007_{i:06d}" for i in range(COUNT)), ["Idx\tRatio\tTrain\tVal\tName"]
    lines += [f"{i}\t0.1\t9\t9\tthing {i}, other {i}" for i in range(1, 151)]
    lists = {f"ImageSets/Segmentation{kind}/val.txt": listed for kind in ("", "Context")}
    trees.change(root, lists | {"objectInfo150.txt": "\n".join(lines)})
    return root


def prepare(path, bind=True, **options):
    task = prepared("segmentation", path, 200, **{"allow_partial": True} | options)
    if bind:
        task.bind(eval_config(dataclasses.replace(CLIP, image_size=44), "x"), None)  # Patches cover 42 pixels.
    return task


class Dense(FakeModel):
    def dense(self, read, count, last):
        self.windows, self.last = [read(n) for n in range(count)], last
        self.tokens = self.draw(count, 9)
        yield from self.tokens


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_miou(tmp_path, name):
    said = LAYOUTS[name][-1]
    task = prepare(f"{name}={write(tmp_path, name)}")
    assert task.count == COUNT and len(task.names) == segmentation.SETS[name].classes
    model, found, _ = evaluated(task, Dense)
    assert model.last == "sclip" and all(w.shape == (44, 44, 3) for w in model.windows)
    classes = len(task.names)
    texts = unit(np.stack([unit(model.texts(prompts)).mean(0) for prompts in task._prompts]))
    confused = np.zeros((classes, classes))
    for i, (_, label_path, _) in enumerate(task.pairs):
        h, w = task.sizes[i]
        assert min(h, w) == 66
        total, seen = np.zeros((h, w, len(texts))), np.zeros((h, w, 1))
        for n, (owner, y, x) in enumerate(task.windows):
            if owner == i:
                seen[y : y + 44, x : x + 44] += 1
                cosines = bilinear((unit(model.tokens[n]) @ texts.T).reshape(3, 3, -1), 42, 42)
                total[y : y + 44, x : x + 44] += np.pad(cosines, ((0, 2), (0, 2), (0, 0)), "edge")
        assert seen.min() >= 1
        raw = np.asarray(Image.open(label_path)).astype(int)
        logits = 40 * bilinear(total / seen, *raw.shape)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        best = np.stack([p[..., task.owner == c].max(-1) for c in range(classes)], -1).argmax(-1)
        truth = np.array([-1 if v == 255 else said(v) for v in range(256)])[raw]
        counted = truth >= 0
        np.add.at(confused, (truth[counted], best[counted]), 1)
    both, union = np.diag(confused), confused.sum(0) + confused.sum(1) - np.diag(confused)
    want = 100 * np.mean(both[union > 0] / union[union > 0])
    assert found.results["scores"]["miou"]["score"] == pytest.approx(want, rel=1e-3)
    maps = found.results["pictures"]
    assert [p["image"] for p in maps] == [str(path.resolve()) for path, _, _ in task.pairs]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(maps[-1]["truth"]))))
    np.testing.assert_array_equal(drawn, np.where(counted, truth, 255))
    assert task.compare(found, found)["scores"]["miou"]["interval"] == [0.0, 0.0]


def bilinear(table, height, width):
    """Half-pixel centres, edges repeated."""
    factors = height / table.shape[0], width / table.shape[1], 1
    return ndimage.zoom(table, factors, order=1, mode="nearest", grid_mode=True)


def test_class_lists_and_names_from_a_file(tmp_path):
    ids = {"person": 1, "stop sign": 13, "wine glass": 46, "toothbrush": 90, "banner": 92, "wood": 182}
    stuff, context = (segmentation.SETS[name] for name in ("coco_stuff", "context59"))
    assert {name: stuff.values[stuff.names.index(name)] + 1 for name in ids} == ids
    assert len(set(stuff.names)) == 171 and len(set(context.names)) == 59 and context.names.index("potted plant") == 39
    for found in segmentation.SETS.values():
        assert len(found.values) == found.classes and not set(found.values) & set(found.ignored)
    write(tmp_path / "voc", "voc20")
    path = tmp_path / "names.txt"
    path.write_text("\n".join(["thing, any thing", *(f"c{i}" for i in range(19))]))
    task = prepare(f"voc20={tmp_path}/voc", classes=str(path))
    assert task.names[0] == ["thing", "any thing"] and list(task.owner[:3]) == [0, 0, 1]


def test_synonyms_background_and_the_interval_of_ratios():
    cosines = np.array([[[0.9, 0.1, 0.2], [0.1, 0.1, 0.5], [0.3, 0.31, 0.3]]])
    owner = np.array([0, 1, 1])
    assert segmentation.classify(cosines, owner, 40, 0.0).tolist() == [[0, 1, 1]]
    assert segmentation.classify(cosines, owner, 40, 0.7).tolist() == [[0, 1, 0]]
    # The maximum over synonyms comes after the softmax over all texts: two halves do not add up.
    assert segmentation.classify(np.array([[[0.5, 0.49, 0.49]]]), owner, 1, 0.0).tolist() == [[0]]
    rng = np.random.default_rng(0)
    union = rng.integers(1, 50, (40, 3))
    both = (union * rng.random((40, 3))).astype(int)
    low, high = stats.bootstrap_ratios((both, union), resamples=4000, seed=1)
    plain = [np.mean(both[d].sum(0) / union[d].sum(0)) for d in [rng.integers(0, 40, 40) for _ in range(4000)]]
    np.testing.assert_allclose([low, high], np.quantile(plain, (0.025, 0.975)), atol=0.01)


def test_wrong_labels_and_towers_without_texts_are_refused(tmp_path):
    root = write(tmp_path, "voc21")
    label, wrong = root / "SegmentationClass" / "2007_000001.png", labels_of(1, range(21))
    wrong[9, 9] = 77
    for content, says in ((wrong, "has the unknown label 77"), (wrong[1:], "has the size")):
        save_labels(label, content)
        refused(f"2007_000001.png {says}", prepare, f"voc21={root}")
    Image.fromarray(np.zeros((*wrong.shape, 3), np.uint8)).save(label)
    refused("has the mode RGB", prepare, f"voc21={root}")
    save_labels(label, labels_of(1, range(21)))
    config = eval_config(CLIP, "x")
    config.backbone.arch = "dinov2"
    says = "segmentation needs patch tokens in the text's space"
    refused(says, prepare(f"voc21={root}", bind=False).bind, config, None)
