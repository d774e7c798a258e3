"""Our DiT against diffusers' DiTTransformer2DModel and DiTPipeline at small random weights, without a download."""

import json
from dataclasses import asdict

import pytest
import torch

import reverie
from reverie.backbones.dit import DitConfig, Modulations
from reverie.errors import InputError
from reverie.systems.dit import DiffusionTransformer, DiffusionTransformerConfig
from reverie.weights import dit_diffusers, files, remap
from reverie.weights.files import ModelFileError

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.reference

SHAPES = {
    "a patch of 2, learned sigma": {"out_channels": 8},
    "a patch of 4, no sigma, other eps": {"patch_size": 4, "sample_size": 16, "norm_eps": 1e-3},
    "one block, three channels, a patch of 1": {"num_layers": 1, "in_channels": 3, "patch_size": 1},
}


def away(model):
    """Far from initialisation, where modulations are zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)


def their_transformer(**shape):
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 3, "sample_size": 8,
        "num_embeds_ada_norm": 10, **shape,
    }  # fmt: skip
    model = diffusers.DiTTransformer2DModel(**config).eval()
    away(model)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model


def record_of(model):
    return {key: value for key, value in model.config.items() if not key.startswith("_")} | {
        "_class_name": type(model).__name__
    }


def ours_from(theirs):
    foreign = dit_diffusers.read({"config.json": record_of(theirs)})
    system = DiffusionTransformer(
        DiffusionTransformerConfig(backbone=DitConfig(**foreign.values["backbone"]), variance="fixed_small")
    ).eval()
    expected = files.expectation(system.state_dict())
    system.load_state_dict(remap.apply(foreign.table, theirs.state_dict(), expected=expected))
    return system.backbone


def near(ours, theirs, most=1e-5):
    assert ours.shape == theirs.shape
    return (ours - theirs).norm() / theirs.norm() < most


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_predictions_and_gradients_are_equal(shape):
    theirs = their_transformer(**shape)
    ours = ours_from(theirs)
    channels = ours.config.channels
    for side in (8, 12) if "sample_size" not in shape else (16, 24):
        x = torch.randn(3, channels, side, side, requires_grad=True)
        t, classes = torch.tensor([0, 400, 999]), torch.tensor([1, 9, 10])
        a, b = theirs(x, timestep=t, class_labels=classes).sample, ours(x, t, classes)
        assert near(b, a)
        one = ours(x[:1], t[:1], classes[:1])  # one item alone is normalised in another way
        assert near(one, a[:1])
        probe = torch.randn_like(a)
        assert near(
            *(torch.autograd.grad((out * probe).sum(), x, retain_graph=True)[0] for out in (b, a)), 1e-4
        )
    (b * probe).sum().backward()
    (a * probe).sum().backward()
    expected = remap.apply(
        # The gradient of what is shared is the sum of the gradients of their copies.
        [rule for rule in dit_diffusers.table(ours.config.depth) if not rule.copies],
        {name: p.grad for name, p in theirs.named_parameters() if "norm1.emb." not in name},
    )
    expected = {name.removeprefix("backbone."): gradient for name, gradient in expected.items()}
    gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
    for name, gradient in expected.items():
        assert near(gradients.pop(name), gradient, 1e-4), name
    copies = [dict(block.norm1.emb.named_parameters()) for block in theirs.transformer_blocks]
    assert near(
        gradients["classes.weight"],
        sum(one["class_embedder.embedding_table.weight"].grad for one in copies),
        1e-4,
    )
    assert near(
        gradients["time.2.bias"], sum(one["timestep_embedder.linear_2.bias"].grad for one in copies), 1e-4
    )


def test_modulations_for_all_steps_are_those_of_each(monkeypatch):
    ours = ours_from(their_transformer(out_channels=8))
    x, classes = torch.randn(4, 4, 8, 8), torch.tensor([3, 10, 3, 10])
    times = [999.0, 500.0, 7.0, 7.0, 3.0]
    monkeypatch.setattr(
        "reverie.backbones.dit.TABLE_BYTES", 2 * 4 * 2 * 20 * 24
    )  # room for two steps of two classes
    modulations = Modulations(ours, times, classes)
    assert modulations.together == 2
    for t in times:
        one = ours(x, torch.full((4,), t), classes)
        assert near(ours(x, None, None, modulations=modulations.at(t)), one)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_the_way_back_is_bit_equal(shape, tmp_path):
    theirs = their_transformer(**shape)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = reverie.load(tmp_path / "theirs")
    assert isinstance(ours, DiffusionTransformer)
    reverie.save(ours, tmp_path / "ours", format="diffusers")
    again = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "ours")
    state, back = theirs.state_dict(), again.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    for key, value in theirs.config.items():
        if not key.startswith("_") and key != "out_channels":
            assert again.config[key] == value, key
    assert again.out_channels == theirs.out_channels
    assert reverie.load(tmp_path / "ours").config == ours.config


def their_pipeline(scheduler, **shape):
    torch.manual_seed(1)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=4, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
    ).eval()  # fmt: skip
    away(vae)
    theirs = their_transformer(num_embeds_ada_norm=1000, **shape)
    with torch.no_grad():
        theirs.proj_out_2.weight.mul_(0.1)  # so that latents stay of the size of latents
    labels = {0: "tench, Tinca tinca", 3: "crane", 517: "crane", 999: "toilet tissue"}
    return diffusers.DiTPipeline(transformer=theirs, vae=vae, scheduler=scheduler, id2label=labels)


SCHEDULERS = {
    "DDIM": lambda: diffusers.DDIMScheduler(clip_sample=False),
    "DDIM, clipped, trailing, scaled betas": lambda: diffusers.DDIMScheduler(
        clip_sample_range=3.0,
        timestep_spacing="trailing",
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
    ),
    "DDPM": lambda: diffusers.DDPMScheduler(clip_sample=False),
    "DDPM, large variance, linspace": lambda: diffusers.DDPMScheduler(
        clip_sample=False, variance_type="fixed_large", timestep_spacing="linspace"
    ),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_pipeline_draws_the_same_pictures(scheduler, guidance, tmp_path, monkeypatch):
    # Five steps: where the steps do not divide 1,000, their DDIM steps to another index than it takes next.
    theirs = their_pipeline(scheduler(), out_channels=8)
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(tmp_path / "theirs")
    with open(tmp_path / "theirs/model_index.json") as file:  # they keep the names in the config by hand
        index = json.load(file)
    index["id2label"] = {"0": "tench, Tinca tinca", "3": "crane", "517": "crane", "999": "toilet tissue"}
    (tmp_path / "theirs/model_index.json").write_text(json.dumps(index))
    ours = reverie.load(tmp_path / "theirs")

    classes = [0, 999]
    copies = 2 if guidance > 1 else 1
    draws = [torch.randn(2 * copies, 4, 8, 8) for _ in range(5)]
    noise = torch.randn(2, 4, 8, 8)
    # Theirs draws for both branches, and keeps the first.
    for place, give in (
        (diffusers.schedulers.scheduling_ddpm, iter(draws)),
        (diffusers.pipelines.dit.pipeline_dit, iter([noise])),
    ):
        monkeypatch.setattr(place, "randn_tensor", lambda *_, give=give, **__: next(give))
    given = iter(draws)
    monkeypatch.setattr("reverie.samplers.diffusion.draw", lambda like, _: next(given)[: len(like)])
    expected = theirs(classes, guidance_scale=guidance, num_inference_steps=5, output_type="pt").images
    latents = ours.sample(
        torch.tensor(classes), noise, steps=5, guidance=guidance, sampler=ours.config.sampler
    )
    assert near((ours.decode(latents) + 1) / 2, expected)
    assert ours.config.steps == 50

    with pytest.raises(InputError, match="3, 517"):
        ours.generate_image(["crane"])
    named = ours.generate_image(["Tinca tinca", " toilet tissue"], steps=2, sampler="ddim")
    assert torch.equal(named, ours.generate_image([0, 999], steps=2, sampler="ddim"))

    reverie.save(ours, tmp_path / "ours", format="diffusers")
    again = diffusers.DiTPipeline.from_pretrained(tmp_path / "ours")
    for part in ("transformer", "vae"):
        state, back = getattr(theirs, part).state_dict(), getattr(again, part).state_dict()
        assert back.keys() == state.keys()
        assert all(torch.equal(back[name], state[name]) for name in state)
    changed = {k for k, v in theirs.scheduler.config.items() if again.scheduler.config.get(k) != v}
    assert not changed - {"_use_default_values", "_diffusers_version"}
    assert again.labels == theirs.labels
    assert reverie.load(tmp_path / "ours").config == ours.config


def test_embeddings_that_differ_between_blocks_are_refused():
    theirs = their_transformer()
    with torch.no_grad():
        theirs.transformer_blocks[2].norm1.emb.class_embedder.embedding_table.weight[4, 5] += 1e-3
    with pytest.raises(ModelFileError, match="copies of one tensor"):
        ours_from(theirs)


def test_what_diffusers_cannot_have_is_refused():
    with pytest.raises(InputError, match="waves"):
        dit_diffusers.write(asdict(DiffusionTransformerConfig(backbone=DitConfig())))
    with pytest.raises(ModelFileError, match="norm_type"):
        dit_diffusers.read({"config.json": {"norm_type": "layer_norm"}})
    for key, value in (("_class_name", "SanaTransformer2DModel"), ("attention_type", "gated"), ("bend", 1)):
        with pytest.raises(ModelFileError, match=key):
            dit_diffusers.read({"config.json": {key: value}})
