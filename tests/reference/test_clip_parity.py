"""Our CLIP against transformers' CLIPModel at small random weights: equal numbers in both directions, no download."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reverie
from reverie.codecs.bpe import Bpe
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.systems.clip import Clip, ClipConfig
from reverie.weights import clip as table
from reverie.weights import remap
from reverie.weights.files import ModelFileError

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

CAPTIONS = [
    "a red rocket",
    "a cat on a mat, and a very long tail that no text tower of ten tokens can hold",
    "一枚火箭",
]
BPE = Bpe.train(CAPTIONS, vocab=560)
SHAPES = {
    "like ViT-B/32": {},
    "gelu, other eps": {
        "vision": {"hidden_act": "gelu", "layer_norm_eps": 1e-6},
        "text": {"hidden_act": "gelu"},
    },
    "odd MLP": {"vision": {"intermediate_size": 100}},
    "end token 2, as in OpenAI's files": {"text": {"eos_token_id": 2}},
}


def their_model(vision=None, text=None):
    config = transformers.CLIPConfig(
        text_config={
            "vocab_size": BPE.vocab, "max_position_embeddings": 10, "hidden_size": 24, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 3, "bos_token_id": BPE.start, "eos_token_id": BPE.end,
            "pad_token_id": 0, **(text or {}),
        },
        vision_config={
            "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3,
            "num_attention_heads": 4, **(vision or {}),
        },
        projection_dim=16,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # far from initialisation, where biases are zero and norms are the identity
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.fill_(3.0)
    return model


def inputs():
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, BPE.encode([*CAPTIONS, "a cat"], length=10)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def assert_equal_numbers(ours, theirs):
    """Every feature, both embeddings, and the logits."""
    images, tokens = inputs()
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    pixels = ((images + 1) / 2 - mean) / std
    out = theirs(input_ids=tokens, pixel_values=pixels)
    vision = theirs.vision_model(pixels).last_hidden_state
    assert_close(ours.image(pixels), theirs.vision_model.post_layernorm(vision))
    assert_close(ours.text(tokens), theirs.text_model(tokens).last_hidden_state)
    assert_close(ours.embed_image(images), out.image_embeds)
    assert_close(ours.embed_text(tokens), out.text_embeds)
    assert_close(ours.similarity(images, tokens), out.logits_per_image)


@pytest.mark.parametrize("shape", SHAPES)
def test_their_folder_gives_their_numbers(shape, tmp_path):
    theirs = their_model(**SHAPES[shape])
    theirs.save_pretrained(tmp_path)
    ours = reverie.load(tmp_path)
    assert type(ours) is Clip
    assert ours.config.text.end == (BPE.end if "end token" not in shape else BPE.vocab - 1)
    assert_equal_numbers(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_bit_equal(shape, tmp_path):
    theirs = their_model(**SHAPES[shape])
    theirs.save_pretrained(tmp_path / "theirs")
    ours = reverie.load(tmp_path / "theirs")
    reverie.save(ours, tmp_path / "back", format="transformers")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = reverie.load(tmp_path / "back")
    assert again.config == ours.config
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())
    assert_equal_numbers(ours, transformers.CLIPModel.from_pretrained(tmp_path / "back").eval())


def our_model(tokenizer=None) -> Clip:
    torch.manual_seed(0)
    return Clip(
        ClipConfig(
            image=VitConfig(
                size=32, patch=8, width=32, depth=2, heads=4, ratio=3.0, activation="gelu_tanh", eps=1e-6
            ),
            text=TextConfig(vocab=BPE.vocab, length=10, width=24, depth=1, heads=3, end=BPE.end),
            width=16,
            mean=(0.5, 0.4, 0.3),
            std=(0.2, 0.3, 0.4),
        ),
        tokenizer,
    ).eval()


def test_our_folder_gives_our_numbers_in_their_library(tmp_path):
    ours = our_model(BPE)
    reverie.save(ours, tmp_path, format="transformers")
    theirs, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_numbers(ours, theirs.eval())

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    _, tokens = inputs()
    texts = [*CAPTIONS, "a cat"]
    read = tokenizer(texts, padding="max_length", truncation=True, max_length=10, return_tensors="pt")
    real = tokens.ne(BPE.pad)
    assert torch.equal(read.input_ids.where(real, 0), tokens)

    again = reverie.load(tmp_path)
    assert again.config == ours.config
    with torch.no_grad():
        assert torch.equal(again.embed_text(texts), ours.embed_text(texts))


def test_their_image_processor_prepares_as_we_do(tmp_path):
    ours = our_model()
    reverie.save(ours, tmp_path, format="transformers")
    picture = Image.effect_noise((32, 32), 60).convert("RGB")
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(
        picture, return_tensors="pt"
    ).pixel_values
    theirs = transformers.CLIPModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        embedding = theirs.get_image_features(pixels).pooler_output
        assert_close(ours.embed_image([picture]), embedding / embedding.norm(dim=-1, keepdim=True))


def test_position_ids_of_old_versions_are_let_be(tmp_path):
    from safetensors.torch import save_file

    their_model().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert type(reverie.load(tmp_path)) is Clip
    tensors["text_model.embeddings.other"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match=r"1 unexpected \(text_model\.embeddings\.other\)"):
        reverie.load(tmp_path)


def test_the_table_covers_exactly_what_both_sides_have():
    theirs = {key: value for key, value in their_model().state_dict().items() if "position_ids" not in key}
    config = table.import_config({"config.json": json.loads(their_model().config.to_json_string())})[1]
    made = remap.apply(table.TABLE, theirs)
    ours = Clip(
        ClipConfig(**{**config, "image": VitConfig(**config["image"]), "text": TextConfig(**config["text"])})
    ).state_dict()
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in ours.items()
    }


@pytest.mark.parametrize("image", [{"pool": "mean"}, {"stem": "conv"}])
def test_what_they_do_not_have_is_refused(image, tmp_path):
    config = our_model().config
    model = Clip(replace(config, image=replace(config.image, **image)))
    with pytest.raises(InputError, match="own layout"):
        reverie.save(model, tmp_path / "x", format="transformers")
    assert not (tmp_path / "x").exists()


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_config": []}, "must be an object"),
        ({"text_config": {"hidden_size": "24"}}, "hidden_size"),
        ({"text_config": {"intermediate_size": 97}}, "4 x"),
        ({"vision_config": {"image_size": [32, 32]}}, "image_size"),
        ({"vision_config": {"num_channels": 4}}, "reads 3"),
        ({"vision_config": {"hidden_act": "os.system"}}, "known are quick_gelu"),
        ({"vision_config": {"hidden_size": 2**30}}, "whole number"),
        ({"vision_config": {"num_hidden_layers": 10**6}}, "many more parts"),
        ({"vision_config": {"layer_norm_eps": "tiny"}}, "must be of type float"),
        ({"vision_config": {"num_hidden_layers": 1}}, "unexpected"),
        ({"projection_dim": 17}, "mis-shaped"),
    ],
)
def test_their_config_is_checked_too(change, reason, tmp_path):
    their_model().save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ModelFileError, match=reason):
        reverie.load(tmp_path)
