"""Medians, ratios, verdicts, and the Markdown that tells of them.

A ratio between servers of different promise is never printed without a note that says so."""

import statistics

from servers import unlike
from workloads import READ_QD1, READ_QD32, TARGETS, WORKS, WRITE_QD1, WRITE_QD32

FIGURES = ("iops", "mb_s", "p50_us", "p99_us", "cpu_us")
METRICS = {"iops": "IOPS", "p50_us": "p50", "p99_us": "p99"}


class Figures:
    """Every single result, by server and work."""

    def __init__(self, servers, results):
        self.servers = {server.name: server for server in servers}
        self.results = results

    def all(self, server, work, key):
        """By round, so that those of one round can be set beside each other."""
        return {row["round"]: row[key] for row in self.results if (row["server"], row["work"]) == (server, work)}

    def median(self, server, work, key):
        values = self.all(server, work, key)
        return statistics.median(values.values()) if values else None

    def ratio(self, subject, against, work, key):
        """Of the medians, and the least and the greatest of the rounds; None if one was not measured."""
        one, other = self.all(subject, work, key), self.all(against, work, key)
        if not one or not other:
            return None
        rounds = [one[number] / other[number] for number in one if number in other]
        return statistics.median(one.values()) / statistics.median(other.values()), min(rounds), max(rounds)


class Notes:
    """Footnotes: the same text gets the same number."""

    def __init__(self):
        self.texts = []

    def mark(self, text):
        if text is None:
            return ""
        if text not in self.texts:
            self.texts.append(text)
        return f" [{self.texts.index(text) + 1}]"

    def lines(self):
        return [f"[{number}] different promises: {text}." for number, text in enumerate(self.texts, 1)]


def mark(figures, notes, work, subject, against):
    writes = next(w for w in WORKS if w.name == work).writes
    one, other = figures.servers[subject].promise, figures.servers[against].promise
    return notes.mark(unlike(one, other, writes))


def judge(figures):
    """One entry for each target and subject that was measured."""
    found = []
    for target in TARGETS:
        for subject in target.subjects:
            ratio = figures.ratio(subject, target.against, target.work, target.metric)
            if ratio:
                found.append({"work": target.work, "metric": target.metric, "server": subject,
                              "against": target.against, "ratio": ratio[0], "least": ratio[1], "most": ratio[2],
                              "at_least": target.at_least, "at_most": target.at_most, "stretch": target.stretch,
                              "bound": target.bound(), "verdict": target.verdict(ratio[0])})
    return found


def targets_table(figures, judged, notes):
    lines = ["| work | server | against | metric | target | ratio | of single rounds | |",
             "|---|---|---|---|---|--:|--:|---|"]
    for entry in judged:
        note = mark(figures, notes, entry["work"], entry["server"], entry["against"])
        lines.append(f"| {entry['work']} | {entry['server']} | {entry['against']}{note} | {METRICS[entry['metric']]} "
                     f"| {entry['bound']} | {entry['ratio']:.2f}x | {entry['least']:.2f} - {entry['most']:.2f} "
                     f"| {entry['verdict']} |")
    return lines


def figures_table(figures):
    lines = ["| work | server | IOPS | MB/s | p50 us | p99 us | CPU us per request |", "|---|---|--:|--:|--:|--:|--:|"]
    for work in WORKS:
        for name, server in figures.servers.items():
            median = {key: figures.median(name, work.name, key) for key in FIGURES}
            if median["iops"] is not None:
                # Of what runs under strace the CPU is not told: strace's own would count.
                cells = ["" if key == "cpu_us" and server.slow_log else f"{median[key]:.0f}" for key in FIGURES]
                lines.append(f"| {work.name} | {name} | {' | '.join(cells)} |")
    return lines


def cpu_table(figures):
    """What a 4k request costs, summed over all processes of a server; fio's own time is not in it."""
    works = [work for work in (WRITE_QD1, WRITE_QD32, READ_QD1, READ_QD32)
             if any(row["work"] == work for row in figures.results)]
    if not works:
        return []
    lines = ["| CPU us per request, all processes | " + " | ".join(works) + " |", "|---|" + "--:|" * len(works)]
    for name, server in figures.servers.items():
        medians = [figures.median(name, work, "cpu_us") for work in works]
        if any(median is not None for median in medians) and not server.slow_log:
            cells = " | ".join("" if median is None else f"{median:.0f}" for median in medians)
            lines.append(f"| {name} | {cells} |")
    return lines


def markdown(figures, judged, filesystem):
    """`filesystem` makes further lines of the notes that it is given."""
    notes = Notes()
    lines = [f"- {server.name}: {server.promise}" for server in figures.servers.values()]
    if judged:
        lines += ["", *targets_table(figures, judged, notes)]
    further = filesystem(notes)
    if further:
        lines += ["", *further]
    if notes.texts:
        lines += ["", "  \n".join(notes.lines())]
    lines += ["", *figures_table(figures), "", *cpu_table(figures)]
    return "\n".join(lines)
