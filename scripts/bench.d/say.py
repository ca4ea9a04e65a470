"""What the bench tells people while it runs: to standard error, so that standard output is the report alone."""

import sys
import time


def say(text):
    print(f"bench: {text}", file=sys.stderr, flush=True)


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


class Progress:
    """Counts runs, and tells from those that are done how long the others will take."""

    def __init__(self, runs, expected_s):
        self.runs, self.done, self.expected_s = runs, 0, expected_s
        self.start = time.monotonic()

    def step(self, text):
        self.done += 1
        passed = time.monotonic() - self.start
        # What was expected at first counts for as much as a few runs.
        per_run = (passed + 3 * self.expected_s / self.runs) / (self.done + 3)
        left = duration(per_run * (self.runs - self.done))
        say(f"{self.done:3}/{self.runs}, {left} left  {text}")
