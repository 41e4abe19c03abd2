"""Two nodes that share nothing but a wire, on one Linux machine: two network namespaces, a veth pair, torchrun in each.

    sudo python benchmarks/two_nodes.py [--engine ddp|zero1|zero2|zero3] [--unshared]

The library has to equal, bit for bit, that of two processes on one node. With `--unshared` each node has folders of its
own for output and library (mount namespaces), and the run is interrupted and resumed once.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path[0] = str(Path(__file__).parents[1] / "tests")

from support.agreement import ENGINES, losses, with_engine  # noqa: E402
from support.curricula import contents, curriculum_config  # noqa: E402
from support.models import cli_environment, tiny_llama  # noqa: E402
from support.processes import free_port, train_ranks, write_config  # noqa: E402

from axolotl_brainstacks.library import Library  # noqa: E402

ADDRESSES = ["10.213.77.1", "10.213.77.2"]
TESTS = Path(__file__).parents[1] / "tests"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


class Nodes:
    """Two namespaces joined by a wire, for as long as the context lasts."""

    def __init__(self) -> None:
        self.names = [f"brainstacks{os.getpid()}n{node}" for node in range(2)]

    def __enter__(self) -> "Nodes":
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            "wire0",
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            "wire1",
            "netns",
            self.names[1],
        )
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", f"wire{node}")
            for device in ("lo", f"wire{node}"):
                ip("-n", name, "link", "set", device, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            ip("netns", "delete", name)

    def start(self, config: Path, node: int, port: int, log: Path, disk: Path | None) -> subprocess.Popen[bytes]:
        """torchrun of one node; with `disk`, that folder is the node's own view of the config's folder `out`."""
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1",
            f"--master_addr={ADDRESSES[0]}", f"--master_port={port}", str(TESTS / "support" / "launch_cpu.py"), str(config),
        ]  # fmt: skip
        if disk is not None:
            disk.mkdir(exist_ok=True)
            mounted = ["sh", "-c", f'mount --bind "{disk}" "{config.parent / "out"}" && exec "$@"', "sh"]
            torchrun = ["unshare", "--mount", *mounted, *torchrun]
        environment = cli_environment(
            {
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(TESTS),
                "DS_ACCELERATOR": "cpu",
                "GLOO_SOCKET_IFNAME": f"wire{node}",
                "TP_SOCKET_IFNAME": f"wire{node}",
            }
        )
        with log.open("ab") as file:
            command = ["ip", "netns", "exec", self.names[node], *torchrun]
            return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def run(nodes: Nodes, config: dict[str, Any], folder: Path, unshared: bool, stop_at: str | None = None) -> None:
    """Train on both nodes; with `stop_at`, SIGTERM both launchers once that text is in the first node's log."""
    path, port = write_config(config, folder), free_port()
    (folder / "out").mkdir(exist_ok=True)
    logs = [folder / f"node{node}.log" for node in range(2)]
    disks = [folder / f"disk{node}" if unshared else None for node in range(2)]
    launchers = [nodes.start(path, node, port, logs[node], disks[node]) for node in range(2)]
    if stop_at is not None:
        while stop_at not in logs[0].read_text():
            assert all(launcher.poll() is None for launcher in launchers), logs[0].read_text()[-4000:]
            time.sleep(0.05)
        for launcher in launchers:
            launcher.send_signal(signal.SIGTERM)
    statuses = [launcher.wait(600) for launcher in launchers]
    if stop_at is None and any(statuses):
        raise SystemExit("\n".join(log.read_text()[-6000:] for log in logs))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=ENGINES, default="zero2")
    parser.add_argument("--unshared", action="store_true")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary, Nodes() as nodes:
        folder = Path(temporary)
        config = curriculum_config(tiny_llama(folder / "model"), folder, ["chat", "code"])
        config = with_engine(config | {"micro_batch_size": 1}, options.engine, folder)
        train_ranks(config, folder)
        one = folder / "out" / "library"
        two = folder / "two"
        apart = config | {"output_dir": str(two / "out"), "dataset_prepared_path": str(two / "out" / "prepared")}
        apart["debug"] = True  # every metric is in the log then
        library = two / ("disk0" if options.unshared else "out") / "library"
        if options.unshared:
            run(nodes, apart, two, True, stop_at="code/round1/loss")
            assert not (two / "disk1" / "library").exists(), "the second node wrote a library"
            print(
                "stopped; checkpoints:",
                *sorted(str(p.relative_to(two)) for p in two.glob("disk*/stages/*/*")),
                sep="\n  ",
            )
            subprocess.run(["cp", "-r", str(library), str(two / "disk1" / "library")], check=True)
        run(nodes, apart, two, options.unshared)
        assert Library.open(library).verify() == []
        print(f"{options.engine}, one node:  {losses(Library.open(one))}")
        print(f"{options.engine}, two nodes: {losses(Library.open(library))}")
        same = contents(library) == contents(one)
        print("the same library, bit for bit" if same else "the libraries differ")
        raise SystemExit(not same)


if __name__ == "__main__":
    main()
