"""Linear and RBF CKA of data that come in minibatches, for all pairs of representations, in memory that does not grow."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InputError
from ...core.structure import describe
from .cka import alignment, rbf_gram, require_bandwidth, root
from .compare import Comparison, named
from .kernels import Products, centred_gram, inner_products, linear_products
from .samples import require_same_rows, require_samples, together

KERNELS = ("linear", "rbf")


@dataclass(frozen=True)
class Sums:
    """What linear CKA needs of all rows z of all representations side by side, [*lead, n, D], D the sum of widths.

    Attributes:
        count: n.
        total: Tensor [*lead, D]: sum z.
        outer: Tensor [*lead, D, D]: sum z z^T.
        norms: Tensor [*lead, S]: sum q, with q_s = |z_s|^2.
        skew: Tensor [*lead, S, D]: sum q z^T.
        quartic: Tensor [*lead, S, S]: sum q q^T.
    """

    count: int
    total: Tensor
    outer: Tensor
    norms: Tensor
    skew: Tensor
    quartic: Tensor

    @classmethod
    def of(cls, rows: Tensor, widths: list[int]) -> Sums:
        """The sums of a minibatch [*lead, n, D]."""
        q = torch.stack([part.square().sum(-1) for part in rows.split(widths, -1)], -1)
        outer = rows.mT @ rows
        return cls(rows.shape[-2], rows.sum(-2), outer, q.sum(-2), q.mT @ rows, q.mT @ q)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.count + other.count,
            self.total + other.total,
            self.outer + other.outer,
            self.norms + other.norms,
            self.skew + other.skew,
            self.quartic + other.quartic,
        )


def streamed_cka(batches: Iterable[Any], *, debiased: bool = False) -> Comparison:
    """Linear CKA of all pairs of representations, exactly as of the whole data, from one pass over minibatches.

        |X_i^T X_j|_F^2    from the cross-covariance of all features of all representations, which minibatches add up

    The debiased one also needs sum_n |x_n|^2 |y_n|^2 of centred rows, which is a polynomial in the mean: its moments are summed
    too. Rows are taken relative to the mean of the first minibatch, so a large common offset costs no precision.

    Args:
        batches: an iterable of mappings (or TensorDicts) from names to representations [*lead, n, D_s] of the same n examples,
            with the same names and widths each time; n may vary. Or of pairs of them: rows and columns of the result. A
            generator that runs the model is consumed one minibatch after the other.
        debiased: as `cka`.

    Returns:
        Comparison: matrix [S, S, *lead], or [S1, S2, *lead] for pairs. NaN where a representation is constant.

    Raises:
        InputError: no minibatch, names, widths or numbers of rows that do not fit, NaN or infinity, fewer than two examples
            (four if debiased) in all.

    Cost: N D^2 multiplications and memory for 2 D^2 numbers, where D is the sum of all widths, whatever the number of examples
        N. For N < D `compare(cka, ...)` is faster where the data fit into memory, and `minibatch_cka` where they do not.

    Source: Kornblith et al. (2019) for the measure.

    Examples:
        >>> from tdhook.latent.similarity import cka
        >>> x, y = torch.randn(100, 8), torch.randn(100, 5)
        >>> found = streamed_cka({"a": a, "b": b} for a, b in zip(x.split(32), y.split(32)))
        >>> torch.allclose(found.matrix[0, 1], cka(x, y), atol=1e-5)
        True
    """
    head: Layout | None = None
    total: Sums | None = None
    for batch in batches:
        layout, tensors = _read(batch, head)
        rows = torch.cat(tensors, -1)
        if head is None:
            head = layout
            frame = Frame.of(tensors)
        sums = Sums.of(frame.place(rows), layout.widths)
        total = sums if total is None else total + sums
    least = 4 if debiased else 2
    if head is None or total is None or total.count < least:
        raise InputError(f"batches had {0 if total is None else total.count} examples in all; give at least {least}.")
    return head.comparison(alignment(_centred(total, head.widths, frame), debiased))


def minibatch_cka(
    batches: Iterable[Any], *, kernel: str = "linear", bandwidth: float | None = None, fraction: float = 1.0
) -> Comparison:
    """CKA of all pairs of representations from the unbiased HSIC of minibatches, whose mean does not depend on their size.

        CKA = sum_b HSIC_1(K_b, L_b) / sqrt(sum_b HSIC_1(K_b, K_b) sum_b HSIC_1(L_b, L_b))

    It goes to the debiased CKA of the whole data as minibatches are added, where they are drawn at random: shuffle the data.
    A minibatch counts as many times as it has examples.

    Args:
        batches: as `streamed_cka`, with at least four examples in each.
        kernel: `"linear"` or `"rbf"`.
        bandwidth: of the Gaussian kernel, as `rbf_cka`; None: `fraction` of the median distance in each minibatch.
        fraction: of the median distance.

    Returns:
        Comparison: matrix [S, S, *lead], or [S1, S2, *lead] for pairs. NaN where a representation is constant in every
            minibatch.

    Raises:
        InputError: as `streamed_cka`; fewer than four examples in a minibatch; an unknown kernel; as `rbf_cka`.

    Cost: for minibatches of n examples and D features in all, n D for each example (or D^2 where that is less, and the kernel
        linear); memory for S matrices n x n.

    Source: Nguyen, Raghu, Kornblith, "Do Wide and Deep Networks Learn the Same Things?" (2021).

    Examples:
        >>> x, y = torch.randn(512, 8), torch.randn(512, 5)
        >>> found = minibatch_cka({"a": a, "b": b} for a, b in zip(x.split(64), y.split(64)))
        >>> found.matrix[0, 0], found.matrix[0, 1].abs() < 0.1
        (tensor(1.0000), tensor(True))
    """
    if kernel not in KERNELS:
        raise InputError(f"kernel is {describe(kernel)}; choose {' or '.join(map(repr, KERNELS))}.")
    require_bandwidth(bandwidth, fraction)
    if kernel == "linear" and (bandwidth is not None or fraction != 1.0):
        raise InputError("bandwidth and fraction have no meaning for kernel='linear'; leave them out, or use kernel='rbf'.")
    head: Layout | None = None
    for batch in batches:
        layout, tensors = _read(batch, head, least=4)
        if head is None:
            head = layout
            frame = Frame.of(tensors)
            matrix, own = torch.zeros(()), torch.zeros(())
        if kernel == "linear":
            placed = frame.place(torch.cat(tensors, -1)).split(layout.widths, -1)
            found = linear_products([_deviations(x, small) for x, small in zip(placed, frame.rounding)])
            product, squares = found.hsic(True), found.own
        else:
            product = inner_products(torch.stack([_gram(x, bandwidth, fraction) for x in tensors]))
            squares = _diagonal(product)
        weight = 1 / (tensors[0].shape[-2] - 3)  # n / (n (n - 3))
        matrix, own = matrix.to(product) + weight * product, own.to(product) + weight * squares
    if head is None:
        raise InputError("batches is empty; give at least one minibatch.")
    scale = root(_diagonal(matrix), own, 0)
    return head.comparison(matrix / scale[:, None] / scale[None])


@dataclass(frozen=True)
class Layout:
    """The names and widths of representations, which all minibatches share.

    Attributes:
        rows: names of the rows of the result.
        columns: names of its columns; None where they are those of the rows.
        widths: of all representations.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...] | None
    widths: list[int]

    def comparison(self, matrix: Tensor) -> Comparison:
        """What was asked for of the matrix of all with all."""
        if self.columns is None:
            return Comparison(matrix, self.rows, self.rows)
        return Comparison(matrix[: len(self.rows), len(self.rows) :], self.rows, self.columns)


@dataclass(frozen=True)
class Frame:
    """Where the first minibatch lies: its mean and its size, to take all rows relative to.

    Attributes:
        mean: Tensor [*lead, 1, D].
        unit: Tensor [*lead, 1, D], the same for all features of a representation: no fourth power over- or underflows.
        rounding: Tensor [S, *lead]: squared deviations that are but rounding, in that unit.
    """

    mean: Tensor
    unit: Tensor
    rounding: Tensor

    @classmethod
    def of(cls, tensors: list[Tensor]) -> Frame:
        """The frame of the representations of a minibatch."""
        means = [x.mean(-2, keepdim=True) for x in tensors]
        sizes = [(x - mean).abs().amax((-2, -1), keepdim=True) for x, mean in zip(tensors, means)]
        magnitudes = [x.abs().amax((-2, -1), keepdim=True) for x in tensors]
        eps = 4 * torch.finfo(tensors[0].dtype).eps
        # of one example, or of equal ones, only the magnitude is known
        units = [torch.where(size > eps * m, size, torch.where(m > 0, m, 1)) for size, m in zip(sizes, magnitudes)]
        rounding = torch.stack([(eps * (m / unit).clamp(min=1)).square()[..., 0, 0] for m, unit in zip(magnitudes, units)])
        unit = torch.cat([unit.expand_as(mean) for unit, mean in zip(units, means)], -1)
        return cls(torch.cat(means, -1), unit, rounding)

    def place(self, rows: Tensor) -> Tensor:
        """Rows [*lead, n, D] relative to the frame."""
        return (rows - self.mean) / self.unit


def _read(batch: Any, head: Layout | None, least: int = 1) -> tuple[Layout, list[Tensor]]:
    """The layout and the tensors of a minibatch, checked against those before."""
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        first, second = named("the rows of a minibatch", batch[0]), named("the columns of a minibatch", batch[1])
    else:
        first, second = named("a minibatch", batch), {}
    given = {**{f"xs[{k!r}]": x for k, x in first.items()}, **{f"ys[{k!r}]": y for k, y in second.items()}}
    for name, x in given.items():
        require_samples(name, x, least)
    require_same_rows(given)
    tensors = together([*first.values(), *second.values()])
    layout = Layout(tuple(first), tuple(second) or None, [x.shape[-1] for x in tensors])
    if head is not None and layout != head:
        raise InputError(f"a minibatch holds {layout}, the first one {head}; give the same names, in order, and widths.")
    return layout, tensors


def _centred(sums: Sums, widths: list[int], frame: Frame) -> Products:
    """The inner products of the centred kernels, from sums about another point; each kernel in units of its trace."""
    n, shift = sums.count, sums.total / sums.count
    site = torch.repeat_interleave(torch.arange(len(widths)), torch.tensor(widths)).to(shift.device)
    member = (torch.arange(len(widths), device=shift.device)[:, None] == site).to(shift.dtype)  # [S, D]
    covariance = sums.outer - n * shift[..., :, None] * shift[..., None, :]
    inner = member @ covariance.square() @ member.mT
    # the squared length of a centred row is q - 2 m.z + |m|^2, with the mean m
    means = member * shift[..., None, :]
    length = means.square().sum(-1)
    traces = sums.norms - n * length
    mixed = sums.skew @ means.mT - sums.norms[..., :, None] * length[..., None, :] / 2
    dots = sums.quartic - 2 * (mixed + mixed.mT) + 4 * means @ sums.outer @ means.mT
    dots = dots - 3 * n * length[..., :, None] * length[..., None, :]
    small = frame.rounding.movedim(0, -1) * n * torch.tensor(widths, device=shift.device)
    traces = torch.where(traces > small, traces, torch.nan)
    both = traces[..., :, None] * traces[..., None, :]
    return Products(
        (inner / both).movedim((-2, -1), (0, 1)), (dots / both).movedim((-2, -1), (0, 1)), (traces / traces).movedim(-1, 0), n
    )


def _deviations(x: Tensor, rounding: Tensor) -> Tensor:
    """Rows [*lead, n, D] relative to their mean; 0 where that is but rounding, so that the other minibatches decide."""
    x = x - x.mean(-2, keepdim=True)
    return torch.where((x.square().mean((-2, -1)) > rounding)[..., None, None], x, 0)


def _diagonal(matrix: Tensor) -> Tensor:
    """[S, *lead] of [S, S, *lead]."""
    return matrix.diagonal(dim1=0, dim2=1).movedim(-1, 0)


def _gram(x: Tensor, bandwidth: float | None, fraction: float) -> Tensor:
    """The centred Gaussian kernel; 0 where its rows are equal, as `_deviations`."""
    gram = centred_gram(rbf_gram(x, bandwidth, fraction), debiased=True)
    rounding = 4 * torch.finfo(x.dtype).eps * x.shape[-2]
    return torch.where((gram.square().sum((-2, -1)) > rounding**2)[..., None, None], gram, 0)
