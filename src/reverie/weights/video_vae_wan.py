"""The video autoencoder <-> Wan 2.1's, as diffusers has it (`AutoencoderKLWan`) and under its original names.

diffusers says the shape and the constants of the latents in config.json. A file under the original names
(`Wan2.1_VAE.pth`, made safetensors) holds tensors alone: the shape is read from theirs, and the constants of its 16
channels are those of the original's code.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/autoencoders/autoencoder_kl_wan.py
https://github.com/Wan-Video/Wan2.1/blob/main/wan/modules/vae.py
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from reverie.weights.files import Entry, ModelFileError, shorten
from reverie.weights.layout import LAYERS, Fields, Foreign
from reverie.weights.remap import Rule

CLASS = "AutoencoderKLWan"
STAGES = 16  # the most that are read; each after the first halves a side
CONSTANTS = ("mean", "std")  # buffers of ours that no file of theirs holds
MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
KEYS = {
    "_class_name", "_diffusers_version", "_name_or_path", "base_dim", "decoder_base_dim", "z_dim", "dim_mult",
    "num_res_blocks", "attn_scales", "temperal_downsample", "dropout", "latents_mean", "latents_std", "is_residual",
    "in_channels", "out_channels", "patch_size", "scale_factor_temporal", "scale_factor_spatial",
}  # fmt: skip


# ---------------------------------------------------------------- names


def table(
    config: Mapping[str, Any], *, original: bool = False, theirs: str = "", ours: str = ""
) -> tuple[Rule, ...]:
    """Their names -> ours for a codec of our config, with what stands before the names of either side."""
    last, blocks = len(config["widths"]) - 1, config["blocks"]
    rules: list[Rule] = []

    def conv(a: str, b: str, axes: str = "o c t p q -> t o p q c") -> None:
        rules.append(Rule(f"{theirs}{a}.weight", f"{ours}{b}.weight", rearrange=axes))
        rules.append(Rule(f"{theirs}{a}.bias", f"{ours}{b}.bias"))

    def norm(a: str, b: str, axes: str = "c 1 1 1 -> c") -> None:
        rules.append(Rule(f"{theirs}{a}.gamma", f"{ours}{b}.scale", rearrange=axes))

    def residual(a: str, b: str, *, shortcut: bool) -> None:
        parts = ("residual.0", "residual.2", "residual.3", "residual.6", "shortcut")
        if not original:
            parts = ("norm1", "conv1", "norm2", "conv2", "conv_shortcut")
        norm(f"{a}.{parts[0]}", f"{b}.norm1")
        conv(f"{a}.{parts[1]}", f"{b}.conv1")
        norm(f"{a}.{parts[2]}", f"{b}.norm2")
        conv(f"{a}.{parts[3]}", f"{b}.conv2")
        if shortcut:
            conv(f"{a}.{parts[4]}", f"{b}.shortcut")

    def change(a: str, b: str, *, time: bool) -> None:
        conv(f"{a}.resample.1", f"{b}.space", "o c p q -> 1 o p q c")
        if time:
            conv(f"{a}.time_conv", f"{b}.time")

    def ends(half: str) -> None:
        a = f"{half}.middle" if original else f"{half}.mid_block"
        first, attention, second = ("0", "1", "2") if original else ("resnets.0", "attentions.0", "resnets.1")
        residual(f"{a}.{first}", f"{half}.middle.before", shortcut=False)
        norm(f"{a}.{attention}.norm", f"{half}.middle.attention.norm", "c 1 1 -> c")
        for x, y in (("to_qkv", "qkv"), ("proj", "out")):
            conv(f"{a}.{attention}.{x}", f"{half}.middle.attention.{y}", "o c 1 1 -> o c")
        residual(f"{a}.{second}", f"{half}.middle.after", shortcut=False)
        conv(f"{half}.{'conv1' if original else 'conv_in'}", f"{half}.stem")
        norm(f"{half}.{'head.0' if original else 'norm_out'}", f"{half}.norm")
        conv(f"{half}.{'head.2' if original else 'conv_out'}", f"{half}.head")

    ends("encoder")
    ends("decoder")
    conv("conv1" if original else "quant_conv", "encoder.out")
    conv("conv2" if original else "post_quant_conv", "decoder.enter")
    down = "encoder.downsamples" if original else "encoder.down_blocks"
    ups = config["temporal"][::-1]
    for i, (into, out) in enumerate(_encoder(config)):
        at, stage = i * (blocks + 1), f"encoder.stages.{i}"
        for j in range(blocks):
            residual(f"{down}.{at + j}", f"{stage}.blocks.{j}", shortcut=j == 0 and into != out)
        if i < last:
            change(f"{down}.{at + blocks}", f"{stage}.change", time=config["temporal"][i])
    for i, (into, out) in enumerate(_decoder(config)):
        at, stage = i * (blocks + 2), f"decoder.stages.{i}"
        for j in range(blocks + 1):
            a = f"decoder.upsamples.{at + j}" if original else f"decoder.up_blocks.{i}.resnets.{j}"
            residual(a, f"{stage}.blocks.{j}", shortcut=j == 0 and into != out)
        if i < last:
            a = f"decoder.upsamples.{at + blocks + 1}" if original else f"decoder.up_blocks.{i}.upsamplers.0"
            change(a, f"{stage}.change", time=ups[i])
    return tuple(rules)


def _encoder(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(in, out) of the stages."""
    widths = list(config["widths"])
    return list(zip([widths[0], *widths], widths, strict=False))


def _decoder(config: Mapping[str, Any]) -> list[tuple[int, int]]:
    outs = list(config["widths"])[::-1]
    return list(zip([outs[0], *(width // 2 for width in outs)], outs, strict=False))


# ---------------------------------------------------------------- in


def read(record: Any, *, theirs: str = "", ours: str = "") -> Foreign:
    """The autoencoder from diffusers' config.json. Raises `ModelFileError`."""
    fields = Fields(record, where="config.json")
    fields.only(KEYS)
    fields.unlike({"attn_scales": ([],), "is_residual": (False,), "_class_name": (CLASS,)})
    base, channels = fields.integer("base_dim", 96), fields.integer("z_dim", 16)
    if fields.record.get("decoder_base_dim") not in (None, base):
        raise ModelFileError(
            f"config.json gives decoder_base_dim as {shorten(fields.record['decoder_base_dim'])}; Reverie's "
            f"decoder is as wide as its encoder, {base}."
        )
    patch = 1 if fields.record.get("patch_size") is None else fields.integer("patch_size", 1)
    for key in ("in_channels", "out_channels"):
        if fields.integer(key, 3) != 3 * patch**2:
            raise ModelFileError(
                f"config.json gives {key} as {fields.record.get(key)}; pictures in patches of {patch} have "
                f"{3 * patch**2}."
            )
    many = fields.record.get("dim_mult", [1, 2, 4, 4])
    whole = isinstance(many, list) and all(type(m) is int and 0 < m < 2**10 for m in many)
    if not whole or many[:1] != [1] or len(many) > STAGES:
        raise ModelFileError(
            f"config.json gives dim_mult as {shorten(many)}; Reverie reads whole numbers above 0, the first 1, at most"
            f" {STAGES} of them."
        )
    temporal = fields.record.get("temperal_downsample", [False, True, True])
    flags = isinstance(temporal, list) and all(type(flag) is bool for flag in temporal)
    if not flags or len(temporal) != len(many) - 1:
        raise ModelFileError(
            f"config.json gives temperal_downsample as {shorten(temporal)}; it must be {len(many) - 1} times true or "
            "false, one between two stages each."
        )
    values = {
        "channels": channels,
        "widths": [base * m for m in many],
        "temporal": temporal,
        "blocks": fields.integer("num_res_blocks", 2, most=LAYERS),
        "patch": patch,
    }
    return Foreign(
        system="video-vae",
        values=values,
        table=(*table(values, theirs=theirs, ours=ours), *_given(_constants(fields, channels), ours)),
    )


def _given(constants: Mapping[str, Sequence[float]], ours: str) -> tuple[Rule, ...]:
    """Rules for our buffers, which their config gives."""
    return tuple(
        Rule((), f"{ours}{name}", value=partial(torch.tensor, list(constants[name]))) for name in CONSTANTS
    )


def _constants(fields: Fields, channels: int) -> dict[str, tuple[float, ...]]:
    found = {}
    for name, key, usual in (("mean", "latents_mean", MEAN), ("std", "latents_std", STD)):
        value = fields.record.get(key, list(usual))
        numbers = isinstance(value, list) and all(type(v) in (int, float) and math.isfinite(v) for v in value)
        if not numbers or len(value) != channels or (name == "std" and min(value) <= 0):
            raise ModelFileError(
                f"{fields.where} gives {key} as {shorten(value)}; it must be {channels} finite numbers"
                f"{' above 0' if name == 'std' else ''}, one for each channel of the latents."
            )
        found[name] = tuple(float(v) for v in value)
    return found


def is_original(entries: Mapping[str, Entry]) -> bool:
    """Whether a file of these tensors is the autoencoder under its original names."""
    return {
        "encoder.downsamples.0.residual.2.weight",
        "decoder.upsamples.0.residual.2.weight",
        "conv2.weight",
    } <= set(entries)


def read_alone(
    entries: Mapping[str, Entry],
    config: Mapping[str, Any] | None = None,
    *,
    what: str,
    theirs: str = "",
    ours: str = "",
) -> Foreign:
    """The autoencoder under its original names, its shape read from those of its tensors.

    `config` may give `latents_mean` and `latents_std`; otherwise they are Wan 2.1's. Raises `ModelFileError`.
    """

    def shape(name: str, axes: int = 5) -> tuple[int, ...]:
        if name not in entries or len(entries[name].shape) != axes:
            raise ModelFileError(f"{what} has no {name} with {axes} axes: it is no autoencoder of Wan 2.1.")
        return entries[name].shape

    fields = Fields(dict(config or {}), where="config")
    fields.only({"latents_mean", "latents_std"})
    widths: list[int] = []
    temporal: list[bool] = []
    counts = [0]
    for n in range(len(entries)):
        at = f"{theirs}encoder.downsamples.{n}"
        if f"{at}.residual.2.weight" in entries:
            counts[-1] += 1
            width = shape(f"{at}.residual.2.weight")[0]
            widths[len(counts) - 1 :] = [width]
        elif f"{at}.resample.1.weight" in entries:
            temporal.append(f"{at}.time_conv.weight" in entries)
            counts.append(0)
        else:
            break
    colours = shape(f"{theirs}encoder.conv1.weight")[1]
    patch = math.isqrt(colours // 3)
    if len(set(counts)) != 1 or len(widths) != len(counts) or colours != 3 * patch**2:
        raise ModelFileError(
            f"{what} has stages of {counts} blocks and {colours} channels of colour: it is no autoencoder of Wan 2.1."
        )
    channels = shape(f"{theirs}conv2.weight")[0]
    values = {
        "channels": channels,
        "widths": widths,
        "temporal": temporal,
        "blocks": counts[0],
        "patch": patch,
    }
    return Foreign(
        system="video-vae",
        values=values,
        table=(
            *table(values, original=True, theirs=theirs, ours=ours),
            *_given(_constants(fields, channels), ours),
        ),
    )


# ---------------------------------------------------------------- out


def write(
    config: Mapping[str, Any], constants: Mapping[str, Sequence[float]], *, theirs: str = "", ours: str = ""
) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """diffusers' config.json and the table, for a codec of our config whose buffers `mean` and `std` are `constants`.

    ModelFileError: widths that are no multiples of the first, which they cannot say.
    """
    base, patch = config["widths"][0], config["patch"]
    if any(width % base for width in config["widths"]):
        raise ModelFileError(
            f"widths {tuple(config['widths'])} cannot be written for diffusers, whose stages are multiples of the "
            "first; save this codec in Reverie's own format."
        )
    record: dict[str, Any] = {
        "_class_name": CLASS,
        "base_dim": base,
        "z_dim": config["channels"],
        "dim_mult": [width // base for width in config["widths"]],
        "num_res_blocks": config["blocks"],
        "attn_scales": [],
        "temperal_downsample": list(config["temporal"]),
        "dropout": 0.0,
        "latents_mean": [_short(v) for v in constants["mean"]],
        "latents_std": [_short(v) for v in constants["std"]],
        "is_residual": False,
        "in_channels": 3 * patch**2,
        "out_channels": 3 * patch**2,
        "patch_size": None if patch == 1 else patch,
        "scale_factor_temporal": 2 ** sum(config["temporal"]),
        "scale_factor_spatial": patch * 2 ** len(config["temporal"]),
    }
    return record, (*table(config, theirs=theirs, ours=ours), *_given(constants, ours))


def _short(value: float) -> float:
    """The shortest number that is the same in float32."""
    return float(str(np.float32(value)))
