"""Our CLIP and SigLIP against open_clip's at small random weights, and OpenAI's naming: equal numbers, both ways."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import reverie
from reverie.codecs.bpe import Bpe
from reverie.errors import InputError
from reverie.systems.clip import Clip, ClipConfig
from reverie.systems.clip_models import MODELS as NAMED
from reverie.weights import clip_open_clip, remap
from reverie.weights.convert import convert
from reverie.weights.files import ModelFileError, header
from reverie.weights.store import config_from

pytestmark = pytest.mark.reference

TEXT = {"context_length": 12, "vocab_size": 300, "width": 24, "heads": 3, "layers": 2}
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 8, "layers": 2}
MODELS = {
    "GELU": {"vision_cfg": VIT, "text_cfg": TEXT},
    "QuickGELU": {"quick_gelu": True, "vision_cfg": VIT, "text_cfg": TEXT},
    "a ResNet": {
        "quick_gelu": True,
        "vision_cfg": {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "head_width": 32, "patch_size": None},
        "text_cfg": TEXT,
    },
    "an odd MLP, tanh, no norm before, other eps": {
        "vision_cfg": VIT | {
            "mlp_ratio": 4.9231, "act_kwargs": {"approximate": "tanh"}, "no_ln_pre": True, "norm_kwargs": {"eps": 1e-6},
        },
        "text_cfg": TEXT | {"mlp_ratio": 3.7362},
    },
    "read at the end token": {"vision_cfg": VIT, "text_cfg": TEXT | {"pool_type": "eos", "eos_id": 7}},
    "SigLIP's text and loss": {
        "init_logit_bias": -10,
        "vision_cfg": VIT,
        "text_cfg": TEXT | {
            "no_causal_mask": True, "pool_type": "last", "proj_bias": True, "norm_kwargs": {"eps": 1e-6},
        },
    },
    "a text tower of its own": {"custom_text": True, "vision_cfg": VIT, "text_cfg": TEXT},
}  # fmt: skip


def shaken(model):
    """Far from initialisation, where biases are zero and norms are the identity."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * 0.1)
            if "running_var" in name:
                tensor.abs_().add_(0.5)
    return model.eval()


def their_model(open_clip, config):
    torch.manual_seed(0)
    config = {"embed_dim": 16} | config
    make = open_clip.model.CustomTextCLIP if config.get("custom_text") else open_clip.model.CLIP
    return shaken(make(**{key: value for key, value in config.items() if key != "custom_text"}))


def their_folder(model, config, folder, *, seen=None):
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.contiguous() for key, value in model.state_dict().items()}
    save_file(tensors, folder / clip_open_clip.MODEL)
    record = {"model_cfg": {"embed_dim": 16} | config, "preprocess_cfg": seen or {}}
    (folder / clip_open_clip.CONFIG).write_text(json.dumps(record))
    return folder


def inputs(size, vocab=300, length=12, end=None):
    images = torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = torch.randint(8, vocab - 1, (5, length), generator=torch.Generator().manual_seed(2))
    for row, place in zip(tokens, (3, 7, length - 1, 5, 2), strict=True):
        row[place] = vocab - 1 if end is None else end
        row[place + 1 :] = 0
    return images, tokens


@torch.no_grad()
def assert_equal_numbers(ours, theirs):
    images, tokens = inputs(ours.config.image.size, end=ours.config.text.end)
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    pixels = ((images + 1) / 2 - mean) / std
    logits = theirs.get_logits(pixels, tokens)[0]
    pairs = [
        (ours.embed_image(images), theirs.encode_image(pixels, normalize=True)),
        (ours.embed_text(tokens), theirs.encode_text(tokens, normalize=True)),
        (ours.similarity(images, tokens), logits),
    ]
    for mine, other in pairs:
        assert (mine - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", MODELS)
def test_their_folder_gives_their_numbers_and_comes_back_bit_equal(name, open_clip, tmp_path):
    theirs = their_model(open_clip, MODELS[name])
    ours = reverie.load(their_folder(theirs, MODELS[name], tmp_path / "theirs"))
    assert type(ours) is Clip
    assert_equal_numbers(ours, theirs)

    reverie.save(ours, tmp_path / "back", format="open_clip")
    before = load_file(tmp_path / "theirs" / clip_open_clip.MODEL)
    after = load_file(tmp_path / "back" / clip_open_clip.MODEL)
    if MODELS[name].get("custom_text"):  # they read both namings; ours writes the plainer
        before = {key.removeprefix("text."): value for key, value in before.items()}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = reverie.load(tmp_path / "back")
    assert again.config == ours.config
    # What we write, they build and load.
    record = json.loads((tmp_path / "back" / clip_open_clip.CONFIG).read_text())["model_cfg"]
    rebuilt = open_clip.model.CLIP(
        **{key: value for key, value in record.items() if key != "custom_text"}
    ).eval()
    rebuilt.load_state_dict(after)
    assert_equal_numbers(again, rebuilt)


@pytest.mark.parametrize("name", ["GELU", "QuickGELU", "read at the end token", "a text tower of its own"])
def test_loss_and_gradients_are_theirs(name, open_clip, tmp_path):
    """A step of training from equal weights, every parameter, on texts of unlike length."""
    theirs = their_model(open_clip, MODELS[name])
    ours = reverie.load(their_folder(theirs, MODELS[name], tmp_path)).train().requires_grad_()
    images, tokens = inputs(ours.config.image.size, end=ours.config.text.end)
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    mine = ours.loss({"image": images, "tokens": tokens[:4]})["loss"]
    mine.backward()
    other = open_clip.ClipLoss()(*theirs.train()(((images + 1) / 2 - mean) / std, tokens[:4])[:3])
    other.backward()
    torch.testing.assert_close(mine, other, atol=0, rtol=1e-5)
    table = clip_open_clip.table(asdict(ours.config), text="text." if "its own" in name else "")
    gradients = remap.apply(table, {key: p.grad for key, p in theirs.named_parameters()})
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    largest = max(gradient.abs().max() for gradient in gradients.values())
    for key, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[key]).abs().max() <= 1e-5 * largest, key


@pytest.mark.parametrize("name", ["GELU", "QuickGELU", "a ResNet"])
def test_a_checkpoint_alone_must_be_named_unless_it_is_openais(name, open_clip, tmp_path):
    theirs = their_model(open_clip, MODELS[name])
    tensors = {key: value.contiguous() for key, value in theirs.state_dict().items()}
    ours = reverie.load(their_folder(theirs, MODELS[name], tmp_path / "folder"))
    for prefix in ("module.", "_orig_mod.", "model.", ""):
        named = {f"{prefix}{key}": value for key, value in tensors.items()}
        save_file(named, tmp_path / f"{prefix or 'bare.'}safetensors")
    for file in ("module.safetensors", "_orig_mod.safetensors", "model.safetensors", "bare.safetensors"):
        with pytest.raises(ModelFileError, match="does not say what it is"):
            reverie.load(tmp_path / file)
        named = reverie.load(tmp_path / file, config=ours.config)
        assert all(torch.equal(value, named.state_dict()[key]) for key, value in ours.state_dict().items())
    with pytest.raises(ModelFileError, match="more numbers than its weights hold"):
        reverie.load(tmp_path / "bare.safetensors", config="ViT-B-32" if name == "GELU" else "RN50")
    other = replace(ours.config, text=replace(ours.config.text, length=11))
    with pytest.raises(ModelFileError, match="1 mis-shaped \\(positional_embedding is 12 x 24"):
        reverie.load(tmp_path / "bare.safetensors", config=other)
    with pytest.raises(InputError, match="none of the names RN50"):
        reverie.load(tmp_path / "bare.safetensors", config="ViT-B/32")


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_openais_own_state_dict_is_known_by_its_names(image, open_clip, tmp_path):
    """As `clip.load(...).state_dict()` of openai/CLIP: heads of 64 channels, QuickGELU, three numbers beside."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
    if image == "resnet":
        vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
    config = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT | {"width": 64, "heads": 1}}
    theirs = their_model(open_clip, config)
    numbers = {"input_resolution": vision["image_size"], "context_length": 12, "vocab_size": 300}
    numbers = {key: torch.tensor(value) for key, value in numbers.items()}
    half = {
        key: value.half().contiguous() if value.is_floating_point() else value
        for key, value in theirs.state_dict().items()
    }
    theirs.load_state_dict(half)
    save_file(half | numbers, tmp_path / "ViT.safetensors")
    ours = reverie.load(tmp_path / "ViT.safetensors")
    assert ours.config.text.activation == "quick_gelu"
    assert ours.config.image.size == vision["image_size"]
    assert_equal_numbers(ours, theirs)
    assert reverie.load(tmp_path / "ViT.safetensors", config=ours.config).config == ours.config
    wrong = replace(ours.config, text=replace(ours.config.text, activation="gelu"))
    with pytest.raises(ModelFileError, match="trained with QuickGELU, which config= contradicts"):
        reverie.load(tmp_path / "ViT.safetensors", config=wrong)


@pytest.mark.parametrize("image", ["vit", "resnet"])
def test_openais_own_archive_is_converted_and_loads(image, open_clip, tmp_path):
    """As openai/CLIP downloads them: a traced program in half precision, with the three numbers as tensors of it."""
    vision = {"image_size": 32, "patch_size": 8, "width": 64, "layers": 2}
    if image == "resnet":
        vision = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 8, "patch_size": None}
    config = {"quick_gelu": True, "vision_cfg": vision, "text_cfg": TEXT | {"width": 64, "heads": 1}}
    theirs = their_model(open_clip, config)
    for name, value in (
        ("input_resolution", vision["image_size"]),
        ("context_length", 12),
        ("vocab_size", 300),
    ):
        vars(theirs).pop(name, None)
        theirs.register_buffer(name, torch.tensor(value))
    with torch.no_grad():
        for tensor in (*theirs.parameters(), *theirs.buffers()):
            tensor.copy_(tensor.half())  # numbers that half precision has, so that both sides are equal
    images, tokens = inputs(vision["image_size"])
    traced = torch.jit.trace(theirs, (images, tokens), check_trace=False, strict=False)
    for tensor in (*traced.parameters(), *traced.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.half()
    for (
        block
    ) in traced.transformer.resblocks.children():  # as a scripted one has it: a tensor that is no buffer
        block._c._register_attribute("attn_mask", torch._C.TensorType.get(), theirs.attn_mask.clone())
    traced.save(tmp_path / "ViT-B-32.pt")
    names = torch.jit.load(tmp_path / "ViT-B-32.pt").state_dict().keys()
    done = convert(tmp_path / "ViT-B-32.pt", tmp_path / "clip.safetensors")
    entries = header(done.path)
    assert names <= entries.keys()
    assert {name.rpartition(".")[2] for name in entries.keys() - names} <= {"attn_mask"}
    assert "transformer.resblocks.0.attn_mask" in entries
    assert entries["visual.conv1.weight"].dtype == torch.float16
    ours = reverie.load(done.path)
    assert ours.config.text.activation == "quick_gelu"
    assert_equal_numbers(ours, theirs.float())  # the trace shares its tensors


def test_how_pictures_are_seen_comes_from_the_config(open_clip, tmp_path):
    theirs = their_model(open_clip, MODELS["GELU"])
    seen = {
        "mean": [0.5, 0.4, 0.3],
        "std": [0.1, 0.2, 0.3],
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    config = reverie.load(their_folder(theirs, MODELS["GELU"], tmp_path / "x", seen=seen)).config
    assert (config.mean, config.std) == ((0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    assert (config.fit, config.resample) == ("squash", "bilinear")
    reverie.save(reverie.load(tmp_path / "x"), tmp_path / "y", format="open_clip")
    assert json.loads((tmp_path / "y" / clip_open_clip.CONFIG).read_text())["preprocess_cfg"] == seen
    their_folder(theirs, MODELS["GELU"], tmp_path / "z", seen={"resize_mode": "longest"})
    with pytest.raises(ModelFileError, match="resize_mode 'longest'; known are shortest, squash"):
        reverie.load(tmp_path / "z")


@torch.no_grad()
def test_siglips_image_tower_is_timms(open_clip, tmp_path):
    """The names and the arithmetic of timm's tower with attention pooling, at two blocks."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    trunk = shaken(timm.create_model("vit_base_patch16_siglip_224", pretrained=False, num_classes=0, depth=2))
    config = NAMED["ViT-B-16-SigLIP"]
    config = replace(
        config,
        image=replace(config.image, depth=2),
        text=replace(config.text, vocab=300, length=12, depth=1),
    )
    ours = Clip(config).eval()
    table = clip_open_clip.TIMM_VIT
    theirs = {f"visual.trunk.{key}": value for key, value in trunk.state_dict().items()}
    tensors = remap.apply(table, theirs)
    own = ours.state_dict()
    assert tensors.keys() == {key for key in own if key.startswith("image.")}
    ours.load_state_dict(own | tensors)
    images = torch.rand(2, 3, 224, 224) * 2 - 1
    other = torch.nn.functional.normalize(
        trunk(images), dim=-1
    )  # mean and std of a half: what is seen is [-1, 1]
    assert (ours.embed_image(images) - other).abs().max() <= 1e-5 * other.abs().max()
    back = remap.apply(remap.invert(table), tensors)
    assert all(torch.equal(back[key], theirs[key]) for key in theirs)


CONFIGS = ["RN50", "RN101-quickgelu", "RN50x4", "RN50x16", "RN50x64", "ViT-B-32", "ViT-B-16-quickgelu", "ViT-L-14",
           "ViT-L-14-336", "ViT-H-14", "ViT-g-14", "ViT-bigG-14", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2"]  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_their_named_configs_are_ours(name, open_clip):
    foreign = clip_open_clip.read({clip_open_clip.CONFIG: open_clip.get_model_config(name)}, {})
    made = config_from(ClipConfig, foreign.values, where=name)
    ours = NAMED[name]
    mine, other = asdict(ours), asdict(made)
    mine["text"]["end"] = other["text"]["end"]  # not read where the highest id, or the last position, is
    if "SigLIP" in name:  # beside the model's config, in the folder's
        mine |= {key: other[key] for key in ("mean", "std", "fit")}
    assert mine == other


def test_without_a_tokenizer_clips_own_words_are_read(open_clip, tmp_path):
    config = {"vision_cfg": VIT, "text_cfg": TEXT | {"vocab_size": 49_408}}
    ours = reverie.load(their_folder(their_model(open_clip, config), config, tmp_path / "x"))
    assert ours.tokenizer.is_clip()
    assert ours.embed_text(["a cat"]).shape == (1, 16)
    reverie.save(ours, tmp_path / "y", format="open_clip")
    assert (
        "hf_tokenizer_name"
        not in json.loads((tmp_path / "y" / clip_open_clip.CONFIG).read_text())["model_cfg"]
    )
    own = {"vision_cfg": VIT, "text_cfg": TEXT | {"vocab_size": 49_408, "hf_tokenizer_name": "somebody/else"}}
    assert reverie.load(their_folder(their_model(open_clip, own), own, tmp_path / "z")).tokenizer is None


def test_a_tokenizer_of_ones_own_goes_along(open_clip, tmp_path):
    words = Bpe.train(["a red rocket", "a cat"], vocab=520)
    config = {"vision_cfg": VIT, "text_cfg": TEXT | {"vocab_size": words.vocab}}
    ours = reverie.load(their_folder(their_model(open_clip, config), config, tmp_path / "x"))
    ours.tokenizer = words
    reverie.save(ours, tmp_path / "y", format="open_clip")
    assert json.loads((tmp_path / "y" / clip_open_clip.CONFIG).read_text())["model_cfg"]["text_cfg"][
        "hf_tokenizer_name"
    ]
    again = reverie.load(tmp_path / "y")
    with torch.no_grad():
        assert torch.equal(again.embed_text(["a red cat"]), ours.embed_text(["a red cat"]))


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"vision_cfg": []}, "must be an object"),
        ({"vision_cfg": VIT | {"width": "32"}}, "whole number"),
        ({"vision_cfg": VIT | {"pool_type": "avg"}}, "pool_type"),
        ({"vision_cfg": VIT | {"ls_init_value": 1e-5}}, "ls_init_value"),
        ({"vision_cfg": VIT | {"mlp_ratio": math.pi}}, "mis-shaped"),
        ({"vision_cfg": {"timm_model_name": "convnext_base"}}, "vit_base_patch16_siglip_224"),
        ({"text_cfg": TEXT | {"hf_model_name": "roberta-base"}}, "hf_model_name"),
        ({"text_cfg": TEXT | {"pool_type": "first"}}, "known are argmax, eos, last"),
        ({"text_cfg": TEXT | {"layers": 10**6}}, "many more parts"),
        ({"quick_gelu": "yes"}, "true or false"),
        ({"embed_dim": 17}, "mis-shaped"),
        ({"vision_cfg": VIT | {"global_average_pool": True}}, "asks for .global_average_pool"),
        ({"text_cfg": TEXT | {"tokenizer_kwargs": {"clean": "canonicalize"}}}, "tokenizer_kwargs"),
    ],
)
def test_their_config_is_checked(change, reason, open_clip, tmp_path):
    theirs = their_model(open_clip, MODELS["GELU"])
    folder = their_folder(theirs, MODELS["GELU"] | change, tmp_path / "x")
    with pytest.raises(ModelFileError, match=reason):
        reverie.load(folder)
