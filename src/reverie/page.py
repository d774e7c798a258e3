"""A page to look at, as one inert file: no script, no link out, and a policy that lets the browser load nothing."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import re

from PIL import Image


def document(title: str, body: str, style: str, *, images: str = "data:") -> str:
    """A whole HTML page of a body that is HTML already; `images` says in the policy's words where pictures lie."""
    seal = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src {images}; style-src 'sha256-{seal}'; base-uri 'none'; form-action 'none'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{escaped(policy)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def escaped(text: object) -> str:
    """Text that stands for itself, in a page and in an attribute; what HTML or UTF-8 cannot hold becomes U+FFFD."""
    return html.escape(_UNSPEAKABLE.sub("\ufffd", str(text)), quote=True)


# Control characters but for tab and the ends of lines, halves of surrogate pairs, and what is no character.
_UNSPEAKABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")


def inlined(picture: Image.Image, side: int = 160) -> str:
    """A picture of at most `side` pixels, on white, as an address that holds it."""
    whole = picture.convert("RGBA")
    small = Image.new("RGB", whole.size, "white")
    small.paste(whole, mask=whole.getchannel("A"))
    small.thumbnail((side, side))
    small.save(file := io.BytesIO(), format="WEBP", quality=80)
    return f"data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}"
