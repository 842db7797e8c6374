"""The plots of the benchmarks, as drawn from the committed results."""

import json
import math
from pathlib import Path

import pytest

pytest.importorskip("jsonschema")
pytest.importorskip("matplotlib")

from benchmarks import plots, results
from benchmarks.names import HIDDEN, LOGITS, SCORING
from benchmarks.providers import OURS, PROVIDERS

ROOT = Path(__file__).parents[2]


def test_every_provider_has_a_style_in_the_plots():
    styles = plots.STYLES
    assert {name for providers in PROVIDERS.values() for name in providers} <= set(styles)
    # A variant of ours looks like ours, hollow.
    for name, style in styles.items():
        is_variant = OURS in name and name != OURS
        assert (style["markerfacecolor"] == "white") == is_variant
    looks = [(style["color"], style["marker"]) for style in styles.values()]
    assert len(set(looks) | {"a variant in black"}) == len(looks)


@pytest.fixture(scope="module")
def figures():
    """The plots of a committed file, which has every level."""
    return plots.draw(results.read(ROOT / "benchmarks/results/cpu.json"))


def test_ratios_are_drawn_around_1_a_row_a_shape(figures):
    rows = json.loads((ROOT / "benchmarks/results/cpu.json").read_text())["rows"]
    axes = figures["relative_time"].axes
    assert [axis.get_title("left") for axis in axes] == list(
        dict.fromkeys(r["level"] for r in rows)
    )
    for axis in axes:
        left, right = axis.get_xlim()
        assert axis.get_xscale() == "log" and math.isclose(left * right, 1)
        shapes = [label.get_text() for label in axis.get_yticklabels()]
        of_level = [row for row in rows if row["level"] == axis.get_title("left")]
        assert shapes == list(dict.fromkeys(r["shape"] for r in of_level if r["sweep"] != "live"))
    (logits,) = (axis for axis in axes if axis.get_title("left") == LOGITS)
    dots = [line for line in logits.lines if line.get_marker() == "o"]
    assert {float(x.get_xdata()[0]) for x in dots if x.get_markerfacecolor() != "white"} == {1.0}
    bars = [bar.get_segments()[0][:, 0] for bar in logits.collections]
    assert len(bars) == len(logits.lines) - 1  # beside the line at 1
    assert all(low < high for low, high in bars)


@pytest.mark.parametrize("kind", ["memory_against_tokens", "time_against_live"])
def test_other_axes_begin_at_0(figures, kind):
    for axis in figures[kind].axes:
        assert axis.get_xscale() == axis.get_yscale() == "linear"
        assert axis.get_ylim()[0] == 0 and axis.get_xlim()[0] <= 0
    levels = [axis.get_title() for axis in figures["memory_against_tokens"].axes]
    assert levels == [LOGITS, SCORING, HIDDEN]
