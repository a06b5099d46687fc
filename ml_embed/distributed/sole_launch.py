"""One launch at a time writes into a run folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from filelock import AcquireReturnProxy, Timeout

from ml_embed.distributed.collectives import compute_on_main_process
from ml_embed.errors import UserError
from ml_embed.files.locks import take_lock

ENDS_WITHIN_SECONDS = 60  # a launch that was told to stop saves first, and its launcher gives it 30


@contextlib.contextmanager
def sole_launch(run_dir: Path) -> Iterator[None]:
    """Hold a lock beside the run folder while the body runs.

    The first process holds it. The system releases it when that process dies, whatever the reason.

    Raises:
        UserError: another launch holds it and does not end within a minute; on all processes alike.
    """
    with contextlib.ExitStack() as held:

        def take() -> None:
            held.enter_context(_lock_beside(run_dir))

        compute_on_main_process(take)
        yield


def _lock_beside(run_dir: Path) -> AcquireReturnProxy:
    waiting = f"waiting for another launch that trains into {run_dir}"
    try:
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        return take_lock(run_dir.with_name(f".{run_dir.name}.lock"), ENDS_WITHIN_SECONDS, waiting)
    except Timeout:
        raise UserError(
            f"another launch is training into {run_dir}; stop it first, or choose another "
            "experiment_id"
        ) from None
    except OSError as error:
        raise UserError(
            f"output_dir: {run_dir.parent} cannot be written ({error.strerror}); see to that or "
            "choose another output_dir"
        ) from None
