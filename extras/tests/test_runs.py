"""Claims about the folder of a run: resumed, finished, loaded, and with another kind of adapter."""

import dataclasses
import itertools
import json
import math
import os
import signal
import types

import pytest
import torch
from torch import nn

import data
import extras.files
import extras.runs
import extras.state
import extras.summary
import heterolora
import train
from data import InputError
from extras import checkpoints, setup
from model import Encoder
from test_heterolora import SMALL, copy_builtin, inject, read_losses, run


@pytest.mark.parametrize("file", ["result.json", "state.pt", "log.jsonl"])
def test_a_new_run_does_not_take_files_that_lie_in_its_folder_for_its_own(tmp_path, file):
    (tmp_path / file).write_text("{}")
    assert run("--method", "head", out=tmp_path) == 2


def test_an_encoder_of_one_layer_has_the_three_connections_that_it_can_have(monkeypatch, capsys):
    config = setup.load_pretrained(setup.find_checkpoint("built-in")).config
    short = dataclasses.replace(config, num_hidden_layers=1)
    monkeypatch.setattr(setup, "load_pretrained", lambda folder: Encoder(short))
    assert run("--shortcuts", "all") == 0
    assert "model   5 modules," in capsys.readouterr().out  # q, v and three connections
    assert run("--shortcuts", "shortcut_ffn") == 2
    assert "no 'shortcut_ffn'" in capsys.readouterr().err


def test_a_run_that_broke_off_before_its_first_state_begins_anew(tmp_path, monkeypatch, capsys):
    def fail(self, state):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(extras.runs.Run, "save", fail)
        assert run(out=tmp_path / "a") == 1
    assert train.main(["--resume", str(tmp_path / "a")]) == 0
    assert "from the start: no step was saved" in capsys.readouterr().out
    lines = (tmp_path / "a" / "history.jsonl").read_text().splitlines()
    assert sum("modules" in json.loads(line) for line in lines) == 1


def test_the_log_begins_before_the_texts_are_tokenized_and_ctrl_c_there_can_be_resumed(
    tmp_path, monkeypatch, capsys
):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(data, "Split", stop)
        assert run(out=tmp_path / "a") == 130
    output = capsys.readouterr()
    assert "data    paraphrase: 48 train, 16 held out, classes 0, 1\n" in output.out
    assert "go on with: python train.py --resume" in output.err
    assert train.main(["--resume", str(tmp_path / "a")]) == 0


def test_a_run_that_lost_its_state_and_result_is_not_trained_again(tmp_path, capsys):
    assert run("--method", "head", out=tmp_path) == 0
    learned = (tmp_path / "adapters.pt").read_bytes()
    os.remove(tmp_path / "result.json")
    assert train.main(["--resume", str(tmp_path)]) == 2
    assert "has adapters.pt, but neither state nor result" in capsys.readouterr().err
    assert (tmp_path / "adapters.pt").read_bytes() == learned


def test_a_run_that_another_process_ends_meanwhile_stays_as_it_is(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run("--method", "head", out=tmp_path) == 130
    prepare = train.prepare

    def slow_prepare(args):
        monkeypatch.undo()
        assert train.main(["--resume", str(tmp_path)]) == 0  # the other process
        return prepare(args)

    monkeypatch.setattr(train, "prepare", slow_prepare)
    args = train.parse_args(["--resume", str(tmp_path)])
    with pytest.raises(InputError, match="another process has just finished this run"):
        train.train(args)
    assert read_losses(tmp_path)


def test_a_run_follows_its_checkpoint_to_another_folder(tmp_path):
    flags = ["--method", "head", "--model", copy_builtin(tmp_path / "old")]
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 2)
        assert run(*flags, out=tmp_path / "a") == 130
    (tmp_path / "old").rename(tmp_path / "new")
    assert train.main(["--resume", str(tmp_path / "a"), "--model", str(tmp_path / "new")]) == 0
    assert train.load_run(tmp_path / "a").labels == ["0", "1"]


def test_pairs_are_fine_for_an_encoder_that_knows_one_type_of_token(tmp_path):
    folder = copy_builtin(tmp_path / "model", type_vocab_size=1)
    path = os.path.join(folder, "model.safetensors")
    tensors = checkpoints.read_safetensors(path)
    name = next(name for name in tensors if "token_type" in name)
    tensors[name] = tensors[name][:1]
    checkpoints.write_safetensors(path, tensors)
    assert run("--method", "head", "--model", folder) == 0


def test_a_resume_with_other_data_is_refused_and_leaves_the_run_as_it_was(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run(out=tmp_path / "a") == 130
    before = (tmp_path / "a" / "config.json").read_bytes()
    assert train.main(["--resume", str(tmp_path / "a"), "--task", "acceptability"]) == 2
    assert (tmp_path / "a" / "config.json").read_bytes() == before


def test_what_recording_adds_counts_as_search_and_not_as_training():
    progress = extras.state.Progress()
    progress.count(1, ((torch.zeros(2, 50),), torch.zeros(2)), 1.0, False)
    progress.count(2, ((torch.zeros(2, 100),), torch.zeros(2)), 2.6, True)
    assert extras.summary.extra_seconds(progress) == pytest.approx(0.6)


def test_recording_never_takes_less_than_no_time():
    progress = extras.state.Progress()
    batch = (torch.zeros(2, 50),), torch.zeros(2)
    progress.count(1, batch, 1.0, False)  # the first step of a process is slow
    progress.count(2, batch, 0.1, True)
    assert extras.summary.extra_seconds(progress) == 0


def test_no_training_step_waits_for_a_value_that_a_device_has_computed():
    # The meta device computes shapes alone: to read a value from it is an error.
    args = train.parse_args([])
    task, tokenizer, model, adapters = train.prepare(args)
    model.to("meta")
    optimizer, schedule = train.make_optimizer(args, model, adapters, 9)
    search = heterolora.HeteroLoRA(model, adapters, 9999, train.loss_fn)
    heterolora.set_ranks(adapters, {"layers.0.q": 8})
    rest = [optimizer, schedule, search, torch.Generator(), torch.Generator()]
    state = extras.state.State(torch.device("meta"), model, adapters, *rest)
    train_set = data.Split(task.train[:64], tokenizer, 128, "meta")
    stop = types.SimpleNamespace(requested=False)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        train.fit(args, extras.runs.Run(None, True), state, 9, 20, train_set, None, None, stop)
    assert state.progress.step == 4  # all until an allocation, which reads


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(
    "flags",
    [
        ["--method", "lora"],  # ends before the first evaluation
        ["--realloc-every", "0.7"],  # ends before the second allocation
        ["--method", "lora", "interrupted"],  # ends before a state is saved
    ],
)
def test_a_loss_that_is_not_finite_ends_the_run_and_is_not_saved(
    tmp_path, monkeypatch, capsys, value, flags
):
    if flags[-1] == "interrupted":
        stop_after(monkeypatch, 3)
        flags = flags[:-1]
    loss_fn = train.loss_fn
    counter = itertools.count(1)

    def break_at_the_third(model, batch):
        return loss_fn(model, batch) * (value if next(counter) == 3 else 1)

    monkeypatch.setattr(train, "loss_fn", break_at_the_third)
    assert run(*flags, "--max-steps", "9", out=tmp_path) == 1
    assert "the loss is not finite at step" in capsys.readouterr().err
    state = torch.load(tmp_path / "state.pt")
    assert state["progress"]["step"] == 0


def test_weights_that_are_not_finite_are_never_saved(tmp_path, monkeypatch, capsys):
    """A gradient can be infinite where the loss is not: the next loss would tell, too late."""
    stop_after(monkeypatch, 3)
    loss_fn = train.loss_fn
    counter = itertools.count(1)

    def break_the_third_gradient(model, batch):
        loss = loss_fn(model, batch)
        factor = math.inf if next(counter) == 3 else 1.0
        loss.register_hook(lambda gradient: gradient * factor)
        return loss

    monkeypatch.setattr(train, "loss_fn", break_the_third_gradient)
    assert run("--method", "lora", "--max-steps", "9", out=tmp_path) == 1
    assert "a weight is not finite at step 3 or shortly before" in capsys.readouterr().err
    assert torch.load(tmp_path / "state.pt")["progress"]["step"] == 0


def stop_after(monkeypatch, steps):
    """Ask for a stop in the given step, as Ctrl-C does."""
    counter = itertools.count(1)
    step = train.update

    def update(*arguments):
        step(*arguments)
        if next(counter) == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(train, "update", update)


def run_whole_and_cut(tmp_path, monkeypatch, flags):
    """Run the same flags in one go, and interrupted and resumed -> what both have learned"""
    assert run(*flags, out=tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        assert run(*flags, out=tmp_path / "cut") == 130
    with open(tmp_path / "cut" / "log.jsonl", "a") as file:
        file.write('{"loss": 0.1}\n')  # what a step after the saved one has logged
    assert train.main(["--resume", str(tmp_path / "cut")]) == 0
    return [torch.load(tmp_path / name / "adapters.pt") for name in ("whole", "cut")]


@pytest.mark.parametrize(
    "flags",
    [
        ["--realloc-every", "0.7"],
        ["--realloc-every", "0.7", "--proxy", "constant"],
        ["--realloc-every", "1", "--proxy", "spectral", "--allocator", "greedy-ranks"],
        ["--method", "full"],
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_result_bit_for_bit(tmp_path, monkeypatch, flags):
    model = copy_builtin(tmp_path / "model", hidden_dropout_prob=0.1)
    flags = [*flags, "--max-steps", "8", "--model", model, "--train-limit", "32"]
    whole, cut = run_whole_and_cut(tmp_path, monkeypatch, flags)
    assert whole["ranks"] == cut["ranks"]
    torch.testing.assert_close(whole["adapters"], cut["adapters"], rtol=0, atol=0)
    torch.testing.assert_close(whole["head"], cut["head"], rtol=0, atol=0)
    assert read_losses(tmp_path / "whole") == read_losses(tmp_path / "cut")
    assert not (tmp_path / "cut" / "state.pt").exists()


def test_a_finished_run_is_not_done_again_and_its_folder_not_overwritten(tmp_path, capsys):
    assert run("--method", "head", out=tmp_path / "a") == 0
    assert train.main(["--resume", str(tmp_path / "a")]) == 0
    assert "is finished" in capsys.readouterr().out
    assert run("--method", "head", out=tmp_path / "a") == 2
    assert "holds a run" in capsys.readouterr().err


def test_a_damaged_result_is_refused(tmp_path, capsys):
    assert run("--method", "head", out=tmp_path) == 0
    for text in (
        "",
        "{}",
        "[0.5]",
        '{"last": "0.5"}',
        '{"last": NaN}',
        '{"last": ' + "9" * 400 + "}",
        '{"last": 0.5',
    ):
        (tmp_path / "result.json").write_text(text)
        capsys.readouterr()
        assert train.main(["--resume", str(tmp_path)]) == 2
        output = capsys.readouterr()
        assert "result.json" in output.err and output.err.count("\n") == 1
        assert "is finished" not in output.out


def test_resume_and_predict_say_the_same_of_a_finished_run_that_lost_what_it_learned(tmp_path):
    assert run("--method", "head", out=tmp_path) == 0
    os.remove(tmp_path / "adapters.pt")
    with pytest.warns(UserWarning, match="adapters.pt is gone, so it cannot predict"):
        assert train.main(["--resume", str(tmp_path)]) == 0  # it is finished all the same
    with pytest.raises(InputError, match="finished, but its adapters.pt is gone"):
        train.load_run(tmp_path)
    os.remove(tmp_path / "result.json")
    with pytest.raises(InputError, match="not finished: go on with python train.py --resume"):
        train.load_run(tmp_path)


@pytest.mark.parametrize("precision, method", [("float32", "dynamic"), ("bfloat16", "static")])
def test_a_loaded_run_gives_the_same_figures(tmp_path, precision, method):
    flags = ["--holdout", "0.5", "--train-limit", "40", "--max-steps", "3", "--method", method]
    flags += ["--head-warmup", "2", "--precision", precision]
    assert run(*flags, out=tmp_path / "a") == 0
    result = json.loads((tmp_path / "a" / "result.json").read_text())
    model = train.load_run(str(tmp_path / "a"))
    task = setup.read_task(model.args)
    split = data.Split(task.dev, model.tokenizer, model.args.max_length, "cpu")
    values = train.evaluate(model, split, task.metric)
    tolerance = 1e-5 if precision == "float32" else 0.01  # a loaded run is in float32
    if precision == "float32":
        assert values["accuracy"] == result["last"]
    assert not model.training
    assert values["loss"] == pytest.approx(result["dev"]["loss"], rel=tolerance)


def test_a_run_is_not_put_on_other_weights(tmp_path):
    model = copy_builtin(tmp_path / "model")
    assert run("--method", "head", "--model", model, out=tmp_path / "a") == 0
    weights = bytearray((tmp_path / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1  # one bit of the last tensor
    (tmp_path / "model" / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError, match="other weights"):
        train.load_run(str(tmp_path / "a"))


@pytest.mark.parametrize(
    "file, change",
    [
        ("config.json", {"hidden_act": "relu"}),
        ("tokenizer_config.json", {"do_lower_case": False}),
    ],
)
def test_a_run_is_not_put_on_another_architecture_or_tokenizer(tmp_path, capsys, file, change):
    copy_builtin(tmp_path / "model")
    flags = ["--method", "head", "--max-steps", "1", "--model", str(tmp_path / "model")]
    assert run(*flags, out=tmp_path / "a") == 0
    path = tmp_path / "model" / file
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(before | change))
    with pytest.raises(InputError, match="another config or tokenizer than when"):
        train.load_run(tmp_path / "a")


def test_what_a_kill_left_half_written_goes_with_the_next_start(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert run("--method", "head", out=tmp_path) == 130
    (tmp_path / "state.pt.123.unfinished").write_text("half")
    (tmp_path / "mine.unfinished").write_text("not of the run")
    assert train.main(["--resume", str(tmp_path)]) == 0
    unfinished = [name for name in os.listdir(tmp_path) if name.endswith(".unfinished")]
    assert unfinished == ["mine.unfinished"]


def test_ever_trained_counts_the_highest_rank_that_every_module_had():
    adapters = inject(Encoder(SMALL), ["q", "v"], [], 4, 8.0)
    search = heterolora.HeteroLoRA(None, adapters, 600, None)
    search.history = [{"ranks": {"layers.0.q": 3}}, {"ranks": {"layers.0.q": 1, "layers.1.v": 4}}]
    args = train.parse_args([])
    highest = extras.summary.highest_ranks(args, adapters, search)
    assert heterolora.cost(adapters, highest) == 32 * (3 + 4)
    args.warmup_steps = 10  # all modules have had a rank
    highest = extras.summary.highest_ranks(args, adapters, search)
    assert heterolora.cost(adapters, highest) == 32 * (3 + 4 + 4)
    # LoRA without a search has a warm-up where it starts along the gradient.
    heterolora.set_ranks(adapters, {"layers.0.q": 3})
    for args.init, ranks in ((None, 3), ("gradient", 3 + 5)):
        highest = extras.summary.highest_ranks(args, adapters, None)
        assert heterolora.cost(adapters, highest) == 32 * ranks


# -------------------------------------------------------------------------- another kind of adapter


class Tied(nn.Module):
    """dW = scale * B A diag(d), with A and B shared by all modules of the same shape."""

    def __init__(self, d_in, d_out, rank, alpha, generator=None):
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, d_in, generator=generator) / d_in**0.5)
        self.up = nn.Parameter(torch.zeros(d_out, rank))
        self.gain = nn.Parameter(torch.ones(d_in))
        self.rank = rank
        self.max_rank = rank
        self.scale = alpha / rank

    def attach(self, name, host, adapters):
        for other in adapters.values():
            if other.down.shape == self.down.shape and other.up.shape == self.up.shape:
                self.down = other.down
                self.up = other.up

    def active(self, rank):
        blocks = [(self.down, (slice(rank),)), (self.up, (slice(None), slice(rank)))]
        return [*blocks, (self.gain, (slice(None) if rank else slice(0),))]

    def forward(self, x, rank=None):
        rank = self.rank if rank is None else rank
        return self.scale * (x * self.gain) @ self.down[:rank].T @ self.up[:, :rank].T


def test_another_kind_with_shared_parameters_is_counted_searched_saved_and_resumed(
    tmp_path, monkeypatch
):
    monkeypatch.setitem(heterolora.ADAPTERS, "toy", Tied)
    encoder = Encoder(SMALL)
    adapters = inject(encoder, ["q", "v"], [], 4, 8.0, adapter=Tied)
    assert heterolora.cost(adapters) == 4 * (16 + 16) + 6 * 16  # A and B once, six gains
    two_ranks = {"layers.0.q": 4, "layers.1.v": 2}  # of the same A and B
    assert heterolora.cost(adapters, two_ranks) == 4 * (16 + 16) + 2 * 16
    flags = ["--adapter", "toy", "--shortcuts", "none", "--budget", "2500", "--max-steps", "8"]
    whole, cut = run_whole_and_cut(tmp_path, monkeypatch, flags)
    torch.testing.assert_close(whole["adapters"], cut["adapters"], rtol=0, atol=0)
    result = json.loads((tmp_path / "cut" / "result.json").read_text())
    assert 0 < result["params_active"] <= 2500
    assert train.load_run(str(tmp_path / "cut")).adapters


def test_a_run_that_another_process_trains_is_refused(tmp_path, capsys):
    assert run(out=tmp_path / "a") == 0
    for name in ("result.json", "adapters.pt"):
        os.remove(tmp_path / "a" / name)
    held = extras.files.lock(tmp_path / "a" / "lock")
    assert train.main(["--resume", str(tmp_path / "a")]) == 2
    assert "another process trains this run" in capsys.readouterr().err
    held.close()
    assert train.main(["--resume", str(tmp_path / "a")]) == 0
    assert not (tmp_path / "a" / "lock").exists()
