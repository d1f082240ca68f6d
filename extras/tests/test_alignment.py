"""Claims about the scores that need neither labels nor gradients."""

import pytest
import torch
import torch.nn as nn

import extras.alignment  # noqa: F401  registers the scores
from heterolora import HeteroLoRA, inject
from test_heterolora import make_batches, make_model, score


def feature_norm(W, z):
    """Return NFN of one input, with the norms written out."""
    Wz = sum(sum(w * x for w, x in zip(row, z, strict=True)) ** 2 for row in W) ** 0.5
    W_norm = sum(w * w for row in W for w in row) ** 0.5
    z_norm = sum(x * x for x in z) ** 0.5
    return len(z) ** 0.5 * Wz / (W_norm * z_norm)


def test_it_is_the_mean_of_the_formula_over_real_tokens():
    model, adapters = make_model(shortcuts=["residual_attn"])
    batches = make_batches()
    inputs = []
    host = model.encoder.layers[1].v.host
    host.register_forward_hook(lambda module, args, y: inputs.append(args[0]))
    scores = score(model, adapters, batches, "alignment")
    expected = []
    for x, ((_, mask), _) in zip(inputs, batches, strict=True):
        for z in x[mask.bool()].tolist():
            expected.append(feature_norm(host.weight.tolist(), z))
    assert scores["layers.1.v"] == pytest.approx(-sum(expected) / len(expected), rel=1e-4)
    assert scores["layers.1.residual_attn"] == -1


def test_a_weight_of_zeros_gives_a_number():
    model, adapters = make_model(["v"], [])
    torch.nn.init.zeros_(model.encoder.layers[1].v.host.weight)
    assert score(model, adapters, make_batches(), "alignment")["layers.1.v"] == 0


def test_a_linear_that_no_input_reaches_is_bought_last():
    model = nn.ModuleDict({"used": nn.Linear(4, 3), "unused": nn.Linear(4, 3)})
    nn.init.constant_(model["used"].weight, 1.0)  # magnifies what points along it: NFN > 1
    adapters = inject(model, ["used", "unused"], [], 2, 2)

    def loss_fn(model, x):
        return model["used"](x).sum()

    def loss_fn_with_no_tokens(model, x):  # as an expert has that no token is sent to
        return model["used"](x).sum() + model["unused"](x[:0]).sum()

    for name in ("alignment", "misalignment"):
        for loss in (loss_fn, loss_fn_with_no_tokens):
            scores = HeteroLoRA(model, adapters, 0, loss, name).score([torch.ones(5, 4)])
            assert scores["unused"] < scores["used"]


BY_SCORE = ["greedy", "greedy-ranks", "greedy-separated", "breadth", "within-layer"]


@pytest.mark.parametrize("allocator", BY_SCORE)
def test_a_layer_that_no_input_reaches_is_bought_last_where_scores_count(allocator):
    layers = [nn.ModuleDict({"q": nn.Linear(4, 3), "v": nn.Linear(4, 3)}) for _ in range(2)]
    model = nn.ModuleDict({"0": layers[0], "1": layers[1]})
    nn.init.constant_(model["0"]["v"].weight, 1.0)  # NFN 2: the worst score of its layer
    adapters = inject(model, ["q", "v"], [], 1, 2)

    def loss_fn(model, x):
        return (model["0"]["q"](x) + model["0"]["v"](x)).sum()

    search = HeteroLoRA(model, adapters, 14, loss_fn, "alignment", allocator)  # two modules of 7
    ranks = search.reallocate([torch.ones(5, 4)])["ranks"]
    assert ranks == {"0.q": 1, "0.v": 1, "1.q": 0, "1.v": 0}


def test_a_linear_that_no_input_reaches_does_not_count_for_its_type():
    layers = [nn.ModuleDict({"q": nn.Linear(4, 3), "v": nn.Linear(4, 3)}) for _ in range(2)]
    model = nn.ModuleDict({"0": layers[0], "1": layers[1]})
    adapters = inject(model, ["q", "v"], [], 2, 2)

    def loss_fn(model, x):
        return (model["0"]["q"](x) + model["0"]["v"](x) + model["1"]["v"](x)).sum()

    def scores(name):
        return HeteroLoRA(model, adapters, 0, loss_fn, name).score([torch.ones(5, 4)])

    by_type, alone = scores("alignment-by-type"), scores("alignment")
    assert by_type["0.q"] == alone["0.q"]
    assert by_type["1.q"] < min(by_type["0.q"], by_type["0.v"])


def test_the_formula_is_the_norm_of_W_z_over_that_of_W_times_a_gaussian_as_long():
    torch.manual_seed(0)
    W, z = torch.randn(30, 20), torch.randn(20)
    gaussians = torch.randn(20_000, 20)
    gaussians *= z.norm() / gaussians.norm(dim=1, keepdim=True)
    mean_square = (gaussians @ W.T).square().sum(1).mean()
    expected = (W @ z).norm() / mean_square.sqrt()
    assert feature_norm(W.tolist(), z.tolist()) == pytest.approx(expected.item(), rel=0.01)


def test_padding_does_not_count():
    model, adapters = make_model(["q", "fc2"], [])
    ((ids, mask), labels) = make_batches(1)[0]
    changed = ids.clone()
    changed[mask == 0] = 39
    scores = score(model, adapters, [((ids, mask), labels)], "alignment")
    assert scores == pytest.approx(
        score(model, adapters, [((changed, mask), labels)], "alignment"), rel=1e-5
    )


def test_padding_does_not_count_where_the_mask_comes_in_kwargs():
    model, adapters = make_model(["q"], [])
    ((ids, mask), labels) = make_batches(1)[0]

    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, ids, **kwargs):
            return self.inner(ids, kwargs["attention_mask"])

    def loss_fn(wrapper, ids):
        return wrapper(ids, attention_mask=mask).sum()

    search = HeteroLoRA(Wrapper(), adapters, 0, loss_fn, "alignment")
    expected = search.score([ids])
    assert search.score([ids.masked_fill(mask == 0, 39)]) == pytest.approx(expected, rel=1e-5)


def test_labels_do_not_count_and_the_control_is_the_opposite():
    model, adapters = make_model()
    ((inputs, labels),) = make_batches(1)
    scores = score(model, adapters, [(inputs, labels)], "alignment")
    assert scores == score(model, adapters, [(inputs, (labels + 1) % 3)], "alignment")
    opposite = score(model, adapters, [(inputs, labels)], "misalignment")
    assert scores == {name: -value for name, value in opposite.items()}


def test_by_type_all_modules_of_a_type_have_their_mean():
    model, adapters = make_model(["q", "v"], [])
    batches = make_batches()
    scores = score(model, adapters, batches, "alignment")
    by_type = score(model, adapters, batches, "alignment-by-type")
    mean = sum(scores[f"layers.{layer}.v"] for layer in range(3)) / 3
    assert by_type["layers.0.v"] == by_type["layers.2.v"] == pytest.approx(mean)


def test_a_model_without_a_mask_is_scored_on_all_inputs():
    model = nn.Sequential(nn.Linear(4, 3))
    adapters = inject(model, ["0"], [], 2, 2)
    x = torch.randn(5, 4)
    search = HeteroLoRA(model, adapters, 0, lambda model, x: model(x).sum(), "alignment")
    scores = search.score([x])
    W = model[0].host.weight.tolist()
    assert scores["0"] == pytest.approx(-sum(feature_norm(W, z) for z in x.tolist()) / 5, rel=1e-5)
