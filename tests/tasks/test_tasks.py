"""Tasks: a batch to a loss, answers to a metric, what is drawn for a batch, and teachers."""
import numpy as np
import pytest

import tinytoken as tt
from small import refuses
from tiny import SIZES, batches, bits, dynamicvit, lookupvit, train, vit
from tinytoken import tasks
from tinytoken.models import DynamicViT, ViT
from tinytoken.tasks import Classify, Distil, accuracy
from tinytoken.train import fit


def test_the_teacher_is_never_changed():
    model, task = dynamicvit()
    before, student = bits(task.teacher), bits(model)
    task.teacher.train()
    train((model, Distil(model, task.teacher)))
    assert bits(task.teacher) == before and not task.teacher.training
    assert all(p.grad is None for p in task.teacher.parameters())
    assert all(bits(model)[name] != value for name, value in student.items())


def test_the_teacher_is_not_in_the_graph():
    model, task = dynamicvit()
    images, labels = batches()(0)
    loss, _ = task(images, labels, **task.noise(len(images), 0, 0, np))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(p.grad is None for p in task.teacher.parameters())


def test_distil_draws_for_the_whole_batch_by_image_number():
    model = DynamicViT(**SIZES | {"depth": 2}, prune_before=(0, 1), keep_ratios=(0.75, 0.5))
    task = Distil(model, ViT(**SIZES))
    whole, part, other = (task.noise(size, step, 1, np)["noise"] for size, step in ((8, 2), (3, 2), (8, 3)))
    assert whole.shape == (8, 2, 4, 2) and np.array_equal(whole[:3], part)
    assert not np.array_equal(whole, other)
    assert not np.array_equal(whole[:, 0], whole[:, 1])


# What a task is

def test_tasks_are_registered():
    assert tasks.task.pick("classify") is Classify and tasks.task.pick("distil") is Distil
    assert issubclass(Distil, tasks.Task) and (Classify.taught, Distil.taught) == (False, True)
    with refuses(f"task: 'colour', expected one of {', '.join(tasks.task)}"):
        tasks.task.pick("colour")


def test_settings_are_what_a_checkpoint_is_to_say():
    (model, _), dynamic, teacher = vit(), dynamicvit()[0], ViT(**SIZES)
    assert Classify(model).settings == {"smoothing": 0.0}
    assert Classify(model, smoothing=0.1, drop_path=0.2).settings == {"smoothing": 0.1, "drop_path": 0.2}
    # the model's own
    assert Distil(dynamic, teacher).settings == {"smoothing": 0.0, "weights": (1, 2, 0.5, 0.5)}
    assert Distil(model, teacher, weights=(1, 3), drop_path=0.2).settings == {
        "smoothing": 0.0, "weights": (1, 3), "drop_path": 0.2}


def test_accuracy(xp):
    logits = np.array([[0, 1, 2], [3, 1, 2], [0, 5, 1], [1, 0, 0]])
    assert accuracy(logits, np.array([2, 0, 0, 0])) == 0.75
    for task, labels in ((Classify, xp.asarray([2, 0, 0, 0])), (Distil, np.array([2, 0, 0, 0]))):
        assert task.metrics(logits, labels) == {"accuracy": 0.75}


# Losses

@pytest.mark.parametrize("make", [vit, lookupvit])
def test_classification_is_the_models_own_loss(make):
    model, _ = make()
    images, labels = batches()(0)
    loss, parts = Classify(model.train(), smoothing=0.1)(images, labels)
    expected, of = model.loss(model(images), labels, smoothing=0.1)
    assert loss.item() == expected.item()
    assert {n: p.item() for n, p in parts.items()} == {n: p.item() for n, p in of.items()}
    assert Classify(model).noise(4, 0, 0) == {}


def test_classification_of_probabilities():
    model, _ = vit()
    images, labels = batches()(0)
    shares = np.random.default_rng(0).dirichlet(np.ones(3), len(labels)).astype("float32")
    loss, _ = Classify(model)(images, shares)
    log_q = tt.ops.log_softmax(model(images).logits).data
    assert loss.item() == pytest.approx(-(shares * log_q).sum(axis=1).mean(), rel=1e-6)


def test_a_dynamicvit_without_a_teacher_learns_class_and_ratio_alone():
    """Its draws reach it, and what it learns is what Distil would have it learn with no weight on the
    teacher's parts."""
    (model, distil), (images, labels) = dynamicvit(), batches()(0)
    task = Classify(model.train())
    draws = task.noise(len(images), 3, 0)
    assert draws.keys() == {"noise"}
    assert np.array_equal(draws["noise"], distil.noise(len(images), 3, 0)["noise"])
    loss, parts = task(images, labels, **draws)
    out = model(images, **draws)
    assert list(parts) == ["class", "ratio"]
    ratio = ((out.decisions[0].data.mean(axis=1) - 0.5) ** 2).mean()
    assert parts["class"].item() == tt.ops.cross_entropy(out.logits, labels).item()
    assert parts["ratio"].item() == pytest.approx(ratio)
    assert loss.item() == pytest.approx(parts["class"].item() + 2 * ratio)
    without, _ = Distil(model, distil.teacher, weights=(1, 2, 0, 0))(images, labels, **draws)
    assert loss.item() == pytest.approx(without.item())


def test_a_dynamicvit_is_trained_without_a_teacher():
    def make():
        model, _ = dynamicvit()
        return model, Classify(model)
    (model, report), (again, same) = train(make), train(make)
    assert list(report) == ["seconds", "loss", "class", "ratio"] and report["class"] < 1
    assert bits(model) == bits(again) and report | {"seconds": 0} == same | {"seconds": 0}
    # draws are the image's
    assert train(make, threads=1, micro=6)[1]["loss"] == pytest.approx(report["loss"], rel=1e-3)


@pytest.mark.parametrize("make", [vit, lookupvit, dynamicvit])
def test_distillation_is_the_models_own_loss_with_a_teacher(make):
    (model, _), teacher = make(), ViT(**SIZES)
    for p in teacher.parameters():
        p.data += 0.1
    images, labels = batches()(0)
    task = Distil(model.train(), teacher.train(), smoothing=0.1)
    draws = task.noise(len(images), 1, 2)
    loss, parts = task(images, labels, **draws)
    expected, _ = model.loss(model(images, **draws), labels, teacher(images), smoothing=0.1)
    assert loss.item() == expected.item() and "kl" in parts and not teacher.training
    weights = (3,) + (0,) * (len(model.loss_weights) - 1)
    loss, parts = Distil(model, teacher, weights=weights)(images, labels, **draws)
    alone = parts["class"].item() + (parts["lookup"].item() if "lookup" in parts else 0)
    assert loss.item() == pytest.approx(3 * alone)


def test_a_task_of_ones_own():
    """The three things that a task has: a loss of a batch, what it is trained with, a metric."""
    @tasks.task("brightness")
    class Brightness(tasks.Task):
        def __call__(self, images, labels, **draws):
            wrong = self.model(images, **draws).logits[:, 0] - labels
            loss = (wrong * wrong).mean()
            return loss, {"square": loss}

        @staticmethod
        def metrics(answers, labels):
            return {"error": float(np.abs(answers[:, 0] - labels).mean())}
    try:
        model, _ = vit()
        drawn = batches()
        drawn.labels = drawn.images.mean(axis=(1, 2, 3)).astype("float32") / 255
        report = tt.train.fit(model, tasks.task.pick("brightness")(model), drawn, steps=30, lr=0.01,
                              bar=False)
        assert report["loss"] == report["square"] < 0.1
    finally:
        del tasks.task["brightness"]


def test_options_of_the_loss_go_to_the_model_and_a_pooled_one_takes_the_whole_batch(tmp_path):
    (model, task), options = dynamicvit(), {"ratio_norm": "pooled", "token_loss": "kl"}
    pooled, sliced = (Distil(model, task.teacher, options=o) for o in (options, {"token_loss": "kl"}))
    assert (pooled.whole, sliced.whole, task.whole, Classify(model).whole) == (True, False, False, False)
    assert pooled.settings["options"] == options and "options" not in task.settings
    arrays = batches(8)(0)
    draws = pooled.noise(8, 0, 0, np)
    loss, parts = pooled(*arrays, **draws)
    out = model(arrays[0], **draws)
    with tt.no_grad():
        taught = task.teacher(arrays[0])
    wanted, _ = model.loss(out, arrays[1], taught, **options)
    assert loss.item() == wanted.item() != task(*arrays, **draws)[0].item()
    assert parts["token"].item() != task(*arrays, **draws)[1]["token"].item()
    # in as many slices as fit would take, and in one: the same
    weights = []
    for threads in (1, 2):
        model, task = dynamicvit()
        fit(model, Distil(model, task.teacher, options=options), batches(8), steps=2, threads=threads,
            bar=False)
        weights.append(bits(model))
    assert weights[0] == weights[1]
    with refuses("fit: slices of 4 images for a loss of the whole batch, expected micro None"):
        fit(model, pooled, batches(8), steps=2, micro=4, bar=False)
