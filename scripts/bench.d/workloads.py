"""The works of the table, the targets, and fio, which is the client of every server.

Knows no server but by its name and URI."""

import dataclasses
import json
import os
import subprocess
import time

from say import Progress, say
from servers import AGENTS, DELAY_MS, DEMO, QUORUM, SCRUBBED, SINGLE, SIZE_MIB, SLOW, SLOW_QUORUM


@dataclasses.dataclass(frozen=True)
class Work:
    """One kind of load. `depth` is that of each connection, `more` goes to fio as it is."""
    name: str
    rw: str
    block: str
    depth: int
    connections: int = 1
    more: tuple = ()

    @property
    def writes(self):
        return "write" in self.rw or self.rw == "randrw"


@dataclasses.dataclass(frozen=True)
class Target:
    """A ratio of `metric` of each of `subjects` to that of `against` in the same work. Without a bound it is only shown."""
    work: str
    metric: str
    subjects: tuple
    against: str
    at_least: float = None
    at_most: float = None
    stretch: float = None

    def bound(self):
        if self.at_least is not None:
            stretch = f" (stretch {self.stretch:g}x)" if self.stretch else ""
            return f">= {self.at_least:g}x{stretch}"
        return f"<= {self.at_most:g}x" if self.at_most is not None else "shown"

    def verdict(self, ratio):
        if self.at_least is not None:
            if self.stretch and ratio >= self.stretch:
                return "met, stretch too"
            return "met" if ratio >= self.at_least else "MISSED"
        if self.at_most is not None:
            return "met" if ratio <= self.at_most else "MISSED"
        return ""


WRITE_QD1, WRITE_QD32, WRITE_1M = "4k randwrite QD1", "4k randwrite QD32", "1M write QD4"
READ_QD1, READ_QD32, READ_1M = "4k randread QD1", "4k randread QD32", "1M read QD4"
MIXED = "4k randrw 70/30 QD32, 4 conn."
WORKS = [
    Work(WRITE_QD1, "randwrite", "4k", 1),
    Work(WRITE_QD32, "randwrite", "4k", 32),
    Work(WRITE_1M, "write", "1M", 4),
    Work(READ_QD1, "randread", "4k", 1),
    Work(READ_QD32, "randread", "4k", 32),
    Work(READ_1M, "read", "1M", 4),
    Work(MIXED, "randrw", "4k", 8, connections=4),
]
OURS = (DEMO, AGENTS)
TARGETS = [
    Target(WRITE_QD32, "iops", OURS, QUORUM, at_least=8, stretch=12),
    Target(WRITE_QD32, "iops", OURS, SINGLE, at_least=4),
    Target(WRITE_QD32, "p99_us", (SCRUBBED,), AGENTS, at_most=1.5),
    Target(WRITE_QD1, "p50_us", OURS, QUORUM, at_most=0.5),
    Target(WRITE_QD1, "p99_us", (SLOW,), AGENTS, at_most=1.2),
    Target(WRITE_QD1, "p99_us", (SLOW_QUORUM,), QUORUM),
    Target(WRITE_1M, "iops", OURS, QUORUM, at_least=2.5),
    Target(READ_QD1, "iops", OURS, QUORUM, at_least=2),
    Target(READ_QD32, "iops", OURS, QUORUM, at_least=3.5),
    Target(READ_1M, "iops", OURS, QUORUM, at_least=2),
    Target(MIXED, "iops", OURS, QUORUM, at_least=5),
]


def side(job, name):
    """One direction of fio's result, or None if nothing went that way."""
    found = job[name]
    if not found["total_ios"]:
        return None
    percentile = found["clat_ns"]["percentile"]
    return {"requests": found["total_ios"], "iops": found["iops"], "mb_s": found["bw_bytes"] / 1e6,
            "p50_us": percentile["50.000000"] / 1e3, "p99_us": percentile["99.000000"] / 1e3}


def fio(uri, place, work, seconds, size_mib=SIZE_MIB):
    """One run. IOPS, MB/s and requests count both directions; p50 and p99 are of writes where there are any. With
    `seconds` None every block is written or read once."""
    bound = [] if seconds is None else ["--time_based", f"--runtime={int(seconds * 1000)}ms"]
    out = subprocess.run(
        ["fio", "--name=b", "--ioengine=nbd", f"--uri={uri}", f"--rw={work.rw}", f"--bs={work.block}", "--rwmixread=70",
         f"--iodepth={work.depth}", f"--numjobs={work.connections}", "--group_reporting", f"--size={size_mib}M",
         "--norandommap", "--randrepeat=0", "--output-format=json", *work.more, *bound],
        cwd=place, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=180)
    if out.returncode != 0 or "{" not in out.stdout:
        raise SystemExit(f"bench: fio {work.rw} on {uri} failed:\n{out.stdout}\n{out.stderr}")
    job = json.loads(out.stdout[out.stdout.index("{"):])["jobs"][0]
    sides = {name: found for name in ("read", "write") if (found := side(job, name))}
    if not sides:
        raise SystemExit(f"bench: fio {work.rw} on {uri} had not one request answered:\n{out.stdout}")
    main = sides.get("write") or sides["read"]
    total = {key: sum(found[key] for found in sides.values()) for key in ("requests", "iops", "mb_s")}
    return {**total, "p50_us": main["p50_us"], "p99_us": main["p99_us"], **sides}


def run(server, place, work, seconds, size_mib=SIZE_MIB):
    """One run and what it cost: CPU of all the server's processes until it is at rest again, and how long the kernel then
    took to write out what was in its cache, which else it would do in the next server's time."""
    before = server.cpu_us()
    with server.meanwhile():
        figures = fio(server.uri, place, work, seconds, size_mib)
    server.settle()
    figures["cpu_us"] = (server.cpu_us() - before) / figures["requests"]
    start = time.monotonic()
    os.sync()
    return {**figures, "sync_s": time.monotonic() - start}


def fill(server, place):
    """Every block is allocated before anything is timed."""
    run(server, place, Work("fill", "write", "1M", 4), None)


def plan(servers, works, rounds):
    """All runs: works in turn, within each the servers in an order that rotates from round to round."""
    runs = []
    for number in range(rounds):
        for work in works:
            part = [server for server in servers if server.works is None or work.name in server.works]
            turn = number % max(len(part), 1)
            runs += [(number, work, server) for server in part[turn:] + part[:turn]]
    return runs


def measure(runs, place, seconds, overhead_s):
    progress, results = Progress(len(runs), len(runs) * (seconds + overhead_s)), []
    for number, work, server in runs:
        delays = server.delays() if server.slow_log else 0
        figures = run(server, place, work, seconds)
        if server.slow_log and (server.delays() - delays) < seconds * 1000 / DELAY_MS / 3:
            raise SystemExit(f"bench: {server.name} had {server.delays() - delays} calls delayed, too few for a disk that "
                             "is slow all the time: it writes in a way that is not known here")
        results.append({"round": number, "server": server.name, "work": work.name, **figures})
        progress.step(f"{work.name:29} {server.name:26} {figures['iops']:8.0f} IOPS  p50 {figures['p50_us']:7.0f} us  "
                      f"p99 {figures['p99_us']:7.0f} us  cpu {figures['cpu_us']:5.0f} us")
    say(f"measured in {time.monotonic() - progress.start:.0f} s")
    return results
