"""How much of a run is over."""

import pytest

from trl_recipes.clock import Clock


@pytest.fixture
def now(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_steps_or_time_whichever_is_further(now):
    clock, untimed = Clock(minutes=1.0), Clock(minutes=None)
    now[0] += 15
    assert clock.progress(0, 100) == 0.25 and clock.progress(80, 100) == 0.8
    assert untimed.progress(0, 100) == 0.0 and untimed.progress(30, 100) == 0.3
    now[0] += 50
    assert clock.progress(0, 100) == 1.0 and untimed.progress(101, 100) == 1.0


def test_within_a_step_all_are_told_the_same(now):
    clock = Clock(minutes=1.0)
    assert clock.progress(5, 100) == 0.05
    now[0] += 30
    assert clock.progress(5, 100) == 0.05 and clock.progress(6, 100) == 0.5


def test_a_step_stands_at_itself_or_further_on_where_time_runs_out(now):
    clock, untimed = Clock(minutes=1.0), Clock(minutes=None)
    assert untimed.place(29, 100) == 29 and untimed.share == 0
    now[0] += 30
    assert clock.place(29, 100) == 50 and clock.share == 0.5 and clock.share.is_shared()


def test_time_is_counted_from_the_first_step(now):
    clock = Clock(minutes=1.0)
    now[0] += 3600
    clock.on_train_begin(None, None, None)
    now[0] += 6
    assert clock.progress(0, 100) == pytest.approx(0.1)
