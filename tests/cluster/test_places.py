"""Places of actors that are dead."""

from __future__ import annotations

import os
import time

import pytest
import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group

from klray.cluster.places import free_orphans, wait_until_free

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@ray.remote(num_cpus=0)
class Taker:
    """Has a place and waits for another one."""

    def take(self) -> tuple[str, str]:
        self.placements = placement_group([{"CPU": 1}]), placement_group([{"CPU": 10**6}])
        ray.get(self.placements[0].ready())
        return self.placements[0].id.hex(), self.placements[1].id.hex()

    def cluster(self) -> str | None:
        return os.environ.get("RAY_ADDRESS")


def test_places_of_a_killed_actor_are_freed_and_no_others() -> None:
    own = placement_group([{"CPU": 0.5}])  # of the driver
    ray.get(own.ready())
    killed, living = Taker.remote(), Taker.remote()
    taken, waiting = ray.get(killed.take.remote())

    def states() -> list[str]:
        table = placement_group_table()
        return [table[id_]["state"] for id_ in (taken, waiting, own.id.hex())]

    ray.kill(killed)
    time.sleep(2)
    assert states() == ["CREATED", "PENDING", "CREATED"]  # Ray keeps them
    others = ray.get(living.take.remote()) if ray.available_resources().get("CPU", 0) >= 1 else ()
    assert free_orphans() is bool(others)
    assert states() == ["REMOVED", "REMOVED", "CREATED"]
    ray.kill(living)
    wait_until_free(30)
    assert not free_orphans()
    remove_placement_group(own)


def test_every_process_knows_its_own_cluster() -> None:
    taker = Taker.remote()
    assert ray.get(taker.cluster.remote()) == ray.get_runtime_context().gcs_address
    ray.kill(taker)
