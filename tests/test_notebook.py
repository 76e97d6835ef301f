"""docs/one_step.ipynb runs, shortened, as one script."""

import json

from conftest import ROOT


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    cells = json.loads((ROOT / "docs" / "one_step.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    assert "STEPS = 400 " in code and all(not cell.get("outputs") for cell in cells)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facm.py").symlink_to(ROOT / "facm.py")
    scope = {}
    exec(compile(code.replace("STEPS = 400 ", "STEPS = 3 ").replace("glyphs(4000", "glyphs(100"), "one_step.ipynb", "exec"), scope)
    assert (tmp_path / "one_step.png").stat().st_size > 1000 and "|dF/dt|" in capsys.readouterr().out
    assert scope["start"].shape == (10,) and scope["dF_dt"].abs().max() > 0
