import dataclasses
import io
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

import batches
import checkpoints
import reports
import splits
import training
from data import Data
from machines import Processes
from recipe import Component, Recipe, RecipeError, Training
from warps import shift_and_rotate

EXAMPLES = Path(training.__file__).parent
SHORT = Training(epochs=3, batch_size=8, lr=0.05, final_lr=1e-4, weight_decay=1e-3, checkpoint_steps=3, lr_unit="step")
RECIPE = Recipe(training=SHORT)  # 8 steps an epoch, 24 in all


def tiny_data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (80, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 4, (80,), generator=generator)
    mean, std = splits.statistics(images)
    train = splits.MemorySplit(images[:60], labels[:60], mean, std, shift_and_rotate(10, 0.1))
    return Data("tiny", train, splits.MemorySplit(images[60:], labels[60:], mean, std), tuple("abcd"), 8, mean, std)


def tiny_model():
    torch.manual_seed(1)
    parts = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(216, 4)
    return nn.Sequential(*parts)


class Stopped(Exception):
    pass


def run(folder, *, stop_before=None, signal_number=None, recipe=RECIPE, model=None, criterion=None, **options):
    """Train the tiny network; after `stop_before` steps raise, or send this process a signal."""

    def on_step(step):
        if step.step + 1 == stop_before:
            if signal_number is None:
                raise Stopped
            os.kill(os.getpid(), signal_number)

    model = model or tiny_model()
    criterion = criterion or training.Task(nn.CrossEntropyLoss())
    options = {"progress": False, "on_step": on_step, **options}
    history = training.train(model, criterion, tiny_data(), recipe, run_dir=folder, **options)
    return model, history


def steps_text(folder):
    return (folder / training.STEPS).read_text()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    model, history = run(folder)
    return folder, model, history


def assert_same_run(folder, model, history, whole):
    assert steps_text(folder) == steps_text(whole[0])
    expected = whole[1].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    without_time = [[dataclasses.replace(epoch, seconds=0) for epoch in h] for h in (history, whole[2])]
    assert without_time[0] == without_time[1]


def test_the_log_has_every_step_with_all_digits(whole):
    lines = steps_text(whole[0]).splitlines()
    assert lines[0] == "step,epoch,lr,loss,task"
    assert len(lines) == 25
    rows = reports.read_steps(whole[0] / training.STEPS)
    assert [row["step"] for row in rows] == list(range(24))
    assert [row["epoch"] for row in rows] == [0] * 8 + [1] * 8 + [2] * 8
    assert lines[5] == ",".join(["4", "0", *(repr(rows[4][key]) for key in ("lr", "loss", "task"))])
    mean = sum(row["loss"] for row in rows[8:16]) / 8
    assert whole[2][1].loss == pytest.approx(mean, rel=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 7, 8, 9, 13, 23])
def test_a_run_stopped_by_an_error_goes_on_digit_for_digit(tmp_path, whole, steps):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=steps)
    torch.manual_seed(99)  # where the global generator stands does not matter
    assert_same_run(tmp_path, *run(tmp_path), whole)


def test_a_run_stopped_again_and_again_goes_on_digit_for_digit(tmp_path, whole):
    for steps in (4, 5, 11, 12, 20):
        with pytest.raises(Stopped):
            run(tmp_path, stop_before=steps)
    assert_same_run(tmp_path, *run(tmp_path), whole)


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)], ids=["term", "int"]
)
def test_a_signal_lets_the_step_end_and_saves_it(tmp_path, whole, number, error):
    handlers = signal.getsignal(number)
    with pytest.raises(error):
        run(tmp_path, stop_before=10, signal_number=number, recipe=with_training(checkpoint_steps=1000))
    assert signal.getsignal(number) is handlers
    # the signal came after step 10; step 11 noticed it
    assert checkpoints.read(tmp_path / training.CHECKPOINT).progress["step"] == 11
    assert_same_run(tmp_path, *run(tmp_path), whole)


def test_a_killed_process_goes_on_digit_for_digit(tmp_path, whole):
    code = (
        f"import sys, pathlib, signal; sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(EXAMPLES)!r}]\n"
        f"import torch, test_training as t; torch.set_num_threads({torch.get_num_threads()})\n"
        f"t.run(pathlib.Path({str(tmp_path)!r}), stop_before=14, signal_number=signal.SIGKILL)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert checkpoints.read(tmp_path / training.CHECKPOINT).progress["step"] == 12
    assert_same_run(tmp_path, *run(tmp_path), whole)


def test_a_finished_run_is_not_repeated(tmp_path, whole):
    run(tmp_path)
    before = (tmp_path / training.CHECKPOINT).read_bytes()
    assert_same_run(tmp_path, *run(tmp_path, on_step=pytest.fail), whole)
    assert (tmp_path / training.CHECKPOINT).read_bytes() == before


def test_without_resume_a_run_starts_anew(tmp_path, whole):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=9)
    seen = []
    model, history = run(tmp_path, resume=False, on_step=lambda step: seen.append(step.step))
    assert seen == list(range(24))
    assert_same_run(tmp_path, model, history, whole)


# newer Pythons warn of every fork of a process with threads, which is how a DataLoader starts its workers on Linux
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_worker_processes_change_nothing(tmp_path, whole):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=6, recipe=with_training(workers=1))
    assert_same_run(tmp_path, *run(tmp_path, recipe=with_training(workers=1, checkpoint_steps=5)), whole)


def test_a_thread_can_train(tmp_path, whole):
    results = []
    thread = threading.Thread(target=lambda: results.append(run(tmp_path)))
    thread.start()
    thread.join()
    assert_same_run(tmp_path, *results[0], whole)


def with_training(**changes):
    return dataclasses.replace(RECIPE, training=dataclasses.replace(SHORT, **changes))


@pytest.mark.parametrize(
    ("recipe", "named"),
    [
        (with_training(lr=0.06), "recipe.training.lr was 0.05, is 0.06"),
        (with_training(seed=1), "recipe.training.seed was 0, is 1"),
        (dataclasses.replace(RECIPE, method=Component("m", {"mu": 2})), "recipe.method.mu was None, is 2"),
    ],
    ids=["lr", "seed", "method"],
)
def test_a_checkpoint_of_another_recipe_is_refused(tmp_path, recipe, named):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=3)
    with pytest.raises(checkpoints.CheckpointError, match=named):
        run(tmp_path, recipe=recipe)


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=3)
    wider = tiny_model()
    wider[5] = nn.Linear(216, 5)
    with pytest.raises(checkpoints.CheckpointError, match=r"another network .*5\.weight \(4, 216\) here \(5, 216\)"):
        run(tmp_path, model=wider)
    with pytest.raises(checkpoints.CheckpointError, match=r"only in the network: \['6\.weight'\]"):
        run(tmp_path, model=tiny_model().append(nn.PReLU()))


def test_damaged_foreign_and_logless_checkpoints_are_refused(tmp_path):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=9)
    path = tmp_path / training.CHECKPOINT
    (tmp_path / training.STEPS).write_text("step\n")
    with pytest.raises(checkpoints.CheckpointError, match=r"steps\.csv beside it is missing or shortened"):
        run(tmp_path)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(checkpoints.CheckpointError, match="cannot be read"):
        run(tmp_path)
    checkpoints.save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(checkpoints.CheckpointError, match="format none, expected surgery-training-2"):
        run(tmp_path)


def test_a_crash_before_the_rename_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=3)
    path = tmp_path / training.CHECKPOINT
    before = path.read_bytes()

    def crash(source, target):
        assert checkpoints.read(Path(source)).progress["step"] == 6  # the new file was whole
        raise Stopped

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(Stopped):
        run(tmp_path)
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {training.CHECKPOINT, training.STEPS}


def test_tied_weights_and_optimizer_state_survive_a_checkpoint(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    checkpoints.write(tmp_path / "c", checkpoints.collect(model, optimizer, {}, {"step": 2}, Processes()))
    expected = optimizer.state_dict()["state"]
    read = checkpoints.read(tmp_path / "c")
    fresh = torch.optim.Adam(model.parameters())
    checkpoints.restore(tmp_path / "c", read, model, fresh, Processes())
    restored = fresh.state_dict()["state"]
    assert restored.keys() == expected.keys() == {0, 1, 2}
    assert all(torch.equal(restored[k][name], value) for k in expected for name, value in expected[k].items())
    assert read.progress == {"step": 2}


class Recorder:
    """A criterion with two terms that notes the progress it is given."""

    def __init__(self):
        self.progress = []
        self.terms = {}

    def __call__(self, output, target, progress):
        self.progress.append(progress)
        task, extra = nn.functional.cross_entropy(output, target), 0.1 * output.square().mean()
        self.terms = {"task": task, "extra": extra}
        return task + extra


def test_a_criterion_is_told_the_completed_epochs_and_its_terms_are_logged(tmp_path):
    criterion = Recorder()
    _, history = run(tmp_path, criterion=criterion)
    assert criterion.progress == [step / 8 for step in range(24)]
    rows = reports.read_steps(tmp_path / training.STEPS)
    assert list(rows[0]) == ["step", "epoch", "lr", "loss", "task", "extra"]
    assert all(row["loss"] == pytest.approx(row["task"] + row["extra"], rel=1e-6) for row in rows)
    assert history[0].terms["extra"] == pytest.approx(sum(row["extra"] for row in rows[:8]) / 8, rel=1e-12)


def test_one_step_is_the_nesterov_step_with_decay_of_the_given_groups(tmp_path):
    """From v=0: g' = g + wd*w, v = g', w <- w - lr*(g' + 0.9*v) = w - lr*1.9*g'; bias: rate/10, no decay."""
    torch.manual_seed(0)
    linear = nn.Linear(192, 4).double()
    model = nn.Sequential(nn.Flatten(), linear)
    before = {name: value.detach().clone() for name, value in linear.named_parameters()}
    recipe = with_training(epochs=1, batch_size=60, lr=0.05, augment=False)
    data = tiny_data()

    def groups(module):
        assert module is model
        decayed = {"params": [linear.weight], "lr": 0.05, "weight_decay": 0.01}
        return [decayed, {"params": [linear.bias], "lr": 0.005, "weight_decay": 0.0}]

    class Double(splits.MemorySplit):
        def batch(self, indices, seed=None):
            return super().batch(indices, seed).double()

    doubled = [Double(part.images, part.labels, part.mean, part.std) for part in (data.train, data.test)]
    data = dataclasses.replace(data, train=doubled[0], test=doubled[1])
    criterion = training.Task(nn.CrossEntropyLoss())
    training.train(model, criterion, data, recipe, run_dir=tmp_path, groups=groups, progress=False)
    images = data.train.batch(torch.arange(60)).flatten(1)
    error = (images @ before["weight"].T + before["bias"]).softmax(1)
    error = (error - nn.functional.one_hot(data.train.targets, 4)) / 60
    weight = before["weight"] - 0.05 * 1.9 * (error.T @ images + 0.01 * before["weight"])
    bias = before["bias"] - 0.005 * 1.9 * error.sum(0)
    torch.testing.assert_close(linear.weight.detach(), weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(linear.bias.detach(), bias, rtol=1e-10, atol=1e-12)


def test_an_infinite_loss_is_refused(tmp_path):
    criterion = training.Task(lambda output, target: output.sum() * torch.inf)
    with pytest.raises(FloatingPointError, match=r"the loss is -?(inf|nan) at step 0; lower training\.lr"):
        run(tmp_path, criterion=criterion)


def test_bfloat16_autocast_reaches_the_network(tmp_path):
    seen = []
    criterion = training.Task(lambda out, target: seen.append(out.dtype) or nn.functional.cross_entropy(out, target))
    run(tmp_path, recipe=with_training(amp=True, epochs=1), criterion=criterion)
    assert set(seen) == {torch.bfloat16}


def test_evaluation_is_in_eval_mode_and_leaves_the_mode():
    model, data = tiny_model(), tiny_data()
    result = training.evaluate(model, data.test, batch_size=7)
    assert model.training
    assert model[3].training
    model.eval()
    logits = model(data.test.batch(torch.arange(20))).detach()
    # batches of 7 and of 20 sum in another order
    torch.testing.assert_close(result.logits, logits, rtol=1e-5, atol=1e-6)
    assert result.accuracy == (logits.argmax(1) == data.test.targets).sum().item() / 20


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 1e-4), (2.9, 1e-4 + 0.5999 * 2 / 5), (120, 0.300005), (160, 1e-5 + 0.59999 / 4), (240, 1e-5), (249.5, 1e-5)],
)
def test_the_published_schedule_of_imagenet(epoch, expected):
    recipe = Recipe.from_toml(EXAMPLES / "recipes" / "coded-imagenet.toml")
    assert training.learning_rate(recipe.training, epoch) == pytest.approx(expected, rel=1e-12)


def test_the_rate_moves_within_an_epoch_only_when_asked():
    by_epoch = Training(epochs=4, lr=1.0)
    by_step = dataclasses.replace(by_epoch, lr_unit="step")
    assert training.learning_rate(by_epoch, 2.5) == pytest.approx(0.5, rel=1e-12)
    assert training.learning_rate(by_step, 3.0) == pytest.approx((1 - 2**-0.5) / 2, rel=1e-12)
    assert training.learning_rate(by_step, 2.5) == pytest.approx(0.3086582838174551, rel=1e-12)
    assert training.learning_rate(dataclasses.replace(by_epoch, schedule="constant"), 3.0) == 1.0


STEPS = Training(epochs=100, lr=0.1, schedule="step", milestones=(30, 60, 90), gamma=0.1)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [(0, 0.1), (29.99, 0.1), (30, 0.01), (59.5, 0.01), (60, 0.001), (89, 0.001), (90, 1e-4), (99.9, 1e-4)],
)
def test_a_step_schedule_divides_the_rate_once_each_milestone_is_complete(epoch, expected):
    for unit in ("epoch", "step"):
        stepwise = dataclasses.replace(STEPS, lr_unit=unit)
        assert training.learning_rate(stepwise, epoch) == pytest.approx(expected, rel=1e-12)


def test_a_step_schedule_can_begin_with_a_warm_up():
    """Epoch 2 of 4: 0.02 + (0.1 - 0.02) * 2 / 4 = 0.06; the milestones count from the start, not from its end."""
    warm = dataclasses.replace(STEPS, warmup_epochs=4, warmup_lr=0.02)
    rates = [training.learning_rate(warm, epoch) for epoch in (2, 4, 30)]
    assert rates == pytest.approx([0.06, 0.1, 0.01], rel=1e-12)


def test_the_end_of_every_epoch_is_told_before_its_checkpoint(tmp_path, whole):
    """The run dies between the two in the second of three epochs, so that one is told again, with the same network."""
    told = []

    def on_epoch(model, epoch):
        told.append((epoch.epoch, dataclasses.replace(epoch, seconds=0), model[0].weight.detach().clone()))
        if len(told) == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(tmp_path, on_epoch=on_epoch, recipe=with_training(checkpoint_steps=1000))
    assert checkpoints.read(tmp_path / training.CHECKPOINT).progress["step"] == 8
    assert_same_run(tmp_path, *run(tmp_path, on_epoch=on_epoch), whole)
    assert [number for number, _, _ in told] == [0, 1, 1, 2]
    assert told[1][1] == told[2][1] == dataclasses.replace(whole[2][1], seconds=0)
    assert torch.equal(told[1][2], told[2][2])
    run(tmp_path, on_epoch=pytest.fail)  # finished: nothing is told again


def test_the_identity_of_a_run_holds_new_settings_only_where_they_are_used():
    """A checkpoint from before a setting existed lacks it, and may go on as long as it stands at its default."""
    plain, stepwise = Recipe(), Recipe(training=STEPS)
    added = {"milestones", "gamma", "start", "warmup_prefix", "mixup"}
    assert not added & set(plain.identity()["training"])
    assert stepwise.identity()["training"]["milestones"] == [30, 60, 90]
    from_end = Recipe(training=dataclasses.replace(STEPS, gamma=0.2, start="trained")).identity()["training"]
    assert (from_end["gamma"], from_end["start"]) == (0.2, "trained")
    assert set(plain.to_tables()["training"]) - set(plain.identity()["training"]) - added == {
        "checkpoint_steps", "workers"
    }  # fmt: skip


def test_a_checkpoint_of_other_milestones_is_refused_and_of_the_same_is_not(tmp_path):
    recipe = with_training(schedule="step", milestones=(1, 2))
    with pytest.raises(Stopped):
        run(tmp_path, stop_before=3, recipe=recipe)
    other = with_training(schedule="step", milestones=(2,))
    with pytest.raises(checkpoints.CheckpointError, match=r"milestones was \[1, 2\], is \[2\]"):
        run(tmp_path, recipe=other)
    _, history = run(tmp_path, recipe=recipe)
    assert [epoch.lr for epoch in history] == pytest.approx([0.05, 0.005, 0.0005], rel=1e-12)


def test_a_shortened_recipe_has_no_warm_up_and_no_steps():
    short = Recipe(training=dataclasses.replace(STEPS, warmup_epochs=5)).shortened(1).training
    assert (short.epochs, short.warmup_epochs, short.schedule, short.milestones) == (1, 0, "constant", ())
    cosine = Recipe(training=Training(cooldown_epochs=2)).shortened(1).training
    assert (cosine.schedule, cosine.cooldown_epochs) == ("cosine", 0)


def test_ranks_share_a_batch_without_overlap():
    split = tiny_data().train
    whole_batches = batches.Batches(split, 8, seed=3)
    parts = [batches.Batches(split, 8, seed=3, rank=rank, world=4) for rank in range(4)]
    for step in (0, 7, 8):  # the last batch of an epoch, 7, has four samples
        joined = torch.cat([part.indices(step) for part in parts])
        assert joined.sort().values.equal(whole_batches.indices(step).sort().values)
    epoch = torch.cat([whole_batches.indices(step) for step in range(8)])
    assert epoch.sort().values.equal(torch.arange(60))
    assert not whole_batches.indices(0).equal(whole_batches.indices(8))
    assert batches.Batches(split, 8, seed=3, drop_last=True).per_epoch == 7


def test_ranks_have_equally_many_samples_also_of_an_incomplete_batch():
    split = tiny_data().train  # 60 samples: 16, 16, 16 and 12
    parts = [batches.Batches(split, 16, seed=3, rank=rank, world=8) for rank in range(8)]
    assert [part.per_epoch for part in parts] == [4] * 8
    assert [len(part.indices(3)) for part in parts] == [1] * 8
    assert len({int(part.indices(3)) for part in parts}) == 8
    assert batches.Batches(split, 16, seed=3, world=16).per_epoch == 3  # 12 samples are too few for 16 processes
    with pytest.raises(ValueError, match="3 processes cannot share 16 samples"):
        batches.Batches(split, 16, seed=3, world=3)


def test_labelled_batches_are_the_whole_split_in_order_each_time():
    split = tiny_data().test
    loader = batches.labelled_batches(split, batch_size=8)
    assert len(loader) == 3
    for _ in range(2):
        images, targets = zip(*loader, strict=True)
        assert [len(part) for part in targets] == [8, 8, 4]
        assert torch.equal(torch.cat(images), split.batch(torch.arange(20)))
        assert torch.equal(torch.cat(targets), split.targets)


def test_all_networks_are_timed_and_each_has_its_mode_back():
    networks = [tiny_model(), tiny_model().eval(), tiny_model()]
    times = reports.benchmark_all_ms(networks, torch.zeros(2, 3, 8, 8), repeats=2)
    assert len(times) == 3
    assert min(times) > 0
    assert [network.training for network in networks] == [True, False, True]


def test_off_a_terminal_an_epoch_is_one_line(whole):
    out = io.StringIO()
    with reports.Reporter("plain", 24, 0, visible=True, console=Console(file=out, width=40)) as reporter:
        reporter.step(reports.Step(0, 0, 0.1, 1.5, {}), 8)
        reporter.epoch(whole[2][0])
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().startswith("plain: epoch 1  lr ")


def test_the_benchmark_times_both_and_leaves_their_modes():
    first, second = tiny_model(), nn.Sequential(tiny_model(), nn.Linear(4, 4)).eval()
    times = training.benchmark_ms(first, second, torch.zeros(2, 3, 8, 8), repeats=3)
    assert min(times) > 0
    assert first.training
    assert not second.training


@pytest.mark.parametrize("path", sorted((EXAMPLES / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_read_and_written_alike(path):
    recipe = Recipe.from_toml(path)
    assert Recipe.from_tables(recipe.to_tables()) == recipe


def test_the_published_numbers_of_the_recipes():
    c10, c100, imagenet = (
        Recipe.from_toml(EXAMPLES / "recipes" / f"coded-{name}.toml") for name in ("cifar10", "cifar100", "imagenet")
    )
    for recipe in (c10, c100):
        t = recipe.training
        assert (t.epochs, t.batch_size, t.lr, t.final_lr, t.momentum, t.nesterov) == (300, 512, 0.1, 1e-5, 0.9, True)
        assert (t.weight_decay, recipe.method.options["mu"], recipe.method.options["p_drop"]) == (5e-4, 6.0, 0.1)
    assert (c10.model.name, c100.model.name) == ("resnext29_10x11d", "resnext29_20x6d")
    assert c10.data.options["randaugment"] == [3, 4]
    assert c100.data.options["randaugment"] == [1, 2]
    assert c10.method.options["scheme"] == {"layer2": "5/10", "layer3": "3/10"}
    assert c100.method.options["scheme"] == {"layer2": "8/20", "layer3": "4/20"}
    t = imagenet.training
    assert (t.epochs, t.warmup_epochs, t.cooldown_epochs, t.batch_size, t.lr) == (250, 5, 10, 1536, 0.6)
    assert (t.weight_decay, imagenet.method.options["mu"]) == (1e-4, 2.0)
    assert (imagenet.data.options["train_size"], imagenet.data.options["test_size"]) == (160, 224)


STEPPED = '[training]\nschedule = "step"\nmilestones = '


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[training]\nepoch = 3", r"unknown keys \['epoch'\] in \[training\]; it has epochs, batch_size"),
        ("[trainings]\nepochs = 3", r"unknown tables \['trainings'\]; a recipe has data, model, method, training"),
        ("training = 3", r"training is 3; expected a table \[training\]"),
        ("[training]\nepochs = 3.0", r"training\.epochs is 3\.0; expected int"),
        ("[training]\nepochs = true", r"training\.epochs is True; expected int"),
        ("[training]\namp = 1", r"training\.amp is 1; expected bool"),
        ('[training]\nlr = "0.1"', r"training\.lr is '0\.1'; expected float"),
        ('[training]\nschedule = "linear"', r"schedule is 'linear'; expected one of \('cosine', 'constant', 'step'\)"),
        (
            '[training]\nschedule = "step"',
            r"milestones is \[\]; expected rising epochs, at least one, from 1 to before",
        ),
        (f"{STEPPED}[3, 2]", r"milestones is \[3, 2\]; expected rising epochs"),
        (f"{STEPPED}[2, 2]", r"milestones is \[2, 2\]; expected rising epochs"),
        (f"{STEPPED}[0, 2]", r"milestones is \[0, 2\]; expected rising epochs"),
        (f"{STEPPED}[2, 10]", r"milestones is \[2, 10\]; expected .* to before training\.epochs = 10"),
        (f"{STEPPED}[2.0]", r"milestones is \[2\.0\]; expected a list of whole numbers, such as \[30, 60, 90\]"),
        (f"{STEPPED}[true]", r"milestones is \[True\]; expected a list of whole numbers"),
        (f"{STEPPED}5", r"milestones is 5; expected a list of whole numbers"),
        (f"{STEPPED}[2]\ngamma = 0", r"training\.gamma is 0\.0; expected more than 0 and at most 1"),
        (f"{STEPPED}[2]\ngamma = 1.5", r"training\.gamma is 1\.5; expected more than 0 and at most 1"),
        ("[training]\nmilestones = [3]", r'belong to schedule = "step", found \'cosine\'; set the schedule, or leave'),
        ("[training]\ngamma = 0.2", r'belong to schedule = "step", found \'cosine\''),
        ('[training]\nstart = "end"', r"training\.start is 'end'; expected one of \('same', 'trained'\)"),
        ("[training]\nlr = 0", r"training\.lr is 0\.0; expected more than 0"),
        ("[training]\nepochs = 5\nwarmup_epochs = 6", r"training\.epochs is 5, less than warmup_epochs"),
        ("[model]\ngroups = 3", r"model\.name is None; expected a name in quotes"),
        ("[training\n", "not a TOML file"),
    ],
)
def test_a_recipe_that_is_not_understood_is_refused(tmp_path, text, message):
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.from_toml(path)
    assert str(path) in str(caught.value)


def test_a_missing_recipe_is_named(tmp_path):
    with pytest.raises(RecipeError, match=r"none\.toml: no such file; the shipped ones are in examples/recipes"):
        Recipe.from_toml(tmp_path / "none.toml")


def test_whole_numbers_are_read_as_floats():
    assert Recipe.from_tables({"training": {"lr": 1}}).training.lr == 1.0
    assert type(Recipe.from_tables({"training": {"lr": 1}}).training.lr) is float
