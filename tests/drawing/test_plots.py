"""Pictures: schedule cards, image grids, animations, points and the terms of a bound."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
from PIL import Image

from diffusion_jax.diffusion import schedules
from diffusion_jax.drawing import plots
from diffusion_jax.drawing.images import (
    BLUE,
    COMFORTABLE_PIXELS,
    LAST_FRAME_MILLISECONDS,
    SEPARATOR_GREY,
    SEPARATOR_PIXELS,
    TEXT_PIXELS,
    _draw_text,
    draw_points,
    image_grid,
    labelled_grid,
    save_animation,
    save_labelled_animation,
)

random = np.random.default_rng(0)


def random_images(*shape):
    return random.integers(0, 256, shape, dtype=np.uint8)


def card(tmp_path, schedule, levels=256, num_clipped=0):
    """The lines of a schedule's description, {name: text}, and the path of its picture."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a division by zero or a log(0) is an error
        text = plots.describe_schedule(schedule, levels, num_clipped, "a title")
        plots.schedule_card(schedule, levels, "a title", tmp_path / "card.png")
    return dict(line.split(maxsplit=1) for line in text.splitlines()), tmp_path / "card.png"


# schedule card ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("levels", "fraction"), [(256, "1/127.5"), (17, "1/8"), (3, "1/1")])
def test_pixel_bin_is_the_distance_of_two_grey_levels(levels, fraction):
    grey = np.linspace(-1, 1, levels)
    np.testing.assert_allclose(plots.pixel_bin(levels), np.diff(grey), rtol=1e-12)
    assert float(fraction.removeprefix("1/")) == pytest.approx(1 / plots.pixel_bin(levels))
    assert plots._fraction(levels) == fraction


def test_card_of_the_cosine_schedule_shows_the_papers_numbers(tmp_path):
    # Nichol & Dhariwal 2021: s = 0.008 puts sqrt(beta_1) slightly under the bin 1/127.5.
    lines, _ = card(tmp_path, schedules.cosine(1000, s=0.008), levels=256, num_clipped=1)
    root_beta_1, rest = lines["sqrt(beta_1)"].split(" = ", 1)
    assert float(root_beta_1) == pytest.approx(0.0064, abs=5e-5)
    assert "1/127.5 = 0.00784" in rest
    assert float(rest.split()[0]) == pytest.approx(0.0064 * 127.5, abs=0.01)
    assert lines["clipped"] == "1 of 1000 betas"
    assert lines["schedule"] == "a title"


# Every schedule except from_betas, which needs the user's array.
NAMES = sorted(set(schedules.SCHEDULES) - {"from_betas"})


@pytest.mark.parametrize("name", NAMES)
def test_the_numbers_of_a_card_are_those_of_its_schedule(tmp_path, name):
    schedule = schedules.SCHEDULES[name](100)
    lines, path = card(tmp_path, schedule, levels=17)
    alpha_bar = np.asarray(schedule.alpha_bar, np.float64)
    snr = alpha_bar / np.asarray(schedule.one_minus_alpha_bar, np.float64)
    assert float(lines["sqrt(beta_1)"].split()[0]) == pytest.approx(
        float(schedule.beta[0]) ** 0.5, rel=0.01
    )
    assert float(lines["alpha_bar_T"].split()[0]) == pytest.approx(alpha_bar[-1], rel=0.01)
    first, _, last, *_ = lines["SNR"].split()
    assert float(first) == pytest.approx(snr[0], rel=0.01)
    assert float(last) == pytest.approx(snr[-1], rel=0.01)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert len(picture.convert("L").getcolors()) > 2  # something is drawn


@pytest.mark.parametrize("num_timesteps", [1, 20_000])
@pytest.mark.parametrize("name", ["cosine", "jsd"])
def test_card_of_the_shortest_and_of_long_schedules(tmp_path, name, num_timesteps):
    lines, _ = card(tmp_path, schedules.SCHEDULES[name](num_timesteps))
    assert lines["clipped"].endswith(f"of {num_timesteps} betas")


def test_card_of_zero_terminal_snr_is_drawn_with_an_infinite_log_snr(tmp_path):
    schedule = schedules.zero_terminal_snr(schedules.cosine(50))
    lines, _ = card(tmp_path, schedule)
    assert lines["alpha_bar_T"] == "0 (zero terminal SNR)"
    assert " to 0 (log SNR" in lines["SNR"]
    assert lines["SNR"].endswith("to -inf)")


def test_card_of_data_without_pixels_names_no_pixel_bin(tmp_path):
    lines, _ = card(tmp_path, schedules.cosine(10), levels=None)
    assert "1/" not in lines["sqrt(beta_1)"]


def test_importing_plots_does_not_import_matplotlib():
    code = (
        "import sys; from diffusion_jax.drawing import plots; sys.exit('matplotlib' in sys.modules)"
    )
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


# grids -----------------------------------------------------------------------------------------


def cells(grid, height, width, columns, scale):
    """The images of a grid, each cut out of the picture and reduced to its original size."""
    pixels = np.asarray(grid)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    down = height * scale + SEPARATOR_PIXELS
    across = width * scale + SEPARATOR_PIXELS
    for top in range(0, pixels.shape[0], down):
        for left in range(0, pixels.shape[1], across):
            cell = pixels[top : top + height * scale, left : left + width * scale]
            blocks = cell.reshape(height, scale, width, scale, -1)
            assert (blocks == blocks[:, :1, :, :1]).all()  # each pixel is a block of one colour
            yield blocks[:, 0, :, 0]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("scale", [1, 3])
@pytest.mark.parametrize(("num_images", "columns"), [(1, 1), (6, 3), (7, 3), (5, 5), (4, 1)])
def test_grid_holds_every_image_pixel_by_pixel(tmp_path, num_images, columns, scale, channels):
    images = random_images(num_images, 4, 5, channels)
    path = tmp_path / "grid.png"
    image_grid(images, columns=columns, scale=scale).save(path)
    with Image.open(path) as grid:
        assert grid.mode == ("L" if channels == 1 else "RGB")
        found = list(cells(grid, 4, 5, columns, scale))
    np.testing.assert_array_equal(found[:num_images], images)
    assert all((cell == SEPARATOR_GREY).all() for cell in found[num_images:])
    assert len(found) == -(-num_images // columns) * columns


@pytest.mark.parametrize(
    ("num_images", "height", "width", "columns"),
    [(64, 8, 8, 8), (1, 8, 8, 1), (2, 8, 8, 2), (10, 8, 8, 4), (16, 8, 16, 3), (9, 32, 32, 3)],
)
def test_grid_is_as_square_as_possible(num_images, height, width, columns):
    images = random_images(num_images, height, width, 1)
    expected = image_grid(images, columns=columns)
    assert image_grid(images).size == expected.size


@pytest.mark.parametrize("size", [1, 8, 28, 32, 63, 64, 65, 256])
def test_small_images_are_enlarged_to_a_comfortable_size(size):
    width, height = image_grid(random_images(1, size, size, 1)).size
    assert width == height
    assert width % size == 0
    assert width >= COMFORTABLE_PIXELS
    assert width == size or width < 2 * COMFORTABLE_PIXELS


@pytest.mark.parametrize("shape", [(0, 8, 8, 1), (2, 8, 8, 2), (2, 8, 8, 4)])
def test_grid_refuses_what_it_cannot_draw(shape):
    with pytest.raises(ValueError, match="images"):
        image_grid(random_images(*shape))


# animations ------------------------------------------------------------------------------------


def read_animation(path):
    with Image.open(path) as animation:
        for i in range(animation.n_frames):
            animation.seek(i)
            yield np.asarray(animation.convert("RGB")), animation.info["duration"]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("suffix", [".gif", ".png", ".apng"])
def test_animation_read_back(tmp_path, suffix, channels):
    frames = random_images(5, 4, 8, 8, channels)
    path = tmp_path / f"denoising{suffix}"
    save_animation(frames, path, milliseconds=80)
    shown, durations = zip(*read_animation(path))
    assert durations == (80,) * 4 + (LAST_FRAME_MILLISECONDS,)
    expected = np.stack([np.asarray(image_grid(f).convert("RGB")) for f in frames])
    if suffix != ".gif" or channels == 1:
        np.testing.assert_array_equal(shown, expected)
    else:  # 256 colours
        assert np.abs(np.stack(shown).astype(int) - expected).mean() < 16
    with Image.open(path) as animation:
        assert animation.info["loop"] == 0


@pytest.mark.parametrize("suffix", [".gif", ".png"])
def test_equal_frames_last_as_long_as_separate_ones(tmp_path, suffix):
    frames = random_images(1, 2, 8, 8, 1).repeat(6, axis=0)
    frames[0] = 255 - frames[0]
    path = tmp_path / f"still{suffix}"
    save_animation(frames, path, milliseconds=100)
    durations = [duration for _, duration in read_animation(path)]
    assert sum(durations) == 5 * 100 + LAST_FRAME_MILLISECONDS


@pytest.mark.parametrize("suffix", [".mp4", ".jpg", ""])
def test_animation_refuses_other_formats(tmp_path, suffix):
    with pytest.raises(ValueError, match=r"\.gif, \.png, \.apng"):
        save_animation(random_images(2, 1, 8, 8, 1), tmp_path / f"a{suffix}", 100)
    assert not list(tmp_path.iterdir())


# labelled grids --------------------------------------------------------------------------------


def split_labels(grid, left):
    """The white column of the labels, and the images to its right, as arrays."""
    pixels = np.asarray(grid)
    return pixels[:, :left], pixels[:, left:]


def label_width(labels):
    return max(_draw_text(label).width for label in labels)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("counts", [(1,), (4, 4), (2, 5, 1)])
def test_labelled_grid_holds_every_image_pixel_by_pixel(tmp_path, counts, channels):
    rows = [random_images(n, 8, 16, channels) for n in counts]
    labels = [f"{n} images" for n in counts]
    labelled_grid(rows, labels).save(tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.mode == ("L" if channels == 1 else "RGB")
        _, drawn = split_labels(grid, label_width(labels))
    scale = COMFORTABLE_PIXELS // 16
    down, longest = 8 * scale + SEPARATOR_PIXELS, max(counts)
    assert drawn.shape[0] == len(rows) * down - SEPARATOR_PIXELS
    assert drawn.shape[1] == longest * (16 * scale + SEPARATOR_PIXELS) - (SEPARATOR_PIXELS)
    for top, row in zip(range(0, drawn.shape[0], down), rows):
        found = list(cells(drawn[top : top + down - SEPARATOR_PIXELS], 8, 16, longest, scale))
        np.testing.assert_array_equal(found[: len(row)], row)
        assert all((cell == SEPARATOR_GREY).all() for cell in found[len(row) :])


def test_labels_are_black_on_white_and_whole():
    labels = ["10", "gpqy (jW", "two\nlines", "a label much longer than the others"]
    rows = [random_images(2, 8, 8, 1) for _ in labels]
    width = label_width(labels)
    texts, _ = split_labels(labelled_grid(rows, labels), width)
    height = COMFORTABLE_PIXELS + SEPARATOR_PIXELS
    ink = []
    for top in range(0, texts.shape[0], height):
        text = texts[top : top + COMFORTABLE_PIXELS]
        assert text.min() < 32
        ink.append((text < 128).sum())
        # A white margin on every side shows that nothing is cut off
        edges = [text[:3], text[-3:], text[:, :3], text[:, -3:]]
        assert all((edge == 255).all() for edge in edges)
    assert min(ink) > 30
    assert np.argmax(ink) == 3
    rows_of_ink = np.flatnonzero((texts[height : 2 * height] < 128).any(axis=1))
    assert rows_of_ink.max() - rows_of_ink.min() >= 0.6 * TEXT_PIXELS  # large enough to read


def test_a_label_higher_than_its_images_is_not_cut_off():
    labels = ["one\ntwo\nthree\nfour\nfive", "below"]
    grid = labelled_grid([random_images(3, 8, 8, 1)] * 2, labels)
    heights = [_draw_text(labels[0]).height, COMFORTABLE_PIXELS]
    assert heights[0] > heights[1]
    assert grid.height == sum(heights) + SEPARATOR_PIXELS
    text, _ = split_labels(grid, label_width(labels))
    expected = np.asarray(_draw_text(labels[0]))
    np.testing.assert_array_equal(text[: heights[0], : expected.shape[1]], expected)


def test_a_labelled_grid_can_mix_grey_and_colour_rows():
    masks, images = random_images(2, 64, 64, 1), random_images(2, 64, 64, 3)
    for rows in ([masks, images], [images, masks]):
        grid = labelled_grid(rows, ["a", "b"])
        assert grid.mode == "RGB"
        _, drawn = split_labels(grid, label_width(["a", "b"]))
        for top, row in zip((0, 64 + SEPARATOR_PIXELS), rows):
            found = np.stack(list(cells(drawn[top : top + 64], 64, 64, 2, 1)))
            np.testing.assert_array_equal(found, np.broadcast_to(row, found.shape))


ROW = random_images(2, 8, 8, 1)


@pytest.mark.parametrize(
    ("rows", "labels", "message"),
    [
        ([], [], "^rows: must hold at least one"),
        ([ROW], ["a", "b"], "^labels: 2 of them; must be one for each of 1 rows"),
        ([ROW, ROW], ["a"], "^labels: 1 of them"),
        ([ROW, ROW[:0]], ["a", "b"], "^images: must hold at least one"),
        ([random_images(2, 8, 8, 2)], ["a"], "^images: 2 channels"),
    ],
)
def test_labelled_grid_refuses_what_it_cannot_draw(rows, labels, message):
    with pytest.raises(ValueError, match=message):
        labelled_grid(rows, labels)


# labelled animations ---------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "channels"), [(".gif", 1), (".png", 1), (".apng", 3)])
@pytest.mark.parametrize("last_title", ["t = 2", "a title that is far wider than these two images"])
def test_labelled_animation_read_back(tmp_path, suffix, channels, last_title):
    animations = {
        label: random_images(3, n, 8, 8, channels)
        for label, n in {"linear": 2, "cosine": 1}.items()
    }
    titles = ["t = 0", "t = 1", last_title]
    path = tmp_path / f"noising{suffix}"
    save_labelled_animation(animations, titles, path, milliseconds=80)
    shown, durations = zip(*read_animation(path))
    assert durations == (80, 80, LAST_FRAME_MILLISECONDS)
    for i, (frame, title) in enumerate(zip(shown, titles)):
        heading = np.asarray(_draw_text(title).convert("RGB"))
        top = max(_draw_text(other).height for other in titles)
        height, width = heading.shape[:2]
        np.testing.assert_array_equal(frame[:height, :width], heading)
        rows = [frames[i] for frames in animations.values()]
        grid = np.asarray(labelled_grid(rows, list(animations)).convert("RGB"))
        np.testing.assert_array_equal(frame[top:, : grid.shape[1]], grid)
        assert (frame[top:, grid.shape[1] :] == 255).all()
        assert (frame[height:top] == 255).all()


FRAMES = random_images(3, 2, 8, 8, 1)


@pytest.mark.parametrize(
    ("animations", "titles", "path", "message"),
    [
        ({"a": FRAMES, "b": FRAMES[:2]}, ["0", "1", "2"], "a.gif", r"^animations\['b'\]: 2 frames"),
        ({"a": FRAMES}, ["0", "1"], "a.gif", r"^animations\['a'\]: 3 frames; .* the 2 titles"),
        ({"a": FRAMES[:0]}, [], "a.gif", "^frames: must hold at least one"),
        ({}, [], "a.gif", "^animations: must hold at least one"),
        ({"a": FRAMES}, ["0", "1", "2"], "a.mp4", r"\.gif, \.png, \.apng"),
    ],
)
def test_labelled_animation_refuses(tmp_path, animations, titles, path, message):
    with pytest.raises(ValueError, match=message):
        save_labelled_animation(animations, titles, tmp_path / path, 100)
    assert not list(tmp_path.iterdir())


# points ----------------------------------------------------------------------------------------


def dark_centre(picture, colour_difference):
    """The mean (column, row) of the pixels where ``colour_difference`` is large."""
    rows, columns = np.nonzero(colour_difference(picture.astype(int)) > 30)
    return columns.mean(), rows.mean()


def blueness(picture):
    return picture[..., 2] - picture[..., 0]


@pytest.mark.parametrize("point", [(0.0, 0.0), (1.5, 1.0), (-1.5, 1.0), (0.25, -1.75)])
def test_a_point_is_drawn_at_its_place_with_y_upwards(point):
    limit, size = 2.0, 200
    picture = draw_points(np.array([point], np.float32), limit, size)
    assert picture.shape == (size, size, 3)
    column, row = dark_centre(picture, blueness)
    x = (column + 0.5) / size * 2 * limit - limit
    y = limit - (row + 0.5) / size * 2 * limit
    np.testing.assert_allclose((x, y), point, atol=2 * limit / size)


def test_points_outside_or_undefined_are_not_drawn():
    empty = draw_points(np.zeros((0, 2), np.float32), 2.0, 64)
    outside = np.array([[3, 0], [0, -2.5], [np.nan, 0], [np.inf, 1]], np.float32)
    np.testing.assert_array_equal(draw_points(outside, 2.0, 64), empty)


def test_reference_points_lie_under_the_samples():
    samples = random.normal(size=(200, 2)).astype(np.float32)
    alone = draw_points(samples, 4.0, 64)
    far = np.full((50, 2), 3.9, np.float32)
    both = draw_points(samples, 4.0, 64, reference=far)
    assert (both != alone).any(axis=-1).sum() <= 9  # only the dot of the reference
    assert (blueness(both.astype(int))[both[..., 0] != alone[..., 0]] == 0).all()


def test_pictures_of_points_animate(tmp_path):
    x = random.normal(size=(3, 100, 2)).astype(np.float32)
    frames = np.stack([draw_points(moment, 4.0, 128) for moment in x])[:, None]
    save_animation(frames, tmp_path / "points.gif", milliseconds=50)
    assert len(list(read_animation(tmp_path / "points.gif"))) == 3


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_terms_of_a_bound_are_drawn(tmp_path, zero_snr):
    """This works too if L_0 is tiny, a term is 0, an error is NaN, or a log SNR is infinite."""
    bits = np.array([1e-17, 0.5, 0.2, 0.0, 1e-3])
    log_snr = np.array([9.0, 5.0, 1.0, -3.0, -np.inf if zero_snr else -9.0])
    error = np.array([1e-17, 0.1, np.nan, 0.0, 1e-4])
    curve = plots.BoundCurve(timestep=np.arange(1, 6), log_snr=log_snr, bits=bits, error=error)
    plots.bound_terms(curve, tmp_path / "terms.png")
    with Image.open(tmp_path / "terms.png") as image:
        pixels = np.asarray(image.convert("RGB"), int)
    blue = np.all(np.abs(pixels - np.array(BLUE)) < 40, axis=-1)
    assert blue[:, : blue.shape[1] // 2].sum() > 200
    assert blue[:, blue.shape[1] // 2 :].sum() > 200
