"""ROME on small models: the edit says the target, and what it is not about stays."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import vmap
from transformers.pytorch_utils import Conv1D

from tdhook import functionalize, perturb
from tdhook.core import errors
from tdhook.weights.edit_evaluation import efficacy, evaluate_edit, specificity
from tdhook.weights.keys import key_at, key_covariance
from tdhook.weights.rome import optimize_value, rome

CLOSE = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-5)


class Block(nn.Module):
    """Tokens, an MLP with a residual, a running mean that carries it to later tokens, logits of all positions."""

    def __init__(self, transposed=False):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 16)
        self.down = Conv1D(8, 16) if transposed else nn.Linear(16, 8)
        nn.init.normal_(self.down.weight, std=0.3)  # Conv1D begins with small weights
        self.head = nn.Linear(8, 20, bias=False)

    def forward(self, ids):
        h = self.embed(ids)
        h = h + self.down(F.gelu(self.up(h)))
        h = h.cumsum(1) / torch.arange(1, ids.shape[1] + 1)[:, None]
        return {"logits": 4 * self.head(h)}


def last(output):
    return output["logits"][:, -1]


def setting(transposed=False):
    torch.manual_seed(0)
    f, params = functionalize(Block(transposed).double())
    corpus = [torch.randint(20, (8, 12)) for _ in range(3)]
    return f, params, corpus, torch.tensor([[3, 7, 5], [4, 7, 6]])


OPTIONS = {"site": "down", "position": 1, "target": 5, "logits": last, "norm_factor": 0.01, "norm_limit": 30.0, "steps": 20}


@pytest.mark.parametrize("transposed", [False, True])
def test_the_model_says_the_target(transposed):
    f, params, corpus, prompts = setting(transposed)
    statistics = key_covariance(f, params, corpus, "down")
    edited = rome(f, params, prompts, statistics=statistics, **{**OPTIONS, "steps": 60})
    old = last(f(params, prompts)).argmax(-1)
    assert (old != 5).all() and (last(f(edited, prompts)).argmax(-1) == 5).all()
    changed = {key for key in params.keys(True, True) if not torch.equal(params[key], edited[key])}
    assert changed == {("down", "weight")}
    assert torch.linalg.matrix_rank(edited["down", "weight"] - params["down", "weight"]) == 1
    assert edited["embed", "weight"].data_ptr() == params["embed", "weight"].data_ptr()


def test_the_edited_module_maps_the_key_to_the_value():
    f, params, corpus, prompts = setting()
    edited = rome(f, params, prompts, statistics=key_covariance(f, params, corpus, "down"), **OPTIONS)
    found = optimize_value(f, params, prompts, **OPTIONS)
    key = key_at(f, params, prompts, "down", 1)
    CLOSE(edited["down", "weight"] @ key + edited["down", "bias"], found.value)
    CLOSE(found.value - found.delta, params["down", "weight"] @ key + params["down", "bias"])


def test_the_first_loss_is_the_mean_log_probability_and_losses_fall():
    f, params, _, prompts = setting()
    losses = optimize_value(f, params, prompts, **OPTIONS).losses
    CLOSE(losses[0], F.cross_entropy(last(f(params, prompts)), torch.tensor([5, 5])))
    assert losses[-1] < 0.7 * losses[0] and losses.shape == (20,)


def test_a_list_of_prompts_is_the_batch():
    f, params, _, prompts = setting()
    whole = optimize_value(f, params, prompts, **OPTIONS)
    parts = optimize_value(f, params, [prompts[:1], prompts[1:]], **OPTIONS)
    own = optimize_value(f, params, prompts, **{**OPTIONS, "position": torch.tensor([1, -2])})
    for other in (parts, own):
        CLOSE(other.value, whole.value, rtol=1e-6)


def test_the_norm_is_limited_and_penalised():
    f, params, _, prompts = setting()
    before = optimize_value(f, params, prompts, **{**OPTIONS, "norm_factor": 0.0})
    value = (before.value - before.delta).norm()
    short = optimize_value(f, params, prompts, **{**OPTIONS, "norm_limit": 0.1, "norm_factor": 0.0})
    CLOSE(short.delta.norm(), 0.1 * value, rtol=1e-6)
    shrunk = optimize_value(f, params, prompts, **{**OPTIONS, "norm_factor": 10.0})
    assert shrunk.delta.norm() < before.delta.norm()


def test_preserved_predictions_stay_nearer():
    f, params, _, prompts = setting()
    keep = torch.tensor([[7, 2]])

    def divergence(factor):
        delta = optimize_value(f, params, prompts, preserve=keep, preserve_position=0, kl_factor=factor, **OPTIONS).delta
        shift = torch.zeros(1, 2, 8).double()
        shift[0, 0] = delta
        new = last(perturb(f, "down")(params, keep, {"down": shift})).log_softmax(-1)
        old = last(f(params, keep)).log_softmax(-1)
        return (old.exp() * (old - new)).sum()

    assert divergence(10.0) < 0.5 * divergence(0.0)


def test_targets_of_several_tokens():
    f, params, _, prompts = setting()
    options = {**OPTIONS, "target": torch.tensor([5, 4]), "logits": lambda out: out["logits"][:, -2:]}
    found = optimize_value(f, params, prompts, **options)
    logits = f(params, prompts)["logits"][:, -2:].log_softmax(-1)
    CLOSE(found.losses[0], -(logits[:, 0, 5] + logits[:, 1, 4]).mean())


def test_a_classifier_without_positions():
    torch.manual_seed(0)
    f, params = functionalize(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5)).double())
    x = torch.randn(3, 4).double()
    statistics = key_covariance(f, params, [torch.randn(50, 4).double()], "0")
    edited = rome(f, params, x[:1], site="0", position=None, target=2, statistics=statistics)
    assert f(edited, x[:1]).argmax() == 2


def test_under_vmap_over_models_and_one_prompt():
    f, params, _, prompts = setting()
    run = partial(rome, f, prompts=prompts[:1], statistics=torch.eye(16).double(), **{**OPTIONS, "steps": 3})
    both = vmap(lambda p: run(p))(torch.stack([params, params * 0.9]))
    CLOSE(both["down", "weight"][1], run(params * 0.9)["down", "weight"])


@pytest.mark.compile
def test_compiled():
    f, params, _, prompts = setting()

    def edit(params, prompts):
        return rome(f, params, prompts, statistics=torch.eye(16).double(), **{**OPTIONS, "steps": 2})["down", "weight"]

    CLOSE(torch.compile(edit, backend="aot_eager", fullgraph=True)(params, prompts), edit(params, prompts))


def test_nothing_is_changed():
    f, params, _, prompts = setting()
    before = params.clone()
    rome(f, params, prompts, statistics=torch.eye(16).double(), **{**OPTIONS, "steps": 3})
    assert all(torch.equal(params[key], before[key]) for key in before.keys(True, True))


def test_evaluation():
    """Logits that are the inputs: every number by hand."""
    f = lambda params, x: x * params  # noqa: E731
    x = torch.tensor([[0.0, 1.0, 5.0], [2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]).double()
    found = efficacy(f, 1.0, x, target=1, original=0)
    p = x.softmax(-1)
    assert found.success == pytest.approx(2 / 3) and found.top == pytest.approx(1 / 3)
    CLOSE(found.margin, (p[:, 1] - p[:, 0]).mean())
    unlike = specificity(f, 1.0, -1.0, x, target=1, original=0)
    q = (-x).softmax(-1)
    assert unlike.success == pytest.approx(2 / 3) and unlike.agreement == 0
    CLOSE(unlike.divergence, (p * (p / q).log()).sum(-1).mean())
    whole = evaluate_edit(f, 1.0, -1.0, x, target=1, original=0, paraphrases=[x[:1], x[1:]], neighbours=x)
    CLOSE(whole.paraphrase, whole.efficacy)
    CLOSE(whole.specificity, unlike)
    assert evaluate_edit(f, 1.0, 1.0, x, target=1, original=0).specificity is None


def test_bad_input():
    f, params, _, prompts = setting()
    run = partial(rome, f, params, prompts)
    eye = torch.eye(16).double()
    with pytest.raises(errors.InputError, match="statistics is None"):
        run(statistics=None, **OPTIONS)
    with pytest.raises(errors.InputError, match="statistics are those of 5 numbers"):
        run(statistics=torch.eye(5), **OPTIONS)
    with pytest.raises(errors.ParamsError, match="has no parameter"):
        rome(*functionalize(nn.Sequential(nn.ReLU())), torch.ones(1, 3), site="0", position=None, target=0, statistics=eye)
    with pytest.raises(errors.SiteError, match="is not one module"):
        run(statistics=eye, **{**OPTIONS, "site": "down:in"})
    with pytest.raises(errors.TargetError, match="target=20 is out of range"):
        run(statistics=eye, **{**OPTIONS, "target": 20})
    with pytest.raises(errors.TargetError, match=r"target is 1\.5"):
        run(statistics=eye, **{**OPTIONS, "target": 1.5})
    with pytest.raises(errors.TargetError, match="give logits="):
        run(statistics=eye, **{**OPTIONS, "logits": None})
    with pytest.raises(errors.InputError, match="position=3 is out of range"):
        run(statistics=eye, **{**OPTIONS, "position": 3})
    with pytest.raises(errors.InputError, match="covariance is singular"):
        run(statistics=torch.zeros(16, 16), **OPTIONS)
    with pytest.raises(errors.InputError, match="the weight at '0' is square"):
        rome(
            *functionalize(nn.Sequential(nn.Linear(3, 3))), torch.ones(1, 3), site="0", position=None, target=0, statistics=eye
        )
    with pytest.raises(errors.InputError, match="prompts is empty"):
        efficacy(f, params, [], target=0, original=1)
    with torch.no_grad(), pytest.raises(errors.GradientError, match="grad mode is off"):
        optimize_value(f, params, prompts, **OPTIONS)
