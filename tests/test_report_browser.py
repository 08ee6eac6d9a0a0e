"""Reports in a real browser: Debian's package `chromium`, without a display."""

import base64
import json
import re
import shutil
import subprocess
import sys

import pytest
from report_helpers import our_history, stock_history, write_comparison, write_run

from hf_trainopt.lab.report import make_report


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium (apt-get install chromium)"),
    pytest.mark.skipif(sys.platform != "linux", reason="how the browser is started is for Linux"),
]

# Shows a page in a frame of a phone's width and tells what came of it.
PROBE = """<!DOCTYPE html><body><iframe id="f" src="PAGE" style="width:WIDTHpx;height:9000px;border:0"></iframe>
<script>
console.log("the probe is heard");
document.getElementById("f").onload = event => {
  const d = event.target.contentDocument, root = d.querySelector(".hf-trainopt-report");
  const box = e => e.getBoundingClientRect(), style = e => getComputedStyle(e);
  const loose = [...root.querySelectorAll("*")].filter(e => !e.closest(".scroll, svg") && box(e).right > WIDTH + 0.5);
  const charts = [...root.querySelectorAll("svg[role=img]")];
  const outside = charts.flatMap(svg => [...svg.querySelectorAll("text")].filter(t =>
    box(t).left < box(svg).left - 1 || box(t).right > box(svg).right + 1).map(t => t.textContent));
  const result = {
    scrollWidth: d.documentElement.scrollWidth, loose: loose.map(e => e.outerHTML.slice(0, 200)),
    charts: charts.length,
    smallest: Math.min(...charts.map(svg => Math.min(box(svg).width, box(svg).height))), outside,
    text: Math.min(...charts.map(svg => parseFloat(style(svg.querySelector("text")).fontSize) * box(svg).width / 400)),
    curves: root.querySelectorAll(".curve path").length,
    stroke: style(root.querySelector(".curve path[style*='--arm']")).stroke,
    faint: (e => [style(e).stroke, style(e).strokeOpacity])(root.querySelector(".curve.faint path")),
    columns: new Set([...root.querySelectorAll("section")].map(e => Math.round(box(e).left))).size,
    lead: box(root.querySelector(".verdict figure")).bottom, used: Math.max(...charts.map(svg => box(svg).right)),
    paper: style(root).backgroundColor, ink: style(root).color,
  };
  document.body.dataset.result = btoa(unescape(encodeURIComponent(JSON.stringify(result))));
};
</script></body>"""


def chromium(tmp_path, *words: str) -> subprocess.CompletedProcess:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
               f"--user-data-dir={tmp_path / 'profile'}", "--allow-file-access-from-files", "--enable-logging=stderr",
               *words]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A comparison beside a stock run with a long name, as a page and as a notebook has it."""
    root = tmp_path_factory.mktemp("pages")
    logs = {name: [our_history(10, rate + 0.01 * seed) for seed in range(3)] for name, rate in
            (("stock", 0.1), ("ours", 0.2), ("best fixed (k = 4, rate 0.0012)", 0.15))}  # fmt: skip
    write_comparison(root / "compare", logs)
    write_run(root / "a_very_long_name_of_a_run_that_no_phone_has_room_for_in_one_line", stock_history())
    report = make_report(root / "compare", next(root.glob("a_very*")))
    (root / "page.html").write_text(report.to_html(), encoding="utf-8")
    notebook = f"<!DOCTYPE html><meta charset='utf-8'><h1>mine</h1>{report._repr_html_()}"
    (root / "notebook.html").write_text(notebook, encoding="utf-8")
    return root


def probe(pages, tmp_path, page: str, width: int, *words: str) -> tuple[dict, list[str]]:
    """Return what the probe has found, and the lines of the console."""
    path = pages / f"probe_{width}_{page}"
    path.write_text(PROBE.replace("PAGE", page).replace("WIDTH", str(width)))
    words = (*words, "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom")
    done = chromium(tmp_path, *words, path.as_uri())
    result = json.loads(base64.b64decode(re.search(r'data-result="([^"]+)"', done.stdout)[1]))
    return result, re.findall(r".*CONSOLE.*", done.stderr)


@pytest.mark.parametrize("page", ["page.html", "notebook.html"])
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_is_wider_than_the_screen(pages, tmp_path, page, width):
    found, console = probe(pages, tmp_path, page, width)
    assert found["scrollWidth"] <= width
    assert found["loose"] == []
    assert found["outside"] == []
    assert found["charts"] >= 9
    assert found["smallest"] > 80
    assert found["curves"] > 20
    assert found["text"] > (9 if width >= 390 else 7)
    if page == "page.html":  # the width of a desktop is used, and the picture of the verdict is on the first screen
        assert found["columns"] == (2 if width == 1280 else 1)
        assert found["used"] > 0.9 * width
        assert width < 1280 or found["lead"] < 900
    assert re.match(r"rgb\(", found["stroke"])  # the variables of the style sheet are known
    (line,) = console
    assert "the probe is heard" in line


def channels(colour: str) -> list[int]:
    return [int(value) for value in re.findall(r"\d+", colour)[:3]]


def luminance(colour: str) -> float:
    shares = [value / 255 for value in channels(colour)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in shares]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize(("setting", "dark"), [(0, True), (1, False)])
def test_light_and_dark(pages, tmp_path, setting, dark):
    found, _ = probe(pages, tmp_path, "page.html", 390, f"--blink-settings=preferredColorScheme={setting}")
    paper, ink, curve = (luminance(found[name]) for name in ("paper", "ink", "stroke"))
    assert (paper < ink) == dark

    def contrast(a: float, b: float) -> float:
        return (max(a, b) + 0.05) / (min(a, b) + 0.05)

    assert contrast(paper, ink) > 7  # WCAG AAA for texts
    assert contrast(paper, curve) > 3  # AA for graphics
    colour, opacity = found["faint"]
    mixed = [float(opacity) * front + (1 - float(opacity)) * back for front, back in
             zip(channels(colour), channels(found["paper"]), strict=True)]  # fmt: skip
    assert contrast(paper, luminance(f"rgb{tuple(map(round, mixed))}")) > 3  # training loss


def test_on_paper(pages, tmp_path):
    path = tmp_path / "page.pdf"
    dark = "--blink-settings=preferredColorScheme=0"
    chromium(tmp_path, f"--print-to-pdf={path}", dark, (pages / "page.html").as_uri())
    text = path.read_bytes()
    assert text.startswith(b"%PDF")
    assert 2 <= int(re.search(rb"/Count (\d+)", text)[1]) <= 12
