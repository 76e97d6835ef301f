"""Tests of the losses against the code of FACM's authors, whose numbers are in golden/facm-losses.json.

Weights, inputs and times are those of formula.py. The field "provenance" of the file describes how their code was run.
"""

import json
import math
import pathlib

import pytest
import torch
from formula import fill, normal_like, sample, uniform

import baselines
import facm
import models
from jvp import JVP

GOLDEN = json.loads(pathlib.Path(__file__).with_name("golden").joinpath("facm-losses.json").read_text())
OPTIONS, CONFIG = GOLDEN["options"], GOLDEN["config"]
NULL = OPTIONS["num_classes"]


def build(case, prefix=""):
    """Our network with the options of the authors' network and weights by formula."""
    net = models.create(
        "DiT", input_size=OPTIONS["input_size"], patch=OPTIONS["patch_size"], in_channels=OPTIONS["in_channels"],
        width=OPTIONS["hidden_size"], depth=OPTIONS["depth"], heads=OPTIONS["num_heads"], num_classes=NULL,
        qknorm=OPTIONS["use_qknorm"], swiglu=OPTIONS["use_swiglu"], rope=OPTIONS["use_rope"],
        rmsnorm=OPTIONS["use_rmsnorm"], second_time=case["condition"] == "auxiliary",
        pixelnorm=case.get("pixelnorm", False))
    return fill(net, lambda name: prefix + name)


def loss_terms(case, net, jvp):
    """The terms of our loss by name, and for sCM the coefficients phi = (a, 0, 0), which give a at every time."""
    shape = (CONFIG["batch"], OPTIONS["in_channels"], OPTIONS["input_size"], OPTIONS["input_size"])
    x1, x0, y = normal_like("x1", shape), normal_like("x0", shape), torch.tensor(CONFIG["labels"])
    t, t2 = (torch.from_numpy(0.5 + case["spread"] * uniform(name, shape[:1])).float() for name in ("t1", "t2"))
    options = dict(teacher=build(case, "teacher.").requires_grad_(False) if case["teacher"] else None,
                   y_null=NULL, w=case["w"], t_low=CONFIG["t_low"])
    if case["objective"] == "meanflow":
        t = torch.where(torch.arange(len(t)) < case["equal"], t2, t)
        t, r = torch.minimum(t, t2), torch.maximum(t, t2)
        return dict(loss=baselines.meanflow_loss(net, jvp, x1, x0, t, r, y, **options)), None
    if case["objective"] == "scm":
        phi = torch.tensor([case["a"], 0.0, 0.0], requires_grad=True)
        return dict(loss=baselines.scm_loss(net, jvp, x1, x0, t, y, warm=case["warm"], phi=phi, **options)), phi
    terms = facm.facm_loss(net, jvp, x1, x0, t, y, condition=case["condition"], p=CONFIG["p"], **options)
    return dict(zip(("L_fm", "L_cm"), terms)), None


@pytest.mark.parametrize("mode", ["exact", "fused"])
@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_loss_and_gradient_are_those_of_the_authors(name, mode):
    case = GOLDEN["cases"][name]
    net = build(case)
    terms, phi = loss_terms(case, net, JVP[mode])
    assert terms.keys() == case["losses"].keys()
    for term, value in case["losses"].items():
        assert math.isclose(terms[term].item(), value, rel_tol=1e-5), term

    sum(terms.values()).backward()
    parts = sorted((n, p.grad) for n, p in net.named_parameters() if p.requires_grad)
    gradient, stored = torch.cat([g.flatten() for _, g in parts]).double(), case["gradient"]
    assert len(gradient) == stored["size"]
    values = torch.tensor(stored["values"], dtype=torch.float64)
    assert (sample(gradient, len(values)) - values).abs().max() < 1e-5 * values.abs().max()
    assert math.isclose(gradient.abs().max().item(), stored["scale"], rel_tol=1e-5)
    assert math.isclose(gradient.norm().item(), stored["norm"], rel_tol=1e-5)
    if phi is not None:
        assert abs(phi.grad[0].item() - case["gradient_of_a"]) < 1e-5


def test_the_cases_have_times_on_both_sides_of_t_low():
    low = {name: (0.5 + case["spread"] * uniform("t1", CONFIG["batch"]) < CONFIG["t_low"]).sum()
           for name, case in GOLDEN["cases"].items()}
    assert all((count > 0) == (name != "facm-auxiliary-scratch-guided") for name, count in low.items())
