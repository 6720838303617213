"""What ranks say of themselves, and the one sentence that is made of it."""

import threading
import time

import pytest

from framework.core.whereabouts import Phases, Post, sentence

WAITING = Post("step 3, the sum of x", waits=True, seconds=30.0)
AT_WORK = Post("step 3, micro-batch 1 of 4", line="a.py:7 in f", seconds=9.0)


@pytest.mark.parametrize(
    ("posts", "gone", "expected"),
    [
        ([WAITING, WAITING, AT_WORK, WAITING, WAITING, WAITING], [],
         "rank 2 is at step 3, micro-batch 1 of 4 (a.py:7 in f) for 9 s, slow or stuck; "
         "ranks 0-1, 3-5 wait at step 3, the sum of x"),
        ([WAITING, WAITING], [], "ranks 0-1 wait at step 3, the sum of x"),
        ([WAITING, AT_WORK, AT_WORK, None], [1, 2],
         "rank 3 has not begun; ranks 1-2 have left or died; their last phase was step 3, micro-batch 1 of 4; "
         "rank 0 waits at step 3, the sum of x"),
        ([Post("step 3", past=True, line="a.py:1 in g"), WAITING], [],
         "rank 0 is past step 3 (a.py:1 in g); rank 1 waits at step 3, the sum of x"),
        ([Post(f"step {n}", waits=True) for n in range(9)], [],
         "; ".join(f"rank {n} waits at step {n}" for n in range(6)) + "; and 3 more ranks elsewhere"),
    ],
)  # fmt: skip
def test_equal_ranks_make_one_clause_the_odd_ones_first(
    posts: list[Post | None], gone: list[int], expected: str
) -> None:
    assert sentence(dict(enumerate(posts)), gone) == expected


def test_phases_nest_and_the_innermost_that_is_over_is_remembered() -> None:
    here = Phases()
    assert here.post().phase == "the beginning"
    step = here.enter("step 3")
    micro = here.enter("micro-batch 1 of 4")
    assert (here.post().phase, here.post().past) == ("step 3, micro-batch 1 of 4", False)
    here.leave(micro)
    assert here.post().phase == "step 3"
    here.leave(step)
    assert (here.post().phase, here.post().past) == ("step 3, micro-batch 1 of 4", True)


def test_only_a_phase_that_may_not_last_is_late() -> None:
    here = Phases()
    time.sleep(0.01)
    assert not here.late(0.005)
    saving = here.enter("saving step 3", patient=True)
    time.sleep(0.01)
    assert not here.late(0.005)
    here.enter("the sum of x")
    time.sleep(0.01)
    assert here.late(0.005)
    assert not here.late(60.0)
    here.leave(saving)


def test_a_failure_is_told_where_it_happened() -> None:
    here = Phases()
    entry = here.enter("the sum of x")
    here.freeze()
    here.leave(entry)
    here.enter("saving what there is")
    assert here.post(beat=4) == Post("the sum of x", waits=True, beat=4)


def test_another_thread_reads_the_line_that_the_main_one_is_in() -> None:
    here, read = Phases(), list[Post]()
    reader = threading.Thread(target=lambda: read.append(here.post()))
    reader.start()
    for _ in range(2000):
        if read:
            break
        time.sleep(0.01)
    reader.join()
    assert read[0].line.endswith("in test_another_thread_reads_the_line_that_the_main_one_is_in")
    assert not read[0].waits
