"""Claims about the pictures of a metric against the budget."""

import json
import pathlib
import re
import shlex
import xml.etree.ElementTree

import pytest

from extras import figure
from extras.results import FinishedRun

DOCS = pathlib.Path(__file__).parents[2] / "docs"


def run(seed, score, **flags):
    """Return a finished run; LoRA on q and v, if nothing else is said."""
    flags = {"method": "lora", "targets": "q,v"} | flags
    return FinishedRun(flags, str(seed), score, 0, 0)


def numbers(mark, attribute):
    """Return all numbers in an attribute of a mark."""
    return [float(number) for number in re.findall(r"[\d.]+", mark.get(attribute))]


def drawn(runs, wanted=None):
    """Return {tag: [mark, ...]} of the picture of some runs."""
    lines = figure.chosen(figure.lines_of(runs, ["method", "targets"]), wanted)
    marks = {}
    for mark in xml.etree.ElementTree.fromstring(figure.draw("TREC", lines)).iter():
        marks.setdefault(mark.tag.split("}")[1], []).append(mark)
    return marks


def test_a_point_is_the_mean_over_seeds_and_its_interval():
    line = {3072: [run(seed, 70 + seed) for seed in (1, 2, 3)], 6144: [run(1, 9)]}
    first, second, third = figure.points(line | {1536: [run(1, 60), run(2, 60)]})
    assert first == (1536, 60, 0)
    # Standard deviation 1, n = 3, and Student's t is 4.3027.
    assert second == pytest.approx((3072, 72, 4.3027 / 3**0.5), abs=1e-3)
    assert third == (6144, 9, 0)  # one seed


def test_the_picture_can_be_read_back():
    runs = [run(seed, 70 + seed, budget="1000") for seed in (1, 2, 3)]
    runs += [run(seed, 80 + seed, budget="4000") for seed in (1, 2, 3)]
    runs += [run(seed, 85, method="full", targets="all") for seed in (1, 2)]
    marks = drawn(runs)
    at = {mark.text: numbers(mark, "y")[0] - 4 for mark in marks["text"]}
    pixels = (at["80"] - at["70"]) / 10  # for a point
    first, second = marks["circle"]
    low, high = numbers(first, "cy")[0], numbers(second, "cy")[0]
    assert low == pytest.approx(at["70"] + 2 * pixels, abs=0.1)
    assert high == pytest.approx(at["80"] + 2 * pixels, abs=0.1)
    corners = numbers(marks["polygon"][0], "points")
    assert corners[1] == pytest.approx(low + 2.4841 * pixels, abs=0.1)
    assert corners[-1] == pytest.approx(low - 2.4841 * pixels, abs=0.1)
    # What has no budget is a dashed level.
    (level,) = marks["path"]
    assert numbers(level, "d")[1] == pytest.approx(at["80"] + 5 * pixels, abs=0.1)
    assert level.get("stroke-dasharray")


def test_budgets_are_on_a_log_scale():
    marks = drawn([run(1, 70, budget=budget) for budget in ("1000", "2000", "8000")])
    first, second, third = [numbers(mark, "cx")[0] for mark in marks["circle"]]
    assert third - first == pytest.approx(3 * (second - first), abs=0.2)


def test_the_interval_of_a_line_with_one_budget_is_seen():
    one = [run(seed, score, budget="1000") for seed, score in enumerate((70, 72, 74))]
    marks = drawn(one)
    at = {mark.text: numbers(mark, "y")[0] - 4 for mark in marks["text"]}
    pixels = (at["75"] - at["70"]) / 5  # for a point
    (point,) = marks["circle"]
    (interval,) = [mark for mark in marks["line"] if mark.get("stroke") == figure.COLOURS[0]]
    low, high = numbers(interval, "y1")[0], numbers(interval, "y2")[0]
    assert numbers(interval, "x1") == numbers(interval, "x2") == numbers(point, "cx")
    assert (low + high) / 2 == pytest.approx(numbers(point, "cy")[0], abs=0.1)
    assert high - low == pytest.approx(2 * 4.968 * pixels, abs=0.2)  # Student's t, n = 3, sd 2


def test_names_of_lines_that_end_together_stand_apart():
    runs = [run(1, 70, budget="1000", targets=targets) for targets in ("q", "k", "v")]
    marks = drawn(runs, ["lora v=LoRA on v", "lora q", "lora k"])
    names = {"LoRA on v", "lora q", "lora k"}
    places = sorted(numbers(mark, "y")[0] for mark in marks["text"] if mark.text in names)
    assert len(places) == 3 and min(places[1] - places[0], places[2] - places[1]) >= 16


def test_a_learning_rate_in_where_is_not_about_runs_without_adapters():
    tuned = [run(1, 70, task="TREC", budget="1000", lr=lr, holdout="0") for lr in ("0.1", "0.2")]
    full = run(1, 90, task="TREC", method="full", lr="5e-05", holdout="0")
    held_out = run(1, 90, task="TREC", method="full", lr="5e-05", holdout="0.2")
    other_task = run(1, 90, task="SICK", method="full", holdout="0")
    runs = [*tuned, full, held_out, other_task]
    assert figure.choose_runs(runs, "TREC", ["lr=0.1"]) == [tuned[0], full]
    assert figure.choose_runs(runs, "TREC", ["budget=1000", "lr=0.1"]) == [tuned[0], full]
    assert figure.choose_runs(runs, "TREC", []) == [*tuned, full]
    assert figure.choose_runs([*tuned, held_out], "TREC", []) == tuned
    tuning = run(1, 60, task="TREC", budget="1000", lr="0.1", holdout="0.2")
    of_tuning = figure.choose_runs([*runs, tuning], "TREC", ["holdout=0.2", "lr=0.1"])
    assert of_tuning == [tuning, held_out]


def test_a_flag_may_be_written_as_on_the_command_line():
    runs = [run(1, 70, budget="1000", head_warmup=steps) for steps in ("0", "100")]
    assert list(figure.lines_of(runs, ["head-warmup"])) == ["0", "100"]


def test_failed_runs_are_left_out():
    runs = [run(1, 70, budget="1000"), run(2, None, budget="1000")]
    assert figure.lines_of(runs, ["method"]) == {"lora": {1000: runs[:1]}}


def test_what_cannot_be_drawn_is_refused_in_one_line(tmp_path, capsys):
    flags = {"task": "mrpc", "method": "lora", "targets": ["q"], "seed": 0, "budget": 1000}
    result = {"last": 0.7, "params_active": 9, "params_ever_trained": 9}
    line = json.dumps({"flags": flags, "result": result}) + "\n"
    no_budget = line.replace('"budget"', '"size"')
    other_seed = line.replace('"seed": 0', '"seed": 1')
    other_rate = other_seed.replace('"method"', '"lr": 0.1, "method"')
    for text, arguments, message in [
        (line, ["--lines", "lora v"], "no line is called 'lora v'; there are: lora q"),
        (line * 2, [], "lora q, budget 1000: two runs have seed 0: choose with --where"),
        (line + other_rate, [], "lora q, budget 1000: runs differ in lr: choose with --where"),
        (line + other_seed.replace('"budget"', '"size"'), [], "with and without a budget"),
        (line.replace("1000", "0"), [], "budget 0: want a number of parameters above 0"),
        ("".join(line.replace("lora", f"m{i}") for i in range(9)), [], "9 lines: choose at most 7"),
        (line, ["--lines", "lora q=a", "lora q=a"], "two lines are called 'a': give each another"),
        (line, ["--where", "budget"], "--where budget: want FLAG=VALUE"),
        (no_budget, [], "no run that ended has a budget"),
    ]:
        (tmp_path / "runs.jsonl").write_text(text)
        argv = [str(tmp_path / "runs.jsonl"), str(tmp_path / "a.svg"), "--task", "mrpc"]
        with pytest.raises(SystemExit):
            figure.main([*argv, *arguments])
        assert message in capsys.readouterr().err.splitlines()[-1]
        assert not (tmp_path / "a.svg").exists()


@pytest.mark.usefixtures("files_are_read_once")
def test_the_pictures_of_the_documents_are_those_that_their_commands_draw(tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in DOCS.glob("RESULTS*.md")]
    text = "\n".join(texts).replace("\\\n", "")
    commands = re.findall(r"^python -m extras\.figure (.*)$", text, re.M)
    assert commands
    for command in commands:
        file, picture, *flags = shlex.split(command)
        figure.main([str(DOCS.parent / file), str(tmp_path / "a.svg"), *flags])
        assert (tmp_path / "a.svg").read_bytes() == (DOCS.parent / picture).read_bytes(), command
