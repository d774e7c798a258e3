"""DALL-E's discrete autoencoder <- the names of OpenAI's encoder and decoder, in one file under `encoder.`, `decoder.`.

https://github.com/openai/DALL-E/blob/master/dall_e/encoder.py

They publish two pickled modules, encoder.pkl and decoder.pkl: `reverie convert FOLDER dvae.safetensors` makes one file
of the folder that holds both, of which no code is run.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from reverie.weights.files import Entry, ModelFileError
from reverie.weights.layout import Foreign
from reverie.weights.remap import Rule

KINDS = (("w", "weight"), ("b", "bias"))


def is_theirs(entries: Collection[str]) -> bool:
    return "encoder.blocks.input.w" in entries


def read_alone(entries: Mapping[str, Entry], config: Mapping[str, Any] | None, *, what: str) -> Foreign:
    """From the file's header: the shapes say everything."""

    def count(start: str) -> int:
        number = 0
        while any(name.startswith(f"{start}_{number + 1}.") for name in entries):
            number += 1
        return number

    try:
        values = {
            "vocab": entries["encoder.blocks.output.conv.w"].shape[0],
            "width": entries["encoder.blocks.input.w"].shape[0],
            "groups": count("encoder.blocks.group"),
            "depth": count("encoder.blocks.group_1.block"),
            "begin": entries["decoder.blocks.input.w"].shape[0],
        }
    except (KeyError, IndexError):
        raise ModelFileError(
            f"{what} lacks parts of DALL-E's encoder or decoder: convert the folder that holds both."
        ) from None
    table_of = table(values["groups"], values["depth"])
    return Foreign(system="dvae", values=dict(config) if config else values, table=table_of)


def table(groups: int, depth: int) -> tuple[Rule, ...]:
    """Their names -> ours; they count from 1."""
    rules = []
    for side in ("encoder", "decoder"):
        for theirs, ours in KINDS:
            rules += [
                Rule(f"{side}.blocks.input.{theirs}", f"{side}.stem.{ours}"),
                Rule(f"{side}.blocks.output.conv.{theirs}", f"{side}.out.{ours}"),
            ]
            for i in range(groups):
                for j in range(depth):
                    block, mine = f"{side}.blocks.group_{i + 1}.block_{j + 1}", f"{side}.groups.{i}.{j}"
                    rules += [
                        Rule(f"{block}.id_path.{theirs}", f"{mine}.skip.{ours}"),
                        *(
                            Rule(f"{block}.res_path.conv_{k + 1}.{theirs}", f"{mine}.convs.{k}.{ours}")
                            for k in range(4)
                        ),
                    ]
    return tuple(rules)
