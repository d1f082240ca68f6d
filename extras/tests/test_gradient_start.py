"""Claims about --init gradient."""

import json

import pytest
import torch

import data
import heterolora
import train
from extras.gradient_start import gradient_rows, start_along_gradients
from extras.warm_up import warmed_up
from heterolora import set_ranks
from test_heterolora import loss_fn, make_batches, make_model, run


def test_A_takes_the_first_right_singular_vectors_of_the_gradient_at_its_usual_length():
    model, adapters = make_model(["v"], [], trained=False)
    set_ranks(adapters, {"layers.1.v": 2, "layers.2.v": 3})
    batches = make_batches()
    rows = gradient_rows(model, adapters, batches, loss_fn)
    assert set(rows) == {adapters["layers.1.v"], adapters["layers.2.v"]}
    host = model.encoder.layers[1].v.host
    host.weight.requires_grad_(True)
    loss = sum(loss_fn(model, batch) for batch in batches) / 2
    (G,) = torch.autograd.grad(loss, host.weight)
    _, _, Vh = torch.linalg.svd(G)
    adapter = adapters["layers.1.v"]
    for k, row in enumerate(rows[adapter]):
        assert abs(torch.cosine_similarity(row, Vh[k], dim=0)) == pytest.approx(1, abs=1e-4)
        assert row.norm().item() == pytest.approx(1, rel=1e-5)


def test_no_other_A_of_the_same_length_gives_B_a_larger_gradient():
    model, adapters = make_model(["v"], [], rank=1, trained=False)
    batches = make_batches()
    adapter = adapters["layers.1.v"]
    rows = gradient_rows(model, adapters, batches, loss_fn)[adapter]
    length = rows.norm()
    norms = []
    directions = [torch.randn(16, generator=torch.Generator().manual_seed(i)) for i in range(30)]
    for direction in [rows[0], *directions]:
        adapter.A.data[0] = direction / direction.norm() * length
        loss = sum(loss_fn(model, batch) for batch in batches) / 2
        (gradient,) = torch.autograd.grad(loss, adapter.B)
        norms.append(gradient.norm().item())
    assert norms[0] == max(norms)


def test_a_gradient_that_is_not_finite_is_said():
    model, adapters = make_model(["q"], [])
    model.encoder.layers[0].q.host.weight.data.fill_(torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        gradient_rows(model, adapters, make_batches(), loss_fn)


@pytest.mark.parametrize("method", ["lora", "dynamic"])
def test_a_run_starts_from_other_values_with_it(tmp_path, method):
    losses = []
    for init in ("random", "gradient"):
        flags = ["--method", method, "--init", init, "--budget", "6000", "--shortcuts", "none"]
        assert run(*flags, "--holdout", "0.2", out=tmp_path / init) == 0
        result = json.loads((tmp_path / init / "result.json").read_text())
        losses.append(result["dev"]["loss"])
        assert 0 < result["params_active"] <= 6000
    assert losses[0] != losses[1]


def test_the_gradient_is_that_after_the_warm_up_of_the_head():
    flags = ["--method", "lora", "--shortcuts", "none", "--train-limit", "32", "--rank", "1"]
    flags += ["--head-warmup", "20"]
    args = train.parse_args([*flags, "--probe-batches", "2", "--precision", "float32"])
    task, tokenizer, model, adapters = train.prepare(args)
    split = data.Split(task.train, tokenizer, 32, model.head[0].weight.device)
    start_along_gradients(args, model, adapters, split)
    batches = split.sample(2, args.batch_size, train.generator(0, "first probing"))
    module = model.encoder.layers[1].v
    with warmed_up(args, model, adapters, split):
        module.host.weight.requires_grad_(True)
        loss = sum(train.loss_fn(model.eval(), batch) for batch in batches) / 2
        (G,) = torch.autograd.grad(loss, module.host.weight)
    _, _, Vh = torch.linalg.svd(G)
    cosine = torch.cosine_similarity(module.adapter.A[0], Vh[0], dim=0)
    assert abs(cosine.item()) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("method, lack", [("head", "adapters"), ("full", "adapters"),
                                          ("alora", "warm-up for a gradient")])  # fmt: skip
def test_a_method_without_adapters_or_warm_up_has_nothing_to_start(capsys, method, lack):
    assert train.main(["--method", method, "--init", "gradient"]) == 2
    assert f"--method {method} has no {lack}: leave --init out" in capsys.readouterr().err


@pytest.mark.parametrize(
    "warm_up", [["--warmup-steps", "9", "--lr", "0.05"], ["--head-warmup", "9"]]
)
def test_rows_have_the_norm_of_those_that_they_replace_after_any_warm_up(warm_up):
    flags = ["--method", "lora", "--shortcuts", "none", "--train-limit", "32", "--rank", "2"]
    args = train.parse_args([*flags, *warm_up, "--precision", "float32"])
    task, tokenizer, model, adapters = train.prepare(args)
    heterolora.set_ranks(adapters, dict.fromkeys(adapters, 2))
    before = {name: adapter.A.detach().clone() for name, adapter in adapters.items()}
    start_along_gradients(
        args, model, adapters, data.Split(task.train, tokenizer, 32, model.head[0].weight.device)
    )
    for name, adapter in adapters.items():
        assert not torch.allclose(adapter.A, before[name])
        torch.testing.assert_close(adapter.A.norm(dim=1), before[name].norm(dim=1))
        assert not adapter.B.any()


def test_a_run_that_stopped_before_its_first_step_goes_on_to_the_same_result(tmp_path, monkeypatch):
    flags = ["--method", "lora", "--init", "gradient", "--shortcuts", "none", "--warmup-steps", "4"]
    flags += ["--train-limit", "64", "--holdout", "0.5", "--max-steps", "2"]
    assert run(*flags, out=tmp_path / "whole") == 0

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train, "fit", stop)
        assert run(*flags, out=tmp_path / "cut") == 130
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    whole, cut = (torch.load(tmp_path / name / "adapters.pt") for name in ("whole", "cut"))
    torch.testing.assert_close(whole["adapters"], cut["adapters"], rtol=0, atol=0)


def test_another_kind_than_lora_is_refused(capsys):
    assert train.main(["--method", "lora", "--adapter", "xs", "--init", "gradient"]) == 2
    assert "--init gradient is for LoRA" in capsys.readouterr().err
