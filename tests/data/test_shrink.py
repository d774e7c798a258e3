"""The small copy holds what the large one says, at the size and loss that was asked for."""

import numpy as np
import pytest
from PIL import Image

from reverie.data.importers import import_folder
from reverie.data.index import Index
from reverie.data.shrink import encode, shrink
from reverie.errors import InputError
from reverie.media import decode_array, probe


@pytest.fixture
def pixels():
    """Eight frames of 16 pixels: noise in a disc, transparent around."""
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (8, 16, 16, 4), np.uint8)
    across = np.arange(16) - 7.5
    frames[..., 3] = np.where(across[:, None] ** 2 + across**2 < 49, 255, 0)
    return frames


def write(path, data):
    path.write_bytes(data)
    return path


def test_quality_100_loses_nothing_that_shows(tmp_path, pixels):
    for count in (1, 8):
        path = write(tmp_path / f"{count}.webp", encode(pixels[:count], fps=10, quality=100))
        back = decode_array(path)
        seen = pixels[:count, ..., 3] == 255
        assert (back[..., 3] == pixels[:count, ..., 3]).all()
        assert (back[..., :3][seen] == pixels[:count, ..., :3][seen]).all()


def test_less_quality_is_fewer_bytes(pixels):
    sizes = [len(encode(pixels, fps=10, quality=quality)) for quality in (30, 90, 100)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


def test_a_copy_keeps_words_duration_and_split(tmp_path, pixels):
    large = tmp_path / "large"
    large.mkdir()
    write(large / "clip.webp", encode(pixels, fps=10))
    Image.fromarray(pixels[0]).save(large / "still.png")
    for name in ("clip", "still"):
        (large / f"{name}.txt").write_text(f"the {name}")
    before = import_folder(large, val=0, quiet=True)
    after = shrink(before, tmp_path / "small", size=8, frames=4, quiet=True)
    assert [item.captions[0].text for item in after] == [item.captions[0].text for item in before]
    for old, new in zip(before, Index.read(tmp_path / "small"), strict=True):
        assert (new.width, new.height, new.split) == (8, 8, old.split)
        found = probe(tmp_path / "small" / new.file_name)
        assert found.frames == new.frames == min(old.frames, 4)
        if old.frames > 1:
            assert new.frames / new.fps == pytest.approx(old.frames / old.fps, rel=0.05)
    with pytest.raises(InputError, match="already holds an index"):
        shrink(before, tmp_path / "small", quiet=True)
    with pytest.raises(InputError, match="all twice"):
        shrink(before, large / "small", quiet=True)
    with pytest.raises(InputError, match="accepted and wanted"):
        shrink(Index(large, []), tmp_path / "none", quiet=True)
    assert not (tmp_path / "none").exists()
