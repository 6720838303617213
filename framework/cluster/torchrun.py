"""torchrun as this project starts it: `python -m framework.cluster.torchrun OPTIONS -m framework.main STAGE WORDS...`.

It passes signals on, waits for the checkpoint, and exits as its processes did (a bare torchrun exits 1 whatever they
said, after half a minute). `--nproc-per-node=auto` is one process a GPU that torch sees, one on a CPU.
"""

import os
import signal
import sys
from collections.abc import Sequence

_PATIENCE_S = "600"  # for the processes to save, once they have been asked to stop


def main(options: Sequence[str]) -> int:
    """torchrun's options in; the exit code that its processes left with."""
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", _PATIENCE_S)
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    signal.signal(signal.SIGUSR1, lambda *_: os.kill(os.getpid(), signal.SIGTERM))  # torchrun would die of it
    try:
        run(parse_args([_counted(option) for option in options]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code >= 0 else 128 - code
    except SignalException as error:
        return 130 if error.sigval == signal.SIGINT else 143
    return 0


def _counted(option: str) -> str:
    from framework.core.runtime import num_gpus

    return f"--nproc-per-node={max(1, num_gpus())}" if option == "--nproc-per-node=auto" else option


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
