"""The faster arithmetic against the plain one, and the benchmark that compares their speed."""

import copy
import dataclasses
import io
import math
import os
import pathlib
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import extras.proxies  # noqa: F401  registers fisher
import train
from data import InputError, Split
from extras import benchmark, devices, evaluate, fast_cpu
from heterolora import SHORTCUTS, TARGETS, Adapted, HeteroLoRA, LoRALinear, inject
from model import Attention, Classifier, Encoder, EncoderConfig, Layer

CONFIG = EncoderConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=12,
    max_position_embeddings=160,
)


CAPABILITIES = torch.cpu.get_capabilities()

TOLERANCE = {
    fast_cpu.PackedLinear: {"atol": 1e-5, "rtol": 0},
    fast_cpu.Int8Linear: {"atol": 0.1, "rtol": 0},
}

needs_onednn = pytest.mark.skipif(not fast_cpu.has_onednn(), reason="no oneDNN")


@pytest.fixture(params=[False, pytest.param(True, marks=needs_onednn)], ids=["Intel", "AMD"])
def linears_are_slow(request, monkeypatch):
    """Run a test as on two processors: only on one of them linears are swapped."""
    monkeypatch.setattr(fast_cpu, "has_slow_linears", lambda: request.param)
    return request.param


WITHOUT_DROPOUT = dataclasses.replace(
    CONFIG, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
)


def make_model(config=CONFIG, pooling="mean", shortcuts=SHORTCUTS):
    torch.manual_seed(0)
    model = Classifier(Encoder(config), 3, pooling)
    adapters = inject(model, TARGETS, shortcuts, rank=2, alpha=4, shortcut_alpha=1)
    for adapter in adapters.values():
        adapter.B.data.normal_(std=0.3)
    return model.eval()


def loss_and_gradients(model, T):
    """Return the loss on two sentences, one of them padded, and the gradients of what trains."""
    ids = torch.randint(20, (2, T), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, T // 2 :] = 0
    loss = F.cross_entropy(model(ids, mask), torch.tensor([0, 2]))
    trained = [p for p in model.parameters() if p.requires_grad]
    return [loss, *torch.autograd.grad(loss, trained)]


@pytest.mark.parametrize("T", [6, 150])
def test_the_loss_and_all_gradients_are_those_of_the_plain_model(linears_are_slow, T):
    model = make_model()
    plain = loss_and_gradients(model, T)
    fast_cpu.accelerate(model)
    fast = loss_and_gradients(model, T)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-6)


def test_without_dropout_training_is_the_same_on_long_and_short_sequences(linears_are_slow):
    model = make_model(WITHOUT_DROPOUT).train()
    plain = loss_and_gradients(model, 150)
    fast_cpu.accelerate(model)
    torch.testing.assert_close(loss_and_gradients(model, 150), plain, rtol=1e-4, atol=1e-6)


def tokens_that_linears_read(model):
    """Return how many tokens of sentences of 6 the linears q and fc1 of each layer read."""
    seen = []

    def see(linear, inputs, y):
        seen.append(inputs[0].shape[1])

    hooks = []
    for layer in model.encoder.layers:
        hooks += [linear.register_forward_hook(see) for linear in (layer.q, layer.fc1)]
    loss_and_gradients(model, 6)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("T", [2, 6, 150])
def test_where_the_head_reads_the_first_token_the_last_layer_computes_no_other(
    linears_are_slow, layers, T
):
    config = dataclasses.replace(WITHOUT_DROPOUT, num_hidden_layers=layers)
    shortcuts = SHORTCUTS if layers == 2 else SHORTCUTS[:2]  # a first layer has no shortcut_ffn
    model = make_model(config, "cls", shortcuts).train()
    plain = loss_and_gradients(model, T)
    assert fast_cpu.accelerate(model).endswith("last layer")
    torch.testing.assert_close(loss_and_gradients(model, T), plain, rtol=1e-4, atol=1e-6)
    assert tokens_that_linears_read(model) == [6, 6] * (layers - 1) + [1, 1]
    assert tokens_that_linears_read(model.eval()) == [6, 6] * layers  # scores may read all inputs


@pytest.mark.parametrize("proxy", ["grad-norm", "fisher"])
def test_the_scores_of_training_steps_are_those_of_the_plain_last_layer(proxy):
    scores = []
    for is_fast in (False, True):
        model = make_model(WITHOUT_DROPOUT, "cls").train()
        modules = model.encoder.named_modules()
        adapters = {name: module.adapter for name, module in modules if isinstance(module, Adapted)}
        if is_fast:
            fast_cpu.accelerate(model)
        search = HeteroLoRA(model, adapters, 0, train.loss_fn, proxy)
        with search.record():
            loss_and_gradients(model, 6)
        scores.append(search.score())
    assert len(scores[0]) == 2 * 10 - 1  # six linears and four connections, but for one shortcut
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


@needs_onednn
def test_in_8_bits_the_last_layer_of_one_token_gives_what_the_last_layer_of_all_gives():
    model = make_model(WITHOUT_DROPOUT, "cls").train()
    fast_cpu.accelerate(model, "int8")
    one = loss_and_gradients(model, 6)
    model.encoder.layers[-1].__class__ = Layer
    torch.testing.assert_close(loss_and_gradients(model, 6), one, rtol=1e-4, atol=1e-6)


def test_plain_attention_gives_one_query_what_it_gives_it_among_others():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 6, 8)
    mask = torch.tensor([6 * [True], 3 * [True] + 3 * [False]])[:, None, None]
    attention = Attention(heads=2, dropout=0.0)
    torch.testing.assert_close(attention(q[:, 2:3], k, v, mask), attention(q, k, v, mask)[:, 2:3])


def test_it_says_what_it_swapped(linears_are_slow):
    linears = ", frozen float32 linears" if linears_are_slow else ""
    model = make_model()
    assert fast_cpu.accelerate(model) == "attention, dropout" + linears
    assert fast_cpu.accelerate(model) == "nothing"
    assert fast_cpu.accelerate(make_model(), "bfloat16") == "attention, dropout"
    assert fast_cpu.accelerate(make_model(pooling="cls"), "bfloat16") == (
        "attention, dropout, last layer"
    )
    assert type(model.head[0]) is nn.Linear
    assert type(model.head[2]) is nn.Dropout


@needs_onednn
@pytest.mark.parametrize(
    "name, has_avx512, is_slow",
    [("AMD EPYC", True, True), ("AMD EPYC", False, False), ("Intel Xeon", True, False)],
)
def test_linears_are_slow_on_amd_processors_with_avx512(monkeypatch, name, has_avx512, is_slow):
    said = CAPABILITIES | {"cpu_name": name, "avx512_f": has_avx512}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: said)
    assert fast_cpu.has_slow_linears() == is_slow


def test_the_search_space_is_the_same_before_and_after(linears_are_slow):
    plain = Classifier(Encoder(CONFIG), 3)
    fast = Classifier(Encoder(CONFIG), 3)
    fast_cpu.accelerate(fast)
    expected = list(inject(plain, TARGETS, SHORTCUTS, rank=2, alpha=4))
    assert list(inject(fast, TARGETS, SHORTCUTS, rank=2, alpha=4)) == expected
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in plain.named_modules()]
    assert list(fast.state_dict()) == list(plain.state_dict())
    assert isinstance(fast.encoder.layers[0].q, LoRALinear)
    assert isinstance(fast.encoder.layers[0].q.host, nn.Linear)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropout_drops_the_stated_share_and_keeps_the_mean(p):
    torch.manual_seed(0)
    y = fast_cpu.dropout(torch.ones(1001, 999), p)
    assert (y == 0).float().mean().item() == pytest.approx(round(p * 256) / 256, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=4e-3)
    assert len(y.unique()) == 2


def test_dropout_drops_neighbours_independently():
    torch.manual_seed(0)
    dropped = (fast_cpu.dropout(torch.ones(800_000), 0.5) == 0).view(-1, 8).float()
    correlations = torch.corrcoef(dropped.T) - torch.eye(8)  # between the 8 bytes of a word
    assert correlations.abs().max() < 5 / math.sqrt(len(dropped))
    assert dropped.mean(0).sub(0.5).abs().max() < 5 * 0.5 / math.sqrt(len(dropped))


def test_dropout_of_everything_gives_zeros_and_evaluation_has_none():
    x = torch.ones(100)
    assert fast_cpu.dropout(x, 1.0).count_nonzero() == 0
    assert fast_cpu.FastDropout(0.5).eval()(x) is x
    assert fast_cpu.FastDropout(0.0)(x) is x


def test_attention_weights_are_dropped_in_training():
    torch.manual_seed(0)
    x = torch.ones(1, 150, 8)
    mask = torch.ones(1, 1, 1, 150, dtype=torch.bool)
    attention = fast_cpu.FastAttention(heads=2, dropout=0.5)
    y = attention(x, x, x, mask)  # equal weights over equal values: 1, without dropout
    assert 0.01 < (y - 1).abs().mean() < 0.2
    torch.testing.assert_close(attention.eval()(x, x, x, mask), x)


@pytest.mark.parametrize("T, training, fused", [(128, False, 0), (129, False, 1), (129, True, 0)])
def test_only_long_sequences_without_dropout_go_to_the_fused_kernel(
    T, training, fused, monkeypatch
):
    calls = []
    kernel = F.scaled_dot_product_attention

    def count(*args, **options):
        calls.append(args)
        return kernel(*args, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", count)
    x = torch.ones(1, T, 8)
    mask = torch.ones(1, 1, 1, T, dtype=torch.bool)
    fast_cpu.FastAttention(heads=2, dropout=0.5).train(training)(x, x, x, mask)
    assert len(calls) == fused


def test_a_row_of_padding_alone_gives_finite_numbers():
    model = make_model()
    fast_cpu.accelerate(model)
    ids = torch.ones(2, 5, dtype=torch.long)
    mask = torch.tensor([[1] * 5, [0] * 5])
    assert model(ids, mask).isfinite().all()


@pytest.fixture
def fast_products(monkeypatch):
    """Give a list that gets an entry with every product of a PackedWeight."""
    calls = []
    times = fast_cpu.PackedWeight.times

    def count(*args):
        calls.append(args)
        return times(*args)

    monkeypatch.setattr(fast_cpu.PackedWeight, "times", count)
    return calls


@needs_onednn
@pytest.mark.parametrize("shape", [(3, 5, 8), (2, 3, 4, 8), (1, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_weight_gives_what_linear_gives(fast_products, shape, bias):
    torch.manual_seed(0)
    linear = fast_cpu.PackedLinear(8, 6, bias=bias).requires_grad_(False)
    x = torch.randn(shape, requires_grad=True)
    y = linear(x)
    torch.testing.assert_close(y, F.linear(x, linear.weight, linear.bias))
    d = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, d)
    torch.testing.assert_close(gradient, d @ linear.weight)
    assert len(fast_products) == 2  # forward and backward


@needs_onednn
@pytest.mark.parametrize("kind", [fast_cpu.PackedLinear, fast_cpu.Int8Linear])
def test_inputs_and_gradients_need_not_be_contiguous(kind):
    linear = kind(8, 6).requires_grad_(False)
    x = torch.randn(8, 5, requires_grad=True)
    d = torch.randn(6).expand(5, 6)
    y = linear(x.T)
    torch.testing.assert_close(y, linear(x.T.contiguous()))
    (gradient,) = torch.autograd.grad(y, x, d)
    torch.testing.assert_close(gradient, (d @ linear.weight).T, **TOLERANCE[kind])


def test_a_linear_that_trains_and_other_inputs_take_the_plain_way(fast_products):
    linear = fast_cpu.PackedLinear(8, 6)
    linear(torch.randn(3, 5, 8)).sum().backward()
    assert linear.weight.grad is not None
    linear.weight.requires_grad_(False)
    linear.bias.grad = None
    linear(torch.randn(3, 5, 8)).sum().backward()
    assert linear.bias.grad is not None
    linear.requires_grad_(False)
    assert linear(torch.randn(0, 5, 8)).shape == (0, 5, 6)
    with pytest.raises(RuntimeError, match="same dtype"):
        linear(torch.randn(3, 8, dtype=torch.bfloat16))
    linear.to(torch.float64)
    assert linear(torch.randn(3, 5, 8, dtype=torch.float64)).dtype == torch.float64
    assert fast_products == []


@needs_onednn
@pytest.mark.parametrize("kind", [fast_cpu.PackedLinear, fast_cpu.Int8Linear])
def test_a_weight_that_was_changed_is_packed_anew(kind):
    linear = kind(8, 6).requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    before = linear(x)
    copy_before = linear.forward_weight
    assert torch.equal(linear(x), before)
    assert linear.forward_weight is copy_before
    linear.load_state_dict({"weight": torch.zeros(6, 8), "bias": torch.ones(6)})
    assert torch.equal(linear(x), torch.ones(3, 6))
    linear.weight.data = torch.ones(6, 8)
    y = linear(x)
    torch.testing.assert_close(y, 1 + x.sum(1, keepdim=True).expand(3, 6), **TOLERANCE[kind])
    with torch.no_grad():
        linear.weight.fill_(2)  # the gradient of y is still that of ones
    (gradient,) = torch.autograd.grad(y, x, torch.ones(3, 6))
    torch.testing.assert_close(gradient, torch.full((3, 8), 6.0), **TOLERANCE[kind])


def rounded_product(x, W):
    """Return W x with the rows of W in 7 bits and x in 8, straight from the formula, in float64."""
    x, W = x.double(), W.double()
    x_scale = x.abs().amax(1, keepdim=True) / 127
    w_scale = W.abs().amax(1, keepdim=True) / 63
    return ((x / x_scale).round() * x_scale) @ ((W / w_scale).round() * w_scale).T


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_in_8_bits_is_the_product_of_rounded_numbers_both_ways(bias):
    torch.manual_seed(0)
    linear = fast_cpu.Int8Linear(40, 30, bias=bias).requires_grad_(False)
    x = torch.randn(2, 7, 40) * torch.logspace(-3, 3, 7)[:, None]  # every token in its own range
    x.requires_grad_()
    y = linear(x)
    expected = rounded_product(x.detach().view(14, 40), linear.weight).view(2, 7, 30)
    expected = expected if linear.bias is None else expected + linear.bias
    torch.testing.assert_close(y, expected.float(), rtol=1e-4, atol=1e-6)
    d = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, d)
    expected = rounded_product(d.view(14, 30), linear.weight.T).view(2, 7, 40)
    torch.testing.assert_close(gradient, expected.float(), rtol=1e-4, atol=1e-6)


@needs_onednn
def test_the_largest_sums_in_8_bits_are_right_with_the_instructions_of_AVX2():
    source = """if True:
        import torch
        from extras.fast_cpu import Int8Weight
        x = torch.ones(999)
        W = torch.ones(8, 999)
        print(Int8Weight(W).times(torch.stack([x, -x]), None).round().tolist())
    """
    options = {
        "env": os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        "cwd": pathlib.Path(__file__).parents[2],
    }
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.stdout == f"{[[999.0] * 8, [-999.0] * 8]}\n", done.stderr


@needs_onednn
def test_in_8_bits_zeros_stay_zeros_and_a_fault_is_not_hidden():
    linear = fast_cpu.Int8Linear(4, 3, bias=False).requires_grad_(False)
    x = torch.tensor([[0.0] * 4, [1, 2, 3, math.nan], [1, 2, 3, math.inf]], requires_grad=True)
    assert (fast_cpu.largest(x.detach())[0] > 0).all()  # 0 / 0 is no whole number
    y = linear(x)
    assert y[0].tolist() == [0, 0, 0]
    assert not y[1:].isfinite().any()
    (gradient,) = torch.autograd.grad(y, x, y.detach())
    assert gradient[0].tolist() == [0, 0, 0, 0]
    assert not gradient[1:].isfinite().any()


@needs_onednn
def test_in_8_bits_the_gradients_of_the_adapters_point_the_same_way():
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, hidden_size=64, intermediate_size=128)
    model = make_model(config)
    nn.init.normal_(model.head[3].weight)  # so that the loss tells what the encoder gives
    exact = copy.deepcopy(model)
    fast_cpu.accelerate(exact)
    assert fast_cpu.accelerate(model, "int8") == "attention, dropout, frozen linears in 8 bits"
    exact = loss_and_gradients(exact, 20)
    rounded = loss_and_gradients(model, 20)
    assert rounded[0] != exact[0]
    assert rounded[0].item() == pytest.approx(exact[0].item(), rel=0.02)
    for gradient, expected in zip(rounded[1:], exact[1:], strict=True):
        assert (gradient - expected).norm() < 0.2 * expected.norm()


@needs_onednn
@pytest.mark.parametrize("kind", [fast_cpu.PackedLinear, fast_cpu.Int8Linear])
def test_packed_weights_are_made_anew_in_a_copy_and_not_stored(kind):
    linear = kind(8, 6).requires_grad_(False)
    names = list(linear.state_dict())
    x = torch.randn(3, 8)
    with torch.inference_mode():
        y = linear(x)
    assert list(linear.state_dict()) == names
    assert linear.backward_weight is None  # which only a gradient needs
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    for twin in (copy.deepcopy(linear), torch.load(file, weights_only=False)):
        assert torch.equal(twin(x), y)
    x.requires_grad_()  # the copies of inference mode serve in training too
    (gradient,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(gradient, linear.weight.sum(0).expand(3, 8), atol=0.1, rtol=0)


def test_a_linear_that_trains_or_is_in_another_precision_is_not_rounded():
    linear = fast_cpu.Int8Linear(8, 6)
    x = torch.randn(3, 8)
    assert torch.equal(linear(x), F.linear(x, linear.weight, linear.bias))
    linear.requires_grad_(False).double()
    assert torch.equal(linear(x.double()), F.linear(x.double(), linear.weight, linear.bias))
    assert linear.float()(torch.randn(0, 8)).shape == (0, 6)
    assert linear.forward_weight is None


def test_8_bits_are_refused_where_the_device_cannot(monkeypatch):
    monkeypatch.setattr(devices, "find_device", lambda name: torch.device("cuda"))
    with pytest.raises(InputError, match="int8 needs an x86 CPU"):
        train.prepare(train.parse_args(["--precision", "int8"]))


@needs_onednn
def test_a_run_in_8_bits_is_evaluated_as_it_was_trained(tmp_path, capsys):
    flags = "--device cpu --precision int8 --train-limit 64 --holdout 0.5 --max-steps 3"
    flags += " --head-warmup 4"
    result = train.train(train.parse_args([*flags.split(), "--out", str(tmp_path / "a")]))
    values = evaluate.evaluate_run(tmp_path / "a")
    assert values["loss"] == result["dev"]["loss"]
    assert "frozen linears in 8 bits" in capsys.readouterr().out


class Letters:
    """A tokenizer that makes a token of every letter."""

    pad_id = 0

    def encode(self, text, pair, max_length):
        return [ord(letter) for letter in text[:max_length]], [0] * min(len(text), max_length)


@pytest.mark.parametrize("precision, lengths", [("float32", [3, 9, 12]), ("bfloat16", [8, 12, 12])])
def test_a_batch_is_as_long_as_its_longest_text_in_bfloat16_rounded_up(precision, lengths):
    texts = ["abc", "a" * 9, "a" * 99]
    examples = [(text, None, 0) for text in texts]
    split = Split(examples, Letters(), 12, "cpu", precision)
    assert [split[[0, i]][0][0].shape[1] for i in range(3)] == lengths


def test_training_makes_batches_for_its_precision(monkeypatch):
    made = []

    def note(examples, tokenizer, max_length, device, precision):
        made.append(precision)
        return Split(examples[:1], tokenizer, max_length, device, precision)

    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "Split", note)
    monkeypatch.setattr(train, "fit", stop)
    flags = ["--method", "head", "--device", "cpu", "--precision", "bfloat16"]
    assert train.main(flags) == 130
    assert made == ["bfloat16", "bfloat16"]


def test_the_benchmark_prints_every_way_and_the_share_of_the_search(capsys):
    flags = ["--train-limit", "64", "--batch-size", "8", "--targets", "q", "--shortcuts", "none"]
    benchmark.main([*flags, "--steps", "2"])
    printed = capsys.readouterr().out
    for start in ("machine", "plain, all on", "all on", "a quarter on", "recorded", "search"):
        assert "\n" + start in "\n" + printed
    ways = re.findall(r"([\d.]+) ms/step .* samples/s \| ([\d.]+) times plain", printed)
    assert len(ways) == 4
    plain = float(ways[0][0])
    for milliseconds, ratio in ways:
        assert float(ratio) == pytest.approx(plain / float(milliseconds), rel=0.05)


def test_the_benchmark_refuses_what_has_nothing_to_search_or_record(capsys):
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--train-limit", "8", "--method", "head"])
    assert "no modules" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        benchmark.main(["--train-limit", "8", "--proxy", "constant"])
    assert "--proxy constant" in capsys.readouterr().err


def test_beside_peft_both_train_the_same_ranks_on_the_same_texts_and_their_times_are_compared(
    monkeypatch, capsys
):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    beside_peft = types.ModuleType("beside_peft")
    text = (pathlib.Path(__file__).parents[2] / "docs" / "SPEED.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], vars(beside_peft))
    steps = []

    def noted(step):
        def note(way, *arguments):
            seconds = step(way, *arguments)
            steps.append((way, arguments[-1], seconds))
            return seconds

        return note

    for kind in (beside_peft.Theirs, benchmark.Way):
        monkeypatch.setattr(kind, "step", noted(kind.step))
    flags = ["--train-limit", "64", "--batch-size", "8", "--rank", "4"]
    beside_peft.compare(train.parse_args(flags + beside_peft.OURS), steps=3)
    theirs, ours = zip(*steps[::2], strict=True), zip(*steps[1::2], strict=True)
    (their_ways, their_texts, their_seconds), (our_ways, our_texts, our_seconds) = theirs, ours
    assert their_texts == our_texts and len(their_texts) == beside_peft.UNCOUNTED + 3
    lora = [p for name, p in their_ways[0].model.named_parameters() if "lora_" in name]
    assert sum(p.numel() for p in lora) == train.size(our_ways[0].adapters)
    ratios = [a / b for a, b in zip(their_seconds[-3:], our_seconds[-3:], strict=True)]
    printed = capsys.readouterr().out
    assert f"ratio {sum(ratios) / 3:.2f} ± {torch.tensor(ratios).std():.2f}" in printed
