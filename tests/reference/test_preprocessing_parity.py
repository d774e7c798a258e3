"""How pictures come to a model's size, against transformers' processors and the rules that open_clip documents.

open_clip's own transforms need torchvision, of which there is no CPU build; its rules are written out below with
Pillow, after open_clip 3.3 `transform.py` (`image_transform`, not training) and torchvision's `Resize`, `CenterCrop`.
"""

import io

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from reverie import media
from reverie.media import RESAMPLES, on_white
from reverie.pictures import to_signal

pytestmark = pytest.mark.reference

SHAPES = [
    (70, 50),
    (50, 70),
    (64, 64),
    (300, 7),
    (7, 300),
    (1, 40),
    (40, 1),
    (1, 1),
    (31, 33),
    (224, 225),
    (640, 481),
]
ANY = given(
    width=st.integers(1, 400),
    height=st.integers(1, 400),
    size=st.integers(1, 96),
    resample=st.sampled_from(RESAMPLES),
)
OFTEN = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


def noise(width, height, mode="RGB"):
    draw = np.random.default_rng([width, height])
    levels = draw.integers(0, 256, (height, width, len(mode)), dtype=np.uint8)
    return Image.fromarray(levels[..., 0] if mode == "L" else levels)


def filter_of(resample):
    return Image.Resampling[resample.upper()]


def open_clip(picture, size, mode, resample, fill=0):
    """open_clip's `image_transform(size, is_train=False, resize_mode=mode, fill_color=fill)` up to `ToTensor`."""
    how = filter_of(resample)
    high, wide = (size, size) if isinstance(size, int) else size
    if mode == "squash":
        return np.asarray(picture.resize((wide, high), how))
    width, height = picture.size
    if mode == "shortest" and wide == high:  # torchvision's Resize(int)
        short, long = sorted((width, height))
        new = (size, int(size * long / short))
        picture = picture.resize(new if width <= height else new[::-1], how)
    else:  # ResizeKeepRatio
        ratios = (height / high, width / wide)
        ratio = min(ratios)
        picture = picture.resize((round(width / ratio), round(height / ratio)), how)
    canvas = Image.new("RGB", (max(wide, picture.width), max(high, picture.height)), (fill,) * 3)
    canvas.paste(picture, (max(0, wide - picture.width) // 2, max(0, high - picture.height) // 2))
    top, left = round((canvas.height - high) / 2.0), round((canvas.width - wide) / 2.0)
    return np.asarray(canvas.crop((left, top, left + wide, top + high)))


@pytest.fixture(scope="module")
def processors():
    pytest.importorskip("transformers")
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    plain = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    return CLIPImageProcessorPil(**plain), SiglipImageProcessorPil(**plain)


def clip_of(processors, picture, size, resample="bicubic"):
    asked = {"size": {"shortest_edge": size}, "crop_size": {"height": size, "width": size}}
    return processors[0](picture, resample=filter_of(resample), **asked)["pixel_values"][0]


def siglip_of(processors, picture, size, resample="bicubic"):
    asked = {"size": {"height": size, "width": size}, "resample": filter_of(resample)}
    return processors[1](picture, **asked)["pixel_values"][0]


def close(ours, theirs):
    """Equal but for the rounding of float32."""
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() < 1e-6


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [16, 57, 224])
def test_transformers(processors, shape, size):
    picture = noise(*shape)
    assert close(to_signal(picture, size=size), clip_of(processors, picture, size))
    assert close(to_signal(picture, size=size, fit="squash"), siglip_of(processors, picture, size))


@OFTEN
@ANY
def test_transformers_at_any_size(processors, width, height, size, resample):
    picture = noise(width, height)
    ours = to_signal(picture, size=size, resample=resample)
    assert close(ours, clip_of(processors, picture, size, resample))
    ours = to_signal(picture, size=size, fit="squash", resample=resample)
    assert close(ours, siglip_of(processors, picture, size, resample))


@OFTEN
@ANY
@example(width=70, height=53, size=50, resample="bicubic")
def test_open_clip_at_any_size(width, height, size, resample):
    picture = noise(width, height)
    for fit, mode in (("crop_even", "shortest"), ("squash", "squash")):
        ours = on_white(picture, size, fit=fit, resample=resample)
        assert (ours == open_clip(picture, size, mode, resample)).all(), fit


@OFTEN
@given(
    width=st.integers(1, 300), height=st.integers(1, 300), high=st.integers(2, 60), wide=st.integers(2, 60)
)
def test_open_clip_of_a_box_that_is_not_square(width, height, high, wide):
    picture = noise(width, height)
    if high != wide:
        ours = on_white(picture, (high, wide), fit="crop_even")
        assert (ours == open_clip(picture, (high, wide), "shortest", "bicubic")).all()


def test_the_two_public_crops_differ_where_a_quarter_of_all_shapes_do(processors):
    """transformers rounds the crop's offset down, torchvision to even: of 3 spare columns it leaves 1, or 2."""
    picture = noise(53, 50)
    down, even = (on_white(picture, 50, fit=fit) for fit in ("crop", "crop_even"))
    whole = np.asarray(picture)
    assert (down == whole[:, 1:51]).all()
    assert (even == whole[:, 2:52]).all()


@pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
@pytest.mark.parametrize("shape", [(70, 50), (1500, 900), (900, 1601)])
def test_files(processors, tmp_path, form, shape):
    """A file has the pixels of the picture that a decoder makes of it: none is decoded small."""
    noise(*shape).save(tmp_path / "a", form)
    picture = Image.open(tmp_path / "a").convert("RGB")
    for size in (32, 224):
        assert close(to_signal(tmp_path / "a", size=size), clip_of(processors, picture, size))
        squashed = to_signal(tmp_path / "a", size=size, fit="squash")
        assert close(squashed, siglip_of(processors, picture, size))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK"])
def test_modes_without_transparency(processors, mode):
    picture = noise(90, 61).convert(mode)
    assert close(to_signal(picture, size=40), clip_of(processors, picture, 40))


def test_an_opaque_picture_with_an_alpha_channel_is_as_without_it():
    picture = noise(91, 64)
    with_alpha = picture.convert("RGBA")
    for fit in media.FITS:
        assert (on_white(with_alpha, 33, fit=fit) == on_white(picture, 33, fit=fit)).all()


def test_transparency_is_laid_on_white_as_transformers_does_and_not_dropped_as_by_open_clip(processors):
    hidden = Image.new("RGBA", (40, 40), (200, 0, 0, 0))
    assert (to_signal(hidden, size=20) == 1).all()
    assert close(to_signal(hidden, size=20), clip_of(processors, hidden, 20))
    assert (open_clip(hidden.convert("RGB"), 20, "shortest", "bicubic") == [200, 0, 0]).all()
    veil = Image.new("RGBA", (40, 30), (200, 0, 0, 100))
    assert np.abs(to_signal(veil, size=20) - clip_of(processors, veil, 20)).max() < 2.1 / 127.5


@pytest.mark.parametrize("shape", [(3, 900), (900, 3), (2, 1777), (7, 1777), (1777, 7), (61, 3000)])
@pytest.mark.parametrize("fit", ["crop", "crop_even"])
def test_a_very_long_picture_is_cropped_without_being_resized_whole(monkeypatch, shape, fit):
    picture = noise(*shape)
    whole = on_white(picture, 64, fit=fit).astype(int)
    monkeypatch.setattr(media, "WIDEST", 1)
    assert abs(on_white(picture, 64, fit=fit) - whole).max() <= 1


def test_a_line_of_a_million_pixels_costs_no_memory():
    content = io.BytesIO()
    Image.new("RGB", (1_000_000, 1), (10, 200, 30)).save(content, "png")
    picture = Image.open(content)
    assert (on_white(picture, 224) == [10, 200, 30]).all()
