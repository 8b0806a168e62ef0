"""Trials: equal starts, equal pictures in equal order, arms that go on from others, and figures that are what
they say."""
import dataclasses
import json
import types

import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import bits, recipes_model
from tinytoken import tasks
from tinytoken.data import likeness, make_scenes, normalise
from tinytoken.errors import Busy
from tinytoken.experiments import Arm, Recipe, Trial, kept_on_object, lesson, read_alike, trial
from tinytoken.experiments.arm import first_step
from tinytoken.files import claimed
from tinytoken.models import DynamicViT, LookupViT, ViT
from tinytoken.train import Classify, Distil, Run, checkpoint, fit

RECIPE = Recipe(batch=4, dim=16, depth=2, heads=2, patch=8, train_pictures=12, test_pictures=10, seed=3,
                smoothing=0.0)
PRUNED = dict(prune_before=(1,), keep_ratios=(0.5,))
ARMS = {"start": Arm("vit", steps=3, lr=0.01),
        "further": Arm("vit", start="start", steps=2, lr=0.003),
        "last": Arm("vit", start="further", steps=2, lr=0.001),
        "pruned": Arm("dynamicvit", PRUNED, start="start", steps=2, lr=0.003, new_lr_scale=3.0),
        "taught": Arm("dynamicvit", PRUNED, task="distil", settings={"weights": (1, 2, 0, 1)},
                      start="further", teacher="start", steps=1),
        "alone": Arm(DynamicViT, PRUNED, task=Classify, settings={"smoothing": 0.2}, steps=1)}


@pytest.fixture
def job():
    return Trial(RECIPE, ARMS, bar=False)


# Models and pictures

def test_a_models_weights_are_its_starts_and_else_the_seeds(job):
    vit = job.new(ViT)
    for name, array in job.new("vit").state_dict().items():
        assert np.array_equal(array, vit.state_dict()[name]), name
    vit.head.bias.data += 1
    dynamic, fresh = (job.new(DynamicViT, start, **PRUNED) for start in (vit, None))
    for name, array in dynamic.state_dict().items():
        assert np.array_equal(array, vit.state_dict().get(name, fresh.state_dict()[name])), name
    assert job.new(ViT, dim=8, depth=1).config.dim == 8 and job.recipe.dim == 16


def test_choosing_is_by_pictures_that_are_held_out_of_training():
    plain, apart, choosing = (Trial(dataclasses.replace(RECIPE, train_pictures=count, **more), bar=False)
                              for count, more in ((17, {}), (12, dict(held_out=5)),
                                                  (12, dict(held_out=5, choosing=True))))
    bytes_of = lambda pictures: {image.tobytes() for image in pictures.images}
    assert len(apart.train_set) == 12 and bytes_of(apart.train_set) < bytes_of(plain.train_set)
    assert np.array_equal(apart.test.images, plain.test.images)
    assert np.array_equal(choosing.train_set.images, apart.train_set.images)
    assert bytes_of(choosing.test) == bytes_of(plain.train_set) - bytes_of(apart.train_set)
    assert len(choosing.test) == 5 and choosing.batches.mean == apart.batches.mean
    assert np.array_equal(choosing.batches.images, choosing.train_set.images)
    with refuses("Trial: choosing by 0 pictures: held_out says how many"):
        Trial(dataclasses.replace(RECIPE, choosing=True), bar=False)


def test_a_models_sizes_are_the_recipes_and_the_pictures(monkeypatch):
    small = Trial(dataclasses.replace(RECIPE, size=16), bar=False)
    assert small.test.images.shape == (10, 3, 16, 16) and small.new("vit").config.image_size == 16
    model = small.new("lookupvit", compressed=(1, 2), mlp_ratio=2)
    config = model.config
    assert (config.patch_size, config.depth, config.heads, config.num_classes) == (8, 2, 2, 10)
    assert model.config.compressed == (1, 2) and model.config.mlp_ratio == 2
    wide = types.SimpleNamespace(images=small.test.images[:, :, :8], labels=small.test.labels,
                                 names=("a", "b"), moves={})
    monkeypatch.setattr(trial, "load_pictures", lambda *_, **__: (wide, wide))
    model = Trial(RECIPE, bar=False).new("vit")
    assert model.config.image_size == (8, 16) and model.config.num_classes == 2


def test_photographs_are_moved_and_mirrored_and_scenes_are_not(job, monkeypatch):
    assert not job.batches.pad and not job.batches.flip
    photographs = types.SimpleNamespace(images=job.test.images, labels=job.test.labels, names=job.test.names,
                                        moves={"pad": 4, "flip": True})
    monkeypatch.setattr(trial, "load_pictures", lambda name, **_: (photographs, photographs))
    batches = Trial(Recipe(data="cifar10", batch=4), bar=False).batches
    assert batches.pad == 4 and batches.flip
    batches = Trial(Recipe(data="cifar10", batch=4), bar=False, flip=False, erase=0.3, mixup=0.8).batches
    assert (batches.pad, batches.flip, batches.erase, batches.ways) == (4, False, 0.3, {"mixup": 0.8})


def test_the_pictures_are_those_that_the_recipe_asks_for(monkeypatch):
    asked = {}

    def load(name, **request):
        asked.update(name=name, **request)
        return (make_scenes(4, seed=0, split="test"),) * 2
    monkeypatch.setattr(trial, "load_pictures", load)
    Trial(dataclasses.replace(RECIPE, data="here", size=16), bar=False)
    assert asked == {"name": "here", "train": 12, "test": 10, "seed": 3, "size": 16}


# Arms

def test_what_an_arm_is_where_nothing_else_is_said():
    arm = Arm("vit")
    assert arm.config == arm.settings == arm.fit == {}
    assert arm.task is arm.start is arm.teacher is arm.phase is None
    assert (arm.steps, arm.lr, arm.new_lr_scale, arm.offset, arm.beside) == (0, 1e-3, 1.0, None, ())
    assert Arm("vit").config is not Arm("vit").config
    with pytest.raises(dataclasses.FrozenInstanceError):
        arm.steps = 3


def test_an_arms_steps_are_counted_after_those_of_its_start():
    assert [first_step(ARMS, name) for name in ARMS] == [0, 3, 5, 3, 5, 0]
    arms = ARMS | {"start": dataclasses.replace(ARMS["start"], offset=100),
                   "pruned": dataclasses.replace(ARMS["pruned"], offset=7)}
    assert [first_step(arms, name) for name in arms] == [100, 103, 105, 7, 105, 0]


@pytest.fixture
def calls(monkeypatch):
    """What fit is called with; it moves every weight, so that phases can be told apart."""
    seen = []

    def fit(model, task, batches, **settings):
        call = types.SimpleNamespace(model=model, task=task, before=model.state_dict(), **settings)
        call.scales = {name: p.lr_scale for name, p in model.named_parameters()}
        call.frozen = {name: p.frozen_steps for name, p in model.named_parameters()}
        for p in model.parameters():
            p.data += len(seen) + 1
        seen.append(call)
        return {"phase": settings["phase"]}
    monkeypatch.setattr(trial, "fit", fit)
    return seen


def test_what_an_arm_needs_is_trained_before_it_and_once(job, calls):
    model, report = job.train("last")
    assert report == {"phase": "last"} and [call.phase for call in calls] == ["start", "further", "last"]
    steps = [(call.steps, call.lr, call.offset) for call in calls]
    assert steps == [(3, 0.01, 0), (2, 0.003, 3), (2, 0.001, 5)]
    alike = {(call.seed, call.weight_decay, call.run, call.bar, call.precision) for call in calls}
    assert alike == {(3, 0.05, None, False, "fp32")}
    assert job.train("last")[0] is model and len(calls) == 3
    start, further = (job.train(name)[0].state_dict() for name in ("start", "further"))
    assert all(np.array_equal(array, calls[1].before[name]) for name, array in start.items())
    assert all(np.array_equal(array, calls[2].before[name]) for name, array in further.items())
    assert len(calls) == 3


def test_parameters_that_are_new_learn_at_a_rate_of_their_own(job, calls):
    job.train("pruned")
    scales = calls[-1].scales
    assert scales == {name: 3.0 if name.startswith("score_predictor") else 1.0 for name in scales}
    assert set(scales.values()) == {1.0, 3.0}
    job.train("alone")
    assert set(calls[-1].scales.values()) == {1.0}  # without a start nothing is newer than the rest


def test_what_an_arm_starts_from_can_stay_first_and_learn_slowly_then(job, calls):
    official = dataclasses.replace(ARMS["pruned"], start_lr_scale=0.01, frozen_steps=1)
    job.arms = ARMS | {"official": official}
    job.train("official")
    scales, frozen = calls[-1].scales, calls[-1].frozen
    new = [name for name in scales if name.startswith("score_predictor")]
    assert scales == {name: 3.0 if name in new else 0.01 for name in scales}
    assert frozen == {name: 0 if name in new else 1 for name in scales} and 0 < len(new) < len(scales)


def test_tasks_are_the_models_own_or_the_arms(job, calls):
    models = {name: job.train(name)[0] for name in ARMS}
    by = {call.phase: call.task for call in calls}
    assert {name: type(task) for name, task in by.items()} == {
        "start": Classify, "further": Classify, "last": Classify, "pruned": Distil, "taught": Distil,
        "alone": Classify}
    assert all(by[name].model is model for name, model in models.items())
    assert by["pruned"].teacher is models["start"] and by["pruned"].weights == DynamicViT.loss_weights
    assert by["taught"].teacher is models["start"] and by["taught"].weights == (1, 2, 0, 1)
    taught = next(call for call in calls if call.phase == "taught")
    assert all(np.array_equal(taught.before[name], array)
               for name, array in models["further"].state_dict().items())
    assert by["alone"].smoothing == 0.2 and by["start"].smoothing == 0.0


def test_a_teacher_that_no_arm_starts_from_is_trained_for_its_pupil(calls):
    arms = {"teacher": Arm("vit", steps=2),
            "pupil": Arm("lookupvit", dict(compressed=(2, 2)), task="distil", teacher="teacher",
                                                         steps=1)}
    job = Trial(dataclasses.replace(RECIPE, smoothing=0.1), arms, bar=False)
    model, _ = job.train("pupil")
    assert isinstance(model, LookupViT) and [call.phase for call in calls] == ["teacher", "pupil"]
    assert calls[1].task.teacher is job.train("teacher")[0] and calls[1].offset == 0
    assert {call.task.smoothing for call in calls} == {0.1}


def test_an_arms_other_settings_reach_fit_and_its_files(calls):
    arms = {"ViT, averaged": Arm("vit", steps=2, fit={"average": 0.9, "clip": None},
                                 phase="averaged weights")}
    Trial(RECIPE, arms, bar=False, threads=2).train("ViT, averaged")
    assert (calls[0].average, calls[0].clip, calls[0].threads) == (0.9, None, 2)
    assert calls[0].phase == "averaged-weights"


def test_arms_that_cannot_be_trained(job):
    with refuses("trial: no arm 'fast', expected one of start, further, last, pruned, taught, alone"):
        job.train("fast")
    job.arms = {"lonely": Arm("dynamicvit", PRUNED, steps=1), "vain": Arm("vit", start="gone", steps=1)}
    with refuses("trial: an arm of DynamicViT without a teacher, which Distil wants: give it a teacher or a "
                 "start, or another task"):
        job.train("lonely")
    with refuses("trial: no arm 'gone', expected one of lonely, vain"):
        job.train("vain")


# The same bits

def test_two_arms_are_one_model_trained_on(job):
    """To the bit: a training in two parts is one model, two calls of fit, and an offset for the second."""
    model, reports = job.new("vit"), []
    for arm, offset in (("start", 0), ("further", 3)):
        reports.append(fit(model, Classify(model), job.batches, steps=ARMS[arm].steps, lr=ARMS[arm].lr,
                           offset=offset, seed=3, bar=False))
    assert bits(job.train("further")[0]) == bits(model)
    for name, report in zip(("start", "further"), reports):
        assert job.train(name)[1] | {"seconds": 0} == report | {"seconds": 0}


def test_an_arm_that_is_taught_is_distilled_from_its_start(job):
    """To the bit, with its new parameters' learning rate; the start, which is the teacher, stays as it is."""
    teacher = job.new("vit")
    fit(teacher, Classify(teacher), job.batches, steps=3, lr=0.01, seed=3, bar=False)
    model = job.new("dynamicvit", teacher, **PRUNED)
    for predictor in model.score_predictor:
        for p in predictor.parameters():
            p.lr_scale = 3.0
    fit(model, Distil(model, teacher), job.batches, steps=2, lr=0.003, offset=3, seed=3, bar=False)
    assert bits(job.train("pruned")[0]) == bits(model)
    assert bits(job.train("start")[0]) == bits(teacher)


def test_an_interrupted_trial_goes_on_and_a_finished_one_is_not_trained_twice(tmp_path):
    def train(folder, steps):
        job = Trial(RECIPE, {"vit further": Arm("vit", steps=steps, offset=5)}, run=Run(folder), bar=False)
        model, report = job.train("vit further")
        return report, model.state_dict()

    report, weights = train(tmp_path, 3)
    again, same = train(tmp_path, 3)
    assert again == report and all(np.array_equal(same[name], weights[name]) for name in weights)
    assert (tmp_path / "vit-further.npz").exists()
    with pytest.raises(tt.InputError, match="another run"):
        train(tmp_path, 4)


def test_a_second_part_goes_on_from_the_checkpoint_of_the_first(tmp_path, job):
    run = Run(tmp_path)
    Trial(RECIPE, ARMS, run=run, bar=False).train("start")
    before = run.checkpoint("start").read_bytes()
    model, _ = Trial(RECIPE, ARMS, run=run, bar=False).train("further")
    assert bits(model) == bits(job.train("further")[0]) and run.checkpoint("start").read_bytes() == before
    header, _ = checkpoint.load(run.checkpoint("further"))
    assert (header["recipe"]["offset"], header["recipe"]["steps"], header["data"]) == (3, 2, "scenes")
    assert header["classes"] == list(job.test.names) and tuple(header["mean"]) == job.batches.mean
    assert header["bounds"] == likeness.bounds(job.train_set.images)


def test_a_phase_is_trained_by_one_process_at_a_time(tmp_path):
    job = Trial(RECIPE, run=Run(tmp_path), bar=False)
    model = job.new(ViT)
    with claimed(job.run.checkpoint("a-b")), pytest.raises(Busy, match="a-b.npz"):
        job.fit("a b", Classify(model), 1, 1e-3)
    job.fit("a b", Classify(model), 1, 1e-3)


def test_too_few_pictures_for_a_batch_are_said():
    with pytest.raises(tt.InputError, match="^Trial: 63 pictures of scenes to train on, expected at "
                                            "least 64, a batch$"):
        Trial(Recipe(train_pictures=63, test_pictures=10), bar=False)


def test_a_lessons_trial_keeps_its_checkpoints_out_of_version_control(tmp_path):
    here = lesson.begin("00_test", ["--full", "--device", "cpu", "--out", str(tmp_path / "out")])
    job = here.trial(RECIPE, 5, ARMS, erase=0.5)
    assert job.recipe == dataclasses.replace(RECIPE, seed=5) and job.arms is ARMS and job.batches.erase == 0.5
    job.bar = False
    job.train("start")
    folder = tmp_path / "out" / "checkpoints" / "scenes"
    assert (folder / "seed5" / "start.npz").exists() and (folder / ".gitignore").read_text() == "*\n"
    here = lesson.begin("00_test", ["--smoke", "--device", "cpu", "--out", str(tmp_path / "smoke")])
    assert here.trial(RECIPE, 5).run is None and not (tmp_path / "smoke" / "checkpoints").exists()


# What is noted

def test_what_is_measured(job):
    vit = job.new(ViT)
    report = job.fit("a b", Classify(vit), 2, 1e-3)
    row, logits = job.measure(vit, report), job.answers(vit)
    assert row["accuracy"] == np.mean(logits.argmax(axis=1) == job.test.labels) and logits.shape == (10, 10)
    assert row["macs"] == tt.macs(vit, job.prepare(job.test.images[:1])).total
    assert row["parameters"] == sum(p.data.size for p in vit.parameters()) and row["trained"] is report
    assert report["seconds"] > 0
    assert json.loads(json.dumps(row)) == row
    right = np.eye(10)[job.test.labels]  # answers that are there already are not asked for again
    assert job.measure(vit, report, right)["accuracy"] == 1
    assert job.measure(vit, report, right)["macs"] == row["macs"]


def test_a_call_is_measured_as_it_is_made(job):
    model = job.new("lookupvit", compressed=(2, 2), classifiers="both")
    one, both = (job.measure(model, None, **call) for call in ({}, {"mean_of_heads": True}))
    assert both["macs"] > one["macs"] and both["parameters"] == one["parameters"]


def test_metrics_are_the_tasks(job, monkeypatch):
    monkeypatch.setattr(Classify, "metrics", staticmethod(lambda answers, labels: {"points": len(answers)}))
    assert job.measure(job.new("vit"), None)["points"] == 10
    assert "accuracy" not in job.measure(job.new("vit"), None)
    assert issubclass(tasks.task.pick(ViT.task), Classify)


def test_an_arms_own_task_measures_it(job):
    class Counts(tasks.Task):
        @staticmethod
        def metrics(answers, labels):
            return {"answers": len(answers)}
    model = job.new("vit")
    assert job.measure(model, None, task=Counts)["answers"] == 10
    assert "accuracy" not in job.measure(model, None, task=Counts)
    assert job.measure(model, None, task="distil") == job.measure(model, None)


# Where the objects are

def test_kept_on_object_is_the_mean_over_kept_patches_pixel_by_pixel():
    """140 scenes, of which 131 are looked at: neither is a multiple of the 128 that go through the model at
    once."""
    test = make_scenes(140, seed=1, split="test")
    model = recipes_model("dynamicvit", prune_before=(0, 1), keep_ratios=(0.5, 0.2))
    prepare = lambda images: normalise(images, (0.2,) * 3, (0.2,) * 3)
    for p in model.score_predictor[0].parameters() + model.score_predictor[1].parameters():
        p.data += np.random.default_rng(0).standard_normal(p.shape).astype("float32")
    found = kept_on_object(model, test, prepare, patch=8, most=131)
    out = model(prepare(test.images))
    masks = test.instances > 0
    share = lambda b, n: masks[b, n // 4 * 8:n // 4 * 8 + 8, n % 4 * 8:n % 4 * 8 + 8].mean()
    for stage, kept in zip(found["stages"], out.kept):
        assert stage == pytest.approx(np.mean([share(b, n) for b in range(131) for n in kept[b]]), rel=1e-6)
    assert found["all"] == pytest.approx(masks[:131].mean(), rel=1e-6)
    assert [k.shape[1] for k in out.kept] == [8, 3]
    assert found["stages"][0] != pytest.approx(found["all"], rel=1e-3)


@pytest.mark.parametrize("arms", [{"a": Arm("vit", steps=1, start="a")},
                                  {"a": Arm("vit", steps=1, start="b"), "b": Arm("vit", steps=1, start="a")},
                                  {"a": Arm("dynamicvit", PRUNED, steps=1, teacher="a")}])
def test_an_arm_that_needs_itself_is_refused(arms):
    with refuses("trial: arm 'a' starts from, or is taught by, itself"):
        Trial(RECIPE, arms, bar=False).train("a")


def test_an_arm_is_trained_again_after_an_error(monkeypatch):
    here = Trial(RECIPE, {"a": Arm("vit", steps=1)}, bar=False)
    monkeypatch.setattr(trial, "fit", lambda *_, **__: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            here.train("a")


def test_arms_are_a_mapping():
    with pytest.raises(tt.InputError, match="Trial: arms 'cpu', expected"):
        Trial(RECIPE, "cpu")


def test_how_alike_compressed_tokens_read(job):
    model, images = job.new("lookupvit", compressed=(1, 2)), job.prepare(job.test.images[:3])
    with tt.no_grad():
        attention = model.eval()(images, trace=True).attention
    by_loops = [np.mean([a[0] @ a[1] / np.linalg.norm(a[0]) / np.linalg.norm(a[1])
                         for by_head in A.numpy() for a in by_head]) for A in attention]
    np.testing.assert_allclose(read_alike(model, images), by_loops, rtol=1e-5)
    for block in model.blocks:  # every query 0: all read everything
        for p in (block.gather_q.weight, block.gather_q.bias):
            p.data[...] = 0
    np.testing.assert_allclose(read_alike(model, images), 1, rtol=1e-6)
