"""Our BLIP against transformers' at small random weights: equal numbers and equal words, in both directions."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import reverie
from reverie.codecs.pieces import Pieces
from reverie.errors import InputError
from reverie.samplers.autoregressive import beam, greedy

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.reference

CAPTIONS = ["a red rocket over a house", "a cat on a mat", "two yellow cats and a dog", "what is on the mat"]
PIECES = Pieces.train_words(CAPTIONS, vocab=60)
CLASSES = {
    "captions": transformers.BlipForConditionalGeneration,
    "retrieval": transformers.BlipForImageTextRetrieval,
    "answers": transformers.BlipForQuestionAnswering,
}


def their_model(kind, seed=0):
    same = kind == "answers"  # transformers can only read questions as wide as pictures
    text = {
        "vocab_size": PIECES.vocab, "hidden_size": 24, "intermediate_size": 61, "num_hidden_layers": 3,
        "num_attention_heads": 3, "max_position_embeddings": 24, "bos_token_id": 4, "eos_token_id": 3,
        "sep_token_id": 3, "pad_token_id": 0, "layer_norm_eps": 1e-6,
    }  # fmt: skip
    vision = {
        "hidden_size": 24 if same else 32, "intermediate_size": 96 if same else 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 32, "patch_size": 8,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = transformers.BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=16)
    model = CLASSES[kind](config).eval()
    with torch.no_grad():  # far from initialisation, where biases are zero and norms are the identity
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
    return model


@pytest.fixture(scope="module", params=CLASSES)
def pair(request, tmp_path_factory):
    """Their model and ours, loaded of the folder that theirs wrote; the folder; what it is for."""
    folder = tmp_path_factory.mktemp(request.param)
    theirs = their_model(request.param)
    theirs.save_pretrained(folder)
    size = {"height": 32, "width": 32}
    transformers.BlipImageProcessorPil(size=size).save_pretrained(folder)
    PIECES.write(folder / "tokenizer.json")
    return theirs, reverie.load(folder), folder, request.param


def inputs(ours, count=4):
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    tokens = PIECES.encode(CAPTIONS[:count])
    return images, ((images + 1) / 2 - mean) / std, tokens, (tokens != 0).long()


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def assert_equal_numbers(ours, theirs, kind):
    images, pixels, tokens, mask = inputs(ours)
    features = ours.see(images)
    assert_close(features, theirs.vision_model(pixels).last_hidden_state)
    grounded, begun = tokens.clone(), tokens.clone()
    grounded[:, 0], begun[:, 0] = ours.config.text.ground, ours.config.text.decode
    if kind == "captions":
        out = theirs(pixel_values=pixels, input_ids=begun, attention_mask=mask)
        real = mask.bool()
        assert_close(ours.writes(features, tokens)[real], out.logits[real])
    elif kind == "retrieval":
        cosines = theirs(
            input_ids=tokens, pixel_values=pixels, attention_mask=mask, use_itm_head=False
        ).itm_score
        assert_close(ours.embed_image(images) @ ours.embed_text(tokens).T, cosines)
        logits = theirs(input_ids=grounded, pixel_values=pixels, attention_mask=mask).itm_score
        assert_close(ours.matches(features, tokens), logits)
        assert_close(ours.match(images, tokens), logits.softmax(-1)[:, 1])
    else:
        asked, seen = ours._asked(tokens, features)
        hidden = theirs.text_encoder(
            input_ids=grounded, attention_mask=mask, encoder_hidden_states=theirs.vision_model(pixels)[0]
        ).last_hidden_state
        assert_close(asked[seen], hidden[seen])
        # Their decoder reads the padding of questions too: 5.23 drops the mask on its way to cross-attention.
        decoded = theirs.text_decoder(input_ids=begun[:, :3], encoder_hidden_states=hidden).logits
        assert_close(ours.answers.logits(begun[:, :3], context=hidden), decoded)
        alone = theirs.text_decoder(
            input_ids=begun[:1, :3], encoder_hidden_states=hidden[:1][:, seen[0]]
        ).logits
        assert_close(ours.answers.logits(begun[:1, :3], context=asked[:1], context_mask=seen[:1]), alone)


def test_their_folder_gives_their_numbers(pair):
    theirs, ours, _, kind = pair
    assert ours.config.text.heads == 3
    assert ours.config.text.eps == 1e-6
    assert ours.config.image.eps == 1e-5
    assert_equal_numbers(ours, theirs, kind)


def test_there_and_back_is_bit_equal(pair, tmp_path):
    theirs, ours, folder, kind = pair
    reverie.save(ours, tmp_path, format="transformers")
    before, after = (load_file(each / "model.safetensors") for each in (folder, tmp_path))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    again = reverie.load(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(value, ours.state_dict()[key]) for key, value in again.state_dict().items())
    assert_equal_numbers(ours, type(theirs).from_pretrained(tmp_path).eval(), kind)


def test_a_trained_temperature_comes_back(pair, tmp_path):
    _, ours, folder, kind = pair
    if kind != "retrieval":
        return
    ours = reverie.load(folder)
    ours.temperature.fill_(0.0123)
    reverie.save(ours, tmp_path, format="transformers")
    assert torch.equal(reverie.load(tmp_path).temperature, ours.temperature)


def test_pictures_are_prepared_as_theirs(pair):
    _, ours, folder, _ = pair
    draw = np.random.default_rng(0)
    pictures = [
        Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for height, width in ((70, 50), (32, 32), (9, 300), (31, 33))
    ]
    theirs = transformers.BlipImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    mean, std = (torch.tensor(each).reshape(3, 1, 1) for each in (ours.config.mean, ours.config.std))
    found = ((ours.prepare(pictures) + 1) / 2 - mean) / std
    assert (found - theirs["pixel_values"]).abs().max() < 1e-5


def cut(rows, end):
    """What transformers gives, without the padding behind the end."""
    rows = [row.tolist() for row in rows]
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


@pytest.fixture(scope="module")
def writing():
    """Several captioning models, so that searches end early, late and never, and their prompts."""
    found = []
    for seed in range(3):
        theirs = their_model("captions", seed)
        with torch.no_grad():
            theirs.text_decoder.cls.predictions.bias[3] += (0.0, 2.0, 3.5)[seed]  # how soon texts end
        found.append(theirs)
    return found


# Of new tokens least and most, the length penalty, the penalty of repetition: two for each model.
WAYS = (
    ((0, 12, 1.0, 1.0), (4, 9, 2.0, 1.0)),
    ((0, 12, 0.0, 1.0), (0, 12, 1.0, 1.5)),
    ((0, 12, -1.0, 1.0), (3, 3, 1.0, 1.0)),
)


@pytest.mark.parametrize("beams", [1, 2, 3, 4, 5])
def test_the_words_are_theirs(writing, beams, tmp_path):
    """Token for token, for every start, length and penalty."""
    lengths = set()
    for seed, theirs in enumerate(writing):
        theirs.save_pretrained(tmp_path / str(seed))
        transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(
            tmp_path / str(seed)
        )
        ours = reverie.load(tmp_path / str(seed))
        images, pixels, _, _ = inputs(ours)
        for least, most, length_penalty, repetition in WAYS[seed]:
            start = PIECES.encode(["a red cat"] * 4 if seed else [""] * 4)
            theirs_ids = theirs.generate(
                pixel_values=pixels, input_ids=start.clone(), num_beams=beams, do_sample=False, max_new_tokens=most,
                min_new_tokens=least, length_penalty=length_penalty, repetition_penalty=repetition,
            )  # fmt: skip
            begun = start[:, :-1].clone()
            begun[:, 0] = 4
            how = {"end": 3, "most": most, "least": least, "repetition": repetition}
            if beams > 1:
                how |= {"beams": beams, "length_penalty": length_penalty}
            decoder = ours.text.writer(ours.see(images), most=most + begun.shape[1])
            rows = (beam if beams > 1 else greedy)(decoder, begun, **how)
            assert rows == cut(theirs_ids[:, begun.shape[1] :], 3)
            lengths |= set(map(len, rows))
    assert {1, 12} <= lengths  # some ended at once, some never


def test_answers_are_theirs(tmp_path):
    theirs = their_model("answers", 4)
    theirs.save_pretrained(tmp_path)
    transformers.BlipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    PIECES.write(tmp_path / "tokenizer.json")
    ours = reverie.load(tmp_path)
    images, pixels, _, _ = inputs(ours)
    for i, question in enumerate(CAPTIONS):  # one by one: transformers reads the padding of questions
        tokens = PIECES.encode([question])
        tokens[:, 0] = ours.config.text.ground
        ids = theirs.generate(
            input_ids=tokens, pixel_values=pixels[i : i + 1], num_beams=3, do_sample=False, max_new_tokens=9
        )
        assert ours.answer(images[i : i + 1], [question]) == PIECES.decode(ids[:, 1:])
    assert ours.answer(images, CAPTIONS) == [
        ours.answer(images[i : i + 1], [question])[0] for i, question in enumerate(CAPTIONS)
    ]


def test_what_transformers_has_no_words_for(pair, tmp_path):
    from dataclasses import replace

    from reverie.systems.blip import Blip
    from reverie.systems.blip_tasks import BlipNlvr, BlipNlvrConfig

    _, ours, _, kind = pair
    if kind != "retrieval":
        return
    both = Blip(replace(ours.config, text=replace(ours.config.text, writes=True)))
    with pytest.raises(InputError, match="one network that understands and writes"):
        reverie.save(both, tmp_path / "both", format="transformers")
    pairs = BlipNlvr(BlipNlvrConfig(image=ours.config.image, text=ours.config.text))
    with pytest.raises(InputError, match="blip-nlvr"):
        reverie.save(pairs, tmp_path / "pairs", format="transformers")
