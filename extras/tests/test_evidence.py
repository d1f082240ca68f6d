"""Claims about the tables and pictures of docs/, which are made from finished runs."""

import gzip
import json
import math
import pathlib
import re
import shlex
import xml.etree.ElementTree

import numpy as np
import pytest

import data
from extras import evidence, intervals, results

DOCS = pathlib.Path(__file__).parents[2] / "docs"
PARAMETERS = {"params_active": 3072, "params_ever_trained": 4096}


def line(seed, last, **flags):
    """Return a line of a file of runs."""
    flags = {"task": "mrpc", "holdout": None, "method": "lora", "seed": seed} | flags
    return json.dumps({"flags": flags, "result": {"last": last} | PARAMETERS}) + "\n"


@pytest.fixture
def show(tmp_path, capsys):
    """Give a function that writes lines to a file and returns the table of it."""

    def show(lines, *arguments):
        path = tmp_path / "runs.jsonl"
        path.write_text("".join(lines))
        evidence.main([str(path), "--task", "mrpc", *arguments])
        return capsys.readouterr().out

    return show


@pytest.mark.parametrize(
    "p, freedom, t",
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.95, 4, 2.132),
        (0.9, 10, 1.372),
        (0.995, 5, 4.032),
    ],
)
def test_quantiles_of_student_t_are_those_of_the_printed_table(p, freedom, t):
    assert intervals.student_t(p, freedom) == pytest.approx(t, abs=1e-3)


def test_the_interval_of_a_paired_difference_is_the_one_worked_out_by_hand():
    # Mean 2, standard deviation 1, standard error 1 / sqrt(3), and t = 4.3027 with 2 degrees.
    assert intervals.mean_and_half_width([1, 2, 3]) == pytest.approx(
        (2, 4.3027 / math.sqrt(3)), abs=1e-4
    )


def test_one_difference_says_nothing_about_its_error():
    assert intervals.mean_and_half_width([1.5]) == (1.5, math.inf)


def test_p_is_the_share_of_sign_flips_where_their_number_is_large():
    # An independent test of the same question: flip the signs of the differences at random.
    draws = np.random.default_rng(0)
    differences = draws.normal(0.35, 1, size=40)
    signs = draws.choice([-1, 1], size=(100_000, 40))
    share = np.mean(np.abs((signs * differences).mean(1)) >= abs(differences.mean()))
    assert 0.01 < share < 0.2
    assert intervals.p_value(list(differences)) == pytest.approx(share, abs=0.01)


def test_p_of_two_pairs_is_that_of_the_cauchy_distribution():
    # One degree of freedom. Mean 2, standard error 1: P(|T| > 2) = 1 - 2/pi atan 2.
    assert intervals.p_value([1, 3]) == pytest.approx(1 - 2 / math.pi * math.atan(2), abs=1e-4)
    assert intervals.p_value([2, 2, 2]) == 1


def test_holm_multiplies_the_smallest_p_by_their_number_and_never_falls():
    assert intervals.holm([0.03, 0.01, 0.04]) == pytest.approx([0.06, 0.03, 0.06])
    assert intervals.holm([0.5, 0.9]) == [1.0, 1.0]


def test_the_bootstrap_over_examples_is_that_of_drawing_them_one_by_one():
    draws = np.random.default_rng(1)
    differences = draws.choice([-0.4, 0.0, 0.2, 1.0], p=[0.1, 0.7, 0.1, 0.1], size=300)
    means = [draws.choice(differences, size=300).mean() for _ in range(4000)]
    expected = np.quantile(means, [0.025, 0.975])
    assert intervals.over_examples(differences) == pytest.approx(expected, abs=0.005)


def test_the_difference_that_would_have_shown_is_the_formula_of_the_protocol():
    # Standard deviation 1, n = 3: t is 4.3027 at 0.975 and 1.0607 at 0.8 with 2 degrees.
    assert intervals.detectable([1, 2, 3]) == pytest.approx(5.3634 / math.sqrt(3), abs=1e-3)


def test_details_are_over_the_examples_that_the_runs_kept(show):
    # Of 10 examples, `static` gets the third right in each of two seeds, and the fourth in one.
    labels = [0] * 10
    lines = []
    for seed, fourth in ((0, 0), (1, 1)):
        for method, third, other in (("lora", 1, 1), ("static", 0, fourth)):
            predictions = [0, 0, third, other, 0, 0, 0, 1, 1, 1]
            dev = data.accuracy(predictions, labels)
            dev["right"] = data.which_are_right(predictions, labels)
            text = json.loads(line(seed, dev["accuracy"], method=method))
            text["result"] |= {"dev": dev, "metric": "accuracy"}
            lines.append(json.dumps(text) + "\n")
    low, high = intervals.over_examples(np.array([0, 0, 1, 0.5, 0, 0, 0, 0, 0, 0]))
    table = show(lines, "--details")
    assert f" | [{100 * low:+.2f}, {100 * high:+.2f}] | " in table
    assert "+15.00 [" in table and "| 95 % over examples | detectable |" in table
    # Differences of 20 and 10: t = 3 with one degree of freedom.
    p = 1 - 2 / math.pi * math.atan(3)
    assert f"n = 2 | {p:.3f} | {p:.3f} | [" in table


def test_details_of_runs_that_kept_no_examples_leave_that_cell_empty(show):
    lines = [line(seed, 0.7 + seed / 100) for seed in range(2)]
    lines += [line(seed, 0.6, method="head") for seed in range(2)]
    # Differences of -10 and -11: standard deviation 0.71; t is 12.706 and 1.376.
    assert "|  | 7.04 |" in show(lines, "--details")


def test_a_run_that_kept_no_accuracy_has_no_bits():
    # Without the accuracy, nothing tells how many of the last byte's bits are examples.
    assert results.unpack_right({"right": "e0", "accuracy": 0.0}) is None
    assert list(results.unpack_right({"right": "e0", "accuracy": 0.75})) == [1, 1, 1, 0]


def with_bits(seed, method, right, accuracy):
    """Return a line of a run that kept which examples it got right."""
    record = json.loads(line(seed, accuracy, method=method))
    record["result"] |= {"metric": "accuracy", "dev": {"right": right, "accuracy": accuracy}}
    return json.dumps(record) + "\n"


@pytest.mark.parametrize("right, accuracy", [("e0", 0.1), ("ffff", 2.0), ("e0", math.inf)])
def test_bits_that_do_not_fit_their_accuracy_are_refused(show, capsys, right, accuracy):
    lines = [with_bits(0, "lora", "e0", 0.75), with_bits(1, "lora", right, 0.75)]
    lines[1] = lines[1].replace('"accuracy": 0.75', f'"accuracy": {json.dumps(accuracy)}')
    with pytest.raises(SystemExit, match="2"):
        show(lines)
    assert "line 2, is no finished run" in capsys.readouterr().err


def test_runs_that_kept_other_examples_have_no_interval_over_them(show):
    lines = [with_bits(seed, "lora", "e0", 0.75) for seed in (0, 1)]
    lines += [with_bits(seed, "head", "e000", 0.25) for seed in (0, 1)]
    assert re.search(r"`head` .* n = 2 \| \S+ \| \S+ \|  \|", show(lines, "--details"))


def test_a_difference_is_over_the_seeds_that_both_rows_have(show):
    lines = [line(0, 0.70), line(1, 0.71), line(2, 0.75), line(7, 0.10)]
    lines += [line(seed, last, method="head") for seed, last in enumerate([0.71, 0.73, 0.78])]
    table = show(lines)
    # 71 - 70, 73 - 71, 78 - 75: mean 2, half width 2.48. Seed 7 has no partner.
    assert "| `head` | 3 | 74.00 ± 3.61 | 3,072 | 4,096 | +2.00 [-0.48, +4.48], n = 3 |" in table
    assert "| `lora` | 4 | 56.50 ± 31.08 | 3,072 | 4,096 |  |" in table


def test_a_label_names_what_differs_and_leaves_out_what_is_usual(show):
    common = {"epochs": 3.0, "targets": ["q", "v"]}
    table = show([line(0, 0.7, lr=0.001, **common), line(0, 0.7, lr=3e-3, **common)])
    assert "`lora lr=0.001`" in table and "`lora lr=0.003`" in table and "epochs" not in table
    table = show([line(0, 0.7, targets=["v"]), line(0, 0.7, targets=["q", "v"])])
    assert "`lora targets=v`" in table and "`lora targets=q,v`" in table
    table = show([line(0, 0.7, allocator="greedy"), line(0, 0.7, allocator="uniform")])
    assert "| `lora` |" in table and "`lora allocator=uniform`" in table


def test_a_flag_selects_runs_and_spares_those_whose_method_does_not_use_it(show):
    lines = [line(0, 0.7, lr=0.001), line(0, 0.8, lr=0.003), line(0, 0.5, method="head")]
    table = show(lines, "--where", "lr=3e-3")
    assert "80.00" in table and "50.00" in table and "70.00" not in table


def test_a_flag_that_comes_twice_may_have_either_value(show):
    lines = [line(0, 0.7, lr=0.001), line(0, 0.8, lr=0.003), line(0, 0.5, lr=0.01)]
    table = show(lines, "--where", "lr=0.003", "lr=0.01")
    assert "80.00" in table and "50.00" in table and "70.00" not in table


def test_a_flag_is_named_with_a_dash_as_on_the_command_line_or_without(show):
    lines = [line(0, 0.7, probe_batches=8), line(0, 0.9, probe_batches=16)]
    for flag in ("probe-batches", "probe_batches"):
        assert "| 90.00 |" in show(lines, "--where", f"{flag}=16")


def test_runs_with_a_held_out_part_are_shown_to_who_asks_for_them(show):
    table = show([line(0, 0.7), line(0, 0.9, holdout=0.2)], "--where", "holdout=0.2")
    assert "| `lora` | 1 | 90.00" in table and "70.00" not in table


def test_runs_that_chose_a_value_on_held_out_examples_are_no_results(show):
    table = show([line(0, 0.7), line(1, 0.9, holdout=0.2), line(2, 0.7, holdout=0.0)])
    assert "| `lora` | 2 | 70.00" in table


def test_another_row_can_be_the_baseline(show):
    lines = [line(seed, 0.7 + seed / 100) for seed in range(2)]
    lines += [line(seed, 0.6 + seed / 100, method="head") for seed in range(2)]
    assert "minus `head` [95 %]" in show(lines, "--baseline", "head")
    assert "+10.00 [+10.00, +10.00], n = 2" in show(lines, "--baseline", "head")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            ["--where", "lr=5"],
            "no run has lr=5; the runs left so far have 0.001",
        ),
        (
            ["--where", "speed=5"],
            "no run has speed=5; the runs left so far lack",
        ),
        (["--where", "speed"], "--where speed: want FLAG=VALUE"),
        (
            ["--budget", "7"],
            "no run has budget=7; the runs left so far have 3072",
        ),
        (["--baseline", "full"], "'full' is not a row"),
        (["--svg", "none.svg"], "there is nothing to draw"),
    ],
)
def test_what_no_run_has_is_refused_in_one_line(show, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        show([line(0, 0.7, lr=0.001, budget=3072)], *arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_the_same_seeds_on_another_processor_are_another_row(show):
    lines = [json.loads(line(0, 0.7)) | {"processor": name} for name in ("A", "B")]
    table = show([json.dumps(record) + "\n" for record in lines])
    assert "`lora processor=A`" in table and "`lora processor=B`" in table


@pytest.mark.parametrize("flag", ["processor", "data_checksum", "metric"])
def test_runs_with_other_data_metric_or_processor_are_not_compared(show, flag):
    lines = []
    for method, value in [("lora", "A"), ("static", "B"), ("head", "A")]:
        for seed in (0, 1):
            record = json.loads(line(seed, 0.7, method=method))
            if flag == "processor":
                record["processor"] = value
            else:
                record["flags"][flag] = value
            lines.append(json.dumps(record) + "\n")
    table = show(lines)
    assert re.search(r"`static .*=B` \| 2 \| 70.00 ± 0.00 \| 3,072 \| 4,096 \|  \|", table)
    assert "| `head" in table and table.count("n = 2") == 1


def test_the_same_run_twice_is_refused(show, capsys):
    with pytest.raises(SystemExit):
        show([line(0, 0.7), line(0, 0.9)])
    assert "two runs are lora seed 0" in capsys.readouterr().err


def test_a_flag_that_only_some_runs_of_a_method_have_is_in_their_label(show):
    lines = [line(0, 0.7, method="static"), line(0, 0.5, method="static", score_repeats=4)]
    table = show([*lines, line(0, 0.6)])
    assert "| `static` | 1 | 70.00 |" in table
    assert "| `static score_repeats=4` | 1 | 50.00 |" in table
    assert "| `lora` | 1 | 60.00 |" in table


def test_plain_lora_is_the_baseline_wherever_it_stands_in_the_file(show):
    lines = [line(0, 0.7, method="static"), line(0, 0.7, adapter="xs"), line(0, 0.7)]
    assert "minus `lora` [95 %]" in show(lines)


@pytest.mark.parametrize(
    "second",
    [
        "[]",
        '{"flags": [], "result": {}}',
        '{"flags": {"seed": 1, "task": "a", "method": "lora"}, "result": {"loss": 1}}',
        line(1, math.nan).strip(),
        line(1, 1.5).strip(),
        line(1, "high").strip(),
        line(1, 0.7, lr="a\nb").strip(),
        line(1, 0.7, method=" ").strip(),
        '{"flags": {"seed": 1, "task": "a"}, "result": {"failed": "the loss is nan"}}',
    ],
)
def test_a_line_that_is_no_run_is_named(show, capsys, second):
    with pytest.raises(SystemExit):
        show([line(0, 0.7), second])
    assert "runs.jsonl, line 2, is no finished run" in capsys.readouterr().err


@pytest.mark.parametrize("second", [line(1, 0.9)[:40], "7" * 5000, "[" * 99_999], ids=range(3))
def test_a_line_that_was_written_in_part_is_left_out_with_a_warning(show, second):
    with pytest.warns(UserWarning, match="line 2, is not whole"):
        table = show([line(0, 0.7), second + "\n", line(2, 0.8)])
    assert "| `lora` | 2 | 75.00 " in table


def test_a_run_that_diverged_is_counted(show):
    flags = {"task": "mrpc", "method": "lora", "seed": 1}
    failed = json.dumps({"flags": flags, "result": {"failed": "the loss is nan"}})
    assert "| `lora` | 1 of 2 | 70.00 | 3,072 |" in show([line(0, 0.7), failed])


def test_a_file_that_is_missing_empty_or_truncated_is_refused(tmp_path, capsys):
    path = tmp_path / "runs.jsonl.gz"
    whole = gzip.compress(line(0, 0.7).encode() * 1000)
    path.write_bytes(whole[:-9])
    (tmp_path / "misnamed.jsonl").write_bytes(whole)
    (tmp_path / "empty.jsonl").touch()
    errors = {path: "is damaged", tmp_path / "missing.jsonl": "No such file"}
    errors |= {tmp_path / "empty.jsonl": "holds no finished run"}
    errors |= {tmp_path / "misnamed.jsonl": "gzipped file has to end in .gz"}
    for name, message in errors.items():
        with pytest.raises(SystemExit):
            evidence.main([str(name), "--task", "mrpc"])
        assert message in capsys.readouterr().err


@pytest.mark.usefixtures("files_are_read_once")
@pytest.mark.parametrize("document", ["RESULTS.md", "RESULTS-v0.1.md"])
def test_the_commands_of_the_results_print_the_tables_beside_them(capsys, document):
    text = (DOCS / document).read_text(encoding="utf-8")
    commands = re.findall(r"^python -m extras\.evidence (.*)$", text.replace("\\\n", ""), re.M)
    assert len(commands) > 8
    for command in commands:
        file, *flags = shlex.split(command)
        evidence.main([str(DOCS.parent / file), *flags])
        assert f"\n\n{capsys.readouterr().out}\n" in text, command


@pytest.mark.usefixtures("files_are_read_once")
def test_the_second_test_is_judged_by_p_corrected_for_its_three_tasks():
    runs = results.read_runs(str(DOCS / "second-test.jsonl.gz"))
    text = (DOCS / "RESULTS.md").read_text(encoding="utf-8")

    def row(task, flag, value):
        found = [run for run in runs if run.flags["task"] == task and run.flags.get(flag) == value]
        return {run.seed: run for run in found}

    flags = {
        "`within-layer`": ("allocator", "within-layer"),
        "the paper's search": ("proxy", "grad-norm"),
        "LoRA on q and v": ("targets", "q,v"),
        "random linears": ("allocator", "random-linears"),
        "LoRA on v": ("targets", "v"),
    }
    printed = re.findall(r"^\| (.*) minus (.*) \| .* \| .* \| .*, p = .* \|$", text, re.M)
    assert len(printed) == 5
    for name, other in printed:
        gains = []
        for task in ("mrpc", "rte", "cola"):
            gain = results.gain_over(row(task, *flags[name]), row(task, *flags[other]))
            gains.append(gain)
        corrected = intervals.holm([intervals.p_value(gain.differences) for gain in gains])
        cells = []
        for gain, p in zip(gains, corrected, strict=True):
            ends = f"[{gain.mean - gain.half:+.2f}, {gain.mean + gain.half:+.2f}]"
            cells.append(f"{gain.mean:+.2f} {ends}, p = {p:.3f}")
        assert f"| {name} minus {other} | {' | '.join(cells)} |\n" in text


@pytest.mark.usefixtures("files_are_read_once")
@pytest.mark.parametrize(
    "task, budget, processor",
    [
        ("TREC", "6144", "AMD EPYC"),
        ("SICK", "6144", "AMD EPYC"),
        ("SUBJ", "6144", "AMD EPYC"),
        ("SUBJ", "24576", "AMD EPYC"),
        ("mrpc", "6144", "AMD EPYC"),
        ("mrpc", "24576", "AMD EPYC"),
        ("TREC", "24576", "Intel Xeon"),
        ("SICK", "24576", "Intel Xeon"),
    ],
)
def test_the_pictures_of_the_neighbours_are_those_of_the_evidence(
    tmp_path, capsys, task, budget, processor
):
    picture = tmp_path / "forest.svg"
    flags = ["--task", task, "--budget", budget, "--svg", str(picture)]
    flags += ["--where", f"processor={processor}"]
    evidence.main([str(DOCS / "neighbours.jsonl.gz"), *flags])
    assert picture.read_bytes() == (DOCS / f"neighbours-{task}-{budget}.svg").read_bytes()


def test_a_forest_plot_shows_the_differences_of_the_table(show, tmp_path):
    lines = [line(seed, 0.70 + 0.01 * seed) for seed in range(3)]
    lines += [line(seed, 0.72 + 0.02 * seed, method="static") for seed in range(3)]  # 2, 3, 4 more
    lines += [line(0, 0.5, method="dynamic")]  # one pair has no interval, and is left out
    lines = [text.replace("mrpc", "<&>") for text in lines]
    table = show(lines, "--task", "<&>", "--svg", str(tmp_path / "forest.svg"))
    mean, low, high = re.search(r"\| (\+3\.00) \[(.+), (.+)\], n = 3", table).groups()
    root = xml.etree.ElementTree.parse(tmp_path / "forest.svg").getroot()
    words = [mark.text for mark in root.iter() if mark.tag.endswith("text")]
    assert words[0] == "<&>"
    assert "static, n = 3" in words and not any("dynamic" in word for word in words)

    # Read the picture back: where 0 and +2 stand on the axis gives the scale.
    marks = [mark for mark in root.iter() if mark.tag.endswith("text")]
    at = {mark.text: float(mark.get("x")) for mark in marks}
    (circle,) = [mark for mark in root.iter() if mark.tag.endswith("circle")]
    (bar,) = [mark for mark in root.iter() if mark.get("stroke") == "#0072b2"]
    for x, points in [(circle.get("cx"), mean), (bar.get("x1"), low), (bar.get("x2"), high)]:
        read = 2 * (float(x) - at["0"]) / (at["+2"] - at["0"])
        assert read == pytest.approx(float(points), abs=0.02)
