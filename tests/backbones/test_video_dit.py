"""The video transformer: zero at birth, relative in space and time, deaf where it must be."""

import dataclasses

import pytest
import torch

from reverie.backbones.video_dit import VideoDit, VideoDitConfig, _whereabouts
from reverie.errors import InputError

CONFIG = VideoDitConfig(channels=3, patch=(1, 4), bottleneck=6, width=24, depth=2, heads=2, context_width=10)


def awake(model):
    """Weights for what is zero at birth."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="module", params=[{}, {"waves": 2, "head": 5}], ids=["plain", "whole"])
def model(request):
    torch.manual_seed(0)
    return awake(VideoDit(dataclasses.replace(CONFIG, **request.param)))


@pytest.fixture
def inputs():
    """x, t, pooled, context, mask for two clips of three frames of 8 x 12."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, True, False, False], [True] * 5])
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return draw(2, 3, 3, 8, 12), torch.tensor([[0.3] * 3, [0.8] * 3]), draw(2, 10), draw(2, 5, 10), mask


close = {"atol": 1e-5, "rtol": 1e-4}


@pytest.mark.parametrize("parts", [{"bottleneck": 0}, {}, {"head": 5}, {"waves": 3}])
def test_the_output_is_zero_at_birth_and_every_parameter_learns(inputs, parts):
    torch.manual_seed(0)
    model = VideoDit(dataclasses.replace(CONFIG, **parts))
    assert not model(*inputs).any()
    awake(model)
    text = model.without_text(*inputs[2:], torch.tensor([True, False]))
    model(*inputs[:2], *text).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("parts", [{"head": 5}, {"waves": 3}])
def test_a_new_part_starts_as_nothing(inputs, parts):
    """So trained weights may go on with it."""
    torch.manual_seed(0)
    plain = awake(VideoDit(CONFIG))
    more = VideoDit(dataclasses.replace(CONFIG, **parts))
    assert not more.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert more(*inputs).equal(plain(*inputs))
    assert not torch.allclose(awake(more)(*inputs), plain(*inputs), atol=1e-3)


@torch.no_grad()
def test_smoothing_reaches_over_the_seams():
    torch.manual_seed(0)
    head = awake(VideoDit(dataclasses.replace(CONFIG, head=5))).head
    x = torch.zeros(1, 3, 8, 8)
    x[..., 3] = 1  # the last column of a patch of 4
    changed = (head(x) - head(x * 0)).abs().amax((0, 1, 2)) > 0
    assert changed.tolist() == [True] * 7 + [False]


@torch.no_grad()
@pytest.mark.parametrize("waves", [0, 3])
def test_only_waves_tell_where_a_patch_of_a_flat_picture_is(inputs, waves):
    """Where all patches are alike, attention to what stands around says nothing, however it turns."""
    torch.manual_seed(0)
    model = awake(VideoDit(dataclasses.replace(CONFIG, waves=waves)))
    x = torch.full((2, 3, 1, 16, 12), 0.3)
    patches = model(x, inputs[1][:, :1], *inputs[2:]).unfold(3, 4, 4).unfold(4, 4, 4)
    apart = (patches - patches[:, :, :, :1, :1]).abs().amax((0, 1, 2, 5, 6)) > 1e-3
    assert apart.sum() == (4 * 3 - 1 if waves else 0)


def test_waves_know_the_edges_of_every_size():
    small, large = _whereabouts(1, 2, 2, 3), _whereabouts(1, 6, 10, 3)
    assert small.shape == (4, 12)
    assert len(set(map(tuple, large.tolist()))) == 60
    torch.testing.assert_close(_whereabouts(2, 6, 10, 3), large.repeat(2, 1))
    inner = large.unflatten(0, (6, 10))[1::3][
        :, 2::5
    ]  # the patches whose middles are those of the small picture
    torch.testing.assert_close(inner.flatten(0, 1), small)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(1, 4, 4), (1, 8, 4), (2, 4, 20), (5, 12, 8)])
def test_any_size_duration_and_aspect(model, inputs, shape):
    f, h, w = shape
    out = model(torch.randn(2, 3, f, h, w), torch.rand(2, f), *inputs[2:])
    assert out.shape == (2, 3, f, h, w)
    assert out.isfinite().all()


@torch.no_grad()
def test_frames_that_are_patched_together(inputs):
    torch.manual_seed(0)
    model = awake(VideoDit(dataclasses.replace(CONFIG, patch=(2, 4))))
    x = torch.randn(2, 3, 4, 8, 8)
    t = torch.tensor([[0.2, 0.2, 0.9, 0.9]] * 2)
    out = model(x, t, *inputs[2:])
    assert out.shape == x.shape
    assert not torch.allclose(out, model(x, t.flip(1), *inputs[2:]), atol=1e-3)


@torch.no_grad()
def test_an_item_s_output_does_not_depend_on_the_batch(model, inputs):
    both = model(*inputs)
    for i in range(2):
        torch.testing.assert_close(model(*(part[i : i + 1] for part in inputs))[0], both[i], **close)


@torch.no_grad()
def test_hidden_words_change_nothing(model, inputs):
    x, t, pooled, context, mask = inputs
    out = model(*inputs)
    torch.testing.assert_close(
        model(x, t, pooled, context.masked_fill(~mask[..., None], 9.0), mask), out, **close
    )
    torch.testing.assert_close(
        model(x[:1], t[:1], pooled[:1], context[:1, :3], mask[:1, :3])[0], out[0], **close
    )
    for changed in ((pooled + 1, context), (pooled, context + 1)):
        assert not torch.allclose(model(x, t, *changed, mask), out, atol=1e-3)


@torch.no_grad()
def test_without_text_the_prompt_is_gone(model, inputs):
    x, t, pooled, context, mask = inputs
    drop = torch.tensor([True, False])
    out = model(x, t, *model.without_text(pooled, context, mask, drop))
    kept = model(*inputs)
    torch.testing.assert_close(out[1], kept[1], **close)
    assert not torch.allclose(out[0], kept[0], atol=1e-3)
    for other in (
        (pooled.flip(0), context.flip(0), mask.flip(0)),
        (pooled, torch.randn(2, 9, 10), torch.ones(2, 9, dtype=torch.bool)),
    ):
        again = model(x, t, *model.without_text(*other, torch.tensor([True, True])))
        torch.testing.assert_close(again[0], out[0], **close)


@torch.no_grad()
def test_every_frame_has_its_own_time(model, inputs):
    x, t, *text = inputs
    out = model(x, t, *text)
    for frame in range(3):
        other = t.clone()
        other[:, frame] = 0.0
        change = (model(x, other, *text) - out).abs().amax((0, 1, 3, 4))
        assert change[frame] > 1e-3  # itself, and through attention the others
    torch.testing.assert_close(model(x, t[:, :1].expand(2, 3), *text), out, **close)


@torch.no_grad()
def test_a_picture_is_a_clip_of_one_frame(inputs):
    """Where frames cannot see each other, each is drawn as the picture that it is."""
    torch.manual_seed(0)
    model = awake(VideoDit(CONFIG))
    for block in model.blocks:
        for parameter in block.attention.out.parameters():
            torch.nn.init.zeros_(parameter)
    x, t, *text = inputs
    t = torch.rand(2, 3)
    clip = model(x, t, *text)
    for frame in range(3):
        picture = model(x[:, :, frame : frame + 1], t[:, frame : frame + 1], *text)
        torch.testing.assert_close(picture[:, :, 0], clip[:, :, frame], **close)


@torch.no_grad()
def test_a_clip_of_equal_frames_that_all_stand_at_one_moment_is_that_picture(model, inputs):
    """pace 0 puts all frames at one moment: nothing tells them apart, so attention sees copies of one picture."""
    x, t, *text = inputs
    still = x[:, :, :1].expand(-1, -1, 3, -1, -1)
    picture = model(x[:, :, :1], t[:, :1], *text)
    clip = model(still, t, *text, pace=0.0)
    torch.testing.assert_close(clip, picture.expand_as(clip), **close)


@torch.no_grad()
def test_pace_is_felt(model, inputs):
    assert not torch.allclose(model(*inputs, pace=2.0), model(*inputs), atol=1e-3)


@torch.no_grad()
def test_every_other_frame_at_double_pace(model, inputs):
    """Frames 0 and 2 of a clip stand where the two frames of a clip at pace 2 stand."""
    x, t, *text = inputs
    seen = []
    blocks = model.blocks
    hook = blocks[0].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["rotary"]), with_kwargs=True
    )
    try:
        model(x, t, *text)
        model(x[:, :, ::2], t[:, ::2], *text, pace=2.0)
    finally:
        hook.remove()
    (cos, sin), (cos2, sin2) = seen
    patches = 2 * 3
    torch.testing.assert_close(cos.unflatten(0, (2, 3, patches))[:, ::2].flatten(0, 2), cos2)
    torch.testing.assert_close(sin.unflatten(0, (2, 3, patches))[:, ::2].flatten(0, 2), sin2)


@torch.no_grad()
def test_it_works_in_bf16_and_under_autocast(model, inputs):
    out = model(*inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = model(*inputs)
    assert (near.float() - out).abs().max() < 0.1 * out.abs().max()


SHAPES = ((1, 8, 12), (3, 8, 4), (1, 12, 8), (2, 4, 12), (1, 8, 12), (3, 4, 8), (1, 4, 4))
PACES = (1.0, 2.0, 1.0, 0.5, 1.0, 1.0, 1.0)


def mixed(*, by_patch=()):
    """Pictures and clips of several sizes, times and lengths of text; items of `by_patch` have a time per patch."""
    generator = torch.Generator().manual_seed(4)
    x = [torch.randn(3, *shape, generator=generator) for shape in SHAPES]
    t = [torch.rand(f, generator=generator) for f, _, _ in SHAPES]
    for i in by_patch:
        f, h, w = SHAPES[i]
        t[i] = torch.randint(0, 3, (f, h // 4, w // 4), generator=generator) / 4
    lengths = torch.randint(1, 6, (len(x),), generator=generator)
    mask = torch.arange(5) < lengths[:, None]
    draw = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    return x, t, draw(len(x), 10), draw(len(x), 5, 10), mask


@pytest.mark.parametrize("by_patch", [(), (0, 1, 5)])
def test_packed_is_each_alone_with_the_gradients_of_every_parameter(model, by_patch):
    x, t, pooled, context, mask = mixed(by_patch=by_patch)
    packed = model(x, t, pooled, context, mask, pace=PACES)
    alone = [
        model(
            x[i][None],
            t[i][None],
            pooled[i][None],
            context[i][None, mask[i]],
            mask[i][None, mask[i]],
            pace=pace,
        )[0]
        for i, pace in enumerate(PACES)
    ]
    names, wanted = zip(*model.named_parameters(), strict=True)
    gradients = []
    for outs in (packed, alone):
        loss = sum(((i + 1) * out).square().sum() for i, out in enumerate(outs))
        gradients.append(torch.autograd.grad(loss, wanted, allow_unused=True))
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, **close)
    for name, ours, theirs in zip(names, *gradients, strict=True):
        assert (ours is None) == (theirs is None) == name.startswith("null"), name
        if ours is not None:
            assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), name


@torch.no_grad()
def test_one_batch_is_the_same_packed_and_each_may_have_its_pace(model, inputs):
    x, t, *text = inputs
    out = model(x, t, *text)
    torch.testing.assert_close(torch.stack(model(list(x), list(t), *text)), out, **close)
    apart = model(x, t, *text, pace=torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(apart[0], out[0], **close)
    torch.testing.assert_close(apart[1], model(x, t, *text, pace=2.0)[1], **close)


@torch.no_grad()
def test_a_time_for_each_patch_is_that_of_its_frame_where_they_agree(model, inputs):
    x, _, *text = inputs
    t = torch.tensor([[0.3, 0.0, 0.9], [0.8, 0.8, 0.1]])
    grid = t[:, :, None, None].expand(2, 3, 2, 3)
    torch.testing.assert_close(model(x, grid, *text), model(x, t, *text), **close)


@torch.no_grad()
def test_every_patch_has_its_own_time(model, inputs):
    """Without attention the time of one patch is felt nowhere else (but through the head, across its seams)."""
    x, _, *text = inputs
    t = torch.full((2, 3, 2, 3), 0.5)
    other = t.clone()
    other[1, 2, 0, 1] = 0.0
    kept = [block.attention.out for block in model.blocks]
    for block in model.blocks:
        block.attention.out = torch.nn.Linear(24, 24)
        torch.nn.init.zeros_(block.attention.out.weight)
    try:
        changed = (model(x, other, *text) - model(x, t, *text)).abs().amax(1) > 1e-5
    finally:
        for block, out in zip(model.blocks, kept, strict=True):
            block.attention.out = out
    patches = changed.unfold(2, 4, 4).unfold(3, 4, 4)
    assert patches[1, 2, 0, 1].all()
    if model.head is None:
        assert patches.sum() == 16
    assert not changed[0].any()
    assert not changed[1, :2].any()


@pytest.mark.parametrize("t", [torch.tensor([[0.5] * 8] * 2), torch.tensor([[0.0] + [0.5] * 7] * 2)])
def test_the_modulation_is_computed_once_for_each_different_time(t):
    model = awake(VideoDit(CONFIG))
    sizes = []
    model.blocks[0].modulation.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    text = torch.randn(2, 10), torch.randn(2, 5, 10), torch.ones(2, 5, dtype=torch.bool)
    model(torch.randn(2, 3, 8, 8, 8), t, *text)
    model(torch.randn(2, 3, 8, 8, 8), t[:, :, None, None].expand(2, 8, 2, 2), *text)
    assert sizes == [2 * len(t[0].unique())] * 2


# Masked passes ----------------------------------------------------------------------------------------------------

MASKED = dataclasses.replace(CONFIG, depth=3, waves=2, head=5, masked=(0.3, 0.5), decoder=1)


def one_is_missing(items, patches, kept):
    generator = torch.Generator().manual_seed(3)
    return torch.stack([torch.randperm(patches, generator=generator)[:kept] for _ in range(items)])


@torch.no_grad()
def test_the_option_leaves_whole_passes_as_they_are(inputs):
    torch.manual_seed(0)
    masked = awake(VideoDit(MASKED))
    plain = VideoDit(dataclasses.replace(MASKED, masked=None)).eval()
    found = plain.load_state_dict(masked.state_dict(), strict=False)
    assert not found.missing_keys
    assert {name.split(".")[0] for name in found.unexpected_keys} == {"missing", "interpolater"}
    assert torch.equal(masked(*inputs), plain(*inputs))


@torch.no_grad()
def test_a_masked_pass_sees_what_stays_alone(inputs):
    torch.manual_seed(0)
    model = awake(VideoDit(MASKED))
    seen = []
    for block in (*model.blocks, model.interpolater):
        block.mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    x, t, *text = inputs
    keep = one_is_missing(2, 18, 10)
    out = model(*inputs, keep=keep)
    assert seen == [20, 20, 36, 36]
    away = torch.ones(2, 18, dtype=torch.bool).scatter(1, keep, False)
    away = away.reshape(2, 1, 3, 2, 3).repeat_interleave(4, 3).repeat_interleave(4, 4)
    assert torch.allclose(model(x + 3 * away, t, *text, keep=keep), out, **close)
    assert not torch.allclose(model(x + 3 * ~away, t, *text, keep=keep), out, atol=1e-2)
    assert torch.allclose(model(*inputs, keep=keep.flip(1)), out, **close)
    assert torch.allclose(model(*inputs, keep=one_is_missing(2, 18, 18)), model(*inputs), **close)
    missing = model.missing.clone()
    model.missing.zero_()
    assert not torch.allclose(model(*inputs, keep=keep), out, atol=1e-3)
    model.missing.copy_(missing)


@torch.no_grad()
def test_masked_items_are_the_same_packed_and_alone(inputs):
    torch.manual_seed(0)
    model = awake(VideoDit(MASKED))
    x, t, pooled, context, mask = inputs
    four = [torch.cat([part, part]) for part in (pooled, context, mask)]
    xs = [x[0], torch.randn(3, 1, 8, 8), x[1], torch.randn(3, 1, 12, 4)]
    ts = [t[0], torch.tensor([0.4]), torch.rand(3, 2, 3), torch.tensor([0.9])]
    keeps = [torch.randperm(n)[:k] for n, k in ((18, 10), (4, 2), (18, 10), (3, 2))]
    outs = model(xs, ts, *four, keep=keeps)
    for i, out in enumerate(outs):
        alone = model(xs[i][None], ts[i][None], *(part[i : i + 1] for part in four), keep=keeps[i][None])
        assert torch.allclose(out, alone[0], **close)


def test_every_part_of_a_masked_pass_learns(inputs):
    torch.manual_seed(0)
    model = awake(VideoDit(MASKED))
    text = model.without_text(*inputs[2:], torch.tensor([True, False]))
    model(*inputs[:2], *text, keep=one_is_missing(2, 18, 10)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "wrong", [{"masked": (0.5, 0.3)}, {"masked": (0.3, 1.0)}, {"decoder": 3}, {"decoder": 0}]
)
def test_masks_that_cannot_be(wrong):
    with pytest.raises(InputError):
        dataclasses.replace(MASKED, **wrong)
