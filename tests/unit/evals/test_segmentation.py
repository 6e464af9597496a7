"""Segmentation: windows, synonyms, background and mIoU by hand; VOC's, ADE20K's and Cityscapes' layouts; bad files."""

import base64
import io

import jax
import numpy as np
import pytest
from eval_data import encoded, eval_config, patch
from PIL import Image
from specs import EVAL_CLIP as CLIP

from diva_jax.common.errors import RunError, UserError
from diva_jax.common.fields import default_of
from diva_jax.evals import Settings, encode, segmentation_sets, stats
from diva_jax.evals.encoders import Encoder
from diva_jax.evals.tasks import segmentation
from diva_jax.models import backbones
from diva_jax.models.layers import Keys
from diva_jax.training import partition, sharding

COUNT = 3


def save_labels(path, labels, mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(labels.astype(np.uint8), "L")
    if mode == "P":
        image = Image.fromarray(labels.astype(np.uint8), "P")
        image.putpalette([v for i in range(256) for v in (255 - i, i, i // 2)])
    image.save(path)


def save(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def labels_of(i, top, ignored=255):
    """Rectangles of values 0..top, some ignored."""
    w, h = patch(i).size
    rng = np.random.default_rng(i)
    out = rng.integers(0, top + 1, (3, 4)).repeat(-(-h // 3), axis=0).repeat(-(-w // 4), axis=1)[:h, :w].copy()
    out[:3] = ignored
    return out


def write_voc(root, suffix="", classes=20):
    """PASCAL's layout; `suffix` is that of its two folders' names."""
    names = [f"2007_{i:06d}" for i in range(COUNT)]
    for i, name in enumerate(names):
        save(root / "JPEGImages" / f"{name}.jpg", encoded(patch(i), "JPEG"))
        save_labels(root / f"SegmentationClass{suffix}" / f"{name}.png", labels_of(i, classes), "P")
    save(root / "ImageSets" / f"Segmentation{suffix}" / "val.txt", "\n".join(names).encode())
    return root


def write_ade(root):
    for i in range(COUNT):
        save(root / "images" / "validation" / f"ADE_val_{i}.jpg", encoded(patch(i), "JPEG"))
        save_labels(root / "annotations" / "validation" / f"ADE_val_{i}.png", labels_of(i, 150, ignored=0))
    lines = ["Idx\tRatio\tTrain\tVal\tName"] + [f"{i}\t0.1\t9\t9\tthing {i}, other {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines))
    return root


def write_cityscapes(root):
    for i in range(COUNT):
        name = f"ulm/ulm_{i}_000019"
        save(root / "leftImg8bit" / "val" / f"{name}_leftImg8bit.png", encoded(patch(i)))
        save_labels(root / "gtFine" / "val" / f"{name}_gtFine_labelTrainIds.png", labels_of(i, 18))
    return root


def write_context(root):
    return write_voc(root, "Context", 59)


def write_coco(root, suffix, values):
    for i in range(COUNT):
        save(root / "images" / "val2017" / f"{i:012d}.jpg", encoded(patch(i), "JPEG"))
        labels = labels_of(i, len(values) - 1)
        raw = np.where(labels == 255, 255, np.array(values)[np.minimum(labels, len(values) - 1)])
        save_labels(root / "annotations" / "val2017" / f"{i:012d}{suffix}", raw)
    return root


def write_coco_object(root):
    return write_coco(root, "_instanceTrainIds.png", range(81))


def write_coco_stuff(root):
    """Pixel values as COCO-Stuff publishes them: the class's number in COCO less one; some numbers are not used."""
    unused = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91}
    return write_coco(root, ".png", [n - 1 for n in range(1, 183) if n not in unused])


LAYOUTS = {
    "voc20": write_voc,
    "voc21": write_voc,
    "context59": write_context,
    "context60": write_context,
    "ade20k": write_ade,
    "coco_object": write_coco_object,
    "coco_stuff": write_coco_stuff,
    "cityscapes": write_cityscapes,
}
# What a pixel's value says, by hand: the class, or None where it is ignored.
TRUTH = {name: lambda v, first=first: None if v == 255 or v < first else v - first
         for name, first in (("voc20", 1), ("voc21", 0), ("context59", 1), ("context60", 0), ("ade20k", 1),
                             ("coco_object", 0), ("cityscapes", 0))}  # fmt: skip
TRUTH["coco_stuff"] = lambda v: (
    None if v == 255 else v - sum(n - 1 < v for n in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91))
)


def prepare(path, bind=True, **options):
    section = default_of(segmentation)
    section.update({"allow_partial": True} | options)
    task = segmentation.prepare(str(path), section, Settings(bootstrap=200))
    if bind:
        task.bind(eval_config(CLIP, "x"), None)
    return task


class Fake:
    """Tokens and texts at random, the same for each window of the same pixels."""

    label = "fake"

    def __init__(self, seed=0):
        self.seed = seed

    def texts(self, texts):
        return np.random.default_rng(self.seed).standard_normal((len(texts), 5))

    def dense(self, read, count, last):
        self.windows = [read(n) for n in range(count)]
        self.last = last
        self.tokens = [np.random.default_rng([self.seed, n]).standard_normal((9, 5)) for n in range(count)]
        yield from self.tokens


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_and_miou(tmp_path, name):
    task = prepare(f"{name}={LAYOUTS[name](tmp_path)}")
    assert task.count == COUNT and len(task.names) == segmentation_sets.SETS[name].classes
    model = Fake()
    found = task.evaluate(model)
    assert model.last == "sclip" and all(w.shape == (42, 42, 3) for w in model.windows)
    classes = len(task.names)
    texts = np.stack(
        [unit(unit(t).mean(0)) for t in np.split(model.texts(range(80 * len(task.owner))), len(task.owner))]
    )
    both, union = np.zeros(classes), np.zeros(classes)
    for i, (_, label_path) in enumerate(task.pairs):
        h, w = task.sizes[i]
        assert min(h, w) == 63
        total, seen = np.zeros((h, w, len(texts))), np.zeros((h, w, 1))
        for n, (owner, y, x) in enumerate(task.windows):
            if owner == i:
                table = (unit(model.tokens[n]) @ texts.T).reshape(3, 3, -1)
                total[y : y + 42, x : x + 42] += bilinear(table, 42, 42)
                seen[y : y + 42, x : x + 42] += 1
        assert seen.min() >= 1
        raw = np.asarray(Image.open(label_path)).astype(int)
        logits = 40 * bilinear(total / seen, *raw.shape)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        best = np.stack([p[..., task.owner == c].max(-1) for c in range(classes)], -1).argmax(-1)
        said = [TRUTH[name](v) for v in range(256)]
        truth = np.array([-1 if c is None else c for c in said])[raw]
        counted = truth >= 0
        for c in range(classes):
            a, b = (best == c) & counted, (truth == c) & counted
            both[c] += (a & b).sum()
            union[c] += (a | b).sum()
    want = 100 * np.mean(both[union > 0] / union[union > 0])
    assert found.results["scores"]["miou"]["score"] == pytest.approx(want, rel=1e-3)
    low, high = found.results["scores"]["miou"]["interval"]
    assert 0 <= low <= high
    pictures = found.results["pictures"]
    assert [p["image"] for p in pictures] == [str(path.resolve()) for path, _ in task.pairs]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(pictures[-1]["truth"]))))
    np.testing.assert_array_equal(drawn, np.where(counted, truth, 255))
    after = task.evaluate(Fake(2))
    s = task.compare(found, after)["scores"]["miou"]
    assert s["difference"] == pytest.approx(after.results["scores"]["miou"]["score"] - want, rel=1e-2)
    assert task.compare(found, found)["scores"]["miou"]["interval"] == [0.0, 0.0]


def bilinear(table, height, width):
    """Half-pixel centres, edges repeated: each pixel from its four neighbours."""

    def sides(new, old):
        at = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
        first = at.astype(int)
        return first, np.minimum(first + 1, old - 1), at - first

    (y0, y1, dy), (x0, x1, dx) = sides(height, table.shape[0]), sides(width, table.shape[1])
    dy, dx = dy[:, None, None], dx[None, :, None]
    top = table[y0][:, x0] * (1 - dx) + table[y0][:, x1] * dx
    bottom = table[y1][:, x0] * (1 - dx) + table[y1][:, x1] * dx
    return top * (1 - dy) + bottom * dy


def test_class_lists():
    """The sizes of the published lists, and the ids of classes in COCO's annotations."""
    ids = {"person": 1, "stop sign": 13, "wine glass": 46, "toothbrush": 90, "banner": 92, "wood": 182}
    stuff = segmentation_sets.SETS["coco_stuff"]
    texts = stuff.names
    assert {name: stuff.values[texts.index(name)] + 1 for name in ids} == ids
    assert len(set(texts)) == 171
    context = segmentation_sets.SETS["context59"].names
    assert context.index("potted plant") == 39
    assert len(set(context)) == 59
    for found in segmentation_sets.SETS.values():
        assert len(found.values) == found.classes and not set(found.values) & set(found.ignored)


@pytest.mark.parametrize(
    "length, window, stride", [(63, 42, 21), (100, 42, 21), (42, 42, 21), (85, 42, 42), (43, 42, 7)]
)
def test_windows_cover_a_side(length, window, stride):
    found = segmentation.starts(length, window, stride)
    assert found[0] == 0 and found[-1] == length - window and found == sorted(set(found))
    assert all(b - a <= stride for a, b in zip(found, found[1:], strict=False))
    # mmsegmentation's count.
    assert len(found) == max(length - window + stride - 1, 0) // stride + 1


def test_synonyms_and_background():
    cosines = np.array([[[0.9, 0.1, 0.2], [0.1, 0.1, 0.5], [0.3, 0.31, 0.3]]])
    owner = np.array([0, 1, 1])
    assert segmentation.classify(cosines, owner, 40, 0.0).tolist() == [[0, 1, 1]]
    assert segmentation.classify(cosines, owner, 40, 0.7).tolist() == [[0, 1, 0]]
    # The maximum over synonyms comes after the softmax over all texts: two halves do not add up.
    tied = np.array([[[0.5, 0.49, 0.49]]])
    assert segmentation.classify(tied, owner, 1, 0.0).tolist() == [[0]]


def test_overlaps_ignore_what_has_no_label():
    p, t = np.array([[0, 1, 1], [2, 2, 0]]), np.array([[0, 1, 2], [2, -1, -1]])
    both, union = segmentation.overlaps(p, t, 4)
    assert both.tolist() == [1, 1, 1, 0] and union.tolist() == [1, 2, 2, 0]
    assert stats.mean_ratio(both, union) == pytest.approx((1 + 0.5 + 0.5) / 3)


def test_interval_of_ratios_is_plain_resampling():
    rng = np.random.default_rng(0)
    union = rng.integers(1, 50, (40, 3))
    both = (union * rng.random((40, 3))).astype(int)
    low, high = stats.bootstrap_ratios((both, union), resamples=4000, seed=1)
    draws = [rng.integers(0, 40, 40) for _ in range(4000)]
    plain = [np.mean(both[d].sum(0) / union[d].sum(0)) for d in draws]
    np.testing.assert_allclose([low, high], np.quantile(plain, (0.025, 0.975)), atol=0.01)


def test_tokens_over_devices_and_batches_and_that_they_are_finite():
    arrays = partition.disassemble(backbones.build(CLIP, rngs=Keys(3)))[1]
    windows = [np.asarray(patch(i).resize((42, 42))) for i in range(5)]
    found = []
    for devices, batch in ((1, 5), (8, 3)):
        mesh = sharding.make_mesh(eval_config(CLIP, "x").mesh, jax.devices()[:devices])
        towers = encode.Towers(CLIP, mesh, Settings(batch_size=batch))
        model = encode.Model("run", towers, Encoder(arrays, None, "", {}, ""), {}, np.zeros((0, 0)))
        found.append(np.stack(list(model.dense(windows.__getitem__, 5, "clearclip"))))
    assert found[0].shape == (5, 9, CLIP.embed_dim)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)
    arrays["proj/matrix"] = arrays["proj/matrix"] * np.nan
    with pytest.raises(RunError, match="run: the embeddings of 9 of 9 patches of a window are not finite"):
        next(model.dense(windows.__getitem__, 5, "clearclip"))


def test_class_names_from_a_file(tmp_path):
    write_voc(tmp_path / "voc")
    path = tmp_path / "names.txt"
    path.write_text("\n".join(["thing, any thing", *(f"c{i}" for i in range(19))]))
    task = prepare(f"voc20={tmp_path}/voc", classes=str(path))
    assert task.names[0] == ["thing", "any thing"] and list(task.owner[:3]) == [0, 0, 1]
    path.write_text("one\n")
    with pytest.raises(UserError, match="has 20 classes, not 1"):
        prepare(f"voc20={tmp_path}/voc", classes=str(path))
    with pytest.raises(UserError, match="classes=.*none.txt cannot be read"):
        prepare(f"voc20={tmp_path}/voc", classes=str(tmp_path / "none.txt"))


def test_bad_data_is_refused(tmp_path):
    root = write_voc(tmp_path / "voc")
    label = root / "SegmentationClass" / "2007_000001.png"
    for path, options, says in (
        (root, {}, "must read SET=FOLDER"),
        (f"coco={root}", {}, "must read SET=FOLDER"),
        (f"coco_stuff={root}", {}, "images/val2017 has no .jpg images"),
        (f"context60={root}", {}, "SegmentationContext/val.txt does not exist"),
        (f"ade20k={root}", {}, "images/validation has no .jpg images"),
        (f"cityscapes={root}", {}, "leftImg8bit/val has no _leftImg8bit.png images"),
        (f"voc21={tmp_path}", {}, "val.txt does not exist"),
        (f"voc21={root}", {"allow_partial": False}, "has 3 images, PASCAL VOC has 1449"),
        (f"voc20={root}", {"background": 0.1}, "voc20 has none"),
        (f"voc21={root}", {"short_side": 20}, "short_side=20 must be at least the window, 42"),
        (f"voc21={root}", {"stride": 50}, "stride=50"),
    ):
        with pytest.raises(UserError, match=says):
            prepare(path, **options)
    wrong = labels_of(1, 20)
    wrong[9, 9] = 77
    save_labels(label, wrong)
    with pytest.raises(UserError, match="2007_000001.png has the unknown label 77"):
        prepare(f"voc21={root}")
    save_labels(label, wrong[1:])
    with pytest.raises(UserError, match="2007_000001.png has the size"):
        prepare(f"voc21={root}")
    Image.fromarray(np.zeros((*wrong.shape, 3), np.uint8)).save(label)
    with pytest.raises(UserError, match="has the mode RGB"):
        prepare(f"voc21={root}")
    label.unlink()
    with pytest.raises(UserError, match="2007_000001.png cannot be read"):
        prepare(f"voc21={root}")


def test_towers_without_a_text_space_are_refused(tmp_path):
    task = prepare(f"voc21={write_voc(tmp_path)}", bind=False)
    config = eval_config(CLIP, "x")
    config.backbone.arch = "dinov2"
    with pytest.raises(UserError, match="segmentation needs patch tokens in the text's space"):
        task.bind(config, None)
