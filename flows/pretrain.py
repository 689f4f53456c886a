"""Pre-train the checkpoints that the modality recipe starts from, as a Prefect flow.

    python -m flows.pretrain            # all four: at most an hour on two CPU cores

It is apart from the recipe's graph: `make merge` starts from the released checkpoints and never
trains them. The arms run side by side inside one task, `python -m tasks.experts.pretrain`; the flow
shows their progress.
"""

import sys

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows.alarm import raise_alarm
from flows.server import own_server
from flows.services import ServerError
from flows.states import failed
from flows.workspace import complain, end_as_ctrl_c, only_run, run_streaming
from tasks.experts.pretrain import SHARING


@task(cache_policy=NO_CACHE, persist_result=False)
def train(arms: list[str], lock: int) -> State:
    """Train the arms; each line they write is a line of the Prefect log."""
    command = [sys.executable, "-m", "tasks.experts.pretrain", *arms]
    status = run_streaming(command, get_run_logger().info, lock=lock)
    if status != 0:
        return failed(f"pre-training failed (exit status {status}); its output says why")
    return Completed(message=f"{', '.join(arms)}: done")


@flow(
    name="pretrain",
    persist_result=False,
    on_failure=[raise_alarm],
    on_crashed=[raise_alarm],
)
def pretrain(arms: list[str] | None = None) -> State:
    """Make the released checkpoints anew where the params, the data or a digest say so."""
    with only_run("pre-training in Prefect", get_run_logger().warning) as lock:
        return train(arms or list(SHARING), lock, return_state=True)


def main(arms: list[str]) -> int:
    end_as_ctrl_c()
    try:
        with own_server():
            # ty does not match Prefect's overloads of a flow's call
            state = pretrain(arms, return_state=True)  # ty: ignore[no-matching-overload]
    except (ServerError, OSError) as error:
        complain(error)
        return 2
    except KeyboardInterrupt:
        print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    return 0 if state.is_completed() else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
