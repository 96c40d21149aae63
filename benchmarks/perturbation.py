"""Feature ablation, occlusion, sampled Shapley values and KernelSHAP, on a table and on images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from tdhook.attribution.ablation import feature_ablation
from tdhook.attribution.kernel_shap import kernel_shap
from tdhook.attribution.occlusion import occlusion
from tdhook.attribution.shapley import shapley_value_sampling, shapley_values

from .captum_loops import EACH, loop
from .case import Case, Competitor, Goal, Options
from .networks import SmoothMLP, functional, images, network, parts

TITLE = "Perturbation methods"
INTRODUCTION = """\
Table: an MLP (four layers of 256 units, GELU) on 12 features. Images: ResNet-20 on 3 × 32 × 32, pixels in 12 groups (3 ×
4 rectangles); occlusion by windows of 3 × 8 × 8 with stride 4. Random weights, zero baseline. Captum takes the fastest
of several `perturbations_per_eval`, ours the fastest of several `chunk_size`. `captum, one call per target` is what its
documentation says. Except for KernelSHAP, captum can also return all outputs of a model that has several, which no
docstring says; with ten targets that is the fairer competitor, and the goal is against it.

24 orders and 512 coalitions are sampled by both. The samples differ, and captum's are drawn anew for every target, so
agreement here means (see the claims) that ours is within five of its standard errors of the exact Shapley values of all
2¹² coalitions at every feature, and that captum's root mean square error is below a fifth of the values. Ours also
returns the standard error."""

ORDERS, COALITIONS, GROUPS = 24, 512, 12
# `perturbations_per_eval`: not more than there are perturbations, and not so few that a call takes minutes
AT_ONCE = {"occlusion": (1, 12, 49), "Shapley sampling": (4, 12), "KernelSHAP": (12, 64)}
ALL = "captum, all outputs in one call"
SAMPLED = ("Shapley sampling", "KernelSHAP")
METHODS = ("ablation", "occlusion", *SAMPLED)


def cases(options: Options) -> Iterator[Case]:
    for method in METHODS:
        for kind in ("table", "images"):
            if method == "occlusion" and kind == "table":
                continue
            for count in (2 if method in SAMPLED else 10,) if options.quick else (1, 10):
                yield _case(method, kind, count, options)


def _case(method: str, kind: str, count: int, options: Options) -> Case:
    batch = (4 if options.quick else 64) if kind == "table" else (1 if options.quick else 8)
    if method == "KernelSHAP":
        batch = (
            (1 if options.quick else 16) if kind == "table" else (1 if options.quick else 2)
        )  # captum fits one example after the other
    work = Work(method, kind, batch, count)
    sampled = method in SAMPLED
    against = ALL if count > 1 and method != "KernelSHAP" else EACH
    return Case(
        f"{method}, {kind}, {count} target{'s' * (count > 1)}",
        {"method": method, "batch": batch, "targets": count, **({"samples": work.samples} if sampled else {})},
        partial(_competitors, work, options),
        tolerance=1.0 if sampled else 1e-3,  # sampled ones are checked by the claims
        goals=(Goal("ours", against, 1.0),),
        claims=_claims(work) if sampled and not (options.quick and kind == "images") else {},
        memory=not options.quick and kind == "images" and count == 10,
        seconds=2 if options.quick else 20,
        skipped=_missing() if method == "KernelSHAP" else "",
    )


def _missing() -> str:
    return "" if find_spec("sklearn") else "captum's KernelShap needs scikit-learn, which is not installed"


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

    def painted(self, scores: Tensor) -> Tensor:
        """What captum returns [T, B, *features], from what ours does: [T, B, G] where there are groups of pixels."""
        if self.groups is None or self.method == "occlusion":
            return scores
        return scores[..., self.groups].expand(*scores.shape[:2], *self.x.shape[1:])

    def ours(self, chunk_size: int | None) -> Any:
        """[T, B, *features] or [T, B, G], or an `Estimate` of that."""
        f, params = functional(self.model)
        options: dict[str, Any] = {"targets": self.targets, "chunk_size": chunk_size}
        if self.method == "occlusion":
            return occlusion(f, params, self.x, window=(3, 8, 8), stride=(3, 4, 4), **options)
        if self.method == "ablation":
            return feature_ablation(f, params, self.x, groups=self.groups, **options)
        sample = shapley_value_sampling if self.method == "Shapley sampling" else kernel_shap
        generator = torch.Generator().manual_seed(0)
        return sample(f, params, self.x, groups=self.groups, samples=self.samples, generator=generator, **options)

    @cached_property
    def exact(self) -> Tensor:
        f, params = functional(self.model)
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
            options["feature_mask"] = self.groups.expand(1, *self.x.shape[1:]).contiguous()
        if self.method in SAMPLED:
            options["n_samples"] = self.samples
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # KernelShap recommends single examples, and sees to them one by one
            return method.attribute(self.x, **options)


def _competitors(work: Work, options: Options) -> list[Competitor]:
    chunks: Sequence[int | None] = (8, None) if work.kind == "table" else (12, 4)
    at_once: Sequence[int] = (12,)
    if not options.quick:
        chunks, at_once = ((None, 64, 16) if work.kind == "table" else (32, 8, 2)), AT_ONCE.get(work.method, (1, 4, 12))

    def ours(chunk_size: int | None) -> Tensor:
        result = work.ours(chunk_size)
        return result if isinstance(result, Tensor) else result.value

    def each(n: int) -> Tensor:
        return loop(lambda target: work.captum(work.model, target, n), work.targets)

    def chosen(x: Tensor) -> Tensor:
        return work.model(x)[:, : work.count]

    def together(n: int) -> Tensor:
        # [B * T, *features] of ablation, [B, T, *features] of Shapley sampling
        return work.captum(chosen, None, n).reshape(work.batch, work.count, *work.x.shape[1:]).movedim(1, 0)

    found = [
        Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in chunks}),
        Competitor(EACH, {f"perturbations_per_eval={n}": partial(each, n) for n in at_once}, work.painted),
    ]
    if work.count > 1 and work.method != "KernelSHAP":
        note = "of a model with ten outputs, without a target; it works, but no docstring says so"
        found.append(
            Competitor(ALL, {f"perturbations_per_eval={n}": partial(together, n) for n in at_once}, work.painted, note=note)
        )
    return found


def _claims(work: Work) -> dict[str, Callable[[], bool]]:
    def ours() -> bool:
        estimate = work.ours(16)
        off = (estimate.value - work.exact).abs()
        return bool((off <= 5 * estimate.standard_error + 1e-4 * estimate.value.abs().max()).all())

    def captum() -> bool:
        exact = work.painted(work.exact)
        theirs = loop(lambda target: work.captum(work.model, target, GROUPS), work.targets)
        return bool((theirs - exact).square().mean() <= 0.04 * exact.square().mean())

    return {
        "ours is within five standard errors of the exact Shapley values": ours,
        "captum's root mean square error is below a fifth of the exact values'": captum,
    }
