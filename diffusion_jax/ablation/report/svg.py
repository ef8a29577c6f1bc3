"""Turn matplotlib plots into SVG elements with the colours, fonts and width of the page."""

import io
import re
import warnings
from collections.abc import Callable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# In units of the SVG; a unit is about 0.85 pixels on a phone, where letters must stay legible.
WIDTH, HEIGHT = 390, 270
FONT_POINTS = 11
LETTER_WIDTH = 0.62  # the mean width of a letter, as a share of its height
POINTS_PER_INCH = 72

# matplotlib cannot use CSS variables: ``_tidy`` replaces these colours by those of the page.
TEXT, GRID, SURFACE = "#010203", "#040506", "#070809"
PAGE_COLOURS = {TEXT: "currentColor", GRID: "var(--grid)", SURFACE: "var(--surface)"}

SETTINGS: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "text.parse_math": False,  # an arm's name may have a dollar sign
    "font.family": "DejaVu Sans",
    "font.size": FONT_POINTS,
    "axes.labelsize": FONT_POINTS,
    "axes.facecolor": "none",
    "axes.edgecolor": TEXT,
    "axes.linewidth": 0.7,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.unicode_minus": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "xtick.labelsize": FONT_POINTS - 1,
    "ytick.labelsize": FONT_POINTS - 1,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def colour_of_arm(index: int) -> str:
    """A placeholder for the colour of an arm; ``_tidy`` replaces it by the colour on the page."""
    return f"#0b{index // 256:02x}{index % 256:02x}"


def tag_with_arm(artists: "Sequence[Artist]", index: int) -> None:
    """Tag artists with their arm, so that the legend of the page can highlight them."""
    for artist in artists:
        artist.set_gid(f"arm:{index}")


def create_svg(
    name: str, text: str, draw: Callable[..., None], *, height: int = HEIGHT, columns: int = 1
) -> str:
    """Create an SVG element with axes in ``columns`` columns, on which ``draw`` draws.

    ``name`` is the prefix of all ids in the element. ``text`` describes it to a screen reader.
    """
    # Imported here, because matplotlib takes half a second to import.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    file = io.StringIO()
    with rc_context(SETTINGS | {"svg.hashsalt": name}), warnings.catch_warnings():
        # DejaVu Sans lacks the glyphs of some names; the browser draws them with other fonts.
        warnings.filterwarnings("ignore", message="Glyph")
        size = WIDTH / POINTS_PER_INCH, height / POINTS_PER_INCH
        figure = Figure(figsize=size)
        figure.patch.set_visible(False)
        axes = figure.subplots(1, columns, squeeze=False).ravel()
        draw(*axes)
        _set_margins(figure, list(axes), height)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return _tidy(file.getvalue(), name, text, height)


def _set_margins(figure: "Figure", axes: "Sequence[Axes]", height: int) -> None:
    """Leave room for the labels by counting their letters, because measuring text is slow."""

    def longest(axis: "Axis") -> float:
        ticks = axis.get_major_formatter().format_ticks(list(axis.get_majorticklocs()))
        return (
            LETTER_WIDTH
            * (FONT_POINTS - 1)
            * max((len(line) for tick in ticks for line in tick.split("\n")), default=0)
        )

    line = 1.5 * FONT_POINTS
    left = 10 + longest(axes[0].yaxis) + line * bool(axes[0].get_ylabel())
    is_slanted = any(tick.get_rotation() for tick in axes[0].get_xticklabels())
    below = 0.75 * longest(axes[0].xaxis) if is_slanted else FONT_POINTS
    bottom = 8 + below + line * bool(axes[0].get_xlabel())
    top = 6 + line * bool(axes[0].get_title())
    figure.subplots_adjust(left / WIDTH, bottom / height, 1 - 12 / WIDTH, 1 - top / height, 0.1)


def _tidy(svg: str, name: str, text: str, height: int) -> str:
    """Turn the SVG file of matplotlib into an element of the page, which is half as long."""
    body = svg[svg.index("<defs>") : svg.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", body, flags=re.DOTALL)
    # A <style> would apply to the whole page; the root element has its settings as attributes.
    body = re.sub(r"<style.*?</style>", "", body, flags=re.DOTALL)

    # Every file has the same ids: prefix those that are referenced, and remove the others.
    body = re.sub(r' id="arm:(\d+)"', r' data-arm="\1"', body)
    pairs = re.findall(r"#([\w-]+)\"|url\(#([\w-]+)\)", body)
    referenced = {identifier for pair in pairs for identifier in pair if identifier}
    body = re.sub(
        r' id="([^"]*)"',
        lambda match: f' id="{name}-{match[1]}"' if match[1] in referenced else "",
        body,
    )
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)

    for sentinel, colour in PAGE_COLOURS.items():
        body = body.replace(sentinel, colour)
    body = re.sub(r"#0b([0-9a-f]{4})", lambda match: f"var(--arm-{int(match[1], 16)})", body)
    body = body.replace("'DejaVu Sans'", "var(--sans, sans-serif)")
    body = re.sub(r'\b(d|x|y|transform|width|height)="([^"]*)"', _rounded, body)
    # Only the L of the bound, as in L_0 and L_{T-1}, gets subscripts.
    body = re.sub(r"\bL_(?:\{([^}<]*)\}|(\w))", _subscript, body)
    body = re.sub(r">\s+<", "><", body).strip()
    return (
        f'<svg role="img" aria-label="{escape(text)}" viewBox="0 0 {WIDTH} {height:g}"'
        f' stroke-linejoin="round" stroke-linecap="butt">{body}</svg>'
    )


def _rounded(match: re.Match) -> str:
    """An attribute with its numbers rounded to two decimals."""

    def shorter(number: re.Match) -> str:
        return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")

    values = re.sub(r"-?\d+\.\d+(?:e-?\d+)?", shorter, " ".join(match[2].split()))
    return f'{match[1]}="{values}"'


def _subscript(match: re.Match) -> str:
    below = (match[1] or match[2]).replace("-", "−")
    return f'L<tspan dy="0.25em" font-size="75%">{below}</tspan><tspan dy="-0.19em">\u200b</tspan>'
