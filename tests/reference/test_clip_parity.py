"""Our CLIP and SigLIP against transformers' CLIPModel and SiglipModel at small random weights: equal numbers in both
directions, no download."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reverie
from reverie.codecs.bpe import Bpe
from reverie.codecs.pieces import Pieces
from reverie.encoders.text import TextConfig
from reverie.encoders.vit import VitConfig
from reverie.errors import InputError
from reverie.systems.clip import Clip, ClipConfig
from reverie.weights import clip_transformers, remap, store
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
    "odd MLPs": {"vision": {"intermediate_size": 100}, "text": {"intermediate_size": 61}},
    "end token 2, as in OpenAI's files": {"text": {"eos_token_id": 2}},
    "SigLIP": {"siglip": True},
    "SigLIP, a space of its own, a picture that patches do not fill": {
        "siglip": True, "text": {"projection_size": 32}, "vision": {"image_size": 39, "intermediate_size": 43},
    },
}  # fmt: skip


def their_model(vision=None, text=None, *, siglip=False):
    text_config = {
        "vocab_size": BPE.vocab, "max_position_embeddings": 10, "hidden_size": 24, "intermediate_size": 96,
        "num_hidden_layers": 2, "num_attention_heads": 3, "bos_token_id": BPE.start, "eos_token_id": BPE.end,
        "pad_token_id": 0, **({"projection_size": 32} if siglip else {}), **(text or {}),
    }  # fmt: skip
    vision_config = {
        "image_size": 32, "patch_size": 8, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, **(vision or {}),
    }  # fmt: skip
    torch.manual_seed(0)
    if siglip:
        config = transformers.SiglipConfig(text_config=text_config, vision_config=vision_config)
        model = transformers.SiglipModel(config).eval()
    else:
        config = transformers.CLIPConfig(
            text_config=text_config, vision_config=vision_config, projection_dim=16
        )
        model = transformers.CLIPModel(config).eval()
    with torch.no_grad():  # far from initialisation, where biases are zero and norms are the identity
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
        model.logit_scale.fill_(5.0 if siglip else 3.0)  # SigLIP's public scales are above 100
    return model


def their_folder(folder, **shape):
    """As the public folders are: weights, config, preprocessing."""
    model = their_model(**shape)
    model.save_pretrained(folder)
    size = model.config.vision_config.image_size
    if shape.get("siglip"):
        transformers.SiglipImageProcessorPil(size={"height": size, "width": size}).save_pretrained(folder)
    else:
        square = {"height": size, "width": size}
        transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=square).save_pretrained(
            folder
        )
    return model


def inputs(size=32):
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return images, BPE.encode([*CAPTIONS, "a cat"], length=10)


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def assert_equal_numbers(ours, theirs):
    """Every feature, both embeddings, and the logits."""
    images, tokens = inputs(ours.config.image.size)
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    pixels = ((images + 1) / 2 - mean) / std
    out = theirs(input_ids=tokens, pixel_values=pixels)
    vision = theirs.vision_model(pixels).last_hidden_state
    if ours.config.loss == "softmax":  # SigLIP's is normed already
        vision = theirs.vision_model.post_layernorm(vision)
    assert_close(ours.image(pixels), vision)
    assert_close(ours.text(tokens), theirs.text_model(tokens).last_hidden_state)
    assert_close(ours.embed_image(images), out.image_embeds)
    assert_close(ours.embed_text(tokens), out.text_embeds)
    assert_close(ours.similarity(images, tokens), out.logits_per_image)


@pytest.mark.parametrize("shape", SHAPES)
def test_their_folder_gives_their_numbers(shape, tmp_path):
    theirs = their_folder(tmp_path, **SHAPES[shape])
    ours = reverie.load(tmp_path)
    assert type(ours) is Clip
    assert ours.config.text.pool == (
        "last" if "SigLIP" in shape else "argmax" if "end token" in shape else "end"
    )
    assert ours.config.fit == ("squash" if "SigLIP" in shape else "crop")
    assert_equal_numbers(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_is_bit_equal(shape, tmp_path):
    theirs = their_folder(tmp_path / "theirs", **SHAPES[shape])
    ours = reverie.load(tmp_path / "theirs")
    reverie.save(ours, tmp_path / "back", format="transformers")
    before = load_file(tmp_path / "theirs" / "model.safetensors")
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = reverie.load(tmp_path / "back")
    assert again.config == ours.config
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())
    assert_equal_numbers(ours, type(theirs).from_pretrained(tmp_path / "back").eval())


def our_model(tokenizer=None) -> Clip:
    torch.manual_seed(0)
    return Clip(
        ClipConfig(
            image=VitConfig(
                size=32, patch=8, width=32, depth=2, heads=4, hidden=96, activation="gelu_tanh", eps=1e-6
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


@pytest.mark.parametrize("siglip", [False, True])
@torch.no_grad()
def test_from_files_to_logits_their_whole_pipeline_is_ours(siglip, tmp_path):
    """Pictures of any size and words, through their processor, tokenizer and model, and through ours."""
    theirs = their_folder(tmp_path, siglip=siglip)
    if siglip:
        words = Pieces.train([*CAPTIONS, "a red cat on a red mat"], vocab=80)
        words.write(tmp_path, length=10)
    else:
        BPE.write(tmp_path / "tokenizer.json", length=10)
    noise = Image.effect_noise((70, 50), 60).convert("RGB")
    pictures = [noise, noise.resize((19, 130)), noise.resize((32, 32)), noise.rotate(45)]
    texts = ["a red rocket", "a cat on a mat", "a very long tail that no tower of ten tokens can hold"]
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    read = tokenizer(texts, padding="max_length", truncation=True, max_length=10, return_tensors="pt")
    pixels = processor(pictures, return_tensors="pt").pixel_values
    expected = theirs(input_ids=read.input_ids, pixel_values=pixels).logits_per_image
    assert_close(reverie.load(tmp_path).similarity(pictures, texts), expected)


def test_position_ids_of_old_versions_are_let_be(tmp_path):
    from safetensors.torch import save_file

    their_folder(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(10)[None]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert type(reverie.load(tmp_path)) is Clip
    tensors["text_model.embeddings.other"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelFileError, match=r"1 unexpected \(text_model\.embeddings\.other\)"):
        reverie.load(tmp_path)


def test_a_folder_in_parts_is_one_model(tmp_path):
    theirs = their_folder(tmp_path)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    (tmp_path / "model.safetensors").unlink(missing_ok=True)
    parts = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(parts) > 2
    assert_equal_numbers(reverie.load(tmp_path), theirs)
    parts[1].unlink()
    with pytest.raises(ModelFileError, match="lacks model-00002"):
        reverie.load(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    record = json.loads(index.read_text())
    record["weight_map"] = {"logit_scale": "../elsewhere/model.safetensors"}
    index.write_text(json.dumps(record))
    with pytest.raises(ModelFileError, match="does not list safetensors files"):
        reverie.load(tmp_path)


def test_without_a_preprocessor_it_says_what_it_takes(tmp_path):
    their_model().save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        ours = reverie.load(tmp_path)
    assert ours.config.mean == ClipConfig().mean


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.1, 0.2, 0.3]}, {"std": (0.1, 0.2, 0.3)}),
        ({"resample": 2}, {"resample": "bilinear"}),
        ({"size": 32, "crop_size": 32}, {"fit": "crop"}),  # as OpenAI's folders of 2021
        ({"size": {"height": 32, "width": 32}, "do_center_crop": False}, {"fit": "squash"}),
        ({"size": {"shortest_edge": 36}}, "resizes to"),
        ({"do_center_crop": False}, "crops to nothing"),
        ({"do_normalize": False}, "do_normalize"),
        ({"resample": 1}, "known are 2, 3"),
        ({"image_mean": "grey"}, "three numbers"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        (
            {
                "image_processor_type": "SiglipImageProcessor",
                "do_center_crop": False,
                "size": {"height": 32, "width": 32},
            },
            {"fit": "squash"},
        ),
    ],
)
def test_their_preprocessing_is_read(change, expected, tmp_path):
    their_folder(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    if isinstance(expected, str):
        with pytest.raises(ModelFileError, match=expected):
            reverie.load(tmp_path)
    else:
        config = reverie.load(tmp_path).config
        assert {key: getattr(config, key) for key in expected} == expected
        reverie.save(reverie.load(tmp_path), tmp_path / "again", format="transformers")
        assert reverie.load(tmp_path / "again").config == config


def test_the_newer_place_of_preprocessing_is_read_first_as_they_do(tmp_path):
    their_folder(tmp_path)
    newer = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"image_mean": [0.5, 0.5, 0.5]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": newer}))
    assert reverie.load(tmp_path).config.mean == (0.5, 0.5, 0.5)
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert reverie.load(tmp_path).config.mean == ClipConfig().mean
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.warns(UserWarning, match="no preprocessor_config.json"):
        reverie.load(tmp_path)


def test_a_processor_of_another_kind_must_say_everything(tmp_path):
    their_folder(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    whole = json.loads(file.read_text()) | {"image_processor_type": "ViTImageProcessor"}
    file.write_text(json.dumps(whole))
    assert reverie.load(tmp_path).config.fit == "crop"
    del whole["image_std"]
    file.write_text(json.dumps(whole))
    with pytest.raises(ModelFileError, match=r"vitimageprocessor.*whose defaults Reverie does not know"):
        reverie.load(tmp_path)


def test_saving_over_a_folder_leaves_nothing_of_the_old_model(tmp_path):
    their_folder(tmp_path)
    ours = reverie.load(tmp_path)
    (tmp_path / "processor_config.json").write_text(
        json.dumps({"image_processor": {"image_mean": [0.5, 0.5, 0.5]}})
    )
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "merges.txt").write_text("")
    reverie.save(ours, tmp_path, format="transformers")
    again = reverie.load(tmp_path)
    assert again.config == ours.config
    assert again.tokenizer is None
    reverie.save(ours, tmp_path)
    assert not (tmp_path / "preprocessor_config.json").exists()
    assert reverie.load(tmp_path).config == ours.config


@pytest.mark.parametrize("siglip", [False, True])
def test_the_table_covers_exactly_what_both_sides_have(siglip):
    model = their_model(siglip=siglip)
    theirs = {key: value for key, value in model.state_dict().items() if "position_ids" not in key}
    with pytest.warns(UserWarning, match="preprocessor"):
        foreign = clip_transformers.read({"config.json": json.loads(model.config.to_json_string())})
    made = remap.apply(foreign.table, theirs)
    config = store.config_from(ClipConfig, foreign.values, where="their config")
    ours = Clip(config).state_dict()
    assert {key: value.shape for key, value in made.items()} == {
        key: value.shape for key, value in ours.items()
    }


@pytest.mark.parametrize(
    "image", [{"pool": "mean"}, {"stem": "conv"}, {"registers": 2}, {"pool": "attention"}]
)
def test_what_they_do_not_have_is_refused(image, tmp_path):
    config = our_model().config
    model = Clip(replace(config, image=replace(config.image, **image)))
    with pytest.raises(InputError, match="own format"):
        reverie.save(model, tmp_path / "x", format="transformers")
    assert not (tmp_path / "x").exists()


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"text_config": []}, "must be an object"),
        ({"text_config": {"hidden_size": "24"}}, "hidden_size"),
        ({"text_config": {"intermediate_size": 97}}, "mis-shaped"),
        ({"vision_config": {"image_size": [32, 32]}}, "image_size"),
        ({"vision_config": {"num_channels": 4}}, "num_channels as 4"),
        ({"vision_config": {"hidden_act": "os.system"}}, "known are quick_gelu"),
        ({"vision_config": {"hidden_size": 2**30}}, "whole number"),
        ({"vision_config": {"num_hidden_layers": 10**6}}, "many more parts"),
        ({"vision_config": {"layer_norm_eps": "tiny"}}, "finite number"),
        ({"vision_config": {"num_hidden_layers": 1}}, "unexpected"),
        ({"projection_dim": 17}, "mis-shaped"),
    ],
)
def test_their_config_is_checked_too(change, reason, tmp_path):
    their_folder(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for key, value in change.items():
        record[key] = {**record[key], **value} if isinstance(value, dict) else value
    (tmp_path / "config.json").write_text(json.dumps(record))
    with pytest.raises(ModelFileError, match=reason):
        reverie.load(tmp_path)
