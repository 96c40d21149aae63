"""Presets of propagation rules on a residual network, against zennit and the plain gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

import tdhook
from tdhook.attribution import lrp, rules
from tests.attribution.rules.oracle import INSTALLED, zennit

from .case import Case, Competitor, Goal, Options
from .lrp import PLAIN, ZENNIT, _nothing, _plain, _unlike
from .networks import Residual, images, network

TITLE = "Layer-wise relevance propagation of a ResNet"
INTRODUCTION = """\
ResNet-20 (ReLU, random weights, images of 3 × 32 × 32), batch norms merged into convolutions beforehand, for all. Ours
runs the network as it is. For zennit, which attaches rules to modules, its blocks are rewritten with zennit's `Sum` and
its pooling as a module: as it is, its additions would double the relevance at every block, in silence. The relevance of
the class is its logit. `plain gradient` is autograd's gradient times the input, a bound and another number."""

PRESETS = {
    "epsilon_plus": (rules.epsilon_plus, "EpsilonPlus"),
    "epsilon_alpha2_beta1": (rules.epsilon_alpha2_beta1, "EpsilonAlpha2Beta1"),
}


def cases(options: Options) -> Iterator[Case]:
    for preset in list(PRESETS)[: 1 if options.quick else 2]:
        for classes, batch in [(1, 2)] if options.quick else [(1, 1), (1, 16), (10, 1), (10, 16)]:
            yield Case(
                f"{preset}, {classes} class{'es' * (classes > 1)}, batch {batch}",
                {"preset": preset, "classes": classes, "batch": batch},
                partial(_competitors, preset, list(range(0, 1000, 1000 // classes)), batch, options),
                tolerance=2e-2,  # rounding in denominators next to zero
                claims={"agrees with zennit to 1e-8 in double precision": partial(_agree, preset)} if INSTALLED else {},
                goals=(Goal("ours", ZENNIT, 1.0),),
                memory=not options.quick and batch == 16,
                seconds=4 if options.quick else 20,
            )


def _competitors(preset: str, targets: Sequence[int], batch: int, options: Options) -> list[Competitor]:
    torch.compiler.reset()
    model, x = merged(), images(batch)
    f, params = tdhook.functionalize(model)
    ours = partial(_ours, preset, f, params, x, targets)
    found = [Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in ((None, 4) if len(targets) > 4 else (None,))})]
    if not options.quick:
        compiled = torch.compile(_ours, fullgraph=True, dynamic=False)
        found.append(Competitor("ours, compiled", {"": lambda: compiled(preset, f, params, x, targets, None)}))
    found.append(Competitor(PLAIN, {"": _unlike(_plain(model, x, targets))}, view=_nothing, note="another number; a bound"))
    if INSTALLED:
        found.append(Competitor(ZENNIT, {"": _zennit(preset, model, x, targets)}))
    return found


def _ours(preset: str, f: Any, params: Any, x: Tensor, targets: Sequence[int], chunk_size: int | None) -> Tensor:
    return lrp(f, params, x, rules=PRESETS[preset][0](), targets=list(targets), chunk_size=chunk_size)


@cache
def merged() -> nn.Module:
    """ResNet-20 whose batch norms are in its convolutions."""
    model = network("CNN", 1000, activation=nn.ReLU)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.bias = nn.Parameter(torch.zeros(module.out_channels))
    f, params = tdhook.functionalize(model)
    flat = rules.merge_batch_norm(f, params, images(1)).flatten_keys(".")
    model.load_state_dict(dict(flat.items()), strict=False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.Identity())
    return model


def _zennit(preset: str, model: nn.Module, x: Tensor, targets: Sequence[int]) -> Callable[[], Tensor]:
    """One forward, and a backward for each target, of the network in modules that zennit has rules for."""
    hooked = copy.deepcopy(model)
    hooked.blocks = nn.Sequential(*(_SummedBlock(block) for block in hooked.blocks))
    whole = nn.Sequential(hooked.stem, hooked.blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), hooked.head)
    # Sums and means need no stabilizer; with its own 1e-6 zennit's numbers differ by 1e-4 of the largest.
    sums = [(kind, zennit().rules.Norm(1e-15)) for kind in (zennit().layer.Sum, nn.AdaptiveAvgPool2d)]
    getattr(zennit().composites, PRESETS[preset][1])(layer_map=sums).register(whole)

    def run() -> Tensor:
        given = x.clone().requires_grad_()
        output = whole(given)
        rows = []
        for t in targets:
            start = torch.zeros_like(output)
            start[:, t] = output[:, t].detach()
            rows.append(torch.autograd.grad(output, given, start, retain_graph=t != targets[-1])[0])
        return torch.stack(rows)

    return run


class _SummedBlock(nn.Module):
    """A residual block whose addition and activations are modules of their own."""

    def __init__(self, block: Residual):
        super().__init__()
        self.conv1, self.conv2, self.shortcut = block.conv1, block.conv2, block.shortcut
        self.before, self.after, self.sum = nn.ReLU(), nn.ReLU(), zennit().layer.Sum()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv2(self.before(self.conv1(x)))
        return self.after(self.sum(torch.stack([inner, self.shortcut(x)], -1)))


def _agree(preset: str) -> bool:
    """Whether ours and zennit's numbers are the same in double precision."""
    model, x = copy.deepcopy(merged()).double(), images(2).double()
    theirs = _zennit(preset, model, x, [3])()
    ours = _ours(preset, *tdhook.functionalize(model), x, [3], None)
    return bool((ours - theirs).abs().max() <= 1e-8 * theirs.abs().max())
