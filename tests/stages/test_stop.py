"""The end of a run by the clock."""

import time
from datetime import datetime, timedelta
from typing import Any

import pytest
from transformers import TrainerControl

from rlhf_recipes.stages.stop import StopInOrder


@pytest.mark.parametrize("shift", [-3600.0, 3600.0])
def test_a_clock_that_is_set_moves_no_deadline(shift: float, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, control = StopInOrder(datetime.now() + timedelta(hours=2)), TrainerControl()
    unused: Any = None
    wall, steady, passed = time.time(), time.monotonic(), 0.0
    monkeypatch.setattr(time, "time", lambda: wall + shift + passed * 3600)
    monkeypatch.setattr(time, "monotonic", lambda: steady + passed * 3600)
    for hours, expected in ((1.9, False), (2.1, True)):
        passed = hours
        stop.on_step_end(unused, unused, control)
        assert control.should_save == expected
    # What a sweep hands to the process of a variant is by the clock of then.
    assert stop.at == pytest.approx(wall + shift + 2 * 3600, abs=1)
