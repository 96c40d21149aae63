"""Recurrent layers, carried out in cells."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

from tdhook import errors, functionalize, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
KINDS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN, "relu": partial(nn.RNN, nonlinearity="relu")}
OPTIONS = {
    "plain": {},
    "two layers": {"num_layers": 2},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "batch first": {"batch_first": True, "bidirectional": True},
    "no bias": {"bias": False},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_recurrent_layers_in_cells_equal_the_whole(kind, options, batched):
    layer = KINDS[kind](3, 4, **OPTIONS[options]).double().eval()
    x = torch.randn(5, 2, 3).double() if batched else torch.randn(5, 3).double()
    f, params = functionalize(layer)
    g = with_rules(f, {"linear": r.Gradient()})
    values = [pytree.tree_flatten(h(params, x))[0] for h in (f, g)]
    assert all(torch.equal(a, b) for a, b in zip(*values))
    parts = vmap(partial(g, params))(x[None])  # torch cannot batch the whole, so these are the cells alone
    for a, b in zip(pytree.tree_flatten(parts)[0], values[0]):
        CLOSE(a[0], b)
    for i in range(len(values[0])):
        score = lambda h, x, i=i: pytree.tree_flatten(h(params, x))[0][i].cos().sum()  # noqa: E731
        CLOSE(grad(partial(score, g))(x), grad(partial(score, f))(x))


def test_a_state_that_is_given():
    layer = nn.LSTM(3, 4).double()
    inputs = (torch.randn(5, 2, 3).double(), (torch.randn(1, 2, 4).double(), torch.randn(1, 2, 4).double()))
    f, params = functionalize(layer)
    g = with_rules(f, {"linear": r.Gradient()})
    gradients = [pytree.tree_flatten(grad(lambda i, h=h: h(params, i)[0].sin().sum())(inputs))[0] for h in (f, g)]
    for ours, expected in zip(*gradients):
        CLOSE(ours, expected)


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def stabilized(z, epsilon):
    return z + torch.where(z < 0, -epsilon, epsilon)


def test_the_rule_of_arras_by_hand():
    """Arras et al. (2017): gates are weights of the sums in which they stand, and get nothing."""
    net, epsilon = Classifier().double(), 1e-3
    x = torch.randn(2, 4, 3).double()
    lstm = net.lstm
    with torch.no_grad():
        h, c = torch.zeros(2, 2, 4).double()
        steps = []
        for t in range(4):
            z_x, z_h = x[:, t] @ lstm.weight_ih_l0.T + lstm.bias_ih_l0, h @ lstm.weight_hh_l0.T + lstm.bias_hh_l0
            i, forget, g, o = (z_x + z_h).chunk(4, 1)
            kept, new = forget.sigmoid() * c, i.sigmoid() * g.tanh()
            steps.append((z_x[:, 8:12], z_h[:, 8:12], h, kept, new))
            c = kept + new
            h = o.sigmoid() * c.tanh()
        logit = net.head(h)[:, 1:2]
        relevance = h * net.head.weight[1] * (logit / stabilized(logit, epsilon))
        r_c, r_x = torch.zeros(2, 4).double(), []
        r_h = relevance
        for t in reversed(range(4)):
            z_x, z_h, before, kept, new = steps[t]
            r_c = r_c + r_h  # all of it through the tanh, none to the output gate
            r_new, r_c = r_c * new / (kept + new), r_c * kept / (kept + new)
            w_x, w_h = lstm.weight_ih_l0[8:12], lstm.weight_hh_l0[8:12]
            r_z = r_new / (z_x + z_h)
            r_x.append(x[:, t] * ((r_z * z_x / stabilized(z_x, epsilon)) @ w_x))
            r_h = before * ((r_z * z_h / stabilized(z_h, epsilon)) @ w_h)
        expected = torch.stack(r_x[::-1], 1)
    assert torch.equal(net(x), with_rules(functionalize(net)[0], r.cp_lrp())(functionalize(net)[1], x))
    CLOSE(lrp(*functionalize(net), x, rules=r.cp_lrp(epsilon), targets=1), expected, rtol=1e-6)


def test_recurrent_layers_without_biases_conserve():
    net = Classifier().double()
    net.lstm = nn.LSTM(3, 4, batch_first=True, bias=False).double()
    x = torch.randn(2, 4, 3).double()
    got = lrp(*functionalize(net), x, rules=r.cp_lrp(0.0), targets=1)
    CLOSE(got.flatten(1).sum(1), (net(x)[:, 1] - net.head.bias[1]).detach())


def test_a_report_of_the_cells():
    net = Classifier()
    report = r.explain(*functionalize(net), torch.zeros(1, 2, 3), r.cp_lrp(), strict=True)
    rules = {line.site: line.rule for line in report}
    assert rules["lstm/linear@0"] == "Epsilon(epsilon=1e-06)" and rules["lstm/mul@1"] == "FrozenGate()"


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.LSTM(3, 4, proj_size=2), "projection"),
        (nn.LSTM(3, 4, 2, dropout=0.5), r"drops values; call model.eval\(\)"),
    ],
)
def test_recurrent_layers_that_cannot_be_written_out_are_refused(layer, message):
    f, params = functionalize(layer)
    with pytest.raises(errors.RuleError, match=message):
        with_rules(f, {"linear": r.Epsilon()})(params, torch.zeros(5, 2, 3))


def test_a_packed_sequence_is_refused():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.GRU(3, 4)

        def forward(self, x):
            return self.lstm(nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3])))[1]

    f, params = functionalize(Packed())
    with pytest.raises(errors.RuleError, match="packed sequence; pass padded tensors"):
        with_rules(f, {"linear": r.Epsilon()})(params, torch.zeros(5, 2, 3))
