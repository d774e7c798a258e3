"""Files with the names of BLIP's authors: what each is for, what is left out, and that nothing is lost."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

import reverie
from reverie.encoders.med import MedConfig
from reverie.encoders.vit import VitConfig
from reverie.systems.blip import Blip, BlipConfig
from reverie.systems.blip_tasks import BlipNlvr, BlipNlvrConfig, BlipVqa, BlipVqaConfig
from reverie.weights import blip_original, remap
from reverie.weights.files import ModelFileError

# As wide as one head of the public files, so that shapes say all.
IMAGE = VitConfig(
    size=32, patch=16, width=64, depth=2, heads=1, hidden=96, activation="gelu", stem_bias=True, norm_pre=False,
    eps=1e-6,
)  # fmt: skip
TEXT = MedConfig(vocab=50, length=9, width=128, depth=3, heads=2, hidden=70, context_width=64)
READS, WRITES = dataclasses.replace(TEXT, writes=False), dataclasses.replace(TEXT, understands=False)
KINDS = {
    "pretrained": lambda: Blip(BlipConfig(image=IMAGE, text=TEXT, width=16)),
    "captions": lambda: Blip(BlipConfig(image=IMAGE, text=WRITES, prompt="a picture of ")),
    "retrieval": lambda: Blip(BlipConfig(image=IMAGE, text=READS, width=16)),
    "answers": lambda: BlipVqa(
        BlipVqaConfig(image=IMAGE, text=READS, answer=dataclasses.replace(WRITES, context_width=128))
    ),
    "pairs": lambda: BlipNlvr(BlipNlvrConfig(image=IMAGE, text=READS, merges=1)),
}
SHARED = (
    "text_encoder.embeddings.word_embeddings.weight",
    "text_decoder.bert.embeddings.word_embeddings.weight",
    "text_decoder.cls.predictions.decoder.weight",
    "text_decoder.cls.predictions.bias",
    "text_decoder.cls.predictions.decoder.bias",
)


def their_file(kind, path):
    """A system of ours with random weights, and its tensors under their names, with what they keep beside them."""
    torch.manual_seed(0)
    system = KINDS[kind]()
    for parameter in system.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    has = {
        "captions": SHARED[1:], "retrieval": SHARED[:1], "pairs": SHARED[:1], "answers": SHARED,
        "pretrained": SHARED,
    }[kind]  # fmt: skip
    table = (*blip_original.tower(), *blip_original.text_table(has, kind))
    if kind in ("pretrained", "retrieval"):
        table = (*table, remap.Rule("temp", "temperature", rearrange=" -> 1"))
    tensors = remap.apply(remap.invert(table), system.state_dict())
    for name in {"text_encoder", "text_decoder.bert"}:
        if any(key.startswith(f"{name}.") for key in tensors):
            tensors[f"{name}.embeddings.position_ids"] = torch.arange(9)[None]
    if kind in ("pretrained", "retrieval"):
        tensors["visual_encoder_m.cls_token"] = torch.zeros(1, 1, 64)
        tensors["text_encoder_m.embeddings.LayerNorm.weight"] = torch.zeros(128)
        tensors["queue_ptr"], tensors["image_queue"] = torch.zeros(1), torch.zeros(16, 8)
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, path)
    return system, tensors


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_says_what_it_is(kind, tmp_path):
    system, _ = their_file(kind, tmp_path / "model.safetensors")
    loaded = reverie.load(tmp_path / "model.safetensors")
    assert type(loaded) is type(system)
    assert loaded.config == system.config
    ours = loaded.state_dict()
    assert ours.keys() == system.state_dict().keys()
    assert all(torch.equal(value, ours[key]) for key, value in system.state_dict().items())


def test_other_sizes_need_a_config(tmp_path):
    path = tmp_path / "model.safetensors"
    config = BlipConfig(
        image=dataclasses.replace(IMAGE, width=24, heads=3),
        text=dataclasses.replace(WRITES, context_width=24),
    )
    system = Blip(config)
    table = (*blip_original.tower(), *blip_original.text_table(SHARED[1:], "captions"))
    save_file(
        {key: value.clone() for key, value in remap.apply(remap.invert(table), system.state_dict()).items()},
        path,
    )
    with pytest.raises(ModelFileError, match="give config="):
        reverie.load(path)
    assert reverie.load(path, config=config).config == config


def test_networks_that_are_not_tied_are_refused(tmp_path):
    """A file in which what must be one tensor is two is of another training."""
    _, tensors = their_file("pretrained", tmp_path / "model.safetensors")
    tensors["text_decoder.bert.embeddings.LayerNorm.bias"] = torch.ones(128)
    save_file(
        {key: value.clone().contiguous() for key, value in tensors.items()}, tmp_path / "other.safetensors"
    )
    with pytest.raises(ModelFileError, match="copies of one tensor"):
        reverie.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize("kind", ["captions", "answers"])
def test_a_part_that_is_absent_is_named(kind, tmp_path):
    _, tensors = their_file(kind, tmp_path / "model.safetensors")
    del tensors["text_decoder.bert.encoder.layer.1.crossattention.self.key.weight"]
    save_file(
        {key: value.clone().contiguous() for key, value in tensors.items()}, tmp_path / "part.safetensors"
    )
    with pytest.raises(ModelFileError, match=r"layer\.1\.crossattention\.self\.key\.weight"):
        reverie.load(tmp_path / "part.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_ours_is_written_under_their_names(kind, tmp_path):
    system, tensors = their_file(kind, tmp_path / "theirs.safetensors")
    reverie.save(system, tmp_path / "out", format="salesforce")
    written = load_file(tmp_path / "out" / "model.safetensors")
    trained = {name for name in tensors if "_m." in name or name in blip_original.QUEUES}
    assert written.keys() == tensors.keys() - trained
    assert all(torch.equal(value, tensors[name]) for name, value in written.items())
    again = reverie.load(tmp_path / "out" / "model.safetensors", config=system.config)
    assert again.config == system.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in system.state_dict().items())
