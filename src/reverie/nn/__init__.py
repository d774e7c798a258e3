"""Bricks: torch only, no paper of their own. Shapes: `b n d` sequences, `b d` vectors, `b c f h w` signals."""
