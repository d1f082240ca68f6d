"""Claims about all commands, and about two on a finished run: predict and evaluate."""

import importlib
import io
import json
import os
import pathlib
import sys

import pytest

import data
import train
from data import InputError
from extras import evaluate, predict, setup
from extras.checkpoints import read_safetensors, write_safetensors
from extras.flags import command
from test_heterolora import copy_builtin
from test_heterolora import run as train_a_little

EXTRAS = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("runs") / "a")
    flags = ["--train-limit", "64", "--holdout", "0.25", "--max-steps", "2", "--head-warmup", "8"]
    flags += ["--precision", "float32", "--device", "cpu", "--out", folder]
    assert train.main(flags) == 0
    return folder


def test_evaluate_gives_the_figures_of_the_run(run, capsys):
    evaluate.main([run])
    result = json.load(open(run + "/result.json"))
    assert f"accuracy {result['last']:.4f}" in capsys.readouterr().out
    assert evaluate.evaluate_run(run) == result["dev"]


def test_evaluate_makes_batches_as_the_run_did(run, monkeypatch):
    made = []
    make_split = data.Split

    def note(examples, tokenizer, max_length, device, precision):
        made.append((max_length, precision))
        return make_split(examples, tokenizer, max_length, device, precision)

    model = train.load_run(run)
    model.args.precision = "bfloat16"
    monkeypatch.setattr(train, "load_run", lambda *arguments: model)
    monkeypatch.setattr(data, "Split", note)
    evaluate.evaluate_run(run)
    assert made == [(128, "bfloat16")]


def test_evaluate_takes_the_examples_that_the_run_held_out(tmp_path):
    folder = str(tmp_path / "a")
    flags = ["--train-limit", "200", "--holdout", "0.2", "--max-steps", "1", "--out", folder]
    flags += ["--head-warmup", "8", "--precision", "float32", "--device", "cpu"]
    assert train.main(flags) == 0
    assert evaluate.evaluate_run(folder) == json.load(open(folder + "/result.json"))["dev"]


def test_evaluate_keeps_to_the_held_out_part_of_a_task_that_has_moved(tmp_path, monkeypatch):
    rows = [f"text {i}\t{i % 2}" for i in range(60)]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "train.tsv").write_text("\n".join(["text\tlabel", *rows]))
    (tmp_path / "mine" / "dev.tsv").write_text("text\tlabel\nelse\t0\n")
    folder = str(tmp_path / "a")
    monkeypatch.setattr(setup, "check_flags", lambda args: None)  # a task without a checkpoint
    flags = ["--method", "head", "--task", str(tmp_path / "mine"), "--holdout", "0.25"]
    assert train.main([*flags, "--max-steps", "1", "--out", folder]) == 0
    (tmp_path / "there").mkdir()
    (tmp_path / "mine").rename(tmp_path / "there" / "mine")
    expected = json.load(open(folder + "/result.json"))["dev"]
    assert evaluate.evaluate_run(folder, str(tmp_path / "there" / "mine")) == expected
    (tmp_path / "there" / "mine").rename(tmp_path / "other")
    dev = evaluate.evaluate_run(folder, str(tmp_path / "other"))
    assert len(dev["right"]) < len(expected["right"])


def test_what_the_terminal_cannot_show_is_written_as_an_escape(run, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(predict, "predict", lambda model, examples: [("naïve", 0.5)])
    predict.main([run, "a", "b"])
    assert out.buffer.getvalue() == b"label na\\xefve | probability 0.5000\n"


@pytest.fixture
def broken(run):
    """Give a model that the run has learned, whose head has lost a number."""
    model = train.load_run(run)
    model.head[0].bias.data[0] = float("nan")
    return model


def test_predict_refuses_to_answer_with_a_probability_that_is_not_finite(broken):
    with pytest.raises(InputError, match="no finite probability"):
        predict.predict(broken, [("a cook .", "a doctor .")])


def test_a_loss_on_the_dev_set_that_is_not_finite_is_no_result(broken):
    examples = [("a cook .", "a doctor .", 0)]
    split = data.Split(examples, broken.tokenizer, max_length=16, device="cpu")
    with pytest.raises(FloatingPointError, match="loss on the dev set is nan"):
        train.evaluate(broken, split, data.accuracy)


def test_evaluate_gives_the_metric_of_the_run_also_for_another_task(tmp_path):
    folder = str(tmp_path / "a")
    flags = ["--train-limit", "64", "--max-steps", "1", "--metric", "matthews", "--out", folder]
    flags += ["--head-warmup", "8", "--precision", "float32", "--holdout", "0.25"]
    assert train.main(flags) == 0
    values = evaluate.evaluate_run(folder, "paraphrase")
    assert list(values) == ["matthews", "accuracy", "loss", "right"]


def test_evaluate_refuses_a_task_of_another_form(run, capsys):
    with pytest.raises(SystemExit, match="2"):
        evaluate.main([run, "--task", "sentiment"])
    assert "sentiment has 1" in capsys.readouterr().err


def answer(monkeypatch, capsys, run, content):
    """Run predict on the bytes of standard input -> (exit status, lines, error)"""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
    status = 0
    try:
        predict.main([run])
    except SystemExit as stop:
        status = stop.code
    captured = capsys.readouterr()
    return status, captured.out.splitlines(), captured.err


def test_predict_answers_texts_and_lines_alike(run, capsys, monkeypatch):
    predict.main([run, "a doctor helps a cook .", "a cook helps a doctor ."])
    (alone,) = capsys.readouterr().out.splitlines()
    lines = b"a doctor helps a cook .\ta cook helps a doctor .\r\n" * 70 + b"\t"
    status, answers, _ = answer(monkeypatch, capsys, run, lines)
    assert status == 0
    assert len(answers) == 71
    assert set(answers[:70]) == {alone}
    assert alone.startswith("label ")


@pytest.mark.parametrize("bad", [b"only one text\n", b"a\tb\tc\n", b"a\t\xff\n"])
def test_predict_answers_all_lines_before_a_bad_one_and_names_it(run, capsys, monkeypatch, bad):
    lines = b"a cook .\ta doctor .\n" * 40 + bad + b"a cook .\ta doctor .\n"
    status, answers, error = answer(monkeypatch, capsys, run, lines)
    assert status == 2
    assert len(answers) == 40
    assert "line 41" in error


def test_predict_refuses_one_text_where_two_are_wanted_and_a_closed_input(run, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        predict.main([run, "only one"])
    assert "2 text(s)" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit, match="2"):
        predict.main([run])
    assert "closed" in capsys.readouterr().err


def test_a_command_whose_output_nobody_reads_any_more_ends_without_a_word(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as out:  # its last flush, at the end, would fail too
        monkeypatch.setattr(sys, "stdout", out)
        with pytest.raises(SystemExit, match="1"):
            command(lambda argv: print("a line"))()
    assert capsys.readouterr().err == ""


COMMANDS = [path.stem for path in EXTRAS.glob("*.py") if "\n@command\n" in path.read_text()]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("arguments", [["file", ""], ["file", "--flag="]])
def test_an_empty_argument_is_refused_by_every_command(name, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        importlib.import_module(f"extras.{name}").main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert "argument 2 is empty" in line


def test_a_command_that_is_stopped_says_so_in_one_line(capsys):
    @command
    def main(argv):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        main([])
    assert capsys.readouterr().err == "stopped\n"


@pytest.mark.parametrize("budget", ["9" * 5000, "9" * 400 + "%", "0." + "9" * 400])
def test_a_budget_of_very_many_digits_is_refused(budget):
    with pytest.raises(InputError, match="want 25% or 0.25, or a number up to 1,000 parameters"):
        train.parse_budget(budget, 1000)


def test_a_batch_is_at_most_the_whole_training_set():
    args = train.parse_args(["--train-limit", "9", "--batch-size", "9" * 15, "--method", "head"])
    train.prepare(args)
    assert args.batch_size == 9


def test_an_encoder_that_is_too_short_for_the_examples_is_refused_and_leaves_no_folder(
    tmp_path, capsys
):
    folder = copy_builtin(tmp_path / "model", max_position_embeddings=2)
    path = os.path.join(folder, "model.safetensors")
    tensors = read_safetensors(path)
    name = next(name for name in tensors if "position_embeddings" in name)
    tensors[name] = tensors[name][:2]
    write_safetensors(path, tensors)
    out = tmp_path / "a"
    assert train_a_little("--method", "head", "--model", folder, out=out) == 2
    assert "max_length 2: special tokens alone take 3" in capsys.readouterr().err
    assert not out.exists()
