"""Optimizers of the user's own: torch's are stepped as torch steps them, and a resumed run goes on to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_ranks import Run
from engine_scenarios import LEARNING_RATES, Scenario, loss_of, micro_batches, new_module

PLUGIN = """\
import torch


def adam(parameters, betas, eps):
    return torch.optim.Adam(parameters, betas=tuple(betas), eps=eps)


def sgd(parameters, momentum=0.0):
    return torch.optim.SGD(parameters, lr=1.0, momentum=momentum)


def adafactor(parameters):
    return torch.optim.Adafactor(parameters)


def two_rates(named_parameters):
    norms = [p for name, p in named_parameters if "norm" in name]
    others = [p for name, p in named_parameters if "norm" not in name]
    return torch.optim.SGD([{"params": norms, "rate": 0.0}, {"params": others}], lr=1.0)


class Counting(torch.optim.Optimizer):
    \"\"\"Its steps shrink with a number that it keeps in its group and a Python number that it keeps a parameter.\"\"\"

    def __init__(self, parameters, decay=0.5):
        super().__init__(list(parameters), {"lr": 1.0, "decay": decay, "scale": 1.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["scale"] *= group["decay"]
            for p in group["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                if p.grad is not None:
                    p.sub_(group["lr"] * group["scale"] / state["steps"] * p.grad)


def first_alone(parameters):
    return torch.optim.SGD(parameters[:1], lr=1.0)


def nothing(parameters):
    return "adam"


def noisy(parameters):
    raise RuntimeError("no such device")


class Keeping(Counting):
    def step(self):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1]
"""
FLAT = {"betas": [0.9, 0.99], "eps": 1e-4}


@pytest.fixture
def scenario(tmp_path: Path) -> Any:
    path = tmp_path / "mine.py"
    path.write_text(PLUGIN)
    return lambda name, **args: Scenario({"optimizer": {"kind": f"{path}:{name}", "args": args}})


def test_an_optimizer_of_torchs_takes_the_steps_it_takes_by_itself(scenario):
    run = Run(scenario("adam", **FLAT), 0, 1)
    module = new_module(scenario("adam", **FLAT))
    plain = torch.optim.Adam(module.parameters(), betas=(0.9, 0.99), eps=1e-4)
    for step, rate in enumerate(LEARNING_RATES):
        run.step(step)
        batches = micro_batches(step)
        num_tokens = sum(int(batch.loss_mask.sum()) for batch in batches)
        for batch in batches:
            loss_of(module, batch, num_tokens).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 0.5)
        plain.param_groups[0]["lr"] = rate
        plain.step()
        plain.zero_grad()
    for name, tensor in run.weights().items():
        assert (tensor - module.model.state_dict()[name]).abs().max() < 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "args"),
    [("adam", FLAT), ("sgd", {"momentum": 0.9}), ("sgd", {}), ("adafactor", {}), ("Counting", {})],
)
@pytest.mark.parametrize("steps_before", [0, 1])
def test_it_goes_on_to_the_bit_from_a_checkpoint(scenario, tmp_path, name, args, steps_before):
    never_stopped = Run(scenario(name, **args), 0, 1)
    for step in range(steps_before):
        never_stopped.step(step)
    never_stopped.save(tmp_path)
    later = Run(scenario(name, **args), 0, 1)
    later.engine.load_state(tmp_path)
    for step in range(steps_before, 3):
        never_stopped.step(step)
        later.step(step)
    assert all(torch.equal(tensor, later.weights()[name]) for name, tensor in never_stopped.weights().items())


def test_an_argument_that_the_recipe_changes_counts_in_a_run_that_is_resumed(scenario, tmp_path):
    before = Run(scenario("Counting", decay=0.5), 0, 1)
    before.step(0)
    before.save(tmp_path)
    later = Run(scenario("Counting", decay=0.25), 0, 1)
    later.engine.load_state(tmp_path)
    (group,) = later.engine.optimizer.inner.param_groups
    assert (group["decay"], group["scale"]) == (0.25, 0.5)
    assert set(later.engine.optimizer.inner.state[group["params"][0]].values()) == {1}


def test_a_group_has_its_share_of_the_learning_rate(scenario):
    run = Run(scenario("two_rates"), 0, 1)
    before = run.weights()
    run.step(0)
    for name, tensor in run.weights().items():
        assert torch.equal(tensor, before[name]) == ("norm" in name), name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"mine\.py:nothing returned a str: return a torch\.optim\.Optimizer"),
        ("first_alone", r"mine\.py:first_alone: its optimizer leaves out .* and \d+ more: give it all parameters"),
        ("noisy", r"mine\.py:noisy raised RuntimeError: no such device \(.*mine\.py:\d+\)"),
        ("noise", r"mine\.py has no noise; did you mean noisy\?"),
    ],
)
def test_what_is_no_optimizer_is_refused_by_name(scenario, name, message):
    with pytest.raises(ValueError, match=message):
        Run(scenario(name), 0, 1)


def test_a_state_that_no_checkpoint_holds_is_refused_by_name(scenario, tmp_path):
    run = Run(scenario("Keeping"), 0, 1)
    with pytest.raises(ValueError, match="its state history is a list, which no checkpoint holds"):
        run.save(tmp_path)
