"""Wordings: always the item's own words, in the languages asked for, the same for the same key."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reverie import rng
from reverie.data.index import Caption, Item
from reverie.data.wording import PHRASES, draw_caption, lacking, mix_of
from reverie.errors import InputError


def item(*captions: tuple[str, ...]) -> Item:
    """Captions as (text, source) or (text, source, language)."""
    made = tuple(
        Caption(text=text, source=source, language=(*rest, "en")[0]) for text, source, *rest in captions
    )
    return Item(file_name="a.png", hash="0", bytes=1, width=1, height=1, captions=made)


def wordings(of: Item, n: int = 400, **options) -> Counter[str]:
    return Counter(draw_caption(of, rng.generator(0, "caption", i), **options) for i in range(n))


ROCKET = item(
    ("rocket", "label"),
    ("launch, space, travel", "tags"),
    ("火箭", "label", "zh"),
    ("发射, 太空", "tags", "zh"),
)


def test_the_key_decides():
    first = [draw_caption(ROCKET, rng.generator(0, "caption", i)) for i in range(50)]
    assert first == [draw_caption(ROCKET, rng.generator(0, "caption", i)) for i in range(50)]
    assert len(set(first)) > 10


def test_without_a_caption_there_are_no_words():
    assert wordings(item(), 5).keys() == {""}
    assert wordings(item(("", "label"), (" , ,", "tags")), 5).keys() == {""}


captions = st.lists(
    st.tuples(
        st.text(max_size=12),
        st.sampled_from(["label", "alias", "tags", "sidecar:txt"]),
        st.sampled_from(["en", "zh", "de"]),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=150, deadline=None)
@given(
    captions=captions, seed=st.integers(0, 1000), languages=st.sampled_from([None, {"en": 1.0}, {"fr": 1.0}])
)
@example(captions=[("cat, ,", "tags", "en")], seed=1, languages=None)
@example(captions=[("\x85", "tags", "en")], seed=0, languages=None)
@example(captions=[("{0} {}", "label", "en")], seed=1, languages=None)
def test_who_has_a_word_gets_a_wording(captions, seed, languages):
    worded = [text for text, _, _ in captions if text.replace(",", " ").strip()]
    text = draw_caption(item(*captions), rng.generator(seed, "caption"), languages=languages)
    assert bool(text.replace(",", " ").strip()) == bool(worded)
    if not any(source == "tags" for _, source, _ in captions) and worded:
        assert any(word in text for word in worded)


@pytest.mark.parametrize(
    ("languages", "share"), [(None, 0.5), ({"en": 3.0, "zh": 1.0}, 0.25), ({"zh": 1.0}, 1.0)]
)
def test_languages_come_by_their_weights(languages, share):
    drawn = wordings(ROCKET, 1000, languages=languages)
    chinese = sum(count for text, count in drawn.items() if any(c > "\u2e80" for c in text))
    assert chinese / 1000 == pytest.approx(share, abs=0.05)
    assert all(
        text.isascii() or not any(c.isascii() and c.isalpha() for c in text) for text in drawn
    )  # never mixed


def test_a_language_that_the_item_lacks_leaves_the_others():
    assert wordings(item(("rocket", "sidecar:txt")), 20, languages={"zh": 1.0}) == {"rocket": 20}


def test_a_label_stands_in_the_phrases_in_their_proportions():
    drawn = wordings(item(("rocket", "label")), 4000)
    for phrase, times in Counter(PHRASES["en"]).items():
        assert drawn.pop(phrase.format("rocket")) / 4000 == pytest.approx(
            times / len(PHRASES["en"]), abs=0.03
        )
    assert not drawn
    assert "表情：火箭" in wordings(item(("火箭", "alias", "zh")))


def test_a_caption_that_someone_wrote_is_left_as_it_is():
    assert wordings(item(("Two cats, asleep", "sidecar:txt")), 50) == {"Two cats, asleep": 50}
    assert wordings(item(("ein Haus", "label", "de")), 50) == {"ein Haus": 50}  # we know no phrase there


def test_of_tags_one_to_three_in_any_order():
    drawn = wordings(item(("launch, space, travel, sky", "tags")), 600)
    sizes = Counter()
    for text, count in drawn.items():
        tags = text.split(", ")
        assert len(set(tags)) == len(tags)
        assert set(tags) <= {"launch", "space", "travel", "sky"}
        sizes[len(tags)] += count
    assert sizes.keys() == {1, 2, 3}
    assert {"launch, space", "space, launch"} <= drawn.keys()


def test_beside_a_label_tags_come_alone_or_behind_it_but_seldom():
    drawn = wordings(ROCKET, 2000, languages={"en": 1.0})
    tags = {"launch", "space", "travel"}
    alone = sum(count for text, count in drawn.items() if set(text.split(", ")) <= tags)
    behind = sum(count for text, count in drawn.items() if text.startswith("rocket, "))
    assert 0.05 < alone / 2000 < 0.3
    assert 0.05 < behind / 2000 < 0.3
    assert all("rocket" in text for text in drawn if not set(text.split(", ")) <= tags)


def test_a_label_is_likelier_than_an_alias():
    drawn = wordings(item(("rocket", "label"), ("spaceship", "alias"), ("sky, up", "tags")), 2000)
    label, alias = (sum(n for text, n in drawn.items() if word in text) for word in ("rocket", "spaceship"))
    assert label > 2 * alias > 0


MIXED = item(
    ("by hand", "sidecar:txt"), ("s", "synthetic:short:m"), ("l", "synthetic:long:m"), ("a, b", "synthetic:tags:m")
)  # fmt: skip


def test_a_mix_draws_kinds_by_their_shares():
    drawn = wordings(MIXED, 4000, mix=mix_of("human=1,short=2,long=5,dropped=2"))
    for text, share in (("by hand", 0.1), ("s", 0.2), ("l", 0.5), ("", 0.2)):
        assert drawn[text] / 4000 == pytest.approx(share, abs=0.025)
    assert set(wordings(MIXED, 50, mix=mix_of("tags=1"))) <= {"a", "b", "a, b", "b, a"}


def test_dalle3_is_95_long_of_100():
    drawn = wordings(MIXED, 4000, mix=mix_of("dalle3"))
    assert drawn.keys() == {"by hand", "l"}
    assert drawn["l"] / 4000 == pytest.approx(0.95, abs=0.012)


def test_what_a_file_lacks_is_dealt_among_what_it_has():
    only = item(("by hand", "sidecar:txt"))
    assert wordings(only, 50, mix=mix_of("dalle3")) == {"by hand": 50}
    assert wordings(only, 50, mix=mix_of("long=1")) == {"by hand": 50}
    dropped = wordings(only, 2000, mix=mix_of("long=1,dropped=1"))[""]
    assert dropped / 2000 == pytest.approx(0.5, abs=0.04)
    assert lacking([only, MIXED], mix_of("long=1,dropped=1")) == 1


def test_without_a_mix_nothing_changes():
    plain = [draw_caption(ROCKET, rng.generator(3, "caption", i)) for i in range(200)]
    mixed = [draw_caption(ROCKET, rng.generator(3, "caption", i), mix=mix_of("human=1")) for i in range(200)]
    assert plain == mixed


@pytest.mark.parametrize(
    "words", ["loud=1", "human", "human=x", "human=-1", "human=1,human=2", "human=nan", "human=inf", "long=0"]
)
def test_a_mix_that_is_none_is_named(words):
    with pytest.raises(InputError, match="mix is"):
        mix_of(words)


def test_a_training_that_compares_drops_no_words():
    with pytest.raises(InputError, match="leave dropped out"):
        mix_of("human=1,dropped=1", dropped=False)
    assert mix_of("human=1,dropped=0", dropped=False) == {"human": 1.0}
