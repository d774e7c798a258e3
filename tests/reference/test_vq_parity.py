"""The autoencoder with a codebook beside diffusers' VQModel, at small random weights."""

import pytest
import torch

from reverie.codecs.vq import VqConfig, VqVae
from reverie.weights import remap, vae_diffusers
from reverie.weights.remap import Rule

pytestmark = pytest.mark.reference


@pytest.mark.parametrize("attention", [0, 1])
def test_codes_and_pictures_are_equal(attention):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    config = VqConfig(vocab=50, dim=6, channels=8, widths=(16, 32), depth=1, groups=8, attention=attention)
    ours = VqVae(config).eval()
    torch.nn.init.normal_(ours.codebook)
    down = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D" if attention else "DownEncoderBlock2D")
    up = ("AttnUpDecoderBlock2D" if attention else "UpDecoderBlock2D", "UpDecoderBlock2D")
    theirs = diffusers.VQModel(
        down_block_types=down, up_block_types=up, block_out_channels=(16, 32), layers_per_block=1, latent_channels=8,
        norm_num_groups=8, num_vq_embeddings=50, vq_embed_dim=6, sample_size=16,
    ).eval()  # fmt: skip
    table = (*vae_diffusers.table(2), Rule("quantize.embedding.weight", "codebook"))
    theirs.load_state_dict(remap.apply(remap.invert(table), ours.state_dict()))
    image = torch.rand(2, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        features = theirs.encode(image).latents
        torch.testing.assert_close(ours.features(image), features, atol=1e-5, rtol=1e-4)
        quantised, _, (_, _, codes) = theirs.quantize(features)
        mine = ours.encode(image)
        assert torch.equal(mine.flatten(), codes.flatten())
        assert len(codes.unique()) > 5
        torch.testing.assert_close(ours.vectors(mine), quantised, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(ours.decode(mine), theirs.decode(features).sample, atol=1e-5, rtol=1e-4)
