"""Quadrature rules: what they integrate exactly, in float64."""

from __future__ import annotations

import math

import pytest

from tdhook.core.errors import InputError
from tdhook.core.quadrature import QUADRATURES, quadrature_rule

STEPS = [2, 3, 7, 50]


def integral(name, steps, function):
    nodes, weights = quadrature_rule(name, steps)
    return math.fsum(w * function(a) for a, w in zip(nodes, weights))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", QUADRATURES)
def test_weights_sum_to_one_and_nodes_lie_in_order(name, steps):
    nodes, weights = quadrature_rule(name, steps)
    assert len(nodes) == len(weights) == steps
    assert abs(math.fsum(weights) - 1) < 1e-14
    assert list(nodes) == sorted(nodes) and nodes[0] >= 0 and nodes[-1] <= 1


@pytest.mark.parametrize("steps", STEPS)
def test_gauss_legendre_is_exact_up_to_degree_2n_minus_1(steps):
    for degree in range(min(2 * steps, 30)):
        assert abs(integral("gauss_legendre", steps, lambda a: a**degree) - 1 / (degree + 1)) < 1e-14  # noqa: B023
    if steps < 7:
        assert abs(integral("gauss_legendre", steps, lambda a: a ** (2 * steps)) - 1 / (2 * steps + 1)) > 1e-7


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["midpoint", "trapezoid"])
def test_symmetric_rules_are_exact_for_lines(name, steps):
    assert abs(integral(name, steps, lambda a: 3 * a - 1) - 0.5) < 1e-14


@pytest.mark.parametrize(
    ("name", "nodes", "weights"),
    [
        ("riemann_left", (0.0, 0.5), (0.5, 0.5)),
        ("riemann_right", (0.5, 1.0), (0.5, 0.5)),
        ("midpoint", (0.25, 0.75), (0.5, 0.5)),
        ("trapezoid", (0.0, 1.0), (0.5, 0.5)),
    ],
)
def test_two_nodes(name, nodes, weights):
    assert quadrature_rule(name, 2) == (nodes, weights)


def test_gauss_legendre_with_one_node_is_the_midpoint():
    assert quadrature_rule("gauss_legendre", 1) == ((0.5,), (1.0,))


def test_an_exponential_to_float64():
    assert abs(integral("gauss_legendre", 20, math.exp) - (math.e - 1)) < 1e-15 * 4


@pytest.mark.parametrize(("name", "order"), [("riemann_left", 1), ("riemann_right", 1), ("midpoint", 2), ("trapezoid", 2)])
def test_orders_of_convergence(name, order):
    coarse, fine = (abs(integral(name, n, math.exp) - (math.e - 1)) for n in (100, 200))
    assert abs(math.log2(coarse / fine) - order) < 0.02


@pytest.mark.parametrize("steps", [0, -3, 1.0, True, None])
def test_a_bad_number_of_steps(steps):
    with pytest.raises(InputError, match="steps is an integer of at least 1, got"):
        quadrature_rule("midpoint", steps)


def test_a_trapezoid_has_two_ends():
    with pytest.raises(InputError, match="steps is an integer of at least 2, got 1"):
        quadrature_rule("trapezoid", 1)


def test_an_unknown_name():
    with pytest.raises(InputError, match="quadrature='simpson' is unknown; choose from gauss_legendre, riemann_left"):
        quadrature_rule("simpson", 4)
