"""Claims about plans: the model stays as it was, and PEFT trains what the plan says, exactly."""

import contextlib
import copy
import json
import re
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import heterolora
import train
from data import Split
from extras.plan import exact_patterns, exact_targets, rank_pattern

ROOT = Path(__file__).resolve().parents[2]


class Toy(nn.Module):
    """A small language model with what is easily disturbed: tied weights, buffers, dropout."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            self.blocks.append(nn.ModuleDict({"q": nn.Linear(8, 8), "up": nn.Linear(8, 16)}))
        self.norm = nn.BatchNorm1d(8)
        self.lm_head = nn.Linear(8, 20, bias=False)
        self.lm_head.weight = self.embed.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, ids):
        self.calls += 1
        self.norm.running_mean = self.norm.running_mean + 1  # a new tensor in the buffer's place
        x = self.embed(ids).flatten(0, 1)
        for block in self.blocks:
            x = F.dropout(x + block["q"](x), training=self.training)
            x = x + block["up"](x)[:, :8].to(block["up"].weight.dtype)  # T5 reads a weight so
        return self.lm_head(self.norm(x))


def make_toy():
    torch.manual_seed(0)
    toy = Toy()
    toy(BATCHES[0]).square().mean().backward()  # gradients, which are to stay
    toy.blocks[1].requires_grad_(False)
    toy.blocks[2].eval()
    toy.blocks[0]["q"].register_forward_hook(lambda module, inputs, y: y * 2)
    toy.blocks[0]["q"].weight.register_hook(lambda gradient: gradient * 2)
    return toy


BATCHES = [torch.arange(10).view(2, 5), torch.arange(8, 18).view(2, 5)]


def loss_fn(model, ids):
    return F.cross_entropy(model(ids), ids.flatten())


def parts(model):
    """Return the objects that a model is made of."""
    return [*model.modules(), *model.parameters(), *model.buffers()]


def values(model):
    """Return everything else about a model, and the random state, as numbers and names."""
    found = [torch.get_rng_state().tolist(), [name for name, _ in model.named_modules()]]
    for module in model.modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        found.append([module.training, *map(list, hooks)])
    for parameter in model.parameters():
        grad = None if parameter.grad is None else (id(parameter.grad), parameter.grad.tolist())
        hooks = list(parameter._backward_hooks or [])
        found.append([parameter.tolist(), parameter.requires_grad, grad, hooks])
    for buffer in model.buffers():
        found.append(buffer.tolist())
    return found


@contextlib.contextmanager
def unchanged(model):
    """Check that a model is the same afterwards, bit for bit."""
    objects, numbers = parts(model), values(model)
    yield
    assert all(now is then for now, then in zip(parts(model), objects, strict=True))
    assert values(model) == numbers


def test_the_model_stays_as_it_was_bit_for_bit():
    toy = make_toy()
    with unchanged(toy):
        plan = rank_pattern(toy, BATCHES, loss_fn, 500, ["q", "up", "lm_head"], rank=2)
    assert plan.modules
    toy.zero_grad()
    loss_fn(toy, BATCHES[0]).backward()
    assert toy.blocks[0]["q"].weight.grad is not None


@pytest.mark.parametrize("culprit", ["proxy", "loss", "allocator", "rank", "budget", "checkpoint"])
def test_the_model_stays_as_it_was_when_something_fails(monkeypatch, culprit):
    def fail(*arguments):
        torch.rand(1)
        raise ArithmeticError

    fail.measure = None
    monkeypatch.setitem(heterolora.PROXIES, "failing", fail)
    monkeypatch.setitem(heterolora.ALLOCATORS, "failing", fail)

    def checkpointed(model, ids):
        with torch.no_grad():
            return model(ids).sum()

    changes = {
        "proxy": {"proxy": "failing"},
        "loss": {"loss_fn": fail},
        "allocator": {"allocator": "failing"},
        "rank": {"rank": 9, "targets": ["up", "q"]},  # fails after some adapters are in
        "budget": {"budget": 1},
        "checkpoint": {"loss_fn": checkpointed},
    }
    asked = dict(loss_fn=loss_fn, budget=500, targets=["q", "up"], rank=2) | changes[culprit]
    toy = make_toy()
    with unchanged(toy):
        with pytest.raises((ArithmeticError, ValueError, RuntimeError)):
            rank_pattern(toy, BATCHES, **asked)


class Made(TorchDispatchMode):
    """Note the size in bytes of every tensor that an operation makes, and the operations' names."""

    def __init__(self, model):
        super().__init__()
        self.own = {tensor.untyped_storage().data_ptr() for tensor in model.parameters()}
        self.sizes = []
        self.names = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = operation(*args, **(kwargs or {}))
        self.names.append(str(operation))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.own:  # else it is a view of a weight
                    self.sizes.append(storage.nbytes())
        return made


@pytest.mark.parametrize("proxy", ["grad-norm", "alignment", "host-grad"])
def test_nothing_as_large_as_a_weight_is_made_and_no_gradient_unless_the_proxy_asks(proxy):
    layers = [nn.Embedding(99, 64), nn.Linear(64, 64), nn.Linear(64, 99), nn.Flatten(0, 1)]
    model = nn.Sequential(*layers)
    with Made(model) as made:
        rank_pattern(model, BATCHES, loss_fn, 500, ["1"], rank=2, proxy=proxy)
    smallest_weight = 64 * 64 * 4
    assert (max(made.sizes) >= smallest_weight) == (proxy == "host-grad")
    assert any("backward" in name for name in made.names) == (proxy != "alignment")


@pytest.mark.filterwarnings("ignore:all scores are 0")
@pytest.mark.parametrize("allocator", ["greedy", "greedy-ranks", "uniform"])
@pytest.mark.parametrize(
    "proxy", ["constant", "grad-norm", "snip", "synflow", "ablation", "spectral", "alignment"]
)
def test_any_proxy_and_allocator_will_do(proxy, allocator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 8), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    batches = [(torch.tensor([5, 6, 7, 8]), torch.tensor([0, 1, 2, 3]))]
    with unchanged(model):
        plan = rank_pattern(
            model,
            batches,
            lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
            budget=90,
            targets=["1", "3"],
            rank=3,
            proxy=proxy,
            allocator=allocator,
        )
    paid = sum(rank * {"1": 8 + 16, "3": 16 + 4}[name] for name, rank in plan.modules.items())
    assert 0 < plan.parameters == paid <= 90


def test_modules_of_rank_0_are_left_out_and_the_scale_is_equal(monkeypatch):
    ranks = {"blocks.0.q": 1, "blocks.1.q": 0, "blocks.2.up": 3}  # and nothing of blocks.0.up
    monkeypatch.setitem(heterolora.ALLOCATORS, "fixed", lambda *arguments: dict(ranks))
    toy = make_toy()
    plan = rank_pattern(toy, BATCHES, loss_fn, 88, ["q", "up"], rank=3, alpha=12, allocator="fixed")
    assert len(plan.scores) == 6
    assert plan.modules == {"blocks.0.q": 1, "blocks.2.up": 3}
    assert plan.target_modules == ["blocks.0.q", "blocks.2.up"]
    assert list(plan.ranks.values()) == [1, 3]
    assert list(plan.alphas.values()) == [4, 12]
    assert list(plan.ranks) == list(plan.alphas)
    assert plan.parameters == 1 * (8 + 8) + 3 * (8 + 16)


def test_the_seed_breaks_ties():
    toy = make_toy()
    first_bought = set()
    for seed in range(8):
        plan = rank_pattern(toy, BATCHES, loss_fn, 32, ["q"], 2, proxy="constant", seed=seed)
        first_bought.update(plan.modules)
    assert first_bought == {"blocks.0.q", "blocks.1.q", "blocks.2.q"}


def test_a_plan_is_the_static_search_of_train_py(tmp_path):
    flags = "--shortcuts none --train-limit 64 --holdout 0.5 --precision float32".split()
    static = "--method static --head-warmup 0 --max-steps 1 --budget 4096 --seed 3 --out".split()
    assert train.main([*flags, *static, str(tmp_path / "run")]) == 0
    lines = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    entry = json.loads(lines[1])

    args = train.parse_args([*flags, "--method", "head", "--seed", "3"])
    task, tokenizer, model, _ = train.prepare(args)
    model.eval()
    split = Split(task.train, tokenizer, args.max_length, model.head[0].weight.device)
    batches = split.sample(8, args.batch_size, train.generator(3, "first probing"))
    plan = rank_pattern(
        model.encoder,
        batches,
        lambda encoder, batch: train.loss_fn(model, batch),
        budget=4096,
        targets=["q", "v"],
        seed=3,
    )
    assert plan.modules == {name: rank for name, rank in entry["ranks"].items() if rank > 0}
    assert plan.parameters == entry["parameters"]
    assert plan.scores == pytest.approx(entry["scores"], rel=1e-3)


@pytest.mark.parametrize("allocator", ["greedy", "greedy-ranks", "breadth", "within-layer"])
def test_a_warning_says_that_all_scores_are_zero_whatever_the_allocator(allocator):
    with pytest.warns(UserWarning, match="all scores are 0: a random draw"):
        rank_pattern(make_toy(), BATCHES, loss_fn, 500, ["q"], proxy="snip", allocator=allocator)


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"budget": "25%"}, "budget '25%': want a whole number of adapter parameters"),
        ({"budget": 0}, "budget 0: want a whole number"),
        ({"budget": 31}, "the cheapest module costs 32 parameters, 16 with one rank"),
        ({"budget": 40, "allocator": "uniform"}, "one rank of all modules costs 48"),
        ({"targets": "q"}, "targets 'q': want a list of names"),
        ({"targets": []}, "want a list of names"),
        ({"targets": ["c_attn"]}, "the model has no 'c_attn'; it has: lm_head, q, up"),
        ({"proxy": "nonsense"}, "proxy 'nonsense': want one of constant, grad-norm"),
        ({"allocator": "nonsense"}, "allocator 'nonsense': want one of greedy"),
        ({"batches": []}, "nothing to score: give batches"),
    ],
)
def test_bad_input_is_one_clear_line(changes, message):
    asked = dict(batches=BATCHES, budget=500, targets=["q"], rank=2) | changes
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        rank_pattern(make_toy(), loss_fn=loss_fn, **asked)
    assert len(str(raised.value)) < 250 and "\n" not in str(raised.value)


class Attention(nn.Module):
    """Attention that hands its linear's weights on, in place of calling it."""

    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2)
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(8))
        x = self.first(x * self.cache)
        return self.inner(x, x, x)[0]


def test_a_linear_that_is_not_called_is_refused_and_a_buffer_of_the_first_pass_goes():
    model = Attention()
    names = list(model.state_dict())
    batches = [torch.randn(5, 1, 8)]
    plan = rank_pattern(model, batches, lambda model, x: model(x).square().sum(), 500, ["first"])
    assert plan.modules and list(model.state_dict()) == names
    with pytest.raises(ValueError, match="MultiheadAttention computes with its linears' weights"):
        rank_pattern(model, batches, lambda model, x: model(x).sum(), 500, ["out_proj"])


def test_a_model_in_bfloat16_and_batches_from_an_iterator_will_do():
    toy = make_toy().bfloat16()
    plan = rank_pattern(toy, iter(BATCHES), loss_fn, 32, ["q"], rank=2)
    assert all(score > 0 for score in plan.scores.values())
    assert {p.dtype for p in toy.parameters()} == {torch.bfloat16}


def test_an_adapter_lies_on_the_device_of_its_linear():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, device="meta"))
    adapters = heterolora.inject(model, ["0", "1"], [], rank=2, alpha=2)
    assert [adapter.A.device.type for adapter in adapters.values()] == ["cpu", "meta"]


# ------------------------------------------------------------------------------------ PEFT's names

AWKWARD = (
    "q",
    "x.q",
    "layers.1.q",
    "layers.11.q",
    "layers_1.q",
    "draft.layers.1.q",
    "model.layers.0.q_proj",
    "decoder.model.layers.0.q_proj",
    "a+b.q",
    "aab.q",
)


def build(names):
    """Return a module with a linear of each name."""
    model = nn.Module()
    for name in names:
        parent = model
        *path, last = name.split(".")
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        parent.add_module(last, nn.Linear(4, 4))
    model.forward = lambda x: x
    return model


def peft_targets(target_modules, name):
    """Tell whether PEFT gives a module an adapter."""
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return name in target_modules or name.endswith(tuple(f".{end}" for end in target_modules))


def peft_finds(patterns, name, rule):
    """Return what PEFT finds for a module in rank_pattern; None: nothing."""
    for key, value in patterns.items():
        if re.match(rule.replace("KEY", key), name):
            return value
    return patterns.get(name)


CHOICES = [[name] for name in AWKWARD] + [list(AWKWARD[::2]), list(AWKWARD[1::2]), list(AWKWARD)]


def as_adapters(names):
    """Return stand-ins for adapters of rank 1, 2, 3, 1, ..."""
    return {name: types.SimpleNamespace(rank=1 + i % 3, scale=2.0) for i, name in enumerate(names)}


@pytest.mark.parametrize("rule", [r"(.*\.)?(KEY)$", r".*\.KEY$"])  # of PEFT 0.15, and before it
@pytest.mark.parametrize("names", CHOICES)
def test_names_catch_no_other_module(names, rule):
    model = build(AWKWARD)
    targets = exact_targets(model, names)
    assert [name for name in AWKWARD if peft_targets(targets, name)] == names
    adapters = as_adapters(names)
    ranks, alphas = exact_patterns(adapters)
    for name in AWKWARD:
        rank = adapters[name].rank if name in names else None
        assert peft_finds(ranks, name, rule) == rank
        assert peft_finds(alphas, name, rule) == (rank and 2.0 * rank)


MANY = [f"layers.{i}.{last}" for i in range(12) for last in "qv"]  # from 20 on PEFT shortens lists


@pytest.mark.parametrize("names", [*CHOICES, MANY[1:-1]])
def test_peft_catches_no_other_module(names):
    peft = pytest.importorskip("peft")
    model = build(set(names) | set(AWKWARD if names in CHOICES else MANY))
    adapters = as_adapters(names)
    ranks, alphas = exact_patterns(adapters)
    config = peft.LoraConfig(
        r=4,
        target_modules=exact_targets(model, names),
        rank_pattern=ranks,
        alpha_pattern=alphas,
    )
    adapted = peft.get_peft_model(model, config)
    found = {}
    for name, module in adapted.base_model.model.named_modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            found[name] = module.r["default"]
            assert module.scaling["default"] == 2.0
    assert found == {name: adapter.rank for name, adapter in adapters.items()}


# ---------------------------------------------------------------------------- Hugging Face's models

SIZES = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
TEXT = SIZES | dict(vocab_size=64)
IDS = torch.arange(3, 31).view(2, 14)
MODELS = {  # kind: (its sizes, targets)
    "OPT": (TEXT | dict(ffn_dim=48, word_embed_proj_dim=32), ["q_proj", "v_proj", "fc2"]),
    "Llama": (TEXT | dict(intermediate_size=48, num_key_value_heads=2), ["q_proj", "down_proj"]),
    "Qwen2": (
        TEXT | dict(intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True),
        ["v_proj", "o_proj", "lm_head"],
    ),
    "GPTNeoX": (TEXT | dict(intermediate_size=48), ["query_key_value", "dense_4h_to_h"]),
    "Qwen3Moe": (
        TEXT
        | dict(moe_intermediate_size=16, num_experts=4)
        | dict(num_experts_per_tok=2, num_key_value_heads=2),
        ["q_proj", "v_proj"],
    ),
    "T5": (
        dict(vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
        | dict(decoder_start_token_id=0),
        ["q", "wo"],
    ),
    "ViT": (SIZES | dict(intermediate_size=48, image_size=16, patch_size=8), None),
}
CLASSES = {"T5": "ForConditionalGeneration", "ViT": "ForImageClassification"}


def make_model(transformers, kind):
    """Return a small random model with a batch and targets."""
    sizes, targets = MODELS[kind]
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    config = getattr(transformers, f"{kind}Config")(**sizes)
    torch.manual_seed(0)
    model = getattr(transformers, kind + CLASSES.get(kind, "ForCausalLM"))(config)
    batch = dict(input_ids=IDS, labels=IDS)
    if kind == "ViT":
        batch = dict(pixel_values=torch.rand(2, 3, 16, 16), labels=torch.tensor([0, 1]))
        linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
        targets = sorted({name.split(".")[-1] for name in linears if "attention" in name})
    return model.eval(), batch, targets


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Model with `tie_word_embeddings")
@pytest.mark.parametrize("kind", MODELS)
def test_peft_computes_and_trains_what_the_plan_says(kind):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    model, batch, targets = make_model(transformers, kind)
    with unchanged(model):
        plan = rank_pattern(
            model,
            [batch],
            lambda model, batch: model(**batch).loss,
            budget=700,
            targets=targets,
            rank=4,
            proxy="spectral",
            allocator="greedy-ranks",
        )
    ours = copy.deepcopy(model)
    adapters = heterolora.inject(ours, targets, [], rank=4, alpha=16)
    heterolora.set_ranks(adapters, plan.modules)

    config = peft.LoraConfig(
        r=4,
        target_modules=plan.target_modules,
        rank_pattern=plan.ranks,
        alpha_pattern=plan.alphas,
    )
    theirs = peft.get_peft_model(model, config).eval()
    trained = sum(p.numel() for p in theirs.parameters() if p.requires_grad)
    assert 600 < trained == plan.parameters <= 700

    with torch.no_grad():
        plain = theirs(**batch).logits
        for name, rank in plan.modules.items():
            adapter = adapters[name]
            adapter.B.normal_()
            layer = theirs.base_model.model.get_submodule(name)
            layer.lora_A["default"].weight.copy_(adapter.A[:rank])
            layer.lora_B["default"].weight.copy_(adapter.B[:, :rank])
        logits = theirs(**batch).logits
        torch.testing.assert_close(ours(**batch).logits, logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing_is_no_obstacle():
    transformers = pytest.importorskip("transformers")
    model, batch, targets = make_model(transformers, "Llama")
    plan = {}
    for step in ("without", "with"):
        plan[step] = rank_pattern(model, [batch], lambda m, b: m(**b).loss, 1000, targets, rank=4)
        model.gradient_checkpointing_enable()
        model.train()
    assert plan["with"] == plan["without"]


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_layer_of_another_kind_is_refused_by_name():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4)
    model = transformers.GPT2LMHeadModel(config)
    with pytest.raises(ValueError, match="the model has no 'c_attn'; it has: lm_head"):
        rank_pattern(model, [IDS], lambda m, ids: m(ids, labels=ids).loss, 1000, ["c_attn"])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_example_of_the_readme_runs(capsys):
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    (example,) = re.findall(r"```py\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(example, names)
    plan = names["plan"]
    assert f"trainable params: {plan.parameters:,} " in capsys.readouterr().out
