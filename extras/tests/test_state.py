"""Claims about what lies in a run's folder: what is damaged or foreign is refused, in one line."""

import copy
import json
import os
import random
import shutil
import types
import warnings

import pytest
import torch

import train
from data import InputError
from extras.checkpoints import content_checksum
from extras.runs import Run
from extras.state import (
    PLACES,
    Progress,
    State,
    fitting,
    put_learned,
    read_learned,
    run_checksum,
)

COMMON = ["--train-limit", "48", "--precision", "float32", "--max-steps", "4", "--batch-size", "8"]
COMMON += ["--head-warmup", "8", "--holdout", "0.25", "--probe-batches", "2"]
COMMON += ["--max-length", "12"]
FLIPS = 120  # of single bits in a state
CASES = 300  # of damaged configs


class Interrupted(Exception):
    pass


def stop():
    raise Interrupted


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Make two runs with states, "a" and "b" (another seed), and a finished one, "done".

    The states are those after step 2, one step before the end of an epoch.
    """
    folder = tmp_path_factory.mktemp("runs")
    step = train.update
    for name in ("a", "b"):
        with pytest.MonkeyPatch.context() as patch:
            steps = iter([step, step])

            def update(*arguments, steps=steps):
                make_step = next(steps, None)
                if make_step is None:
                    raise Interrupted
                make_step(*arguments)

            patch.setattr(train, "SAVE_EVERY", 2)
            patch.setattr(train, "update", update)
            with pytest.raises(Interrupted):
                seed = "0" if name == "a" else "1"
                train.main([*COMMON, "--seed", seed, "--out", str(folder / name)])
    assert train.main([*COMMON, "--out", str(folder / "done")]) == 0
    return folder


@pytest.fixture
def run(runs, tmp_path):
    """Give a copy of the runs to damage."""
    shutil.copytree(runs, tmp_path / "runs")
    return tmp_path / "runs"


def edit(path, change):
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def seal(state):
    """Give a state the checksum of what it holds now, as who makes one up can do."""
    del state["checksum"]
    state["checksum"] = content_checksum(state)


def edit_config(folder, change):
    """Change the config of a run, and give it the checksum that it wants then."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    config["checksum"] = run_checksum(config["flags"], config["checkpoint"])
    path.write_text(json.dumps(config))


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flip_a_bit(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_state_that_is_whole_is_gone_on_from(run):
    assert train.main(["--resume", str(run / "a")]) == 0


def test_a_state_saved_on_a_cpu_is_gone_on_from_on_a_gpu():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    parts = [model, {}, optimizer, schedule, None, torch.Generator(), torch.Generator()]
    saved = State(torch.device("cpu"), *parts, Progress(samples=3)).collect()
    state = State(torch.device("cuda"), *parts)
    state.restore(saved)
    assert state.progress.samples == 3


def test_no_flipped_bit_in_what_was_learned_is_accepted_as_another_value(run):
    path = run / "done" / "adapters.pt"
    expected = str(torch.load(path))
    whole = path.read_bytes()
    draw = random.Random(0)
    refused = 0
    for _ in range(40):
        path.write_bytes(whole)
        flip_a_bit(path, draw.randrange(len(whole)))
        try:
            train.load_run(run / "done")
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:  # the bit was in a part of the file that holds nothing, such as padding
            assert str(torch.load(path)) == expected
    assert refused > 20


def delete_a_name(learned):
    del learned["adapters"][next(iter(learned["adapters"]))]


def add_a_name(learned):
    learned["adapters"]["layers.9.q 0"] = torch.zeros(1)


def change_a_shape(learned):
    name = next(iter(learned["adapters"]))
    learned["adapters"][name] = torch.zeros(3, 3)


def put_nan(learned):
    learned["head"]["0.bias"][0] = float("nan")


def halve_the_bits(learned):
    name = next(iter(learned["adapters"]))
    learned["adapters"][name] = learned["adapters"][name].half()


def make_whole_numbers(learned):
    learned["head"]["0.weight"] = learned["head"]["0.weight"].int()


def make_complex(learned):
    learned["head"]["0.bias"] = learned["head"]["0.bias"].to(torch.complex64)


def change_a_rank(learned):
    name = next(name for name, rank in learned["ranks"].items() if rank)
    learned["ranks"][name] -= 1


CHANGES = {
    "delete": delete_a_name,
    "add": add_a_name,
    "shape": change_a_shape,
    "nan": put_nan,
    "float16": halve_the_bits,
    "int": make_whole_numbers,
    "complex": make_complex,
    "rank": change_a_rank,
    "labels": lambda learned: learned.update(labels=3),
    "no label": lambda learned: learned.update(labels=[]),
    "a label": lambda learned: learned.update(labels=["0", None]),
    "texts": lambda learned: learned.update(texts=None),
    "three texts": lambda learned: learned.update(texts=3),
    "adapters": lambda learned: learned.update(adapters=[]),
    "run": lambda learned: learned.update(run=1),
    "a tensor as run": lambda learned: learned.update(run=torch.ones(2)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_was_learned_must_fit_the_run(run, change):
    edit(run / "done" / "adapters.pt", CHANGES[change])
    with warnings.catch_warnings(), pytest.raises(InputError, match="adapters.pt") as error:
        warnings.simplefilter("error")  # it would be a second line
        train.load_run(run / "done")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("key", ["progress", "trained", "ranks", "optimizer", "search"])
@pytest.mark.parametrize("value", [None, 3, [1]])
def test_a_state_of_the_wrong_form_is_refused_and_the_logs_stay(run, capsys, key, value):
    def change(state):
        state[key] = value
        del state["checksum"]  # as in the state of an older run

    edit(run / "a" / "state.pt", change)
    history = (run / "a" / "history.jsonl").read_bytes()
    (run / "a" / "history.jsonl").write_bytes(history + b"{}\n")
    assert train.main(["--resume", str(run / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (run / "a" / "history.jsonl").read_bytes() == history + b"{}\n"


def first_moments(state):
    return next(iter(state["optimizer"].values()))


WRONG_STATES = {
    "a negative step": lambda state: state["progress"].update(step=-1),
    "a step that is no number": lambda state: state["progress"].update(step="2"),
    "an evaluation that is no table": lambda state: state["progress"].update(evaluations=[3]),
    "an empty evaluation": lambda state: state["progress"].update(evaluations=[{}]),
    "a batch of no examples": lambda state: state["progress"]["queue"].append(["1"]),
    "an allocation without a step": lambda state: state["search"]["history"][0].pop("step"),
    "scores of others": lambda state: state["search"]["history"][0]["scores"].update(other=1.0),
    "half of the moments": lambda state: first_moments(state).pop("exp_avg"),
    "no optimizer": lambda state: state["optimizer"].clear(),
    "moments of another shape": lambda state: first_moments(state).update(exp_avg=torch.ones(7, 7)),
    "moments of nan": lambda state: first_moments(state)["exp_avg"].fill_(float("nan")),
    "ranks of other modules": lambda state: state["ranks"].update(other=1),
    "other ranks than chosen": lambda state: state.update(ranks=dict.fromkeys(state["ranks"], 0)),
    "an allocation of others": lambda state: state["search"]["history"][0]["ranks"].update(other=1),
    "endless recorded steps": lambda state: state["search"].update(recorded_steps=float("inf")),
    "negative recorded steps": lambda state: state["search"].update(recorded_steps=-1),
}


@pytest.mark.parametrize("change", WRONG_STATES)
def test_a_state_whose_checksum_fits_is_checked_all_the_same(run, capsys, change):
    def edited(state):
        WRONG_STATES[change](state)
        seal(state)

    edit(run / "a" / "state.pt", edited)
    assert train.main(["--resume", str(run / "a")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


STATE_CHANGES = {
    "a tensor in place of a number": lambda state: state.update(run=torch.ones(2)),
    "an example that is not there": lambda state: state["progress"].update(queue=[[10**6]]),
    "an empty evaluation": lambda state: state["progress"].update(evaluations=[{}], step=4),
    "moments of nan": lambda state: first_moments(state)["exp_avg"].fill_(float("nan")),
    "sums of other shapes": lambda state: state["search"]["recorded"].update({"layers.0.q": [1]}),
}


class Reached(Exception):
    pass


def load(folder, saved):
    """Load a run's state up to where it is put back -> the checksum of its content"""
    run = Run(str(folder), is_new=False)
    run.checksum = saved["run"]
    run.data_checksum = saved["data"]

    def restore(content):
        raise Reached(content_checksum(content))

    with pytest.raises(Reached) as reached:
        run.load(types.SimpleNamespace(restore=restore))
    return reached.value.args[0]


@pytest.mark.parametrize("change", STATE_CHANGES)
def test_a_state_that_was_changed_is_refused_by_its_checksum(run, change):
    path = run / "a" / "state.pt"
    saved = torch.load(path)
    assert load(run / "a", saved) == saved["checksum"]
    edit(path, STATE_CHANGES[change])
    with pytest.raises(InputError, match="state.pt .* was changed by hand"):
        load(run / "a", saved)


def test_no_flipped_bit_in_a_state_is_accepted_as_another_value(run):
    path = run / "a" / "state.pt"
    whole = path.read_bytes()
    saved = torch.load(path)
    draw = random.Random(0)
    refused = 0
    for _ in range(FLIPS):
        path.write_bytes(whole)
        flip_a_bit(path, draw.randrange(len(whole)))
        before = contents(run / "a")
        try:
            assert load(run / "a", saved) == saved["checksum"]
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        assert contents(run / "a") == before
    assert refused > FLIPS / 2


def test_the_state_of_an_older_run_without_a_checksum_is_gone_on_from(run):
    edit(run / "a" / "state.pt", lambda state: state.pop("checksum"))
    assert train.main(["--resume", str(run / "a")]) == 0


def changed(value):
    """Yield copies of a content, each with one value that is another."""
    if isinstance(value, dict):
        for key, part in value.items():
            yield {name: item for name, item in value.items() if name != key}
            for other in changed(part):
                yield {**value, key: other}
    elif isinstance(value, list):
        yield [*value, value]
        for i, part in enumerate(value):
            for other in changed(part):
                yield [*value[:i], other, *value[i + 1 :]]
    elif isinstance(value, torch.Tensor):
        yield value + 1
        if value.dim() > 0:
            yield value.view(torch.int16)  # the same bytes
        yield value[None]
    else:
        yield repr(value)
        yield None


def forms(learned):
    """Return {name: shape and type} of the tensors in what was learned."""
    tensors = learned["adapters"] | learned["head"]
    return {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}


def test_what_was_learned_with_any_value_changed_is_refused_or_fits_the_run(run):
    path = run / "done" / "adapters.pt"
    learned = torch.load(path)
    model = train.load_run(run / "done")
    others = random.Random(0).sample(list(changed(learned)), 100)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    refused = 0
    for other in others:
        torch.save(other, path)
        try:
            put_learned(run / "done", read_learned(run / "done"), model.args, model, model.adapters)
        except InputError as error:
            assert str(error).isprintable()
            refused += 1
        else:
            assert forms(other) == forms(learned)
        for parameter in trained:
            assert parameter.isfinite().all()
    assert len(others) / 2 < refused < len(others)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_state_with_any_value_changed_is_refused_or_put_back(run, monkeypatch):
    states = []
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(
            State, "restore", lambda state, saved: states.append((state, saved)) or stop()
        )
        train.main(["--resume", str(run / "a")])
    ((state, saved),) = states
    trained = [parameter for parameter in state.model.parameters() if parameter.requires_grad]
    refused = 0
    for other in random.Random(0).sample(list(changed(saved)), CASES):
        try:
            with fitting("state.pt"):
                state.restore(other)
        except InputError as error:
            assert str(error).isprintable()
            refused += 1
        for parameter in trained:
            assert parameter.isfinite().all()
    assert CASES / 2 < refused < CASES
    assert all(parameter.isfinite().all() for parameter in state.model.parameters())


def test_every_value_and_its_place_are_in_the_checksum_of_a_content():
    ranks = torch.tensor([[1, 0]])
    content = {"a": {0: ranks, 1: ranks.to(torch.bfloat16)}, "b": [[1], [2.5, "x"]], "c": []}
    assert content_checksum(copy.deepcopy(content)) == content_checksum(content)
    others = [content, *changed(content)]
    others += [[], {}, (), [[]], [1], ["1"], [1.0], [True], [[1], 2], [[1, 2]]]
    assert len(others) > 30
    assert len({content_checksum(other) for other in others}) == len(others)


FOREIGN_NAMES = {
    "a log": lambda state, victim: state["sizes"].update({victim: 0}),
    "a counter": lambda state, victim: state["progress"].update(path=victim, folder=victim),
    "a part": lambda state, victim: state.update(plain={"path": victim}, path=victim),
}


@pytest.mark.parametrize("change", FOREIGN_NAMES)
def test_a_foreign_state_changes_no_file_outside_the_run(run, tmp_path, change):
    victim = tmp_path / "victim.txt"
    victim.write_text("precious")

    def edited(state):
        FOREIGN_NAMES[change](state, "../../victim.txt")
        seal(state)

    edit(run / "a" / "state.pt", edited)
    assert train.main(["--resume", str(run / "a")]) == 0  # it goes on: the name is not looked at
    assert victim.read_text() == "precious"


def test_the_state_of_another_run_is_refused(run, capsys):
    shutil.copy(run / "b" / "state.pt", run / "a" / "state.pt")
    assert train.main(["--resume", str(run / "a")]) == 2
    assert "other flags" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["batch_size", "seed", "epochs", "method", "proxy"])
@pytest.mark.parametrize("is_deleted", [True, False])
def test_a_config_that_was_changed_is_refused(run, capsys, flag, is_deleted):
    path = run / "a" / "config.json"
    config = json.loads(path.read_text())
    changed = copy.deepcopy(config)
    del changed["flags"][flag]
    if not is_deleted:
        changed["flags"][flag] = "7"
    path.write_text(json.dumps(changed))
    assert train.main(["--resume", str(run / "a")]) == 2
    assert "checksum" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["command", "flags", "checkpoint", "checksum"])
def test_a_config_that_lacks_a_key_is_refused(run, capsys, key):
    path = run / "a" / "config.json"
    config = json.loads(path.read_text())
    del config[key]
    path.write_text(json.dumps(config))
    assert train.main(["--resume", str(run / "a")]) == 2
    assert f"{key} is missing" in capsys.readouterr().err


def test_a_foreign_config_touches_no_other_folder(run, capsys):
    for name in ("a", "b"):
        os.remove(run / name / "state.pt")  # such a run begins anew, without its logs
    before = contents(run / "b")

    def name_the_other(config):
        config["flags"] = {"out": "", **config["flags"], "ou": str(run / "b")}

    edit_config(run / "a", name_the_other)
    assert train.main(["--resume", str(run / "a")]) == 2
    assert "flags in its config.json that are unknown here: ou, out" in capsys.readouterr().err
    assert contents(run / "b") == before


def test_another_checkpoint_is_refused_before_the_logs_of_a_run_without_a_state_go(run, capsys):
    os.remove(run / "a" / "state.pt")
    edit_config(run / "a", lambda config: config.update(form=3))
    before = contents(run / "a")
    assert train.main(["--resume", str(run / "a")]) == 2
    assert "another config or tokenizer" in capsys.readouterr().err
    assert contents(run / "a") == before


def damage(config, draw):
    """Return the text of a config with one fault, and whether its checksum fits the flags."""
    config = copy.deepcopy(config)
    kind = draw.choice(["cut", "key", "flag", "flag that is sealed"])
    if kind == "cut":
        text = json.dumps(config)
        return text[: draw.randrange(len(text))], False
    place = config if kind == "key" else config["flags"]
    name = draw.choice([*place, "new", "out", "ou", "resume", "help", "out=b", "\n"])
    junk = [None, True, -1, 2.5, 10**30, "", "x", "7", "nan", "b", "\ud800", "\0\n", [], {}]
    place[name] = draw.choice(junk)
    if draw.random() < 0.2:
        del place[name]
    is_sealed = kind == "flag that is sealed"
    if is_sealed:
        config["checksum"] = run_checksum(config["flags"], config["checkpoint"])
    return json.dumps(config), is_sealed


def test_a_damaged_config_is_refused_in_one_line_or_means_the_same(run):
    folder = run / "a"
    path = folder / "config.json"
    config = json.loads(path.read_text())
    model = types.SimpleNamespace(checkpoint=config["checkpoint"], form=config["form"])
    no_matter = ("command", *PLACES)

    def resumed():
        args = train.parse_args(["--resume", str(folder)])
        Run(args.out, is_new=False).begin(args, model)
        return {name: value for name, value in vars(args).items() if name not in no_matter}

    expected = resumed()
    draw = random.Random(0)
    refused = 0
    for _ in range(CASES):
        text, is_sealed = damage(config, draw)
        path.write_text(text)
        before = contents(folder)
        try:
            flags = resumed()
        except InputError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert flags["out"] == flags["resume"] == str(folder)
            assert is_sealed or flags == expected
        assert contents(folder) == before
    assert CASES / 2 < refused < CASES


@pytest.mark.parametrize("flag", ["--out", "--resume", "--task", "--model", "--data-dir"])
def test_an_empty_name_is_refused_and_starts_nothing(capsys, flag):
    assert train.main([f"{flag}="]) == 2
    assert "empty" in capsys.readouterr().err


def test_refused_input_leaves_no_folder(tmp_path):
    assert train.main(["--rank", "9999", "--out", str(tmp_path / "a")]) == 2
    assert not (tmp_path / "a").exists()
