"""Claims about SynFlow, the proxy that sees no data."""

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

from extras.adapters import LoRAXS
from extras.synflow import _Linearised
from heterolora import HeteroLoRA, inject
from model import ACTIVATIONS
from test_heterolora import make_batches, make_model, score


def test_synflow_is_the_flow_through_a_linear_network_of_absolute_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    adapters = inject(model, ["1", "3"], [], rank=2, alpha=3)
    for adapter in adapters.values():
        nn.init.normal_(adapter.B)
    batch = (torch.tensor([1, 2]),), torch.tensor([0, 1])
    scores = score(model, adapters, [batch], "synflow")

    weights = {}
    for name, adapter in adapters.items():
        weights[name] = (adapter.A.detach().abs(), adapter.B.detach().abs())

    def total(scales):  # R as a function of factors on the parameters of both modules
        x = torch.ones(4, dtype=torch.double)
        for name in ("1", "3"):
            A, B = (w.double() * s for w, s in zip(weights[name], scales[name], strict=True))
            host = model.get_submodule(name).host
            x = host.weight.double().abs() @ x + host.bias.double().abs() + 1.5 * B @ (A @ x)
        return x.sum()

    # sum of theta * dR/dtheta over a tensor is the derivative of R by a factor on that tensor
    for name in ("1", "3"):
        expected = 0
        for i in range(2):
            scales = {"1": [1.0, 1.0], "3": [1.0, 1.0]}
            scales[name][i] = 1 + 1e-6
            up = total(scales)
            scales[name][i] = 1 - 1e-6
            expected += (up - total(scales)) / 2e-6
        assert scores[name] == pytest.approx(expected.item(), rel=1e-6)


def test_synflow_does_not_look_at_the_labels_and_gives_q_and_k_zero():
    model, adapters = make_model()
    (inputs, labels), _ = make_batches()
    scores = score(model, adapters, [(inputs, labels)], "synflow")
    assert scores == score(model, adapters, [(inputs, (labels + 1) % 3)], "synflow")
    for name, value in scores.items():
        assert (value == 0) == name.endswith((".q", ".k")), name


def test_a_layer_norm_is_its_gain_and_bias_alone():
    norm = nn.LayerNorm(2)
    norm.weight.data, norm.bias.data = torch.tensor([2.0, 3.0]), torch.tensor([0.5, 0.0])
    with _Linearised():
        assert norm(torch.tensor([[10.0, -1.0]])).tolist() == [[20.5, -3.0]]


def test_inputs_may_be_numbers_and_the_loss_must_be_one_that_it_knows():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    adapters = inject(model, ["0"], [], rank=2, alpha=2)
    nn.init.normal_(adapters["0"].B)
    x, labels = torch.randn(5, 4), torch.zeros(5, dtype=torch.long)

    def score_with(loss):
        search = HeteroLoRA(model, adapters, 0, lambda model, x: loss(model(x), labels), "synflow")
        return search.score([x])["0"]

    assert score_with(F.cross_entropy) > 0
    with pytest.raises(ValueError, match="must call cross_entropy or mse_loss with the logits"):
        score_with(lambda logits, labels: F.nll_loss(logits.log_softmax(1), labels))


def test_what_an_adapter_has_frozen_counts_by_its_absolute_value_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    adapters = inject(model, ["0"], [], rank=2, alpha=2, adapter=LoRAXS)
    nn.init.normal_(adapters["0"].R)
    batch = (torch.randn(5, 4),), torch.zeros(5, dtype=torch.long)
    expected = score(model, adapters, [batch], "synflow")
    adapters["0"].A.neg_()
    adapters["0"].B[:2].neg_()
    assert score(model, adapters, [batch], "synflow") == expected


def test_synflow_takes_every_activation_and_attention_for_linear():
    x = torch.tensor([[0.1, -0.2]])
    with _Linearised():
        for name, function in ACTIVATIONS.items():
            assert torch.equal(function(x), x), name
        assert x.softmax(-1).tolist() == [[0.5, 0.5]]
        attended = F.scaled_dot_product_attention(x.T, x.T, x.T)
    assert attended.tolist() == [[pytest.approx(-0.05)]] * 2
