"""How near each sampler comes to the exact solution, by evaluations of the network: `python benchmarks/samplers.py`.

The exact one is Heun's method in 200 steps from the same noise. Prints, for each sampler and number of evaluations, the
root mean square of the difference of pixels in [-1, 1]. Samplers that draw noise have no such solution: left out.
"""

from __future__ import annotations

import argparse

import torch

import reverie

PROMPTS = [
    "a red rocket",
    "a smiling cat",
    "a slice of pizza",
    "a blue car",
    "a green leaf",
    "a heart",
    "a dog",
    "snow",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument(
        "--model", default="sora-stickers", help="a shipped name, or a folder that a run wrote"
    )
    parser.add_argument("--evaluations", type=int, nargs="+", default=[6, 12, 24, 48])
    parser.add_argument("--guidance", type=float, help="the model's own if not given")
    asked = parser.parse_args()
    sora = reverie.load(asked.model)
    options = {"seed": 1, "guidance": asked.guidance, "together": True}
    exact = sora.generate_image(PROMPTS, sampler="heun", steps=200, **options)
    print("evaluations", *asked.evaluations, sep="\t")
    for sampler in ("euler", "heun", "dpmpp_2m", "unipc"):
        row = []
        for evaluations in asked.evaluations:
            steps = (evaluations + 1) // 2 if sampler == "heun" else evaluations
            drawn = sora.generate_image(PROMPTS, sampler=sampler, steps=steps, **options)
            row.append(torch.mean((drawn - exact) ** 2).sqrt().item())
        print(sampler, *(f"{each:.4f}" for each in row), sep="\t", flush=True)


if __name__ == "__main__":
    main()
