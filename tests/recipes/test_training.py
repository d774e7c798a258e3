"""What the training recipes do besides training: name what they leave out, and refuse what has no shape."""

import json
from functools import partial

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import reverie
from reverie.backbones.video_dit import VideoDit
from reverie.codecs.bpe import Bpe
from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.pixels import Bad
from reverie.encoders.clip_resnet import ClipResnetConfig
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.processes import gaussian
from reverie.recipes import clip, sora
from reverie.recipes.parts import heads_of, home, name_bad, open_world, seldom
from reverie.recipes.sora_batches import SoraRun, Source
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.sora import Sora
from reverie.train.log import Run
from reverie.train.optimizers import adamw


@pytest.fixture
def folder(tmp_path):
    """Six pictures with captions, the last of which is damaged after the import."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(6):
        Image.new("RGB", (16, 16), (40 * i, 0, 90)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"picture {i}")
    import_folder(place, val=0, quiet=True)
    (place / "5.png").write_bytes(b"")
    return place


def test_files_that_cannot_be_used_are_named_once(tmp_path, capsys):
    class Source:
        bad = (Bad("a.png", "the file is empty"),)

    run = Run(tmp_path / "run", progress=True)
    for _ in range(2):  # a run that goes on says it again
        name_bad(run, Source())
    run.rewind(3)
    run.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()]
    assert rows == [{"step": 0, "path": "a.png", "reason": "the file is empty"}]
    assert "1 files cannot be used" in capsys.readouterr().err


def test_widths_without_a_head_are_refused():
    assert heads_of(192) == 3
    for width in (32, 100):
        with pytest.raises(InputError, match=f"width {width}"):
            heads_of(width)


def test_the_fixed_batch_is_as_large_as_what_can_be_read(folder):
    """A bad file in the validation split must not cost the run: the loss takes whatever is left."""
    tokenizer = Bpe.train([f"picture {i}" for i in range(6)], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=32, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=16, patch=16, width=32, depth=1, heads=1)
    reader = Clip(ClipConfig(image=image, text=text, width=16), tokenizer)
    for size in (0, 8, 50):
        with pytest.raises(InputError, match=f"size {size} .*16"):
            sora.shape(reader, size=size)
    config = SoraRun(model=sora.shape(reader, size=16, sizes=(1, 32, 1)), steps=1, batch=2, clips=0)
    model = Sora(config.model, tokenizer).to(home())
    fixed = Source(Index.read(folder), config, model, frames=1).fixed(64)
    assert len(fixed["latents"]) == 5
    assert torch.isfinite(model.loss(fixed)["loss"])


def test_a_world_of_short_clips_is_seen_whole(tmp_path):
    """Clips of 8 frames are never cut or thinned; of 16, half the batches see each other frame, half a stretch."""
    index = open_world(tmp_path / "world", 4, 4, 4, seed=0, frames=8, size=16)
    assert (
        sorted(item.file_name.split("/")[0] for item in index)
        == ["clips"] * 4 + ["hidden"] * 4 + ["pictures"] * 4
    )
    assert {(item.width, item.height, item.frames) for item in index} == {(16, 16, 1), (16, 16, 8)}
    assert (
        len(open_world(tmp_path / "world", 4, 4, 0, seed=0)) == 8
    )  # what is there stays, what is not asked for
    world = partial(sora.world, tmp_path / "world", tmp_path / "run", clip="clip-stickers", count=4)
    for asked, said in (
        (
            {"size": 32},
            "pictures holds pictures of 16 x 16 pixels, but pictures of 32 x 32 pixels were asked",
        ),
        ({"size": 16, "frames": 9}, "clips holds clips of 8 frames of 16 x 16 pixels, but clips of 9 frames"),
    ):
        with pytest.raises(InputError, match=said):
            world(**asked)
    assert not (tmp_path / "run").exists()
    tokenizer = Bpe.train([item.captions[0].text for item in index], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=32, depth=1, heads=1, end=tokenizer.end)
    reader = Clip(
        ClipConfig(image=VitConfig(size=16, patch=16, width=32, depth=1, heads=1), text=text, width=16),
        tokenizer,
    )
    model = Sora(sora.shape(reader, size=16, patch=8, sizes=(1, 32, 1)), tokenizer).to(home())
    assert model.config.backbone.patch == (1, 8)
    for length, paces in ((8, {1.0}), (16, {1.0, 2.0})):
        config = SoraRun(model=model.config, steps=1, batch=2, clips=2)
        source = Source(index.select(video=True), config, model, frames=length)
        batches = [source.clips(step) for step in range(12)]
        assert {batch["pace"] for batch in batches} == paces
        assert all(batch["latents"].shape == (2, 3, 8, 16, 16) for batch in batches)
        if length == 8:
            whole = [source._video(i, slice(None)) for i in source.good]
            assert all(
                any(torch.equal(one, clip) for clip in whole)
                for batch in batches
                for one in batch["latents"].cpu()
            )


def test_short_runs_measure_seldom_and_long_ones_as_before():
    for steps in (24, 25, 600, 6001):
        assert seldom(steps, 12) == max(steps // 12, 1)
    for steps in range(1, 24):
        every = seldom(steps, 12)
        assert sum(step % every == 0 or step == steps for step in range(1, steps + 1)) <= 4


def test_clips_too_short_to_be_judged_are_refused(tmp_path):
    with pytest.raises(InputError, match="frames is 4"):
        sora.world(tmp_path / "world", tmp_path / "run", clip="clip-stickers", frames=4)


@pytest.mark.parametrize(("scale", "millions"), [("S", 33), ("B", 130), ("L", 458), ("XL", 675)])
def test_dit_has_the_sizes_of_its_table(scale, millions):
    """Table 1 with its appendix counts the class-conditional DiT; ours reads text with a cross-attention per block."""
    with torch.device("meta"):
        reader = Clip(clip.shape(600, 599))
        config = sora.shape(reader, sizes=sora.DIT[scale], size=256).backbone
        count = sum(p.numel() for p in VideoDit(config).parameters()) / 1e6
    depth, width, _ = sora.DIT[scale]
    reading = depth * (2 * width**2 + 2 * width * reader.config.text.width) / 1e6
    assert count - reading == pytest.approx(millions, rel=0.05)


@pytest.mark.parametrize("drop", [0.0, 0.5])
def test_a_batch_embedded_in_chunks_teaches_the_same(drop, folder, tmp_path, monkeypatch):
    """The recipe from end to end: what is computed twice sees the same views, and the same patches of them."""
    rows = []
    monkeypatch.setattr(clip, "chunk_within", lambda memory, *_, folder: {"6GB": 2}[memory])
    for chunk in (0, 2):
        out = tmp_path / str(chunk)
        clip.tiny(folder, out, steps=2, batch=5, memory="6GB" if chunk else "", size=32, drop=drop)
        assert json.loads((out / "config.json").read_text())["chunk"] == chunk
        rows.append(json.loads((out / "metrics.jsonl").read_text().splitlines()[0]))
    assert rows[0]["step"] == 2
    for key in ("loss", "grad_norm", "accuracy", "scale"):
        assert rows[1][key] == pytest.approx(rows[0][key], rel=1e-4)


def test_a_chunk_is_given_or_chosen(folder, tmp_path):
    with pytest.raises(InputError, match="chunk is 2 and memory is 'free', which chooses a chunk"):
        clip.tiny(folder, tmp_path / "run", steps=2, batch=5, chunk=2, memory="free")


def test_chunks_and_batch_norm_do_not_go_together(folder, tmp_path):
    tokenizer = Bpe.train([f"picture {i}" for i in range(6)], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=64, depth=1, heads=1, end=tokenizer.end)
    image = ClipResnetConfig(size=32, width=8, depths=(1, 1, 1, 1), heads=2, out=16)
    config = clip.ClipRun(
        model=ClipConfig(image=image, text=text, width=16, image_projection=False), steps=1, batch=4, chunk=2
    )
    model = Clip(config.model, tokenizer)
    with pytest.raises(InputError, match="chunk is 2, but this model has batch norm"):
        clip.fit(config, model, Index.read(folder), tmp_path / "run", measures={})


def test_the_memory_chooses_a_chunk_of_real_batches(folder, tmp_path):
    clip.tiny(folder, tmp_path / "free", steps=1, batch=5, size=16, memory="free")
    assert json.loads((tmp_path / "free" / "config.json").read_text())["chunk"] == 0
    with pytest.raises(InputError, match="Two items at a time need"):
        clip.tiny(folder, tmp_path / "none", steps=1, batch=5, size=16, memory="1MB")


def test_a_clip_needs_two_to_compare(folder, tmp_path, capsys):
    with pytest.raises(InputError, match="batch is 1"):
        clip.tiny(folder, tmp_path / "one", steps=1, batch=1, size=16)
    clip.tiny(folder, tmp_path / "all", steps=1, batch=64, size=16)
    assert "there are 6 pictures, so a batch has 6 and not 64" in capsys.readouterr().err


def test_patches_of_twice_the_side_begin_with_the_same_drawing(tmp_path):
    """What was learnt small is taken over larger: of pictures whose noise is seen smaller, the same, enlarged."""
    torch.manual_seed(0)
    tokenizer = Bpe.train(["a b c"], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=16, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=16, patch=16, width=16, depth=1, heads=1)
    reader = Clip(ClipConfig(image=image, text=text, width=16), tokenizer)
    small = Sora(sora.shape(reader, size=16, sizes=(1, 64, 1), patch=8), tokenizer)
    for parameter in small.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    reverie.save(small, tmp_path / "small")
    large = Sora(sora.shape(reader, size=32, sizes=(1, 64, 1), patch=16, zoom=2), tokenizer)
    sora.take_over(large, reverie.load(tmp_path / "small"), "small")
    words = small.read(["a", "b"])
    x0, noise, t = torch.randn(2, 3, 1, 16, 16), torch.randn(2, 3, 1, 32, 32), torch.tensor([[0.3], [0.9]])
    seen = F.avg_pool2d(noise[:, :, 0], 2)[:, :, None] * 2  # the mean of four has half the deviation
    wide = t[:, None, :, None, None]
    one = small.backbone((1 - wide) * x0 + wide * seen, t, *words)
    later = gaussian.shift(t, 2.0)
    wide = later[:, None, :, None, None]
    enlarged = x0.repeat_interleave(2, -1).repeat_interleave(2, -2)
    two = large.backbone((1 - wide) * enlarged + wide * noise, later, *words)
    torch.testing.assert_close(
        one.repeat_interleave(2, -1).repeat_interleave(2, -2), two, atol=1e-4, rtol=1e-4
    )


def some_clip():
    torch.manual_seed(0)
    tokenizer = Bpe.train(["a b c"], vocab=600)
    text = TextConfig(vocab=tokenizer.vocab, length=8, width=16, depth=1, heads=1, end=tokenizer.end)
    image = VitConfig(size=16, patch=16, width=16, depth=1, heads=1)
    return Clip(ClipConfig(image=image, text=text, width=16), tokenizer)


def test_masked_training_goes_on_from_plain_weights_and_back(tmp_path):
    reader = some_clip()
    plain, masked = (
        Sora(sora.shape(reader, size=16, sizes=(3, 64, 1), patch=8, masked=on), reader.tokenizer)
        for on in (False, True)
    )
    for parameter in plain.backbone.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    reverie.save(plain, tmp_path / "plain")
    sora.take_over(masked, reverie.load(tmp_path / "plain"), "plain")
    x, t, words = torch.randn(2, 3, 1, 16, 16), torch.rand(2, 1), plain.read(["a", "b"])
    assert torch.equal(masked.backbone(x, t, *words), plain.backbone(x, t, *words))
    reverie.save(masked, tmp_path / "masked")
    assert reverie.load(tmp_path / "masked").config == masked.config
    with torch.no_grad():
        plain.backbone.out.bias.add_(1)
    sora.take_over(plain, reverie.load(tmp_path / "masked"), "masked")
    assert torch.equal(masked.backbone(x, t, *words), plain.backbone(x, t, *words))


def test_a_masked_step_leaves_as_many_patches_out_of_every_item(folder):
    reader = some_clip()
    shape = sora.shape(reader, size=16, sizes=(3, 64, 1), patch=4, masked=True)
    config = SoraRun(model=shape, steps=1, batch=2, clips=0)
    source = Source(Index.read(folder), config, Sora(shape, reader.tokenizer), frames=1)
    batches = [source.pictures(step) for step in range(8)]
    kept = [batch["keep"].shape for batch in batches]
    assert all(items == 2 and 8 <= count <= 11 for items, count in kept)  # of 16 patches 50 to 70 %
    assert len(set(kept)) > 1
    assert not torch.equal(batches[0]["masked_noise"], batches[0]["noise"])
    again = source.pictures(3)
    assert torch.equal(again["keep"], batches[3]["keep"])
    assert torch.equal(again["masked_noise"], batches[3]["masked_noise"])
    assert "keep" not in source.fixed(2)


@pytest.mark.parametrize("masked", [False, True])
def test_the_optimizer_takes_sora_with_masks_and_without(masked):
    model = Sora(sora.shape(some_clip(), size=16, sizes=(3, 64, 1), patch=8, masked=masked), None)
    groups = adamw(model, lr=1e-3, weight_decay=0.1).param_groups
    spared = {id(p) for group in groups if not group["weight_decay"] for p in group["params"]}
    assert id(model.backbone.null_context) in spared
    assert not masked or id(model.backbone.missing) in spared
