"""Every method that captum has too, on random models: several inputs, several outputs, odd batch sizes, float64."""

from __future__ import annotations

import random
from functools import partial
from itertools import pairwise

import captum.attr as peers
import pytest
import torch
from torch import nn

from tdhook import attribution, functionalize
from tdhook.core import errors

CLOSE = partial(torch.testing.assert_close, rtol=1e-8, atol=1e-10)
FLOAT32 = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)  # where captum computes or answers in float32

pytestmark = [
    pytest.mark.filterwarnings("ignore:Input Tensor .* did not already require gradients"),
    pytest.mark.filterwarnings("ignore:Setting (forward|backward)"),
    pytest.mark.parametrize("seed", range(6)),
]


class Random(nn.Module):
    """One to three inputs of different widths, joined and passed through layers of random width and kind."""

    def __init__(self, rng: random.Random, act: type[nn.Module] | None = None):
        super().__init__()
        self.widths = [rng.randint(1, 4) for _ in range(rng.randint(1, 3))]
        sizes = [sum(self.widths), *(rng.randint(2, 7) for _ in range(rng.randint(1, 3)))]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.acts = nn.ModuleList((act or rng.choice([nn.ReLU, nn.Tanh, nn.GELU, nn.Softplus]))() for _ in self.layers)
        self.head = nn.Linear(sizes[-1], rng.randint(2, 5))

    def forward(self, *inputs):
        x = torch.cat(inputs, -1)
        for layer, act in zip(self.layers, self.acts):
            x = act(layer(x)) + 0.1
        return self.head(x)


class Drawn:
    """A model, its inputs and baselines, and targets, drawn from a seed."""

    def __init__(self, seed: int, act: type[nn.Module] | None = None):
        rng = random.Random(seed)
        torch.manual_seed(seed)
        self.model = Random(rng, act).double().eval()
        self.f, self.params = functionalize(self.model)
        batch = rng.choice([1, 3, 5])
        self.inputs = tuple(torch.randn(batch, w).double() for w in self.model.widths)
        self.baselines = tuple(torch.randn(batch, w).double() for w in self.model.widths)
        self.targets = rng.sample(range(self.model.head.out_features), 2)
        self.layer = rng.randrange(len(self.model.layers))
        self.site, self.module = f"acts.{self.layer}", self.model.acts[self.layer]

    def ours(self, method, **options):
        return method(self.f, self.params, self.inputs, targets=self.targets, **options)

    def compare(self, ours, attribute, close=CLOSE, **options):
        """Ours, for both targets, against captum called once for each."""
        for t, target in enumerate(self.targets):
            theirs = attribute(self.inputs, target=target, **options)
            for mine, other in zip(ours, theirs, strict=True):
                close(mine[t], other.to(mine.dtype))


def test_saliency(seed):
    drawn = Drawn(seed)
    drawn.compare(drawn.ours(attribution.saliency), peers.Saliency(drawn.model).attribute)
    drawn.compare(drawn.ours(attribution.saliency, absolute=False), partial(peers.Saliency(drawn.model).attribute, abs=False))


def test_input_x_gradient(seed):
    drawn = Drawn(seed)
    drawn.compare(drawn.ours(attribution.input_x_gradient), peers.InputXGradient(drawn.model).attribute)


@pytest.mark.parametrize(
    ("quadrature", "method"),
    [
        ("gauss_legendre", "gausslegendre"),
        ("riemann_left", "riemann_left"),
        ("riemann_right", "riemann_right"),
        ("midpoint", "riemann_middle"),
    ],
)
def test_integrated_gradients(seed, quadrature, method):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.integrated_gradients, baselines=drawn.baselines, steps=11, quadrature=quadrature)
    peer = peers.IntegratedGradients(drawn.model)
    drawn.compare(ours, peer.attribute, FLOAT32, baselines=drawn.baselines, n_steps=11, method=method)


def test_trapezoid(seed):
    """Their weights sum to (n - 1) / n."""
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.integrated_gradients, baselines=drawn.baselines, steps=11, quadrature="trapezoid")
    peer = peers.IntegratedGradients(drawn.model)
    scaled = [o * 10 / 11 for o in ours]
    drawn.compare(scaled, peer.attribute, FLOAT32, baselines=drawn.baselines, n_steps=11, method="riemann_trapezoid")


def test_layer_integrated_gradients(seed):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.integrated_gradients, baselines=drawn.baselines, at=drawn.site, steps=11)
    peer = peers.LayerIntegratedGradients(drawn.model, drawn.module)
    attribute = partial(peer.attribute, baselines=drawn.baselines, n_steps=11)
    drawn.compare([ours[drawn.site]], lambda *a, **k: [attribute(*a, **k)], FLOAT32)


def test_layer_gradient_x_activation(seed):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.input_x_gradient, at=drawn.site)
    peer = peers.LayerGradientXActivation(drawn.model, drawn.module)
    drawn.compare([ours[drawn.site]], lambda *a, **k: [peer.attribute(*a, **k)])


def test_internal_influence(seed):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.internal_influence, at=drawn.site, baselines=drawn.baselines, steps=11)
    peer = peers.InternalInfluence(drawn.model, drawn.module)
    attribute = partial(peer.attribute, baselines=drawn.baselines, n_steps=11)
    drawn.compare([ours[drawn.site]], lambda *a, **k: [attribute(*a, **k)], FLOAT32)


def test_layer_conductance(seed):
    """Theirs takes differences between path points, and comes closer with more of them."""
    drawn = Drawn(seed, nn.Tanh)
    ours = drawn.ours(attribution.layer_conductance, at=drawn.site, baselines=drawn.baselines, steps=50)
    peer = peers.LayerConductance(drawn.model, drawn.module)
    attribute = partial(peer.attribute, baselines=drawn.baselines, n_steps=4000, method="riemann_middle")
    close = partial(torch.testing.assert_close, rtol=5e-3, atol=1e-3)
    drawn.compare([ours[drawn.site]], lambda *a, **k: [attribute(*a, **k)], close)


def test_neuron_conductance(seed):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.neuron_conductance, through={drawn.site: 1}, baselines=drawn.baselines, steps=11)
    peer = peers.NeuronConductance(drawn.model, drawn.module)
    attribute = partial(peer.attribute, neuron_selector=1, baselines=drawn.baselines, n_steps=11, method="gausslegendre")
    drawn.compare(ours, lambda inputs, target: attribute(inputs, target=target), FLOAT32)


def test_guided_backpropagation(seed):
    drawn = Drawn(seed, nn.ReLU)
    drawn.compare(drawn.ours(attribution.guided_backpropagation), peers.GuidedBackprop(drawn.model).attribute)


def test_feature_ablation(seed):
    drawn = Drawn(seed)
    ours = drawn.ours(attribution.feature_ablation, baselines=drawn.baselines)
    drawn.compare(ours, peers.FeatureAblation(drawn.model).attribute, baselines=drawn.baselines)


def test_exact_shapley_values(seed):
    drawn = Drawn(seed)
    widths = drawn.model.widths
    masks, start = [], 0
    for width in widths:  # at most two features for each input: theirs takes every order of them
        masks.append(start + torch.arange(width)[None].clamp(max=1))
        start += min(width, 2)
    each = drawn.ours(attribution.shapley_values, baselines=drawn.baselines, groups=tuple(masks))
    painted = [each[..., mask[0]] for mask in masks]
    peer = peers.ShapleyValues(drawn.model)
    drawn.compare(painted, peer.attribute, FLOAT32, baselines=drawn.baselines, feature_mask=tuple(masks))
    sampled = drawn.ours(attribution.kernel_shap, baselines=drawn.baselines, groups=tuple(masks))  # few enough to be exact
    CLOSE(sampled.value, each)


def test_images(seed):
    torch.manual_seed(seed)
    conv = nn.Conv2d(1 + seed % 3, 3, 3, padding=seed % 2, stride=1 + seed % 2)
    model = nn.Sequential(conv, nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 4)).double()
    x = torch.randn(2 * seed + 1, 1 + seed % 3, 9, 8).double()
    model(x)  # running statistics that are not trivial
    f, params = functionalize(model.eval())
    both = [0, 3]
    maps = attribution.grad_cam(f, params, x, at="2", targets=both, relu=False)["2"]
    window = (1, 3, 2)
    slid = attribution.occlusion(f, params, x, targets=both, window=window, stride=(1, 2, 2))
    guided = attribution.guided_backpropagation(f, params, x, targets=both)
    for t, target in enumerate(both):
        CLOSE(maps[t], peers.LayerGradCam(model, model[2]).attribute(x, target=target)[:, 0])
        theirs = peers.Occlusion(model).attribute(x, window, strides=(1, 2, 2), target=target)
        FLOAT32(slid[t], theirs.double())
        CLOSE(guided[t], peers.GuidedBackprop(model).attribute(x, target=target))


def test_a_model_that_captum_gets_wrong_in_silence(seed):
    """A functional ReLU: captum's guided backpropagation is the plain gradient, ours is that of the module."""

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.second(self.first(x).relu())

    torch.manual_seed(seed)
    functional = Functional().double()
    modular = nn.Sequential(functional.first, nn.ReLU(), functional.second)
    x = torch.randn(3, 4).double()
    want = attribution.guided_backpropagation(*functionalize(modular), x, targets=1)
    CLOSE(attribution.guided_backpropagation(*functionalize(functional), x, targets=1), want)
    assert not torch.allclose(peers.GuidedBackprop(functional).attribute(x, target=1), want)
    with pytest.raises(errors.SiteError, match="no relu"):
        attribution.guided_backpropagation(*functionalize(nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()), x, targets=1)
