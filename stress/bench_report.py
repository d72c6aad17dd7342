"""Turns the figures of bench.py into docs/performance.md's tables and plot."""

import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "performance.md"
PLOT = DOCUMENT.parent / "queue-depth.svg"
BEGIN, END = "<!-- measured: begin -->\n", "<!-- measured: end -->\n"
COLOURS = {"ours": "#2563eb", "peer1": "#d97706", "peer2": "#b91c1c"}
NAMES = {
    "ours": "this system",
    "ours_limited": "this system, address limit on",
    "peer1": "Express, 1 process",
    "peer2": "Express, 2 processes",
    "go": "Go, fsync, nothing stored",
    "go_weak": "Go, no fsync, nothing stored",
}


def spread(rounds: list[dict], figure: Callable[[dict], float], form: str = "{:,.0f}") -> str:
    """Return median (minimum to maximum) over the rounds."""
    values = [figure(results) for results in rounds]
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def ratio(rounds: list[dict], figure: Callable[[dict], float], others: list[str]) -> str:
    """Return our figure over the best of the others', round by round."""
    return spread(
        rounds,
        lambda r: figure(r["ours"]) / max(figure(r[name]) for name in others),
        "{:.2f}",
    )


def tables(
    rounds: list[dict],
    single: dict,
    growth: dict | None,
    claims: dict[str, dict[int, dict]],
    seconds: float,
) -> str:
    systems = [name for name in NAMES if name in rounds[0]]
    # The best of each kind: with and without Node.js, the Go peer with the same fsync as ours.
    kinds = {"Express": ["peer1", "peer2"], "Go, fsync": ["go"]}
    kinds = {kind: names for kind, names in kinds.items() if names[0] in rounds[0]}
    lines = [
        f"Measured on {time.strftime('%Y-%m-%d')} by `make bench`: {len(rounds)} rounds of "
        f"{seconds:g} s, {os.cpu_count()} cores shared by load, web, Redis, PostgreSQL and worker, "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}. "
        "Median (minimum to maximum).",
        "",
    ]

    def table(head: list[str], rows: list[list[str]]) -> None:
        lines.append("| " + " | ".join(head) + " |")
        lines.append("|---" * len(head) + "|")
        lines.extend("| " + " | ".join(row) + " |" for row in rows)
        lines.append("")

    figures: list[tuple[str, Callable[[dict], float], str]] = [
        ("accepted purchases/s", lambda r: r["rate"], "{:,.0f}"),
        ("the same, 256 connections", lambda r: r["many"]["rate"], "{:,.0f}"),
        ("orders/s until the last is stored", lambda r: r["persisted_rate"], "{:,.0f}"),
        ("refused/s, sold out", lambda r: r["sold_out"]["rate"], "{:,.0f}"),
        ("refused/s, rate-limited", lambda r: r["limited"]["rate"], "{:,.0f}"),
    ]
    table(
        ["", *(NAMES[name] for name in systems), *(f"ratio to {kind}" for kind in kinds)],
        [
            [
                name,
                *(spread(rounds, lambda r, s=s, f=figure: f(r[s]), form) for s in systems),
                *(ratio(rounds, figure, names) for names in kinds.values()),
            ]
            for name, figure, form in figures
        ]
        + [
            [
                name,
                *(spread(rounds, lambda r, s=s, f=figure: f(r[s]), form) for s in systems),
                *("" for _ in kinds),
            ]
            for name, figure, form in (
                ("median latency, ms", lambda r: r["p50_us"] / 1000, "{:.1f}"),
                ("p99 latency, ms", lambda r: r["p99_us"] / 1000, "{:.1f}"),
                ("the same, 256 connections", lambda r: r["many"]["p99_us"] / 1000, "{:.1f}"),
                ("deepest queue, orders", lambda r: r["deepest"], "{:,.0f}"),
                ("drained after the last answer, s", lambda r: r["drained_after"], "{:.1f}"),
            )
        ],
    )
    lines.append("CPU time per accepted purchase, µs:\n")
    roles = ("web", "redis", "worker", "postgres")
    table(
        ["", *roles, "together"],
        [
            [
                NAMES[name],
                *(
                    spread(rounds, lambda r, n=name, role=role: r[n]["cpu"].get(role, 0))
                    for role in roles
                ),
                spread(rounds, lambda r, n=name: sum(r[n]["cpu"].values())),
            ]
            for name in systems
        ],
    )
    lines.append("CPU time per sold-out refusal, µs:\n")
    table(
        ["", "web", "redis"],
        [
            [
                NAMES[name],
                *(
                    spread(
                        rounds, lambda r, n=name, role=role: r[n]["sold_out"]["cpu"].get(role, 0)
                    )
                    for role in ("web", "redis")
                ),
            ]
            for name in systems
        ],
    )
    ceiling = spread(rounds, lambda r: r["noop"]["rate"])
    share = spread(rounds, lambda r: r["ours"]["rate"] / r["noop"]["rate"], "{:.2f}")
    table(
        ["", ""],
        [
            ["Granian with a no-op application, requests/s (the ceiling)", ceiling],
            ["accepted purchases against that", share],
            [
                "queue depth at its deepest, in seconds of claims",
                spread(rounds, lambda r: r["ours"]["deepest"] / r["ours"]["rate"], "{:.2f}"),
            ],
            ["one client on an idle server, median ms", f"{single['idle']['p50_us'] / 1000:.2f}"],
            ["one client on an idle server, p99 ms", f"{single['idle']['p99_us'] / 1000:.2f}"],
            ["1,000 connections, p99 ms", f"{single['crowd']['p99_us'] / 1000:.0f}"],
            [
                "accepted purchases with 20 open dashboards (50 products) against none, 5 pairs",
                spread(single["dashboards"], lambda pair: pair["ratio"], "{:.2f}"),
            ],
            [
                "p99 latency without them, ms",
                spread(single["dashboards"], lambda pair: pair["p99_alone_us"] / 1000, "{:.1f}"),
            ],
            [
                "p99 latency with them, ms",
                spread(single["dashboards"], lambda pair: pair["p99_beside_us"] / 1000, "{:.1f}"),
            ],
            [
                "one poll of a dashboard meanwhile, median ms",
                spread(single["dashboards"], lambda pair: pair["poll_us"] / 1000, "{:.1f}"),
            ],
            [
                f"drain of a backlog of {single['backlog']['orders']:,} by one worker, orders/s",
                f"{single['backlog']['rate']:,.0f}",
            ],
        ],
    )
    lines.append(
        "A claim's CPU time in Redis, µs, by how many are in one batch, user and address limits on "
        "(`python stress/bench_claim.py` alone):\n"
    )
    for fsync, rows in claims.items():
        largest = rows[max(rows)]
        table(
            [f"appendfsync {fsync}", *map(str, rows), "bytes that the sale then holds for each"],
            [
                [
                    name,
                    *(f"{figures[name][0]:.0f}" for figures in rows.values()),
                    f"{largest[name][1]:.0f}" if "accepted" in name else "",
                ]
                for name in largest
            ],
        )
    if growth:
        lines.append("What a million orders change:\n")
        table(
            ["", "1,000 orders", "1,000,000 orders", "ratio"],
            [
                [name, f"{small:.2f}", f"{large:.2f}", f"{large / small:.2f}"]
                for name, (small, large) in growth["pairs"].items()
            ]
            + [
                [
                    "all web processes killed: until the first answer of their successors, s",
                    "",
                    f"{growth['start_seconds']:.2f}",
                    "",
                ]
            ],
        )
    lines.append("Orders that wait while a sale runs at full speed, and after it:\n")
    lines.append("![Queue depth over time](queue-depth.svg)\n")
    return "\n".join(lines)


def plot(rounds: list[dict]) -> str:
    """Return the queue depth of the first round as an SVG: one line for each system."""
    series = {name: rounds[0][name]["depths"] for name in COLOURS if name in rounds[0]}
    width, height, left, bottom = 720, 320, 60, 40
    last = max(moment for points in series.values() for moment, _ in points)
    most = max(1, *(depth for points in series.values() for _, depth in points))

    def x(moment: float) -> float:
        return left + moment / last * (width - left - 20)

    def y(depth: float) -> float:
        return height - bottom - depth / most * (height - bottom - 30)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<path d="M{left} 20V{height - bottom}H{width - 20}" fill="none" stroke="#444"/>',
    ]
    for part in range(5):
        depth, moment = most * part / 4, last * part / 4
        parts.append(
            f'<text x="{left - 6}" y="{y(depth) + 4:.0f}" text-anchor="end">{depth:,.0f}</text>'
        )
        place = f'x="{x(moment):.0f}" y="{height - 20}" text-anchor="middle"'
        parts.append(f"<text {place}>{moment:.0f} s</text>")
    for number, (name, points) in enumerate(series.items()):
        line = " ".join(f"{x(moment):.1f},{y(depth):.1f}" for moment, depth in points)
        colour = COLOURS[name]
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + 12}" y="{36 + 16 * number}" fill="{colour}">{NAMES[name]}</text>'
        )
    return "\n".join([*parts, "</svg>\n"])


def write_report(
    rounds: list[dict],
    single: dict,
    growth: dict | None,
    claims: dict[str, dict[int, dict]],
    seconds: float,
) -> None:
    """Put the figures between the marks of docs/performance.md, and draw the plot."""
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(
        before + BEGIN + tables(rounds, single, growth, claims, seconds) + END + after
    )
    PLOT.write_text(plot(rounds))
    print(f"written to {DOCUMENT}")
