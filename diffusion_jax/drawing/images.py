"""Pictures of images: grids, labelled rows, animations, points in the plane."""

import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# Thin lines between the images of a grid: mid-grey shows on black digits and on white plots.
SEPARATOR_PIXELS = 2
SEPARATOR_GREY = 128

# An image smaller than this many pixels is enlarged in a grid.
COMFORTABLE_PIXELS = 64

# Letters beside the images of a labelled grid, and the white space around them.
TEXT_PIXELS = 18
TEXT_MARGIN_PIXELS = 8

# How long an animation rests on its last frame before it starts again.
LAST_FRAME_MILLISECONDS = 1500
BLUE, RED, GREY = (31, 73, 135), (192, 57, 43), (190, 190, 190)


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Lay images out in rows, left to right and top to bottom, as one picture.

    Args:
        images: grey (c = 1) or colour (c = 3), 0..255.
        columns: images per row; None: as square a picture as possible.
        scale: whole factor of enlargement, by repeating pixels; None: as much as makes one
            image comfortable to look at.

    Raises:
        ValueError: there is no image, or c is neither 1 nor 3.
    """
    num_images, height, width, channels = images.shape
    if num_images == 0:
        raise ValueError("images: must hold at least one")
    if channels not in (1, 3):
        raise ValueError(f"images: {channels} channels; must be 1 (grey) or 3 (colour)")
    if columns is None:
        columns = _columns(num_images, height, width)
    if scale is None:
        scale = -(-COMFORTABLE_PIXELS // max(height, width))  # rounded up
    rows = -(-num_images // columns)

    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    down, across = height * scale + SEPARATOR_PIXELS, width * scale + SEPARATOR_PIXELS
    canvas = np.full((rows * down, columns * across, channels), SEPARATOR_GREY, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * down, i % columns * across
        canvas[y : y + height * scale, x : x + width * scale] = image
    # Separators lie between the images, not around them.
    canvas = canvas[:-SEPARATOR_PIXELS, :-SEPARATOR_PIXELS]
    return Image.fromarray(canvas[..., 0] if channels == 1 else canvas)


def _columns(num_images: int, height: int, width: int) -> int:
    def cost(columns: int) -> tuple[int, int, int]:
        rows = -(-num_images // columns)
        # The longer side, then the empty places; of equals the wide one, as screens are.
        return max(rows * height, columns * width), rows * columns, -columns

    return min(range(1, num_images + 1), key=cost)


def labelled_grid(rows: list[UInt8[np.ndarray, "_ h w _"]], labels: list[str]) -> Image.Image:
    """Lay images out as one row per label, its text on the left, as one picture.

    Within a row the images are those of image_grid: enlargement, separators. Where a row is
    shorter than the longest, nothing but the colour of the separators is drawn.

    Args:
        rows: images of one size, 0..255; some rows may be grey (1 channel) and others colour (3).
        labels: one for each row; may have several lines.

    Raises:
        ValueError: there is no row, other than one label for each, or a row that image_grid
            refuses.
    """
    if len(rows) == 0:
        raise ValueError("rows: must hold at least one")
    if len(rows) != len(labels):
        raise ValueError(f"labels: {len(labels)} of them; must be one for each of {len(rows)} rows")
    grids = [image_grid(row, columns=len(row) or None) for row in rows]
    texts = [_draw_text(label) for label in labels]
    left = max(text.width for text in texts)
    heights = [max(grid.height, text.height) for grid, text in zip(grids, texts)]
    width = left + max(grid.width for grid in grids)
    height = sum(heights) + SEPARATOR_PIXELS * (len(rows) - 1)
    mode = max(grid.mode for grid in grids)  # "RGB" unless all are grey, "L"
    canvas = Image.new("L", (width, height), SEPARATOR_GREY).convert(mode)
    canvas.paste("white", (0, 0, left, canvas.height))
    top = 0
    for grid, text, room in zip(grids, texts, heights):
        canvas.paste(text, (0, top + (room - text.height) // 2))
        canvas.paste(grid, (left, top))
        top += room + SEPARATOR_PIXELS
    return canvas


def _draw_text(text: str) -> Image.Image:
    """Black on white, as large as the text and its margins."""
    font = ImageFont.load_default(TEXT_PIXELS)
    measure = ImageDraw.Draw(Image.new("L", (1, 1)))
    start = (TEXT_MARGIN_PIXELS, TEXT_MARGIN_PIXELS // 2)
    _, _, right, bottom = measure.multiline_textbbox(start, text, font)
    size = np.ceil([right + TEXT_MARGIN_PIXELS, bottom + TEXT_MARGIN_PIXELS // 2]).astype(int)
    picture = Image.new("L", tuple(size), "white")
    ImageDraw.Draw(picture).multiline_text(start, text, "black", font)
    return picture


def save_animation(
    frames: UInt8[np.ndarray, "f n h w c"], path: str | Path, milliseconds: int
) -> None:
    """Save a grid per frame as an endless GIF (.gif) or animated PNG (.png, .apng).

    PNG keeps every colour; GIF reduces colour frames to 256 colours, grey ones are exact. Both
    store equal neighbours as one frame that is shown for the sum of their times.

    Args:
        frames: the same n images at each of f moments.
        path: its suffix chooses the format.
        milliseconds: how long a frame is shown (a GIF counts in steps of 10); the last one
            stays for LAST_FRAME_MILLISECONDS.

    Raises:
        ValueError: another suffix, or no frames.
    """
    _save_frames([image_grid(frame) for frame in frames], path, milliseconds)


def save_labelled_animation(
    animations: dict[str, UInt8[np.ndarray, "_ _ h w _"]],
    titles: list[str],
    path: str | Path,
    milliseconds: int,
) -> None:
    """Save several animations below each other, one row of images each, as one.

    Args:
        animations: by the label of their row, f frames each, of as many images as they like.
        titles: the line above each frame, such as its timestep.
        path: as save_animation has it, and so are the times and what is kept of colours.
        milliseconds: how long a frame is shown, but for the last.

    Raises:
        ValueError: another suffix, no frames, animations of other lengths than the titles, or
            what labelled_grid refuses.
    """
    if len(animations) == 0:
        raise ValueError("animations: must hold at least one")
    for label, frames in animations.items():
        if len(frames) != len(titles):
            raise ValueError(
                f"animations[{label!r}]: {len(frames)} frames; must be one for each of the"
                f" {len(titles)} titles"
            )
    rows = [list(moment) for moment in zip(*animations.values())]
    grids = [labelled_grid(row, list(animations)) for row in rows]
    headings = [_draw_text(title) for title in titles]
    # frames of one animation are of one size, and nothing in them moves but the images
    width = max((picture.width for picture in grids + headings), default=0)
    top = max((heading.height for heading in headings), default=0)
    pictures = []
    for heading, grid in zip(headings, grids):
        frame = Image.new(grid.mode, (width, top + grid.height), "white")
        frame.paste(heading, (0, 0))
        frame.paste(grid, (0, top))
        pictures.append(frame)
    _save_frames(pictures, path, milliseconds)


def _save_frames(frames: list[Image.Image], path: str | Path, milliseconds: int) -> None:
    formats = {".gif": "GIF", ".png": "PNG", ".apng": "PNG"}
    suffix = Path(path).suffix
    if suffix not in formats:
        raise ValueError(f"path = {str(path)!r}: must end in {', '.join(formats)}")
    if len(frames) == 0:
        raise ValueError("frames: must hold at least one")
    first, *others = frames
    first.save(
        path,
        format=formats[suffix],
        save_all=True,
        append_images=others,
        duration=[milliseconds] * len(others) + [LAST_FRAME_MILLISECONDS],
        loop=0,  # for ever
    )


def draw_points(
    x: Float[np.ndarray, "n 2"],
    limit: float,
    size: int = 256,
    reference: Float[np.ndarray, "m 2"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Draw 2-D points (blue) over reference points (grey) on [-limit, limit]^2, y upwards.

    An image like any other: image_grid and save_animation take it. Points outside are not drawn.
    """
    picture = np.full((size, size, 3), 255.0)
    middle = size // 2
    picture[middle, :] = picture[:, middle] = 225.0  # the axes through 0
    layers = [(x, BLUE)] if reference is None else [(reference, GREY), (x, BLUE)]
    for points, colour in layers:
        # Rows of the picture run downwards: minus y, then x.
        inside = points[(np.abs(points) <= limit).all(axis=1)]
        counts, _, _ = np.histogram2d(
            -inside[:, 1], inside[:, 0], bins=size, range=[(-limit, limit)] * 2
        )
        # A point is a dot of 3 x 3 pixels; dots that lie on each other grow darker.
        padded = np.pad(counts, 1)
        dots = np.zeros_like(counts)
        for i, j in itertools.product(range(3), range(3)):
            dots += padded[i : i + size, j : j + size]
        opacity = 1 - 0.4 ** dots[..., None]
        picture = (1 - opacity) * picture + opacity * np.array(colour)
    return picture.round().astype(np.uint8)
