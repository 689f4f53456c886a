"""The training loop of pre-training and fine-tuning: deterministic, resumable, curves injected.

A step's losses are a pure function of the model's weights and the step's number: whatever is drawn
at random is drawn from the step's own generator. So a run that was interrupted and continued from a
step checkpoint ends with the same bits as one that never stopped.

A step's batch may come in parts, one after another (`accumulation_steps`), and each part may be
shared by processes: their gradients are added up before the optimizer moves the weights, alike in
all of them. The first process alone saves.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alloy.devices import chosen_device, device_of, supports_bfloat16
from alloy.processes import ALONE, Processes
from tasks.recipe.section import ParamsError
from tasks.recipe.training import EarlyStopping, Schedule, TrainingPlan
from tasks.storage import read_json, write_folder, write_json
from tasks.training.optimizer import MuonAdamW, parameter_groups
from tasks.workers.together import agree

PROGRESS = "progress.json"  # of a step checkpoint: where the run stands, and its identity

_MOST_STEPS = 1_000_003  # of a run, so that no two seeds share a step's generator
_BETWEEN_PROCESSES = 7_368_787  # so that no two processes drop the same activations

Losses = Mapping[str, Tensor]
Curves = Callable[[Mapping[str, float], int], None]


@dataclass
class Progress:
    """The state of a run; scores are the validation's, higher is better."""

    next_step: int = 0
    best_score: float = -math.inf
    best_step: int = -1
    worse_in_a_row: int = 0
    losses: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """All that a run needs to go on: weights, the optimizer's moments, progress, the best weights.

    Moments are named `<the optimizer's name>/<the parameter's name>`.
    """

    weights: dict[str, Tensor]
    moments: dict[str, Tensor]
    progress: Progress = field(default_factory=Progress)
    best: dict[str, Tensor] = field(default_factory=dict)


def step_generator(seed: int, step: int, processes: Processes = ALONE) -> torch.Generator:
    """The source of everything random in one step, alike in all processes.

    Also sets torch's global one (dropout), to another state in each process.
    """
    own = _number(seed, step)
    torch.manual_seed((own + _BETWEEN_PROCESSES * processes.rank) % 2**32)
    return step_numbers(seed, step)


def step_numbers(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step; torch's global source stays as it is."""
    return torch.Generator().manual_seed(_number(seed, step))


def _number(seed: int, step: int) -> int:
    return (_MOST_STEPS * seed + step) % 2**32  # the CPU's generator takes no more bits


def parts_of(batch: Mapping[str, Tensor], num: int) -> Iterator[dict[str, Tensor]]:
    """A batch in equal parts of successive examples."""
    size = len(next(iter(batch.values()))) // num
    for start in range(0, num * size, size):
        yield {name: tensor[start : start + size] for name, tensor in batch.items()}


def check_precision(where: str, plan: Schedule) -> None:
    """Raise ParamsError where the device has not the precision that a plan asks for."""
    device = chosen_device()
    if plan.precision == "bfloat16" and not supports_bfloat16(device):
        raise ParamsError(
            f"{where}.precision: {device} has no bfloat16: write float32, or choose another DEVICE"
        )


def check_shares(where: str, batch_size: int, plan: Schedule, num_processes: int) -> None:
    """Raise ParamsError for a batch that so many processes cannot share evenly."""
    size = batch_size // plan.accumulation_steps
    if size % num_processes:
        parts = f" in {plan.accumulation_steps} parts" if plan.accumulation_steps > 1 else ""
        raise ParamsError(
            f"{where}: {batch_size} examples a step{parts} cannot be shared evenly by PROCESSES="
            f"{num_processes}: choose a number of processes that divides {size}"
        )


def train(
    model: nn.Module,
    losses_at: Callable[[int], Iterable[Losses]],
    plan: Schedule,
    *,
    folder: Path,
    identity: str,
    curves: Curves,
    say: Callable[[str], None] = print,
    start: State | None = None,
    stop_step: int | None = None,
    validate: Callable[[], Mapping[str, float]] | None = None,
    stopping: EarlyStopping | None = None,
    processes: Processes = ALONE,
) -> Progress:
    """Minimise the sum of `losses_at(step)` over the model's parameters, in place.

    `losses_at` gives the losses of each part of a step's batch, as many as
    `plan.accumulation_steps`; in one of several processes, its part of them: what is minimised is
    the sum over the processes. All processes are given the same model and end with the same.

    The run begins at `start` (default: the model as it is, step 0) and ends before `stop_step`
    (default: the plan's last step). Step checkpoints go to `folder`; a run whose `identity` (a
    digest of all that determines the result) is the same goes on from the last one, any other
    starts anew. With `validate` and `stopping` the model ends with the weights of the best
    validation score: the mean of what `validate` returns. Raises FloatingPointError when a loss is
    no longer finite.
    """
    muon = not isinstance(plan, TrainingPlan) or plan.optimizer == "muon"
    optimizer = MuonAdamW(parameter_groups(model, plan.weight_decay, muon=muon))
    state = _last_state(folder, identity, say) or start or State(weights_of(model), {})
    _load(state, model, optimizer)
    progress, best = state.progress, state.best
    agree(processes, {f"the step to go on from in {folder}": str(progress.next_step)})
    if plan.checkpoint_layers:
        _checkpoint_layers(model)
    stop_step = plan.num_steps if stop_step is None else stop_step
    started, first = time.monotonic(), progress.next_step
    model.train()
    for step in range(first, stop_step):
        losses = _descend(model, optimizer, losses_at, plan, step, processes)
        progress.next_step = step + 1
        if (step + 1) % plan.log_every == 0 or step + 1 == stop_step:
            progress.losses = losses
            curves({f"loss/{name}": value for name, value in losses.items()}, step + 1)
            curves({"learning_rate": plan.rate(step) * plan.learning_rate}, step + 1)
            say(_line(progress, stop_step, (time.monotonic() - started) / (step + 1 - first)))
        if validate and stopping and _is_due(step, stopping, stop_step):
            best = _validated(model, validate, progress, best, curves, say)
            if progress.worse_in_a_row >= stopping.patience:
                say(f"no better score in {stopping.patience} validations: stopped at {step + 1}")
                break
        due = (step + 1) % plan.save_every == 0 or step + 1 == stop_step
        if due and processes.is_first:
            _save(model, optimizer, progress, best, folder, identity)
    processes.objects(None)  # the last step checkpoint is there, for all
    if best:
        _put(best, model)
    model.eval()
    return progress


def _checkpoint_layers(model: nn.Module) -> None:
    """Recompute the activations of each layer in the backward pass, as transformers' models can."""
    assert isinstance(model, PreTrainedModel)
    model.activation_checkpointing_enable({"use_reentrant": False})


def _descend(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    losses_at: Callable[[int], Iterable[Losses]],
    plan: Schedule,
    step: int,
    processes: Processes,
) -> dict[str, float]:
    """One step of the optimizer; returns the losses."""
    for group in optimizer.param_groups:
        group["lr"] = plan.rate(step) * plan.peak(group["name"])
    optimizer.zero_grad(set_to_none=True)
    means: dict[str, float] = {}
    for losses in _computed(losses_at(step), plan, device_of(model)):
        each = torch.stack(list(losses.values()))
        whole = each.detach().clone()
        processes.add_up([whole])
        values = dict(zip(losses, whole.cpu().tolist(), strict=True))
        if not whole.sum().isfinite():
            raise FloatingPointError(
                f"step {step}: the losses are {values}; a lower learning_rate may help"
            )
        (each.sum() / plan.accumulation_steps).backward()
        for name, value in values.items():
            means[name] = means.get(name, 0.0) + value / plan.accumulation_steps
    processes.add_up([p.grad for p in model.parameters() if p.grad is not None])
    nn.utils.clip_grad_norm_(model.parameters(), plan.gradient_clip)
    optimizer.step()
    return means


def _computed(parts: Iterable[Losses], plan: Schedule, device: torch.device) -> Iterator[Losses]:
    """The parts' losses, computed in the precision that the plan says."""
    iterator = iter(parts)
    while True:
        half = plan.precision == "bfloat16"
        with torch.autocast(device.type, torch.bfloat16) if half else nullcontext():
            losses = next(iterator, None)
        if losses is None:
            return
        yield losses


def _is_due(step: int, stopping: EarlyStopping, stop_step: int) -> bool:
    return (step + 1) % stopping.validate_every == 0 or step + 1 == stop_step


def _validated(
    model: nn.Module,
    validate: Callable[[], Mapping[str, float]],
    progress: Progress,
    best: dict[str, Tensor],
    curves: Curves,
    say: Callable[[str], None],
) -> dict[str, Tensor]:
    """Score the model; returns the best weights so far."""
    model.eval()
    with torch.no_grad():
        scores = validate()
    model.train()
    score = sum(scores.values()) / len(scores)
    curves({f"validation/{name}": value for name, value in scores.items()}, progress.next_step)
    shown = " ".join(f"{name} {value:.3f}" for name, value in scores.items())
    say(f"validation at step {progress.next_step}: {score:.4f} ({shown})")
    if score <= progress.best_score:
        progress.worse_in_a_row += 1
        return best
    progress.best_score, progress.best_step = score, progress.next_step
    progress.worse_in_a_row = 0
    return {name: tensor.clone() for name, tensor in weights_of(model).items()}


def _line(progress: Progress, stop_step: int, seconds_per_step: float) -> str:
    left = (stop_step - progress.next_step) * seconds_per_step
    losses = " ".join(f"{name} {value:.3f}" for name, value in progress.losses.items())
    return (
        f"step {progress.next_step}/{stop_step} {losses} "
        f"{1000 * seconds_per_step:.0f} ms/step {left:.0f} s left"
    )


def _save(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    best: Mapping[str, Tensor],
    folder: Path,
    identity: str,
) -> None:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    moments = {
        f"{key}/{names[id(parameter)]}": value.contiguous()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }
    with write_folder(folder) as partial:
        save_file(weights_of(model), partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        save_file(dict(best), partial / "best.safetensors")
        write_json(partial / PROGRESS, {"identity": identity, **vars(progress)})


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model, each once: what is tied has its first name alone."""
    found: dict[str, Tensor] = {}
    seen: set[tuple] = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.device, tensor.data_ptr(), tensor.shape)
        if place not in seen or not tensor.numel():
            found[name] = tensor
        seen.add(place)
    return found


def _put(weights: Mapping[str, Tensor], model: nn.Module) -> None:
    """Load what `weights_of` gave; a tied weight comes by its first name."""
    missing, unknown = model.load_state_dict(weights, strict=False)
    if wrong := sorted({*unknown, *(name for name in missing if name in weights_of(model))}):
        raise RuntimeError(f"these weights are of another model: {wrong[:3]} ({len(wrong)} in all)")


def load_state(folder: Path) -> State:
    """The last step checkpoint of a run."""
    saved = read_json(folder / PROGRESS)
    saved.pop("identity")
    return State(
        load_file(folder / "model.safetensors"),
        load_file(folder / "optimizer.safetensors"),
        Progress(**saved),
        load_file(folder / "best.safetensors"),
    )


def _last_state(folder: Path, identity: str, say: Callable[[str], None]) -> State | None:
    if not (folder / PROGRESS).exists():
        return None
    if read_json(folder / PROGRESS)["identity"] != identity:
        say(f"{folder} is a run with other inputs or params: starting anew")
        return None
    state = load_state(folder)
    say(f"going on at step {state.progress.next_step} from {folder}")
    return state


def _load(state: State, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    _put(state.weights, model)
    parameters = dict(model.named_parameters())
    for name, value in state.moments.items():
        moment, parameter = name.split("/", 1)
        owner = parameters[parameter]
        optimizer.state[owner][moment] = value.to(owner.device) if value.dim() else value
