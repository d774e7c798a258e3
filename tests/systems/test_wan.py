"""Wan as a system: what holds whatever its weights are."""

import dataclasses
import sys

import pytest
import torch

import reverie
from reverie.backbones.wan import WanDit, WanDitConfig
from reverie.codecs.video_vae import VideoVaeConfig
from reverie.encoders.umt5 import Umt5, clean
from reverie.errors import InputError
from reverie.processes.gaussian import Ddpm, Flow
from reverie.samplers.configured import SamplerConfig
from reverie.systems.wan import MODELS, SAMPLERS, Wan, WanConfig

BACKBONE = WanDitConfig(channels=4, width=24, hidden=40, depth=2, heads=2, context_width=12, clock=8)
CODEC = VideoVaeConfig(channels=4, widths=(8, 8, 8, 8), temporal=(False, True, True), patch=1)
CONFIG = WanConfig(backbone=BACKBONE, codec=CODEC, size=(32, 48), frames=5, steps=3, words=16)


@pytest.fixture(scope="module")
def wan():
    torch.manual_seed(0)
    system = Wan(CONFIG).eval()
    with torch.no_grad():
        for parameter in system.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return system


def features(count, places=6, seed=1):
    context = torch.randn(count, places, 12, generator=torch.Generator().manual_seed(seed))
    for row, words in zip(context, (4, 2, places, 0), strict=False):
        row[words:] = 0
    return context


@pytest.mark.parametrize("sampler", [None, *SAMPLERS])
def test_a_batch_is_its_items_drawn_alone(wan, sampler):
    said = []
    both = wan.generate_video(
        features(2),
        negative=features(1, seed=2),
        seed=7,
        sampler=sampler,
        progress=lambda *each: said.append(each),
    )
    assert both.shape == (2, 3, 5, 32, 48)
    assert both.abs().max() <= 1
    assert said == [(1, 3), (2, 3), (3, 3)]
    for i in range(2):
        alone = wan.generate_video(
            features(2)[i : i + 1], negative=features(1, seed=2), seed=7 + i, sampler=sampler
        )
        assert (alone - both[i : i + 1]).abs().max() < 1e-4
    assert (both[0] - both[1]).abs().max() > 1e-2


def test_a_picture_is_a_video_of_one_frame_and_frames_are_filled_up(wan):
    options = {"negative": features(1, seed=2), "seed": 3}
    picture = wan.generate_image(features(1), **options)
    assert torch.equal(picture[:, :, None], wan.generate_video(features(1), frames=1, **options))
    three, five = (wan.generate_video(features(1), frames=frames, **options) for frames in (3, 5))
    assert torch.equal(three, five[:, :, :3])
    assert wan.generate_latents(features(1), frames=81, size=(16, 32), steps=1, **options).shape == (
        1,
        4,
        21,
        2,
        4,
    )


def test_places_beyond_a_prompt_count_as_wan_counts_them(wan):
    """All of them are attended to: features with fewer places are filled up, and folding them changes nothing."""
    context = features(3)
    assert torch.equal(wan.read(context)[:, 6:], torch.zeros(3, 10, 12))
    x, t = torch.randn(3, 4, 1, 4, 4), torch.rand(3)
    with torch.no_grad():
        whole = wan.backbone(x, t, wan.read(context))
        folded = wan.backbone.prepare(wan.read(context))
        assert folded.keys[0].shape[2] == 7
        assert (wan.backbone(x, t, folded) - whole).abs().max() < 1e-5
        assert (wan.backbone(x, t, wan.backbone.prepare(context)) - whole).abs().max() > 1e-4
        assert (wan.backbone(x[:1], t[:1], folded.first(1)) - whole[:1]).abs().max() < 1e-5


def test_guidance_of_one_is_the_prompt_alone_and_others_lead_away(wan):
    alone = wan.generate_latents(features(1), guidance=1.0)
    assert (wan.generate_latents(features(1), negative=features(1), guidance=6.0) - alone).abs().max() < 1e-3
    assert (
        wan.generate_latents(features(1), negative=features(1, seed=2), guidance=6.0) - alone
    ).abs().max() > 1e-2


def test_a_cache_spares_the_blocks_behind_the_first_and_at_0_changes_nothing(wan):
    times = []
    handle = wan.backbone.blocks[-1].register_forward_hook(lambda *_: times.append(1))

    def draw(cache):
        times.clear()
        return wan.generate_latents(features(1), negative=features(1, seed=2), steps=4, cache=cache), len(
            times
        )

    (plain, often), (same, always), (other, once) = draw(0), draw(1e-9), draw(1e9)
    assert torch.equal(plain, same)
    assert not torch.equal(plain, other)
    assert (often, always, once) == (4, 4, 1)
    with pytest.raises(InputError, match="no threshold"):
        draw(float("nan"))
    handle.remove()


def test_one_time_for_all_is_each_with_its_own(wan):
    x, context = torch.randn(2, 4, 2, 4, 4), wan.read(features(2))
    with torch.no_grad():
        one, each = (wan.backbone(x, torch.full((n,), 0.3), context) for n in (1, 2))
    assert (one - each).abs().max() < 1e-5


def test_where_a_patch_stands_counts_on_every_axis(wan):
    """Swapping what stands in two places changes more than their order."""
    x = torch.randn(1, 4, 2, 4, 4)
    with torch.no_grad():
        out = wan.backbone(x, torch.tensor([0.5]), wan.read(features(1)))
        for dim in (2, 3, 4):
            order = list(range(x.shape[dim]))
            order = order[::-1] if dim == 2 else [2, 3, 0, 1]
            moved = wan.backbone(
                x.index_select(dim, torch.tensor(order)), torch.tensor([0.5]), wan.read(features(1))
            )
            assert (moved.index_select(dim, torch.tensor(order)) - out).abs().max() > 1e-5


def test_the_loss_is_the_velocity_and_training_lowers_it():
    torch.manual_seed(0)
    wan = Wan(CONFIG)
    g = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(4, 4, 2, 4, 4, generator=g), "noise": torch.randn(4, 4, 2, 4, 4, generator=g),
        "normal": torch.randn(4, generator=g), "context": features(4),
    }  # fmt: skip
    first = wan.loss(batch)["loss"]
    # A new network says nothing, so the error is the velocity's own size.
    assert torch.allclose(first, (batch["noise"] - batch["latents"]).square().mean())
    optimizer = torch.optim.Adam([p for p in wan.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(30):
        optimizer.zero_grad()
        loss = wan.loss(batch)["loss"]
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * first
    assert all(parameter.grad is None for parameter in wan.codec.parameters())
    t = wan.draw_times(torch.zeros(1))
    assert t.item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))


def test_it_is_saved_and_loaded(wan, tmp_path):
    reverie.save(wan, tmp_path / "wan")
    again = reverie.load(tmp_path / "wan")
    assert again.config == wan.config
    options = {"negative": features(1, seed=2), "steps": 2}
    assert torch.equal(
        again.generate_latents(features(1), **options), wan.generate_latents(features(1), **options)
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"size": (32, 50)}, "multiples of 16"),
        ({"size": 32}, "size must be"),
        ({"frames": 0}, "frames is 0"),
        ({"frames": 2.5}, "frames is 2.5"),
        ({"steps": 0}, "steps is 0"),
        ({"guidance": float("nan")}, "guidance is nan"),
        ({"guidance": 1e38}, "more than numbers can hold"),
        ({"sampler": "magic"}, "magic"),
        ({"interval": (0.2,)}, "interval must be two times"),
        ({"interval": (0.8, 0.2)}, "the lower one first"),
        ({"rescale": 3}, "rescale 3 is no share"),
        ({"sampler": SamplerConfig(process=Ddpm())}, "velocity of a flow"),
        ({"sampler": SamplerConfig(process=Ddpm(), prediction="velocity")}, "velocity of a flow"),
        ({"shift": 0}, "shift is 0"),
        ({"seed": "a"}, "seed is 'a'"),
        ({"noise": torch.zeros(1, 4, 2, 4, 4)}, "noise is"),
        ({"negative": features(2)}, "negative prompt"),
        ({"negative": "ugly"}, "no text encoder"),
    ],
)
def test_mistakes_are_one_sentence(wan, options, said):
    with pytest.raises(InputError, match=said):
        wan.generate_video(features(1), **({"negative": features(1, seed=2)} | options))


def test_mistakes_of_prompts_and_configurations(wan):
    for prompts, said in (
        ("a cat", "list of one string"), ([], "list of one string"), ([1], "list of one string"),
        (["a cat"], "no text encoder"), (torch.zeros(1, 3, 5), "b m 12"), (torch.zeros(1, 17, 12), "at most 16"),
        (torch.zeros(1, 3, 12, dtype=torch.long), "floats"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            wan.generate_video(prompts)
    with pytest.raises(InputError, match="channels"):
        WanConfig(backbone=BACKBONE, codec=dataclasses.replace(CODEC, channels=8))
    with pytest.raises(InputError, match="velocity"):
        WanConfig(backbone=BACKBONE, sampling=SamplerConfig(process=Ddpm()))
    with pytest.raises(InputError, match="heads"):
        WanDitConfig(width=30, heads=4)
    alone = Wan(WanConfig(backbone=BACKBONE, words=16))
    assert alone.generate_latents(features(1), guidance=1, frames=1, size=(32, 32), steps=1).shape == (
        1,
        4,
        1,
        4,
        4,
    )
    with pytest.raises(InputError, match="transformer alone"):
        alone.generate_video(features(1), guidance=1)


def test_prompts_are_cleaned_and_their_encoder_is_asked_for(tmp_path, monkeypatch):
    assert clean("  a &amp;amp; b\n\t cafÃ© ") == "a & b café"
    with pytest.raises(InputError, match="text_encoder"):
        Umt5(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match=r"reverie\[interop\]"):
        Umt5(tmp_path).read(["a cat"])


def test_a_tokenizer_without_its_vocabulary_is_refused(tmp_path):
    """transformers would make one that knows no word."""
    pytest.importorskip("transformers")
    for folder in ("tokenizer", "text_encoder"):
        (tmp_path / folder).mkdir()
    (tmp_path / "text_encoder" / "config.json").write_text("{}")
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(InputError, match=r"tokenizer\.json or spiece\.model"):
        Umt5(tmp_path).read(["a cat"])


def test_shares_of_a_head_are_wans():
    for head, shares in ((128, (44, 42, 42)), (64, (24, 20, 20)), (12, (4, 4, 4))):
        assert WanDitConfig(width=2 * head, heads=2).shares == shares


def test_a_sampler_by_its_name_keeps_what_the_folder_says_of_times():
    sampling = dataclasses.replace(CONFIG.sampling, process=Flow(shift=5.0), times=500, order=3)
    wan = Wan(dataclasses.replace(CONFIG, sampling=sampling))
    chosen = wan._sampling("dpmpp_2m", None)
    assert (chosen.sampler, chosen.process, chosen.times) == ("dpmpp_2m", Flow(shift=5.0), 500)


def test_shift_moves_sampling_and_training_alike():
    sampling = dataclasses.replace(CONFIG.sampling, process=Flow(shift=5.0))
    wan = Wan(dataclasses.replace(CONFIG, sampling=sampling))
    assert wan.draw_times(torch.zeros(1)).item() == pytest.approx(5 / 6)
    assert sampling.points(2)[1].sigma > CONFIG.sampling.points(2)[1].sigma


def test_a_new_network_says_nothing():
    assert WanDit(BACKBONE)(torch.randn(1, 4, 1, 4, 4), torch.tensor([0.5]), features(1)).abs().max() == 0


@pytest.mark.parametrize(
    ("name", "count"), [("wan2.1-t2v-1.3b", 1_418_996_800), ("wan2.1-t2v-14b", 14_288_491_584)]
)
def test_published_sizes(name, count):
    with torch.device("meta"):
        model = WanDit(MODELS[name].backbone)
    assert sum(parameter.numel() for parameter in model.parameters()) == count
