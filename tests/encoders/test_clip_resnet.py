"""CLIP's ResNet: shapes, what strides, and that it starts as the identity between its stages' shortcuts."""

import pytest
import torch

from reverie.encoders.clip_resnet import Bottleneck, ClipResnet, ClipResnetConfig
from reverie.errors import InputError

SMALL = {"size": 64, "width": 8, "depths": (1, 2, 1, 1), "heads": 4, "out": 12}


def tower(**change):
    torch.manual_seed(0)
    return ClipResnet(ClipResnetConfig(**SMALL | change)).eval()


@torch.no_grad()
def test_features_and_their_vector():
    resnet = tower()
    image = torch.randn(3, 3, 64, 64)
    features = resnet(image)
    assert features.shape == (3, 4, 256)
    assert resnet.pool(features).shape == (3, 12)
    for i in range(3):  # after training, a picture's features are its own
        torch.testing.assert_close(resnet(image[i : i + 1])[0], features[i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_pooling_asks_with_the_mean_feature():
    resnet = tower()
    features = torch.randn(2, 4, 256)
    resnet.positions.zero_()
    torch.testing.assert_close(resnet.pool(features[:, [3, 1, 0, 2]]), resnet.pool(features))


@torch.no_grad()
def test_a_block_begins_as_its_shortcut():
    torch.manual_seed(0)
    x = torch.rand(2, 32, 8, 8)
    torch.testing.assert_close(Bottleneck(32, 8, stride=1).eval()(x), x)
    half = Bottleneck(32, 16, stride=2).eval()
    pooled = torch.nn.functional.avg_pool2d(x, 2)
    torch.testing.assert_close(half(x), half.shortcut(pooled).relu())


def test_every_parameter_learns():
    resnet = tower().train()
    for block in (m for m in resnet.modules() if isinstance(m, Bottleneck)):
        torch.nn.init.ones_(block.norm3.weight)
    (resnet.pool(resnet(torch.randn(4, 3, 64, 64))) * torch.randn(12)).sum().backward()
    for name, parameter in resnet.named_parameters():
        if name != "pooling.k.bias":  # softmax does not see what is added to every key
            assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    ("change", "words"), [({"size": 40}, "40"), ({"heads": 7}, "7"), ({"width": 7}, "7")]
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(InputError, match=words):
        tower(**change)
