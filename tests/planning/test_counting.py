"""What is counted on shapes, beside formulas by hand and beside what a real step keeps."""

import pytest
import torch

from reverie.encoders.text import Text, TextConfig
from reverie.encoders.vit import Vit, VitConfig
from reverie.nn.block import Block
from reverie.planning.counting import count, on_shapes
from reverie.systems.clip import Clip, ClipConfig
from reverie.train import Player, adamw, estimate
from reverie.train.engine import recompute

WIDTH, DEPTH, HIDDEN, ITEMS = 128, 3, 320, 4


def vit():
    with on_shapes():
        return Vit(
            VitConfig(size=64, patch=16, width=WIDTH, depth=DEPTH, heads=4, hidden=HIDDEN, pool="mean")
        )


def of_vit(model, **options):
    image = torch.empty(ITEMS, 3, 64, 64, device="meta")
    return count(model, lambda peers: model(image).sum(), **options)


def products(places):
    """Multiplications and additions of the blocks: four linear layers, without attention."""
    return DEPTH * ITEMS * places * 2 * (WIDTH * 3 * WIDTH + WIDTH * WIDTH + 2 * WIDTH * HIDDEN)


def attention(places):
    """q k^T and the product with v."""
    return DEPTH * ITEMS * 2 * 2 * places * places * WIDTH


@pytest.mark.parametrize("fused", [True, False])
def test_a_vit_by_hand(fused):
    places = 16
    stem = 2 * ITEMS * places * 3 * 16 * 16 * WIDTH
    found = of_vit(vit(), fused=fused)
    assert found.forward_flops == stem + products(places) + attention(places)
    # Backward: both factors of a product have a gradient, but the pixels; the fused kernel computes q k^T once more.
    back = stem + 2 * products(places) + (2.5 if fused else 2) * attention(places)
    assert found.flops == found.forward_flops + back


def test_a_text_transformer_by_hand():
    with on_shapes():
        model = Text(TextConfig(vocab=1000, length=24, width=WIDTH, depth=DEPTH, heads=4, hidden=HIDDEN))
    tokens = torch.empty(ITEMS, 24, dtype=torch.long, device="meta")
    found = count(model, lambda peers: model(tokens).sum())
    assert found.forward_flops == products(24) + attention(24)
    assert found.flops == 3 * products(24) + 3.5 * attention(24)


def test_mixed_precision_has_the_same_products_and_moves_less():
    wide, half = of_vit(vit()), of_vit(vit(), precision="bf16")
    assert half.flops == wide.flops
    assert {op.half for op in half.ops if op.flops} == {True}
    assert not any(op.half for op in wide.ops)
    assert half.bytes < wide.bytes
    # Backward reads the blocks' matrices; neither the biases nor the stem's, since pixels have no gradient.
    read = [p for name, p in vit().named_parameters() if "blocks" in name and p.ndim == 2]
    assert half.copies == 2 * sum(p.numel() for p in read)


def test_recompute_takes_the_blocks_once_more_and_keeps_their_inputs():
    plain, again = vit(), vit()
    assert recompute(again) == DEPTH
    direct, less = of_vit(plain), of_vit(again)
    last = (
        DEPTH * ITEMS * 16 * 2 * HIDDEN * WIDTH
    )  # the last product of a block: nothing needs its result again
    assert less.flops - direct.flops == products(16) + attention(16) - last
    assert less.forward_flops == direct.forward_flops
    x, patches = ITEMS * 16 * WIDTH * 4, ITEMS * 16 * 3 * 16 * 16 * 4
    assert less.kept < direct.kept / 3
    assert (
        DEPTH * x + patches <= less.kept <= (DEPTH + 9) * x + patches
    )  # the norms around the blocks keep a few


def test_fused_attention_keeps_no_scores():
    places, items = 400, 2
    with on_shapes():
        block = Block(WIDTH, 4)
    x = torch.empty(items, places, WIDTH, device="meta")
    fused, plain = (count(block, lambda peers: block(x).sum(), fused=fused) for fused in (True, False))
    scores = items * 4 * places * places * 4
    assert plain.kept - fused.kept > 0.9 * scores


def test_what_is_alive_is_what_a_real_step_keeps():
    """On a CPU in fp32, by what autograd saves of the same model on the same shapes."""
    config = ClipConfig(
        image=VitConfig(size=64, patch=16, width=192, depth=4, heads=3, activation="gelu", stem="conv", pool="mean"),
        text=TextConfig(vocab=500, length=20, width=192, depth=2, heads=3, activation="gelu", end=499),
        width=192,
    )  # fmt: skip
    torch.manual_seed(0)
    real = Clip(config)
    tokens = torch.randint(1, 400, (16, 20))
    tokens[:, -1] = 499  # nothing to cut
    images = torch.rand(16, 3, 64, 64) * 2 - 1
    player = Player(real, optimizer=adamw(real, lr=1e-3))
    kept = estimate([player], [{"image": images, "tokens": tokens}], steps=1, precision="fp32").activations

    with on_shapes():
        model = Clip(config)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in real.parameters())
    model.text.check = lambda tokens: None
    model.text.trim = lambda tokens: tokens
    batch = {"image": images.to("meta"), "tokens": tokens.to("meta")}
    found = count(model, lambda peers: model.loss(batch)["loss"])
    assert found.kept == pytest.approx(kept, rel=0.06)
    assert found.kept <= found.peak < 1.3 * found.kept


def test_other_processes_are_seen_and_what_they_send_is_noted():
    with on_shapes():
        image = VitConfig(size=32, patch=16, width=64, depth=1, heads=1)
        text = TextConfig(vocab=50, length=8, width=64, depth=1, heads=1, end=49)
        model = Clip(ClipConfig(image=image, text=text, width=32))
    a, b = (torch.empty(16, 32, device="meta", requires_grad=True) for _ in range(2))
    alone, eight = (
        count(model, lambda peers: model.compare(a, b, peers=peers)["loss"], peers=peers) for peers in (1, 8)
    )
    assert alone.sent == {}
    vectors, labels = 16 * 32 * 4, 16 * 8
    # both towers' vectors, and three times the labels, which are int64
    assert eight.sent["all-gather"] == 7 * (2 * vectors + labels)
    assert eight.sent["reduce-scatter"] == 7 * 2 * vectors
    pairs = {op.flops for op in eight.ops if op.kind == "product"}
    assert 2 * 16 * (8 * 16) * 32 in pairs  # own rows against the columns of all
    assert eight.flops > 4 * alone.flops


def test_a_model_with_memory_is_refused():
    with pytest.raises(AssertionError, match="has memory"):
        count(torch.nn.Linear(2, 2), lambda peers: torch.zeros(()))
