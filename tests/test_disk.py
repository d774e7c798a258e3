"""Small files are whole, and hold what was given."""

import json

import pytest

from reverie import disk


def test_json_gives_back_what_was_written(tmp_path):
    value = {
        "name": "图片 é",
        "odd": b"caf\xe9.png".decode("utf-8", "surrogateescape"),
        "b": [1, 2.5, None],
        "a": {},
    }
    disk.write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text("utf-8")
    assert json.loads(text) == value
    assert "图片 é" in text
    assert text.endswith("}\n")
    with pytest.raises(TypeError):
        disk.write_json(tmp_path / "a.json", {"a": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text("utf-8") == text
