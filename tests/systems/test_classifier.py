"""The classifier: what it says depends on one picture alone, over the names it is asked about."""

import math

import pytest
import torch

import reverie
from reverie.encoders.resnet import Resnet, ResnetConfig
from reverie.errors import InputError
from reverie.systems.classifier import Classifier, ClassifierConfig

SMALL = ResnetConfig(widths=(8, 16, 16), depths=(0, 1), groups=4)


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    classifier = Classifier(
        ClassifierConfig(names=("cat", "dog", "火箭"), size=32, image=SMALL, width=8)
    ).eval()
    classifier.learn(classifier.embed_image(pictures(6)), torch.tensor([0, 1, 2, 2, 1, 0]))
    return classifier


def pictures(count, size=32):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_features_are_a_grid_of_the_size_over_the_halvings():
    features = Resnet(SMALL)(pictures(2, 48))
    assert features.shape == (2, 6 * 6, 16)


def test_a_picture_is_judged_by_itself_in_training_too(classifier):
    some = pictures(5)
    whole = classifier.train().classify(some)
    alone = torch.cat([classifier.eval().classify(some[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(whole, alone)


def test_probabilities_over_some_names_are_those_over_all_renormalised(classifier):
    every = classifier.classify(pictures(4))
    assert every.max() > every.min()
    some = classifier.classify(pictures(4), ["火箭", "cat"])
    torch.testing.assert_close(every.sum(1), torch.ones(4))
    torch.testing.assert_close(some, every[:, [2, 0]] / every[:, [2, 0]].sum(1, keepdim=True))
    with pytest.raises(InputError, match="'bird' is none of the 3 names"):
        classifier.classify(pictures(1), ["bird"])


def test_a_prototype_is_the_mean_of_its_pictures_and_names_them(classifier):
    vectors = classifier.embed_image(pictures(6))
    mean = torch.nn.functional.normalize(vectors[2] + vectors[3], dim=0)
    torch.testing.assert_close(classifier.prototypes[2], mean)
    classifier.learn(vectors[:3], torch.tensor([2, 0, 1]))
    assert classifier.classify(pictures(3)).argmax(1).tolist() == [2, 0, 1]
    with pytest.raises(AssertionError, match="no picture"):
        classifier.learn(vectors[:2], torch.tensor([0, 1]))


def test_the_loss_of_pictures_that_look_alike_is_the_logarithm_of_their_number(classifier):
    alike = pictures(1).expand(6, -1, -1, -1)
    batch = {"image": alike, "other": alike, "label": torch.arange(6)}
    assert classifier.loss(batch)["loss"].item() == pytest.approx(math.log(6))
    same = classifier.loss(batch | {"label": torch.zeros(6, dtype=torch.long)})
    assert same["accuracy"].item() == 1


def test_telling_pairs_apart_is_learnt(classifier):
    """Twenty steps on three pairs of views: the loss falls from chance to near nothing."""
    one, label = pictures(3), torch.arange(3)
    other = one + 0.1 * torch.randn(one.shape, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-2)
    for _ in range(20):
        loss = classifier.loss({"image": one, "other": other, "label": label})["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.2 < math.log(3)


def test_saved_and_loaded_it_says_the_same(classifier, tmp_path):
    reverie.save(classifier, tmp_path / "whole")
    again = reverie.load(tmp_path / "whole")
    assert again.config == classifier.config
    torch.testing.assert_close(again.classify(pictures(3)), classifier.classify(pictures(3)), rtol=0, atol=0)
    reverie.save(classifier, tmp_path / "half", dtype=torch.float16)
    torch.testing.assert_close(
        reverie.load(tmp_path / "half").classify(pictures(3)),
        classifier.classify(pictures(3)),
        rtol=0.02,
        atol=0.002,
    )


def test_other_sizes_are_resized_and_embeddings_have_unit_length(classifier):
    vectors = classifier.embed_image(pictures(2, 64))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2))
    with pytest.raises(InputError, match="b 3 h w"):
        classifier.embed_image(torch.zeros(3, 32, 32))


@pytest.mark.parametrize("names", [(), ("cat", "cat")])
def test_names_must_differ(names):
    with pytest.raises(InputError, match="all different"):
        ClassifierConfig(names=names)


def test_widths_and_depths_must_fit():
    with pytest.raises(InputError, match="one depth each"):
        ResnetConfig(widths=(8, 16), depths=(1, 1))
    with pytest.raises(InputError, match="multiples of 8"):
        ResnetConfig(widths=(8, 12), depths=(1,))
