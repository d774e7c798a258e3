"""BLIP-2 against transformers at small random weights: features, vectors, logits, written tokens; both ways."""

import dataclasses

import pytest
import torch

import reverie
from reverie.samplers.autoregressive import beam, greedy
from reverie.systems.blip2 import Blip2Config, SightConfig, Source
from reverie.weights import files
from reverie.weights.files import ModelFileError
from reverie.weights.store import hash_of

pytestmark = pytest.mark.reference
transformers = pytest.importorskip("transformers")

QFORMER = {
    "vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48,
    "max_position_embeddings": 16,
}  # fmt: skip
VISION = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}  # fmt: skip


def shaken(model):
    """Weights all of which matter; their library leaves queries and biases at zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * 0.3 if p.ndim > 1 else p + noise * 0.1)
    return model.eval()


def pixels(b=3):
    return torch.rand(b, 3, 28, 28, generator=torch.Generator().manual_seed(1)) * 2 - 1


def coloured(images):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((images + 1) / 2 - mean) / std


def near(ours, theirs, *, most=1e-5):
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < most * theirs.abs().max()


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory):
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER | {"use_qformer_text_input": True}, num_query_tokens=4,
        image_text_hidden_size=16,
    )  # fmt: skip
    theirs = shaken(transformers.Blip2ForImageTextRetrieval(config))
    folder = tmp_path_factory.mktemp("retrieval")
    theirs.save_pretrained(folder)
    with pytest.warns(UserWarning, match="preprocessor_config"):
        return theirs, reverie.load(folder)


@torch.no_grad()
def test_a_retrieval_folder_gives_the_same_numbers(retrieval):
    theirs, ours = retrieval
    tokens = torch.tensor([[2, 9, 8, 3], [2, 7, 3, 0], [2, 11, 12, 3]])
    given = {"pixel_values": coloured(pixels()), "input_ids": tokens, "attention_mask": (tokens != 0).long()}
    contrast = theirs(**given)
    near(ours.embed_image(pixels()), contrast.image_embeds)
    near(ours.embed_text(tokens), contrast.text_embeds)
    near(ours.similarity(pixels(), tokens) * ours.temperature, contrast.logits_per_image)
    matched = theirs(**given, use_image_text_matching_head=True)
    features = ours.sight.features(pixels())
    near(ours.matches(features, tokens), matched.logits_per_image)
    near(ours.matches(ours.sight.qformer.known(features), tokens), matched.logits_per_image)


@torch.no_grad()
def test_what_is_written_for_transformers_is_what_it_wrote(retrieval, tmp_path):
    theirs, ours = retrieval
    ours.temperature.fill_(0.04)
    reverie.save(ours, tmp_path / "theirs", format="transformers")
    again = transformers.Blip2ForImageTextRetrieval.from_pretrained(tmp_path / "theirs").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())
    assert reverie.load(tmp_path / "theirs").temperature.item() == pytest.approx(0.04)


def language(kind):
    if kind == "opt":
        return transformers.OPTConfig(
            vocab_size=70, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=2,
            ffn_dim=48, max_position_embeddings=64, pad_token_id=1, bos_token_id=2, eos_token_id=3,
        )  # fmt: skip
    return transformers.T5Config(
        vocab_size=70, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=2, decoder_start_token_id=0,
        pad_token_id=0, eos_token_id=3,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["opt", "t5"])
@torch.no_grad()
def test_a_generation_folder_writes_the_same_tokens(kind, tmp_path):
    config = transformers.Blip2Config(
        vision_config=VISION, qformer_config=QFORMER, text_config=language(kind).to_dict(), num_query_tokens=4,
        image_token_index=69,
    )  # fmt: skip
    theirs = shaken(transformers.Blip2ForConditionalGeneration(config))
    theirs.language_projection.weight.mul_(8)  # or random words outweigh what is seen
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.warns(UserWarning, match="preprocessor_config"):
        ours = reverie.load(tmp_path / "theirs")
    near(
        ours.spoken(ours.sight.features(pixels())),
        theirs.get_image_features(coloured(pixels())).pooler_output,
    )
    prompt = torch.tensor([[5, 6]] * 3)
    given = {"input_ids": torch.cat([torch.full((3, 4), 69), prompt], 1), "pixel_values": coloured(pixels())}
    vectors = ours.heard(ours.sight.features(pixels()), prompt)
    start = prompt[:, :1]
    for beams in (1, 3):
        how = {
            "max_new_tokens": 8,
            "num_beams": beams,
            "do_sample": False,
            "eos_token_id": 3,
            "pad_token_id": 1,
        }
        found = theirs.generate(**given, **how).tolist()
        skip = given["input_ids"].shape[1] if kind == "opt" else 1
        found = [row[skip:] for row in found]
        found = [row[: row.index(3) + 1] if 3 in row else row for row in found]
        write = ours.language.continued(vectors)
        limits = {"end": 3, "most": 8}
        mine = beam(write, start, beams=beams, **limits) if beams > 1 else greedy(write, start, **limits)
        assert mine == found
        assert len({tuple(row) for row in mine}) > 1  # pictures matter
    # Logits in fp64: of random weights fp32's own rounding comes near 1e-5.
    ours, theirs = ours.double(), theirs.double()
    given["pixel_values"] = coloured(pixels().double())
    vectors = ours.heard(ours.sight.features(pixels().double()), prompt)
    labels = torch.tensor([[5, 9, 8, 3]] * 3)
    if kind == "opt":
        logits = theirs(**{**given, "input_ids": torch.cat([given["input_ids"], labels], 1)}).logits[:, -5:]
    else:
        logits = theirs(
            **given, decoder_input_ids=torch.cat([torch.zeros(3, 1, dtype=torch.long), labels], 1)
        ).logits
    near(ours.language.logits(vectors, labels), logits, most=1e-10)
    ours, theirs = ours.float(), theirs.float()
    reverie.save(ours, tmp_path / "again", format="transformers")
    again = transformers.Blip2ForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(value, again[name]) for name, value in theirs.state_dict().items())
    reverie.save(ours, tmp_path / "own")
    own = reverie.load(tmp_path / "own")  # nothing of it lies elsewhere
    assert hash_of(own) == hash_of(ours)
    assert torch.equal(own.spoken(own.sight.features(pixels())), ours.spoken(ours.sight.features(pixels())))


def lavis(ours):
    """The authors' names, written by hand from their modules' attributes."""
    state, out = ours.state_dict(), {}
    inner, image = "sight.qformer", "sight.image"

    def both(theirs, mine):
        out[f"{theirs}.weight"], out[f"{theirs}.bias"] = state[f"{mine}.weight"], state[f"{mine}.bias"]

    out["visual_encoder.cls_token"] = state[f"{image}.class_token"][None, None]
    out["visual_encoder.pos_embed"] = state[f"{image}.positions"][None]
    both("visual_encoder.patch_embed.proj", f"{image}.stem")
    for i in range(2):
        a, b = f"visual_encoder.blocks.{i}", f"{image}.blocks.{i}"
        out[f"{a}.attn.qkv.weight"] = state[f"{b}.attention.qkv.weight"]
        q, k, v = state[f"{b}.attention.qkv.bias"].chunk(3)
        assert not k.any()
        out[f"{a}.attn.q_bias"], out[f"{a}.attn.v_bias"] = q, v
        pairs = {
            "attn.proj": "attention.out",
            "norm1": "norm1",
            "norm2": "norm2",
            "mlp.fc1": "mlp.up",
            "mlp.fc2": "mlp.down",
        }
        for x, y in pairs.items():
            both(f"{a}.{x}", f"{b}.{y}")
    both("ln_vision", "sight.norm")
    bert = "Qformer.bert"
    out["query_tokens"] = state[f"{inner}.queries"][None]
    out[f"{bert}.embeddings.word_embeddings.weight"] = state[f"{inner}.embedding.weight"]
    out[f"{bert}.embeddings.position_embeddings.weight"] = state[f"{inner}.positions"]
    out[f"{bert}.embeddings.position_ids"] = torch.arange(16)[None]
    both(f"{bert}.embeddings.LayerNorm", f"{inner}.norm")
    for i in range(3):
        a, b = f"{bert}.encoder.layer.{i}", f"{inner}.blocks.{i}"
        for kind in ("weight", "bias"):
            parts = state[f"{b}.attention.qkv.{kind}"].chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{a}.attention.self.{name}.{kind}"] = part
            if i % 2 == 0:
                out[f"{a}.crossattention.self.query.{kind}"] = state[f"{b}.look.q.{kind}"]
                for name, part in zip(("key", "value"), state[f"{b}.look.kv.{kind}"].chunk(2), strict=True):
                    out[f"{a}.crossattention.self.{name}.{kind}"] = part
        pairs = {
            "attention.output.dense": "attention.out", "attention.output.LayerNorm": "norm_attention",
            "intermediate.dense": "mlp_text.up", "output.dense": "mlp_text.down", "output.LayerNorm": "norm_text",
            "intermediate_query.dense": "mlp_query.up", "output_query.dense": "mlp_query.down",
            "output_query.LayerNorm": "norm_query",
        }  # fmt: skip
        if i % 2 == 0:
            pairs |= {
                "crossattention.output.dense": "look.out",
                "crossattention.output.LayerNorm": "norm_look",
            }
        for x, y in pairs.items():
            both(f"{a}.{x}", f"{b}.{y}")
    head = "Qformer.cls.predictions"
    both(f"{head}.transform.dense", f"{inner}.words.dense")
    both(f"{head}.transform.LayerNorm", f"{inner}.words.norm")
    out[f"{head}.bias"] = out[f"{head}.decoder.bias"] = state[f"{inner}.words.bias"]
    out[f"{head}.decoder.weight"] = state[f"{inner}.embedding.weight"]
    both("vision_proj", "image_projection")
    both("text_proj", "text_projection")
    both("itm_head", "matching")
    out["temp"] = state["temperature"][0]
    return {name: value.clone() for name, value in out.items()}


@torch.no_grad()
def test_the_authors_names_with_the_tower_and_without(retrieval, tmp_path):
    _, public = retrieval
    inner = dataclasses.replace(public.config.sight.qformer, writes=True, heads=1)
    tower = dataclasses.replace(public.config.sight.image, heads=1)
    config = Blip2Config(sight=SightConfig(image=tower, qformer=inner), width=16)
    torch.manual_seed(0)
    made = shaken(type(public)(config))
    for block in made.sight.image.blocks:
        block.attention.qkv.bias.chunk(3)[1].zero_()
    tensors = lavis(made)
    files.write(tmp_path / "whole.safetensors", tensors)
    ours = reverie.load(tmp_path / "whole.safetensors")
    assert ours.config.sight == config.sight
    assert hash_of(ours) == hash_of(made)
    assert ours.temperature.item() == made.temperature.item()

    reverie.save(ours, tmp_path / "back", format="lavis")
    back = dict(files.read(tmp_path / "back" / "model.safetensors"))
    tensors.pop("Qformer.bert.embeddings.position_ids")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())

    without = {name: value for name, value in tensors.items() if not name.startswith("visual_encoder.")}
    files.write(tmp_path / "without.safetensors", without)
    with pytest.raises(ModelFileError, match="without its frozen image tower"):
        reverie.load(tmp_path / "without.safetensors")
    reverie.save(ours, tmp_path / "own")
    source = Source(model=str(tmp_path / "own"), hash=hash_of(ours.sight.image))
    named = dataclasses.replace(config, sight=dataclasses.replace(config.sight, source=source))
    found = reverie.load(tmp_path / "without.safetensors", config=named)
    assert torch.equal(found.embed_image(pixels()), ours.embed_image(pixels()))
