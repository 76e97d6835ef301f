"""Tests that a shortened docs/one_step.ipynb runs as a script, and that its outputs show what its text says."""

import base64
import io
import json
import re

import numpy as np
from conftest import ROOT
from PIL import Image

CELLS = json.loads((ROOT / "docs" / "one_step.ipynb").read_text())["cells"]


def outputs_of(words):
    """Returns the printed text and the picture, [H, W, 3], of the cell whose source has these words."""
    (cell,) = [cell for cell in CELLS if cell["cell_type"] == "code" and words in "".join(cell["source"])]
    text, picture = "", None
    for output in cell["outputs"]:
        text += "".join(output.get("text", ""))
        if "image/png" in output.get("data", {}):
            png = base64.b64decode("".join(output["data"]["image/png"]))
            picture = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    return text, picture


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    """The notebook runs with STEPS = 3. What does not depend on training is as in the committed outputs."""
    code = "\n\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code")
    code, replaced = re.subn(r"STEPS = \d+ ", "STEPS = 3 ", code)
    assert replaced == 1
    monkeypatch.chdir(tmp_path)
    for name in ("facm.py", "assets"):
        (tmp_path / name).symlink_to(ROOT / name)
    scope = {}
    exec(compile(code, "one_step.ipynb", "exec"), scope)
    assert (tmp_path / "one_step.png").stat().st_size > 1000
    assert scope["start"].shape == (10,) and scope["dF_dt"].abs().max() > 0
    said = capsys.readouterr().out
    assert said.count("mean loss of 1 steps") == 6
    committed, _ = outputs_of("dF_dt = jvp.fd(")
    numbers = [[float(word) for word in re.search(r"\|v\| ([\d.]+), \|dF/dt\| ([\d.]+)", text).groups()] for text in (said, committed)]
    assert np.allclose(*numbers, rtol=0.02)


def test_the_committed_outputs_show_what_the_text_says():
    """The loss falls. Only with the derivative does one step have nearly the contrast of 20 steps."""
    assert all(cell["outputs"] for cell in CELLS if cell["cell_type"] == "code" and "show(" in "".join(cell["source"])[-80:])
    text, _ = outputs_of("short = train(")
    first, last = (float(word) for word in re.findall(r"steps: ([\d.]+)", text))
    assert last < 0.5 * first
    text, picture = outputs_of("for name, x in (")
    contrast = dict(re.findall(r"(.+): contrast ([\d.]+)", text))
    blur, without, jump, image = (float(contrast[name]) for name in ("one Euler step", "without dF/dt", "with dF/dt", "20 steps"))
    assert abs(without - blur) < 0.1 * image and jump > 0.85 * image > 1.5 * blur
    assert picture.shape == (3 * 64, 640, 3) and sum("**Predict before you run.**" in "".join(cell["source"]) for cell in CELLS) == 3
