"""Feature ablation, occlusion, sampled Shapley values and KernelSHAP, on a table and on images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

import tdhook
from tdhook.attribution.ablation import feature_ablation
from tdhook.attribution.kernel_shap import kernel_shap
from tdhook.attribution.occlusion import occlusion
from tdhook.attribution.shapley import shapley_value_sampling, shapley_values

from .captum_loops import EACH, loop
from .case import Case, Competitor, Goal, Options
from .networks import SmoothMLP, images, network, parts

TITLE = "Perturbation methods"
INTRODUCTION = """\
Table: an MLP (four layers of 256 units, GELU) on 12 features. Images: ResNet-20 on 3 × 32 × 32, pixels in 12 groups (3 × 4
rectangles); occlusion by windows of 3 × 8 × 8 with stride 4. Random weights, zero baseline. Captum takes the fastest of
several `perturbations_per_eval`, ours the fastest of several `chunk_size`. `captum, one call per target` is what its
documentation says; with several targets ablation, occlusion and Shapley sampling can also return all outputs of a model that has ten (in no
docstring), which is the fairer competitor and the one that the goals name. KernelSHAP cannot.

The same number of orders (24) and of coalitions (512) is sampled. The samples themselves differ, and captum's are drawn anew
for every target, so here agreement means: near the exact Shapley values of 2¹² coalitions, within five standard errors of
ours at every feature; and captum within what its sampling allows (root mean square error below a fifth of that of the values). Both errors
are in the claims. Ours also returns the standard error."""

ORDERS, COALITIONS, GROUPS = 24, 512, 12
ALL = "captum, all outputs in one call"
METHODS = ("ablation", "occlusion", "Shapley sampling", "KernelSHAP")


def cases(options: Options) -> Iterator[Case]:
    for method in METHODS:
        for kind in ("table", "images"):
            if method == "occlusion" and kind == "table":
                continue
            for count in (10,) if options.quick else (1, 10):
                yield _case(method, kind, count, options)


def _case(method: str, kind: str, count: int, options: Options) -> Case:
    batch = (4 if options.quick else 64) if kind == "table" else (1 if options.quick else 8)
    if method == "KernelSHAP" and not options.quick:
        batch = 16 if kind == "table" else 2  # captum fits one example after the other
    work = Work(method, kind, batch, count)
    sampled = method in ("Shapley sampling", "KernelSHAP")
    against = ALL if count > 1 and method != "KernelSHAP" else EACH
    return Case(
        f"{method}, {kind}, {count} target{'s' * (count > 1)}",
        {"method": method, "batch": batch, "targets": count, **({"samples": work.samples} if sampled else {})},
        partial(_competitors, work, options),
        tolerance=1.0 if sampled else 1e-3,  # sampled ones are checked by the claims
        goals=(Goal("ours", against, 1.0),),
        claims=_claims(work) if sampled else {},
        memory=not options.quick and kind == "images" and count == 10,
        seconds=2 if options.quick else 20,
    )


@dataclass(frozen=True)
class Work:
    """What is explained; the model is made when it is asked for."""

    method: str
    kind: str
    batch: int
    count: int

    @property
    def samples(self) -> int:
        return ORDERS if self.method == "Shapley sampling" else COALITIONS

    @property
    def targets(self) -> list[int]:
        return list(range(self.count))

    @cached_property
    def model(self) -> nn.Module:
        if self.kind == "images":
            return network("CNN", 10).requires_grad_(False)
        torch.manual_seed(0)
        return SmoothMLP(GROUPS, 10).eval().requires_grad_(False)

    @cached_property
    def x(self) -> Tensor:
        return images(self.batch) if self.kind == "images" else torch.randn(self.batch, GROUPS)

    @cached_property
    def groups(self) -> Tensor | None:
        """Ids of the pixels, [1, H, W]; None for the table."""
        return parts(self.x.shape[-2:], 3, 4)[None] if self.kind == "images" else None

    def ours(self, chunk_size: int | None) -> Any:
        """[T, B, *features], or an `Estimate` of that."""
        f, params = tdhook.functionalize(self.model)
        options: dict[str, Any] = {"targets": self.targets, "chunk_size": chunk_size}
        if self.method == "occlusion":
            return occlusion(f, params, self.x, window=(3, 8, 8), stride=(3, 4, 4), **options)
        if self.method == "ablation":
            return feature_ablation(f, params, self.x, groups=self.groups, **options)
        sample = shapley_value_sampling if self.method == "Shapley sampling" else kernel_shap
        generator = torch.Generator().manual_seed(0)
        return sample(f, params, self.x, groups=self.groups, samples=self.samples, generator=generator, **options)

    def exact(self) -> Tensor:
        f, params = tdhook.functionalize(self.model)
        return shapley_values(f, params, self.x, targets=self.targets, groups=self.groups, chunk_size=64)

    def captum(self, model: Callable, target: int | None, at_once: int) -> Tensor:
        from captum.attr import FeatureAblation, KernelShap, Occlusion, ShapleyValueSampling

        method: Any = {
            "ablation": FeatureAblation,
            "occlusion": Occlusion,
            "Shapley sampling": ShapleyValueSampling,
            "KernelSHAP": KernelShap,
        }[self.method](model)
        options: dict[str, Any] = {"target": target, "perturbations_per_eval": at_once}
        if self.method == "occlusion":
            options |= {"sliding_window_shapes": (3, 8, 8), "strides": (3, 4, 4)}
        elif self.groups is not None:
            options["feature_mask"] = self.groups[None].expand(1, *self.x.shape[1:])
        if self.method in ("Shapley sampling", "KernelSHAP"):
            options["n_samples"] = self.samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # KernelShap recommends single examples, and sees to them one by one
            return method.attribute(self.x, **options)


def _competitors(work: Work, options: Options) -> list[Competitor]:
    chunks: Sequence[int | None] = (8, None) if work.kind == "table" else (8,)
    at_once: Sequence[int] = (1, 12)
    if not options.quick:
        chunks, at_once = ((None, 64, 16) if work.kind == "table" else (32, 8, 2)), (1, 4, 12, 64)

    def ours(chunk_size: int | None) -> Tensor:
        result = work.ours(chunk_size)
        return result if isinstance(result, Tensor) else result.value

    def each(n: int) -> Tensor:
        return loop(lambda target: work.captum(work.model, target, n), work.targets)

    def together(n: int) -> Tensor:
        return work.captum(work.model, None, n).movedim(1, 0)  # [B, T, *features]

    sizes = [n for n in at_once if work.method in ("KernelSHAP", "occlusion") or n <= GROUPS]
    found = [
        Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in chunks}),
        Competitor(EACH, {f"perturbations_per_eval={n}": partial(each, n) for n in sizes}),
    ]
    if work.count > 1 and work.method != "KernelSHAP":
        note = "of a model with ten outputs, without a target; it works, but no docstring says so"
        found.append(Competitor(ALL, {f"perturbations_per_eval={n}": partial(together, n) for n in sizes}, note=note))
    return found


def _claims(work: Work) -> dict[str, Callable[[], bool]]:
    def ours() -> bool:
        estimate = work.ours(16)
        off = (estimate.value - work.exact()).abs()
        return bool((off <= 5 * estimate.standard_error + 1e-4 * estimate.value.abs().max()).all())

    def captum() -> bool:
        exact = work.exact()
        theirs = loop(lambda target: work.captum(work.model, target, GROUPS), work.targets)
        return bool((theirs - exact).square().mean() <= 0.04 * exact.square().mean())

    return {
        "ours is within five standard errors of the exact Shapley values": ours,
        "captum's root mean square error is below a fifth of the exact values'": captum,
    }
