"""A cluster file, checked without a cloud, and a live cluster: python -m klray.check cluster.yaml [--live]"""

from __future__ import annotations

import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

from klray.cli import Parser, columns, run_command
from klray.errors import UserError


def parse(argv: list[str] | None) -> Namespace:
    """The command line."""
    parser = Parser(prog="klray.check", description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="a cluster file")
    parser.add_argument(
        "--live",
        action="store_true",
        help="count the machines of the running cluster; without FILE, of the one that RAY_ADDRESS names",
    )
    parser.add_argument("--nodes", type=int, help="how many machines must be there (default: what FILE starts with)")
    parser.add_argument("--wait", type=float, default=120.0, metavar="SECONDS", help="for them (default 120)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 all is well, 2 the file's mistake, 1 machines are missing."""
    args = parse(argv)
    return run_command("klray.check", lambda: _check(args))


def _check(args: Namespace) -> int:
    if args.file is None and not args.live:
        raise UserError("klray.check takes a cluster file, or --live")
    if args.nodes is not None and args.nodes < 1:
        raise UserError(f"--nodes must be >= 1, got {args.nodes}")
    if args.file is None:
        return _live(args.nodes or 1, args.wait)
    from klray.cluster.cluster_file import check_cluster_file, nodes_at_start

    config = check_cluster_file(args.file)
    provider = config["provider"]
    print(f"{args.file} is well: cluster {config['cluster_name']} ({provider['type']})")
    names = [(name, kind) for name, kind in config["available_node_types"].items() if provider["type"] != "local"]
    if names:
        lines = [["type", "machine", "resources", "at least", "at most"]]
        for name, kind in names:
            head = name == config["head_node_type"]
            has = " ".join(f"{value} {key}" for key, value in kind["resources"].items())
            machine = str(kind["node_config"].get("InstanceType", "-"))
            limits = ["1", "1"] if head else [str(kind["min_workers"]), str(kind["max_workers"])]
            lines.append([name, machine, has, *limits])
        print(columns(lines))
    if not args.live:
        return 0
    # The cluster's own ports are on its private network: the question is put on the head.
    question = f"python -m klray.check --live --nodes {args.nodes or nodes_at_start(config)} --wait {args.wait:g}"
    command = [str(Path(sys.executable).parent / "ray"), "exec", str(args.file), question]
    return int(subprocess.run(command, stdin=subprocess.DEVNULL, check=False).returncode != 0)


def _live(nodes: int, wait: float) -> int:
    os.environ.setdefault("RAY_ADDRESS", "auto")
    from klray.cluster.live import wait_for_nodes

    found = wait_for_nodes(nodes, wait)
    print(columns([["address", "CPU", "GPU", "Python", "Ray", "klray", "torch"], *(node.texts() for node in found)]))
    if len(found) < nodes:
        print(f"{len(found)} of {nodes} machines are there after {wait:g} s")
        print("on the head, /tmp/ray/session_latest/logs/monitor.log says what became of the others")
        return 1
    unlike = {node.versions for node in found}
    if len(unlike) > 1:
        print("the machines' versions differ; ray up --restart-only after setting them up alike")
        return 1
    print(f"{len(found)} machines are there")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
