"""The page of a profile: its content, its form, and what a browser makes of it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastddim import DDIM, checkpoints, embedded, profile
from fastddim.__main__ import main
from fastddim.tools import chart, curves, draw, images, page, thumbnails
from fastddim.tools.table import Cell

TINY = ("profile", "--device", "cpu", "--seeds", "0-9", "--batch-size", "5", "--steps", "1,2")
SETTINGS: dict[str, Any] = {
    "model": "1234567890abcdef",
    "seeds": "0-9",
    "batch_size": 5,
    "distance": "FD-clf",
    "device": "a machine",
    "backend": "numba",
    "fastddim": "0.1.0",
}
VOID = {"meta", "link", "img", "br", "path", "rect", "polyline"}
NASTY = "<script>alert('x & \"y\"')</script>"


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def cell(
    steps: int, order: int = 1, spacing: str = "uniform", eta: Any = 0.0, distance: Any = 2.5
) -> Cell:
    return Cell(steps, eta, 0.125, 20.0, 7.5, 31.0, distance, 1.5, 0.25, order, spacing)


GRID = [
    cell(S, order, spacing, eta, 30 / S / order)
    for S in (4, 10, 50)
    for order in (1, 2)
    for spacing in ("uniform", "tuned-123abc")
    for eta in (0.0, 1.0)
]


class Tree(HTMLParser):
    """The tags of a page with their attributes; tags that do not nest raise an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, Any]]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def all(self, *tags: str) -> list[dict[str, Any]]:
        return [attributes for tag, attributes in self.found if tag in tags]


def written(done: list[Cell] = GRID, command: str = "", **changed: Any) -> str:
    profile.write_page({**SETTINGS, **changed}, done, Path(), command)
    return Path("profile.html").read_text()


def text_of(html: str) -> str:
    return " ".join(re.sub("<[^>]+>", " ", html.partition("</style>")[2]).split())


# Its content


def test_a_page_has_the_values_of_all_cells() -> None:
    text = text_of(written(command="fastddim profile --steps 4"))
    for each in GRID:
        row = f"{each.steps} {each.order} {each.spacing} {each.eta:g} {each.distance:.3f}"
        assert f"{row} 1.500 ± 0.250 0.125 20.00 7.5 31.0" in text
    assert "η = 1, order 2, tuned-123abc 3.750 1.500 0.300" in text
    assert "FD-clf is not FID" in text
    for value in ("fastddim profile --steps 4", "Machine a machine", "fastddim 0.1.0", "0-9"):
        assert value in text


def test_a_cell_that_is_missing_is_a_dash() -> None:
    text = text_of(written([cell(4), cell(6), cell(6, 2, distance=1.0)]))
    assert "η = 0, order 1 2.500 2.500 η = 0, order 2 – 1.000" in text


def test_each_distance_is_explained_in_its_own_words() -> None:
    assert "mixture of Gaussians" in text_of(written(distance="FD"))
    own = text_of(written(distance="mine"))
    assert "Lower is better. As many real samples as each cell draws have mine 1.500 ± 0.250" in own
    assert "FID" not in own
    none = [Cell(4, 0.0, 0.125, 20.0, 7.5, None, None, None)]
    without = written(none, distance=None)
    assert "<svg" not in without
    assert "4 1 uniform 0 0.125 20.00 7.5 ?" in text_of(without)


def test_all_values_are_escaped() -> None:
    done = [cell(4, spacing=NASTY), cell(4, 2, "mixed")]
    plain = Tree(written(done, "", device="there", distance="mine"))
    nasty = written(done, f"fastddim --checkpoint {NASTY}", device=NASTY, distance=NASTY)
    assert "<script" not in nasty
    assert nasty.count("&lt;script&gt;alert(&#39;x &amp; &#34;y&#34;&#39;)") > 5
    tree = Tree(nasty)
    assert [tag for tag, _ in plain.found] == [
        tag for tag, _ in tree.found if tag not in ("code", "p")
    ] or len(tree.all("p")) == len(plain.all("p")) + 2  # the command's
    assert tree.all("script") == []


def test_the_command_is_the_one_that_was_given(capfd: pytest.CaptureFixture[str]) -> None:
    rest = ("--oracle", "--eta", "0", "--out", "it's <b>", "--quiet")
    assert main([*TINY, *rest]) == 0
    text = Path("it's <b>", "profile.html").read_text()
    assert (
        "<code>fastddim profile --device cpu --quiet --steps 1,2 --eta 0 --seeds 0-9 --oracle "
        "--batch-size 5 --out &#39;it&#39;&#34;&#39;&#34;&#39;s &lt;b&gt;&#39;</code>" in text
    )
    assert capfd.readouterr().err == ""


# Its images


def shown(text: str) -> list[np.ndarray[Any, Any]]:
    found = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    return [np.array(Image.open(io.BytesIO(base64.b64decode(each)))) for each in found]


@pytest.mark.slow
def test_images_of_earlier_cells_are_still_there() -> None:
    assert main([*TINY, "--eta", "0"]) == 0
    before = shown(Path("profile", "profile.html").read_text())
    assert main([*TINY, "--eta", "0", "--order", "2", "--steps", "2"]) == 0
    after = shown(Path("profile", "profile.html").read_text())
    drawn = [
        images.to_uint8(
            torch.cat(list(draw.by_seed(ddim, embedded.load(), range(10), embedded.SHAPE, 5)))[:8]
        )
        for ddim in (DDIM(1), DDIM(2), DDIM(2, order=2))
    ]
    expected = [images.grid(x, columns=8)[0].numpy() for x in drawn]
    assert len(before) == 2
    assert len(after) == 3
    for found, there in zip((*before, *after), (*expected[:2], *expected), strict=True):
        assert np.array_equal(found, there)
    # A cell of a version that kept none has a line in its place.
    profile_images = sorted(Path("profile", "images").iterdir())
    assert len(profile_images) == 3
    profile_images[0].unlink()
    assert main([*TINY, "--eta", "0"]) == 0
    text = Path("profile", "profile.html").read_text()
    assert len(shown(text)) == 2
    assert text.count("An earlier version measured this cell and kept no images.") == 1


def test_a_page_is_written_after_each_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, plain = [], profile.write_page

    def write_page(*arguments: Any) -> None:
        plain(*arguments)
        counts.append(Path("profile", "profile.html").read_text().count('<th scope="row">1</th>'))
        if len(counts) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(profile, "write_page", write_page)
    assert main([*TINY, "--oracle", "--eta", "0", "--steps", "3,4,5"]) == 130
    assert len(json.loads(Path("profile", "profile.json").read_text())["cells"]) == 2
    assert counts == [1, 2]


def test_large_images_are_kept_small_and_others_not_at_all() -> None:
    keep = profile.keep_images(Path())
    x = torch.zeros(3, 3, 96, 192)
    x[1] = 1
    keep(cell(4), x)
    path = thumbnails.image_path(Path(), cell(4))
    found = np.array(Image.open(path))
    assert found.shape == (32 + 4, 3 * 66 + 2, 3)
    assert (found[2:34, 68:132] == 255).all()
    assert (found[2:34, 2:66] == 128).all()
    for other in (torch.zeros(3, 4, 8, 8), torch.zeros(3, 64)):
        keep(cell(5), other)
    assert list(path.parent.iterdir()) == [path]


def test_no_name_of_a_cell_leads_out_of_the_folder() -> None:
    path = thumbnails.image_path(Path("a"), cell(4, spacing="../../b/c"))
    assert path.parent == Path("a", "images")
    names = {thumbnails.image_path(Path(), each) for each in GRID}
    assert len(names) == len(GRID)


# Its form


def test_a_page_needs_nothing_but_itself() -> None:
    profile.keep_images(Path())(GRID[0], torch.zeros(8, 1, 28, 28))
    text = written()
    tree = Tree(text)
    links = [v for _, a in tree.found for k, v in a.items() if k in ("src", "href")]
    assert all(re.match("#|data:", link) for link in links)
    assert "url(" not in text
    assert "@import" not in text
    assert not {"script", "iframe", "object"} & {tag for tag, _ in tree.found}
    assert not [k for _, a in tree.found for k in a if k.startswith("on")]
    policy = next(a for a in tree.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"].startswith("default-src 'none';")


def test_a_page_is_read_by_keyboard_and_by_ear() -> None:
    profile.keep_images(Path())(GRID[0], torch.zeros(8, 1, 28, 28))
    text = written()
    tree = Tree(text)
    assert text.startswith("<!doctype html>\n<html lang=")
    levels = [int(tag[1]) for tag, _ in tree.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [a["id"] for _, a in tree.found if "id" in a]
    assert len(ids) == len(set(ids))
    for _, attributes in tree.found:
        for name in ("aria-labelledby", "href"):
            for target in attributes.get(name, "").split():
                assert target.removeprefix("#") in ids or target.startswith("data:")
    body = [tag for tag, _ in tree.found].index("body")
    assert tree.found[body + 1] == ("a", {"class": "skip", "href": "#content"})
    assert len(tree.all("table")) == len(tree.all("caption")) == 2
    assert all(a["scope"] in ("row", "col") for a in tree.all("th"))
    boxes = [a for a in tree.all("div") if a.get("class") == "scroll"]
    assert all((a["tabindex"], a["role"]) == ("0", "region") and a["aria-label"] for a in boxes)
    assert all(a["alt"] for a in tree.all("img"))
    for drawing in tree.all("svg"):
        assert drawing.get("aria-hidden") == "true" or drawing["role"] == "img"
    assert (
        "width=device-width"
        in next(a for a in tree.all("meta") if a.get("name") == "viewport")["content"]
    )
    assert text.count("<title id=") == text.count("<desc id=") == 2


def luminance(colour: str) -> float:
    wide = colour if len(colour) == 7 else "#" + "".join(2 * digit for digit in colour[1:])
    parts = [int(wide[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return sum(w * p for w, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_stand_out_in_light_and_dark() -> None:
    # WCAG 2.2, 1.4.3 and 1.4.11: 4.5 for text, 3 for lines.
    roots = re.findall(r":root \{(.*?)\}", page.TEMPLATE.read_text(), flags=re.DOTALL)
    assert len(roots) == 2
    for root in roots:
        found = dict(re.findall(r"--(\w+): (#\w+);", root))
        assert {f"c{i}" for i in range(chart.COLOURS)} < set(found)
        back = luminance(found["back"])
        for name in set(found) - {"back", "rule", "shade"}:
            low, high = sorted((back, luminance(found[name])))
            contrast = (high + 0.05) / (low + 0.05)
            assert contrast >= (3 if re.fullmatch(r"c\d", name) else 4.5), (name, contrast)


def test_curves_differ_in_more_than_colour() -> None:
    looks = [chart.look(n) for n in range(chart.COLOURS)]
    assert len({(look.mark, look.dash) for look in looks}) == len(looks)
    assert len({chart.look(n) for n in range(280)}) == 280


# Its charts


def test_a_chart_is_logarithmic_and_lower_is_better() -> None:
    done = [cell(S, distance=d) for S, d in ((4, 8.0), (8, 4.0), (16, 2.0))]
    [made] = chart.charts(curves.panels(done))
    [line] = made.lines
    (x0, y0), (x1, y1), (x2, y2) = line.points
    assert x1 > x0
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert y1 > y0  # y goes down
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.2)
    assert made.floor is not None
    assert made.floor > y2
    assert made.band is not None
    assert made.band[0] < made.floor < made.band[0] + made.band[1]
    assert [text for _, text in made.x_ticks] == ["4", "8", "16"]
    ticks = {text: y for y, text in made.y_ticks}
    assert ticks["2"] == pytest.approx(y2, abs=0.1)
    every = [*line.points, *((x, 0.0) for x, _ in made.x_ticks)]
    assert all(chart.LEFT <= x <= chart.WIDTH - chart.RIGHT for x, _ in every)


@pytest.mark.parametrize(
    "distances",
    [[1.0], [1.0, 1.01], [1e-6, 3e5], [0.0, 2.0], [0.4, 0.5, 0.6], [0.1] * 40],
    ids=str,
)
def test_a_chart_of_any_values_has_ticks_inside(distances: list[float]) -> None:
    done = [cell(i + 1, distance=d) for i, d in enumerate(distances)]
    [made] = chart.charts(curves.panels(done))
    assert len(made.lines[0].points) == sum(d > 0 for d in distances)
    places = [y for y, _ in made.y_ticks] + [y for _, y in made.lines[0].points]
    assert len(made.y_ticks) >= 2
    assert all(chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM for y in places)
    assert all(abs(a - b) >= 24 for (a, _), (b, _) in itertools.pairwise(made.x_ticks))


def test_distances_of_zero_alone_have_no_chart() -> None:
    done = [Cell(4, 0.0, 1.0, 2.0, 3.0, 4.0, 0.0, 0.0)]
    assert chart.charts(curves.panels(done)) == []
    assert "<figure" not in written(done)


# In a browser

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
MEASURE = """<script>
const root = document.scrollingElement, wide = innerWidth;
const out = [...document.querySelectorAll("body *")].filter(e =>
  !e.closest(".scroll") && !e.closest(".skip") && e.getBoundingClientRect().right > wide + 1);
const boxes = [...document.querySelectorAll(".scroll")];
document.documentElement.dataset.measured = JSON.stringify({
  wide, scroll: root.scrollWidth, out: out.map(e => e.outerHTML.slice(0, 80)),
  back: getComputedStyle(document.body).backgroundColor,
  inner: boxes.map(e => e.scrollWidth > e.clientWidth),
  images: [...document.images].map(e => e.complete && e.naturalWidth > 0),
  text: Math.min(...[...document.querySelectorAll("svg.chart text")].map(
    e => e.getBoundingClientRect().height)),
});
console.log("measured");
</script></body>"""


def browsed(path: Path, width: int, *flags: str) -> tuple[str, str]:
    """Returns the page as Chromium holds it, and the lines of its console."""
    assert BROWSER is not None
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run"),
            *("--enable-logging=stderr", f"--user-data-dir={path.parent / 'user'}"),
            *(f"--window-size={width},844", *flags, "--dump-dom", path.resolve().as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_the_page_without_overflow_or_errors(width: int, dark: bool) -> None:
    for each in GRID:
        profile.keep_images(Path())(each, torch.zeros(8, 3, 80, 80))
    text = written(command="fastddim profile --checkpoint " + "a/long/path" * 20)
    flags = [f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    seen, console = browsed(Path("profile.html"), width, *flags)
    assert console == ""
    assert text_of(seen) == text_of(text)
    policy = re.compile(r'<meta http-equiv="Content-Security-Policy"[^>]*>')
    Path("measured.html").write_text(policy.sub("", text).replace("</body>", MEASURE))
    seen, console = browsed(Path("measured.html"), width, *flags)
    assert "measured" in console
    [found] = re.findall('data-measured="([^"]*)"', seen)
    values = json.loads(found.replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">"))
    assert values["wide"] <= max(width, 500)
    assert values["out"] == []
    assert values["scroll"] <= values["wide"]
    assert values["inner"][1] is (width < 500)  # the wide table scrolls in its own box
    assert values["back"] == ("rgb(20, 20, 20)" if dark else "rgb(255, 255, 255)")
    assert len(values["images"]) == len(GRID)
    assert all(values["images"])
    assert values["text"] >= 11


def test_an_interrupted_page_leaves_the_old_one(monkeypatch: pytest.MonkeyPatch) -> None:
    before = written()
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(OSError, match="disk full"):
        written([cell(4)])
    assert Path("profile.html").read_text() == before


def test_a_model_of_other_images_has_a_page_without_a_chart(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = checkpoints.Loaded(lambda x, t: x / 2, (3, 4, 4))
    monkeypatch.setattr("fastddim.checkpoints.load", lambda *_, **__: other)
    assert main([*TINY, "--eta", "0"]) == 0
    text = Path("profile", "profile.html").read_text()
    assert len(shown(text)) == 2
    assert "<svg" not in text
    Tree(text)
