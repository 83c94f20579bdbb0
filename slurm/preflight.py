"""One rank of the check before a long run. Rank 0 names the bad nodes, or prints `preflight: fit`.

    srun … python slurm/preflight.py [--cpu] [--folder OUTPUT_DIR]

Each node first checks its own GPUs and disks. Then all report to rank 0, which shows who is missing. Then
they run an all-reduce and compare clocks. PREFLIGHT_NODES names the nodes in the order of ranks. The exit
code says nothing, because srun would blame rank 0's node for it, which need not be the bad one. The line
`preflight: unfit: …` says what to do. The batch shell ends with it.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from llm2vec_ds.distributed import Ranks, export_ranks, ranks_from_environment
from llm2vec_ds.network import interface_towards
from llm2vec_ds.storage.cache_folder import cache_root

MIN_FREE_GIB = float(os.environ.get("LLM2VEC_DS_MIN_FREE_GIB", "50"))
"""Required on the disk of the run's folder. A 7B model has 14 GB, a checkpoint of adapters less than 1 GB."""
MAX_CLOCK_SKEW_S = 1.0
"""Allowed between a node's clock and rank 0's. File times and logs of the nodes are compared."""
TIMEOUT = timedelta(seconds=float(os.environ.get("LLM2VEC_DS_NODE_TIMEOUT_S", "60")))
MESSAGE_MIB = 64


def own_problems(ranks: Ranks, folder: Path, cpu: bool) -> Iterator[str]:
    """Yields problems that this process can find alone."""
    if not cpu:
        yield from gpu_problems(ranks)
    if ranks.local_rank:
        return
    for setting, path, wanted_gib, fix in (
        ("output_dir", folder, MIN_FREE_GIB, "free some, or lower LLM2VEC_DS_MIN_FREE_GIB"),
        ("LLM2VEC_DS_CACHE", cache_root(), 1.0, "free some, or set it to another disk"),
        ("TMPDIR", Path(tempfile.gettempdir()), 1.0, "free some, or set it to another disk"),
    ):
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path) as file:
                file.write(bytes(2**20))
                file.flush()
                os.fsync(file.fileno())
            status = os.statvfs(path)
        except OSError as error:
            yield f"disk: {setting}={path} cannot be written ({error.strerror})"
            continue
        free_gib = status.f_bavail * status.f_frsize / 2**30
        if free_gib < wanted_gib:
            yield (
                f"disk: {setting}={path} has {free_gib:.0f} GiB free, {wanted_gib:g} GiB are needed: {fix}"
            )


def gpu_problems(ranks: Ranks) -> Iterator[str]:
    if not torch.cuda.is_available():
        yield (
            "GPU: none that torch sees: check the driver, and that torch is a CUDA build "
            "(nodes without a GPU: LLM2VEC_DS_PREFLIGHT=cpu)"
        )
    elif ranks.local_rank >= torch.cuda.device_count():
        n = torch.cuda.device_count()
        yield f"GPU: none for local rank {ranks.local_rank}, {n} visible (--gpus-per-node?)"
    else:
        try:
            x = torch.ones(1024, 1024, device=f"cuda:{ranks.local_rank}")
            if float((x @ x)[0, 0]) != 1024.0:
                yield f"GPU {ranks.local_rank}: wrong product"
        except RuntimeError as error:
            yield f"GPU {ranks.local_rank}: {str(error).splitlines()[0]}"


def joint_problems(ranks: Ranks, store: dist.Store, folder: Path, cpu: bool) -> Iterator[str]:
    """Yields problems that only show together. Every rank runs the same collectives."""
    device = torch.device("cpu") if cpu else torch.device("cuda", ranks.local_rank)
    if not cpu:
        torch.cuda.set_device(device)
    dist.init_process_group(
        "gloo" if cpu else "nccl", store=store, rank=ranks.rank, world_size=ranks.world_size, timeout=TIMEOUT
    )
    message = torch.full((MESSAGE_MIB * 2**18,), float(ranks.rank + 1), device=device)
    dist.all_reduce(message[:1])
    now_s, started_s = time.time(), time.perf_counter()  # all ranks are here
    dist.all_reduce(message[1:])
    wanted = ranks.world_size * (ranks.world_size + 1) / 2
    if not bool((message == wanted).all()):
        yield f"all-reduce: rank {ranks.rank} got {float(message[-1])}, not {wanted}"
    if ranks.rank == 0:
        elapsed_s = time.perf_counter() - started_s
        print(f"preflight: all-reduce of {MESSAGE_MIB} MiB: {elapsed_s * 1e3:.0f} ms the first time")
    clocks_s = torch.zeros(ranks.world_size, dtype=torch.float64, device=device)
    clocks_s[ranks.rank] = now_s
    dist.all_reduce(clocks_s)
    skew_s = float(clocks_s[ranks.rank] - clocks_s[0])
    if ranks.local_rank == 0 and abs(skew_s) > MAX_CLOCK_SKEW_S:
        yield f"clock: {skew_s:+.1f} s from the first node's (is NTP running?)"
    seen = folder / f".preflight-{os.environ['SLURM_JOB_ID']}"
    if ranks.rank == 0:
        seen.touch()
    dist.barrier()
    if ranks.local_rank == 0 and not seen.exists():
        yield f"disk: output_dir={folder} is another one than on the first node: it must be shared"
    dist.barrier()
    if ranks.rank == 0:
        seen.unlink()


class Meeting:
    """Collects the reports of all ranks, phase by phase. It uses a store on rank 0 and no collective."""

    def __init__(self, ranks: Ranks, store: dist.Store) -> None:
        self.ranks = ranks
        self.store = store
        self.nodes = os.environ["PREFLIGHT_NODES"].split()

    def node_of(self, rank: int) -> str:
        return self.nodes[rank * len(self.nodes) // self.ranks.world_size]

    def problems(self, phase: str, own: list[str]) -> list[tuple[str, str]]:
        """Returns all reports as (node, problem), in order of ranks. A missing report is a problem too."""
        self.store.set(f"{phase}/{self.ranks.rank}", json.dumps(own))
        if self.ranks.rank > 0:
            return [(node, problem) for node, problem in json.loads(self.store.get(f"{phase}/all"))]
        found: list[tuple[str, str]] = []
        deadline = time.monotonic() + TIMEOUT.total_seconds()
        for rank in range(self.ranks.world_size):
            try:
                left_s = max(deadline - time.monotonic(), 0.1)
                self.store.wait([f"{phase}/{rank}"], timedelta(seconds=left_s))
                reported = json.loads(self.store.get(f"{phase}/{rank}"))
            except dist.DistError:
                reported = [f"{phase}: rank {rank} does not answer"]
            found += [(self.node_of(rank), problem) for problem in reported]
        self.store.set(f"{phase}/all", json.dumps(found))
        return found


def conclusion(found: list[tuple[str, str]], nodes: list[str]) -> str:
    """Returns what to do about the problems found. An error of every node is hardly the fault of a node."""
    of_node = {node: {problem for name, problem in found if name == node} for node in nodes}
    bad = [node for node in nodes if of_node[node]]
    is_same = all(of_node[node] == of_node[bad[0]] for node in bad)
    if all(problem.startswith("all-reduce") for _, problem in found) and len(bad) == len(nodes) > 1:
        return (
            "the nodes do not reach each other: see LLM2VEC_DS_INTERFACE and the firewall. If a smaller job "
            "on some of these nodes passes, submit with --exclude=NODE for the others"
        )
    if len(bad) == len(nodes) == 1:
        return f"fix what is said above, or submit with --exclude={bad[0]} if only this node has it"
    if len(bad) == len(nodes) and is_same:
        return (
            "every node has the same error, so a setting or a shared disk is at fault: fix what is said above"
        )
    if len(bad) == len(nodes):
        return "every node has an error: look for a common cause (a setting, the shared disk) first"
    if len(bad) > 1 and bad == nodes[1:] and is_same:
        return f"all nodes but {nodes[0]} have the same error: a setting is wrong, or {nodes[0]} is not fit"
    names = ",".join(bad)
    verb = "is" if len(bad) == 1 else "are"
    return f"{names} {verb} not fit: submit with --exclude={names}, and tell the operators"


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--cpu", action="store_true")
    options.add_argument("--folder", type=Path, default=Path("runs"))
    arguments = options.parse_args()
    ranks = ranks_from_environment()
    export_ranks(ranks)
    if towards_rank_0 := interface_towards(os.environ["MASTER_ADDR"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", towards_rank_0)
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=ranks.rank == 0,
        timeout=3 * TIMEOUT,
        wait_for_workers=False,
    )
    meeting = Meeting(ranks, store)
    found = meeting.problems("meeting", list(own_problems(ranks, arguments.folder, arguments.cpu)))
    if not found:
        try:
            own = list(
                joint_problems(ranks, dist.PrefixStore("group", store), arguments.folder, arguments.cpu)
            )
        except RuntimeError as error:
            own = [f"all-reduce: {str(error).splitlines()[0]}"]
        found = meeting.problems("all-reduce", own)
    if ranks.rank > 0:
        store.add("left", 1)
        return  # rank 0 prints for all
    for node, problem in found:
        print(f"preflight: error: {node}: {problem}")
    print(f"preflight: unfit: {conclusion(found, meeting.nodes)}" if found else "preflight: fit")
    ends = time.monotonic() + 5
    while store.add("left", 0) < ranks.world_size - 1 and time.monotonic() < ends:
        time.sleep(0.05)  # the store ends with this process, and the others must read it first


if __name__ == "__main__":
    main()
