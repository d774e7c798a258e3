"""Zero-shot classification on embeddings whose answers are known in closed form."""

import math

import pytest
import torch

from reverie.errors import InputError
from reverie.evals.interval import bootstrap
from reverie.evals.zero_shot import class_embeddings, zero_shot

NAMES = [f"thing {i}" for i in range(10)]


def one_hot(texts):
    """The text's number is its axis."""
    return torch.eye(10)[[int(text.split()[-1]) for text in texts]]


def same(images):
    return images


def test_perfect_and_always_wrong():
    labels = torch.arange(10).repeat(3)
    result = zero_shot(same, one_hot, torch.eye(10)[labels], labels, NAMES, batch=7)
    assert result["top1"] == result["top5"] == result["mean_class"] == 1
    assert result["top1_interval"] == (1, 1)
    assert result["predicted"] == labels.tolist()
    assert (result["images"], result["ways"]) == (30, 10)
    wrong = zero_shot(same, one_hot, torch.eye(10)[(labels + 1) % 10], labels, NAMES)
    assert wrong["top1"] == wrong["top5"] == 0  # nine classes tie at zero with the right one or beat it


@pytest.mark.parametrize(("place", "top1", "top5"), [(0, 1, 1), (1, 0, 1), (4, 0, 1), (5, 0, 0), (9, 0, 0)])
def test_top5_ends_at_the_fifth(place, top1, top5):
    """The right class has the `place`-th largest score of ten different ones."""
    image = torch.linspace(1, 0.1, 10)[None]
    result = zero_shot(same, one_hot, image, [place], NAMES)
    assert (result["top1"], result["top5"]) == (top1, top5)


def test_equal_embeddings_earn_nothing():
    result = zero_shot(same, lambda texts: torch.ones(len(texts), 10), torch.ones(4, 10), [0, 1, 2, 3], NAMES)
    assert result["top1"] == result["top5"] == 0


def test_accuracy_per_class_and_its_mean():
    images = torch.eye(10)[[0, 0, 0, 0, 1, 2]]
    result = zero_shot(same, one_hot, images, [0, 0, 0, 1, 1, 3], NAMES)
    assert result["per_class"] == {"thing 0": 1, "thing 1": 0.5, "thing 3": 0}
    assert result["top1"] == pytest.approx(4 / 6)
    assert result["mean_class"] == pytest.approx(0.5)


def test_templates_are_averaged_at_unit_length_and_the_mean_is_brought_back():
    """Raw lengths 5 and 1 must not weigh: the mean of (1, 0) and (0, 1) lies at 45 degrees."""
    table = {"a cat": [5.0, 0.0], "the cat!": [0.0, 1.0]}
    asked = []

    def embed_text(texts):
        asked.extend(texts)
        return torch.tensor([table[text] for text in texts])

    found = class_embeddings(embed_text, ["cat"], ["a {}", "the {}!"])
    assert asked == ["a cat", "the cat!"]
    torch.testing.assert_close(found, torch.tensor([[math.sqrt(0.5), math.sqrt(0.5)]]))


def test_templates_can_change_the_answer():
    """One template reads the class from its number, the other from the next number: only the first is right."""

    def embed_text(texts):
        axis = [(int(text.split()[-1]) + text.startswith("next")) % 10 for text in texts]
        return torch.eye(10)[axis]

    labels = torch.arange(10)
    assert zero_shot(same, embed_text, torch.eye(10), labels, NAMES, ["a {}"])["top1"] == 1
    assert zero_shot(same, embed_text, torch.eye(10), labels, NAMES, ["next {}"])["top1"] == 0
    # together each image ties with its class and the one before: a tie earns nothing at 1, everything at 5
    both = zero_shot(same, embed_text, torch.eye(10), labels, NAMES, ["a {}", "next {}"])
    assert (both["top1"], both["top5"]) == (0, 1)


def test_the_batch_size_changes_nothing_and_any_sequence_will_do():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(23, 10, generator=generator)
    labels = torch.randint(10, (23,), generator=generator)
    whole = zero_shot(same, one_hot, vectors, labels, NAMES, ["a {}", "one {}"])
    paths = [str(i) for i in range(23)]
    parts = zero_shot(
        lambda some: vectors[[int(path) for path in some]],
        one_hot,
        paths,
        labels,
        NAMES,
        ["a {}", "one {}"],
        batch=4,
    )
    assert parts == whole


def test_no_gradient_is_kept():
    weight = torch.ones(10, requires_grad=True)
    assert not class_embeddings(lambda texts: one_hot(texts) * weight, NAMES, ["{}"]).requires_grad


def test_the_interval_is_the_binomial_one():
    """For n = 400 at one half the 95 % interval of the mean is 0.5 +- 1.96 * 0.5 / 20."""
    values = torch.arange(400) % 2
    low, high = bootstrap(values)
    assert low == pytest.approx(0.451, abs=0.004)
    assert high == pytest.approx(0.549, abs=0.004)
    assert bootstrap(values) == (low, high)  # the same every time
    torch.rand(3)
    assert bootstrap(values) == (low, high)
    narrow = bootstrap(values, level=0.5)
    assert high - low > 2 * (narrow[1] - narrow[0])


def test_mistakes_get_one_sentence():
    with pytest.raises(InputError, match="give each image one label"):
        zero_shot(same, one_hot, torch.eye(10), [0, 1], NAMES)
    with pytest.raises(InputError, match="label 10 is none of the 10 classes"):
        zero_shot(same, one_hot, torch.eye(10)[:2], [0, 10], NAMES)
    with pytest.raises(InputError, match="label -1"):
        zero_shot(same, one_hot, torch.eye(10)[:2], [0, -1], NAMES)
    for templates in ("a {}", [], ["a photo"], ["{} and {}"]):
        with pytest.raises(InputError, match="template"):
            zero_shot(same, one_hot, torch.eye(10)[:1], [0], NAMES, templates)
    with pytest.raises(InputError, match="'thing 0' occurs twice"):
        zero_shot(same, one_hot, torch.eye(10)[:1], [0], [*NAMES, "thing 0"])
    with pytest.raises(InputError, match="not finite"):
        zero_shot(same, one_hot, torch.full((1, 10), torch.nan), [0], NAMES)
