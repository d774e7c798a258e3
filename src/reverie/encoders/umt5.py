"""Words as Wan reads them: UMT5 (Chung et al. 2304.09151), the encoder and tokenizer of transformers.

Public weights keep both beside the video transformer, in the folders `text_encoder` and `tokenizer`. They are read
from there alone, from safetensors, without any code of the folder's, and only when the first prompt is read: the
encoder of Wan 2.1 has four times as many weights as its 1.3B transformer. It needs the extra `interop`.

Prompts are mended and unescaped, every run of spaces becomes one, and at most `length` tokens are read. Features are
zero beyond each prompt's end. (diffusers fills prompts up to 512 tokens first, which the encoder does not look at, so
that the features are the same and the time is not.)
"""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from torch import Tensor

from reverie.errors import InputError

ENCODER, TOKENIZER = "text_encoder", "tokenizer"


def clean(prompt: str) -> str:
    """Mended (ftfy), unescaped twice, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


def lies_in(folder: Path) -> bool:
    """Whether a folder holds an encoder and a tokenizer."""
    return (folder / ENCODER / "config.json").is_file() and (folder / TOKENIZER).is_dir()


class Umt5:
    """`read(prompts) -> b length d`. No module: its weights are no part of the system's that it reads for."""

    def __init__(
        self,
        folder: str | Path,
        *,
        length: int = 512,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ):
        """`dtype`: of the encoder's weights (None: as they are stored); features are float32 whatever it is."""
        self.folder, self.length, self.dtype, self.device = Path(folder), length, dtype, torch.device(device)
        if not lies_in(self.folder):
            raise InputError(
                f"{str(folder)!r:.80} does not hold {ENCODER}/config.json and {TOKENIZER}/: fetch these folders of the"
                " model too, or give features in place of prompts."
            )
        self._parts: tuple[Any, Any] | None = None

    def release(self) -> None:
        """Free the encoder's memory, until prompts are read again."""
        self._parts = None

    @torch.no_grad()
    def read(self, prompts: Sequence[str]) -> Tensor:
        """Features `b length d`, float32, zero beyond each prompt."""
        tokenizer, encoder = self._loaded()
        said = tokenizer(
            [clean(prompt) for prompt in prompts],
            padding="longest",
            truncation=True,
            max_length=self.length,
            return_tensors="pt",
        ).to(self.device)
        mask = said["attention_mask"]
        found = encoder(said["input_ids"], mask).last_hidden_state.float()
        features = found.new_zeros(len(prompts), self.length, found.shape[-1])
        features[:, : found.shape[1]] = found * mask[..., None]
        return features

    def _loaded(self) -> tuple[Any, Any]:
        if self._parts is None:
            try:
                from transformers import AutoTokenizer, UMT5EncoderModel
            except ImportError as error:
                raise InputError(
                    "reading prompts for this model needs transformers: run `pip install 'reverie[interop]'`, or give"
                    " features in place of prompts."
                ) from error
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.folder / TOKENIZER, local_files_only=True, trust_remote_code=False
                )
                encoder = UMT5EncoderModel.from_pretrained(
                    self.folder / ENCODER,
                    local_files_only=True,
                    use_safetensors=True,
                    trust_remote_code=False,
                    dtype="auto" if self.dtype is None else self.dtype,
                )
            except (OSError, ValueError, KeyError) as error:
                raise InputError(
                    f"transformers cannot read {ENCODER}/ or {TOKENIZER}/ in {str(self.folder)!r:.80}"
                    f" ({str(error).splitlines()[0]:.200}); fetch them again, with safetensors."
                ) from error
            self._parts = tokenizer, encoder.requires_grad_(False).eval().to(self.device)
        return self._parts
