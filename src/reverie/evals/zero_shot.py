"""Zero-shot classification: name a picture with the class whose sentences are nearest.

Paper: Radford et al. 2021, CLIP (2103.00020), section 3.1: the embedding of a class is the mean of the unit
embeddings of its name in every template, brought back to unit length. A template is a sentence with `{}`.
The evaluator is given two functions, `embed_image(batch of images) -> b d` and `embed_text(list of str) -> b d`;
`named` measures any classifier, given `predict(batch of images) -> b k`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from reverie.errors import InputError
from reverie.evals.interval import bootstrap


class Slices(Protocol):
    """Anything that slices: a tensor, a list of paths, pictures that are decoded when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice, /) -> Any: ...


@torch.no_grad()
def class_embeddings(
    embed_text: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str],
    *,
    batch: int = 256,
) -> Tensor:
    """Unit embeddings `k d` of the classes called `names`, each the mean over `templates`."""
    if isinstance(templates, str) or not templates:
        raise InputError(f"templates {templates!r} is not a list of sentences: give at least ['{{}}']")
    for template in templates:
        if template.count("{}") != 1:
            raise InputError(f"the template {template!r} must contain {{}} once, where the name goes")
    if isinstance(names, str) or not names:
        raise InputError(f"names {names!r} is not a list of class names: give at least one")
    if len(set(names)) < len(names):
        twice = next(name for name in names if list(names).count(name) > 1)
        raise InputError(
            f"the class name {twice!r} occurs twice: make these one class, nothing tells them apart"
        )
    texts = [template.replace("{}", name) for name in names for template in templates]
    embedding = torch.cat([embed_text(texts[i : i + batch]) for i in range(0, len(texts), batch)])
    per_class = rearrange(F.normalize(embedding.float(), dim=-1), "(k t) d -> k t d", t=len(templates))
    return F.normalize(reduce(per_class, "k t d -> k d", "mean"), dim=-1)


@torch.no_grad()
def zero_shot(
    embed_image: Callable[[Any], Tensor],
    embed_text: Callable[[list[str]], Tensor],
    images: Slices,
    labels: Tensor | Sequence[int],
    names: Sequence[str],
    templates: Sequence[str] = ("{}",),
    *,
    batch: int = 256,
) -> dict[str, Any]:
    """Share of `images` (n of them) whose class `labels[i]` (index into `names`) comes first.

    Returns JSON-ready `top1`, `top5`, their 95 % bootstrap intervals `top1_interval`, `top5_interval`, `mean_class`
    (top-1 averaged over classes), `per_class` (name -> top-1, for classes with images), `images`, `ways` (number of
    classes) and `predicted` (n indices). A class that ties with the right one counts as before it.
    """
    classes = class_embeddings(embed_text, names, templates, batch=batch)

    def predict(some: Any) -> Tensor:
        embedding = F.normalize(embed_image(some).float(), dim=-1)
        return embedding @ classes.to(embedding.device).T

    return named(predict, images, labels, names, batch=batch)


@torch.no_grad()
def named(
    predict: Callable[[Any], Tensor],
    images: Slices,
    labels: Tensor | Sequence[int],
    names: Sequence[str],
    *,
    batch: int = 256,
) -> dict[str, Any]:
    """As `zero_shot`, of whatever gives scores: `predict(batch of images) -> b k`, higher is likelier."""
    targets = torch.as_tensor(labels, dtype=torch.long, device="cpu")
    if targets.shape != (len(images),) or not len(images):
        raise InputError(
            f"{len(images)} images, labels of shape {list(targets.shape)}: give each image one label"
        )
    if targets.min() < 0 or targets.max() >= len(names):
        wrong = int(targets[(targets < 0) | (targets >= len(names))][0])
        raise InputError(f"label {wrong} is none of the {len(names)} classes: labels are indices into names")
    ranks, predicted = [], []
    for i in range(0, len(images), batch):
        scores = predict(images[i : i + batch]).cpu()
        if not scores.isfinite().all():
            raise InputError(
                f"some scores of images {i} to {i + len(scores) - 1} are not finite: the model is"
                " broken, or was trained with too high a learning rate"
            )
        right = scores.gather(1, targets[i : i + batch, None])
        ranks.append((scores >= right).sum(dim=1) - 1)
        predicted.append(scores.argmax(dim=1))
    rank = torch.cat(ranks)
    top1, top5 = (rank < 1).double(), (rank < 5).double()
    count = torch.bincount(targets, minlength=len(names))
    per_class = torch.bincount(targets, weights=top1, minlength=len(names)) / count
    seen = count > 0
    return {
        "top1": top1.mean().item(),
        "top1_interval": bootstrap(top1),
        "top5": top5.mean().item(),
        "top5_interval": bootstrap(top5),
        "mean_class": per_class[seen].mean().item(),
        "per_class": {names[k]: per_class[k].item() for k in seen.nonzero().flatten().tolist()},
        "images": len(images),
        "ways": len(names),
        "predicted": torch.cat(predicted).tolist(),
    }
