"""Pages: what is escaped, and how pictures stand in them."""

import base64
import io

from PIL import Image

from reverie.page import document, escaped, inlined


def test_what_is_escaped_stands_for_itself():
    assert escaped("<a href='x'>&\"") == "&lt;a href=&#x27;x&#x27;&gt;&amp;&quot;"
    assert escaped("tab\tline\nörtlich 词 😀") == "tab\tline\nörtlich 词 😀"


def test_what_no_page_can_hold_is_replaced():
    assert escaped("a\x00b\x1bc\x85d\ud800e\ufffef") == "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf"
    document(escaped("\udfff"), escaped("\udfff"), "").encode()


def test_a_page_loads_nothing():
    page = document("t", "<p>body</p>", "p { color: red }")
    assert "default-src &#x27;none&#x27;" in page
    assert "img-src data:" in page


def test_what_is_clear_in_a_picture_is_white():
    picture = Image.new("RGBA", (8, 8), (200, 0, 0, 0))
    address = inlined(picture)
    shown = Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2])))
    assert min(shown.convert("RGB").getpixel((4, 4))) > 250
