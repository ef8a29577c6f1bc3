"""How the plots of a report show the arms: colours, lines, order and labels."""

import re
from typing import NamedTuple

from diffusion_jax.ablation.results import ArmScores, Results

# The most letters per line, and lines, of a name beside a plot; the table has the whole names.
NAME_LETTERS = 20
NAME_LINES = 3

# The dash patterns, which the arms take in turn, in units of the line's width.
DASHES: tuple[tuple[float, ...], ...] = ((), (5, 1.8), (1.6, 1.4), (7, 1.6, 1.6, 1.6))
WIDTHS = {True: 3.2, False: 1.6}  # of a line, in points; True: of the reference arm

# Without a swept number: colours that the colour-blind can distinguish, contrast at least 3:1.
CATEGORIES = {
    "light": ("#0072b2", "#b85000", "#00826a", "#a8438a", "#7a6a00", "#3f3f9e"),
    "dark": ("#56b4e9", "#e69f00", "#1fc29a", "#e58fc6", "#e5dc4b", "#a5a5f5"),
}

# With a swept number: a range of the colour map "plasma", dark on white, bright on near-black.
SEQUENCE = {"light": (0.02, 0.63), "dark": (0.44, 0.97)}


class Style(NamedTuple):
    """How an arm is drawn in every plot."""

    light: str  # colour on a white page
    dark: str  # colour on a near-black page
    width: float
    dashes: tuple[float, ...]


def create_styles(results: Results) -> list[Style]:
    """Create a style for each arm; the reference arm is a thick line in the colour of the text."""
    others = [i for i, arm in enumerate(results.arms) if arm.name != results.reference]
    ordered = sorted(others, key=lambda i: _position(results, results.arms[i]))
    styles = [Style("currentColor", "currentColor", WIDTHS[True], ())] * len(results.arms)
    for rank, i in enumerate(ordered):
        share = rank / max(len(ordered) - 1, 1)
        light, dark = (_colour(results.swept is not None, theme, rank, share) for theme in SEQUENCE)
        styles[i] = Style(light, dark, WIDTHS[False], DASHES[rank % len(DASHES)])
    return styles


def _colour(is_swept: bool, theme: str, rank: int, share: float) -> str:
    if not is_swept:
        return CATEGORIES[theme][rank % len(CATEGORIES[theme])]
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    low, high = SEQUENCE[theme]
    return to_hex(colormaps["plasma"](low + share * (high - low)))


def swept_values(results: Results) -> list[float]:
    """The swept number of each arm, or its index if no number is swept."""
    return [_position(results, arm) for arm in results.arms]


def _position(results: Results, arm: ArmScores) -> float:
    if results.swept is None:
        return float(results.arms.index(arm))
    return float(arm.fields[results.swept])


def reference_index(results: Results) -> int:
    """The index of the reference arm."""
    return [arm.name for arm in results.arms].index(results.reference)


def reference_name(results: Results) -> str:
    """The name of the reference arm, or "the reference arm" if the name is long."""
    is_short = len(results.reference) <= NAME_LETTERS
    return results.reference if is_short else "the reference arm"


def arm_labels(results: Results) -> list[str]:
    """The label of each arm on an axis: its swept number, or its name in several lines."""
    if results.swept is not None:
        return [f"{value:g}" for value in swept_values(results)]
    names = [arm.name for arm in results.arms]
    # "name=cosine,s=0.008" for "schedule.name=cosine,schedule.s=0.008", if that stays unique.
    short = [re.sub(r"[\w.]*\.(?=[A-Za-z_]\w*=)", "", name) for name in names]
    return [_lines(name) for name in (short if len(set(short)) == len(names) else names)]


def _lines(name: str) -> str:
    """A name broken into lines, with an ellipsis where it is too long."""
    lines = [""]
    for part in re.findall(r"[^,]+,?|,", name):
        if lines[-1] and len(lines[-1]) + len(part.rstrip()) > NAME_LETTERS:
            lines.append("")
        lines[-1] += part if lines[-1] else part.lstrip()
    if len(lines) > NAME_LINES:
        lines = [*lines[: NAME_LINES - 1], lines[NAME_LINES - 1] + "…"]
    return "\n".join(
        line if len(line) <= NAME_LETTERS else line[: NAME_LETTERS - 1] + "…" for line in lines
    )
