from __future__ import annotations

import builtins
import io
import re
import struct
import subprocess
import sys
import zipfile
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from reverie.data.media import Limits, MediaError, decode, probe
from reverie.media import decode_array, flatten, on_white, pick, sniff
from reverie.pictures import grid, to_signal

STILLS = ["png", "jpeg", "webp", "gif", "avif"]
CLIPS = ["png", "webp", "gif", "avif"]


def close(a, b, by: float) -> bool:
    return float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean()) <= by


# --- what is read right -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STILLS)
def test_stills(make, makers, kind):
    path = make("a.bin", makers.data(makers.picture(), kind))
    found = probe(path)
    assert (found.width, found.height, found.frames, found.fps, found.kind) == (24, 18, 1, 0.0, kind)
    pixels = decode(path)
    assert pixels.shape == (1, 4, 18, 24)
    assert (pixels[0, 3] == 255).all()
    assert close(pixels[0, :3].permute(1, 2, 0), makers.picture(), 8 if kind != "png" else 0)


@pytest.mark.parametrize("kind", CLIPS)
def test_clips(make, makers, kind):
    path = make("a.bin", makers.clip(kind, 7, milliseconds=50))
    found = probe(path)
    assert (found.width, found.height, found.frames, found.kind) == (24, 18, 7, kind)
    assert found.fps == pytest.approx(20)
    pixels = decode(path)
    assert pixels.shape == (7, 4, 18, 24)
    for i in range(7):
        assert close(pixels[i, :3].permute(1, 2, 0), makers.picture(i), 9)
    chosen = decode(path, frames=3)
    assert chosen.equal(pixels[[0, 2, 4]])


@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx"), ("a.webm", "libvpx-vp9")]
)
def test_videos(tmp_path, makers, name, codec):
    path = makers.video(tmp_path / name, codec, 12)
    found = probe(path)
    assert (found.width, found.height, found.frames, found.fps) == (48, 32, 12, 12)
    pixels = decode(path)
    assert pixels.shape == (12, 4, 32, 48)
    shades = pixels[:, :3].float().mean((1, 2, 3))
    assert close(shades, [20 + 200 * i // 12 for i in range(12)], 4)
    assert close(decode(path, frames=4)[:, :3].float().mean((1, 2, 3)), shades[[0, 3, 6, 9]], 0.01)


def test_damaged_pixels_of_a_png_are_noticed(make, makers):
    content = bytearray(makers.data(makers.picture(), "png"))
    content[content.index(b"IDAT") + 10] ^= 1
    with pytest.raises(MediaError, match="does not match its checksum"):
        decode(make("a.png", bytes(content)))


def test_a_turned_video_is_shown_upright(tmp_path, makers):
    path = makers.video(tmp_path / "a.mp4", "libx264", 3)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4 + 40  # the display matrix: a quarter turn
    content[at : at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    assert (probe(path).width, probe(path).height) == (32, 48)
    assert decode(path).shape == (3, 4, 48, 32)


def test_the_rate_of_a_gif_is_what_browsers_show(make, makers):
    assert probe(make("a.gif", makers.clip("gif", 4, milliseconds=10))).fps == pytest.approx(10)
    assert probe(make("b.gif", makers.clip("gif", 4, milliseconds=20))).fps == pytest.approx(50)


def test_a_still_before_an_animation_is_left_out(make, makers):
    frames = [makers.picture(i) for i in range(4)]
    content = makers.data(
        frames[0], "png", save_all=True, append_images=frames[1:], default_image=True, duration=40
    )
    path = make("a.png", content)
    assert probe(path).frames == 3
    assert close(decode(path)[0, :3].permute(1, 2, 0), frames[1], 0)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(make, makers, orientation):
    image = makers.picture(3, 64, 48)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = make("a.jpg", makers.data(image, "jpeg", exif=exif, quality=95))
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> Pillow's Transpose
    upright = image.transpose(Image.Transpose(turns[orientation])) if orientation > 1 else image
    found = probe(path)
    assert (found.width, found.height) == upright.size
    assert close(decode_array(path)[0, ..., :3], upright, 4)
    assert close(to_signal(Image.open(path)), to_signal(path), 0)


@pytest.mark.parametrize(
    "exif", [b"Exif\x00\x00MM\x00*\xff\xff\xff\xff", b"Exif\x00\x00rubbish", b"\x00" * 64]
)
def test_a_bad_exif_does_not_cost_the_picture(make, makers, exif):
    path = make("a.jpg", makers.data(makers.picture(), "jpeg", exif=exif))
    assert decode(path).shape == (1, 4, 18, 24)
    assert probe(path).width == 24


def test_cmyk(make, makers):
    path = make("a.jpg", makers.data(makers.picture().convert("CMYK"), "jpeg", quality=95))
    assert close(decode_array(path)[0, ..., :3], makers.picture(), 6)


def test_sixteen_bit_grey_keeps_its_range(make):
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(4, 0)
    path = make("a.png", b"")
    Image.fromarray(ramp).save(path)
    assert close(decode_array(path)[0, 0, :, 0], np.arange(256), 0.51)


def test_transparency_of_palettes_and_its_edge(make, makers):
    image = Image.new("RGBA", (40, 40), (0, 255, 0, 0))
    image.paste((255, 0, 0, 255), (10, 10, 30, 30))
    path = make("a.png", makers.data(image, "png"))
    small = decode_array(path, size=13)[0]
    seen = small[small[..., 3] > 40]
    assert (seen[:, 1] < 30).all()  # no green from under the transparent ground
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    path = make("b.png", makers.data(palette, "png", transparency=1))
    assert (decode_array(path)[0] == [9, 8, 7, 0]).all()


def test_a_colour_profile_is_applied(make, makers):
    rgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = rgb.replace(b"rXYZ", b"tmpX").replace(b"bXYZ", b"rXYZ").replace(b"tmpX", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "other".encode("utf-16-be")[:8])
    plain = make("a.png", makers.data(Image.new("RGB", (4, 4), (200, 40, 10)), "png", icc_profile=swapped))
    assert decode_array(plain)[0, 0, 0, 2] > 150  # its red is our blue
    broken = make(
        "b.png",
        makers.data(Image.new("RGB", (4, 4), (200, 40, 10)), "png", icc_profile=b"not a profile" * 20),
    )
    assert decode_array(broken)[0, 0, 0].tolist() == [200, 40, 10, 255]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    width=st.integers(1, 90), height=st.integers(1, 90), high=st.integers(1, 40), wide=st.integers(1, 40),
    fit=st.sampled_from(["crop", "pad"]), kind=st.sampled_from(["png", "jpeg"]),
)  # fmt: skip
def test_any_size_fits_any_box(make, makers, width, height, high, wide, fit, kind):
    path = make("a", makers.data(makers.picture(1, width, height), kind))
    pixels = decode(path, size=(high, wide), fit=fit)
    assert pixels.shape == (1, 4, high, wide)
    if fit == "crop":
        assert (pixels[:, 3] == 255).all()
    else:
        scale = min(wide / width, high / height)
        solid = max(1, round(width * scale)) * max(1, round(height * scale))
        assert int((pixels[:, 3] == 255).sum()) == solid


def test_crop_cuts_the_middle_and_pad_keeps_all(make, makers):
    stripes = np.zeros((20, 60, 3), np.uint8)
    stripes[:, 20:40] = 255
    path = make("a.png", makers.data(Image.fromarray(stripes), "png"))
    assert (decode(path, size=20, fit="crop")[:, :3] == 255).all()
    padded = decode(path, size=60, fit="pad")[0]
    assert (padded[3, 20:40] == 255).all()
    assert (padded[3, :20] == 0).all()
    assert (padded[:3, 20:40, 20:40] == 255).all()


@given(n=st.integers(1, 500), k=st.none() | st.integers(1, 500))
def test_frames_are_picked_evenly_from_the_first(n, k):
    chosen = pick(n, k)
    assert len(chosen) == (n if k is None else min(n, k))
    assert chosen[0] == 0
    assert chosen[-1] < n
    steps = {b - a for a, b in pairwise(chosen)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_flatten_lays_on_a_ground():
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], np.uint8)
    assert flatten(pixels).tolist() == [[[10, 20, 30], [255, 255, 255], [127, 127, 127]]]
    assert flatten(pixels, 0)[0, 1].tolist() == [0, 0, 0]
    assert on_white(Image.new("LA", (3, 2), (0, 0))).tolist() == [[[255] * 3] * 3] * 2
    signal = to_signal(Image.new("RGB", (3, 2), (255, 0, 0)))
    assert signal.shape == (3, 2, 3)
    assert signal[0].max() == 1 and signal[1].max() == -1  # noqa: PT018


# --- what is refused --------------------------------------------------------------------------------------------------


def zipped() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a.png", "x")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
        (b"<svg onload='alert(1)'/>", "an SVG drawing"),
        (b"<!doctype html><script>1</script>", "a web page"),
        (zipped(), "a zip archive"),
        (b"%PDF-1.7", "a PDF"),
        (b"BM" + bytes(60), "a BMP picture"),
        (b"II*\x00" + bytes(60), "a TIFF picture"),
        (b"SIMPLE  =                    T", "a FITS picture"),
        (b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic", "a HEIC picture"),
        (b"just words", "it is text"),
        (b"RIFF\0\0\0\0AVI LIST", "it is an AVI clip"),
        (bytes(range(200)), "of an unknown kind"),
        (b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "it is text"),  # a playlist must not reach the demuxer
        (b"\x89PNG\r\n\x1a\n", "cut short|damaged"),
        (b"\xff\xd8\xff\xe0", "cut short|damaged"),
        (b"GIF89a", "header is incomplete"),
        (b"RIFF\x04\x00\x00\x00WEBP", "0 x 0"),
        (b"\x00\x00\x00\x10ftypisom\x00\x00\x00\x00", "no index"),
    ],
)  # fmt: skip
def test_strangers_are_named(make, content, reason):
    path = make("a.png", content)
    for read in (probe, decode):
        with pytest.raises(MediaError, match=reason) as caught:
            read(path)
        assert str(path.parent) not in str(caught.value)


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "aac"), ("a.webm", "libopus")])
def test_a_file_of_sound_alone_is_called_that(tmp_path, name, codec):
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=48_000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48_000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(MediaError, match="it holds no pictures, only sound or data"):
        probe(tmp_path / name)


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(MediaError, match="no such file"):
        probe(tmp_path / "a.png")
    with pytest.raises(MediaError, match="not a file"):
        probe(tmp_path)


@pytest.mark.parametrize("kind", STILLS)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_still(make, makers, kind, share):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 60, 3), np.uint8))
    content = makers.data(noise, kind)
    with pytest.raises(MediaError, match=r"damaged|cut short"):
        decode(make("a", content[: int(len(content) * share)]))


@pytest.mark.parametrize("kind", CLIPS)
def test_a_truncated_clip(make, makers, kind):
    content = makers.clip(kind, 6)
    with pytest.raises(MediaError, match=r"damaged|cut short"):
        decode(make("a", content[: int(len(content) * 0.7)]))


@pytest.mark.parametrize(("name", "codec"), [("a.mp4", "libx264"), ("a.webm", "libvpx-vp9")])
def test_a_truncated_video(tmp_path, makers, name, codec):
    path = makers.video(tmp_path / name, codec, 24)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(MediaError, match=r"damaged|cut short|index"):
        probe(path)


def test_each_limit(make, makers):
    path = make("a.gif", makers.clip("gif", 5))
    for limits, reason in (
        (Limits(pixels=431), "24 x 18 pixels are more than the limit of 431"),
        (Limits(frames=4), "5 frames are more than the limit of 4"),
        (Limits(bytes=100), "bytes are more than the limit of 100"),
        (Limits(work=5 * 24 * 18 - 1), "more than can be decoded"),
        (Limits(output=5 * 24 * 18 * 4 - 1), "5 frames of 24 x 18 are more than"),
    ):
        with pytest.raises(MediaError, match=reason):
            decode(path, limits=limits)
    decode(path, limits=Limits(pixels=432, frames=5, work=5 * 432, output=5 * 432 * 4))


def test_mistakes_are_named(make, makers):
    path = make("a.png", makers.data(makers.picture(), "png"))
    for options, words in (
        ({"fit": "stretch"}, "fit 'stretch'"),
        ({"size": 0}, "size"),
        ({"frames": 0}, "frames"),
    ):
        with pytest.raises(ValueError, match=words):
            decode(path, **options)


def test_without_pyav_the_remedy_is_named(tmp_path, makers, monkeypatch):
    path = makers.video(tmp_path / "a.mp4", "libx264", 3)
    true_import = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ImportError(name)
        return true_import(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MediaError, match=re.escape("pip install 'reverie[video]'")):
        probe(path)


CHILD = """
import resource, sys, time
from reverie.media import MediaError, decode_array, probe
import av, numpy
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.argv[1:]:
    for read in (probe, decode_array):
        begun = time.process_time()
        try:
            read(path)
            print("ACCEPTED", path)
        except MediaError as error:
            print(error)
        took = time.process_time() - begun
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - base) / 1024
        if took > 1 or grown > 200:
            print("COSTLY", path, took, grown)
"""


@pytest.mark.hostile
def test_bombs_are_refused_at_once_and_without_memory(make, makers, tmp_path):
    video = makers.video(tmp_path / "whole.mp4", "libx264", 3).read_bytes()
    claims = bytearray(video)
    at = claims.rindex(b"avc1") + 4 + 24
    claims[at : at + 4] = struct.pack(">HH", 50_000, 50_000)
    tall = bytearray(video)
    at = tall.index(b"tkhd") + 4 + 76
    tall[at : at + 8] = struct.pack(">II", 65_535 << 16, 65_535 << 16)
    webm = bytearray(makers.video(tmp_path / "whole.webm", "libvpx", 3).read_bytes())
    webm[webm.index(b"\xb0\x81\x30") + 2] = 0xFF  # PixelWidth 48
    jpeg = bytearray(makers.data(makers.picture(), "jpeg"))
    at = jpeg.index(b"\xff\xc0") + 5
    jpeg[at : at + 4] = struct.pack(">HH", 60_000, 60_000)
    webp = bytearray(makers.clip("webp", 3))
    at = webp.index(b"VP8X") + 12
    webp[at : at + 6] = b"\xff\x3f\x00\xff\x3f\x00"
    gif = bytearray(makers.data(makers.picture(), "gif"))
    gif[6:10] = b"\xff\xff\xff\xff"
    avif = bytearray(makers.data(makers.picture(), "avif"))
    at = avif.index(b"ispe") + 8
    avif[at : at + 8] = struct.pack(">II", 100_000, 100_000)
    files = {
        "true.png": makers.png_bomb(7_000), "claims.png": makers.png(10**6, 10**6),
        "frames.gif": makers.gif_bomb(100_000), "canvas.gif": bytes(gif), "canvas.webp": bytes(webp),
        "size.jpg": bytes(jpeg), "size.avif": bytes(avif), "entry.mp4": bytes(claims), "track.mp4": bytes(tall),
    }  # fmt: skip
    paths = [str(make(name, content)) for name, content in files.items()]
    done = subprocess.run([sys.executable, "-c", CHILD, *paths], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert len(lines) == 2 * len(files), done.stdout
    for name, first, second in zip(files, lines[::2], lines[1::2], strict=True):
        assert first == second
        assert re.search(name + r".*(more than the limit|0 frames)", first), first
    with pytest.raises(MediaError, match="255 x 32 pixels"):
        probe(make("wide.webm", bytes(webm)), Limits(pixels=48 * 32))


@pytest.mark.hostile
def test_a_stream_larger_than_its_container_says_is_refused(tmp_path, makers):
    path = makers.video(tmp_path / "a.mp4", "libx264", 3)
    content = bytearray(path.read_bytes())
    at = content.rindex(b"avc1") + 4 + 24
    content[at : at + 4] = struct.pack(">HH", 16, 16)
    at = content.index(b"tkhd") + 4 + 76
    content[at : at + 8] = struct.pack(">II", 16 << 16, 16 << 16)
    path.write_bytes(content)
    for read in (probe, decode):
        with pytest.raises(MediaError, match="48 x 32 pixels are more than"):
            read(path, limits=Limits(pixels=48 * 32 - 1))
        read(path, limits=Limits(pixels=48 * 32))


@pytest.mark.hostile
@pytest.mark.parametrize("kind", [*STILLS, "gif clip", "webp clip", "png clip", "mp4", "webm"])
def test_whatever_is_damaged_the_words_are_ours(tmp_path, makers, kind):
    if kind in ("mp4", "webm"):
        codec = {"mp4": "libx264", "webm": "libvpx"}[kind]
        whole = makers.video(tmp_path / f"whole.{kind}", codec, 6).read_bytes()
    else:
        whole = makers.clip(kind.split()[0], 4) if "clip" in kind else makers.data(makers.picture(), kind)
    draw = np.random.default_rng(len(whole))
    path, said = tmp_path / "a", set()
    for _ in range(60):
        content = bytearray(whole)
        for _ in range(int(draw.integers(1, 8))):
            content[int(draw.integers(0, len(content)))] = int(draw.integers(0, 256))
        if draw.random() < 0.3:
            content = content[: int(draw.integers(0, len(content)))]
        path.write_bytes(bytes(content))
        for read in (probe, decode):
            try:
                read(path, limits=Limits(pixels=100_000, frames=50))
            except MediaError as error:
                said.add(str(error))
    assert said
    assert not [
        words for words in said if re.search(r"0x[0-9a-f]{6,}|/tmp|Traceback|Error|error code", words)
    ]


@given(st.binary(max_size=64))
def test_sniffing_never_fails(head):
    assert sniff(head) in (None, "png", "jpeg", "webp", "gif", "avif", "mp4", "webm")


# --- grids ------------------------------------------------------------------------------------------------------------


def test_a_grid_shows_every_picture_and_its_words():
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    pictures = [np.full((10 + i, 20, 3), colour, np.uint8) for i, colour in enumerate(colours)]
    sheet = np.asarray(grid(pictures, columns=2))
    for picture, colour in zip(pictures, colours, strict=True):
        assert int((sheet == colour).all(-1).sum()) == picture.shape[0] * picture.shape[1]
    titled = grid(pictures, ["a red field", "", "x" * 500], 2)
    assert titled.height > sheet.shape[0]
    assert (np.asarray(titled)[..., 0] < 100).any()
    clear = np.zeros((4, 4, 4), np.uint8)
    assert (np.asarray(grid([clear], columns=1)) == 255).all()


def test_words_that_no_font_has_are_boxes_with_a_note(monkeypatch):
    import reverie.pictures as pictures

    monkeypatch.setattr(pictures, "_wide_font_file", lambda: None)
    for cached in (pictures._font, pictures._font_of, pictures._advance):
        cached.cache_clear()
    white = np.full((32, 200, 3), 255, np.uint8)
    assert pictures._visible("红 rocket", 12) == "\u25a1 rocket"
    assert grid([white], ["红 rocket"]).height > grid([white], ["a rocket"]).height
    for cached in (pictures._font, pictures._font_of, pictures._advance):
        cached.cache_clear()
