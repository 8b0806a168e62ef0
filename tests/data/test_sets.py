"""Data sets by name or folder: what --data may say, who is asked, and what is refused."""
import types

import numpy as np
import pytest

from small import refuses
from tiny import small_cifar
from tinytoken import InputError, data, random
from tinytoken.data import dataset, hold_out, load_pictures, make_scenes
from tinytoken.data.sets import DataSets

REQUEST = dict(train=6, test=4, seed=2, size=16)


def test_scenes_are_made_as_they_are_asked_for():
    train, test = load_pictures("scenes", **REQUEST)
    for part, count, split in ((train, 6, "train"), (test, 4, "test")):
        made = make_scenes(count, seed=2, split=split, size=16)
        assert np.array_equal(part.images, made.images) and np.array_equal(part.labels, made.labels)
        assert part.images.shape == (count, 3, 16, 16) and part.names == made.names and part.moves == {}


def test_the_usual_request_is_that_of_the_main_job(monkeypatch):
    asked = {}

    def both(place, **request):
        asked.update(place=place, **request)
        return 1, 2
    monkeypatch.setitem(dataset, "scenes", both)
    assert load_pictures("scenes") == (1, 2)
    assert asked == {"place": None, "train": 16000, "test": 2000, "seed": 0, "size": 32}


@pytest.mark.parametrize("way", ["folder", "text", "name"])
def test_cifar_is_recognised_in_a_folder_and_known_by_name(way, tmp_path, monkeypatch):
    folder, images, labels = small_cifar(tmp_path, monkeypatch)
    monkeypatch.setenv("TINYTOKEN_DATA", str(folder))
    train, test = load_pictures({"folder": folder, "text": str(folder), "name": "cifar10"}[way])
    assert np.array_equal(np.concatenate([train.images, test.images]), images)
    assert np.array_equal(np.concatenate([train.labels, test.labels]), labels)
    assert train.moves == {"pad": 4, "flip": True} and len(train.names) == 10


def test_what_is_not_there_and_what_holds_nothing(tmp_path):
    kinds = (f"expected {', '.join(dataset)}, or a folder with CIFAR's binary files or their archive or with "
             "images by class: CLASS/*.png, or train/CLASS/*.png and test/CLASS/*.png or with "
             "videos by class: CLASS/*.mp4, or train/CLASS/*.mp4 and test/CLASS/*.mp4")
    assert kinds == f"expected {dataset.choices()}"
    with refuses(f"data: nowhere does not exist; {kinds}"):
        load_pictures("nowhere")
    with refuses(f"data: no name; {kinds}"):
        load_pictures("")
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", str(tmp_path / "empty")):
        with refuses(f"data: {tmp_path / 'empty'} holds no data set that is known here; {kinds}"):
            load_pictures(place)
    (tmp_path / "a.txt").write_text("no pictures")
    with refuses(f"data: {tmp_path / 'a.txt'} holds no data set that is known here; {kinds}"):
        load_pictures(tmp_path / "a.txt")


def test_a_set_of_ones_own_by_name_and_by_folder(tmp_path, monkeypatch):
    """The first that recognises a folder gets it, and what it refuses is refused."""
    sets, calls = DataSets(), []
    monkeypatch.setattr(data.sets, "dataset", sets)

    @sets("grey", recognises=lambda path: (path / "grey.txt").exists())
    def grey(place, *, size, **_):
        calls.append(("grey", place))
        pictures = types.SimpleNamespace(images=np.zeros((2, 3, size, size), "uint8"))
        return pictures, pictures

    @sets("any", recognises=lambda path: True)
    def anything(place, **_):
        calls.append(("any", place))
        raise InputError("any: not today")

    assert sets["grey"] is grey and list(sets) == ["grey", "any"]
    assert load_pictures("grey", size=8)[0].images.shape == (2, 3, 8, 8)
    (tmp_path / "grey.txt").touch()
    load_pictures(tmp_path)
    (tmp_path / "grey.txt").unlink()
    with refuses("any: not today"):
        load_pictures(tmp_path)
    assert calls == [("grey", None), ("grey", tmp_path), ("any", tmp_path)]


def test_a_folder_called_as_a_set_is_asked_for_by_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenes").mkdir()
    assert load_pictures("scenes", **REQUEST)[0].images.shape == (6, 3, 16, 16)
    with refuses("data: ./scenes holds no data set that is known here; expected "
                 f"{dataset.choices()}"):
        load_pictures("./scenes")


# Pictures that are held out

def test_held_out_pictures_are_of_the_training_set_and_the_same_for_everybody():
    scenes = make_scenes(40, seed=1)
    rest, held = hold_out(scenes, 12)
    assert (len(rest.images), len(held.images)) == (28, 12)
    assert all(len(part) == 12 for part in (held.labels, held.instances, held.boxes))
    assert held.names == scenes.names and type(held) is type(scenes)
    everything = {image.tobytes() for image in scenes.images}
    apart = [{image.tobytes() for image in part.images} for part in (rest, held)]
    assert apart[0] | apart[1] == everything and not apart[0] & apart[1]
    where = [i for i, image in enumerate(scenes.images) if image.tobytes() in apart[1]]
    assert np.array_equal(held.masks, scenes.masks[where])  # in the set's order, everything of a picture
    assert np.array_equal(held.labels, scenes.labels[where])
    assert where != list(range(28, 40))  # drawn: a folder of images lies sorted by class
    # of another set of that size the same places, whatever the seed
    random.manual_seed(5)
    other = make_scenes(40, seed=2)
    assert np.array_equal(hold_out(other, 12)[1].images, other.images[where])
    for count in (0, 40):
        with refuses(f"hold_out: {count} pictures of 40, expected at least 1, and fewer than all"):
            hold_out(scenes, count)
