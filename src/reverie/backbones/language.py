"""Language models of transformers, causal (OPT, GPT-2, Qwen) or encoder and decoder (T5), spoken to in vectors.

    causal             vectors of a prompt, then words               -> logits of the next word
    encoder, decoder   vectors of a prompt to the encoder; words     -> logits of the next word

Read from a local folder with safetensors; no code of a folder's own is run. Where several names are one tensor (a tied
head), the state dict has the first of them.

Convention: `vectors b n d` are in the space of the model's word embeddings (`embed`). Prompts of a batch have one
length: nothing is padded in front of what is written.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn

from reverie.errors import InputError

NEEDS = "a language model needs transformers: run `pip install 'reverie[interop]'`."
# Of a config.json, what says how or from where to load, which is not taken from a file.
IGNORED = (
    "_name_or_path", "auto_map", "architectures", "torch_dtype", "dtype", "quantization_config", "transformers_version",
    "_attn_implementation", "attn_implementation", "_commit_hash", "model_type",
)  # fmt: skip
RECORD_BYTES = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    kind: str = "opt"  # transformers' model_type
    record: str = "{}"  # its config.json, as text
    end: int = 2  # the token that ends a text
    pad: int = 1


class Language(nn.Module):
    """A frozen language model; see the module."""

    def __init__(self, config: LanguageConfig, model: Any = None):
        """`model`: transformers', else one of random weights that `config.record` describes."""
        super().__init__()
        self.config = config
        self.model = (model if model is not None else _made(config)).requires_grad_(False).eval()
        inner = self.model.config
        self.pairs = bool(inner.is_encoder_decoder)  # encoder and decoder
        self.width: int = self.model.get_input_embeddings().weight.shape[1]
        self.vocab: int = self.model.get_input_embeddings().weight.shape[0]
        self.begin: int = inner.decoder_start_token_id if self.pairs else 0
        self.aliases: dict[str, str] = {}  # further names of a tensor -> its first
        first: dict[int, str] = {}
        for name, value in self.model.named_parameters(remove_duplicate=False):
            if first.setdefault(id(value), name) != name:
                self.aliases[name] = first[id(value)]
        self.register_state_dict_post_hook(self._without_aliases)
        self.register_load_state_dict_pre_hook(self._with_aliases)

    def train(self, mode: bool = True) -> Language:
        """Frozen: it has no training mode."""
        return super().train(False)

    @staticmethod
    def _without_aliases(module: nn.Module, state: dict[str, Tensor], prefix: str, _: Any) -> None:
        assert isinstance(module, Language)
        for name in module.aliases:
            state.pop(f"{prefix}model.{name}", None)

    @staticmethod
    def _with_aliases(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        assert isinstance(module, Language)
        for name, first in module.aliases.items():
            if f"{prefix}model.{first}" in state:
                state[f"{prefix}model.{name}"] = state[f"{prefix}model.{first}"]

    @classmethod
    def read(
        cls, folder: str | Path, *, end: int | None = None, dtype: torch.dtype | None = None
    ) -> Language:
        """The model in a folder of transformers. `end`: the token that ends a text, else as the folder says.

        Raises InputError.
        """
        folder = Path(folder)
        record = _record(folder / "config.json")
        kind = str(record.get("model_type"))
        said = dict(record)
        if (folder / "generation_config.json").is_file():
            said |= {k: v for k, v in _record(folder / "generation_config.json").items() if v is not None}
        ends = said.get("eos_token_id") if end is None else end
        ends = ends[0] if isinstance(ends, list) and ends else ends
        if type(ends) is not int:
            raise InputError(
                f"{str(folder)!r:.80} does not say which token ends a text (eos_token_id): give `end`."
            )
        pad = said.get("pad_token_id")
        kept = {key: value for key, value in record.items() if key not in IGNORED}
        config = LanguageConfig(
            kind=kind, record=json.dumps(kept), end=ends, pad=pad if type(pad) is int and pad >= 0 else ends
        )
        model_class = _class(config)
        try:
            model = model_class.from_pretrained(
                folder, config=_inner(config), local_files_only=True, trust_remote_code=False, use_safetensors=True,
                dtype=dtype or torch.float32,
            )  # fmt: skip
        except Exception as error:  # whatever a stranger's files make of the library
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"the language model in {str(folder)!r:.80} cannot be read ({reason:.200}): it needs config.json and"
                " model.safetensors as transformers writes them."
            ) from error
        return cls(config, model)

    def embed(self, tokens: Tensor) -> Tensor:
        """tokens `b n` -> vectors `b n d`."""
        return self.model.get_input_embeddings()(tokens)

    def logits(self, vectors: Tensor, tokens: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Vectors `b n d` of a prompt and tokens `b k` after it -> `b k+1 v`, of each token and of one more.

        `mask b n`: which vectors are real; a causal model takes none, since prompts there are of one length.
        """
        if self.pairs:
            first = torch.full_like(tokens[:, :1], self.begin)
            mask = (
                torch.ones(vectors.shape[:2], dtype=torch.long, device=vectors.device)
                if mask is None
                else mask.long()
            )
            written = torch.cat([first, tokens], 1)
            return self.model(
                inputs_embeds=vectors, attention_mask=mask, decoder_input_ids=written, use_cache=False
            ).logits
        assert mask is None
        whole = torch.cat([vectors, self.embed(tokens).to(vectors.dtype)], dim=1)
        return self.model(inputs_embeds=whole, use_cache=False).logits[:, vectors.shape[1] - 1 :]

    def continued(self, vectors: Tensor) -> Continued:
        """A decoder for `samplers.autoregressive` behind prompts `b n d`; it is called first with any token."""
        return Continued(self, vectors)


class Continued:
    """What follows prompts, a row for each, whose keys and values are kept.

    The first call gives the logits after the prompts, whatever its tokens; each one after it those after its tokens,
    `r 1 -> r v`. `select(rows)` keeps these rows in this order, some several times.
    """

    def __init__(self, language: Language, vectors: Tensor):
        self.language, self.first, self.past = language, True, None
        self.vectors: Tensor | None = vectors
        self.seen: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        model = self.language.model
        given: dict[str, Any] = {"past_key_values": self.past, "use_cache": True}
        if self.language.pairs:
            if self.first:
                self.seen = model.get_encoder()(inputs_embeds=self.vectors, return_dict=True)
                tokens = torch.full_like(tokens[:, :1], self.language.begin)
            given |= {"encoder_outputs": self.seen, "decoder_input_ids": tokens}
        elif self.first:
            given["inputs_embeds"] = self.vectors
        else:
            given["input_ids"] = tokens
        out = model(**given)
        self.first, self.past, self.vectors = False, out.past_key_values, None
        return out.logits[:, -1].float()

    def select(self, rows: Tensor) -> None:
        self.past.batch_select_indices(rows)  # type: ignore[attr-defined]
        if self.seen is not None:
            self.seen.last_hidden_state = self.seen.last_hidden_state[rows]


def start_of(vectors: Tensor) -> Tensor:
    """What a sampler starts with behind prompts: a row for each, of a token that nobody reads."""
    return repeat(torch.zeros(1, dtype=torch.long, device=vectors.device), "one -> b one", b=len(vectors))


def _record(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > RECORD_BYTES:
            raise ValueError("it is too large")
        record = json.loads(path.read_bytes())
        if not isinstance(record, dict):
            raise ValueError("it holds no named values")
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r:.120} cannot be read ({str(error).splitlines()[0]:.120}): give the folder of a language"
            " model that transformers wrote."
        ) from error
    return record


def _class(config: LanguageConfig) -> Any:
    try:
        from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
            MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        )
    except ImportError as error:
        raise InputError(NEEDS) from error
    if config.kind in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForSeq2SeqLM
    if config.kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForCausalLM
    raise InputError(
        f"{config.kind!r:.40} is no language model of transformers: give one such as opt, qwen2 or t5."
    )


def _inner(config: LanguageConfig) -> Any:
    """Transformers' own config."""
    from transformers import AutoConfig

    try:
        record = json.loads(config.record)
        return AutoConfig.for_model(config.kind, **{k: v for k, v in record.items() if k not in IGNORED})
    except Exception as error:
        raise InputError(
            f"the description of the {config.kind!r:.40} language model cannot be read: {error!s:.120}."
        ) from error


def _made(config: LanguageConfig) -> Any:
    model_class = _class(config)
    try:
        return model_class.from_config(_inner(config), dtype=torch.float32)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"no {config.kind!r:.40} language model can be built so: {error!s:.120}.") from error
