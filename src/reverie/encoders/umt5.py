"""Words as Wan reads them: UMT5 (Chung et al. 2304.09151), the encoder and tokenizer of transformers.

Public weights keep both beside the video transformer, in the folders `text_encoder` and `tokenizer`. They are read
from there alone, from safetensors, without any code of the folder's, and only when the first prompt is read: the
encoder of Wan 2.1 has four times as many weights as its 1.3B transformer. They are read tensor by tensor, so that no
more memory is taken than they need in the precision asked for. It needs the extra `interop`.

Prompts are mended and unescaped, every run of spaces becomes one, and at most `length` tokens are read. Features are
zero beyond each prompt's end. (diffusers fills prompts up to 512 tokens first, which the encoder does not look at, so
that the features are the same and the time is not.)
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ftfy
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from reverie.errors import InputError
from reverie.nn.linear import Linear
from reverie.nn.quantised import Int8Linear, repeated, replace, to_int8

ENCODER, TOKENIZER = "text_encoder", "tokenizer"
VOCABULARIES = ("tokenizer.json", "spiece.model")
# Of a pipeline's index, where they lie beside it.
ENTRIES = {
    ENCODER: ["transformers", "UMT5EncoderModel"],
    TOKENIZER: ["transformers", "T5TokenizerFast"],
}
EMBEDDING = ("shared.weight", "encoder.embed_tokens.weight")  # one tensor under two names
# All that is taken from the encoder's config.json: sizes, of which layers are the most costly, and two other values.
SIZES = {
    "vocab_size": 2**24, "d_model": 2**16, "d_kv": 2**16, "d_ff": 2**20, "num_layers": 1000, "num_heads": 2**12,
    "relative_attention_num_buckets": 2**16, "relative_attention_max_distance": 2**16,
}  # fmt: skip
OTHERS = {"layer_norm_epsilon": float, "feed_forward_proj": str}
CONFIG_BYTES = 2**20
FILES = re.compile(r"[\w.-]+\.(json|safetensors|model|txt)")  # of both folders, those that are written again


def clean(prompt: str) -> str:
    """Mended (ftfy), unescaped twice, single spaces."""
    text = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", text).strip()


def lies_in(folder: Path) -> bool:
    """Whether a folder holds an encoder and a tokenizer."""
    return (folder / ENCODER / "config.json").is_file() and (folder / TOKENIZER).is_dir()


def sizes(
    *, vocab: int = 256_384, width: int = 4096, inner: int = 4096, hidden: int = 10_240, depth: int = 24,
    heads: int = 64, buckets: int = 32,
) -> tuple[int, int]:  # fmt: skip
    """(weights of the blocks' linear layers, all other weights) of an encoder; the defaults are UMT5-XXL's, Wan's."""
    linear = depth * (4 * width * inner + 3 * width * hidden)
    return linear, vocab * width + depth * (buckets * heads + 2 * width) + width


class Umt5:
    """`read(prompts) -> b length d`. No module: its weights are no part of the system's that it reads for."""

    def __init__(
        self,
        folder: str | Path,
        *,
        length: int = 512,
        dtype: torch.dtype | None = None,
        quantise: str | None = None,
        device: torch.device | str = "cpu",
    ):
        """`dtype`: of the encoder's weights (None: as they are stored).

        `quantise="int8"`: the blocks' linear layers in eight bits. Features are float32 in any case.
        """
        self.folder, self.length, self.device = Path(folder), length, torch.device(device)
        self.dtype, self.quantise = dtype, quantise
        if not lies_in(self.folder):
            raise InputError(
                f"{str(folder)!r:.80} does not hold {ENCODER}/config.json and {TOKENIZER}/: fetch these folders of the"
                " model too, or give features in place of prompts."
            )
        self._parts: tuple[Any, Any] | None = None

    def write(self, folder: Path) -> None:
        """Its two folders beside another model, as links to the same files where the disk has them.

        InputError: a file lies elsewhere (a hub's cache aside), so that something else would be given away.
        """
        home = self.folder.resolve()
        roots = (home, home.parent.parent / "blobs")  # the latter is where a hub's cache keeps files
        for name in (ENCODER, TOKENIZER):
            source, target = self.folder / name, folder / name
            if target.resolve() == source.resolve():
                continue
            files = {file.name: file.resolve() for file in _files(source)}
            for file, real in files.items():
                if not any(real.is_relative_to(root) for root in roots):
                    raise InputError(
                        f"{name}/{file} in {str(self.folder)!r:.80} leads out of the folder: put the file itself there."
                    )
            target.mkdir(exist_ok=True)
            for old in _files(target):
                old.unlink()
            for file, real in files.items():
                _linked(real, target / file)

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
                from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel
            except ImportError as error:
                raise InputError(
                    "reading prompts for this model needs transformers: run `pip install 'reverie[interop]'`, or give"
                    " features in place of prompts."
                ) from error
            # Without its vocabulary transformers makes a tokenizer that knows no word, and says nothing.
            if not any((self.folder / TOKENIZER / file).is_file() for file in VOCABULARIES):
                raise InputError(
                    f"{TOKENIZER}/ in {str(self.folder)!r:.80} lacks {' or '.join(VOCABULARIES)}: fetch the folder"
                    " again."
                )
            try:
                tokenizer = AutoTokenizer.from_pretrained(
                    self.folder / TOKENIZER, local_files_only=True, trust_remote_code=False
                )
                config = UMT5Config(**_config(self.folder / ENCODER))
                if len(tokenizer) > config.vocab_size:
                    raise ValueError(f"{len(tokenizer):,} tokens for an encoder of {config.vocab_size:,}")
                with torch.device("meta"):
                    encoder = UMT5EncoderModel(config)
                self._fill(encoder)
            except (OSError, ValueError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
                raise InputError(
                    f"{ENCODER}/ or {TOKENIZER}/ in {str(self.folder)!r:.80} cannot be read"
                    f" ({str(error).splitlines()[0]:.200}); fetch them again, with safetensors."
                ) from error
            self._parts = tokenizer, encoder.requires_grad_(False).eval().to(self.device)
        return self._parts

    def _fill(self, encoder: Any) -> None:
        """Weights into an encoder that was built on shapes alone."""
        for name, layer in list(encoder.named_modules()):
            if type(layer) is nn.Linear:  # ours, which is quick in bf16 where the processor has none
                with torch.device("meta"):
                    own = Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                replace(encoder, name, own)
        small = repeated(encoder) if self.quantise == "int8" else {}
        missing = {name for name, _ in encoder.named_parameters()}
        for file in sorted((self.folder / ENCODER).glob("*.safetensors")):
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118  # it is no dictionary
                    shape, theirs = tuple(tensors.get_slice(name).get_shape()), name
                    name = EMBEDDING[0] if name in EMBEDDING else name
                    layer, _, leaf = name.rpartition(".")
                    wanted = encoder.get_parameter(name)
                    if wanted.shape != shape:
                        raise ValueError(f"{name} is {shape}, not {tuple(wanted.shape)}")
                    tensor = tensors.get_tensor(theirs)
                    if not tensor.isfinite().all():
                        raise ValueError(f"{name} holds NaN or infinity")
                    missing.discard(name)
                    if layer in small:
                        replace(encoder, layer, Int8Linear(*to_int8(tensor), None))
                    else:
                        made = tensor.to(self.dtype or tensor.dtype, copy=True)
                        setattr(encoder.get_submodule(layer), leaf, nn.Parameter(made, requires_grad=False))
        encoder.encoder.embed_tokens.weight = encoder.get_parameter(EMBEDDING[0])
        if missing - set(EMBEDDING[1:]):
            raise ValueError(f"{min(missing)} is missing")


def _config(folder: Path) -> dict[str, Any]:
    """What counts of the encoder's config.json; ValueError where it is none."""
    path = folder / "config.json"
    if path.stat().st_size > CONFIG_BYTES:
        raise ValueError("config.json is too large")
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict):
        raise ValueError("config.json holds no named values")
    for key, most in SIZES.items():
        value = record.get(key, 1)
        if type(value) is not int or not 0 < value <= most:
            raise ValueError(f"{key} is {value!r:.40}, not a whole number from 1 to {most}")
    for key, kind in OTHERS.items():
        if key in record and type(record[key]) is not kind:
            raise ValueError(f"{key} is {record[key]!r:.40}, not of type {kind.__name__}")
    return {key: record[key] for key in (*SIZES, *OTHERS) if key in record}


def _files(folder: Path) -> list[Path]:
    return [file for file in folder.iterdir() if file.is_file() and FILES.fullmatch(file.name)]


def _linked(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copy2(source, target)
