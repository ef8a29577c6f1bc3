"""The report as a browser has it, and the table as a program reads it."""

import csv
import html.parser
import itertools
import json
import math
import shutil
import warnings

import numpy as np
import pytest

from diffusion_jax.ablation import comparison
from diffusion_jax.ablation.report import figures
from diffusion_jax.ablation.report.arms import create_styles
from diffusion_jax.ablation.report.formats import decimals
from diffusion_jax.ablation.report.page import write_csv, write_report
from diffusion_jax.ablation.results import SCORES, ArmScores, JobScores, Results, Score, compare
from diffusion_jax.diffusion import schedules
from diffusion_jax.evaluation.interval import Interval
from diffusion_jax.runtime import files

OFFSETS = (0.0, 0.001, 0.004, 0.008, 0.02, 0.05, 0.2)
REFERENCE = 0.008
EDGES = np.linspace(-10.0, 10.0, 41)


OF_JOB = {
    "bits_per_dim": lambda job: job.bits,
    "quality": lambda job: job.quality.value,
    "loss": lambda job: job.loss,
}


def make_pictures(source, seed, size):
    """Blots that all arms have in common, and noise of the arm's own."""
    blots = np.random.default_rng(seed).integers(40, 216, (size, 4, 4, 3))
    smooth = blots.repeat(4, axis=1).repeat(4, axis=2)
    return (smooth + source.integers(-40, 40, smooth.shape)).astype(np.uint8)


def make_job(source, s, schedule, seed, seed_effect, image_effect, size):
    """A trained model that never was: lowest near s = 0.025, spread as such scores are."""
    worth = 0.07 * np.log10((s + 0.003) / 0.028) ** 2
    steps = np.arange(100, 20_001, 100)
    decay = 0.03 + 0.4 * (steps / 100) ** -0.9 + worth / 20 + seed_effect / 20
    middle = (EDGES[1:] + EDGES[:-1]) / 2
    log_snr = np.asarray(schedule.log_snr)
    has = (middle > log_snr[-1]) & (middle < log_snr[0])
    noise = source.normal(size=len(middle))
    bits = 2.9 + worth + seed_effect + image_effect + source.normal(0, 0.02, len(image_effect))
    error = (1 + 2 * worth) * 0.9 / (1 + np.exp(-middle - 1)) * np.exp(0.005 * noise)
    decoder = 0.05 / (1 + 100 * s)
    value = 8 + 40 * worth + 10 * seed_effect + source.normal(0, 0.2)
    return JobScores(
        seed=seed,
        config_hash=f"{hash((s, seed)) % 16**10:010x}",
        folder=f"s={s:g}/seed={seed}",
        step=20_000,
        steps=steps,
        losses=decay * source.normal(1, 0.02, len(steps)),
        bits=bits,
        terms={
            "L_T": 1e-4 * (1 + s),
            "L_1 to L_{T-1}": float(bits.mean()) - decoder - 1e-4,
            "L_0": decoder,
        },
        density=np.where(has, np.exp(-((middle - 2) ** 2) / 18) * (0.4 + worth) + 0.01, 0.0),
        eps_error=np.where(has, error, np.nan),
        loss=math.nan,
        quality=Interval(value, value - 0.5, value + 0.6),
        pictures=make_pictures(source, seed, size),
    )


def with_scores(arms, reference):
    """Fill in the scores as those who make Results do."""
    common = np.isfinite([job.eps_error for arm in arms for job in arm.jobs]).all(axis=0)
    arms = [
        arm._replace(
            jobs=tuple(job._replace(loss=job.eps_error[common].mean()) for job in arm.jobs)
        )
        for arm in arms
    ]
    scores = {
        name: compare(
            {arm.name: np.array([of_job(job) for job in arm.jobs]) for arm in arms}, reference
        )
        for name, of_job in OF_JOB.items()
    }
    return tuple(
        arm._replace(scores={name: of_arms[arm.name] for name, of_arms in scores.items()})
        for arm in arms
    )


def make_results(offsets=OFFSETS, num_seeds=3, num_images=60, num_pictures=12, swept=True):
    source = np.random.default_rng(0)
    seed_effects = source.normal(0, 0.01, num_seeds)
    image_effect = source.normal(0, 0.6, num_images)
    arms = []
    for s in offsets:
        schedule = schedules.cosine(1000, s=s)
        jobs = [
            make_job(source, s, schedule, seed, seed_effects[seed], image_effect, num_pictures)
            for seed in range(num_seeds)
        ]
        fields = {"schedule.s": s} if swept else {"schedule.name": "cosine", "schedule.s": s}
        title = f"cosine(num_timesteps=1000, s={s:g}, max_beta=0.999)"
        arms.append(ArmScores(f"s={s:g}", fields, title, schedule, tuple(jobs), {}))
    reference = f"s={REFERENCE:g}" if REFERENCE in offsets else arms[0].name
    return Results(
        dataset="cifar10",
        levels=256,
        reference=reference,
        swept="schedule.s" if swept else None,
        arms=with_scores(arms, reference),
        edges=EDGES,
        distance="frechet",
        command="python main.py --mode=ablate --config=configs/cifar10.py"
        " --arms='config.schedule.s=0,0.001,0.004,0.008,0.02,0.05,0.2' --seeds=0,1,2"
        " --workdir=runs/offset",
        versions={"diffusion_jax": "0.1.0", "jax": "0.7.2", "numpy": "2.3.1", "python": "3.11.2"},
        facts={"parameters": "701,345", "device": "8 x TPU v5e", "training steps": "20,000"},
        notes=("The bound is that of the averaged weights, over 60 of 10,000 test images.",),
    )


# What needs no browser


class Page(html.parser.HTMLParser):
    """The elements of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.texts).split())


def write(results, folder):
    path = folder / "report.html"
    write_report(results, path)
    return path, Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def results():
    return make_results()


@pytest.fixture(scope="module")
def path(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(results, path)
    return path


def test_csv_has_a_row_for_each_arm_and_seed(results, tmp_path):
    write_csv(results, tmp_path / "ablation.csv")
    with open(tmp_path / "ablation.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    jobs = [(arm, job) for arm in results.arms for job in arm.jobs]
    assert len(rows) == len(jobs) == 21
    for row, (arm, job) in zip(rows, jobs):
        assert row["arm"] == arm.name
        assert (int(row["seed"]), int(row["step"])) == (job.seed, job.step)
        assert (row["config_hash"], row["folder"]) == (job.config_hash, job.folder)
        numbers = {
            "schedule.s": arm.fields["schedule.s"],
            "training_loss": job.losses[-1],
            "loss": job.loss,
            "bits_per_dim": job.bits.mean(),
            **job.terms,
            "quality": job.quality.value,
            "quality_low": job.quality.low,
            "quality_high": job.quality.high,
            "sqrt_beta_1": math.sqrt(arm.schedule.beta[0]),
            "alpha_bar_T": arm.schedule.alpha_bar[-1],
        }
        for name, number in numbers.items():
            assert float(row[name]) == pytest.approx(float(number), rel=1e-12), name
    assert list(tmp_path.iterdir()) == [tmp_path / "ablation.csv"]


def test_csv_has_a_column_for_every_ablated_field(tmp_path):
    results = make_results((0.0, REFERENCE), num_seeds=1)
    first, second = results.arms
    arms = first._replace(fields={"loss.name": 'a,"b"'}), second
    write_csv(results._replace(arms=arms), tmp_path / "ablation.csv")
    with open(tmp_path / "ablation.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["loss.name"] for row in rows] == ['a,"b"', ""]
    assert [row["schedule.s"] for row in rows] == ["", "0.008"]


def test_page_is_whole_or_what_it_was(results, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("before")

    def fail(*_):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", fail)
        for write_file in (write_report, write_csv):
            with pytest.raises(OSError, match="no space"):
                write_file(results, path)
            assert path.read_text() == "before"
            assert list(tmp_path.iterdir()) == [path]
    write_csv(results, path)
    assert path.read_text().startswith("arm,")


def test_page_is_small_and_refers_to_nothing(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 2_000_000
    for tag, attributes in Page(text).elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data", "poster"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert "url(http" not in text
    assert "@import" not in text


def test_ids_are_unique_and_all_that_are_referred_to_are_there(path):
    text = path.read_text(encoding="utf-8")
    elements = Page(text).elements
    ids = [attributes["id"] for _, attributes in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    addresses = {
        attributes.get(name, "") for _, attributes in elements for name in ("href", "xlink:href")
    }
    referenced = {value[1:] for value in addresses if value.startswith("#")}
    referenced |= {
        attributes["aria-labelledby"]
        for _, attributes in elements
        if "aria-labelledby" in attributes
    }
    referenced |= {part.split(")")[0] for part in text.split("url(#")[1:]}
    assert referenced <= set(ids)


def test_table_has_the_scores(results, path):
    text = Page(path.read_text(encoding="utf-8")).text
    differences = [arm.scores["bits_per_dim"].difference for arm in results.arms]
    digits = decimals([difference for difference in differences if difference])
    assert digits in (3, 4)
    for arm, difference in zip(results.arms, differences):
        assert arm.name in text
        if difference is not None:
            value, low, high = (f"{x:+.{digits}f}".replace("-", "−") for x in difference)
            assert f"{value} [{low}, {high}]" in text
    assert "about 0.9 of the 18 in this table" in text
    assert results.notes[0] in text
    assert results.command in text


def test_findings_say_how_sure_they_are(results, path):
    text = Page(path.read_text(encoding="utf-8")).text
    values = {arm.name: np.stack([job.bits for job in arm.jobs]) for arm in results.arms}
    lowest, equal = comparison.not_told_apart(values)
    assert lowest == "s=0.02"
    assert 0 < len(equal) < 6
    start = text.index("bound (bits/dim) : lowest with s=0.02 ,")
    text = text[start : start + 300]
    difference = results.arms[4].scores["bits_per_dim"].difference
    verb = "excludes" if comparison.excludes_zero(difference) else "contains"
    digits = decimals([difference])
    assert f"Difference to s=0.008: {difference.value:+.{digits}f}".replace("-", "−") in text
    assert f"the interval {verb} zero. Not significantly different from {', '.join(equal)}." in text


def test_one_seed_does_not_tell_samples_apart_but_from_the_reference(results, tmp_path):
    """With one number for each arm only the difference, over samples, has an interval."""
    alone = [arm._replace(jobs=arm.jobs[:1]) for arm in results.arms]
    lowest = min(alone, key=lambda arm: arm.jobs[0].quality.value).name
    for reference in ("s=0", lowest):
        arms = []
        for arm in alone:
            low = -0.1 if arm.name == "s=0.05" else 0.1
            difference = None if arm.name == reference else Interval(0.2, low, 0.3)
            score = Score(arm.jobs[0].quality, difference, "")
            arms.append(arm._replace(scores=arm.scores | {"quality": score}))
        _, page = write(results._replace(arms=tuple(arms), reference=reference), tmp_path)
        finding = page.text[page.text.index("sample quality (classifier distance) : lowest") :]
        finding = finding[: finding.index("error of eps (")]
        assert f"lowest with {lowest} ," in finding
        if reference == lowest:
            assert finding.endswith(" Not significantly different from s=0.05. ")
        else:
            assert "significantly" not in finding.lower()


def test_what_a_name_holds_is_text(tmp_path):
    """HTML, mathtext, and letters that no font of matplotlib's has."""
    nasty = '<b onclick="x">&amp;\'$\\frac{1}{2}$ 噪声'
    results = make_results((0.0, REFERENCE), num_seeds=2, swept=False)
    first, second = results.arms
    arms = (
        first._replace(name=nasty, fields={nasty: nasty}, title=nasty),
        second._replace(jobs=tuple(job._replace(folder=nasty) for job in second.jobs)),
    )
    results = results._replace(
        arms=arms,
        dataset=nasty,
        command=f"</script><script>{nasty}",
        versions={nasty: nasty},
        facts={nasty: nasty},
        notes=(nasty,),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path, page = write(results, tmp_path)
    tags = [tag for tag, _ in page.elements]
    assert "b" not in tags
    assert tags.count("script") == 1
    assert nasty in page.text
    assert "<b onclick" not in path.read_text(encoding="utf-8")
    assert any(nasty in attributes.get("aria-label", "") for _, attributes in page.elements)


def test_one_arm(tmp_path):
    results = make_results((REFERENCE,), num_seeds=1)
    _, page = write(results, tmp_path)
    assert "nothing to compare" in page.text
    assert "difference" not in page.text.split("Command")[0]


def test_one_seed_gives_no_interval_where_there_is_none(tmp_path):
    results = make_results((0.0, REFERENCE, 0.02), num_seeds=1)
    assert math.isinf(results.arms[0].scores["quality"].mean.high)
    path, page = write(results, tmp_path)
    assert "inf" not in page.text.replace("information", "")
    assert "intervals of one seed, over the test images or the samples alone" in page.text
    assert '<span class="ends">–</span>' in path.read_text(encoding="utf-8")


def test_a_score_that_is_no_number_is_not_compared(tmp_path):
    """A training that diverged: the other scores of the page are still of use."""
    results = make_results((0.0, REFERENCE), num_seeds=2)
    first, second = results.arms
    nowhere = Interval(math.nan, -math.inf, math.inf)
    losses = {"losses": np.full_like(first.jobs[0].losses, np.nan), "loss": math.nan}
    error = {"eps_error": np.full_like(first.jobs[0].eps_error, np.nan)}
    empty = {"steps": np.zeros(0, int), "losses": np.zeros(0)}
    first = first._replace(
        jobs=tuple(job._replace(**losses, **error) for job in first.jobs),
        scores=first.scores | {"loss": Score(nowhere, nowhere, "")},
    )
    second = second._replace(jobs=tuple(job._replace(**empty) for job in second.jobs))
    results = results._replace(arms=(first, second))
    _, page = write(results, tmp_path)
    assert "it is not a finite number in every arm" in page.text
    assert "nan" not in page.text
    write_csv(results, tmp_path / "ablation.csv")


def test_schedules_that_end_at_infinity_are_drawn():
    """Zero terminal SNR, and of one timestep; no number of the SVG is one of those that are not."""
    results = make_results((0.0, REFERENCE), num_seeds=1)
    for few in (schedules.zero_terminal_snr(schedules.linear(10)), schedules.linear(1)):
        first = results.arms[0]._replace(schedule=few)
        changed = results._replace(arms=(first, results.arms[1]))
        for draw in (figures.beta, figures.alpha_bar, figures.log_snr, figures.root_beta_1):
            [(_, root), *elements] = Page(draw(changed)).elements
            assert root["viewbox"].startswith("0 0 390 ")
            for _, attributes in elements:
                numbers = attributes.get("d", "") + attributes.get("x", "")
                assert "nan" not in numbers.lower()
                assert "inf" not in numbers.lower()
            assert len([tag for tag, a in elements if a.get("data-arm") == "0"]) > 0


def test_swept_values_are_in_their_order_at_equal_distances():
    results = make_results((0.02, 0.0, REFERENCE), num_seeds=2)
    svg = figures.scores_of_arms(results, "bits_per_dim")
    shown = [text for text in Page(svg).texts if text in ("0", "0.008", "0.02")]
    assert shown == ["0", "0.008", "0.02"]


def test_long_names_have_lines_and_stay_apart(results):
    long = [f"schedule.name=cosine,schedule.s={s:g},schedule.max_beta=0.999" for s in OFFSETS]
    arms = tuple(arm._replace(name=name) for arm, name in zip(results.arms, long))
    results = results._replace(arms=arms, swept=None, reference=long[3])
    texts = Page(figures.scores_of_arms(results, "quality")).texts
    assert texts.count("name=cosine,s=0.008,") == 1
    assert texts.count("max_beta=0.999") == len(long)
    assert any("minus that of the reference arm" in t for t in texts_of_difference(results))


def texts_of_difference(results):
    return Page(figures.differences_of_arms(results, "quality")).texts


def test_colours_are_told_from_the_page():
    """3:1 (WCAG 2.2, 1.4.11) for the lines of every arm, light and dark."""
    for swept in (True, False):
        for style in create_styles(make_results(num_seeds=1, num_pictures=1, swept=swept)):
            for colour, page in ((style.light, "#ffffff"), (style.dark, "#14171a")):
                if colour != "currentColor":
                    assert contrast(rgb(colour), rgb(page)) >= 3, (colour, page)


def rgb(text):
    """Of "#14171a" or "rgb(20, 23, 26)"."""
    if text.startswith("#"):
        return [int(text[i : i + 2], 16) for i in (1, 3, 5)]
    return [float(number) for number in text[text.index("(") + 1 : -1].split(",")[:3]]


def contrast(a, b):
    """Contrast ratio of WCAG 2.2."""

    def luminance(colour):
        c = np.array(colour) / 255
        linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    low, high = sorted([luminance(a), luminance(b)])
    return (high + 0.05) / (low + 0.05)


# In a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        pytest.skip("no chromium or no chromedriver on the PATH")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in (
        "headless=new",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "no-first-run",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


@pytest.fixture
def page(browser, path):
    """The report as it is when it has just been opened, on a desktop."""
    for log in ("browser", "performance"):
        browser.get_log(log)  # what earlier tests left there
    emulate(browser)
    browser.get(path.as_uri())
    return browser


def emulate(browser, width=1280, height=900, theme="light"):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    feature = {"name": "prefers-color-scheme", "value": theme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})


def test_opens_without_errors_or_requests(page, path):
    requests = []
    for entry in page.get_log("performance"):
        message = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent":
            requests.append(message["params"]["request"]["url"])
    assert path.as_uri() in requests
    assert [url for url in requests if not url.startswith((path.as_uri(), "data:"))] == []
    assert page.get_log("browser") == []
    assert page.execute_script("return document.compatMode") == "CSS1Compat"


def test_policy_forbids_what_the_page_does_not_need(page):
    """The test above would see nothing if the policy did not hold: here something is refused."""
    page.execute_script(
        "const i = new Image(); i.src = 'http://localhost:9/x.png'; document.body.append(i);"
    )
    assert any("Content Security Policy" in entry["message"] for entry in page.get_log("browser"))


def test_pictures_and_plots_are_there_and_named(page, results):
    images = page.execute_script(
        "return [...document.images].map(i => [i.complete, i.naturalWidth, i.alt,"
        " i.closest('details') ? 1 : i.getBoundingClientRect().width])"
    )
    assert len(images) == len(results.arms) * 3
    assert all(
        complete and width > 0 and alt and shown > 0 for complete, width, alt, shown in images
    )
    assert len({alt for _, _, alt, _ in images}) == len(images)
    plots = page.execute_script(
        "return [...document.querySelectorAll('svg:not([aria-hidden=true])')].map(s => {"
        " const b = s.getBoundingClientRect();"
        " return [b.width, b.height, s.getAttribute('role'), s.getAttribute('aria-label')]})"
    )
    assert len(plots) == 16
    for width, height, role, label in plots:
        assert width > 200
        assert height > 100
        assert role == "img"
        assert len(label) > 40
    assert len({label for *_, label in plots}) == len(plots)


def test_columns_of_samples_begin_with_equal_noise(page):
    """Column k of every row lies below that of the row before, and pixels stay pixels."""
    for width in (1280, 360):
        emulate(page, width=width)
        boxes = page.execute_script(
            "return [...document.querySelector('.samples').querySelectorAll('img')].map(i => {"
            " const b = i.getBoundingClientRect();"
            " return [b.left, b.width, getComputedStyle(i).imageRendering]})"
        )
        assert {rendering for *_, rendering in boxes} == {"pixelated"}
        left, across, _ = boxes[0]
        for box in boxes:
            assert box[:2] == pytest.approx([left, across], abs=0.5)


def shown_rows(page, column):
    return page.execute_script(
        "return [...document.querySelector('table.sortable').tBodies[0].rows].map("
        "r => [r.cells[0].firstChild.textContent.trim(), r.cells[arguments[0]].innerText])",
        column,
    )


def states(page):
    return page.execute_script(
        "return [...document.querySelectorAll('th[data-column]')].map("
        "t => t.getAttribute('aria-sort'))"
    )


def in_order(results, column):
    """Names of the arms as a column orders them, missing differences being zero."""
    names = list(SCORES)

    def value(arm):
        if column == 0:
            return arm.fields["schedule.s"]
        if column > 2 * len(names):
            of_schedule = arm.schedule.beta[0], arm.schedule.alpha_bar[-1]
            return float(of_schedule[column - 2 * len(names) - 1])
        score = arm.scores[names[(column - 1) // 2]]
        if column % 2:
            return score.mean.value
        return score.difference.value if score.difference else 0

    return [arm.name for arm in sorted(results.arms, key=value)]


def test_every_column_sorts_both_ways_by_click(page, results):
    buttons = page.find_elements("css selector", "th[data-column] button")
    assert len(buttons) == 9
    assert states(page) == [None] * 9
    assert [name for name, _ in shown_rows(page, 0)] == [arm.name for arm in results.arms]
    for column, button in enumerate(buttons):
        for state in ("ascending", "descending", "ascending")[: 2 if column else 3]:
            button.click()
            expected = in_order(results, column)
            if state == "descending":
                expected.reverse()
            assert [name for name, _ in shown_rows(page, column)] == expected, (column, state)
            assert states(page)[column] == state
            assert sum(each is not None for each in states(page)) == 1


def test_sorts_by_keyboard(page, results):
    """Tab goes from the skip link over the table to the buttons; Enter and space press them."""
    keys = pytest.importorskip("selenium.webdriver").Keys
    actions = pytest.importorskip("selenium.webdriver").ActionChains
    for _ in range(30):
        actions(page).send_keys(keys.TAB).perform()
        label = page.execute_script("return document.activeElement.getAttribute('aria-label')")
        outline = page.execute_script(
            "return getComputedStyle(document.activeElement).outlineStyle"
        )
        assert outline != "none", label
        if label and label.startswith("bound, difference"):
            break
    else:
        pytest.fail("Tab does not come to the button")
    actions(page).send_keys(keys.ENTER).perform()
    assert states(page)[2] == "ascending"
    assert [name for name, _ in shown_rows(page, 2)] == in_order(results, 2)
    actions(page).send_keys(keys.SPACE).perform()
    assert states(page)[2] == "descending"
    assert [name for name, _ in shown_rows(page, 2)] == in_order(results, 2)[::-1]
    actions(page).send_keys(keys.TAB).perform()
    actions(page).send_keys(keys.ENTER).perform()
    assert states(page)[2:4] == [None, "ascending"]


def test_sorting_is_stable_and_puts_missing_numbers_last(page):
    page.execute_script(
        "const rows = document.querySelector('table.sortable').tBodies[0].rows;"
        "['2', '', '10', '2', '-1', '', '2'].forEach((value, i) => {"
        " rows[i].cells[1].dataset.value = value; rows[i].dataset.place = i; })"
    )
    button = page.find_elements("css selector", "th[data-column] button")[1]
    places = (
        "return [...document.querySelectorAll('table.sortable tbody tr')]"
        ".map(row => Number(row.dataset.place))"
    )
    button.click()
    assert page.execute_script(places) == [4, 0, 3, 6, 2, 1, 5]
    button.click()
    assert page.execute_script(places) == [2, 0, 3, 6, 4, 1, 5]


def test_fits_a_phone(page):
    emulate(page, 360, 740)
    for details in page.find_elements("css selector", "details"):
        page.execute_script("arguments[0].open = true", details)
    assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    wider = page.execute_script(
        "return [...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll *, svg *,"
        " .hidden') && e.getBoundingClientRect().right > 360.5).map(e => e.outerHTML.slice(0, 99))"
    )
    assert wider == []
    # The table scrolls in its own region, and the names of the arms stay.
    left = page.execute_script(
        "const region = document.querySelector('.scroll'); region.scrollLeft = 200;"
        "const cell = region.querySelector('tbody th');"
        "return [region.scrollLeft, region.tabIndex, region.getAttribute('aria-label'),"
        " cell.getBoundingClientRect().left - region.getBoundingClientRect().left]"
    )
    assert left[:3] == [200, 0, "Table of the arms"]
    assert 0 <= left[3] <= 2


TEXT_AND_GROUND = """
const texts = [];
const ground = (e) => {
  for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!c.startsWith('rgba(') || !c.endsWith(', 0)')) return c;
  }
  return null;
};
for (const e of document.querySelectorAll('body *')) {
  const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  if (!own || e.closest('script, style')) continue;
  const svg = e.closest('svg');
  const style = getComputedStyle(e);
  texts.push([e.textContent.trim().slice(0, 40), svg ? style.fill : style.color, ground(svg || e)]);
}
return texts;
"""


def test_text_is_legible_in_light_and_dark(page):
    grounds = {}
    for theme in ("light", "dark"):
        emulate(page, theme=theme)
        texts = page.execute_script(TEXT_AND_GROUND)
        assert len(texts) > 300
        for text, colour, ground in texts:
            assert contrast(rgb(colour), rgb(ground)) >= 4.5, (theme, text, colour, ground)
        script = "return getComputedStyle(document.body).backgroundColor"
        grounds[theme] = np.mean(rgb(page.execute_script(script)))
        lines = page.execute_script(
            "return [...document.querySelectorAll('.legend path')]"
            ".map(p => getComputedStyle(p).stroke)"
        )
        body = rgb(page.execute_script(script))
        assert all(contrast(rgb(line), body) >= 3 for line in lines)
    assert grounds["light"] > 240
    assert grounds["dark"] < 40


def test_legend_picks_arms_out(page):
    dim = (
        "return ['0', '3'].map(arm => [...document.querySelectorAll("
        "`.panels [data-arm='${arm}']`)].map(e => e.classList.contains('dim')))"
    )
    button = page.find_element("css selector", "[data-pick='3']")
    button.click()
    others, own = page.execute_script(dim)
    assert len(own) > 20
    assert all(others)
    assert not any(own)
    pressed = page.find_elements("css selector", "[data-pick][aria-pressed=true]")
    assert len(pressed) == len(page.find_elements("css selector", ".legend"))
    button.click()
    assert not any(map(any, page.execute_script(dim)))


def test_command_can_be_copied(page, results):
    assert page.find_element("css selector", ".command code").text == results.command
    button = page.find_element("css selector", ".command button")
    assert button.is_displayed()
    button.click()
    assert page.execute_script(
        "return new Promise(done => setTimeout(() => done("
        "document.querySelector('.command button').textContent), 50))"
    ) in ("Copied", "Selected")


def test_headings_and_landmarks(page):
    levels = page.execute_script(
        "return [...document.querySelectorAll('h1, h2, h3, h4')].map(h => +h.tagName[1])"
    )
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert page.execute_script("return document.documentElement.lang") == "en"
    assert page.execute_script("return document.querySelectorAll('main, header, nav').length") == 3
    skip = page.execute_script("return document.querySelector('a').hash")
    assert skip == "#main"
