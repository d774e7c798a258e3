"""What `embed_image` takes: one batch of one size, whatever comes in, or one sentence."""

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.encoders import images
from reverie.encoders.images import as_batch, in_parts, open_images
from reverie.errors import InputError

LIKE = torch.zeros(1)


def test_tensors_take_the_type_and_size_of_the_tower():
    batch = as_batch(torch.zeros(2, 3, 9, 30, dtype=torch.float16), size=8, like=LIKE.double())
    assert (batch.shape, batch.dtype) == ((2, 3, 8, 8), torch.float64)
    own = torch.rand(2, 3, 8, 8)
    assert torch.equal(as_batch(own, size=8, like=LIKE), own)


@pytest.mark.parametrize(
    ("batch", "reason"),
    [
        (torch.zeros(3, 8, 8), r"`b 3 h w`"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "divide bytes"),
        (torch.full((1, 3, 8, 8), 255.0), "reach 255"),
        (torch.full((1, 3, 8, 8), float("nan")), "reach nan"),
        (torch.full((1, 3, 8, 8), 1.93), "another library's normalisation"),
        (torch.zeros(1, 3, 0, 8), "must have pixels"),
    ],
)
def test_what_is_no_batch_of_images_is_refused(batch, reason):
    with pytest.raises(InputError, match=reason):
        as_batch(batch, size=8, like=LIKE)


def test_in_training_the_range_is_not_asked_for():
    assert as_batch(torch.full((1, 3, 8, 8), 255.0), size=8, like=LIKE, checked=False).max() == 255


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("cat.png", r"write \[image\]"),
        ([], "no image"),
        (7, "a tensor or a list"),
        ([np.zeros((8, 8, 3), np.uint8)], "not ndarray"),
    ],
)
def test_what_is_no_list_of_pictures_is_refused(given, reason):
    for take in (
        lambda: open_images(given, size=8),
        lambda: in_parts(given, lambda part: torch.zeros(len(part), 2)),
    ):
        with pytest.raises(InputError, match=reason):
            take()


def test_a_list_in_parts_keeps_its_order(monkeypatch):
    monkeypatch.setattr(images, "AT_ONCE", 3)
    pictures = [Image.new("RGB", (4, 4), (30 * i, 0, 0)) for i in range(8)]
    seen = []

    def embed(part):
        seen.append(len(part))
        return open_images(part, size=4)[:, :, 0, 0]

    assert torch.equal(in_parts(pictures, embed), open_images(pictures, size=4)[:, :, 0, 0])
    assert seen == [3, 3, 2]


@pytest.mark.parametrize("fit", ["crop", "crop_even", "squash"])
@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (30, 40), (5, 9)])
def test_a_tensor_is_fitted_as_a_picture_is(fit, shape):
    """To within what 8 bits and another antialiasing cost: a smooth picture."""
    down, across = torch.meshgrid(
        torch.linspace(0, 1, shape[0]), torch.linspace(0, 1, shape[1]), indexing="ij"
    )
    levels = (torch.stack([down, across, 1 - down], dim=-1) * 255).round()
    picture = Image.fromarray(levels.numpy().astype(np.uint8))
    batch = (levels / 127.5 - 1).permute(2, 0, 1)[None]
    tensor = as_batch(batch, size=8, like=LIKE, fit=fit)
    assert (tensor - open_images([picture], size=8, fit=fit)).abs().max() < 0.08
