"""The report: whole, self-contained, escaped, with every number; and its script works."""

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from llm_xrisk.evaluation.charts import line_chart, running_mean
from llm_xrisk.evaluation.compare import format_range, format_value
from llm_xrisk.evaluation.curves import (
    Panel,
    RunCurve,
    curves_from_log_history,
    standard_panels,
)
from llm_xrisk.evaluation.report import MAX_TEXT, Report, render_report, write_report
from llm_xrisk.evaluation.results import difference_text, tabulate
from tests.evaluation.conftest import make_run, make_sample

HOSTILE = "<script>document.title='owned'</script>\"'&<img src=x onerror=alert(1)>"
VOID = {"meta", "link", "input", "br"}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--virtual-time-budget=2000",
]


class Outline(HTMLParser):
    """Checks that tags nest, and keeps texts and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def attributes(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def arms() -> dict[str, object]:
    base = [make_sample(10 + n, "23", correct=False) for n in range(49)]
    base.append(make_sample(59, "23", correct=False, prompt="<b>7*7="))
    better = [make_sample(10 + n, "24", correct=n % 2 == 0) for n in range(49)]
    better += [make_sample(59, HOSTILE, correct=False), *base[:1]]
    zeros, ones = [0] * 49 + [1], [1] * 49 + [3]
    return {
        "base": make_run("base", zeros, greedy=zeros, samples=base),
        "DisCO": make_run("DisCO", ones, greedy=[1] * 50, samples=better),
        HOSTILE: [make_run("x", ones, greedy=zeros), make_run("y", zeros, greedy=zeros)],
    }


def history(slope: float) -> list[dict[str, float]]:
    return [
        {"step": step, "epoch": 0.1, "reward": slope * step, "kl/k3": 1e-4, "entropy": 1.0}
        for step in range(1, 41)
    ]


def report(**changes: object) -> Report:
    runs = {name: curves_from_log_history(history(0.01), name) for name in ("DisCO", HOSTILE)}
    options = {
        "title": "Quickstart <1>",
        "summary": "What came out.",
        "arms": arms(),
        "panels": standard_panels(runs, delta=2e-4),
        "facts": {"Hardware": "2 CPU cores", "Seeds": [0, 1], "Evaluation": "50 of 1,434 prompts"},
    }
    return Report(**(options | changes))  # pyright: ignore[reportArgumentType]


PAGE = render_report(report())


def test_the_page_is_well_formed() -> None:
    outline = Outline(PAGE)
    assert outline.open == []
    ids = outline.attributes("id")
    assert len(ids) == len(set(ids))
    assert {
        target for value in outline.attributes("aria-labelledby") for target in value.split()
    } <= set(ids)


def test_the_page_asks_for_nothing_from_outside() -> None:
    assert not re.search(r"https?:|//[a-z]|@import|url\(|srcset", PAGE.replace(" // ", ""))
    outline = Outline(PAGE)
    assert outline.attributes("src") == []
    assert outline.attributes("href") == ["data:,"]
    assert any("default-src 'none'" in value for value in outline.attributes("content"))


def test_model_text_and_names_are_escaped() -> None:
    outline = Outline(PAGE)
    assert [tag for tag, _ in outline.tags].count("script") == 1  # the report's own
    assert "img" not in {tag for tag, _ in outline.tags}
    assert HOSTILE in outline.text
    assert "<b>7*7=" in outline.text
    assert "<title>Quickstart &lt;1&gt;</title>" in PAGE


def test_every_number_of_the_table_is_on_the_page() -> None:
    results = tabulate(arms())  # pyright: ignore[reportArgumentType]
    page = "".join(Outline(PAGE).text).replace("\N{MINUS SIGN}", "-")
    for row in results.rows:
        for metric, cell in row.cells.items():
            assert format_value(metric, cell.interval.estimate) in page
            assert format_range(metric, cell.interval) in page
            if cell.to_base is not None:
                assert difference_text(cell.to_base) in page
    assert "50 held-out prompts, 4 completions sampled of each" in page
    assert "temperature 1, top-p 0.9, at most 8 tokens" in page
    assert "4,000 resamples, seed 0" in page
    assert "2 seeds" in page


def test_facts_are_shown_by_name() -> None:
    text = Outline(PAGE).text
    for part in ("Hardware", "2 CPU cores", "Seeds", "[0, 1]", "50 of 1,434 prompts"):
        assert part in text


def test_charts_carry_their_values_and_a_description() -> None:
    data = [json.loads(value) for value in Outline(PAGE).attributes("data-curves")]
    assert [len(chart["curves"]) for chart in data] == [2, 2, 2]  # reward, entropy, KL
    assert data[0]["curves"][0]["values"][-1] == 0.4
    labels = Outline(PAGE).attributes("aria-label")
    assert any(
        label.startswith("KL divergence, k3") and "delta is 0.0002" in label for label in labels
    )
    assert "delta = 0.0002" in Outline(PAGE).text


def test_a_page_without_curves_or_completions_is_whole() -> None:
    bare = {"base": make_run("base", [1, 2, 3])}
    outline = Outline(render_report(report(arms=bare, panels=(), facts={})))
    assert outline.open == []
    assert "Training curves" not in outline.text
    assert "Completions" not in outline.text


def test_sampling_settings_that_differ_are_shown_with_their_run() -> None:
    cold = make_run("cold", [1, 1, 2])
    cold.sampling["temperature"] = 0.5
    page = render_report(report(arms={"base": make_run("base", [1, 2, 2]), "cold": cold}))
    assert "<small>temperature 0.5, top-p 0.9, at most 8 tokens</small>" in page


def test_long_completions_are_cut_and_say_so() -> None:
    samples = [make_sample(10, "7" * (MAX_TEXT + 1234), correct=False)]
    page = render_report(report(arms={"base": make_run("base", [1, 2, 2], samples=samples)}))
    assert "(1,234 more characters)" in page
    assert "7" * (MAX_TEXT + 1) not in page


def test_the_report_is_written_whole(tmp_path: Path) -> None:
    path = write_report(report(), tmp_path / "out" / "report.html")
    assert path.read_text(encoding="utf-8") == PAGE
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_curves_are_read_from_a_trainer_state_file(tmp_path: Path) -> None:
    log = [
        {"step": 2, "epoch": 0.2, "reward": 0.25, "note": "text"},
        {"step": 1, "epoch": 0.1, "reward": 0.5, "kl/k3": float("nan")},
        {"step": 2, "train_runtime": 3.0},
    ]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    for source in (tmp_path, tmp_path / "trainer_state.json", log):
        curves = curves_from_log_history(source, "DisCO")
        assert curves["reward"] == RunCurve("DisCO", [1, 2], [0.5, 0.25])
        assert set(curves) == {"reward", "train_runtime"}
    with pytest.raises(ValueError, match=r"keys \['loss'\] has no 'step'"):
        curves_from_log_history([{"loss": 1.0}], "x")


def test_a_curve_needs_as_many_values_as_steps() -> None:
    with pytest.raises(ValueError, match="'x' has 2 steps and 1 values"):
        RunCurve("x", [1, 2], [0.5])
    with pytest.raises(ValueError, match="'x' has 0 steps"):
        RunCurve("x", [], [])


def test_curves_of_any_scale_stay_inside_the_chart() -> None:
    for values in ([0.0], [5.0, 5.0], [1e-9, 3e-9], [-1e7, 1e7], [0.1, 0.30000001]):
        steps = list(range(len(values)))
        svg = line_chart(Panel("t", "n", [RunCurve("a", steps, values)]), {"a": 0})
        (points,) = re.findall(r'<polyline points="([^"]*)"', svg)
        for pair in points.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 420
            assert 0 <= y <= 230
        assert "nan" not in svg


def test_a_running_mean_keeps_a_straight_line_and_smooths_a_ragged_one() -> None:
    line = [0.5 * step for step in range(100)]
    assert running_mean(line)[1:-1] == pytest.approx(line[1:-1])
    ragged = running_mean([float(step % 2) for step in range(100)])
    assert all(0.4 < value < 0.6 for value in ragged[4:-4])


PROBE = """
const out = {};
const rows = () => [...document.querySelectorAll("#rows > tr")].filter((row) => !row.hidden).length;
const place = () => document.getElementById("place").textContent;
const choose = (id, value) => {
  document.getElementById(id).value = value;
  document.getElementById(id).dispatchEvent(new Event("input", { bubbles: true }));
};
const readouts = () => [...document.querySelectorAll(".readout")].map((p) => p.textContent);
out.firstPage = [rows(), place()];
document.getElementById("next").click();
document.getElementById("next").click();
out.lastPage = [rows(), place(), document.getElementById("next").disabled];
choose("run", "1"); choose("verdict", "right");
out.right = place();
choose("verdict", "changed");
out.changed = place();
choose("verdict", ""); choose("search", "7*7");
out.found = place();
choose("search", "no such text");
out.none = [rows(), place()];
const chart = document.querySelector(".chart");
const box = chart.getBoundingClientRect();
out.before = readouts()[0];
const at = { clientX: box.left + box.width * (52 / 420), clientY: box.top + 20 };
chart.dispatchEvent(new PointerEvent("pointermove", at));
out.hover = readouts();
out.cross = document.querySelectorAll(".cross[visibility=visible]").length;
chart.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
out.key = readouts()[0];
document.querySelectorAll(".legend button")[1].click();
out.hiddenRun = readouts()[0];
const curves = [...document.querySelectorAll(".curve")];
out.hiddenCurves = curves.filter((curve) => curve.style.display === "none").length;
chart.dispatchEvent(new PointerEvent("pointerleave"));
out.after = readouts()[0];
document.getElementById("theme").click();
out.theme = document.documentElement.style.colorScheme;
out.title = document.title;
document.body.innerHTML = "";
document.body.textContent = "PROBE" + JSON.stringify(out) + "END";
"""


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium to run the page's script")
def test_filters_pages_hover_and_legend_work_in_a_browser(tmp_path: Path) -> None:
    runs = {name: curves_from_log_history(history(0.01), name) for name in ("DisCO", "GRPO")}
    page = render_report(report(panels=standard_panels(runs)))
    path = tmp_path / "probe.html"
    path.write_text(page.replace("</body>", f"<script>{PROBE}</script></body>"), encoding="utf-8")
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        [*command, path.as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.search("PROBE(.*)END", done.stdout)
    assert found, done.stdout[-500:]
    out = json.loads(unescape(found[1]))
    assert out["firstPage"] == [20, "1 to 20 of 50"]
    assert out["lastPage"] == [10, "41 to 50 of 50", True]
    assert out["right"] == "1 to 20 of 25"
    assert out["changed"] == "1 to 20 of 25"
    assert out["found"] == "1 to 1 of 1"
    assert out["none"] == [0, "No completion matches"]
    assert out["before"] == out["after"] == "lastDisCO 0.4GRPO 0.4"
    assert out["hover"][0] == "step 1DisCO 0.01GRPO 0.01"
    assert out["hover"][1] == "step 1DisCO 1GRPO 1"
    assert out["cross"] == 3
    assert out["key"] == "step 2DisCO 0.02GRPO 0.02"
    assert out["hiddenRun"] == "step 2DisCO 0.02"
    assert out["hiddenCurves"] == 3
    assert out["theme"] in {"dark", "light"}
    assert out["title"] == "Quickstart <1>"
