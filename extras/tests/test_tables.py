"""Claims about a folder of your own data."""

import io
import json
import pathlib
import sys

import pytest

import data
import train
from data import InputError
from extras import predict, setup

pytestmark = pytest.mark.filterwarnings("ignore:.* are in train.tsv too")
TASKS = pathlib.Path(__file__).parents[3] / "shared" / "tasks"
PAIRS = ["id\tsentence1\tlabel\tsentence2", "1\ta\tno\tb", "2\tc\tyes\td"]


def write(folder, train_lines, dev_lines=None):
    (folder / "train.tsv").write_text("\n".join(train_lines) + "\n")
    if dev_lines:
        (folder / "dev.tsv").write_text("\n".join(dev_lines))
    return str(folder)


def test_labels_are_those_of_the_training_file_sorted_and_other_columns_do_not_matter(tmp_path):
    task = data.load_task(write(tmp_path, PAIRS, ["label\tsentence2\tsentence1", "yes\ty\tx"]))
    assert task.labels == ("no", "yes")
    assert task.train == [("a", "b", 0), ("c", "d", 1)]
    assert task.dev == [("x", "y", 1)]


@pytest.mark.parametrize("name", ["sentence", "text"])
def test_one_text_is_called_sentence_or_text(tmp_path, name):
    lines = [f"{name}\tlabel", 'say "hi"\tb', "two\ta"]
    with pytest.warns(UserWarning, match="2 of 2 texts in .*dev.tsv are in train.tsv too"):
        task = data.load_task(write(tmp_path, lines, lines))
    assert task.train == [('say "hi"', None, 1), ("two", None, 0)] == task.dev


def test_dev_is_read_from_the_columns_that_were_trained_on(tmp_path):
    dev = ["label\tsentence\ttext", "b\tsummary\twhole"]
    task = data.load_task(write(tmp_path, ["text\tlabel", "one\ta", "two\tb"], dev))
    assert task.dev == [("whole", None, 1)]


def test_a_folder_of_your_own_with_the_name_of_a_task_is_not_mixed_up_with_it(
    tmp_path, monkeypatch
):
    (tmp_path / "mrpc").mkdir()
    write(tmp_path / "mrpc", PAIRS, PAIRS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="say ./mrpc"):
        data.load_task("mrpc")
    assert data.load_task("./mrpc").labels == ("no", "yes")


def test_without_dev_a_tenth_is_held_out_and_said(tmp_path):
    lines = ["text\tlabel"] + [f"text {i}\t{i % 3}" for i in range(200)]
    with pytest.warns(UserWarning, match="no dev.tsv: a tenth"):
        task = data.load_task(write(tmp_path, lines))
    assert (len(task.train), len(task.dev)) == (180, 20)


@pytest.mark.parametrize(
    "train_lines, dev_lines, message",
    [
        (["text\tclass", "a\tb"], None, "train.tsv, line 1: want one column 'label'"),
        (["text\tlabel\tlabel", "a\tb\tc"], None, "train.tsv, line 1: want one column 'label'"),
        (["text\ttext\tlabel", "a\tb\tc"], None, "line 1: want columns"),
        (["words\tlabel", "a\tb"], None, "line 1: want columns .*sentence1.* or .*text.*words"),
        (["text\tlabel", "a\tb", "c"], None, "train.tsv, line 3: 1 columns instead of 2"),
        (["text\tlabel", "a\tb", " \tb"], None, "train.tsv, line 3: an empty text"),
        (["text\tlabel", "a\tb", "c\t"], None, "train.tsv, line 3: an empty text or label"),
        (["text\tlabel", "a\tb", "c\tb"], None, "1 different labels in 2 rows"),
        (
            ["text\tlabel", "a\tb", "c\tb "],
            None,
            "train.tsv, line 3: a space around the label 'b '",
        ),
        (["text\tlabel"] + [f"a\t0.{i}" for i in range(40)], None, "40 different labels"),
        (["text\tlabel"], None, "no examples"),
        (["text\tlabel", "a\tb", "c\td"], ["text\tlabel", "a\tx"], "dev.tsv, line 2: label 'x'"),
        (PAIRS, ["text\tlabel", "a\tno"], "dev.tsv, line 1: want columns .*sentence1"),
    ],
)
def test_wrong_data_are_refused_with_file_and_line(tmp_path, train_lines, dev_lines, message):
    with pytest.raises(InputError, match=message):
        data.load_task(write(tmp_path, train_lines, dev_lines))


def test_bad_data_are_reported_before_a_bad_model(tmp_path, capsys):
    folder = write(tmp_path, ["text\tlabel", "a"])
    assert train.main(["--task", folder, "--model", "no/such/folder"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "train.tsv, line 2: 1 columns" in line


@pytest.mark.parametrize("metric", ["f1", "matthews"])
def test_a_metric_of_two_classes_comes_beside_accuracy_where_it_is_asked_for(tmp_path, metric):
    args = train.parse_args(["--task", write(tmp_path, PAIRS, PAIRS), "--metric", metric])
    values = setup.read_task(args).metric([0, 1], [0, 1])
    assert values == {metric: pytest.approx(1), "accuracy": 1}


def test_a_folder_named_like_a_task_or_the_built_in_model_does_not_take_its_place(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "paraphrase").mkdir()
    (tmp_path / "built-in").mkdir()
    args = train.parse_args([])
    train.prepare(args)
    assert (args.task, args.model) == ("paraphrase", "built-in")


def test_a_metric_of_two_classes_is_refused_for_three(tmp_path, capsys):
    lines = ["text\tlabel", "a\tx", "b\ty", "c\tz"]
    folder = write(tmp_path, lines, lines)
    assert train.main(["--task", folder, "--model", "builtin", "--metric", "f1"]) == 2
    assert "two classes; there are 3" in capsys.readouterr().err


def test_a_run_on_your_own_data_says_what_is_held_out_and_answers_with_its_labels(
    tmp_path, capsys, monkeypatch
):
    rows = [f"a {name} cook {i} .\t{name}" for i in range(10) for name in ("good", "bad", "so-so")]
    folder = write(tmp_path, ["text\tlabel", *rows])
    run = str(tmp_path / "a")
    flags = ["--task", folder, "--model", "builtin", "--method", "head", "--max-steps", "4"]
    with pytest.warns(UserWarning, match="no dev.tsv"):
        assert train.main([*flags, "--out", run]) == 0
    out = capsys.readouterr().out
    assert f"data    {folder}: 27 train, 3 held out, classes bad, good, so-so\n" in out
    assert json.loads((tmp_path / "a" / "result.json").read_text())["task"] == tmp_path.name
    model = train.load_run(run)
    text = "a cook helps 3 ."
    inputs = data.pad([model.tokenizer.encode(text)], model.tokenizer.pad_id)
    expected = ("bad", "good", "so-so")[model(*inputs).argmax()]
    predict.main([run, text])
    alone = capsys.readouterr().out
    assert alone.startswith(f"label {expected} | probability 0.")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{text}\n{text}\n".encode())))
    predict.main([run])
    assert capsys.readouterr().out == 2 * alone


@pytest.mark.skipif(not TASKS.is_dir(), reason="no tasks here")
@pytest.mark.parametrize(
    "name, classes, sizes",
    [("SICK", 3, (4500, 4927)), ("TREC", 6, (5452, 500)), ("SUBJ", 2, (8000, 2000))],
)
def test_real_tasks_are_read_whole(name, classes, sizes):
    task = data.load_task(str(TASKS / name))
    assert len(task.labels) == classes
    assert (len(task.train), len(task.dev)) == sizes
