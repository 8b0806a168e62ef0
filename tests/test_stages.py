"""The stages of .ci/gpu, with toy parts in the place of those that need a GPU."""
import json
import pathlib
import re
import subprocess
import time

import pytest

import stages
from stages import Part

ROOT = pathlib.Path(__file__).parents[1]
QUICK = 1 / 60  # minutes


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Stage x: parts that do well, fail, take too long and are not there; each done part leaves a line."""
    note = f"import pathlib; pathlib.Path(r'{tmp_path}/ran').open('a').write"
    (tmp_path / "good.py").write_text(f"{note}('good '); print('fine')")
    (tmp_path / "bad.py").write_text(f"{note}('bad ')\nprint('a\\r' 'b')\nraise SystemExit(3)")
    (tmp_path / "slow.py").write_text(f"import subprocess, time\n{note}('slow ')\n"
                                      "subprocess.Popen(['sleep', '97'])\nprint('begun', flush=True)\n"
                                      "time.sleep(97)")
    parts = {"bad": Part(f"{tmp_path}/bad.py", QUICK), "gone": Part("--version", QUICK, "no-such-program"),
             "slow": Part(f"{tmp_path}/slow.py", QUICK), "good": Part(f"{tmp_path}/good.py {{out}}", QUICK)}
    monkeypatch.setattr(stages, "STAGES", {"x": ("toys", parts), "y": ("more", {"good": parts["good"]})})
    monkeypatch.setattr(stages, "MINUTES", 6 * QUICK)
    return tmp_path


def test_a_part_that_fails_does_not_end_its_stage(toys, capsys):
    began = time.monotonic()
    stages.main(["x", "--out", str(toys / "out")])
    saved, log = (toys / "out" / name for name in ("x.json", "x.log"))
    parts = json.loads(saved.read_text())["parts"]
    ends = {name: part["end"] for name, part in parts.items()}
    assert ends.pop("slow").startswith("out of its 0.") and time.monotonic() - began < 60
    assert ends == {"bad": "failed, exit status 3", "gone": "there is no no-such-program", "good": "done"}
    assert parts["bad"]["said"] == ["a", "b"] and parts["slow"]["said"] == ["begun"]
    assert parts["good"]["command"] == f"python {toys}/good.py {toys}/out"
    assert re.search(r"(?s)=== bad: .*=== good: .*fine", log.read_text())
    assert "97" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout.split()
    said = capsys.readouterr().out
    assert "bad, at most 0.0166667 minutes: failed, exit status 3" in said and "y  more\n     good" in said


def test_the_same_command_goes_on_with_what_is_left(toys, capsys):
    out = ["--out", str(toys / "out")]
    stages.main(["y", *out])
    stages.main(["y", *out])
    assert (toys / "ran").read_text() == "good "
    (toys / "bad.py").write_text("")
    stages.main(out)
    stages.main(["x", *out])
    assert (toys / "ran").read_text() == "good slow good slow "
    capsys.readouterr()
    stages.main(["--list", *out])
    assert capsys.readouterr().out.count(": done") == 3
    assert (toys / "ran").read_text() == "good slow good slow "


def test_the_real_stages_are_short_and_name_what_is_there():
    for name, (_, parts) in stages.STAGES.items():
        assert sum(part.minutes for part in parts.values()) <= stages.MINUTES, name
        for part in parts.values():
            words = part.arguments("out")
            assert all((ROOT / word).exists() for word in words if word.startswith(("tests/", "lessons/")))
    assert list(stages.STAGES) == list("abcdefgh")
    path = f"{pathlib.Path(stages.sys.executable).parent}:/usr/bin:/bin"
    assert subprocess.run([ROOT / ".ci" / "gpu", "--help"], capture_output=True,
                          env={"PATH": path}).returncode == 0


def test_of_each_test_the_first_case_alone():
    """As stage c runs them."""
    ask = [stages.sys.executable, *"-m pytest --collect-only -q -m gpu tests/cuda/test_kernels.py".split()]
    every, first = ([line for line in subprocess.run([*ask, *more], cwd=ROOT, capture_output=True,
                                                     text=True).stdout.splitlines() if "::" in line]
                    for more in ([], ["--first"]))
    named = lambda line: line.partition("[")[0]
    assert first == list({named(line): line for line in reversed(every)}.values())[::-1]
    assert {line.rpartition("[")[2][:6] for line in first} == {"device"} and len(every) > 3 * len(first)


def test_names_that_are_no_stage_are_refused(capsys):
    with pytest.raises(SystemExit):
        stages.main(["z"])
    assert "invalid choice: 'z'" in capsys.readouterr().err
