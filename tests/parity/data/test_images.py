"""Decoding, crops and views against Pillow, torchvision, PyTorch and kornia's formula."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import close
from PIL import Image
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as TF

from diva_jax.data import images, preprocess
from diva_jax.demo import examples
from diva_jax.models.backbones import IMAGENET_MEAN, IMAGENET_STD, OPENAI_MEAN, OPENAI_STD

SCALE, RATIO = (0.9, 1.0), (3 / 4, 4 / 3)


@pytest.fixture(scope="module")
def photographs():
    found = [Image.open(io.BytesIO(jpeg)).convert("RGB") for _, _, jpeg in examples(16)]
    return [*found, found[0].resize((61, 47)), found[1].convert("L").convert("RGB").resize((700, 333))]


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "lanczos"])
def test_bit_for_bit_torchvision(photographs, name):
    rng = np.random.default_rng(1)
    for i, image in enumerate(photographs):
        w, h = image.size
        boxes = [images.sample_box(rng, w, h, SCALE, RATIO), images.sample_box(rng, w, h, (0.05, 0.4), RATIO)]
        for box in [*boxes, (0, 0, w, h), (w - 17, h - 13, w, h)]:
            left, top, right, bottom = box
            size = (64, 224, 512)[i % 3]
            mode = InterpolationMode(name)
            expected = TF.resized_crop(image, top, left, bottom - top, right - left, [size, size], mode)
            ours = images.resized_crop(image, box, size, name)
            assert ours.dtype == np.uint8 and ours.shape == (size, size, 3)
            np.testing.assert_array_equal(ours, np.asarray(expected))


def boxes_of(width, height, scale, ratio, count):
    """(ours, torchvision's), each [count, 4] as top, left, height, width."""
    rng = np.random.default_rng(0)
    boxes = np.array([images.sample_box(rng, width, height, scale, ratio) for _ in range(count)])
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
    image = Image.new("RGB", (width, height))
    torch.manual_seed(0)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    return ours, theirs


@pytest.mark.parametrize(
    "width, height, scale",
    [
        (500, 375, SCALE),  # Attempts often fail: a ratio of 4:3 fits only narrow boxes at this scale.
        (301, 303, SCALE),
        (640, 427, (0.08, 1.0)),
        (90, 1000, SCALE),  # Always the central box.
    ],
)
def test_boxes_are_distributed_as_torchvisions(width, height, scale):
    count = 4000
    ours, theirs = boxes_of(width, height, scale, RATIO, count)
    assert (ours[:, :2] >= 0).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all() and (ours[:, 1] + ours[:, 3] <= width).all()
    h, w = ours[:, 2].astype(float), ours[:, 3].astype(float)
    assert (w / h).min() > RATIO[0] * 0.98 and (w / h).max() < RATIO[1] * 1.02
    for measure in (
        lambda b: b[:, 0],
        lambda b: b[:, 1],
        lambda b: b[:, 2] * b[:, 3] / (width * height),
        lambda b: np.log(b[:, 3] / b[:, 2]),
    ):
        a, b = measure(ours), measure(theirs)
        error = np.sqrt((a.var() + b.var()) / count)  # Of the difference of the means.
        assert abs(a.mean() - b.mean()) <= 4 * error + 1e-12
        assert abs(a.std() - b.std()) <= 0.08 * b.std() + 1e-12
        assert abs(np.quantile(a, 0.05) - np.quantile(b, 0.05)) <= 0.15 * b.std() + 1e-12


@pytest.mark.parametrize("width, height, ratio", [(90, 1000, RATIO), (1000, 90, RATIO), (100, 101, (0.2, 0.3))])
def test_the_central_box_is_torchvisions(width, height, ratio):
    ours, theirs = boxes_of(width, height, (2.0, 2.0), ratio, 3)  # Twice the image's area: nothing fits.
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "form, mode",
    [
        *(("JPEG", mode) for mode in ("RGB", "L", "CMYK")),
        *(("PNG", mode) for mode in ("RGB", "RGBA", "LA", "L", "P", "1", "I;16")),
        *(("WEBP", mode) for mode in ("RGB", "RGBA")),
    ],
)
def test_decode_is_pillows_convert(photographs, form, mode):
    data = io.BytesIO()
    if mode == "I;16":
        Image.fromarray(np.asarray(photographs[3].convert("L")).astype(np.uint16) * 257).save(data, form)
    else:
        image = photographs[3].convert(mode)
        if "A" in mode:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(data, form)
    stored = Image.open(io.BytesIO(data.getvalue()))
    assert stored.mode == mode
    image = images.decode(data.getvalue())
    assert image.mode == "RGB"
    # Pillow's own conversion of 16 bits clips instead of scaling.
    want = photographs[3].convert("L") if mode == "I;16" else stored
    np.testing.assert_array_equal(np.asarray(image), np.asarray(want.convert("RGB")))


def test_a_large_jpeg_is_decoded_in_full(photographs):
    """Pillow's draft mode would decode it at half the resolution for a small crop."""
    data = io.BytesIO()
    photographs[2].resize((1024, 768)).save(data, "JPEG")
    image = images.decode(data.getvalue())
    assert image.size == (1024, 768)
    np.testing.assert_array_equal(np.asarray(image), np.asarray(Image.open(data).convert("RGB")))


def broken_images():
    png, jpeg = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (40, 30)).save(png, "PNG")
    Image.effect_noise((64, 64), 50).save(jpeg, "JPEG")
    huge = bytearray(png.getvalue())
    huge[16:24] = (60000).to_bytes(4, "big") * 2  # Width and height in the header.
    return {
        "empty": b"",
        "text": b"<html>403 Forbidden</html>",
        "truncated JPEG": jpeg.getvalue()[: len(jpeg.getvalue()) // 2],
        "truncated PNG": png.getvalue()[:-30],
        "huge": bytes(huge),
        "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    }


@pytest.mark.parametrize("kind", broken_images())
def test_broken_images_raise(kind):
    with pytest.raises(Exception) as e:
        images.decode(broken_images()[kind])
    assert not isinstance(e.value, MemoryError)


# Up and down, odd sizes, not square.
SHAPES = [(64, 64, 28), (60, 60, 42), (42, 42, 60), (37, 53, 28), (51, 34, 48), (512, 512, 224)]


def random_images(*shape, dtype=np.float32):
    return np.random.default_rng(0).random((2, *shape, 3)).astype(dtype)


def torch_resize(x, size, mode, antialias):
    x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    y = F.interpolate(x, size=(size, size), mode=mode, antialias=antialias, align_corners=False)
    return y.permute(0, 2, 3, 1).numpy()


def torch_normalise(x, mean, std):
    x = torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)
    return TF.normalize(x, mean, std).permute(0, 2, 3, 1).numpy()


@pytest.mark.parametrize("h, w, size", SHAPES)
@pytest.mark.parametrize("mode", ["faithful", "exact"])
def test_backbone_view_is_torch_interpolate(h, w, size, mode):
    x, mean, std = random_images(h, w), OPENAI_MEAN, (0.2, 0.3, 0.25)
    if mode == "faithful":
        expected = torch_resize(torch_normalise(x, mean, std), size, "bilinear", False)
    else:
        expected = torch_normalise(torch_resize(x, size, "bicubic", True), mean, std)
    ours = jax.jit(lambda x: preprocess.backbone_view(x, size, mean, std, mode))(x)
    assert ours.dtype == jnp.float32
    # Both compute positions in float32: among 512 pixels they are rounded by 7e-6 pixels (root mean square), and the
    # image changes by at most half of itself from pixel to pixel.
    close(ours, expected, 4e-6)


def test_vae_view():
    x = random_images(31, 18)
    np.testing.assert_array_equal(preprocess.vae_view(x, "exact"), 2 * x - 1)
    seen = torch_normalise(x, OPENAI_MEAN, OPENAI_STD)
    # Denormalising is normalising with mean' = -mean/std, std' = 1/std.
    mean, std = np.array(IMAGENET_MEAN), np.array(IMAGENET_STD)
    back = torch_normalise(seen, tuple(-mean / std), tuple(1 / std))
    close(preprocess.vae_view(x, "faithful"), 2 * back - 1, 1e-6)
    contrast = std / np.array(OPENAI_STD)
    assert 0.81 < contrast.min() < contrast.max() < 0.87  # The range in the docstring.


def test_to_float_is_torchvisions_to_tensor():
    x = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    expected = TF.to_tensor(x[0]).permute(1, 2, 0).numpy()
    # Theirs is one rounding of 6e-8, ours at most two: compiled, it multiplies by the rounded 1 / 255.
    np.testing.assert_allclose(jax.jit(preprocess.to_float)(x)[0], expected, rtol=6e-7, atol=0)


def kornia_resize(x: torch.Tensor, size: int) -> torch.Tensor:
    """kornia.geometry.resize(x, size, "bicubic", align_corners=True, antialias=True) of square images, smaller ones."""
    sigma = max((x.shape[-1] / size - 1) / 2, 0.001)
    taps = int(max(4 * sigma, 3))
    taps += taps % 2 == 0
    at = torch.arange(taps) - taps // 2
    g = torch.exp(-(at**2) / (2 * sigma**2)).to(x)
    kernel = torch.outer(g, g) / g.sum() ** 2
    b, c, *_ = x.shape
    padded = F.pad(x, (taps // 2,) * 4, mode="reflect")
    blurred = F.conv2d(padded, kernel.expand(c, 1, taps, taps), groups=c)
    return F.interpolate(blurred, (size, size), mode="bicubic", align_corners=True)


@pytest.mark.parametrize("n, size", [(24, 21), (50, 14), (17, 30)])
def test_aligned_resize(n, size):
    x = np.random.default_rng(n).uniform(size=(2, n, n, 3)).astype(np.float32)
    torch_x = torch.from_numpy(x).permute(0, 3, 1, 2)
    larger = F.interpolate(torch_x, (size, size), mode="bicubic", align_corners=True)
    want = (kornia_resize(torch_x, size) if size < n else larger).permute(0, 2, 3, 1)
    close(preprocess.aligned_resize(jnp.asarray(x), size), want, 2e-6)
