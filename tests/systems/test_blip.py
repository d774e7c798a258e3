"""BLIP: what it says of a picture depends on nothing else; the three modes; the user's mistakes."""

import dataclasses

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import reverie
from reverie.codecs.pieces import Pieces, joined
from reverie.encoders.med import Med, MedConfig
from reverie.encoders.vit import Vit, VitConfig
from reverie.errors import InputError
from reverie.systems.blip import BASE, LARGE, Blip, BlipConfig

WORDS = ["a red ball on a table", "two green boxes", "一只猫", "a picture of "] * 3


def made(**text):
    tokenizer = Pieces.train_words(WORDS, vocab=200)
    ids = tokenizer.special
    torch.manual_seed(1)
    config = BlipConfig(
        image=VitConfig(size=16, patch=8, width=24, depth=1, heads=2, activation="gelu", norm_pre=False),
        text=MedConfig(
            vocab=tokenizer.vocab, length=26, width=16, depth=2, heads=2, hidden=32, context_width=24,
            start=ids["[CLS]"], end=ids["[SEP]"], decode=ids["[DEC]"], ground=ids["[ENC]"], **text,
        ),
        width=12,
    )  # fmt: skip
    blip = Blip(config, tokenizer).eval().requires_grad_(False)
    for parameter in blip.text.parameters():  # what is drawn for training says the same of every picture
        parameter.mul_(6) if parameter.ndim > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
    return blip


@pytest.fixture(scope="module")
def blip():
    return made()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize("how", [{"sampling": "greedy"}, {"beams": 3}, {"sampling": "nucleus", "seed": 5}])
def test_a_caption_does_not_depend_on_the_pictures_beside_it(blip, images, how):
    together = blip.caption(images, most=8, **how)
    assert len(set(together)) > 1
    for i in range(3):
        own = how | ({"seed": how["seed"] + i} if "seed" in how else {})
        assert blip.caption(images[i : i + 1], most=8, **own) == together[i : i + 1]


def test_the_likeliest_words_are_those_of_the_logits(blip, images):
    features = blip.see(images)
    ids = blip.tokenizer.encode(["a picture of"])[:, :-1]
    ids[:, 0] = blip.config.text.decode
    for picture in range(3):
        row = ids.clone()
        for _ in range(5):
            new = blip.writes(features[picture : picture + 1], row)[0, -1].argmax()
            row = torch.cat([row, new.reshape(1, 1)], 1)
            if new == blip.config.text.end:
                break
        expected = blip.tokenizer.decode([row[0, 1:].tolist()])[0]
        found = blip.caption(images[picture : picture + 1], sampling="greedy", prompt="a picture of", most=5)
        assert found == [joined(expected)]
        assert found[0].startswith("a picture of")


def test_at_least_so_many_words(blip, images):
    features = blip.see(images)
    writer = blip.text.writer(features)
    assert writer(torch.full((3, 1), blip.config.text.decode)).shape == (3, blip.config.text.vocab)
    long = blip.caption(images, sampling="greedy", least=10, most=10)
    assert all(len(blip.tokenizer.encode([text])[0]) > 2 for text in long)


def test_matching_is_by_pairs(blip, images):
    texts = ["a red ball", "two green boxes on a table", "一只猫"]
    found = blip.match(images, texts)
    features = blip.see(images)
    for i in range(3):
        tokens = blip.tokenizer.encode([texts[i]])
        tokens[:, 0] = blip.config.text.ground
        grounded = blip.text.features(tokens, context=features[i : i + 1])
        torch.testing.assert_close(found[i], blip.matching(grounded[0, 0]).softmax(-1)[1])
    with pytest.raises(InputError, match="3 pictures and 2 texts"):
        blip.match(images, texts[:2])


def test_embeddings_are_unit_vectors_of_each_alone(blip, images, tmp_path):
    vectors = blip.embed_image(images)
    assert vectors.shape == (3, 12)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))
    torch.testing.assert_close(blip.embed_image(images[1:2]), vectors[1:2])
    words = blip.embed_text(["a red ball", "two green boxes on a table"])
    torch.testing.assert_close(blip.embed_text(["a red ball"]), words[:1])  # padding is not seen
    Image.new("RGB", (40, 20), (200, 30, 30)).save(tmp_path / "red.png")
    Image.new("RGB", (16, 16), (20, 30, 200)).save(tmp_path / "blue.png")
    paths = [tmp_path / "red.png", tmp_path / "blue.png"]
    torch.testing.assert_close(blip.embed_image(paths), blip.embed_image(blip.prepare(paths)))
    assert blip.caption(paths, most=4) == blip.caption(blip.prepare(paths), most=4)


def test_it_is_stored_and_read(blip, images, tmp_path):
    reverie.save(blip, tmp_path / "blip")
    again = reverie.load(tmp_path / "blip")
    assert again.config == blip.config
    assert torch.equal(again.embed_image(images), blip.embed_image(images))
    assert again.caption(images, most=6) == blip.caption(images, most=6)


def test_weights_with_one_mode_have_only_that(images):
    reader, writer = made(writes=False), made(understands=False)
    assert reader.embed_image(images).shape == (3, 12)
    assert len(writer.caption(images, most=3)) == 3
    with pytest.raises(InputError, match="no part that writes captions"):
        reader.caption(images)
    for call in (writer.embed_image, lambda given: writer.match(given, ["a"] * 3)):
        with pytest.raises(InputError, match="no part that embeds and matches"):
            call(images)
    assert not [name for name, _ in reader.named_parameters() if ".causal." in name or ".words." in name]
    assert not [name for name, _ in writer.text.named_parameters() if ".attention." in name]
    assert not hasattr(writer, "temperature")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"sampling": "luck"}, "sampling is 'luck'"),
        ({"most": 0}, "0 new ones cannot be written"),
        ({"most": 30}, "a prompt of 0 tokens and 30 new ones cannot be written: this model has room for 25"),
        ({"beams": 0}, "beams 0"),
        ({"least": 9, "most": 5}, "from 9 to 5"),
        ({"prompt": 3}, "prompt must be a text"),
        ({"sampling": "nucleus", "p": 0.0}, "p 0.0"),
    ],
)
def test_mistakes_are_told(blip, images, how, said):
    with pytest.raises(InputError, match=said):
        blip.caption(images, **how)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="reads pictures of 768 channels, but the image tower gives 1024"):
        Blip(dataclasses.replace(BlipConfig(), image=LARGE))
    with pytest.raises(InputError, match="must understand or write"):
        Med(MedConfig(vocab=8, width=8, heads=1, depth=1, understands=False, writes=False))


def test_words_are_joined_as_one_writes_them():
    assert joined("红 心 ， a ball") == "红心，a ball"
    assert joined("flag : guinea , a man ’ s ( red ) hat !") == "flag: guinea, a man’s (red) hat!"


@pytest.mark.parametrize(("tower", "millions"), [(BASE, 85.8), (LARGE, 303.3)])
def test_the_papers_image_towers(tower, millions):
    """ViT-B/16 and ViT-L/16 without their classifiers, of 224 pixels (2010.11929, table 1: 86 and 307 million)."""
    with torch.device("meta"):
        found = Vit(dataclasses.replace(tower, size=224))
    assert sum(p.numel() for p in found.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


def test_the_papers_text_network_is_bert_base_three_times():
    """BERT-base without its pooler has 108.9 million (of 30,524 words); cross-attention and a second self-attention."""
    with torch.device("meta"):
        both, reader = Med(MedConfig()), Med(MedConfig(writes=False))
    cross = 12 * (4 * 768**2 + 4 * 768 + 2 * 768)
    bert = 108_891_648 - 2 * 768 + (30_524 - 30_522) * 768  # less token types
    assert sum(p.numel() for p in reader.parameters()) == bert + cross
    head = 768**2 + 3 * 768 + 30_524
    assert sum(p.numel() for p in both.parameters()) == bert + 2 * cross + head


def test_the_logits_are_those_of_the_shared_words():
    """A causal network sees nothing behind a word; the vocabulary's vectors are those that words are read with."""
    blip = made()
    tokens = torch.randint(6, blip.config.text.vocab, (2, 7))
    features = torch.randn(2, 5, 24)
    whole = blip.text.logits(tokens, context=features)
    torch.testing.assert_close(blip.text.logits(tokens[:, :4], context=features), whole[:, :4])
    x = blip.text.words.norm(F.gelu(blip.text.words.dense(torch.randn(1, 1, 16))))
    found = x @ blip.text.embedding.weight.T + blip.text.words.bias
    assert found.shape[-1] == blip.config.text.vocab
