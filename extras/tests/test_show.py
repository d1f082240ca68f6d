"""Grids, overlaps and whole histories, by hand."""

import copy
import json
import random
import xml.etree.ElementTree as ElementTree

import pytest
import torch.nn as nn

from data import InputError
from extras import show
from heterolora import LoRA, rank_costs

COSTS = {
    "layers.0.shortcut_attn": [2, 2],
    "layers.0.q": [10, 10],
    "layers.0.fc1": [5, 7],
    "layers.1.shortcut_attn": [2, 2],
    "layers.1.shortcut_ffn": [3, 3],
    "layers.1.q": [10, 10],
    "layers.1.fc1": [5, 7],
}
FIRST = dict.fromkeys(COSTS, 0) | {"layers.0.q": 2, "layers.0.fc1": 2}
LAST = dict.fromkeys(COSTS, 0) | {"layers.0.q": 2, "layers.1.fc1": 1, "layers.1.shortcut_ffn": 1}
NOTHING = dict.fromkeys(COSTS, 0)


@pytest.fixture
def run(tmp_path):
    """Give the folder of a run with two allocations."""
    modules = {}
    for name, costs in COSTS.items():
        modules[name] = {"costs": costs, "shortcut": "shortcut" in name}
    lines = [{"modules": modules}]
    for step, ranks, parameters in ((0, FIRST, 32), (10, LAST, 28)):
        lines.append({"step": step, "scores": {}, "ranks": ranks, "parameters": parameters})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "history.jsonl").write_text(text)
    return tmp_path


def test_a_grid_has_layers_down_types_across_and_parameters_at_the_edges():
    assert [line.split() for line in show.grid(COSTS, LAST).splitlines()] == [
        ["q", "fc1", "shortcut_attn", "shortcut_ffn", "parameters"],
        ["layers.0", "2", ".", ".", "20"],  # and nothing where there is no module
        ["layers.1", ".", "1", ".", "1", "8"],
        ["parameters", "20", "5", "0", "3", "28"],
    ]


def test_the_columns_of_a_grid_line_up():
    lines = show.grid(COSTS, LAST).splitlines()
    assert {len(line) for line in lines} == {len(lines[0])}


def test_a_grid_prices_live_adapters():
    adapters = nn.ModuleDict({"q": LoRA(4, 6, rank=2, alpha=1)})
    assert show.grid(rank_costs(adapters), {"q": 2}).splitlines()[-1].split()[-1] == "20"


def test_changes_are_what_came_on_and_what_went_off():
    came, went, overlap = show.changes(LAST, FIRST)
    assert came == ["layers.1.shortcut_ffn", "layers.1.fc1"]
    assert went == ["layers.0.fc1"]
    assert overlap == pytest.approx(1 / 4)  # q in both, four modules in either


def test_another_rank_of_the_same_module_is_no_change():
    assert show.changes({"q": 1}, {"q": 2}) == ([], [], 1.0)


def test_two_empty_allocations_are_the_same():
    assert show.jaccard(NOTHING, NOTHING) == 1.0
    assert show.jaccard(NOTHING, FIRST) == 0.0


def test_a_history_is_shown_allocation_by_allocation(run, capsys):
    show.main([str(run)])
    text = capsys.readouterr().out
    assert show.grid(COSTS, LAST) in text
    assert "100%" in text.split("how often")[1].splitlines()[2]  # q of layer 0
    first, last = [line.split() for line in text.splitlines()[-2:]]
    assert first == "0 2 32 0 0 1.00 1.00 0.00 62% 38% 0% 0%".split()
    assert last == "10 3 28 2 1 0.25 0.25 0.29 71% 18% 0% 11%".split()


def test_the_mean_layer_is_right_where_the_first_layers_have_no_module():
    history = [{"step": 0, "ranks": {"layers.3.q": 1}, "parameters": 16}]
    head, row = show.timeline({"layers.3.q": [16]}, history)
    assert row[head.index("mean layer")] == "3.00"


def test_a_history_is_drawn_with_a_box_for_every_stretch_that_a_module_is_on(run):
    show.main([str(run), "--svg", str(run / "search.svg")])
    titles = [e.text for e in ElementTree.parse(run / "search.svg").iter() if "title" in e.tag]
    assert len(titles) == len(COSTS) + 4
    assert "layers.0.q, allocations 1 to 2: rank 2" in titles
    assert "layers.1.fc1, allocations 2 to 2: rank 1" in titles


@pytest.mark.parametrize("kept", (0, 1, 2))
def test_a_folder_without_a_whole_history_is_refused(run, kept, capsys):
    lines = (run / "history.jsonl").read_text().splitlines()
    text = "\n".join(lines[:kept])
    (run / "history.jsonl").write_text(text[:-1] if kept == 2 else text)
    with pytest.raises(SystemExit) as stop:
        show.main([str(run)])
    assert stop.value.code == 2
    assert "is not the history of a search" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line, key", [(0, "modules"), (1, "step"), (1, "ranks"), (2, "parameters")]
)
@pytest.mark.parametrize("value", [None, -1, 2.5, 10**30, "x", [], {}, {"layers.0.q": [None]}])
def test_a_history_with_a_wrong_value_is_refused(run, line, key, value):
    path = run / "history.jsonl"
    records = [json.loads(text) for text in path.read_text().splitlines()]
    records[line][key] = value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(InputError, match="history"):
        show.read_history(str(run))


@pytest.mark.parametrize("costs", [[], [10, None], [10, -1], 20])
def test_a_module_with_wrong_costs_is_refused(run, costs):
    path = run / "history.jsonl"
    space, *history = path.read_text().splitlines()
    space = json.loads(space)
    space["modules"]["layers.0.q"]["costs"] = costs
    path.write_text("\n".join([json.dumps(space), *history]))
    with pytest.raises(InputError, match="costs of layers.0.q"):
        show.read_history(str(run))


@pytest.mark.parametrize("name", ["layers.x.q", "q", "layers.0.\ud800", f"layers.{10**99}.q"])
def test_a_module_without_a_layer_that_can_be_counted_is_refused(run, name):
    path = run / "history.jsonl"
    path.write_text(path.read_text().replace('"layers.0.q"', json.dumps(name)))
    with pytest.raises(InputError, match="name such as layers.3.q"):
        show.read_history(str(run))


def test_a_rank_that_has_no_cost_is_refused(run):
    path = run / "history.jsonl"
    path.write_text(path.read_text().replace('"layers.0.q": 2', '"layers.0.q": 3'))
    with pytest.raises(InputError, match="rank 3 of layers.0.q, which has 2"):
        show.read_history(str(run))


CASES = 300  # of damaged histories


def places(value):
    """Return (container, key) of everything in nested lists and dictionaries."""
    found = []
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places(value[key])
    return found


def damage(records, draw):
    """Return the text of a history with one fault."""
    records = copy.deepcopy(records)
    container, key = draw.choice(places(records))
    kind = draw.choice(["cut", "nested", "value", "delete", "name", "another's value"])
    if kind == "value":
        junk = [None, True, -1, 2.5, 10**30, 3, "", "x", "\0", [], {}, [[1]], float("nan")]
        container[key] = draw.choice(junk)
    if kind == "delete":
        del container[key]
    if kind == "another's value":
        other, other_key = draw.choice(places(records))
        container[key] = copy.deepcopy(other[other_key])
    text = "".join(json.dumps(record) + "\n" for record in records)
    if kind == "name":  # of a module or of anything else, in all lines
        new = draw.choice(["", "x", "layers.1.q", "layers.7.\ud800", "layers.x.q", "layers.9.q"])
        text = text.replace(json.dumps(key), json.dumps(new))
    place = draw.randrange(len(text))
    if kind == "cut":
        return text[:place]
    if kind == "nested":
        return text[:place] + "[" * 10**5 + text[place:]
    return text


def test_a_damaged_history_is_refused_in_one_line_or_shown(run, capsys):
    path = run / "history.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    draw = random.Random(0)
    refused = 0
    for _ in range(CASES):
        path.write_text(damage(records, draw))
        try:
            show.main([str(run), "--svg", str(run / "search.svg")])
        except SystemExit as stop:
            assert stop.code == 2
            assert capsys.readouterr().err.count("\n") == 1
            assert not (run / "search.svg").exists()
            refused += 1
        else:
            assert show.describe(*show.read_history(str(run))) in capsys.readouterr().out
            ElementTree.parse(run / "search.svg")
            (run / "search.svg").unlink()
    assert CASES / 2 < refused < CASES


def test_a_missing_folder_is_refused_by_its_name(capsys):
    with pytest.raises(SystemExit):
        show.main(["no-such-run"])
    assert "no-such-run" in capsys.readouterr().err
