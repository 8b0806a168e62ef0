"""The folder tinytoken/cuda can be deleted: a CUDA device, here the stand-in, then runs the plain ops."""
import os
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]

CODE = """
import sys
sys.meta_path[:] = [one for one in sys.meta_path if "editable" not in repr(one).lower()]  # finds the folder
import numpy as np
import pytest
import standin
import tinytoken as tt
from tinytoken.backend import device_of, products_in, to_device
from tinytoken.models import ViT
from tinytoken.train import Classify, fit, infer

assert tt.__file__.startswith(sys.argv[1])
scenes = tt.data.make_scenes(24, seed=0)

def answers(device):
    tt.manual_seed(0)
    model = ViT(patch_size=8, dim=8, depth=2, heads=2).to(device)
    images, labels = to_device(scenes.images, device), to_device(scenes.labels, device)
    batches = tt.data.Batches(images, labels, 8, pad=4, flip=True)
    fit(model, Classify(model), batches, steps=4, bar=False, micro=8, threads=1)
    assert device_of(model.parameters()[0].data) == device
    pictures = tt.data.normalise(scenes.images, batches.mean, batches.std)
    return infer(model, to_device(pictures, device), batch_size=4)  # six slices: worth a capture

with standin.installed(kernels=True):
    with tt.plain():  # on the CPU, too: Numba's would differ in the last digits
        np.testing.assert_allclose(answers("cuda"), answers("cpu"), rtol=0, atol=1e-5)
    with pytest.raises(tt.InputError, match="products are in fp32"):
        products_in("bf16", "cuda")
assert not [name for name in sys.modules if name.startswith("tinytoken.cuda")]
"""


def test_without_the_folder_the_plain_ops_run(tmp_path):
    without = shutil.ignore_patterns("cuda", "__pycache__")
    shutil.copytree(ROOT / "tinytoken", tmp_path / "tinytoken", ignore=without)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "tests")])}
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
