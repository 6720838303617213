"""What travels, and what a worker's process does with its output."""

import subprocess
import sys
from pathlib import Path

import torch
from stand_in import prompts

from framework.cluster.shell import compact


def test_views_do_not_drag_their_storage_along() -> None:
    batch = prompts(1000).select(slice(2, 4))
    small = compact({"batch": batch, "word": "x"})
    assert small["batch"].tokens.untyped_storage().nbytes() == 2 * 3 * 8
    assert torch.equal(small["batch"].tokens, batch.tokens)
    assert small["word"] == "x"


def test_whole_tensors_are_not_copied_and_gradients_stay_behind() -> None:
    weight = torch.ones(3, requires_grad=True)
    assert compact(weight).data_ptr() == weight.data_ptr()
    assert not compact(weight).requires_grad


def test_a_process_writes_to_its_log_from_python_and_below(tmp_path: Path) -> None:
    log = tmp_path / "logs" / "actor-0.log"
    code = (
        "import os\nfrom framework.cluster.shell import Shell\n"
        f"Shell('actor', 0, {str(log)!r})\nprint('from python', flush=True)\nos.write(2, b'from below\\n')\n"
        "os.kill(os.getpid(), 12)\nos.abort()"
    )
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    text = log.read_text()
    assert outcome.stdout == outcome.stderr == ""
    assert text.startswith("--- actor rank 0, pid ")
    assert "from python\nfrom below\n" in text
    assert "Fatal Python error: Aborted" in text
    assert text.count("most recent call first") == 2  # on request by signal, and at the crash
