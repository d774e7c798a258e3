"""UMT5's folders: what is taken from them, what is given on. Its numbers: tests/reference/test_wan_parity.py."""

import json

import pytest
import torch

from reverie.encoders.umt5 import Umt5
from reverie.errors import InputError
from reverie.weights import files

SIZES = {"vocab_size": 7, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1, "num_heads": 2}


def folder(path, *, config=None, tensors=None):
    for part in ("text_encoder", "tokenizer"):
        (path / part).mkdir(parents=True)
    (path / "text_encoder" / "config.json").write_text(json.dumps(SIZES if config is None else config))
    (path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    files.write(path / "text_encoder" / "model.safetensors", tensors or {"shared.weight": torch.zeros(7, 8)})
    return path


def test_only_plain_files_are_given_on_and_old_ones_go(tmp_path):
    source = folder(tmp_path / "model")
    (source / "tokenizer" / "code.py").write_text("")
    (source / "tokenizer" / "deep").symlink_to("/")
    target = folder(tmp_path / "old")
    (target / "text_encoder" / "model-00002-of-00002.safetensors").write_text("")
    Umt5(source).write(target)
    assert sorted(str(path.relative_to(target)) for path in target.rglob("*.*")) == [
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/tokenizer_config.json",
    ]


def test_links_of_a_hubs_cache_are_followed_and_no_others(tmp_path):
    source = folder(tmp_path / "hub" / "snapshots" / "1")
    blob = tmp_path / "hub" / "blobs" / "abc"
    blob.parent.mkdir()
    blob.write_text("words")
    (source / "tokenizer" / "spiece.model").symlink_to("../../../blobs/abc")
    (tmp_path / "saved").mkdir()
    Umt5(source).write(tmp_path / "saved")
    written = tmp_path / "saved" / "tokenizer" / "spiece.model"
    assert not written.is_symlink()
    assert written.read_text() == "words"
    secret = tmp_path / "secret"
    secret.write_text("of the user")
    (source / "tokenizer" / "tokenizer.json").symlink_to(secret)
    with pytest.raises(InputError, match=r"tokenizer/tokenizer\.json"):
        Umt5(source).write(tmp_path / "saved")


@pytest.mark.hostile
@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"num_layers": 10**9}, "num_layers"),
        ({"d_model": "8"}, "d_model"),
        ({"feed_forward_proj": ["gelu"]}, "feed_forward_proj"),
        ([], "no named values"),
        (SIZES | {"d_model": 16}, "shared.weight"),
        (SIZES | {"attn_implementation": "somebody/kernel", "auto_map": {"AutoModel": "a.B"}}, "missing"),
    ],
)
def test_nothing_but_sizes_is_taken_from_a_config(config, said, tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: [])
    path = folder(tmp_path, config=config)
    (path / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=said):
        Umt5(path).read(["a cat"])
