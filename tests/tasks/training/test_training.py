"""Laws of the training loop, its optimizer and the workers."""

import math
import os
import time
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tasks.recipe.section import ParamsError
from tasks.recipe.training import EarlyStopping, TrainingPlan
from tasks.training.loop import (
    check_precision,
    check_shares,
    load_state,
    parts_of,
    step_generator,
    train,
)
from tasks.training.optimizer import MuonAdamW, orthogonalize, parameter_groups
from tasks.workers import side_by_side

PLAN = TrainingPlan(
    num_steps=12,
    learning_rate=0.01,
    matrix_learning_rate=0.02,
    final_share=0.1,
    warmup_steps=3,
    weight_decay=0.1,
    gradient_clip=1.0,
    log_every=4,
    save_every=5,
)


class Toy(nn.Module):
    """A model with everything that decays and that does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 6)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(2))
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 11)

    def forward(self, ids):
        x = self.words(ids)
        for block in self.blocks:
            x = x + self.dropout(F.gelu(block(x)))
        return self.head(self.norm(x))


def losses_of(model: Toy, parts: int = 1):
    def losses_at(step):
        ids = torch.randint(11, (8,), generator=step_generator(0, step))
        for part in parts_of({"ids": ids}, parts):
            yield {"successor": F.cross_entropy(model(part["ids"]), (part["ids"] + 1) % 11)}

    return losses_at


class Run:
    """One training of a Toy in a folder, with what it said and logged."""

    def __init__(self, folder, identity="a"):
        self.model, self.folder, self.identity = Toy(), folder, identity
        self.lines, self.curves = [], {}

    def go(self, losses_at=None, plan=PLAN, **options):
        def log(values, step):
            for name, value in values.items():
                self.curves.setdefault(name, {})[step] = value

        return train(
            self.model,
            losses_at or losses_of(self.model),
            plan,
            folder=self.folder,
            identity=self.identity,
            curves=log,
            say=self.lines.append,
            **options,
        )


class InterruptedHereError(Exception):
    pass


def interrupted_at(step, model):
    losses_at = losses_of(model)

    def interrupting(current):
        if current == step:
            raise InterruptedHereError
        return losses_at(current)

    return interrupting


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


@pytest.mark.parametrize("step", [3, 5, 7, 11])
def test_an_interrupted_run_ends_with_the_same_bits(step, tmp_path):
    """A run that is interrupted anywhere equals one that never stopped, dropout included."""
    straight = Run(tmp_path / "straight")
    straight.go()
    broken = Run(tmp_path / "broken")
    with pytest.raises(InterruptedHereError):
        broken.go(interrupted_at(step, broken.model))
    continued = Run(tmp_path / "broken")
    continued.go()
    assert same(bits(straight.model), bits(continued.model))
    assert any("going on at step" in line for line in continued.lines) == (step >= 5)


def test_a_run_of_other_params_starts_anew(tmp_path):
    """Step checkpoints of another identity are not used, and the run says so."""
    Run(tmp_path, "a").go(stop_step=5)
    other = Run(tmp_path, "b")
    other.go()
    straight = Run(tmp_path / "c")
    straight.go()
    assert same(bits(other.model), bits(straight.model))
    assert "is a run with other inputs or params: starting anew" in other.lines[0]


def test_two_parts_of_a_schedule_are_the_whole(tmp_path):
    """Stopping at a step and continuing from its state gives the uninterrupted run's bits."""
    straight = Run(tmp_path / "straight")
    straight.go()
    Run(tmp_path / "first", "first").go(stop_step=7)
    second = Run(tmp_path / "second", "second")
    second.go(start=load_state(tmp_path / "first"))
    assert same(bits(straight.model), bits(second.model))


def test_training_learns(tmp_path):
    run = Run(tmp_path)
    run.go(plan=PLAN.model_copy(update={"num_steps": 150}))
    assert run.curves["loss/successor"][4] > 2 * run.curves["loss/successor"][150]


def test_curves_are_logged_as_often_as_asked(tmp_path):
    run = Run(tmp_path)
    progress = run.go(validate=lambda: {"x": 1.0}, stopping=stopping(5, 9))
    assert sorted(run.curves["loss/successor"]) == [4, 8, 12]
    assert sorted(run.curves["validation/x"]) == [5, 10, 12]
    assert progress.losses == {"successor": run.curves["loss/successor"][12]}


def stopping(every, patience):
    return EarlyStopping(validate_every=every, patience=patience, validation_examples=1)


def test_the_best_validated_weights_are_kept(tmp_path):
    """If scores fall after the second validation, the run stops in time with the best."""
    scores, seen = iter([1.0, 3.0, 2.0, 2.5, 9.0]), []
    run = Run(tmp_path)

    def validate():
        seen.append(bits(run.model))
        return {"x": next(scores)}

    progress = run.go(validate=validate, stopping=stopping(2, 2))
    assert (progress.best_step, progress.best_score, progress.next_step) == (4, 3.0, 8)
    assert same(bits(run.model), seen[1])
    assert not run.model.training


def test_the_best_weights_survive_an_interruption(tmp_path):
    """The best score before the interruption still counts after it."""
    run = Run(tmp_path)
    with pytest.raises(InterruptedHereError):
        run.go(interrupted_at(7, run.model), validate=lambda: {"x": 5.0}, stopping=stopping(2, 9))
    continued = Run(tmp_path)
    progress = continued.go(validate=lambda: {"x": 4.0}, stopping=stopping(2, 9))
    assert (progress.best_step, progress.best_score) == (2, 5.0)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    run = Run(tmp_path)
    with pytest.raises(FloatingPointError, match=r"step 2: the losses are \{'x': nan\}"):
        run.go(lambda step: [{"x": run.model.norm.weight.sum() * (math.nan if step == 2 else 1)}])


def test_the_rate_warms_up_to_the_peak_and_falls_to_the_final_share():
    rates = [PLAN.rate(step) for step in range(13)]
    assert rates[:4] == pytest.approx([1 / 3, 2 / 3, 1, 1])
    assert rates[12] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))


def test_only_matrices_of_linear_layers_decay():
    """Without a gradient, norms, biases and embeddings stay, and all linear matrices shrink."""
    model = Toy()
    optimizer = MuonAdamW(parameter_groups(model, weight_decay=0.5), lr=0.1)
    before = bits(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrunk = {name for name, now in bits(model).items() if not torch.equal(now, before[name])}
    assert shrunk == {"blocks.0.weight", "blocks.1.weight", "head.weight"}
    torch.testing.assert_close(model.head.weight.data, 0.95 * before["head.weight"])


def test_a_model_of_experts_decays_what_the_agnostic_one_decays():
    """Each expert's tensors are in the group of the agnostic model's tensor."""
    from alloy.modality import ModalityConfig, ModalityModel, copy_to_experts

    def decays(sharing):
        sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_joint_layers": 1}
        sizes |= {"num_attention_heads": 2, "vocab_size": 9, "embedding_size": 8}
        config = ModalityConfig(sharing, intermediate_size=16, **sizes)
        model = ModalityModel(config)
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, weight_decay=0.1)
        return config, {
            names[id(p)]: torch.tensor(i) for i, group in enumerate(groups) for p in group["params"]
        }

    _, agnostic = decays("all")
    config, specific = decays("none")
    assert copy_to_experts(agnostic, config) == specific


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 30), (2, 30, 8)])
def test_orthogonalizing_keeps_singular_vectors_and_evens_out_singular_values(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    rotated = u.transpose(1, 2) @ orthogonalize(matrices) @ v.transpose(1, 2)
    values = rotated.diagonal(dim1=1, dim2=2)
    assert ((values > 0.5) & (values < 1.3)).all()
    torch.testing.assert_close(rotated, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_a_fused_projection_is_three_matrices():
    """Muon moves each third of a qkv matrix as if it stood alone."""
    fused = nn.ModuleDict({"blocks": nn.Linear(4, 12, bias=False)})
    single = nn.ModuleDict({"blocks": nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in "qkv")})
    grad = torch.randn(12, 4)
    with torch.no_grad():
        for part, third in zip(single["blocks"], fused["blocks"].weight.chunk(3), strict=True):
            part.weight.copy_(third)
    fused["blocks"].weight.grad = grad
    for part, third in zip(single["blocks"], grad.chunk(3), strict=True):
        part.weight.grad = third.clone()
    for model in (fused, single):
        MuonAdamW(parameter_groups(model, 0.0), lr=0.1).step()
    joined = torch.cat([part.weight for part in single["blocks"]])
    torch.testing.assert_close(fused["blocks"].weight, joined)


def test_parts_of_a_step_are_the_step(tmp_path):
    """Two parts of four examples move the weights as one of eight does, but for rounding."""
    plan = PLAN.model_copy(update={"accumulation_steps": 2})
    whole, parts = Run(tmp_path / "whole"), Run(tmp_path / "parts")
    for run in (whole, parts):
        run.model.dropout.p = 0.0
    whole.go()
    parts.go(losses_of(parts.model, 2), plan)
    for name, tensor in bits(whole.model).items():
        torch.testing.assert_close(bits(parts.model)[name], tensor, rtol=1e-3, atol=1e-4)
    assert parts.curves["loss/successor"][12] == pytest.approx(
        whole.curves["loss/successor"][12], rel=1e-3
    )


def test_a_run_in_parts_and_bfloat16_goes_on_with_the_same_bits(tmp_path):
    plan = PLAN.model_copy(update={"accumulation_steps": 2, "precision": "bfloat16"})
    straight = Run(tmp_path / "straight")
    straight.go(losses_of(straight.model, 2), plan)
    in_float32 = Run(tmp_path / "float32")
    in_float32.go(losses_of(in_float32.model, 2), PLAN.model_copy(update={"accumulation_steps": 2}))
    assert not same(bits(straight.model), bits(in_float32.model))
    Run(tmp_path / "broken").go(losses_of(straight.model, 2), plan, stop_step=0)
    first = Run(tmp_path / "broken")
    first.go(losses_of(first.model, 2), plan, stop_step=6)
    second = Run(tmp_path / "broken")
    second.go(losses_of(second.model, 2), plan)
    assert same(bits(straight.model), bits(second.model))


def test_the_optimizer_is_a_choice(tmp_path):
    """With adamw the blocks' matrices move as torch's AdamW moves them; muon's rate is left out."""
    changes = {"optimizer": "adamw", "matrix_learning_rate": None, "gradient_clip": 1e9}
    run = Run(tmp_path)
    run.model.dropout.p = 0.0
    theirs = Toy()
    theirs.dropout.p = 0.0
    plan = PLAN.model_copy(update={**changes, "weight_decay": 0.0, "num_steps": 5})
    run.go(plan=plan)
    optimizer = torch.optim.AdamW(theirs.parameters(), betas=(0.9, 0.98), weight_decay=0.0)
    for step in range(5):
        optimizer.param_groups[0]["lr"] = plan.rate(step) * plan.learning_rate
        (losses,) = losses_of(theirs)(step)
        optimizer.zero_grad()
        losses["successor"].backward()
        optimizer.step()
    for name, tensor in bits(theirs).items():
        torch.testing.assert_close(bits(run.model)[name], tensor, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"matrix_learning_rate": None}, "muon needs matrix_learning_rate"),
        ({"optimizer": "adamw"}, "matrix_learning_rate is Muon's: with optimizer adamw leave it"),
        ({"optimizer": "sgd"}, "Input should be 'muon' or 'adamw'"),
        ({"precision": "float16"}, "Input should be 'float32' or 'bfloat16'"),
        ({"accumulation_steps": 0}, "greater than 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainingPlan.model_validate({**PLAN.model_dump(), **changes})


def test_settings_at_their_defaults_change_no_digest():
    """Runs and released checkpoints from before a setting existed are still known."""
    assert PLAN.model_dump().keys() == {*PLAN.model_fields_set}
    assert "precision" in PLAN.model_copy(update={"precision": "bfloat16"}).model_dump()


def test_a_precision_that_a_device_lacks_is_refused(monkeypatch):
    plan = PLAN.model_copy(update={"precision": "bfloat16"})
    monkeypatch.setenv("ALLOY_DEVICE", "cpu")
    check_precision("params/x.yaml: training", plan)
    monkeypatch.setenv("ALLOY_DEVICE", "meta")
    with pytest.raises(ParamsError, match=r"precision: meta has no bfloat16: write float32"):
        check_precision("params/x.yaml: training", plan)


def test_batches_that_processes_cannot_share_are_refused():
    plan = PLAN.model_copy(update={"accumulation_steps": 2})
    check_shares("params/x.yaml: batch_size", 12, plan, 3)
    with pytest.raises(ParamsError, match=r"batch_size: 12 examples a step in 2 parts .*=4"):
        check_shares("params/x.yaml: batch_size", 12, plan, 4)


def test_adamw_is_torchs():
    """What is no matrix of a block moves as by torch's AdamW."""
    ours, theirs = nn.Linear(5, 3), nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        MuonAdamW(parameter_groups(ours, 0.0), lr=0.1),
        torch.optim.AdamW(theirs.parameters(), lr=0.1, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    for step in range(4):
        x = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def report_place(value, report):
    report(value, os.getpid(), torch.get_num_threads())


def fail(value, report):
    report(value)
    if value == 2:
        raise ValueError("two is wrong")
    time.sleep(60)


def start_and_end(value, report):
    report("start")
    time.sleep(0.3)
    report("end")


def vanish(value, report):
    os._exit(7)


def test_jobs_run_in_processes_of_one_thread():
    """Each report arrives under its job's name; no two jobs share a process."""
    heard = {}
    side_by_side(
        report_place, {"a": (1,), "b": (2,)}, lambda name, *values: heard.update({name: values})
    )
    assert {name: values[0] for name, values in heard.items()} == {"a": 1, "b": 2}
    assert len({os.getpid(), heard["a"][1], heard["b"][1]}) == 3
    assert heard["a"][2] == heard["b"][2] == 1


def report_tensors(value, report):
    report({"ones": torch.ones(value), "more": [torch.zeros(value)]})


def test_tensors_outlive_the_worker_that_reports_them():
    """They come whole, however late the parent reads them; a job ends when it has reported."""
    heard = {}

    def receive(name, given):
        time.sleep(0.2)  # the other job's process is gone before its report is read
        heard[name] = given

    side_by_side(report_tensors, {"a": (2,), "b": (3,), "c": (4,)}, receive)
    assert {name: given["ones"].sum().item() for name, given in heard.items()} == {
        "a": 2.0,
        "b": 3.0,
        "c": 4.0,
    }


def test_no_more_jobs_run_at_once_than_allowed():
    """The next job starts when one has ended."""
    heard = []
    jobs = {name: (name,) for name in "abc"}
    side_by_side(start_and_end, jobs, lambda name, what: heard.append((name, what)), at_once=1)
    assert heard == [(name, what) for name in "abc" for what in ("start", "end")]


def report_device(value, report):
    report("start", os.environ["ALLOY_DEVICE"])
    time.sleep(0.2)
    report("end", os.environ["ALLOY_DEVICE"])


def test_jobs_queue_for_devices():
    """Each job has a device for itself while it runs; the third waits for one that is free."""
    heard, busy = [], set()

    def receive(name, what, device):
        heard.append(device)
        if what == "start":
            assert device not in busy
            busy.add(device)
        else:
            busy.remove(device)

    side_by_side(report_device, {n: (n,) for n in "abc"}, receive, devices=["cuda:0", "cuda:1"])
    assert len(heard) == 6
    assert set(heard) == {"cuda:0", "cuda:1"}


def test_the_first_failure_ends_all_jobs():
    """The exception of a job is raised in the parent at once; the others do not run on."""
    with pytest.raises(ValueError, match="two is wrong") as failure:
        side_by_side(fail, {"a": (1,), "b": (2,)}, lambda name, *values: None)
    assert "in fail" in failure.value.__notes__[0]  # where, in the worker


def test_a_worker_that_vanishes_is_an_error():
    with pytest.raises(RuntimeError, match="a: its process ended with status 7"):
        side_by_side(vanish, {"a": (1,)}, lambda name, *values: None)
