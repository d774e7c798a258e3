"""DiT <-> the folders of diffusers' `DiTTransformer2DModel` and, with autoencoder and scheduler, of its `DiTPipeline`.

Every block of theirs holds a copy of the embeddings of time and class; here they are one, so copies that differ are
refused. Their times' waves and the norm before their MLP differ from the authors' code, as our config says.
https://github.com/huggingface/diffusers/blob/main/src/diffusers/models/transformers/dit_transformer_2d.py
https://github.com/huggingface/diffusers/blob/main/src/diffusers/pipelines/dit/pipeline_dit.py
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reverie.errors import InputError
from reverie.weights import remap, vae_diffusers
from reverie.weights.diffusers_scheduler import BETAS, SPACINGS
from reverie.weights.files import ModelFileError, shorten
from reverie.weights.layout import LAYERS, Fields, Foreign
from reverie.weights.places import CONFIG, PIPELINE, SCHEDULER
from reverie.weights.remap import Rule

CLASS, PIPELINE_CLASS = "DiTTransformer2DModel", "DiTPipeline"
TRANSFORMER, VAE = f"transformer/{CONFIG}", f"vae/{CONFIG}"
NULL = 1000  # of the pipeline, whatever the transformer has
VARIANCES = {"fixed_small": "fixed_small", "fixed_large": "fixed_large"}
CLASSES = (CLASS, "Transformer2DModel")  # the latter is what the published folders of DiT name
KEYS = (
    "_class_name", "_diffusers_version", "_name_or_path", "activation_fn", "attention_bias", "attention_head_dim",
    "attention_type", "caption_channels", "cross_attention_dim", "double_self_attention", "dropout", "in_channels",
    "interpolation_scale", "norm_elementwise_affine", "norm_eps", "norm_num_groups", "norm_type",
    "num_attention_heads", "num_embeds_ada_norm", "num_layers", "num_vector_embeds", "only_cross_attention",
    "out_channels", "patch_size", "sample_size", "upcast_attention", "use_additional_conditions",
    "use_linear_projection",
)  # fmt: skip
EMBEDDINGS = (
    ("timestep_embedder.linear_1.{p}", "time.0.{p}"),
    ("timestep_embedder.linear_2.{p}", "time.2.{p}"),
    ("class_embedder.embedding_table.weight", "classes.weight"),
)


def read(records: Mapping[str, Any], names: Collection[str] = ()) -> Foreign:
    """From the JSON files by path of a transformer's folder, or of a pipeline's, and the names of its tensors.

    A transformer alone draws latents, as the pipeline's usual scheduler does.
    """
    if PIPELINE not in records:
        values = {"backbone": _backbone(records[CONFIG])} | _sampling(
            {"_class_name": "DDIMScheduler", "clip_sample": False}
        )
        return Foreign(
            system="dit",
            values=values,
            table=table(values["backbone"]["depth"]),
            ignore=("pos_embed.pos_embed",),
        )
    index = Fields(records[PIPELINE], where=PIPELINE)
    absent = [file for file in (TRANSFORMER, VAE, SCHEDULER) if file not in records]
    if absent:
        raise ModelFileError(f"the pipeline lacks {', '.join(absent)}; fetch the whole folder.")
    backbone, codec = _backbone(records[TRANSFORMER]), vae_diffusers.read(records[VAE], names)
    values = {
        "backbone": backbone,
        "codec": codec.values,
        "names": _names(index, backbone["classes"]),
        **_sampling(records[SCHEDULER]),
    }
    return Foreign(
        system="dit",
        values=values,
        table=(
            *remap.within(table(backbone["depth"]), source="transformer."),
            *remap.within(codec.table, source="vae.", target="codec."),
        ),
        ignore=("transformer.pos_embed.pos_embed",),
    )


def write(config: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[Rule, ...]]:
    """Their JSON files by path and our table, from our system's config as plain data: a pipeline if it has a codec.

    InputError: they have no such model. How many steps are taken, and with what guidance, they have no place for.
    """
    backbone = config["backbone"]
    record, rules = _transformer(backbone), table(backbone["depth"])
    if config["codec"] is None:
        return {CONFIG: record}, rules
    if backbone["classes"] != NULL:
        raise InputError(
            f"diffusers' DiTPipeline asks for class {NULL} where it wants any, so it cannot have {backbone['classes']}"
            " classes; save this model in Reverie's own format."
        )
    if config["guided_channels"] not in (0, backbone["channels"]):
        raise InputError(
            f"diffusers' DiTPipeline guides all channels, not {config['guided_channels']}; set guided_channels to 0,"
            " which draws other pictures, or save this model in Reverie's own format."
        )
    if config["codec"]["shift"]:
        raise InputError(
            "diffusers' DiTPipeline does not shift latents; save this model in Reverie's own format."
        )
    codec, codec_table = vae_diffusers.write(config["codec"])
    scheduler = _scheduler(config)
    index = {
        "_class_name": PIPELINE_CLASS,
        "id2label": {str(number): name for number, name in enumerate(config["names"]) if name},
        "scheduler": ["diffusers", scheduler["_class_name"]],
        "transformer": ["diffusers", CLASS],
        "vae": ["diffusers", vae_diffusers.CLASS],
    }
    records = {TRANSFORMER: record, VAE: codec, SCHEDULER: scheduler, PIPELINE: index}
    return records, (
        *remap.within(rules, source="transformer."),
        *remap.within(codec_table, source="vae.", target="codec."),
    )


def _backbone(record: Any) -> dict[str, Any]:
    whole = Fields(record, where=f"the config of {CLASS}")
    whole.choice("_class_name", CLASS, {name: name for name in CLASSES})
    whole.only(KEYS)
    whole.unlike({
        "attention_type": ("default",),
        "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate",), "attention_bias": (True,),
        "norm_elementwise_affine": (False,), "cross_attention_dim": (None,), "double_self_attention": (False,),
        "only_cross_attention": (False,), "num_vector_embeds": (None,), "dropout": (0.0, 0),
        "caption_channels": (None,),
        "interpolation_scale": (None, 1, 1.0),
    })  # fmt: skip
    heads, head = whole.integer("num_attention_heads", 16), whole.integer("attention_head_dim", 72)
    channels, depth = whole.integer("in_channels", 4), whole.integer("num_layers", 28, most=LAYERS)
    out = channels if record.get("out_channels") is None else whole.integer("out_channels", channels)
    if out not in (channels, 2 * channels):
        raise ModelFileError(
            f"{whole.where} gives {out} channels for {channels}; it must be as many, or twice as many."
        )
    return {
        "channels": channels,
        "size": whole.integer("sample_size", 32),
        "patch": whole.integer("patch_size", 2),
        "width": heads * head,
        "depth": depth,
        "heads": heads,
        "classes": whole.integer("num_embeds_ada_norm", 1000),
        "learned_sigma": out == 2 * channels,
        "waves": "diffusers",
        "mlp_eps": whole.number("norm_eps", 1e-5),
    }


def _transformer(config: Mapping[str, Any]) -> dict[str, Any]:
    if config["waves"] != "diffusers":
        raise InputError(
            "diffusers' DiT embeds times by other waves than the authors' code, which this model was trained with, so"
            " numbers would differ; save it in Reverie's own format."
        )
    if int(config["width"] * config["ratio"]) != 4 * config["width"]:
        raise InputError(
            f"diffusers' DiT has MLPs of 4 times the width, not {config['ratio']:g}; save this model in Reverie's own"
            " format."
        )
    return {
        "_class_name": CLASS,
        "activation_fn": "gelu-approximate",
        "attention_bias": True,
        "attention_head_dim": config["width"] // config["heads"],
        "dropout": 0.0,
        "in_channels": config["channels"],
        "norm_elementwise_affine": False,
        "norm_eps": config["mlp_eps"],
        "norm_num_groups": 32,
        "norm_type": "ada_norm_zero",
        "num_attention_heads": config["heads"],
        "num_embeds_ada_norm": config["classes"],
        "num_layers": config["depth"],
        "out_channels": config["channels"] * (2 if config["learned_sigma"] else 1),
        "patch_size": config["patch"],
        "sample_size": config["size"],
        "upcast_attention": False,
    }


def table(depth: int) -> tuple[Rule, ...]:
    """Their names -> ours, for so many blocks."""
    block = "transformer_blocks.{i}"
    copies = tuple(
        Rule(tuple(f"transformer_blocks.{i}.norm1.emb.{theirs}" for i in range(depth)), ours, copies=True)
        for theirs, ours in EMBEDDINGS
    )
    rules = (
        Rule("pos_embed.proj.{p}", "embed.{p}"),
        *copies,
        Rule(f"{block}.norm1.linear.{{p}}", "blocks.{i}.modulation.{p}"),
        Rule(tuple(f"{block}.attn1.to_{x}.{{p}}" for x in "qkv"), "blocks.{i}.attention.qkv.{p}"),
        Rule(f"{block}.attn1.to_out.0.{{p}}", "blocks.{i}.attention.out.{p}"),
        Rule(f"{block}.ff.net.0.proj.{{p}}", "blocks.{i}.mlp.up.{p}"),
        Rule(f"{block}.ff.net.2.{{p}}", "blocks.{i}.mlp.down.{p}"),
        Rule("proj_out_1.{p}", "modulation.{p}"),
        Rule("proj_out_2.{p}", "out.{p}"),
    )
    return remap.within(rules, target="backbone.")


def _sampling(record: Any) -> dict[str, Any]:
    """How a scheduler samples, as our system's config says it."""
    it = Fields(record, where="scheduler_config.json")
    sampler = it.choice("_class_name", None, {"DDIMScheduler": "ddim", "DDPMScheduler": "ddpm"})
    it.unlike({
        "prediction_type": ("epsilon",), "trained_betas": (None,), "thresholding": (False,),
        "rescale_betas_zero_snr": (False,),
    })  # fmt: skip
    if sampler == "ddim":
        it.unlike({"set_alpha_to_one": (True,)})
    process: dict[str, Any] = {
        "kind": "ddpm",
        "steps": it.integer("num_train_timesteps", 1000),
        "betas": it.choice("beta_schedule", "linear", BETAS),
        "beta_start": it.number("beta_start", 1e-4),
        "beta_end": it.number("beta_end", 0.02),
        "zero_snr": False,
    }
    clip = it.number("clip_sample_range", 1.0) if it.flag("clip_sample", True) else None
    if clip is not None and clip <= 0:
        raise ModelFileError(f"{it.where} gives clip_sample_range as {clip:g}; it must be above 0.")
    offset = it.record.get("steps_offset", 0)
    if type(offset) is not int or not 0 <= offset < process["steps"]:
        raise ModelFileError(
            f"{it.where} gives steps_offset as {shorten(offset)}; it must be a whole number from 0, below the number of"
            " steps."
        )
    variance = "fixed_small"
    if sampler == "ddpm":
        variance = it.choice("variance_type", "fixed_small", VARIANCES)
    return {
        "process": process,
        "sampler": sampler,
        "steps": 50,
        "guidance": 4.0,
        "guided_channels": 0,
        "spacing": it.choice("timestep_spacing", "leading", SPACINGS),
        "offset": offset,
        "variance": variance,
        "clip": clip,
    }


def _scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    names = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler"}
    sampler, variance, spacing = config["sampler"], config["variance"], config["spacing"]
    if sampler not in names or (sampler == "ddpm" and variance == "learned_range") or spacing not in SPACINGS:
        raise InputError(
            f"diffusers' DiTPipeline does not draw by {sampler!r} with a variance {variance!r} and indices {spacing!r};"
            " choose 'ddim' and 'leading', say, or save this model in Reverie's own format."
        )
    process, clip = config["process"], config["clip"]
    record = {
        "_class_name": names[sampler],
        "num_train_timesteps": process["steps"],
        "beta_start": process["beta_start"],
        "beta_end": process["beta_end"],
        "beta_schedule": {ours: theirs for theirs, ours in BETAS.items()}[process["betas"]],
        "trained_betas": None,
        "clip_sample": clip is not None,
        "clip_sample_range": 1.0 if clip is None else clip,
        "prediction_type": "epsilon",
        "steps_offset": config["offset"],
        "timestep_spacing": spacing,
        "thresholding": False,
        "rescale_betas_zero_snr": process["zero_snr"],
    }
    if process["zero_snr"]:
        raise InputError(
            "diffusers' DiTPipeline with zero_snr is none that Reverie reads back; save it as Reverie's."
        )
    return record | ({"set_alpha_to_one": True} if sampler == "ddim" else {"variance_type": variance})


def _names(index: Fields, count: int) -> list[str]:
    said = index.record.get("id2label")
    if said is None:
        return []
    if not isinstance(said, dict) or not all(isinstance(name, str) for name in said.values()):
        raise ModelFileError(f"{index.where} gives id2label as {shorten(said)}; it must be names by number.")
    names = [""] * count
    for key, name in said.items():
        if not str(key).isdecimal() or int(key) >= count:
            raise ModelFileError(f"{index.where} names a class {shorten(key)} of {count}; check it.")
        names[int(key)] = name
    return names if any(names) else []
