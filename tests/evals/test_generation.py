"""Generation is measured on fake generators whose worth is known: the truth, noise, a copier, one that never varies."""

import math

import pytest
import torch

from reverie.data.world import World
from reverie.errors import InputError
from reverie.evals import generation
from reverie.evals.world_captions import read_caption

NAMES = [f"thing {i:03d}" for i in range(200)]
TABLE = (
    torch.rand(200, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
)  # what each thing looks like


def truth(prompts, seeds):
    """The right picture, a little different for each seed."""
    noise = torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    return TABLE[[NAMES.index(prompt) for prompt in prompts]] + 0.05 * noise


def noise(prompts, seeds):
    return torch.stack(
        [torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


def score(pictures, names):
    """A judge who knows what each thing looks like."""
    known = TABLE[[NAMES.index(name) for name in names]].flatten(1)
    return -torch.cdist(pictures.flatten(1), known)


def embed(pictures):
    return pictures.flatten(1)


def test_the_truth_gets_all_and_noise_gets_chance():
    right, _ = generation.draw(truth, NAMES, range(200))
    wrong, _ = generation.draw(noise, NAMES, range(200))
    best = generation.pick(right, NAMES, score)
    assert best["top1"] == best["top5"] == 1
    assert best["picked"] == NAMES
    guess = generation.pick(wrong, NAMES, score)
    assert guess["chance1"] == 1 / 200
    assert guess["top1"] < 0.03  # the binomial's 99.9 % point for 200 draws at 1 in 200
    assert guess["top1_interval"][0] <= guess["chance1"] <= guess["top1_interval"][1] + 0.005
    assert guess["top5"] < 0.08


def test_half_right_counts_half_and_place_says_where():
    samples = torch.cat([TABLE[:5], TABLE[10:15]])
    found = generation.pick(samples, NAMES[:5] + NAMES[20:25], score, names=NAMES)
    assert found["top1"] == 0.5
    assert found["ways"] == 200
    assert found["place"][:5] == [1] * 5
    assert all(place > 1 for place in found["place"][5:])
    assert found["picked"][5:] == NAMES[10:15]


def test_the_fifth_place_counts_and_the_sixth_does_not():
    ladder = torch.arange(10, 0, -1).float().expand(10, 10)
    found = generation.pick(TABLE[:10], NAMES[:10], lambda pictures, names: ladder)
    assert (found["top1"], found["top5"]) == (0.1, 0.5)
    assert found["place"] == list(range(1, 11))


def test_a_judge_who_cannot_tell_earns_nothing():
    found = generation.pick(
        TABLE[:9], NAMES[:9], lambda pictures, names: torch.ones(len(pictures), len(names))
    )
    assert found["top1"] == found["top5"] == 0


def test_a_clip_is_judged_by_all_its_frames():
    """Three frames show the thing and one shows another: the mean score decides, and one frame cannot."""
    clips = torch.stack([TABLE[:4], TABLE[:4], TABLE[4:8], TABLE[:4]], dim=2)
    assert generation.pick(clips, NAMES[:4], score, names=NAMES, batch=3)["top1"] == 1
    mostly_other = torch.stack([TABLE[4:8], TABLE[4:8], TABLE[:4], TABLE[4:8]], dim=2)
    assert generation.pick(mostly_other, NAMES[:4], score, names=NAMES)["picked"] == NAMES[4:8]


def test_drawing_in_batches_asks_for_each_seed_once():
    asked = []

    def remember(prompts, seeds):
        asked.append((prompts, seeds))
        return truth(prompts, seeds)

    told = []
    parts, seconds = generation.draw(
        remember, NAMES[:7], range(7), batch=3, progress=lambda done, total: told.append((done, total))
    )
    whole, _ = generation.draw(truth, NAMES[:7], range(7), batch=7)
    assert [len(prompts) for prompts, _ in asked] == [3, 3, 1]
    assert [seed for _, seeds in asked for seed in seeds] == list(range(7))
    assert told == [(3, 7), (6, 7), (7, 7)]
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)
    assert seconds > 0


def test_the_choice_depends_on_the_seed_and_on_no_order():
    chosen = generation.choose(NAMES, 20, seed=3)
    assert chosen == generation.choose([*reversed(NAMES), *NAMES], 20, seed=3)
    assert chosen != generation.choose(NAMES, 20, seed=4)
    assert len(set(chosen)) == 20
    assert generation.choose(NAMES[:5], 20) == NAMES[:5]


def test_diversity_of_a_generator_that_never_varies_and_of_one_that_does_not_read():
    never = torch.stack([TABLE[:6], TABLE[:6], TABLE[:6]], dim=1)
    deaf = torch.stack([noise(NAMES[:6], range(6 * s, 6 * s + 6)) for s in range(3)], dim=1)
    for space in (generation.pixels, generation.features(embed)):
        found = generation.diversity(never, space)
        assert found["within"] == found["ratio"] == 0
        assert found["between"] > 0.1
        assert generation.diversity(deaf, space)["ratio"] == pytest.approx(1, abs=0.05)
    assert generation.diversity(torch.zeros(2, 2, 3, 4, 4), generation.pixels)["ratio"] is None


def test_diversity_in_closed_form():
    """Prompt 0 at 0 and 1, prompt 1 at 10 and 13, on a line: within 1 and 3, between the mean of 10, 13, 9, 12."""
    line = torch.tensor([[0.0, 1.0], [10.0, 13.0]])[..., None, None, None].expand(2, 2, 3, 4, 4)
    found = generation.diversity(line, generation.pixels)
    assert found["within"] == pytest.approx(2)
    assert found["between"] == pytest.approx(11)
    assert found["ratio"] == pytest.approx(2 / 11)
    assert generation.spread(line[1], generation.pixels) == pytest.approx(3)


def test_pixel_distance_is_the_root_mean_square_and_feature_distance_the_chord():
    a, b = torch.ones(1, 3, 4, 4), -torch.ones(1, 3, 4, 4)
    for some in (a, a[:, :, None].expand(-1, -1, 5, -1, -1)):
        assert generation.distances(
            generation.pixels(some), generation.pixels(-some)
        ).item() == pytest.approx(2)
    chord = generation.features(embed)
    assert generation.distances(chord(a), chord(b)).item() == pytest.approx(2)
    half = torch.cat([a[:, :, :2], b[:, :, 2:]], dim=2)
    assert generation.distances(chord(a), chord(half)).item() == pytest.approx(math.sqrt(2), abs=1e-6)


def test_copies_are_found_at_exactly_zero():
    training, held = TABLE[:100], TABLE[100:150]
    samples = training[[7, 3, 99]].clone()
    space = generation.pixels
    far, where = generation.nearest(space(samples), space(training), block=2)
    assert where[:, 0].tolist() == [7, 3, 99]
    assert far[:, 0].tolist() == [0, 0, 0]
    assert far.shape == (3, 3)
    assert (far.diff(dim=1) >= 0).all()
    other = generation.nearest(space(held), space(training))[0][:, 0]
    found = generation.copied(far[:, 0], other)
    assert found["nearer"] == found["below"] == 1
    assert found["samples"]["50%"] == 0 < found["held_out"]["5%"]


def test_new_samples_are_as_far_as_held_out_ones():
    space = generation.pixels
    known = space(TABLE[:100])
    one, other = (generation.nearest(space(TABLE[at : at + 50]), known)[0][:, 0] for at in (100, 150))
    found = generation.copied(one, other)
    assert found["nearer"] == pytest.approx(
        0.5, abs=0.12
    )  # three standard errors of Mann-Whitney's U at 50 x 50
    assert generation.copied(one, one)["nearer"] == 0.5  # ties count half


def test_motion_of_a_still_and_of_a_blinking_clip():
    still = TABLE[:2, :, None].expand(-1, -1, 4, -1, -1)
    blink = torch.tensor([-1.0, 1, -1, 1])[None, None, :, None, None].expand(1, 3, 4, 8, 8)
    assert generation.motion(still).tolist() == [0, 0]
    assert generation.motion(blink).tolist() == [1]
    with pytest.raises(InputError, match="motion needs clips"):
        generation.motion(TABLE[:2])


@pytest.mark.parametrize("frames", [1, 12])
def test_the_world_reads_its_own_renders_and_not_others(frames):
    scenes = World(24, size=(64, 64), frames=frames)
    examples = [scenes[i] for i in range(24)]
    renders = torch.stack([example.pixels[:, :3].transpose(0, 1) for example in examples]).float() / 127.5 - 1
    renders = renders[:, :, 0] if frames == 1 else renders
    said = [read_caption(example.captions[0].text) for example in examples]
    right = generation.scenes(renders, said)
    assert right["all"]["right"] > 0.9
    assert {"shape", "colour", "count"} <= right.keys()
    assert ("motion" in right) == (frames > 1)
    assert right["colour"]["asked"] == 24
    wrong = generation.scenes(renders.roll(1, dims=0), said)
    assert wrong["all"]["right"] < 0.1
    assert wrong["colour"]["right"] < 0.5


def test_mistakes_get_one_sentence():
    with pytest.raises(InputError, match="give each sample the name"):
        generation.pick(TABLE[:2], NAMES[:3], score)
    with pytest.raises(InputError, match="'thing 009' is wanted"):
        generation.pick(TABLE[:1], ["thing 009"], score, names=NAMES[:3])
    with pytest.raises(InputError, match="twice"):
        generation.pick(TABLE[:1], NAMES[:1], score, names=NAMES[:1] * 2)
    with pytest.raises(InputError, match="judge is broken"):
        generation.pick(TABLE[:1], NAMES[:1], lambda pictures, names: torch.full((1, 1), torch.nan))
    with pytest.raises(InputError, match="generator is broken"):
        generation.draw(lambda prompts, seeds: torch.full((2, 3, 4, 4), torch.inf), NAMES[:2], [0, 1])
    with pytest.raises(InputError, match="batch is 0"):
        generation.draw(truth, NAMES[:2], [0, 1], batch=0)
    with pytest.raises(InputError, match="at least 2"):
        generation.diversity(TABLE[:3, None], generation.pixels)
    with pytest.raises(InputError, match="give each sample its own"):
        generation.scenes(TABLE[:2], [])
