"""Actors that come and go on a real Ray cluster: results in order, and a lost actor costs the piece that it had."""

import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from pipeline import cluster
from pipeline.errors import UserError, WorldError
from pipeline.evaluation.crew import Crew

# Workers of the cluster cannot import a test.
ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


class Worker:
    """Doubles numbers, each in its own time, and notes each piece that it begins."""

    def __init__(self, notes: str, problem: str = "") -> None:
        if problem:
            raise UserError(problem)
        self._notes = Path(notes)

    def ready(self) -> None:
        """Answers once it has started."""

    def double(self, number: int, seconds: float) -> int:
        """Takes its time."""
        (self._notes / f"{number}-{os.getpid()}-{time.time_ns()}").touch()
        time.sleep(seconds)
        return 2 * number

    def double_in_company(self, number: int) -> int:
        """Takes until another process has begun a piece, however long that one needs to start."""
        self.double(number, 0.0)
        while len({file.name.split("-")[1] for file in self._notes.iterdir()}) < 2:
            time.sleep(0.02)
        return 2 * number

    def refuse(self, number: int) -> int:
        """Raises what a user can mend."""
        raise UserError(f"{number} is refused")


@pytest.fixture(scope="module", autouse=True)
def cluster_of_two() -> Iterator[None]:
    """A Ray cluster with two CPUs."""
    with cluster.connect(num_cpus=2):
        yield


@pytest.fixture
def crew(tmp_path: Path) -> Iterator[Callable[..., Crew]]:
    """Makes crews and ends them."""
    made: list[Crew] = []

    def make(size: int = 2, problem: str = "") -> Crew:
        actor = ray.remote(Worker).options(num_cpus=1)
        made.append(Crew(lambda: actor.remote(str(tmp_path), problem), size=size, max_losses=2))
        return made[-1]

    yield make
    for crew in made:
        crew.close()


def begun(folder: Path, number: int) -> list[int]:
    """The processes that have begun a piece, one entry for each time."""
    files = sorted(folder.glob(f"{number}-*"), key=lambda file: int(file.name.split("-")[2]))
    return [int(file.name.split("-")[1]) for file in files]


def test_results_come_in_order_whatever_order_they_are_done_in(crew: Callable[..., Crew], tmp_path: Path) -> None:
    chance = random.Random(0)
    pauses = [chance.choice([0.0, 0.05, 0.2]) for _ in range(12)]

    def work(actor: Any, number: int) -> Any:
        return actor.double.remote(number, pauses[number]) if number else actor.double_in_company.remote(number)

    found = crew().results(work, range(12))
    assert list(found) == [2 * number for number in range(12)]
    assert len({pid for number in range(12) for pid in begun(tmp_path, number)}) == 2


def test_more_actors_than_the_cluster_has_room_for_wait_without_work(crew: Callable[..., Crew]) -> None:
    assert list(crew(size=5).results(lambda actor, n: actor.double.remote(n, 0.0), range(4))) == [0, 2, 4, 6]


def test_only_a_few_results_are_made_ahead_of_the_one_that_is_next(crew: Callable[..., Crew], tmp_path: Path) -> None:
    found = crew().results(lambda actor, number: actor.double.remote(number, 2.0 if number == 0 else 0.0), range(40))
    assert next(found) == 0
    assert max(number for number in range(40) if begun(tmp_path, number)) <= 4
    found.close()  # type: ignore[attr-defined]


def test_an_actor_that_is_killed_costs_the_piece_that_it_had(crew: Callable[..., Crew], tmp_path: Path) -> None:
    pauses = [0.0, 1.0, *[0.1] * 8]
    results: list[int] = []
    for result in crew().results(lambda actor, number: actor.double.remote(number, pauses[number]), range(10)):
        results.append(result)
        if result == 0:
            while not begun(tmp_path, 1):
                time.sleep(0.02)
            os.kill(begun(tmp_path, 1)[0], signal.SIGKILL)
    assert results == [2 * number for number in range(10)]
    assert [len(begun(tmp_path, number)) for number in range(10)] == [1, 2, *[1] * 8]


def test_a_piece_that_kills_every_actor_is_given_up(crew: Callable[..., Crew]) -> None:
    @ray.remote(num_cpus=1)
    class Fragile:
        def ready(self) -> None:
            pass

        def die(self, number: int) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

    team = Crew(Fragile.remote, size=1, max_losses=1)
    with pytest.raises(WorldError, match="an evaluation worker was lost"):
        list(team.results(lambda actor, number: actor.die.remote(number), range(3)))
    team.close()


def test_an_actor_that_cannot_start_is_one_line(crew: Callable[..., Crew]) -> None:
    team = crew(size=1, problem="the weights are not readable here")
    with pytest.raises(WorldError, match=r"cannot start: [^\n]*the weights are not readable here"):
        list(team.results(lambda actor, number: actor.double.remote(number, 0.0), range(3)))


def test_what_an_actor_refuses_is_raised_as_it_is_and_the_crew_goes_on(crew: Callable[..., Crew]) -> None:
    team = crew()
    with pytest.raises(UserError, match=r"^0 is refused$"):
        list(team.results(lambda actor, number: actor.refuse.remote(number), range(1)))
    assert list(team.results(lambda actor, number: actor.double.remote(number, 0.0), range(3))) == [0, 2, 4]


def test_no_work_needs_no_actor(crew: Callable[..., Crew]) -> None:
    nothing: list[Any] = []
    assert list(crew().results(lambda actor, number: actor.double.remote(number, 0.0), nothing)) == []
