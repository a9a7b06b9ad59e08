"""Places that actors have taken, and that nobody frees once they are dead."""

from __future__ import annotations

import time

import ray
from ray._private.state import state as ray_state
from ray._raylet import ActorID, PlacementGroupID
from ray.core.generated.gcs_pb2 import PlacementGroupTableData
from ray.util.placement_group import PlacementGroup, remove_placement_group


def free_orphans() -> bool:
    """Frees the places of this job that were taken by actors which are dead; True where living ones hold some.

    Ray keeps a placement group until its job ends, where the actor that made it is killed. A stopped trial's are left
    so: its controller is killed with it, at any moment, even between asking for places and getting them.
    """
    held = False
    for group in _made_by_actors():
        actor = ActorID(group.creator_actor_id)
        if ray_state.actor_table(actor.hex()).get("State") == "DEAD":
            remove_placement_group(PlacementGroup(PlacementGroupID(group.placement_group_id)))
        else:
            held = True
    return held


def wait_until_free(seconds: float) -> None:
    """Until no actor of this job holds places any more, for so long at most; to be called when all are being ended."""
    give_up = time.monotonic() + seconds
    while free_orphans() and time.monotonic() < give_up:
        time.sleep(0.1)


def _made_by_actors() -> list[PlacementGroupTableData]:
    """This job's placement groups that exist or wait. Ray's public table does not say who made them."""
    job = bytes.fromhex(ray.get_runtime_context().get_job_id())
    table = ray_state._connect_and_get_accessor().get_placement_group_table()
    return [
        group
        for group in map(PlacementGroupTableData.FromString, table)
        if group.creator_job_id == job
        and group.state != PlacementGroupTableData.REMOVED
        and not group.is_detached
        and not ActorID(group.creator_actor_id).is_nil()
    ]
