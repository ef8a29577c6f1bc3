"""Pictures of samples: grids of images, labelled rows, animations, points in the plane."""

import itertools
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

# Lines between the images of a grid. Mid-grey is visible beside black and white backgrounds.
SEPARATOR_PIXELS = 2
SEPARATOR_GREY = 128

# Smaller images are enlarged to at least this many pixels, on the longer side.
COMFORTABLE_PIXELS = 64

# Height of the labels' text, and the white margin around it.
TEXT_PIXELS = 18
TEXT_MARGIN_PIXELS = 8

# An animation shows its last frame for this long.
LAST_FRAME_MILLISECONDS = 1500
BLUE, RED, GREY = (31, 73, 135), (192, 57, 43), (190, 190, 190)


def image_grid(
    images: UInt8[np.ndarray, "n h w c"], columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Draw images as a grid, row by row from the top left.

    Args:
        images: grey (c = 1) or colour (c = 3), 0..255.
        columns: images per row; None: the most square picture.
        scale: integer factor of enlargement, by repeating pixels; None: images get at least
            COMFORTABLE_PIXELS on their longer side.

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
        # The longer side first, then the empty places; of equal grids the widest, for wide screens.
        return max(rows * height, columns * width), rows * columns, -columns

    return min(range(1, num_images + 1), key=cost)


def labelled_grid(rows: list[UInt8[np.ndarray, "_ h w _"]], labels: list[str]) -> Image.Image:
    """Draw one row of images per label, with the text of the label on the left.

    Each row is drawn by image_grid. The rest of a shorter row has the colour of the separators.

    Args:
        rows: images of one size, 0..255; some rows may be grey (1 channel) and others colour (3).
        labels: one for each row; a label may have several lines.

    Raises:
        ValueError: there is no row, the numbers of rows and labels differ, or image_grid refuses a
            row.
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
    mode = max(grid.mode for grid in grids)  # "RGB", or "L" if all rows are grey
    canvas = Image.new("L", (width, height), SEPARATOR_GREY).convert(mode)
    canvas.paste("white", (0, 0, left, canvas.height))
    top = 0
    for grid, text, room in zip(grids, texts, heights):
        canvas.paste(text, (0, top + (room - text.height) // 2))
        canvas.paste(grid, (left, top))
        top += room + SEPARATOR_PIXELS
    return canvas


def _draw_text(text: str) -> Image.Image:
    """Draw a text in black on white, in a picture of the size of the text and its margins."""
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
    """Save one grid per frame as an endless GIF (.gif) or animated PNG (.png, .apng).

    PNG keeps every colour. GIF reduces colour frames to 256 colours; grey frames are exact. Both
    merge equal consecutive frames into one frame, which is shown for their total time.

    Args:
        frames: f frames of n images.
        path: its suffix chooses the format.
        milliseconds: duration of a frame (in a GIF a multiple of 10). The last frame is shown for
            LAST_FRAME_MILLISECONDS.

    Raises:
        ValueError: the suffix is another one, or there are no frames.
    """
    _save_frames([image_grid(frame) for frame in frames], path, milliseconds)


def save_labelled_animation(
    animations: dict[str, UInt8[np.ndarray, "_ _ h w _"]],
    titles: list[str],
    path: str | Path,
    milliseconds: int,
) -> None:
    """Save several animations as one, with one labelled row of images for each.

    Args:
        animations: label of the row -> f frames of any number of images.
        titles: f lines of text, one above each frame, such as its timestep.
        path: its suffix chooses the format; the colours are those of save_animation.
        milliseconds: duration of a frame, as in save_animation.

    Raises:
        ValueError: the suffix is another one, there are no frames, an animation does not have one
            frame per title, or labelled_grid refuses a frame.
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
    # All frames have one size, and the images stay at one place.
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
        loop=0,  # endless
    )


def draw_points(
    x: Float[np.ndarray, "n 2"],
    limit: float,
    size: int = 256,
    reference: Float[np.ndarray, "m 2"] | None = None,
) -> UInt8[np.ndarray, "size size 3"]:
    """Draw 2-D points (blue) over reference points (grey) on [-limit, limit]^2, y upwards.

    The result is an image for image_grid and save_animation. Points outside are not drawn.
    """
    picture = np.full((size, size, 3), 255.0)
    middle = size // 2
    picture[middle, :] = picture[:, middle] = 225.0  # the axes through 0
    layers = [(x, BLUE)] if reference is None else [(reference, GREY), (x, BLUE)]
    for points, colour in layers:
        # The first axis of the picture points downwards, so it is -y.
        inside = points[(np.abs(points) <= limit).all(axis=1)]
        counts, _, _ = np.histogram2d(
            -inside[:, 1], inside[:, 0], bins=size, range=[(-limit, limit)] * 2
        )
        # A point is a dot of 3 x 3 pixels; overlapping dots are darker.
        padded = np.pad(counts, 1)
        dots = np.zeros_like(counts)
        for i, j in itertools.product(range(3), range(3)):
            dots += padded[i : i + size, j : j + size]
        opacity = 1 - 0.4 ** dots[..., None]
        picture = (1 - opacity) * picture + opacity * np.array(colour)
    return picture.round().astype(np.uint8)
