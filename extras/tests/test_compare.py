"""Comparisons with a stub for training: what is run, what is kept, what is refused."""

import json
import pathlib
import statistics

import pytest

import train
from extras import compare, fast_cpu
from model import Classifier, Encoder, EncoderConfig

SIZES = {"vocab_size": 9, "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1,
         "intermediate_size": 4, "max_position_embeddings": 8}  # fmt: skip


class Task:
    train = [("a", None, 0)]
    dev = [("b", None, 1)]


@pytest.fixture
def runs(monkeypatch, tmp_path):
    """Replace loading and training by stubs; give the list of the flags of every run."""
    monkeypatch.chdir(tmp_path)
    model = Classifier(Encoder(EncoderConfig(**SIZES)), 2)
    model.checkpoint, model.form = 1, 2
    runs = []

    def prepare(flags):
        defaults = {"dynamic": "1000", "lora": "2000"}
        flags.budget = str(flags.budget or defaults.get(flags.method))
        flags.lr = flags.lr or 0.5
        return Task, None, model, {}

    def train_stub(flags):
        runs.append(flags)
        if flags.lr == 8:
            raise FloatingPointError("the loss is nan")
        last = 0.5 + 0.1 * flags.seed - flags.lr / 100 + (flags.method == "lora") * 0.01
        result = {"metric": "accuracy", "last": last, "best": last + 0.1, "params_active": 900}
        # Two of three modules are on, not the same ones for seeds that are odd.
        ranks = {"a": 1, "b": flags.seed % 2, "c": 1 - flags.seed % 2}
        result |= {"params_ever_trained": 1100, "ranks": ranks}
        return result | {"train_seconds": 3.0, "search_seconds": 1.0}

    monkeypatch.setattr(train, "prepare", prepare)
    monkeypatch.setattr(train, "train", train_stub)
    return runs


def rows(capsys):
    """Return the cells of the printed table, {contender: [cell, ...]}."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| `")]
    cells = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells}


def test_every_contender_trains_with_every_seed_and_the_same_budget(runs):
    compare.main("lora random dynamic:snip --seeds 3 4 --epochs 2".split())
    assert [(r.method, r.seed) for r in runs] == [
        (method, seed) for seed in (3, 4) for method in ("lora", "static", "dynamic")
    ]
    assert {r.budget for r in runs} == {1000}
    assert {r.epochs for r in runs} == {2}
    assert [r.proxy for r in runs[1:3]] == ["constant", "snip"]


def test_the_table_has_means_spreads_and_the_paired_difference(runs, capsys):
    compare.main(["head", "lora"])
    table = rows(capsys)
    spread = f"± {100 * statistics.stdev([0.5, 0.6, 0.7]):.2f}"
    scores = [f"59.50 {spread}", f"69.50 {spread}"]
    overlap = f"{(1 + 1 / 3 + 1 / 3) / 3:.2f}"
    last, best = scores
    assert table["head"] == ["", "3", last, "900", "1,100", "", best, overlap, "4"]
    assert table["lora"][5] == "+1.00 [+1.00, +1.00], n = 3"


def test_seeds_that_turn_nothing_on_have_no_overlap():
    assert compare.overlap([{"ranks": {}}, {"ranks": {}}]) == ""
    assert compare.overlap([{"ranks": {"a": 1}}, {"ranks": {"a": 0}}]) == "0.00"


@pytest.mark.parametrize(
    ("spec", "flags"),
    [
        ("static:grad-norm", {"method": "static", "proxy": "grad-norm", "allocator": "greedy"}),
        ("static:snip:uniform", {"proxy": "snip", "allocator": "uniform"}),
        ("random:rank=4", {"method": "static", "proxy": "constant", "rank": 4}),
        ("lora:warmup-steps=7:targets=q,v", {"warmup_steps": 7, "targets": ["q", "v"]}),
    ],
)
def test_a_contender_is_a_method_and_flags(runs, spec, flags):
    compare.main([spec, "--seeds", "0"])
    assert {name: getattr(runs[0], name) for name in flags} == flags


def test_what_has_ended_is_not_done_again(runs, capsys):
    compare.main(["lora", "random"])
    first = rows(capsys)
    compare.main(["lora", "random"])
    assert len(runs) == 6
    assert rows(capsys) == first


def test_a_run_that_is_kept_is_told_and_so_is_code_that_has_changed_since(
    runs, capsys, monkeypatch
):
    compare.main(["lora", "--seeds", "0"])
    assert "kept" not in capsys.readouterr().out
    compare.main(["lora", "--seeds", "0"])
    assert capsys.readouterr().out.splitlines()[0] == "kept    lora seed 0 lr 0.5 | accuracy 0.5050"
    monkeypatch.setattr(compare, "CODE", compare.CODE + 1)
    compare.main(["lora", "--seeds", "0"])
    assert "(by other code, or unknown: " in capsys.readouterr().out.splitlines()[0]


def test_another_flag_is_another_run_unless_the_method_does_not_use_it(runs):
    compare.main(["lora", "dynamic", "--seeds", "0"])
    compare.main(["lora", "dynamic", "--seeds", "0", "--proxy", "snip"])
    assert [r.method for r in runs] == ["lora", "dynamic", "dynamic"]


def test_a_result_names_the_processor(runs):
    compare.main(["lora", "--seeds", "0", "--results", "named.jsonl"])
    (record,) = map(json.loads, pathlib.Path("named.jsonl").read_text().splitlines())
    assert record["processor"] == fast_cpu.processor_name()


def test_a_run_on_another_processor_is_done_again(runs, monkeypatch):
    compare.main(["lora", "--seeds", "0"])
    monkeypatch.setattr(compare, "processor_name", lambda: "another")
    compare.main(["lora", "--seeds", "0"])
    compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 2


def test_a_run_of_a_model_with_another_config_or_tokenizer_is_done_again(runs, monkeypatch):
    compare.main(["lora", "--seeds", "0"])
    _, _, model, _ = train.prepare(train.parse_args([]))
    monkeypatch.setattr(model, "form", 3)
    compare.main(["lora", "--seeds", "0"])
    compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 2


def test_a_record_of_before_forms_were_kept_still_counts(runs, tmp_path):
    compare.main(["lora", "--seeds", "0"])
    path = tmp_path / "results.jsonl"
    record = json.loads(path.read_text())
    del record["form"]
    path.write_text(json.dumps(record) + "\n")
    compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 1


def test_a_run_that_another_process_ends_meanwhile_is_kept_once(runs, monkeypatch, tmp_path):
    compare.main(["lora", "--seeds", "0"])
    path = tmp_path / "results.jsonl"
    text = path.read_text()
    path.write_text("")
    alone = train.train

    def train_beside_another(flags):
        path.write_text(text)  # what the other process writes
        return alone(flags)

    monkeypatch.setattr(train, "train", train_beside_another)
    compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 2 and path.read_text() == text


def test_a_warm_up_matters_to_lora_only_where_it_starts_along_the_gradient(runs):
    for contender in ("lora", "lora:init=gradient"):
        for steps in ("0", "3"):
            compare.main([contender, "--seeds", "0", "--head-warmup", steps])
    assert [(r.init, r.head_warmup) for r in runs] == [(None, 0), ("gradient", 0), ("gradient", 3)]


def test_other_data_under_the_same_name_are_another_run(runs, monkeypatch):
    compare.main(["lora", "--seeds", "0"])
    monkeypatch.setattr(Task, "train", [("changed", None, 0)])
    compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 2


def test_runs_on_held_out_examples_are_those_of_tuning(runs, monkeypatch):
    prepare = train.prepare

    def prepare_and_split(flags):
        task, *others = prepare(flags)
        if flags.holdout:
            task = type("Split", (), {"train": [], "dev": Task.train})
        return task, *others

    monkeypatch.setattr(train, "prepare", prepare_and_split)
    compare.main("lora --lr 3 1 --seeds 0 1".split())
    assert len(runs) == 6
    compare.main("lora --lr 1 --seeds 0 1 --holdout 0.2".split())
    assert len(runs) == 6


def test_a_torn_last_line_is_left_out_and_done_again(runs, tmp_path):
    compare.main(["lora"])
    path = tmp_path / "results.jsonl"
    path.write_text(path.read_text()[:-20])
    with pytest.warns(UserWarning, match="line 3, is not whole"):
        compare.main(["lora"])
    assert [r.seed for r in runs] == [0, 1, 2, 2]
    assert json.loads(path.read_text().splitlines()[-1])["flags"]["seed"] == 2


@pytest.mark.parametrize(
    "name, value",
    [
        ("metric", None),
        ("best", None),
        ("best", "0.5"),
        ("best", float("nan")),
        ("ranks", None),
        ("ranks", [1]),
        ("ranks", {"a": ""}),
        ("train_seconds", None),
        ("search_seconds", "1"),
    ],
)
def test_a_record_that_the_table_cannot_show_is_left_out_and_done_again(
    runs, tmp_path, name, value
):
    compare.main(["lora", "--seeds", "0"])
    path = tmp_path / "results.jsonl"
    record = json.loads(path.read_text())
    record["result"][name] = value
    if value is None:
        del record["result"][name]
    path.write_text(json.dumps(record) + "\n")
    with pytest.warns(UserWarning, match="line 1, is no result"):
        compare.main(["lora", "--seeds", "0"])
    assert len(runs) == 2


def test_each_contender_chooses_its_learning_rate_on_held_out_examples(runs, capsys):
    compare.main("lora dynamic:lr=2 --lr 3 1 8 --seeds 0 1 2".split())
    tuning = [(r.method, r.lr, r.seed) for r in runs if r.holdout]
    assert tuning == [("lora", lr, seed) for lr in (1, 3, 8) for seed in (0, 1)]
    assert {r.holdout for r in runs} == {0.2, None}
    assert [cells[0] for cells in rows(capsys).values()] == ["1", "2"]


def test_as_many_seeds_as_asked_for_choose_a_learning_rate(runs):
    compare.main("lora --lr 3 1 --seeds 0 1 2 --tuning-seeds 3".split())
    assert [r.seed for r in runs if r.holdout] == [0, 1, 2, 0, 1, 2]


def test_a_run_that_diverges_is_counted_and_kept(runs, capsys):
    compare.main(["lora", "dynamic:lr=8"])
    compare.main(["lora", "dynamic:lr=8"])
    assert rows(capsys)["dynamic:lr=8"] == ["8", "0 of 3"] + [""] * 7
    assert len(runs) == 6


@pytest.mark.parametrize(
    "line",
    [
        "lora magic",
        "lora static:magic",
        "lora dynamic:rank=x",
        "lora dynamic:rank",
        "lora dynamic:budget=10%",
        "lora dynamic:seed=1",
        "lora lora:metric=f1",
        "lora --out folder",
        "lora --seed 3",
        "lora --hold 0.2",
        "lora --method static",
        "lora --seeds -1",
        "lora --results no-such-folder/results.jsonl",
        "lora --results results.jsonl.gz",
        "--epochs 1 lora",
    ],
)
def test_what_cannot_work_is_refused_before_the_first_run(runs, line, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        compare.main(line.split())
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err.splitlines()[-1]
    assert runs == []
    assert list(tmp_path.iterdir()) == []  # no results file
