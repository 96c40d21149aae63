"""TracIn: the influence of training examples on test examples over checkpoints."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from tdhook.weights.influence import self_influence, tracin

from .case import Case, Competitor, Goal, Options
from .networks import functional, images, small_cnn

TITLE = "TracIn and self-influence"
INTRODUCTION = """\
A CNN of three convolutions and two linear layers (390,410 parameters, images of 28 × 28), three checkpoints that lie in
memory. `last layer` is what captum's `TracInCPFast` is made for: the gradients of the weight of one linear layer, without
its bias, as products of its inputs and of the gradients at its outputs; ours is `select="linear2.weight"`. `all
layers` is `TracInCP`. Ours and captum each take the fastest of a few chunk or batch sizes. With
`projection=4096` ours hashes gradients to 4,096 numbers as soon as they are there, which is an estimate; that its
correlation with the exact influence exceeds 0.9 is checked."""

CAPTUM = {True: "captum, TracInCPFast", False: "captum, TracInCP, in hooks"}
PLAIN = "captum, TracInCP, a backward pass for each"
RATE = 0.1
Data = tuple[Tensor, Tensor]


def cases(options: Options) -> Iterator[Case]:
    train, test = (32, 4) if options.quick else (512, 32)
    for last in (True, False):
        layers = "last layer" if last else "all layers"
        rivals = [CAPTUM[last]] if last else [CAPTUM[last], PLAIN]
        for own in (False, True):
            yield Case(
                f"self-influence of {train}, {layers}" if own else f"{test} test on {train} training examples, {layers}",
                {"train": train, "test": 0 if own else test, "checkpoints": 3, "last_layer": last},
                partial(_competitors, train, test, last, own),
                goals=[Goal("ours", rival, 1.0) for rival in rivals],
                claims={}
                if own or last
                else {"projected to 4,096 numbers: correlation above 0.9": partial(_close, train, test)},
                memory=not options.quick,
                seconds=3 if options.quick else 30,
            )


def _data(count: int, seed: int) -> Data:
    """Images in which a class can be seen, so that gradients of one class resemble each other."""
    labels = torch.arange(count) % 10
    patterns = images(10, 1, 28)
    noise = torch.randn(count, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
    return patterns[labels] + noise, labels


def _checkpoints(model: nn.Module) -> list[Any]:
    """The parameters at three moments of a short training, which leaves the model as it was."""
    f, params = functional(model)
    x, y = _data(256, 3)
    found = []
    for _ in range(3):
        for some, labels in zip(x.split(32), y.split(32)):
            slopes = torch.func.grad(lambda p, a=some, b=labels: cross_entropy(f(p, a), b))(params)
            params = params - slopes * RATE
        found.append(params)
    return found


def _close(train: int, test: int) -> bool:
    """Whether influence by projected gradients resembles the exact one."""
    model = small_cnn()
    measure = partial(tracin, functional(model)[0], _checkpoints(model), _data(train, 1), _data(test, 2), cross_entropy)
    both = measure(chunk_size=64), measure(chunk_size=64, projection=4096, generator=torch.Generator().manual_seed(0))
    return bool(torch.corrcoef(torch.stack([scores.flatten() for scores in both]))[0, 1] > 0.9)


def _competitors(train: int, test: int, last: bool, own: bool) -> list[Competitor]:
    from captum.influence import TracInCP, TracInCPFast

    model = small_cnn()
    f, _ = functional(model)
    checkpoints, data, tests = _checkpoints(model), _data(train, 1), _data(test, 2)
    select = "linear2.weight" if last else None
    sizes = (None, 64) if train > 64 else (None, 8)

    def ours(chunk_size: int | None) -> Tensor:
        options: Any = {"learning_rates": RATE, "select": select, "chunk_size": chunk_size}
        if own:
            return self_influence(f, checkpoints, data, cross_entropy, **options)
        return tracin(f, checkpoints, data, tests, cross_entropy, **options)

    def load(model: nn.Module, checkpoint: dict[str, Tensor]) -> float:
        model.load_state_dict(checkpoint)
        return RATE

    states = [{".".join(k): v for k, v in params.items(True, True)} for params in checkpoints]
    options: Any = {"checkpoints_load_func": load, "loss_fn": nn.CrossEntropyLoss(reduction="sum")}

    def of_captum(method: Callable, size: int | None, **more) -> Callable[[], Tensor]:
        target = small_cnn()  # one of its own, whose weights it replaces
        peer = method(target, *more.pop("last", ()), TensorDataset(*data), states, batch_size=size or train, **options, **more)

        def run() -> Tensor:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return peer.self_influence() if own else peer.influence(tests)

        return run

    found = [Competitor("ours", {f"chunk_size={c}": partial(ours, c) for c in sizes})]
    if last:
        choices = {f"batch_size={s or train}": of_captum(TracInCPFast, s, last=("linear2",)) for s in sizes}
        return [*found, Competitor(CAPTUM[True], choices)]
    hooked = {f"batch_size={s or train}": of_captum(TracInCP, s, sample_wise_grads_per_batch=True) for s in sizes}
    options = {**options, "loss_fn": nn.CrossEntropyLoss(reduction="none")}
    plain = {f"batch_size={sizes[1]}": of_captum(TracInCP, sizes[1])}
    return [*found, Competitor(CAPTUM[False], hooked), Competitor(PLAIN, plain)]
