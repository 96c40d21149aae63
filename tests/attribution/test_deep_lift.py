"""DeepLIFT against captum where captum is right, against completeness where it is not, and against passes written by hand."""

from __future__ import annotations

from functools import partial

import captum.attr
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap

import tdhook
import tdhook.attribution.rules.canonization
from tdhook import functionalize
from tdhook.attribution.deep_lift import deep_lift, deep_lift_shap
from tdhook.attribution.rules import Gradient, on
from tdhook.attribution.rules.deep_lift import Rescale, rescale
from tdhook.attribution.rules.reveal_cancel import RevealCancel
from tdhook.core import errors

pytestmark = [
    pytest.mark.filterwarnings("ignore:(Input Tensor 0|Setting forward):UserWarning"),  # of captum
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),  # of Dynamo, about itself
]
CLOSE = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-10)
NETS = {
    "mlp": ([nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3)], (6,)),
    "cnn": ([nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 2), nn.ELU(), nn.Flatten(), nn.Linear(100, 3)], (2, 8, 8)),
    "pooled": ([nn.Conv2d(2, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 3)], (2, 8, 8)),
    "signal": ([nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)], (2, 8)),
}


def net(name):
    layers, shape = NETS[name]
    return nn.Sequential(*layers).double().eval(), shape


def normal(*shape, seed=7):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sum_and_difference(model, x, baselines, target=1, **options):
    f, params = functionalize(model)
    got = deep_lift(f, params, x, baselines=baselines, targets=target, **options)
    parts = [got] if isinstance(got, torch.Tensor) else got
    return sum(part.flatten(1).sum(-1) for part in parts), (f(params, x) - f(params, baselines))[:, target]


# captum ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", NETS)
def test_captum(name, batch):
    model, shape = net(name)
    x, b = normal(batch, *shape), normal(batch, *shape, seed=8)
    f, params = functionalize(model)
    for target in range(3):
        CLOSE(deep_lift(f, params, x, baselines=b, targets=target), captum.attr.DeepLift(model).attribute(x, b, target=target))
    multipliers = captum.attr.DeepLift(model, multiply_by_inputs=False).attribute(x, b, target=0)
    CLOSE(deep_lift(f, params, x, baselines=b, targets=0, multiply_by_inputs=False), multipliers)


@pytest.mark.parametrize("name", NETS)
def test_captum_shap(name):
    model, shape = net(name)
    x, baselines = normal(3, *shape), normal(7, *shape, seed=8)
    f, params = functionalize(model)
    expected = captum.attr.DeepLiftShap(model).attribute(x, baselines, target=1)
    for chunk_size in (None, 2):
        CLOSE(deep_lift_shap(f, params, x, baselines=baselines, targets=1, chunk_size=chunk_size).value, expected)


def test_pooling_after_an_activation():
    """captum's sum is not the difference where an activation module stands before the pooling."""
    model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(12, 3)).double()
    f, params = functionalize(model)
    x, b = normal(3, 2, 8), normal(3, 2, 8, seed=8)
    z, z0 = (model[0](each).detach() for each in (x, b))
    (y, i), (y0, i0) = (F.max_pool1d(each.relu(), 2, return_indices=True) for each in (z, z0))
    g, top = params["4", "weight"][1].reshape(4, 3), torch.maximum(y, y0)
    shares = [F.max_unpool1d(g * part, at, 2) for part, at in ((top - y0, i), (y - top, i0))]
    m = (shares[0] + shares[1]) / (z - z0)  # the difference of the ReLUs is in both steps, and cancels
    expected = F.conv_transpose1d(m, params["0", "weight"]) * (x - b)
    got = deep_lift(f, params, x, baselines=b, targets=1)
    CLOSE(got, expected)
    difference = (f(params, x) - f(params, b))[:, 1]
    CLOSE(got.sum((1, 2)), difference)
    theirs = captum.attr.DeepLift(model).attribute(x, b, target=1).sum((1, 2))
    assert (theirs - difference).abs().max() > 0.01


def test_captums_softmax_for_a_lone_example():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3), nn.Softmax(1)).double()
    x, b = normal(4, 6), normal(4, 6, seed=8)
    f, params = functionalize(model)
    got = deep_lift(f, params, x, baselines=b, targets=2, rule=rescale(centred_softmax=True))
    for i in range(4):
        CLOSE(got[i : i + 1], captum.attr.DeepLift(model).attribute(x[i : i + 1], b[i : i + 1], target=2))


# Completeness, where captum has none -------------------------------------------------------------------------------------


class Reused(nn.Module):
    """A functional ReLU, a module called twice and a skip connection."""

    def __init__(self):
        super().__init__()
        self.linear, self.act, self.head = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)

    def forward(self, x):
        h = self.act(self.linear(x))
        h = self.act(self.linear(F.relu(h - 0.3))) + h
        return self.head(h).softmax(-1)


class Operations(nn.Module):
    """Products, quotients, maxima, norms, softmax and friends, in place and not."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv, self.norm = nn.Linear(4, 4), nn.Conv2d(2, 4, 1), nn.GroupNorm(2, 4)

    def forward(self, x, y):
        z = F.relu(self.linear(self.linear(x).relu_())) + x * y
        z = z / (1 + y**2) + torch.maximum(x, y) * torch.minimum(x, z) + z.max(-1, keepdim=True).values
        z = z - y.amin(-1, keepdim=True) + torch.einsum("bi,bj->bi", x, z) + z.abs().sqrt()
        z = z.log_softmax(-1) + torch.logsumexp(z, -1, keepdim=True) + F.softmin(z, -1)
        z = z + F.adaptive_max_pool1d(z[:, None], 2).sum((1, 2))[:, None] + F.rms_norm(z, (4,)) + 2.0 / (z.square() + 1)
        o = torch.zeros_like(z)
        o[:, 0] = self.norm(self.conv(torch.stack([z, x], 1)[..., None])).tanh().mean((1, 2, 3))
        return z + o + F.glu(torch.cat([z, x], -1)) + F.layer_norm(z, (4,), torch.ones(4).double() * 2)


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 6, 2, batch_first=True, bidirectional=True), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        (Reused, [(4,)]),
        (Operations, [(4,), (4,)]),
        (Recurrent, [(5, 4)]),
        (lambda: nn.Sequential(nn.Conv1d(2, 4, 3), nn.MaxPool1d(3, stride=1), nn.Flatten(), nn.Linear(16, 3)), [(2, 8)]),
        (lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten()), [(5, 8)]),
        (lambda: nn.Sequential(nn.Linear(4, 3)), [(4,)]),
    ],
)  # fmt: skip
def test_the_sum_is_the_difference(model, shapes):
    x = tuple(normal(3, *shape, seed=i) for i, shape in enumerate(shapes))
    b = tuple(normal(3, *shape, seed=i + 10) for i, shape in enumerate(shapes))
    x, b = (x[0], b[0]) if len(x) == 1 else (x, b)
    CLOSE(*sum_and_difference(model().double().eval(), x, b))


def test_attention_with_a_mask_and_shared_keys():
    class Attention(nn.Module):
        def forward(self, q, k, v):
            mask = torch.arange(5)[None] < 4
            one = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
            return (one + F.scaled_dot_product_attention(one, k, v, is_causal=True, enable_gqa=True)).sum((1, 2))

    x = (normal(2, 4, 5, 3), normal(2, 2, 5, 3, seed=1), normal(2, 2, 5, 3, seed=2))
    CLOSE(*sum_and_difference(Attention(), x, tuple(t.flip(0) * 0.7 for t in x)))


def test_batch_mates_do_not_matter():
    f, params = functionalize(Reused().double())
    x = normal(4, 4)
    whole = deep_lift(f, params, x, targets=[0, 2])
    CLOSE(whole, torch.stack([deep_lift(f, params, e[None], targets=[0, 2])[:, 0] for e in x], 1))
    CLOSE(whole, vmap(lambda x: deep_lift(f, params, x[None], targets=[0, 2])[:, 0], out_dims=1)(x))


def test_by_hand():
    """relu(2 a - b) at (2, 1) from (0, 1): the ratio of differences is 3 / 4, since the reference is at -1."""
    f, params = functionalize(nn.Sequential(nn.Linear(2, 1, bias=False), nn.ReLU()).double())
    params["0", "weight"] = torch.tensor([[2.0, -1.0]]).double()
    x, b = torch.tensor([[2.0, 1.0]]).double(), torch.tensor([[0.0, 1.0]]).double()
    CLOSE(deep_lift(f, params, x, baselines=b, targets=0, multiply_by_inputs=False), torch.tensor([[1.5, -0.75]]).double())


def test_at_sites():
    model, shape = net("cnn")
    f, params = functionalize(model)
    x, b = normal(3, *shape), normal(3, *shape, seed=8)
    got = deep_lift(f, params, x, baselines=b, targets=[0, 1], at="3")
    h, h0 = (tdhook.stop_at(f, "3")(params, each) for each in (x, b))
    tail, tail_params = functionalize(model[4:])
    CLOSE(got["3"], deep_lift(tail, tail_params, h, baselines=h0, targets=[0, 1]))
    CLOSE(deep_lift(f, params, x, baselines={"3": h0}, targets=[0, 1], at="3")["3"], got["3"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_language_model_between_two_prompts(attention):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        n_layer=2, n_head=2, n_embd=16, vocab_size=50, n_positions=20, bos_token_id=0, eos_token_id=0
    )
    config._attn_implementation = attention
    f, params = functionalize(transformers.GPT2LMHeadModel(config).double().eval(), use_cache=False)
    one, other = ({"input_ids": torch.arange(10).reshape(2, 5) + i} for i in (0, 20))
    target = tdhook.targets.index(3, key="logits", position=-1)
    got = deep_lift(f, params, one, baselines=other, targets=target, at="transformer.wte")["transformer.wte"]
    CLOSE(got.sum((1, 2)), target(f(params, one)) - target(f(params, other)))


# RevealCancel ------------------------------------------------------------------------------------------------------------


class Minimum(nn.Module):
    """min(a, b) = a - relu(a - b), the example of the paper: the rescale rule gives all of it to one of the two."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return x[:, :1] - F.relu(self.linear(x))


def test_the_example_of_the_paper():
    f, params = functionalize(Minimum().double())
    params["linear", "weight"] = torch.tensor([[1.0, -1.0]]).double()
    x = torch.tensor([[3.0, 1.0], [1.0, 3.0], [2.0, 2.0]]).double()
    CLOSE(deep_lift(f, params, x, targets=0, rule="reveal_cancel"), torch.tensor([[0.5, 0.5], [0.5, 0.5], [1, 1]]).double())
    CLOSE(deep_lift(f, params, x, targets=0)[:2], torch.tensor([[0.0, 1.0], [1.0, 0.0]]).double())


def by_hand(layers, act, x, x0):
    """RevealCancel on an MLP, with both multipliers carried backwards; layers are (W, b), the last one is linear."""
    values, references = [x], [x0]
    steps = []
    for i, (w, b) in enumerate(layers):
        h, h0 = values[-1], references[-1]
        d = h - h0
        terms = w * d  # [out, in]
        plus, minus = terms.clamp(min=0).sum(1), terms.clamp(max=0).sum(1)
        z, z0 = w @ h + b, w @ h0 + b
        up, down = (terms > 0) + 0.5 * (terms == 0), (terms < 0) + 0.5 * (terms == 0)
        if i == len(layers) - 1:
            steps.append((w, up, down, None, None))
            values.append(z)
            continue
        y_plus = (act(z0 + plus) - act(z0) + act(z) - act(z0 + minus)) / 2
        y_minus = (act(z0 + minus) - act(z0) + act(z) - act(z0 + plus)) / 2
        steps.append((w, up, down, torch.where(plus > 0, y_plus / plus, 0), torch.where(minus < 0, y_minus / minus, 0)))
        values.append(act(z))
        references.append(act(z0))
    m = torch.ones(1, dtype=x.dtype)
    for w, up, down, m_plus, m_minus in reversed(steps):
        above_plus, above_minus = (m, m) if m_plus is None else (m * m_plus, m * m_minus)
        m = (w * up).T @ above_plus + (w * down).T @ above_minus
    return m * (x - x0)


@pytest.mark.parametrize("act", [nn.Tanh(), nn.Sigmoid(), nn.ReLU(inplace=True)])
def test_reveal_cancel_by_hand(act):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), act, nn.Flatten(), nn.Linear(7, 6), act, nn.Linear(6, 1)).double()
    f, params = functionalize(model)
    x, x0 = normal(4, 5), normal(4, 5, seed=8)
    x[:, 2] = x0[:, 2]
    layers = [(params[i, "weight"], params[i, "bias"]) for i in ("0", "3", "5")]
    function = torch.relu if isinstance(act, nn.ReLU) else act
    expected = torch.stack([by_hand(layers, function, a, b) for a, b in zip(x, x0)])
    got = deep_lift(f, params, x, baselines=x0, targets=0, rule="reveal_cancel")
    CLOSE(got, expected)
    assert (got - deep_lift(f, params, x, baselines=x0, targets=0)).abs().max() > 1e-5
    CLOSE(vmap(lambda a, b: deep_lift(f, params, a[None], baselines=b[None], targets=0, rule="reveal_cancel")[0])(x, x0), got)


def test_reveal_cancel_through_pooling_sums_and_norms_is_complete():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.norm = nn.Conv2d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.head = nn.Linear(36, 3)

        def forward(self, x):
            h = self.norm(self.one(x)) - 0.5 * self.two(x)
            h = F.max_pool2d(h.relu_(), 2) + F.avg_pool2d(F.gelu(h), 2)
            return self.head(h.flatten(1).sigmoid())

    torch.manual_seed(0)
    model = Residual().double().eval()
    CLOSE(*sum_and_difference(model, normal(2, 2, 8, 8), normal(2, 2, 8, 8, seed=8), rule="reveal_cancel"))


def test_a_batch_norm_does_not_hide_the_parts_of_the_layer_before():
    """The symptom: with a batch norm between, the rule is the rescale rule; merged into the layer it is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double().eval()
    model[1].weight.data = torch.tensor([2.0, -1.0, 0.5]).double()
    f, params = functionalize(model)
    got = deep_lift(f, params, normal(3, 4), targets=0, rule="reveal_cancel")
    merged = tdhook.attribution.rules.canonization.merge_batch_norm(f, params, normal(3, 4))
    CLOSE(got, deep_lift(f, merged, normal(3, 4), targets=0, rule="reveal_cancel"))


# A set of baselines ------------------------------------------------------------------------------------------------------


def test_shap_is_the_mean_over_baselines():
    f, params = functionalize(Reused().double())
    x, baselines = normal(3, 4), normal(6, 4, seed=8)
    each = torch.stack([deep_lift(f, params, x, baselines=b, targets=[0, 2]) for b in baselines])
    got = deep_lift_shap(f, params, x, baselines=baselines, targets=[0, 2])
    CLOSE(got.value, each.mean(0))
    CLOSE(got.standard_error, each.std(0) / 6**0.5)
    lone = deep_lift_shap(f, params, x[:1], baselines=baselines, targets=[0, 2])
    CLOSE(lone.value, got.value[:, :1])
    at = deep_lift_shap(f, params, x, baselines=baselines, targets=0, at="linear@0:in")
    CLOSE(at.value["linear@0:in"], got.value[0])


def test_shap_draws():
    f, params = functionalize(Reused().double())
    x, baselines = normal(3, 4), normal(6, 4, seed=8)
    run = partial(deep_lift_shap, f, params, x, baselines=baselines, targets=0, samples=40)
    drawn = [run(generator=torch.Generator().manual_seed(3), chunk_size=c) for c in (None, 7)]
    CLOSE(drawn[0].value, drawn[1].value)
    exact = deep_lift_shap(f, params, x, baselines=baselines, targets=0).value
    assert ((drawn[0].value - exact).abs() < 5 * drawn[0].standard_error).all()
    state = torch.get_rng_state()
    run(generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())


# Composition and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [1, 2, 100])
def test_plural_targets(chunk_size):
    model, shape = net("cnn")
    f, params = functionalize(model)
    x = normal(1, *shape)
    each = torch.stack([deep_lift(f, params, x, targets=t) for t in (2, 0)])
    CLOSE(deep_lift(f, params, x, targets=[2, 0], chunk_size=chunk_size), each)


@pytest.mark.compile
def test_compiled_equals_eager():
    torch._dynamo.reset()
    model = nn.Sequential(*net("cnn")[0], nn.Softmax(-1))
    f, params = functionalize(model)
    run = lambda params, x: deep_lift(f, params, x, targets=[0, 1])  # noqa: E731
    CLOSE(torch.compile(run, fullgraph=True, backend="aot_eager")(params, normal(2, 2, 8, 8)), run(params, normal(2, 2, 8, 8)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_dtype_of_the_data_is_kept(dtype):
    f, params = functionalize(Reused().to(dtype))
    assert deep_lift(f, params, normal(1, 4).to(dtype), targets=0).dtype == dtype


class Sorted(nn.Module):
    def forward(self, x):
        return x.sort(-1).values


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return self.inner(x) * x.exp()


def test_operations_without_a_rule():
    f, params = functionalize(Sorted())
    with pytest.raises(errors.RuleError, match="DeepLIFT has no rule for 'sort' at /sort"):
        deep_lift(f, params, normal(2, 3), targets=0)
    got = deep_lift(f, params, normal(2, 3), targets=0, rule=[on("sort", Gradient()), rescale()])
    assert got.shape == (2, 3)
    f, params = functionalize(Product())
    with pytest.raises(errors.RuleError, match="RevealCancel has no rule for 'mul' at /mul"):
        deep_lift(f, params, normal(2, 3), targets=0, rule="reveal_cancel")
    mixed = deep_lift(f, params, normal(2, 3), targets=0, rule=[on("mul", Rescale()), on("*", RevealCancel())])
    CLOSE(mixed, deep_lift(f, params, normal(2, 3), targets=0))


def test_the_rule_alone_needs_a_reference():
    f, params = functionalize(Product())
    with pytest.raises(errors.RuleError, match=r"needs a reference run; use tdhook\.attribution\.deep_lift"):
        tdhook.with_rules(f, rescale())(params, normal(2, 3))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rule": "rescaled"}, errors.InputError, "rule='rescaled' is unknown; choose from rescale, reveal_cancel"),
        ({"baselines": torch.zeros(5)}, errors.InputError, "baselines holds"),
        ({"chunk_size": 0}, errors.InputError, "chunk_size"),
        ({"targets": []}, errors.TargetError, "targets is empty"),
    ],
)
def test_bad_input(options, error, message):
    f, params = functionalize(Reused().double())
    with pytest.raises(error, match=message):
        deep_lift(f, params, normal(2, 4), **{"targets": 0, **options})


def test_bad_sets():
    f, params = functionalize(Reused().double())
    with pytest.raises(errors.InputError, match="is no set for"):
        deep_lift_shap(f, params, normal(2, 4), targets=0, baselines=normal(3, 5))
    with pytest.raises(errors.InputError, match="samples is an integer of at least 1 or None, got 0"):
        deep_lift_shap(f, params, normal(2, 4), targets=0, baselines=normal(3, 4), samples=0)
