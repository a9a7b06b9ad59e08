"""What Ray's AWS provider makes of the repository's cluster.yaml, at an emulated EC2 (moto)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import moto
import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ec2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Its client, after a head and a worker were started there."""
    from ray.autoscaler._private.aws import config as aws
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config

    with pytest.MonkeyPatch.context() as patch, moto.mock_aws(config={"iam": {"load_aws_managed_policies": True}}):
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # Ray writes the key there
        patch.setattr(aws, "time", SimpleNamespace(sleep=lambda seconds: None))  # half a minute for a new role
        config = aws.bootstrap_aws(prepare_config(yaml.safe_load((ROOT / "cluster.yaml").read_text())))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind in ("head", "worker"):
            machine = config["available_node_types"][kind]["node_config"] | (
                config["head_node"] if kind == "head" else {}
            )
            tags = {"ray-node-type": kind, "ray-node-name": kind, "ray-user-node-type": kind}
            provider.create_node(machine, tags, 1)
        yield boto3.client("ec2", region_name=config["provider"]["region"])


def test_nothing_but_ssh_is_open(ec2: Any) -> None:
    (group,) = ec2.describe_security_groups(Filters=[{"Name": "group-name", "Values": ["klray"]}])["SecurityGroups"]
    from_outside = [rule for rule in group["IpPermissions"] if rule["IpRanges"] or rule["Ipv6Ranges"]]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in from_outside] == [("tcp", 22, 22)]
    (within,) = [rule for rule in group["IpPermissions"] if rule not in from_outside]
    assert [pair["GroupId"] for pair in within["UserIdGroupPairs"]] == [group["GroupId"]]


def test_the_machines(ec2: Any) -> None:
    """The head stays; the worker is spot. Only the head may start machines. All are in that one group."""
    made = [machine for each in ec2.describe_instances()["Reservations"] for machine in each["Instances"]]
    head, worker = sorted(made, key=lambda machine: machine.get("InstanceLifecycle") == "spot")
    assert (head.get("InstanceLifecycle"), worker["InstanceLifecycle"]) == (None, "spot")
    assert "IamInstanceProfile" in head and "IamInstanceProfile" not in worker
    for machine in made:
        assert [group["GroupName"] for group in machine["SecurityGroups"]] == ["klray"]
    assert head["KeyName"] == worker["KeyName"] and head["VpcId"] == worker["VpcId"]
