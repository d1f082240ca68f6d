"""Scores against plain autograd, singular values and brute force, on a small encoder."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import heterolora
from extras.proxies import host_gradient  # the import registers the scores
from heterolora import SHORTCUTS, TARGETS, HeteroLoRA, inject, set_ranks
from model import Classifier, Encoder, EncoderConfig

CONFIG = EncoderConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=8,
)
OFF = ("encoder.layers.0.q", "encoder.layers.1.shortcut_ffn")


def loss_fn(model, batch):
    ids, labels = batch
    return F.cross_entropy(model(ids, torch.ones_like(ids)), labels)


@pytest.fixture
def search_space():
    """Give a model in eval mode, adapters of which two are off, and batches, all in float64."""
    torch.manual_seed(0)
    model = Classifier(Encoder(CONFIG), 2)
    adapters = inject(model, TARGETS, SHORTCUTS, rank=2, alpha=4, shortcut_alpha=1)
    model.double().eval()
    for adapter in adapters.values():
        up(adapter).data.normal_(std=0.3)
    set_ranks(adapters, {name: 2 for name in adapters if name not in OFF})
    batches = [(torch.randint(20, (3, 5)), torch.tensor([0, 1, 1])) for _ in range(2)]
    return model, adapters, batches


def up(adapter):
    """Return B, the last of the adapter's parameters."""
    parameter, _ = adapter.active(adapter.max_rank)[-1]
    return parameter


def score(proxy, model, adapters, batches, loss_fn=loss_fn):
    return HeteroLoRA(model, adapters, 0, loss_fn, proxy).score(batches)


def mean_loss(model, batches):
    return sum(loss_fn(model, batch) for batch in batches) / len(batches)


def autograd_host_gradients(model, adapters, batches):
    """Return {name: dL/dW} of the mean loss, with the full matrices made trainable.

    A shortcut has none, so x + dW x becomes M x with M = 1 + dW, and dW x becomes M x with M = dW.
    """
    matrices = {}
    for name, adapter in adapters.items():
        module = model.get_submodule(name)
        if isinstance(module.host, torch.nn.Linear):
            matrices[name] = module.host.weight.requires_grad_()
            continue
        M = adapter(torch.eye(8).double()).T.detach()  # dW, 0 if it is off
        if type(module.host) is torch.nn.Identity:
            M = M + torch.eye(8)
        matrices[name] = M.requires_grad_()
        module.forward = lambda x, M=M: F.linear(x, M)
    gradients = torch.autograd.grad(mean_loss(model, batches), list(matrices.values()))
    return dict(zip(matrices, gradients, strict=True))


def test_host_grad_is_the_squared_gradient_of_the_full_matrix(search_space):
    model, adapters, batches = search_space
    scores = score("host-grad", *search_space)
    for name, G in autograd_host_gradients(*search_space).items():
        assert scores[name] == pytest.approx(float(adapters[name].scale ** 2 * (G**2).sum()))
        assert scores[name] > 0


def test_a_function_may_score_what_two_measures_give_under_two_names(search_space, monkeypatch):
    monkeypatch.setattr(heterolora, "PROXIES", dict(heterolora.PROXIES))
    before = score("grad-norm", *search_space)
    heterolora.proxy("norm-of-G", host_gradient)(heterolora.grad_norm)
    assert score("grad-norm", *search_space) == before
    name = "encoder.layers.1.v"
    scale = search_space[1][name].scale
    squared = score("host-grad", *search_space)[name]
    assert score("norm-of-G", *search_space)[name] == pytest.approx(squared**0.5 / scale)


def test_spectral_is_the_largest_singular_values_squared(search_space):
    model, adapters, batches = search_space
    scores = score("spectral", *search_space)
    for name, G in autograd_host_gradients(*search_space).items():
        largest = torch.linalg.svdvals(G)[:2]
        assert scores[name] == pytest.approx((adapters[name].scale ** 2 * largest**2).tolist())


def test_host_snip_is_of_the_host_and_0_for_a_shortcut(search_space):
    model, adapters, batches = search_space
    scores = score("host-snip", *search_space)
    for name, G in autograd_host_gradients(*search_space).items():
        expected = 0.0
        if name.split(".")[-1] in TARGETS:
            expected = (model.get_submodule(name).host.weight * G).abs().sum().item()
        assert scores[name] == pytest.approx(expected)


def test_fisher_sums_squared_gradients_of_single_examples(search_space):
    model, adapters, batches = search_space
    for name in OFF:
        up(adapters[name]).data.zero_()  # so that it can be on and still add nothing
    scores = score("fisher", *search_space)
    set_ranks(adapters, dict.fromkeys(adapters, 2))
    parameters = [up(adapter) for adapter in adapters.values()]
    expected = dict.fromkeys(adapters, 0.0)
    for ids, labels in batches:
        for i in range(3):
            loss = loss_fn(model, (ids[i : i + 1], labels[i : i + 1]))
            gradients = torch.autograd.grad(loss, parameters)
            for name, gradient in zip(adapters, gradients, strict=True):
                expected[name] += float(gradient.square().sum()) / len(batches)
    assert scores == pytest.approx(expected)


def test_ablation_is_the_loss_without_minus_the_loss_with(search_space):
    model, adapters, batches = search_space
    ranks = {name: adapter.rank for name, adapter in adapters.items()}
    scores = score("ablation", *search_space)
    assert ranks == {name: adapter.rank for name, adapter in adapters.items()}
    for name in adapters:
        set_ranks(adapters, ranks | {name: 0})
        without = mean_loss(model, batches)
        set_ranks(adapters, ranks | {name: 2})
        assert scores[name] == pytest.approx((without - mean_loss(model, batches)).item())


class TwoLinears(nn.Module):
    """A sum of two linear maps, so that a squared loss is quadratic in both."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(4, 3)
        self.v = nn.Linear(4, 3)

    def forward(self, x):
        return self.q(x) + self.v(x)


@pytest.mark.parametrize("rank", [2, 1])
def test_path_scores_sum_to_the_fall_of_a_quadratic_loss_by_the_ranks_that_are_on(rank):
    torch.manual_seed(0)
    model = TwoLinears()
    adapters = inject(model, ["q", "v"], [], rank=2, alpha=3)
    model.double()
    for adapter in adapters.values():
        up(adapter).data.normal_()
    set_ranks(adapters, {"q": rank, "v": rank})
    x = torch.randn(5, 4).double()

    def loss_fn(model, target):
        return (model(x) - target).square().mean()

    targets = [torch.randn(5, 3).double() for _ in range(2)]
    scores = score("path", model, adapters, targets, loss_fn)
    with_all = sum(loss_fn(model, target) for target in targets) / 2
    set_ranks(adapters, {})
    with_none = sum(loss_fn(model, target) for target in targets) / 2
    assert sum(scores.values()) == pytest.approx((with_none - with_all).item())


def test_path_of_a_module_that_is_off_is_what_it_would_add(search_space):
    model, adapters, batches = search_space
    scores = score("path", *search_space)
    for adapter in adapters.values():
        adapter.scale /= 2
    gradients = autograd_host_gradients(*search_space)
    for name, adapter in adapters.items():
        d_in = gradients[name].shape[1]
        dW = 2 * adapter(torch.eye(d_in).double(), rank=2).T
        assert scores[name] == pytest.approx(-(gradients[name] * dW).sum().item())


def test_path_puts_the_scales_back_after_an_error(search_space):
    model, adapters, batches = search_space
    before = [adapter.scale for adapter in adapters.values()]
    with pytest.raises(TypeError):
        score("path", model, adapters, [None])
    assert before == [adapter.scale for adapter in adapters.values()]


@pytest.mark.parametrize("proxy", ["host-grad", "host-snip", "spectral", "fisher"])
def test_what_is_not_finite_is_said_and_one_example_needs_no_batch(proxy):
    model = TwoLinears()
    adapters = inject(model, ["q", "v"], [], rank=2, alpha=3)

    def loss_fn(model, x):
        return model(x).square().mean()

    with pytest.raises(FloatingPointError, match=f"proxy {proxy} gives"):
        score(proxy, model, adapters, [torch.full((2, 4), torch.nan)], loss_fn)
    if proxy == "fisher":
        with pytest.raises(ValueError, match="must count examples"):
            score(proxy, model, adapters, [torch.ones(4)], loss_fn)
    else:
        alone = score(proxy, model, adapters, [torch.ones(4)], loss_fn)
        assert alone == score(proxy, model, adapters, [torch.ones(1, 4)], loss_fn)


@pytest.mark.parametrize("proxy", ["fisher", "host-grad", "spectral"])
def test_scores_of_new_adapters_are_positive(search_space, proxy):
    model, adapters, batches = search_space
    for adapter in adapters.values():
        up(adapter).data.zero_()
    for value in score(proxy, *search_space).values():
        assert torch.tensor(value).max() > 0
