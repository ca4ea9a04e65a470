"""How nbdcast alone scales: queue depth, connections, replicas, block size, size of the volume.

An engine and listener agents of their own, as in real use, all on this machine and its one disk. Figures are medians over
the rounds; memory is what the processes have resident when they are at rest."""

import shutil
import statistics
import time

import plots
from say import Progress, say
from servers import Cluster, Promise, Server, cpu_ticks, resident_bytes
from workloads import Work, fill, run

MIB = 1 << 20
PLACES = 64
LIMIT_S = 600
POINTS = {
    "depth": [1, 2, 4, 8, 16, 32, 64, 128],
    "connections": [1, 2, 4, 8],
    "replicas": [1, 2, 3, 4, 5],
    "block": [512, 4096, 16 << 10, 64 << 10, 256 << 10, MIB, 4 * MIB],
    "volume": [1 << 10, 16 << 10, 256 << 10, 1 << 20, 4 << 20],  # MiB
}
QUICK = {"depth": [1, 8, 32, 128], "connections": [1, 4], "replicas": [1, 3, 5], "block": [512, 4096, 64 << 10, MIB],
         "volume": [1 << 10, 1 << 20]}
ABOUT = {
    "depth": "queue depth, one connection, 4k, 3 replicas",
    "connections": "connections, 32 requests at a time in all, 4k, 3 replicas",
    "replicas": "replicas, one connection, 4k",
    "block": "bytes per request, one connection, QD4, 3 replicas",
    "volume": "size of a sparse volume, 3 replicas",
}


def size_text(number):
    for unit, factor in (("T", 1 << 40), ("G", 1 << 30), ("M", 1 << 20), ("k", 1 << 10)):
        if number >= factor:
            return f"{number // factor}{unit}"
    return str(number)


def works(curve, x):
    """What is run at one point."""
    if curve == "depth":
        return [Work("4k randwrite", "randwrite", "4k", x), Work("4k randread", "randread", "4k", x)]
    if curve == "connections":
        return [Work(f"4k {rw}", rw, "4k", 32 // x, connections=x) for rw in ("randwrite", "randread")]
    if curve == "replicas":
        return [Work("4k randwrite QD1", "randwrite", "4k", 1), Work("4k randwrite QD32", "randwrite", "4k", 32),
                Work("4k randread QD32", "randread", "4k", 32)]
    if curve == "block":
        return [Work("randwrite", "randwrite", str(x), 4), Work("randread", "randread", str(x), 4)]
    # Places that are written in order: a filesystem takes minutes to delete a file that has tens of thousands of pieces.
    skip_kib = (x << 10) // PLACES - 1024
    return [Work(f"4k write QD32, {PLACES} places", "write", "4k", 32, more=(
        "--zonemode=strided", "--zonesize=1M", "--zonerange=1M", f"--zoneskip={skip_kib}k"))]


class Bench:
    """Servers that are started when they are needed, in a place of their own."""

    def __init__(self, place, programs):
        self.place, self.programs, self.number = place, programs, 0
        self.standing = {}

    def fresh(self, replicas, size_mib):
        self.number += 1
        own = self.place / f"curve-{self.number}"
        own.mkdir()
        server = Server(f"nbdcast, {replicas} replicas", Promise(replicas, 1))
        return server, Cluster(server, own, self.programs, replicas, size_mib)

    def with_replicas(self, replicas):
        """A filled volume that runs until the end."""
        if replicas not in self.standing:
            server, cluster = self.fresh(replicas, 256)
            self.standing[replicas] = server, cluster
            cluster.start_agents()
            cluster.create()
            cluster.serve()
            fill(server, self.place)
        return self.standing[replicas]

    def stop(self):
        for server, _ in self.standing.values():
            server.stop()


def memory(cluster):
    agents = [resident_bytes(process.pid) for process in cluster.agents.values()]
    return {"engine_rss": resident_bytes(cluster.engine.pid), "agent_rss": statistics.mean(agents)}


def loaded(bench, curve, x, seconds):
    """The runs of one point on a volume that stands."""
    server, cluster = bench.with_replicas(x if curve == "replicas" else 3)
    for work in works(curve, x):
        engine = cpu_ticks(cluster.engine.pid)
        figures = run(server, bench.place, work, seconds)
        engine_us = (cpu_ticks(cluster.engine.pid) - engine) * 1e4 / figures["requests"]
        yield {"work": work.name, **figures, "engine_cpu_us": engine_us, **memory(cluster)}


def timed(action):
    start = time.monotonic()
    action()
    return time.monotonic() - start


def sparse(bench, size_mib, seconds):
    """A volume of that size: made, started, loaded in places all over it, started again, taken away."""
    server, cluster = bench.fresh(3, size_mib)
    try:
        cluster.start_agents()
        work, = works("volume", size_mib)
        entry = {"work": work.name, "create_s": timed(cluster.create)}
        server.stop()  # what making it took is not what it needs
        entry["start_s"] = timed(cluster.start_agents) + timed(cluster.serve)
        server.settle()
        entry.update(memory(cluster))
        entry.update(run(server, bench.place, work, seconds, size_mib))
        entry.update({f"loaded_{key}": value for key, value in memory(cluster).items()})
        files = [path for path in (cluster.place / "a").rglob("*") if path.is_file()]
        entry["agent_disk_bytes"] = sum(path.stat().st_blocks * 512 for path in files)
        server.stop()
        entry["restart_s"] = timed(cluster.start_agents) + timed(cluster.serve)
        yield entry
    finally:
        server.stop()
        shutil.rmtree(cluster.place, ignore_errors=True)


def expected_s(points, seconds, rounds):
    runs = sum(len(works(curve, x)) for curve, xs in points.items() if curve != "volume" for x in xs)
    clusters = len(points.get("replicas", [3]))
    return runs * rounds * (seconds + 0.9) + clusters * 5 + len(points.get("volume", [])) * (seconds + 8)


def measure(place, programs, points, seconds, rounds):
    """Every single result; rounds outermost, so that a slow minute does not bend one curve alone. Rounds that would end
    after the limit are left out."""
    steps = [(number, curve, x) for number in range(rounds) for curve, xs in points.items() for x in xs
             if curve != "volume" or number == 0]
    progress, results = Progress(len(steps), expected_s(points, seconds, rounds)), []
    bench, begun_s = Bench(place, programs), [0.0]
    try:
        for number, curve, x in steps:
            passed = time.monotonic() - progress.start
            if number == len(begun_s):
                # The latest round is the measure of the next; the first is longer, for what it starts.
                if passed + (passed - begun_s[-1]) > LIMIT_S:
                    say(f"{number} rounds took {passed:.0f} s: another would not end within {LIMIT_S} s and is left out")
                    break
                begun_s.append(passed)
            found = sparse(bench, x, seconds) if curve == "volume" else loaded(bench, curve, x, seconds)
            for entry in found:
                results.append({"curve": curve, "x": x, "round": number, **entry})
            last = results[-1]
            progress.step(f"{curve} {size_text(x * MIB) if curve == 'volume' else size_text(x)}: "
                          f"{last['iops']:.0f} IOPS, p50 {last['p50_us']:.0f} us")
    finally:
        bench.stop()
    say(f"measured in {time.monotonic() - progress.start:.0f} s")
    return results


def lines(results, curve, key, factor=1):
    """{work: [(x, median)]} of one curve."""
    rows = [row for row in results if row["curve"] == curve]
    found = {}
    for work in dict.fromkeys(row["work"] for row in rows):
        xs = sorted({row["x"] for row in rows if row["work"] == work})
        found[work] = [(x, factor * statistics.median(
            row[key] for row in rows if (row["work"], row["x"]) == (work, x))) for x in xs]
    return found


COLUMNS = [("iops", "IOPS", 1), ("mb_s", "MB/s", 1), ("p50_us", "p50 us", 1), ("p99_us", "p99 us", 1),
           ("cpu_us", "CPU us per request", 1), ("engine_cpu_us", "of it the engine", 1),
           ("engine_rss", "engine MiB", 1 / MIB), ("agent_rss", "each agent MiB", 1 / MIB)]
VOLUME_COLUMNS = [("create_s", "create s", 1), ("start_s", "start s", 1), ("restart_s", "start after load s", 1),
                  ("engine_rss", "engine MiB", 1 / MIB), ("agent_rss", "each agent MiB", 1 / MIB),
                  ("loaded_engine_rss", "engine MiB after load", 1 / MIB),
                  ("loaded_agent_rss", "each agent MiB after load", 1 / MIB),
                  ("agent_disk_bytes", "an agent's disk MiB", 1 / MIB), ("iops", "IOPS", 1), ("p99_us", "p99 us", 1)]


def table(results, curve):
    columns = VOLUME_COLUMNS if curve == "volume" else COLUMNS
    head = ["work", curve] + [name for _, name, _ in columns]
    rows = ["| " + " | ".join(head) + " |", "|---|" + "--:|" * (len(head) - 1)]
    cells = {key: lines(results, curve, key, factor) for key, _, factor in columns}
    for work, points in cells["iops"].items():
        for number, (x, _) in enumerate(points):
            shown = size_text(x * MIB) if curve == "volume" else size_text(x)
            values = [cells[key][work][number][1] for key, _, _ in columns]
            rows.append(f"| {work} | {shown} | " + " | ".join(f"{v:.0f}" if v >= 100 else f"{v:.3g}" for v in values) + " |")
    return rows


def slope(results, curve, key):
    """Least squares: how much `key` grows with x."""
    points = [(row["x"], row[key]) for row in results if row["curve"] == curve]
    x_mean = statistics.mean(x for x, _ in points)
    y_mean = statistics.mean(y for _, y in points)
    spread = sum((x - x_mean) ** 2 for x, _ in points)
    return sum((x - x_mean) * (y - y_mean) for x, y in points) / spread if spread else 0


def summary(results):
    """Memory and time per replica and per TiB, as sentences."""
    found = [row["curve"] for row in results]
    said = []
    if "replicas" in found:
        engine = slope(results, "replicas", "engine_rss") / MIB
        agent = statistics.median(row["agent_rss"] for row in results if row["curve"] == "replicas") / MIB
        said.append(f"- per replica: engine {engine:+.1f} MiB, and an agent of its own of {agent:.1f} MiB")
    if "volume" in found:
        for key, what in (("", "idle"), ("loaded_", "after load")):
            engine, agent = (slope(results, "volume", f"{key}{who}_rss") * (1 << 20) / MIB for who in ("engine", "agent"))
            said.append(f"- per TiB of volume, {what}: engine {engine:+.1f} MiB, each agent {agent:+.1f} MiB")
        said.append(f"- per TiB of volume: start {slope(results, 'volume', 'start_s') * (1 << 20):+.3f} s")
    return said


def markdown(results):
    found = []
    for curve in dict.fromkeys(row["curve"] for row in results):
        found += [f"### {curve}: {ABOUT[curve]}", "", *table(results, curve), ""]
    return "\n".join(found + summary(results))


def draw(results, below, directory):
    present = {row["curve"] for row in results}
    for curve in present - {"volume"}:
        shown = size_text if curve == "block" else str
        for key, name, what in (("iops", "IOPS", "iops"), ("p50_us", "p50 in us", "p50"), ("mb_s", "MB/s", "mb"),
                                ("cpu_us", "CPU us per request", "cpu")):
            if (key == "mb_s") == (curve == "block") or key not in ("mb_s", "iops"):
                plots.curves(f"{name} by {curve}", below, ABOUT[curve], name, lines(results, curve, key),
                             directory / f"{curve}-{what}.svg", shown, log_y=key == "p50_us" or curve == "block")
    for curve in present & {"replicas", "volume"}:
        data = {}
        for key, name in (("engine_rss", "engine"), ("agent_rss", "each agent"), ("loaded_engine_rss", "engine, after load"),
                          ("loaded_agent_rss", "each agent, after load")):
            if curve == "volume" or not key.startswith("loaded"):
                data[name] = list(lines(results, curve, key, 1 / MIB).values())[0]
        shown = (lambda x: size_text(x * MIB)) if curve == "volume" else str
        plots.curves(f"Resident memory by {curve}", below, ABOUT[curve], "MiB", data, directory / f"{curve}-memory.svg",
                     shown)
    if "volume" in present:
        data = {name: list(lines(results, "volume", key).values())[0]
                for key, name in (("create_s", "create"), ("start_s", "start"), ("restart_s", "start after load"))}
        plots.curves("Seconds by volume", below, ABOUT["volume"], "s", data, directory / "volume-seconds.svg",
                     lambda x: size_text(x * MIB))
