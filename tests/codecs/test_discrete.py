"""Codecs with codes: DALL-E's autoencoder and VQGAN."""

import pytest
import torch
from torch import nn

import reverie
from reverie.codecs.dvae import Dvae, DvaeConfig, gumbel, soft_choice, squeezed
from reverie.codecs.vq import MovingCodebook, VqConfig, VqVae, passed
from reverie.errors import InputError
from reverie.weights import files

DVAE = DvaeConfig(vocab=40, width=8, groups=3, depth=2, begin=6)
VQ = VqConfig(vocab=40, dim=6, channels=8, widths=(8, 16), depth=1, groups=4, attention=1)


def spread(codec):
    """Weights large enough that codes differ."""
    for parameter in codec.parameters():
        nn.init.normal_(parameter, std=0.3)
    return codec.eval()


class Theirs(nn.Module):
    """OpenAI's published definition (encoder.py, decoder.py), under their names, written anew."""

    class Conv(nn.Module):
        def __init__(self, a, b, side):
            super().__init__()
            self.w = nn.Parameter(torch.randn(b, a, side, side) * 3 / (a * side**2) ** 0.5)
            self.b = nn.Parameter(torch.randn(b) * 0.2)

        def forward(self, x):
            return nn.functional.conv2d(x, self.w, self.b, padding=(self.w.shape[-1] - 1) // 2)

    class Block(nn.Module):
        def __init__(self, a, b, layers, sides):
            super().__init__()
            inner, conv = b // 4, Theirs.Conv
            self.gain = 1 / layers**2
            self.id_path = conv(a, b, 1) if a != b else nn.Identity()
            widths = (a, inner, inner, inner, b)
            steps = {}
            for i in range(4):
                steps |= {
                    f"relu_{i + 1}": nn.ReLU(),
                    f"conv_{i + 1}": conv(widths[i], widths[i + 1], sides[i]),
                }
            self.res_path = nn.Sequential()
            for name, step in steps.items():
                self.res_path.add_module(name, step)

        def forward(self, x):
            return self.id_path(x) + self.gain * self.res_path(x)

    class Half(nn.Module):
        def __init__(self, into, begin, stem, widths, depth, out, sides, resize):
            super().__init__()
            self.blocks = nn.Sequential()
            self.blocks.add_module("input", Theirs.Conv(into, begin, stem))
            before = begin
            for i, width in enumerate(widths):
                group = nn.Sequential()
                for j in range(depth):
                    block = Theirs.Block(before if j == 0 else width, width, len(widths) * depth, sides)
                    group.add_module(f"block_{j + 1}", block)
                if i < len(widths) - 1:
                    group.add_module("resize", resize())
                self.blocks.add_module(f"group_{i + 1}", group)
                before = width
            last = nn.Sequential()
            last.add_module("relu", nn.ReLU())
            last.add_module("conv", Theirs.Conv(before, out, 1))
            self.blocks.add_module("output", last)

        def forward(self, x):
            return self.blocks(x)

    def __init__(self, c):
        super().__init__()
        widths = [c.width * 2**i for i in range(c.groups)]
        self.encoder = Theirs.Half(
            3, c.width, 7, widths, c.depth, c.vocab, (3, 3, 3, 1), lambda: nn.MaxPool2d(2)
        )
        self.decoder = Theirs.Half(
            c.vocab, c.begin, 1, widths[::-1], c.depth, 6, (1, 3, 3, 3), lambda: nn.Upsample(scale_factor=2)
        )


def test_openai_s_encoder_and_decoder_load_with_equal_codes_and_pictures(tmp_path):
    torch.manual_seed(0)
    theirs = Theirs(DVAE).eval()
    files.write(tmp_path / "dvae.safetensors", theirs.state_dict(), {"format": "pt"})
    ours = reverie.load(tmp_path / "dvae.safetensors")
    assert ours.config == DVAE
    image = torch.rand(3, 3, 24, 16) * 2 - 1
    with torch.no_grad():
        x = 0.8 * (image + 1) / 2 + 0.1  # their map_pixels of colours in [0, 1]
        logits = theirs.encoder(x)
        codes = logits.argmax(1)
        torch.testing.assert_close(ours.logits(image), logits, atol=1e-4, rtol=1e-4)
        assert torch.equal(ours.encode(image), codes)
        assert len(codes.unique()) > 1
        one_hot = nn.functional.one_hot(codes, DVAE.vocab).movedim(-1, 1).float()
        said = torch.sigmoid(theirs.decoder(one_hot)[:, :3])
        wanted = ((said - 0.1) / 0.8).clamp(0, 1) * 2 - 1  # their unmap_pixels
    torch.testing.assert_close(ours.decode(codes), wanted, atol=1e-5, rtol=1e-4)


def test_a_pickled_module_becomes_tensors_without_its_code(tmp_path):
    """As OpenAI published them: whole modules, of a package that is not there."""
    import subprocess
    import sys

    from reverie.weights.convert import convert

    script = tmp_path / "make.py"
    script.write_text(
        "import sys, types, torch\n"
        "from torch import nn\n"
        "module = types.ModuleType('dall_e_like'); sys.modules['dall_e_like'] = module\n"
        "class Net(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.inner = nn.Sequential(nn.Linear(3, 2), nn.ReLU())\n"
        "        self.w = nn.Parameter(torch.arange(4.0))\n"
        "Net.__module__ = 'dall_e_like'; Net.__qualname__ = 'Net'; module.Net = Net\n"
        "for name in ('encoder', 'decoder'): torch.save(Net(), sys.argv[1] + '/' + name + '.pkl')\n"
    )
    subprocess.run([sys.executable, str(script), str(tmp_path)], check=True)
    done = convert(tmp_path, tmp_path / "both.safetensors")
    assert done.tensors == 6
    one = convert(tmp_path / "encoder.pkl", tmp_path / "one.safetensors")
    with files.Shards({one.path: ""}) as shard:
        assert set(shard.entries) == {"w", "inner.0.weight", "inner.0.bias"}
        assert shard.read("w").tolist() == [0, 1, 2, 3]


def test_taming_names_load(tmp_path):
    from reverie.weights import remap, vqgan_taming

    torch.manual_seed(0)
    for choice in ("nearest", "argmax"):
        config = VqConfig(vocab=40, dim=6, channels=6, widths=(32, 64, 64), depth=1, choice=choice)
        ours = spread(VqVae(config))
        table = vqgan_taming.table(3, by_logits=choice == "argmax")
        theirs = remap.apply(remap.invert(table), ours.state_dict())
        assert "quant_conv.weight" in theirs
        assert "encoder.down.0.block.0.conv1.weight" in theirs
        path = tmp_path / f"{choice}.safetensors"
        files.write(path, theirs | {"loss.discriminator.main.0.bias": torch.zeros(3)}, {"format": "pt"})
        loaded = reverie.load(path)
        assert loaded.config == config
        image = torch.rand(1, 3, 16, 16) * 2 - 1
        codes = ours.encode(image)
        assert torch.equal(loaded.encode(image), codes)
        assert torch.equal(loaded.decode(codes), ours.decode(codes))


@pytest.mark.parametrize("codec", [Dvae(DVAE), VqVae(VQ)])
def test_codes_have_the_shape_and_range_that_the_codec_says(codec, tmp_path):
    codec = spread(codec)
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    codes = codec.encode(image)
    assert codes.shape == (2, 16 // codec.stride, 24 // codec.stride)
    assert codes.min() >= 0 and codes.max() < codec.vocab  # noqa: PT018
    drawn = codec.decode(codes)
    assert drawn.shape == image.shape
    again = reverie.load(reverie.save(codec, tmp_path / "codec"))
    assert torch.equal(again.encode(image), codes)
    assert torch.equal(again.decode(codes), drawn)


@pytest.mark.parametrize("codec", [Dvae(DVAE), VqVae(VQ)])
def test_what_cannot_be_taken_is_said_in_one_sentence(codec):
    with pytest.raises(InputError, match=r"picture of shape \(1, 3, 15, 16\)"):
        codec.encode(torch.zeros(1, 3, 15, 16))
    with pytest.raises(InputError, match="codes from 0 to 40 are not of this codec, which has 40"):
        codec.decode(torch.tensor([[[0, 40]]]))
    with pytest.raises(InputError, match="cannot be decoded"):
        codec.decode(torch.zeros(1, 2, 2))


def test_a_hard_choice_is_what_decode_does():
    torch.manual_seed(0)
    codec = spread(Dvae(DVAE))
    image = torch.rand(1, 3, 16, 16) * 2 - 1
    codes = codec.encode(image)
    one_hot = nn.functional.one_hot(codes, DVAE.vocab).movedim(-1, 1).float()
    torch.testing.assert_close(codec.shown(codec.draw(one_hot)[0]), codec.decode(codes))
    colours = torch.linspace(-1, 1, 9).expand(1, 3, 1, 9)
    torch.testing.assert_close(codec.shown(torch.logit(squeezed(colours))), colours, atol=1e-5, rtol=1e-5)


def test_the_relaxed_choice_hardens_and_follows_the_odds():
    logits = torch.tensor([2.0, 1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 100, 100)
    noise = gumbel((3, 100, 100), [5])
    hard = soft_choice(logits, noise, 1e-3)
    assert float(hard.amax(1).mean()) > 0.99
    shares = hard.mean(dim=(0, 2, 3))
    assert (shares - torch.tensor([2.0, 1.0, 0.0]).softmax(0)).abs().max() < 0.02
    assert torch.equal(gumbel((3, 2, 2), [5, 6])[1], gumbel((3, 2, 2), [6])[0])


def test_gradients_pass_the_choice():
    features, vectors = torch.randn(4, requires_grad=True), torch.randn(4)
    out = passed(features, vectors)
    torch.testing.assert_close(out, vectors)
    out.square().sum().backward()
    torch.testing.assert_close(features.grad, 2 * vectors)


def test_the_nearest_vector_is_chosen():
    codec = VqVae(VQ)
    nn.init.normal_(codec.codebook)
    features = torch.randn(2, VQ.dim, 3, 4)
    far = (features.movedim(1, -1)[..., None, :] - codec.codebook).square().sum(-1)
    assert torch.equal(codec.chosen(features), far.argmin(-1))


def test_the_codebook_finds_the_clusters_and_revives_the_dead():
    torch.manual_seed(0)
    centres = torch.randn(8, 4) * 5
    book, moving = torch.zeros(64, 4), MovingCodebook(64, 4, decay=0.9, patience=5)
    revived = []
    for step in range(120):
        features = centres[torch.randint(8, (256,))] + 0.05 * torch.randn(256, 4)
        codes = (features[:, None] - book).square().sum(-1).argmin(1)
        revived.append(moving.advance(book, features, codes, torch.Generator().manual_seed(step)))
    assert revived[0] == 63  # all but the one that everything chose at first
    assert torch.cdist(centres, book).min(1).values.max() < 0.2


def test_the_paper_s_sizes():
    with torch.device("meta"):
        ours = Dvae(DvaeConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in ours.named_children()}
    # By their definition, counted apart from ours.
    with torch.device("meta"):
        theirs = Theirs(DvaeConfig())
    assert count == {
        "encoder": sum(p.numel() for p in theirs.encoder.parameters()),
        "decoder": sum(p.numel() for p in theirs.decoder.parameters()),
    }
    assert (ours.vocab, ours.stride) == (8192, 8)
