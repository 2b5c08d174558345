import io
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from neuclip.config.data_sections import MAX_IMAGE_PIXELS
from neuclip.data.decode import ImageDecoder, decode_image
from neuclip.data.samples import Unusable
from neuclip.model.clip import build_clip


def encode(image: Image.Image, kind: str = "png", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def photograph(width: int, height: int, seed: int = 0) -> Image.Image:
    """Blobs, edges and a little noise: smooth like a photograph, with detail like one."""
    chance = np.random.default_rng(seed)
    coarse = chance.uniform(0, 255, (height // 32 + 2, width // 32 + 2, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image).astype(np.int16)
    rows, columns = np.mgrid[:height, :width]
    inside = (rows - height // 2) ** 2 + (columns - width // 3) ** 2 < (
        min(width, height) // 4
    ) ** 2
    pixels[inside] = 255 - pixels[inside]
    pixels += chance.normal(0, 6, pixels.shape).astype(np.int16)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header claims a size; there is hardly anything in it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )  # fmt: skip

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b"")


def refused(content: bytes, decode: ImageDecoder | None = None) -> Unusable:
    with pytest.raises(Unusable) as error:
        (decode or ImageDecoder())(content)
    return error.value


# --- colours: as open_clip's convert("RGB"), but for 16-bit grey

MODES = {
    "L": ("L", "png"),
    "1": ("1", "png"),
    "LA": ("LA", "png"),
    "RGBA": ("RGBA", "png"),
    "CMYK": ("CMYK", "jpeg"),
    "P": ("P", "png"),
}


@pytest.mark.parametrize("name", MODES)
def test_colours_are_pillows(name):
    mode, kind = MODES[name]
    content = encode(photograph(40, 30).convert(mode), kind)
    expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert decode_image(content).tobytes() == expected.tobytes()


def test_palette_with_transparency_by_entry_neither_warns_nor_changes():
    image = photograph(20, 20).convert("P")
    content = encode(image, transparency=bytes(range(256)))
    assert isinstance(Image.open(io.BytesIO(content)).info["transparency"], bytes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = Image.open(io.BytesIO(content)).convert("RGB")
    assert decode_image(content).tobytes() == expected.tobytes()  # warnings are errors here


def test_sixteen_bit_grey_keeps_its_upper_bits():
    grey = (np.arange(64, dtype=np.uint16).reshape(8, 8) << 10) + 77
    decoded = np.asarray(decode_image(encode(Image.fromarray(grey))))
    assert (decoded == (grey >> 8)[..., None]).all()


def test_exif_rotation_is_left_alone_as_in_open_clip():
    image, exif = photograph(40, 30), Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter
    content = encode(image, "jpeg", exif=exif)
    assert decode_image(content).size == (40, 30)


# --- limits


def test_decompression_bomb_is_refused_by_its_header():
    assert MAX_IMAGE_PIXELS < (20_000 * 20_000)
    found = refused(png_of_size(20_000, 20_000))
    assert found.kind == "image_too_large"
    assert "20000 x 20000" in found.detail
    assert "--max-image-pixels 178956970" in found.detail


def test_limit_is_ours_and_pillows_own_is_untouched(monkeypatch):
    content = encode(Image.new("L", (30, 20)))
    assert refused(content, ImageDecoder(max_pixels=599)).kind == "image_too_large"
    assert ImageDecoder(max_pixels=600)(content).size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 250)  # Pillow would refuse twice as many
    assert ImageDecoder(max_pixels=600)(content).size == (30, 20)
    assert Image.MAX_IMAGE_PIXELS == 250


@pytest.mark.parametrize("size", [(1, 1), (20_000, 40), (40, 20_000), (1, 3000)])
@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_odd_sizes_are_fine(size, kind):
    content = encode(Image.new("RGB", size, (9, 200, 30)), kind)
    for decode in (ImageDecoder(), ImageDecoder.for_model(32)):
        assert abs(decode(content).getpixel((0, 0))[1] - 200) < 3
    assert build_clip_transform()(decode_image(content)).shape == (3, 32, 32)


# --- what is no picture

BROKEN = {
    "text": (b"not a picture", "image"),
    "nothing": (b"", "image"),
    "cut jpeg": (encode(photograph(64, 64), "jpeg")[:900], "image_truncated"),
    "cut png": (encode(photograph(64, 64))[:3000], "image_truncated"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "image"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_files_that_are_not_images(name):
    content, kind = BROKEN[name]
    found = refused(content)
    assert found.kind == kind
    assert found.detail


# --- reduced scale


def build_clip_transform(name="glyph-tiny"):
    return build_clip(name, "fp32", torch.device("cpu")).eval_transform


@pytest.mark.parametrize(
    ("size", "smallest", "expected"),
    [
        ((512, 512), 256, (256, 256)),
        ((512, 511), 256, (512, 511)),  # the shorter side would get below
        ((1025, 2048), 256, (257, 512)),
        ((4000, 3000), 256, (500, 375)),
        ((100, 100), 256, (100, 100)),
    ],
)
def test_scale_keeps_the_shorter_side(size, smallest, expected):
    content = encode(photograph(*size), "jpeg")
    assert ImageDecoder(smallest=smallest)(content).size == expected
    assert ImageDecoder()(content).size == size


def test_decoder_of_a_model_keeps_a_seventh_more():
    assert ImageDecoder.for_model(224) == ImageDecoder(MAX_IMAGE_PIXELS, 256)
    assert ImageDecoder.for_model(224, full=True, max_pixels=9) == ImageDecoder(9, None)


def test_the_decoder_keeps_enough_for_small_crops_and_may_have_no_limit():
    for area in (0.9, 0.4, 0.08):
        smallest = ImageDecoder.for_model(224, smallest_crop=area).smallest
        assert smallest is not None
        assert smallest * area**0.5 >= 224  # the smallest crop is not enlarged
    assert ImageDecoder(max_pixels=0)(encode(Image.new("RGB", (4000, 4))))


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    ("size", "mean", "worst"),
    [
        ((512, 512), 1.3, 24),
        ((1200, 900), 0.6, 10),
        ((2000, 3000), 0.5, 8),
        ((513, 777), 3.5, 50),  # the last half pixel becomes a whole one: all move by a little
    ],
)
def test_reduced_scale_differs_little_after_the_transform(size, mean, worst, mode, progressive):
    """Of 255 grey levels, on average and for the worst pixel in a thousand."""
    content = encode(photograph(*size).convert(mode), "jpeg", quality=90, progressive=progressive)
    transform = v2.Compose(
        [
            v2.Resize(224, interpolation=v2.InterpolationMode.BICUBIC, antialias=True),
            v2.CenterCrop(224),
            v2.PILToTensor(),
        ]
    )
    full = transform(decode_image(content)).float()
    reduced_image = ImageDecoder.for_model(224)(content)
    assert reduced_image.size[0] <= size[0] // 2 + 1
    difference = (transform(reduced_image).float() - full).abs()
    assert 0 < difference.mean() < mean
    assert difference.quantile(0.999) < worst


def test_only_jpegs_are_reduced():
    content = encode(photograph(512, 512))
    assert ImageDecoder(smallest=64)(content).size == (512, 512)
