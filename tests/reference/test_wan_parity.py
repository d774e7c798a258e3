"""Wan 2.1 against diffusers at small random weights: its transformer under both namings, its words, its pipeline."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file

from reverie.backbones.wan import SHAPES, WanDit, WanDitConfig
from reverie.codecs.video_vae import WAN
from reverie.encoders.umt5 import Umt5
from reverie.systems.wan import Wan, WanConfig
from reverie.weights import files, remap, wan_diffusers
from reverie.weights.store import config_from

pytestmark = pytest.mark.reference
diffusers = pytest.importorskip("diffusers")

# heads, channels of a head, the feed-forward's channels, blocks, the affine norm; frames, rows, columns, words, eps
MODELS = {
    "two heads, odd frames and rows": (2, 32, 96, 2, True, 3, 6, 10, 9, 1e-6),
    "uneven shares of a head, a picture": (3, 44, 200, 3, True, 1, 4, 4, 64, 1e-6),
    "one head, no norm before the words, other eps": (1, 12, 64, 1, False, 5, 2, 6, 20, 1e-4),
}


def shaken(model):
    """Far from initialisation, where biases are zero and norms are the identity."""
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(torch.randn_like(tensor) * 0.08)
    return model.eval()


def distance(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def their_transformer(heads, head, hidden, depth, norm, eps):
    return shaken(
        diffusers.WanTransformer3DModel(
            num_attention_heads=heads,
            attention_head_dim=head,
            ffn_dim=hidden,
            num_layers=depth,
            cross_attn_norm=norm,
            text_dim=48,
            freq_dim=64,
            eps=eps,
        )
    )


def our_transformer(record, tensors):
    values = wan_diffusers.backbone(record)
    ours = WanDit(config_from(WanDitConfig, json.loads(json.dumps(values)), where="config.json")).eval()
    table = wan_diffusers.table(values, original=record["_class_name"] == "WanModel", ours="")
    ours.load_state_dict(remap.apply(table, tensors, expected=files.expectation(ours.state_dict())))
    return ours


def original_names(tensors, depth):
    """The original's names, by diffusers' own converter turned round: what it makes of a name leads back to it."""
    from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

    names = [f"{part}.{p}" for part in (
        "patch_embedding", "text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
        "time_projection.1", "head.head") for p in ("weight", "bias")] + ["head.modulation"]  # fmt: skip
    for i in range(depth):
        names += [f"blocks.{i}.{part}.{p}" for part in (
            "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
            "cross_attn.v", "cross_attn.o", "norm3", "ffn.0", "ffn.2") for p in ("weight", "bias")]  # fmt: skip
        names += [f"blocks.{i}.{own}.norm_{x}.weight" for own in ("self_attn", "cross_attn") for x in "qk"]
        names.append(f"blocks.{i}.modulation")
    theirs = {
        name: next(iter(convert_wan_transformer_to_diffusers({name: torch.zeros(1)}))) for name in names
    }
    return {name: tensors[their] for name, their in theirs.items() if their in tensors}


def inputs(f, h, w, words, seed=1):
    g = torch.Generator().manual_seed(seed)
    context = torch.randn(2, words, 48, generator=g)
    context[0, words // 2 :] = 0
    context[1, words // 3 :] = 0
    return torch.randn(2, 16, f, h, w, generator=g), torch.tensor([937.0, 421.0]), context


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("original", [False, True], ids=["diffusers' names", "the original's names"])
def test_the_transformer_gives_the_same_velocity_and_gradients(name, original):
    heads, head, hidden, depth, norm, f, h, w, words, eps = MODELS[name]
    theirs = their_transformer(heads, head, hidden, depth, norm, eps)
    record, tensors = json.loads(theirs.to_json_string()), theirs.state_dict()
    if original:
        tensors = original_names(tensors, depth)
        assert len(tensors) == len(theirs.state_dict())
        record = {
            "_class_name": "WanModel", "_diffusers_version": "0.30.0", "model_type": "t2v", "dim": heads * head,
            "num_heads": heads, "ffn_dim": hidden, "freq_dim": 64, "num_layers": depth, "eps": eps, "in_dim": 16,
            "out_dim": 16, "text_len": 512, "text_dim": 48, "cross_attn_norm": norm,
        }  # fmt: skip
    ours = our_transformer(record, tensors)
    x, t, context = inputs(f, h, w, words)

    wanted = theirs(x, t, context, return_dict=False)[0]
    found = ours(x, t.double() / 1000, context)
    assert found.shape == wanted.shape
    assert distance(found, wanted) < 1e-5
    with torch.no_grad():
        assert distance(ours(x, t / 1000, ours.prepare(context)), wanted) < 1e-5

    grad = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    wanted.backward(grad)
    found.backward(grad)
    table = wan_diffusers.table(asdict(ours.config), ours="")
    gradients = remap.apply(table, {key: p.grad for key, p in theirs.named_parameters()})
    for key, parameter in ours.named_parameters():
        # What is added to all keys moves no softmax: both have rounding there, and nothing else.
        if distance(parameter.grad, gradients[key]) >= 1e-4:
            assert "kv.bias" in key or "norm_k" in key or "qkv.bias" in key, key
            scale = max(g.abs().max() for g in gradients.values())
            assert (parameter.grad - gradients[key]).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("original", [False, True])
def test_the_way_back_is_bit_equal(original):
    theirs = their_transformer(2, 32, 96, 2, True, 1e-6)
    tensors = theirs.state_dict()
    ours = our_transformer(json.loads(theirs.to_json_string()), tensors)
    record, table = wan_diffusers.write(asdict(ours.config), original=original, ours="")
    back = remap.apply(remap.invert(table), ours.state_dict())
    wanted = original_names(tensors, 2) if original else tensors
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)
    assert config_from(WanDitConfig, wan_diffusers.backbone(record), where="config.json") == ours.config
    if not original:
        again = diffusers.WanTransformer3DModel.from_config(record)
        assert dict(again.config) == {**dict(theirs.config), **dict(again.config)}
        again.load_state_dict(back)


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes_have_their_parameters(name):
    config = SHAPES[name]
    record, _ = wan_diffusers.write(asdict(config))
    with torch.device("meta"):
        theirs, ours = diffusers.WanTransformer3DModel.from_config(record), WanDit(config)
    counts = [sum(p.numel() for p in model.parameters()) for model in (theirs, ours)]
    assert counts[0] == counts[1]
    assert round(counts[0] / 1e9, 1) == {"wan2.1-t2v-1.3b": 1.4, "wan2.1-t2v-14b": 14.3}[name]


# ---------------------------------------------------------------- words


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A folder with a tiny random encoder and a tokenizer of single letters."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("words")
    letters = "abcdefghijklmnopqrstuvwxyz.,'&é一只猫"
    vocab = [(piece, 0.0) for piece in ("<pad>", "</s>", "<unk>")]
    vocab += [(piece, -1.0 - 0.1 * i) for i, piece in enumerate(("▁", "▁the", "▁cat", *letters))]
    tokenizer = transformers.T5Tokenizer(vocab=vocab, extra_ids=0)
    tokenizer.save_pretrained(folder / "tokenizer")
    encoder = transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=len(vocab), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=3, dropout_rate=0.0,
            feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    shaken(encoder).save_pretrained(folder / "text_encoder")
    return folder


PROMPTS = ["the  cat &amp;amp; a dog,\n\tsleeping", "cafÃ© 一只猫", "", "the cat " * 100]


def test_words_are_read_as_their_pipeline_reads_them(words):
    theirs = diffusers.WanPipeline(**their_words(words), vae=None, scheduler=None, transformer=None)
    theirs_of, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = Umt5(words).read(PROMPTS)
    assert ours.shape == theirs_of.shape == (4, 512, 48)
    assert [int(row.ne(0).any(-1).sum()) for row in ours] == [
        int(row.ne(0).any(-1).sum()) for row in theirs_of
    ]
    assert distance(ours, theirs_of) < 1e-5
    short = Umt5(words, length=7).read(PROMPTS)
    theirs_of, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False, max_sequence_length=7)
    assert distance(short, theirs_of) < 1e-5


def their_words(folder):
    import transformers

    return {
        "tokenizer": transformers.AutoTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": transformers.UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval(),
    }


# ---------------------------------------------------------------- whole pipelines


def their_pipeline(words, scheduler):
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=16, num_res_blocks=1,
        latents_mean=[0.1 * i - 0.8 for i in range(16)], latents_std=[0.5 + 0.1 * i for i in range(16)],
    )  # fmt: skip
    pipeline = diffusers.WanPipeline(
        **their_words(words),
        vae=shaken(vae),
        scheduler=scheduler,
        transformer=their_transformer(2, 32, 96, 2, True, 1e-6),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


SCHEDULERS = {
    "unipc, shift 3": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    ),
    "unipc, shift 5": lambda: diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0
    ),
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
}


def our_pipeline(theirs, words, folder):
    """By the JSON files that it saves."""
    theirs.save_pretrained(folder)
    records = {
        str(file.relative_to(folder)): json.loads(file.read_text())
        for file in (*folder.glob("*.json"), *folder.glob("*/*config.json"))
    }
    foreign = wan_diffusers.read_pipeline(records)
    values = json.loads(json.dumps(foreign.values))
    ours = Wan(config_from(WanConfig, values, where="model_index.json")).eval()
    found = remap.apply(foreign.table, pipeline_tensors(theirs))
    ours.load_state_dict(found | {name: torch.tensor(value) for name, value in foreign.constants.items()})
    ours.reader = Umt5(words)
    return ours


def pipeline_tensors(pipeline):
    parts = {"transformer": pipeline.transformer, "vae": pipeline.vae}
    return {
        f"{part}.{key}": value for part, model in parts.items() for key, value in model.state_dict().items()
    }


@pytest.mark.parametrize("frames", [1, 9])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_pipeline_gives_the_same_latents_and_frames(name, frames, words, tmp_path):
    theirs = their_pipeline(words, SCHEDULERS[name]())
    ours = our_pipeline(theirs, words, tmp_path)
    prompts, negative, (h, w) = ["the cat", "a dog, sleeping"], "ugly", (32, 48)
    noise = torch.randn(2, 16, 1 + frames // 4, h // 8, w // 8, generator=torch.Generator().manual_seed(5))
    both = {"height": h, "width": w, "num_frames": frames, "num_inference_steps": 6, "guidance_scale": 5.0,
            "negative_prompt": [negative] * 2, "latents": noise}  # fmt: skip
    wanted = theirs(prompts, output_type="latent", **both).frames
    found = ours.generate_latents(
        prompts, negative=negative, frames=frames, size=(h, w), steps=6, guidance=5.0, noise=noise
    )
    assert distance(found, wanted) < 1e-4
    kept = ours.read(prompts)
    again = ours.generate_latents(
        kept, negative=ours.read([negative]), frames=frames, size=(h, w), steps=6, guidance=5.0, noise=noise
    )
    assert torch.equal(again, found)
    video = theirs(prompts, output_type="pt", **both).frames
    drawn = ours.generate_video(
        prompts, negative=negative, frames=frames, size=(h, w), steps=6, guidance=5.0, noise=noise
    )
    theirs_of = video.transpose(1, 2) * 2 - 1
    assert (theirs_of.abs() < 1).float().mean() > 0.2
    assert drawn.shape == (2, 3, frames, h, w)
    assert (drawn - theirs_of).abs().max() < 1e-3


def test_a_pipeline_goes_back_bit_equal_and_runs_there(words, tmp_path):
    theirs = their_pipeline(words, SCHEDULERS["unipc, shift 5"]())
    ours = our_pipeline(theirs, words, tmp_path / "theirs")
    constants = {name: ours.state_dict()[name].tolist() for name in wan_diffusers.CONSTANTS}
    records, table = wan_diffusers.write_pipeline(asdict(ours.config), constants, words=True)
    tensors = {name: value for name, value in ours.state_dict().items() if name not in constants}
    back, wanted = remap.apply(remap.invert(table), tensors), pipeline_tensors(theirs)
    assert back.keys() == wanted.keys()
    assert all(torch.equal(back[key], wanted[key]) for key in wanted)

    folder = tmp_path / "back"
    for path, record in records.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(json.dumps(record))
    for part in ("transformer", "vae"):
        own = {
            key.removeprefix(f"{part}."): value for key, value in back.items() if key.startswith(f"{part}.")
        }
        files.write(folder / part / "diffusion_pytorch_model.safetensors", own, {"format": "pt"})
    # Piece by piece: their whole loader needs accelerate for this transformer.
    transformer = diffusers.WanTransformer3DModel.from_config(records["transformer/config.json"])
    transformer.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    again = diffusers.WanPipeline(
        **their_words(words),
        vae=diffusers.AutoencoderKLWan.from_pretrained(folder, subfolder="vae"),
        scheduler=diffusers.UniPCMultistepScheduler.from_pretrained(folder, subfolder="scheduler"),
        transformer=transformer.eval(),
    )
    again.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    options = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 3, "output_type": "pt"}
    one, other = (each("the cat", latents=noise, **options).frames for each in (theirs, again))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"boundary_ratio": 0.9}, "two transformers"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps"),
        ("transformer/config.json", {"image_dim": 1280}, "image_dim"),
        ("transformer/config.json", {"in_channels": 36}, "36 channels in and 16 out"),
        ("transformer/config.json", {"patch_size": [1, 2, 3]}, "patch_size"),
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True}, "karras"),
    ],
)
def test_what_would_give_other_numbers_is_refused(file, changes, said):
    config = WanConfig(backbone=SHAPES["wan2.1-t2v-1.3b"], codec=WAN)
    constants = {"codec.mean": [0.0] * 16, "codec.std": [1.0] * 16}
    records, _ = wan_diffusers.write_pipeline(asdict(config), constants)
    values = json.loads(json.dumps(wan_diffusers.read_pipeline(records).values))
    assert config_from(WanConfig, values, where="model_index.json") == config
    records[file] = records[file] | changes
    with pytest.raises(files.ModelFileError, match=said):
        wan_diffusers.read_pipeline(records)
