"""Promises 2 and 8: a write that breaks off leaves whole files, a killed training ends as one that was not."""

import pytest
from crashes import WAYS, WRITERS, crashed_writes, killed_trainings


@pytest.mark.parametrize("seed", [1])
def test_writes_that_break_off_leave_the_old_file_or_the_new_one(tmp_path, seed):
    counted = crashed_writes(len(WAYS) * len(WRITERS), seed, tmp_path)
    assert counted["faults"] == [] and counted["lost"] == 0 and counted["tried"] == len(WAYS) * len(WRITERS)


def test_killed_trainings_are_resumed_to_the_same_end(tmp_path):
    assert killed_trainings(3, 2, tmp_path) == {"tried": 3, "lost": 0, "faults": []}
