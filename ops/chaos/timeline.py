"""A run as one HTML file that needs nothing else: faults, epochs, throughput, and every stream with its gaps."""

from __future__ import annotations

import html
import itertools
from collections.abc import Callable, Iterator, Sequence

from ops.bench.changes.gaps import Answer
from ops.chaos.figures import answers_of, resumed
from ops.chaos.history import History, Stream
from ops.chaos.run import Verdict

_WIDTH, _LEFT, _ROW = 1080, 150, 11
_GAP_S = 0.25
"""Longer ones are marked."""
_BIN_S = 0.25
_STYLE = """
body { margin: 24px auto; max-width: 1280px; font: 14px/1.5 system-ui, sans-serif; color: #1f2933; }
h2 { font-size: 16px; margin: 28px 0 4px; } .bad { color: #b2182b; } .good { color: #1a7f4b; }
svg { display: block; } text { font: 11px system-ui, sans-serif; fill: #4a5560; }
.stream { fill: #9cc3e6; } .gap { fill: #e08214; } .ended { fill: #b2182b; } .resume { fill: #542788; }
.away { fill: #e4e7eb; }
.fault { fill: #b2182b; opacity: .16; } .missed { fill: #999; opacity: .16; }
.epoch { stroke: #542788; stroke-dasharray: 3 3; }
.rate { fill: none; stroke: #2f6fb0; stroke-width: 1.5; } .axis { stroke: #c5ccd3; }
"""


def timeline(verdicts: Sequence[Verdict]) -> str:
    """The whole page."""
    body = "".join(part for verdict in verdicts for part in _section(verdict))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Faults and streams</title><style>{_STYLE}</style>'
        "<h1>Faults and streams</h1><p>Red bands are faults until their effect is over (grey: never struck), dashed "
        "lines are new epochs, the blue line is tokens per second. Each row is a stream, from the request to its end: "
        f"orange is a gap of more than {_GAP_S * 1e3:.0f} ms, a violet tick a client that resumed, grey before it a "
        f"user who was away by its own will, a red end a stream that did not finish. "
        f"Point at anything for its name.</p>{body}</html>\n"
    )


def _section(verdict: Verdict) -> Iterator[str]:
    history = verdict.history
    css, state = ("bad", "violated") if verdict.violations else ("good", "every promise kept")
    yield f'<h2>{html.escape(history.name)}: <span class="{css}">{state}</span></h2>'
    if verdict.violations:
        yield "<ul>" + "".join(f'<li class="bad">{html.escape(str(v))}' for v in verdict.violations) + "</ul>"
    yield f"<p>{len(history.streams)} streams, {resumed(history.streams)}</p>"
    yield from _drawing(history)


def _drawing(history: History) -> Iterator[str]:
    streams = sorted(history.streams, key=lambda stream: stream.sent_s)
    end_s = max([history.end_s, *(fault.until_s for fault in history.faults if fault.fired)])
    scale = _WIDTH / max(end_s - history.begin_s, 1e-9)
    top, curve = 16 + 13 * len(history.faults), 60
    height = top + curve + 14 + _ROW * len(streams) + 18

    def x(at_s: float) -> float:
        return round(_LEFT + (min(max(at_s, history.begin_s), end_s) - history.begin_s) * scale, 1)

    yield f'<svg width="{_LEFT + _WIDTH + 10}" height="{height}">'
    for number, fault in enumerate(history.faults):
        css = "fault" if fault.fired else "missed"
        name = f"{fault.what} {fault.note}".strip()
        yield _rect(css, x(fault.at_s), x(fault.until_s), 4, height - 22, name)
        yield f'<text x="{x(fault.at_s) + 3}" y="{14 + 13 * number}">{html.escape(name)}</text>'
    for earlier, later in itertools.pairwise(history.samples):
        if later.epoch != earlier.epoch:
            at = x(later.at_s)
            yield f'<line class="epoch" x1="{at}" x2="{at}" y1="4" y2="{height - 18}">'
            yield f"<title>epoch {later.epoch}</title></line>"
    yield _curve(history, x(history.begin_s), scale, top, curve)
    for row, stream in enumerate(streams):
        yield from _row(stream, x, top + curve + 14 + _ROW * row, end_s)
    step_s = max(1, round((end_s - history.begin_s) / 10))
    for second in range(0, int(end_s - history.begin_s) + 1, step_s):
        at = x(history.begin_s + second)
        yield f'<line class="axis" x1="{at}" x2="{at}" y1="{height - 18}" y2="{height - 12}"/>'
        yield f'<text x="{at - 4}" y="{height - 2}">{second} s</text>'
    yield "</svg>"


def _curve(history: History, left: float, scale: float, top: int, height: int) -> str:
    times_s = [at_s for answer in answers_of(history.streams) for at_s in answer.times_s]
    bins = [0] * (int((history.end_s - history.begin_s) / _BIN_S) + 1)
    for at_s in times_s:
        bins[min(len(bins) - 1, max(0, int((at_s - history.begin_s) / _BIN_S)))] += 1
    most = max(max(bins), 1)
    points = " ".join(
        f"{left + (number + 0.5) * _BIN_S * scale:.1f},{top + height - count / most * height:.1f}"
        for number, count in enumerate(bins)
    )
    label = f'<text x="4" y="{top + 10}">{most / _BIN_S:.0f} tokens/s</text>'
    return f'{label}<polyline class="rate" points="{points}"/>'


def _row(stream: Stream, x: Callable[[float], float], y: int, end_s: float) -> Iterator[str]:
    ended_s, status = stream.endings[0] if stream.endings else (end_s, "no end")
    name = f"{stream.request_id} {stream.question.name}: {status}, {stream.resumes} resumed"
    yield f'<text x="4" y="{y + 8}">{html.escape(stream.question.name)}</text>'
    yield _rect("stream", x(stream.sent_s), x(ended_s), y, 8, name)
    waited = Answer(
        sent_s=stream.sent_s, times_s=[stream.sent_s, *(d.at_s for d in stream.deltas)], away_s=stream.away_s
    )
    for earlier, later in waited.gaps():
        if later - earlier > _GAP_S:
            yield _rect("gap", x(earlier), x(later), y, 8, f"{(later - earlier) * 1e3:.0f} ms")
    for left_s, back_s in stream.away_s:
        yield _rect("away", x(left_s), x(back_s), y, 8, f"away for {(back_s - left_s) * 1e3:.0f} ms")
    for at_s in stream.calls_s[1:]:
        yield _rect("resume", x(at_s), x(at_s), y - 1, 10, "resumed")
    if status != "OK":
        yield _rect("ended", x(ended_s), x(ended_s), y - 1, 10, name)


def _rect(css: str, begin: float, end: float, y: int, height: int, title: str) -> str:
    size = f'x="{begin}" y="{y}" width="{max(2.0, end - begin):.1f}" height="{height}"'
    return f'<rect class="{css}" {size}><title>{html.escape(title)}</title></rect>'
