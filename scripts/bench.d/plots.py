"""Bars and curves as SVG, written by hand: a figure is a list of lines of text, and nothing is drawn that was not given."""

import math
from xml.sax.saxutils import escape

COLOURS = ["#2a6fb0", "#d9822b", "#3f9142", "#b03a5b", "#7357a8", "#7a7a7a", "#159a9c"]


class Drawing:
    def __init__(self, width, height, title, below):
        self.width, self.height = width, height
        self.parts = []
        self.text(12, 22, title, size=15, weight="bold")
        self.text(12, 40, below, colour="#555")

    def text(self, x, y, text, anchor="start", size=11, colour="#111", weight="normal"):
        self.parts.append(f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{colour}" '
                          f'font-weight="{weight}">{escape(str(text))}</text>')

    def line(self, x1, y1, x2, y2, colour="#ddd", width=1):
        self.parts.append(f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" '
                          f'stroke-width="{width}"/>')

    def bar(self, x, y, width, height, colour):
        self.parts.append(f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height:.1f}" '
                          f'fill="{colour}"/>')

    def curve(self, points, colour):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]

    def save(self, path):
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{self.width}" height="{self.height}" '
            f'viewBox="0 0 {self.width} {self.height}" font-family="sans-serif">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(self.parts) + "\n</svg>\n")


class Scale:
    """Values to places on a line, by their logarithm or from 0 on."""

    def __init__(self, values, start, end, logarithmic, rounded=True):
        self.start, self.end, self.logarithmic = start, end, logarithmic
        if logarithmic and not rounded:
            self.low, self.high = min(values), max(max(values), min(values) * 2)
        elif logarithmic:
            self.low = 2 ** math.floor(math.log2(min(values)))
            self.high = max(2 ** math.ceil(math.log2(max(values))), self.low * 2)
        else:
            self.low, self.high = 0, nice(max(values) or 1)

    def place(self, value):
        if self.logarithmic:
            share = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low)
        else:
            share = value / self.high
        return self.start + share * (self.end - self.start)

    def ticks(self):
        if not self.logarithmic:
            return [self.high * part / 4 for part in range(5)]
        steps = round(math.log2(self.high / self.low))
        return [self.low * 2 ** step for step in range(0, steps + 1, max(1, math.ceil(steps / 8)))]


def nice(value):
    """The next number above that divides into four well."""
    power = 10 ** math.floor(math.log10(value))
    return next(power * factor for factor in (1, 1.2, 1.6, 2, 3, 4, 6, 8, 10) if power * factor >= value * 0.9999)


def short(value):
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if value >= factor:
            return f"{value / factor:.3g}{unit}"
    return f"{value:.3g}"


def ratio_bars(judged, below, path):
    """A bar for each ratio, on a logarithmic scale from 1; its target is a black mark."""
    height, left, right = 24, 440, 730
    drawing = Drawing(980, 86 + height * len(judged), "Ratios and targets", below)
    bounds = [entry["at_least"] or entry["at_most"] for entry in judged]
    stretches = [entry["stretch"] for entry in judged]
    values = [entry["ratio"] for entry in judged] + [value for value in bounds + stretches if value] + [0.25, 1, 16]
    scale = Scale(values, left, right, True)
    bottom = 64 + height * len(judged)
    for tick in scale.ticks():
        drawing.line(scale.place(tick), 56, scale.place(tick), bottom, "#888" if tick == 1 else "#e4e4e4")
        drawing.text(scale.place(tick), bottom + 14, f"{tick:g}", "middle", colour="#555")
    metrics = {"iops": "IOPS", "p50_us": "p50", "p99_us": "p99"}
    for number, (entry, bound) in enumerate(zip(judged, bounds)):
        y = 60 + height * number
        good = {"": "#7a7a7a", "MISSED": "#c0392b"}.get(entry["verdict"], "#3f9142")
        start, end = sorted((scale.place(1), scale.place(entry["ratio"])))
        drawing.text(12, y + 13, f"{entry['work']}, {metrics[entry['metric']]}: {entry['server']} / {entry['against']}")
        drawing.bar(start, y + 3, end - start, height - 9, good)
        for value, width in ((bound, 3), (entry["stretch"], 1)):
            if value:
                drawing.line(scale.place(value), y, scale.place(value), y + height - 3, "black", width)
        drawing.text(right + 12, y + 13, f"{entry['ratio']:.2f}x  {entry['bound']} {entry['verdict']}")
    drawing.save(path)


def value_bars(title, below, groups, path):
    """`groups` are (name, [(label, value)]): bars from 0 on, one scale for all."""
    height, left, right = 20, 230, 820
    rows = sum(len(bars) + 1 for _, bars in groups)
    drawing = Drawing(920, 60 + height * rows, title, below)
    scale = Scale([value for _, bars in groups for _, value in bars], left, right, False)
    labels = list(dict.fromkeys(label for _, bars in groups for label, _ in bars))
    y = 52
    for name, bars in groups:
        drawing.text(12, y + 15, name, weight="bold")
        y += height
        for label, value in bars:
            drawing.text(left - 8, y + 13, label, "end")
            drawing.bar(left, y + 2, scale.place(value) - left, height - 5, COLOURS[labels.index(label) % len(COLOURS)])
            drawing.text(scale.place(value) + 6, y + 13, short(value), colour="#555")
            y += height
    drawing.save(path)


def curves(title, below, x_name, y_name, lines, path, x_text=str, log_y=False):
    """`lines` are {name: [(x, y)]}. The x axis is logarithmic."""
    width, height, left, top = 760, 420, 76, 66
    right, bottom = width - 190, height - 50
    drawing = Drawing(width, height, title, below)
    xs = sorted({x for points in lines.values() for x, _ in points})
    across = Scale(xs, left, right, True, rounded=False)
    up = Scale([y for points in lines.values() for _, y in points], bottom, top, log_y)
    for tick in up.ticks():
        drawing.line(left, up.place(tick), right, up.place(tick))
        drawing.text(left - 6, up.place(tick) + 4, short(tick), "end", colour="#555")
    for x in xs:
        drawing.line(across.place(x), top, across.place(x), bottom, "#eee")
        drawing.text(across.place(x), bottom + 16, x_text(x), "middle", colour="#555")
    drawing.text((left + right) / 2, bottom + 36, x_name, "middle")
    drawing.text(left, top - 8, y_name)
    for number, (name, points) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        drawing.curve([(across.place(x), up.place(y)) for x, y in points], colour)
        drawing.bar(right + 16, top + 20 * number, 12, 12, colour)
        drawing.text(right + 34, top + 10 + 20 * number, name)
    drawing.save(path)
