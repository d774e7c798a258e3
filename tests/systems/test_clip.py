"""CLIP: vectors of length one, one meaning however a picture comes in, and it learns pairs by heart."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from reverie.codecs.bpe import Bpe
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.objectives.contrastive import LARGEST_SCALE, info_nce
from reverie.systems.clip import Clip, ClipConfig


@pytest.fixture(scope="module")
def clip(small) -> Clip:
    return small.clip().eval().requires_grad_(False)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


near = {"atol": 1e-5, "rtol": 1e-5}


def test_vectors_have_length_one(clip, small, images):
    for vectors in (clip.embed_image(images), clip.embed_text(small.names)):
        assert vectors.shape == (8, 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(8))


def test_similarity_is_the_scaled_cosine(clip, small, images):
    cosine = torch.nn.functional.cosine_similarity(
        clip.embed_image(images)[:, None], clip.embed_text(small.names)[None], dim=-1
    )
    torch.testing.assert_close(clip.similarity(images, small.names), cosine / 0.07, atol=1e-4, rtol=1e-4)


def test_training_stops_the_scale_at_a_hundred_and_using_it_does_not(small, images):
    """Some public weights were trained without the limit."""
    clip = small.clip()
    assert clip.scale().item() == pytest.approx(1 / 0.07)
    batch = {"image": images, "tokens": clip.tokens(small.names)}
    with torch.no_grad():
        clip.log_scale.fill_(math.log(LARGEST_SCALE))
        least = clip.loss(batch)["loss"]
        clip.log_scale.fill_(9.0)
        torch.testing.assert_close(clip.loss(batch)["loss"], least)
    assert clip.scale().item() == pytest.approx(math.exp(9.0))


@pytest.fixture(scope="module")
def siglip(tokenizer) -> Clip:
    torch.manual_seed(0)
    config = ClipConfig(
        image=VitConfig(
            size=16, patch=8, width=16, depth=1, heads=2, stem_bias=True, norm_pre=False, pool="attention"
        ),
        text=TextConfig(
            vocab=tokenizer.vocab, length=12, width=16, depth=1, heads=2, causal=False, pool="last"
        ),
        width=16, image_projection=False, text_bias=True, loss="sigmoid", fit="squash",
    )  # fmt: skip
    return Clip(config, tokenizer).eval().requires_grad_(False)


def test_siglip_judges_every_name_by_itself(siglip, small, images):
    logits = siglip.similarity(images, small.names)
    cosine = siglip.embed_image(images) @ siglip.embed_text(small.names).T
    torch.testing.assert_close(logits, 10 * cosine - 10, atol=1e-4, rtol=1e-4)
    chances = siglip.classify(images, small.names)
    torch.testing.assert_close(chances, logits.sigmoid())
    torch.testing.assert_close(siglip.classify(images, small.names[:3]), chances[:, :3], **near)


def test_siglips_padding_is_read_and_may_not_be_cut(siglip, small, tokenizer):
    tokens = tokenizer.encode(small.names, length=12)
    assert siglip.tokens(small.names).shape == (8, 12)
    other = tokens.clone()
    other[:, -2] = 5
    assert not torch.allclose(siglip.embed_text(other), siglip.embed_text(tokens), atol=1e-3)
    with pytest.raises(InputError, match="padded to 12 positions"):
        siglip.embed_text(tokens[:, :8])


def test_siglip_squashes_a_wide_picture(siglip, clip):
    wide = Image.new("RGB", (40, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (12, 0, 28, 16))
    assert siglip.prepare([wide])[0, 0, 8, 0] == 1  # the red edge is still there
    assert clip.prepare([wide])[0, 0, 8, 0] == -1


def test_siglip_learns_pairs_by_heart(siglip, small, images):
    torch.manual_seed(0)
    model = Clip(siglip.config, siglip.tokenizer).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    batch = {"image": images, "tokens": model.tokens(small.names)}
    first = None
    for _ in range(150):
        loss = model.loss(batch)["loss"]
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < first / 3
    model.eval()
    assert model.similarity(images, small.names).argmax(-1).tolist() == list(range(8))


def test_a_space_that_nothing_projects_into_must_fit():
    image = VitConfig(size=16, patch=8, width=16, depth=1, heads=2)
    with pytest.raises(InputError, match="16 channels must be the space's 8"):
        Clip(ClipConfig(image=image, width=8, image_projection=False))


def test_a_picture_is_embedded_alike_alone_and_in_a_batch(clip, small, images):
    for i in range(8):
        torch.testing.assert_close(
            clip.embed_image(images[i : i + 1])[0], clip.embed_image(images)[i], **near
        )
        one = clip.embed_text(small.names[i : i + 1])[0]
        torch.testing.assert_close(one, clip.embed_text(small.names)[i], **near)


def test_tokens_and_texts_are_the_same(clip, small, tokenizer):
    vectors = clip.embed_text(small.names)
    for length in (None, 8, 12):
        tokens = tokenizer.encode(small.names, length=length)
        torch.testing.assert_close(clip.embed_text(tokens), vectors, **near)


def test_tensors_pictures_and_paths_are_the_same(clip, tmp_path):
    generator = np.random.default_rng(0)
    arrays = [generator.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(3)]
    pictures = [Image.fromarray(array) for array in arrays]
    paths = []
    for i, picture in enumerate(pictures):
        paths.append(tmp_path / f"{i}.png")
        picture.save(paths[-1])
    tensor = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1
    expected = clip.embed_image(tensor)
    for images in (pictures, paths, [str(path) for path in paths], (pictures[0], paths[1], str(paths[2]))):
        torch.testing.assert_close(clip.embed_image(images), expected, **near)


def test_a_long_list_is_embedded_a_part_at_a_time(clip, small, images, monkeypatch):
    pictures = [Image.new("RGB", (20, 16), (i, 2 * i, 250 - i)) for i in range(7)]
    whole, words = clip.embed_image(pictures), clip.embed_text(small.names * 5)
    monkeypatch.setattr("reverie.encoders.images.AT_ONCE", 3)
    monkeypatch.setattr("reverie.systems.clip.TEXTS_AT_ONCE", 7)
    torch.testing.assert_close(clip.embed_image(tuple(pictures)), whole, **near)
    torch.testing.assert_close(clip.embed_text(small.names * 5), words, **near)


def test_other_sizes_are_brought_to_its_own(clip, images):
    flat = torch.tensor([0.5, -0.2, 0.9])[None, :, None, None]
    expected = clip.embed_image(flat.expand(1, 3, 16, 16))
    for size in ((64, 64), (7, 30)):
        torch.testing.assert_close(clip.embed_image(flat.expand(1, 3, *size)), expected, atol=1e-3, rtol=1e-3)
    wide = Image.new("RGB", (40, 16), (255, 0, 0))
    wide.paste((0, 0, 255), (12, 0, 28, 16))  # the middle square, which is what is looked at
    blue = Image.new("RGB", (16, 16), (0, 0, 255))
    torch.testing.assert_close(clip.embed_image([wide]), clip.embed_image([blue]), atol=1e-3, rtol=1e-3)


def test_colours_are_normalised_as_the_public_weights_expect(clip, images):
    seen = []
    hook = clip.image.stem.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        clip.embed_image(images)
    finally:
        hook.remove()
    mean, std = (torch.tensor(part)[:, None, None] for part in (clip.config.mean, clip.config.std))
    torch.testing.assert_close(seen[0] * std + mean, (images + 1) / 2)


def test_classify(clip, small, images):
    chances = clip.classify(images, small.names)
    assert chances.shape == (8, 8)
    torch.testing.assert_close(chances.sum(-1), torch.ones(8))
    torch.testing.assert_close(chances, clip.similarity(images, small.names).softmax(-1), **near)
    order = [3, 0, 7, 1, 2, 6, 5, 4]
    moved = clip.classify(images, [small.names[i] for i in order])
    torch.testing.assert_close(moved, chances[:, order], **near)
    braces = clip.classify(images, ["{0}", "}{"], templates=["a {}."])
    assert braces.isfinite().all()


def test_the_vectors_of_templates_are_averaged(clip, small, images):
    templates = ["a photo of {}", "{}!", "the small {}"]
    vectors = [
        sum(clip.embed_text([template.replace("{}", name)])[0] for template in templates)
        for name in small.names
    ]
    vectors = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
    expected = (clip.scale() * clip.embed_image(images) @ vectors.T).softmax(-1)
    torch.testing.assert_close(clip.classify(images, small.names, templates=templates), expected, **near)


def bad_calls(clip: Clip, tokenizer) -> dict[str, tuple]:
    image, names = torch.zeros(1, 3, 16, 16), ["cat"]
    tokens = tokenizer.encode(["cat"], length=6)
    headless = tokens.masked_fill(tokens == tokenizer.end, 0)
    return {
        "one string": (lambda: clip.embed_text("cat"), r"\['cat'\]"),
        "no text": (lambda: clip.embed_text([]), "one string or more"),
        "not text": (lambda: clip.embed_text([1]), r"\[1\]"),
        "a row of tokens": (lambda: clip.embed_text(tokens[0]), r"\(6,\)"),
        "tokens too long": (lambda: clip.embed_text(tokens.repeat(1, 3)), "at most 12"),
        "no end": (lambda: clip.embed_text(headless), f"no end token, {tokenizer.end}"),
        "foreign tokens": (lambda: clip.embed_text(torch.where(tokens == 0, 5000, tokens)), "5000"),
        "one image": (lambda: clip.embed_image(image[0]), r"\(3, 16, 16\)"),
        "four channels": (lambda: clip.embed_image(torch.zeros(1, 4, 16, 16)), r"\(1, 4, 16, 16\)"),
        "bytes": (lambda: clip.embed_image(image.byte()), "uint8"),
        "one path": (lambda: clip.embed_image("cat.png"), r"\[image\]"),
        "one picture": (lambda: clip.embed_image(Image.new("RGB", (16, 16))), r"\[image\]"),
        "no image": (lambda: clip.embed_image([]), "no image"),
        "a list of tensors": (lambda: clip.embed_image([image[0]]), "Tensor"),
        "no such file": (lambda: clip.embed_image(["nowhere/cat.png"]), "cat.png"),
        "no list of images": (lambda: clip.embed_image(5), "are 5"),
        "no pixels": (lambda: clip.embed_image(image[..., :0]), "pixels"),
        "bytes as floats": (lambda: clip.eval().embed_image(image + 200), r"reach 2\d\d"),
        "an unknown image": (lambda: clip.eval().embed_image(image * float("nan")), "reach nan"),
        "a picture of nothing": (lambda: clip.embed_image([Image.new("RGB", (0, 9))]), "0 x 9"),
        "no list of texts": (lambda: clip.embed_text(None), "is None"),
        "one name": (lambda: clip.classify(image, "cat"), r"\['cat'\]"),
        "no names": (lambda: clip.classify(image, []), "names"),
        "one template": (lambda: clip.classify(image, names, templates="a {}"), r"\['a \{\}'\]"),
        "no template": (lambda: clip.classify(image, names, templates=[]), "templates"),
        "an empty template": (lambda: clip.classify(image, names, templates=["a"]), "'a'"),
        "a named template": (lambda: clip.classify(image, names, templates=["a {name}"]), "once"),
    }


def test_mistakes_are_told_in_a_sentence(clip, tokenizer):
    for what, (call, words) in bad_calls(clip, tokenizer).items():
        with pytest.raises(InputError, match=words) as caught:
            call()
        message = str(caught.value)
        assert "\n" not in message, what
        assert len(message) < 200, what


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_another_precision_are_read(clip, dtype):
    image = torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16).to(dtype)
    assert torch.equal(clip.embed_image(image), clip.embed_image(image.float()))


def test_without_a_tokenizer_tokens_still_work(small, tokenizer):
    clip = Clip(small.config)
    with pytest.raises(InputError, match="no tokenizer"):
        clip.embed_text(["cat"])
    assert clip.embed_text(tokenizer.encode(["cat"])).shape == (1, 8)


def test_the_loss_is_info_nce_of_its_vectors(clip, small, images, tokenizer):
    batch = {"image": images, "tokens": tokenizer.encode(small.names)}
    image, text = clip.embed_image(images), clip.embed_text(small.names)
    out = clip.loss(batch)
    torch.testing.assert_close(out["loss"], info_nce(image, text, clip.scale()))
    assert out["accuracy"].item() == pytest.approx(
        sum((image[i] @ text.T).argmax() == i for i in range(8)).item() / 8
    )
    assert out["scale"].item() == pytest.approx(1 / 0.07)
    torch.testing.assert_close(clip.loss(batch | {"label": torch.arange(8)})["loss"], out["loss"])
    label = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6])
    expected = info_nce(image, text, clip.scale(), label=label)
    torch.testing.assert_close(clip.loss(batch | {"label": label})["loss"], expected)
    assert not torch.isclose(expected, out["loss"], atol=1e-3)
    same = clip.loss(batch | {"label": torch.zeros(8, dtype=torch.long)})
    assert same["accuracy"] == 1  # a caption of another drawing of the thing is right as well


def test_it_learns_eight_pairs_by_heart(small, images, tokenizer):
    clip = small.clip()
    batch = {"image": images, "tokens": tokenizer.encode(small.names)}
    optimizer = torch.optim.Adam(clip.parameters(), lr=1e-2)
    first = clip.loss(batch)
    assert first["loss"].item() > math.log(8) / 2
    for _ in range(40):
        optimizer.zero_grad()
        clip.loss(batch)["loss"].backward()
        assert all(parameter.grad is not None for parameter in clip.parameters())
        optimizer.step()
    last = clip.loss(batch)
    assert last["loss"].item() < 0.05
    assert last["accuracy"] == 1
    with torch.no_grad():
        assert clip.classify(images, small.names).argmax(-1).tolist() == list(range(8))


def test_a_tokenizer_of_another_text_tower_is_refused():
    tokenizer = Bpe.train(["a red rocket"], vocab=600)
    with pytest.raises(InputError, match=f"{tokenizer.vocab} tokens .* made for 512 and"):
        Clip(ClipConfig(text=TextConfig(vocab=512, end=tokenizer.end, width=64, heads=1)), tokenizer)
