"""The report in a real browser: opened from disk, used by mouse and by keyboard, with hostile text, and measured."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from report_page_support import HOSTILE, FakeRun, full_run, metrics, recipe, samples

from rltok.report import Methods, SampleMeta, SampleStore, load
from rltok.report.html import Limits, build

OPENS_WITHIN = 3.0
"""Seconds, for 1,000 completions of 1,000 tokens."""


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    return samples(rollouts=6, groups=2, size=4, length=60)


@pytest.fixture(scope="module")
def report(rows: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build([full_run(rows=rows)], tmp_path_factory.mktemp("one") / "report.html")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs = [full_run("first"), full_run("second", seed=1, recipe=recipe("second", credit={"type": "uniform"}))]
    return build(runs, tmp_path_factory.mktemp("two") / "report.html")


def shown(value: float) -> float:
    """A recorded number as the page shows it."""
    return float(f"{value:.5g}")


def panel_value(page: Any, quantity: str) -> float:
    """The number that the panel shows of a quantity."""
    text = page.locator(f'#panel dd[data-quantity="{quantity}"]').inner_text().split("\n")[0].split(" ")[0]
    return float(text.replace("\u2212", "-").replace("\u221e", "inf"))


def wait_for_token(page: Any, number: int) -> None:
    page.wait_for_function(
        "n => document.querySelector('#panel .where')?.textContent.startsWith(`token ${n} of`)", arg=number
    )


def entries(page: Any) -> list[str]:
    return page.locator(".entry .where").all_inner_texts()


def found(page: Any) -> int:
    return int(page.locator("#found").inner_text().split(" ")[0].replace(",", ""))


# Opening


def test_opens_from_disk_without_errors_or_requests(report: Path, visit: Any) -> None:
    seen = visit(report)
    assert seen.page.locator(".chart canvas").count() >= 10
    assert seen.page.locator(".entry").count() > 3
    seen.page.wait_for_timeout(300)
    seen.quiet()


@pytest.mark.parametrize(
    "run",
    [
        FakeRun(problems=["recipe.yaml is missing"]),
        full_run(metrics=metrics(1), rows=samples(1, 1, 1, 1)),
        full_run(rows=pd.DataFrame()),
        full_run(
            rows=samples(1, 1, 2, 50)[
                ["rollout", "step", "row", "group", "prompt", "completion", "token_ids", "tokens"]
            ]
        ),
    ],
    ids=["nothing", "one step", "no samples", "no quantities"],
)
def test_whatever_is_missing_opens_too(run: FakeRun, visit: Any, tmp_path: Path) -> None:
    seen = visit(build([run], tmp_path / "report.html"))
    seen.page.wait_for_timeout(200)
    assert seen.page.locator("#failure").is_hidden()
    seen.quiet()


def test_several_runs_share_the_charts(two: Path, visit: Any) -> None:
    seen = visit(two)
    reward = seen.page.locator(".chart", has=seen.page.locator("figcaption", has_text="Reward")).first
    assert reward.locator(".key li").all_inner_texts()[0].startswith("first")
    assert reward.locator(".key li").count() == 2
    seen.page.locator("#run-toggles input").nth(1).uncheck()
    assert reward.locator(".key li").count() == 1
    for axis in ("step", "trained", "seconds", "generated"):
        seen.page.select_option("#axis", axis)
        assert seen.page.locator(".chart canvas").count() >= 10
    seen.page.select_option("#metric", "hapo/signal_mean")
    assert seen.page.locator("figcaption", has_text="hapo/signal_mean").count() == 1
    seen.page.select_option("#run", "1")
    seen.page.wait_for_function("() => document.querySelector('#found').textContent.includes('48 of 48')")
    seen.quiet()


def test_curves_show_the_logged_numbers(report: Path, visit: Any) -> None:
    seen = visit(report, "x=step")
    last = seen.page.locator(".chart", has=seen.page.locator("figcaption", has_text="Gradient norm")).locator("output")
    assert float(last.inner_text()) == pytest.approx(metrics()["grad_norm"].iloc[-1], rel=1e-3)


# Values


def test_hover_shows_the_value_in_the_parquet(tmp_path: Path, visit: Any) -> None:
    """From recorded files to the panel: written, read, packed, unpacked, shown."""
    recorded = samples(rollouts=2, groups=2, size=4, length=60, seed=3)
    meta = SampleMeta(4, ("strict", "lenient"), 1.0, Methods("token_group_average", ("hapo",), (), None))
    store = SampleStore(tmp_path / "run" / "samples")
    for rollout, part in recorded.groupby("rollout"):
        store.write(int(rollout), {name: list(part[name]) for name in part}, meta)
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0, "reward": 0.5}\n')
    run = load(tmp_path / "run")
    stored = run.samples().iloc[0]
    seen = visit(build([run], tmp_path / "report.html"))
    for place in (0, 3, 21, 30, 59):
        seen.page.locator(".t[tabindex]").nth(place).hover()
        wait_for_token(seen.page, place + 1)
        for name in (
            "credit",
            "credit_used",
            "entropy",
            "ratio",
            "sampler_logp",
            "old_logp",
            "weight",
            "temperature",
            "fai",
        ):
            assert panel_value(seen.page, name) == shown(stored[name][place]), (place, name)
        assert panel_value(seen.page, "credit_share") == pytest.approx(
            stored["credit"][place] / stored["advantage"], rel=2e-5
        )
        words = {-1: "at the lower bound", 0: "not clipped", 1: "at the upper bound"}
        assert seen.page.locator('dd[data-quantity="clipped"]').inner_text() == words[int(stored["clipped"][place])]
        kept = "kept" if stored["kept"][place] else "dropped"
        assert seen.page.locator('dd[data-quantity="kept"]').inner_text() == kept
        assert f"id {stored['token_ids'][place]}," in seen.page.locator("#panel .where").inner_text()
    seen.quiet()


def test_keyboard_focus_shows_the_value_too(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report, "q=entropy").page
    page.locator("#list").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    wait_for_token(page, 1)
    for steps in range(1, 6):
        page.keyboard.press("ArrowRight")
        wait_for_token(page, steps + 1)
        assert panel_value(page, "entropy") == shown(rows.iloc[1]["entropy"][steps])
        assert page.evaluate("document.activeElement.classList.contains('t')")
    assert page.locator("#spoken").inner_text().startswith("entropy ")
    assert page.locator(".t[tabindex='0']").count() == 1  # one stop of the tab key
    page.keyboard.press("End")
    wait_for_token(page, 60)
    page.keyboard.press("ArrowUp")
    page.wait_for_function("() => !document.querySelector('#panel .where').textContent.startsWith('token 60')")
    page.keyboard.press("Home")
    wait_for_token(page, 1)
    page.keyboard.press("ArrowDown")
    page.wait_for_function("() => !document.querySelector('#panel .where').textContent.startsWith('token 1 ')")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"


def test_colours_are_those_of_the_scale(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    """Credit above 0 is orange, below 0 blue; 0 and what lies outside the loss is pale."""
    page = visit(report, "q=credit").page
    colors = page.locator(".t[tabindex]").evaluate_all(
        "spans => spans.map(s => getComputedStyle(s).backgroundColor.match(/[0-9]+/g).map(Number))"
    )
    credit = rows.iloc[0]["credit"]
    assert len(colors) == len(credit)
    for (red, _, blue), value in zip(colors, credit, strict=True):
        if abs(value) > 0.2:
            assert (red > blue) == (value > 0), (red, blue, value)
    order = np.argsort(np.abs(credit))
    saturation = [abs(colors[i][0] - colors[i][2]) for i in order]
    assert saturation[-1] > saturation[0] + 20


# Text


def test_hostile_text_is_text(report: Path, visit: Any) -> None:
    seen = visit(report)
    body = seen.page.locator("#cards").text_content()
    assert HOSTILE[0] in body and "<img src=" in body and "onerror=" in body
    assert seen.page.locator("#cards script, #cards img, .list script, .list img").count() == 0
    seen.page.locator(".t", has_text="onerror").first.hover()
    seen.page.wait_for_function("() => document.querySelector('#panel .raw')?.textContent.includes('onerror')")
    assert seen.page.locator("#panel img").count() == 0
    assert seen.page.evaluate("window.broken") is None
    seen.quiet()


def test_markup_cannot_be_made_even_on_purpose(report: Path, visit: Any) -> None:
    """The policy stands behind the script: no inline handler, no evaluation, no HTML from text, no request."""
    page = visit(report).page
    refused = page.evaluate(
        """async () => {
          const script = document.createElement("script");
          const tries = {
            html: () => { document.body.innerHTML = "<img src=x onerror='window.broken = 1'>"; },
            script: () => { script.textContent = "window.broken = 1"; },
            fetch: () => fetch("https://example.org/"),
          };
          const found = [];
          for (const [name, attempt] of Object.entries(tries)) {
            try { await attempt(); } catch { found.push(name); }
          }
          return found;
        }"""
    )
    assert refused == ["html", "script", "fetch"]
    page.evaluate("() => { location.href = 'javascript:window.broken = 1'; }")
    page.wait_for_timeout(100)
    assert page.evaluate("window.broken") is None


def test_white_space_special_and_split_tokens_are_visible(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report).page
    signs = page.locator(".t i").evaluate_all("all => all.map(i => getComputedStyle(i, '::before').content)")
    assert {'"\u00b7"', '"\u21b5"'} <= set(signs)
    assert page.locator("#cards .t.special").last.text_content() == "<|im_end|>"
    assert page.locator("#cards .t.bytes").all_text_contents() == ["F0", "9F", "98", "80"]
    assert page.locator("#cards .boxed").first.text_content() == "U+202E"
    assert "\u202e" not in page.locator("#cards").text_content()
    plain = "".join(page.locator("#cards .t").evaluate_all("all => all.map(s => s.textContent)"))
    assert "\u0645\u0631\u062d\u0628\u0627" in plain  # in the order of reading
    boxes = (
        page.locator(".t", has_text="\u062d\u0628").first.bounding_box(),
        page.locator(".t", has_text="\u0645\u0631").first.bounding_box(),
    )
    if abs(boxes[0]["y"] - boxes[1]["y"]) < 2:  # on one line the later token stands at the left
        assert boxes[0]["x"] < boxes[1]["x"]


# Filters, views, state


def test_filters_by_mouse(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report).page
    page.fill("#step-from", "4")
    page.fill("#step-to", "6")
    assert found(page) == rows["step"].between(4, 6).sum()
    page.select_option("#reward-name", "strict")
    page.fill("#reward-low", "1")
    wanted = rows[rows["step"].between(4, 6) & (rows["reward/strict"] >= 1)]
    assert found(page) == len(wanted)
    page.fill("#group", "1")
    wanted = wanted[wanted["group"] == 1]
    assert found(page) == len(wanted)
    assert entries(page) == [f"step {r.step} · group {r.group} · row {r.row}" for r in wanted.itertuples()]
    page.fill("#prompt-text", "no such prompt")
    assert found(page) == 0
    assert "No completion fits the filters" in page.locator("#cards").text_content()
    page.click("#clear")
    assert found(page) == len(rows)
    page.select_option("#order", "high")
    best = rows["reward"].max()
    assert float(page.locator(".entry .pill").first.inner_text().replace("\u2212", "-")) == pytest.approx(
        best, abs=1e-3
    )


def test_filters_and_colour_by_keyboard(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report).page
    page.locator("#step-from").focus()
    page.keyboard.type("8")
    assert found(page) == (rows["step"] >= 8).sum()
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "quantity":
            break
    else:
        pytest.fail("the tab key does not reach the choice of colours")
    before = page.locator(".t[tabindex]").nth(5).evaluate("s => s.style.backgroundColor")
    chosen = page.locator("#quantity").evaluate("s => s.selectedIndex")
    page.keyboard.press("ArrowDown")
    assert page.locator("#quantity").evaluate("s => s.selectedIndex") == chosen + 1
    page.select_option("#quantity", "old_logp")
    page.wait_for_function(
        "old => document.querySelectorAll('.t[tabindex]')[5].style.backgroundColor !== old", arg=before
    )
    assert page.locator("#legend").get_attribute("aria-label").startswith("Scale of log-probability")


def test_the_group_stands_side_by_side(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report).page
    page.click("#view-group")
    page.wait_for_selector(".many .completion >> nth=3")
    heads = page.locator(".completion h3").all_inner_texts()
    assert heads == [f"Row {row}" for row in range(4)]
    assert page.locator(".completion.chosen h3").inner_text() == "Row 0"
    tops = [box["y"] for box in (page.locator(".completion").nth(i).bounding_box() for i in range(2))]
    assert tops[0] == tops[1]
    page.locator(".completion").nth(0).locator(".t").nth(7).click()
    wait_for_token(page, 8)
    page.keyboard.press("Shift+ArrowRight")
    page.wait_for_function("() => document.querySelector('#panel .where').textContent.endsWith('row 1')")
    assert panel_value(page, "credit") == shown(rows.iloc[1]["credit"][7])
    assert page.locator(".completion.chosen h3").inner_text() == "Row 1"
    assert page.locator(".entry.chosen .where").inner_text().endswith("row 1")
    parts = rows.groupby(["step", "group"])
    (step, number), group = next(item for item in parts if not item[1]["reward"].is_monotonic_decreasing)
    page.select_option("#order", "high")
    for field, value in (("#step-from", step), ("#step-to", step), ("#group", number)):
        page.fill(field, str(value))
    ordered = group.sort_values("reward", ascending=False, kind="stable")["row"]
    wanted = [f"Row {row}" for row in ordered]
    page.wait_for_function(
        "wanted => [...document.querySelectorAll('.completion h3')].map(h => h.textContent).join() === wanted.join()",
        arg=wanted,
    )


def test_the_address_keeps_the_state(report: Path, rows: pd.DataFrame, visit: Any) -> None:
    page = visit(report).page
    page.select_option("#quantity", "entropy")
    page.fill("#step-from", "6")
    page.click("#view-group")
    page.select_option("#theme", "dark")
    page.locator(".entry").nth(2).click()
    page.locator(".completion").nth(2).locator(".t").nth(4).click()
    wait_for_token(page, 5)
    page.wait_for_function("() => location.hash.includes('tok=4')")
    state = page.evaluate("location.hash.slice(1)")
    again = visit(report, state).page
    wait_for_token(again, 5)
    assert again.locator("#quantity").input_value() == "entropy"
    assert again.locator("#step-from").input_value() == "6"
    assert again.evaluate("document.documentElement.dataset.theme") == "dark"
    assert again.locator(".completion").count() == 4
    assert again.locator(".completion.chosen h3").inner_text() == "Row 2"
    assert panel_value(again, "entropy") == shown(rows[(rows["step"] == 6) & (rows["row"] == 2)].iloc[0]["entropy"][4])


def test_a_scale_for_what_is_shown(report: Path, visit: Any) -> None:
    page = visit(report).page
    whole = page.locator("#legend").inner_text()
    page.select_option("#range", "view")
    page.wait_for_function("old => document.querySelector('#legend').innerText !== old", arg=whole)


# Looks

CONTRAST = """() => {
  const parse = text => (text.match(/[0-9.]+/g) ?? []).map(Number);
  const light = ([r, g, b]) => { const f = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b); };
  const back = element => { for (let at = element; at; at = at.parentElement) {
      const color = parse(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] === 1) return color; }
    return [255, 255, 255]; };
  const worst = [];
  for (const element of document.querySelectorAll("main *, header *, footer")) {
    const own = [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest("svg, option, .u-legend")) continue;
    if (!element.checkVisibility({contentVisibilityAuto: true})) continue;
    const [a, b] = [light(parse(getComputedStyle(element).color)), light(back(element))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) worst.push([ratio, element.tagName, element.className, element.textContent.slice(0, 30)]);
  }
  return worst.sort((x, y) => x[0] - y[0]).slice(0, 5);
}"""


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("quantity", ["credit", "entropy", "clipped"])
def test_all_text_has_enough_contrast(report: Path, visit: Any, theme: str, quantity: str) -> None:
    page = visit(report, f"q={quantity}&view=group", dark=theme == "dark").page
    page.locator(".t[tabindex]").nth(3).hover()
    wait_for_token(page, 4)
    assert page.evaluate(CONTRAST) == []


def test_the_theme_can_be_switched(report: Path, visit: Any) -> None:
    page = visit(report).page
    back = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(back)
    token = page.locator(".t[tabindex]").nth(2)
    before = token.evaluate("s => s.style.backgroundColor")
    page.select_option("#theme", "dark")
    assert page.evaluate(back) != light
    page.wait_for_function(
        "old => document.querySelectorAll('.t[tabindex]')[2].style.backgroundColor !== old", arg=before
    )
    assert visit(report, dark=True).page.evaluate(back) == page.evaluate(back)


def test_everything_reachable_has_a_name(report: Path, visit: Any) -> None:
    page = visit(report).page
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("select, input, button, [role=listbox], [role=region], [role=img]")]
             .filter(e => !(e.labels?.length || e.getAttribute("aria-label") || e.textContent.trim() || e.placeholder))
             .map(e => e.outerHTML.slice(0, 80))"""
    )
    assert nameless == []
    page.locator(".entry").first.click()
    page.locator("#list").focus()
    page.keyboard.press("Enter")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # focus is visible


def test_a_narrow_window_keeps_everything(report: Path, visit: Any) -> None:
    page = visit(report, size=(420, 800)).page
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    page.locator(".t[tabindex]").nth(1).click()
    wait_for_token(page, 2)
    assert page.locator("#panel").is_visible()


# Size and speed

FRAMES = """async ([selector, distance, count]) => {
  const box = document.querySelector(selector);
  const times = [];
  let last = await new Promise(requestAnimationFrame);
  for (let i = 0; i < count; i++) {
    box.scrollTop += distance;
    const now = await new Promise(requestAnimationFrame);
    times.push(now - last);
    last = now;
  }
  times.sort((a, b) => a - b);
  return [times[count >> 1], times[Math.floor(count * 0.95)], times[count - 1], box.scrollTop];
}"""


def test_a_thousand_completions_of_a_thousand_tokens(visit: Any, tmp_path: Path, capsys: Any) -> None:
    run = full_run("large", rows=samples(125, 1, 8, 1000, columns="few"), metrics=metrics(1000))
    path = build([run], tmp_path / "report.html", Limits(max_bytes=25_000_000))
    size = path.stat().st_size
    started = time.perf_counter()
    seen = visit(path)
    seconds = time.perf_counter() - started
    page = seen.page
    assert "all 1,000 recorded completions (1,000,000 tokens)" in page.locator("#inspector").inner_text()
    listed = page.evaluate(FRAMES, ["#list", 300, 180])
    one = page.evaluate(FRAMES, ["#cards", 60, 60])
    page.click("#view-group")
    page.wait_for_selector(".many .completion >> nth=7")
    group = page.evaluate(FRAMES, ["#cards", 60, 60])
    in_document = page.locator(".entry").count()
    with capsys.disabled():
        print(f"\n1,000 x 1,000, 4 quantities: {size / 1e6:.1f} MB, opened in {seconds:.2f} s")
        for name, (median, late, longest, _) in (("list", listed), ("completion", one), ("group", group)):
            print(f"  scrolling the {name}: median frame {median:.1f} ms, 95 % {late:.1f} ms, longest {longest:.1f} ms")
    assert size < 25e6
    assert seconds < OPENS_WITHIN
    assert in_document < 40  # virtual: the rest is not there
    assert listed[3] > 40_000
    for median, late, _, _ in (listed, one, group):
        assert median < 34 and late < 100
    page.locator(".t[tabindex]").nth(2).hover()
    wait_for_token(page, 3)
    assert math.isfinite(panel_value(page, "credit"))
    seen.quiet()


def test_a_very_long_completion_is_drawn_in_parts(visit: Any, tmp_path: Path) -> None:
    rows = samples(1, 1, 2, 20_000, columns="few")
    page = visit(build([full_run(rows=rows)], tmp_path / "report.html")).page
    assert page.locator(".t[tabindex]").count() < 8_000
    page.locator("#list").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("End")
    wait_for_token(page, 20_000)
    assert panel_value(page, "entropy") == shown(rows.iloc[0]["entropy"][-1])
