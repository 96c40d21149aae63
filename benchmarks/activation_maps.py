"""GradCAM of ten classes at three layers, in one call."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

import tdhook
from tdhook.attribution.activation_maps import grad_cam

from .case import Case, Competitor, Goal, Options
from .networks import images, network

TITLE = "GradCAM of ten classes at three layers"
INTRODUCTION = """\
ResNet-20 (GELU, random weights, images of 3 × 32 × 32), the last block of each of its three stages, ReLU on. Ours is
one call; captum's `LayerGradCam` is called once per class and layer, as documented. In `from the first site on` every
class costs one backward pass for the three layers together; captum's 30 calls each run the model forward, too."""

LAYERS = ("blocks.2", "blocks.5", "blocks.8")
CAPTUM = "captum, one call per class and layer"


def cases(options: Options) -> Iterator[Case]:
    for classes in (10,) if options.quick else (1, 10):
        for batch in (1,) if options.quick else (1, 16):
            yield Case(
                f"{classes} class{'es' * (classes > 1)}, three layers, batch {batch}",
                {"classes": classes, "layers": len(LAYERS), "batch": batch},
                partial(_competitors, classes, batch),
                goals=(Goal("ours", CAPTUM, 1.0),),
                memory=not options.quick and classes == 10,
                seconds=3 if options.quick else 20,
            )


def _competitors(classes: int, batch: int) -> list[Competitor]:
    from captum.attr import LayerGradCam

    model, x = network("CNN", 1000), images(batch)
    f, params = tdhook.functionalize(model)
    targets = list(range(0, 1000, 1000 // classes))
    methods = [LayerGradCam(model, model.get_submodule(layer)) for layer in LAYERS]

    def ours(chunk_size: int | None) -> list[Tensor]:
        maps = grad_cam(f, params, x, at=list(LAYERS), targets=targets, chunk_size=chunk_size)
        return [maps[layer] for layer in LAYERS]

    def captum() -> list[Tensor]:
        """[T, B, H, W] per layer; captum's maps have an axis for one channel."""
        return [
            torch.stack([method.attribute(x, target=t, relu_attributions=True)[:, 0] for t in targets]) for method in methods
        ]

    return [Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in (None, 4)}), Competitor(CAPTUM, {"": captum})]
