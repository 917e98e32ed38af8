"""The report page without a browser: what goes into the file, what is left out, and what cannot get in as markup."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from report_page_support import HOSTILE, SPLIT, FakeRun, evaluations, full_run, metrics, recipe, samples

from rltok.config import ConfigError
from rltok.report.html import Limits, build, heatmap
from rltok.report.page import curves, facts
from rltok.report.page.choose import Group, fitting, priority, spread
from rltok.report.page.colors import at, color_table, contrast, luminance, rgb, text_color
from rltok.report.page.encode import pack_counts, pack_floats, pack_small, script_json
from rltok.report.page.quantities import all_quantities, place, scale_range
from rltok.report.page.samples import pack_samples
from rltok.report.page.tokens import TokenTable, shown_bytes


class Page(HTMLParser):
    """A parsed report: elements, visible text and data blocks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.raw = "", path.read_text(encoding="utf-8")
        self._inside: list[str] = []
        self.blocks: dict[str, str] = {}
        self.scripts: list[str] = []
        self.style = ""
        self.feed(self.raw)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script" and dict(attrs).get("type") is None:
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        tag, attributes = self.tags[-1] if self.tags else ("", {})
        if tag == "script" and attributes.get("type"):
            self.blocks[str(attributes["id"])] = self.blocks.get(str(attributes["id"]), "") + data
        elif tag == "script":
            self.scripts[-1] += data
        elif tag == "style":
            self.style += data
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.tags.append(("", {}))

    def data(self, name: str = "page") -> dict:
        return json.loads(self.blocks[name])


def unpacked(text: str) -> bytes:
    return gzip.decompress(base64.b64decode(text))


def unpacked_floats(text: str) -> list[float]:
    """The page's decoder, written a second time."""
    data = unpacked(text)
    count = len(data) // 4
    found = []
    for i in range(count):
        low, middle, high, power = (data[plane * count + i] for plane in range(4))
        if power >= 253:
            found.append({255: math.nan, 254: math.inf, 253: -math.inf}[power])
        else:
            zigzag = low | middle << 8 | high << 16
            found.append(float(f"{-(zigzag >> 1) if zigzag & 1 else zigzag >> 1}e{power - 64}"))
    return found


# Numbers


def test_floats_keep_five_significant_digits() -> None:
    rng = np.random.default_rng(0)
    values = (rng.normal(size=4000) * 10 ** rng.uniform(-30, 30, 4000)).astype(np.float32)
    special = np.array([0, -0.0, 1, -1, 9.99996, 99999.6, 0.1, 1e-38, 3e38, np.nan, np.inf, -np.inf], np.float32)
    values = np.concatenate([values, special])
    found = unpacked_floats(pack_floats(values))
    for value, seen in zip(values.tolist(), found, strict=True):
        if math.isfinite(value):
            assert seen == float(f"{value:.5g}"), value
        else:
            assert math.isnan(value) == math.isnan(seen) and (math.isnan(value) or seen == value)


def test_packed_floats_are_small_and_repeatable() -> None:
    values = np.random.default_rng(0).gamma(0.4, 0.8, 20_000).astype(np.float32)
    assert pack_floats(values) == pack_floats(values)
    assert len(pack_floats(values)) < 4.4 * len(values)
    assert len(pack_floats(np.ones(20_000))) < 200


def test_whole_numbers_come_back() -> None:
    values = np.array([0, 1, 255, 256, 65_536, 3])
    data = np.frombuffer(unpacked(pack_counts(values)), np.uint8).reshape(-1, len(values)).astype(int)
    assert (sum(plane << (8 * i) for i, plane in enumerate(data)) == values).all()
    assert len(unpacked(pack_counts([7, 8]))) == 2
    assert np.frombuffer(unpacked(pack_small([-1, 0, 1, -128])), np.int8).tolist() == [-1, 0, 1, -128]


def test_json_cannot_end_its_script_element() -> None:
    values = {"a": "</script><script>alert(1)</script>", "b": "<!-- \u2028 &amp;"}
    text = script_json(values)
    assert "<" not in text and ">" not in text and "\u2028" not in text
    assert json.loads(text) == values


# Choice of groups


def test_every_prefix_is_spread_over_the_run() -> None:
    order = spread(list(range(101)))
    assert sorted(order) == list(range(101))
    assert order[:5] == [0, 100, 50, 25, 75]
    for count in (3, 5, 9, 17, 33):
        prefix = sorted(order[:count])
        assert max(b - a for a, b in zip(prefix, prefix[1:], strict=False)) <= 2 * 100 / (count - 1) + 1


def test_every_rollout_shows_one_group_before_any_shows_two() -> None:
    groups = [Group(rollout, group, rollout, 4, 100) for rollout in range(5) for group in range(3)]
    order = priority(groups)
    assert {group.rollout for group in order[:5]} == set(range(5))
    assert fitting(order, 250) == sorted(order[:2])
    assert fitting(order, 1) == order[:1]  # never nothing
    assert fitting(order, 1e9, max_rows=9) == sorted(order[:2])


# Tokens


def test_bytes_of_a_split_character_are_shown() -> None:
    texts = ["a", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "b"]
    assert shown_bytes(texts, f"a{SPLIT}b") == {1: "F0", 2: "9F", 3: "98", 4: "80"}
    assert shown_bytes(["\ufffd", "\ufffd", "x"], f"{SPLIT}x") == {0: f"1/2 of {SPLIT}", 1: f"2/2 of {SPLIT}"}
    assert shown_bytes(["<0xE4>", "<0xBD>", "<0xA0>"], "\u4f60") == {0: "E4", 1: "BD", 2: "A0"}
    assert shown_bytes(["ok", "\ufffd"], "ok\ufffd") == {1: "\ufffd"}  # broken in the completion itself
    assert shown_bytes(["a", "b"], "ab") == {}


def test_tokens_of_one_id_share_an_entry() -> None:
    table = TokenTable()
    found = table.index(np.array([5, 7, 5]), ["x", "y", "x"], "xyx")
    assert found.tolist() == [0, 1, 0]
    assert table.columns() == {"ids": [5, 7], "texts": ["x", "y"], "shown": [None, None]}


# Scales and colours


def test_diverging_scales_are_symmetric_about_their_centre() -> None:
    by_name = {quantity.name: quantity for quantity in all_quantities()}
    credit = scale_range(by_name["credit"], [np.array([-1.0, 0.0, 3.0])])
    assert credit.low == pytest.approx(-credit.high) and credit.high > 2.5
    ratio = scale_range(by_name["ratio"], [np.array([0.5, 1.0, 1.5])])
    assert ratio.low * ratio.high == pytest.approx(1.0)
    assert place(by_name["ratio"], ratio, 1.0) == pytest.approx(0.5)
    assert place(by_name["credit"], credit, 99.0) == 1.0


def test_log_probabilities_are_marked_where_they_are_far_from_zero() -> None:
    old = next(quantity for quantity in all_quantities() if quantity.name == "old_logp")
    span = scale_range(old, [np.linspace(-10, 0, 100)])
    assert span.reverse and span.high == 0
    assert place(old, span, -9.0) > place(old, span, -1.0)


def test_constant_or_absent_values_still_make_a_scale() -> None:
    for quantity in all_quantities():
        for part in (np.zeros(0), np.full(5, np.nan), np.ones(5), np.zeros(5)):
            span = scale_range(quantity, [part])
            assert span.low < span.high
            assert 0 <= place(quantity, span, 1.0) <= 1


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_is_readable_on_every_colour(theme: str) -> None:
    table = color_table()[theme]
    backs = [at(table[kind], i / 255) for kind in ("diverging", "sequential") for i in range(256)]
    backs += [rgb(color) for color in [*table["palette"].values(), table["missing"]]]
    assert min(contrast(back, rgb(text_color(back))) for back in backs) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_scales_are_ordered_by_lightness(theme: str) -> None:
    """Readable without seeing hue: the sequential one throughout, the diverging one on either side of its centre."""
    table = color_table()[theme]
    sequential = [luminance(at(table["sequential"], i / 40)) for i in range(41)]
    assert sequential == sorted(sequential, reverse=theme == "light")
    diverging = [luminance(at(table["diverging"], i / 40)) for i in range(41)]
    outwards = [diverging[20::-1], diverging[20:]]
    for side in outwards:
        assert side == sorted(side, reverse=theme == "light")


# Figures


def test_intervals_against_published_numbers() -> None:
    low, high = facts.wilson(81, 263)  # Newcombe 1998a, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    values = {
        "before": {"completions": 80, "means": {"strict": 48 / 80}},
        "after": {"completions": 70, "means": {"strict": 56 / 70}},
    }
    found = facts.change(values, "strict")  # Newcombe 1998b, method 10, example (a)
    assert found is not None and found.low is not None and found.high is not None
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.verdict == "better"


def test_a_small_difference_is_called_noise() -> None:
    found = facts.change(evaluations(0.30, 0.32, 100), "strict")
    assert found is not None and found.verdict == "within noise"
    worse = facts.change(evaluations(0.8, 0.3, 100), "strict")
    assert worse is not None and worse.verdict == "worse"


def test_damaged_evaluations_are_left_out() -> None:
    for broken in (
        None,
        {},
        {"means": None},
        {"completions": 0, "means": {"strict": 1.0}},
        {"completions": 5, "means": 3},
    ):
        assert facts.accuracy(broken, "strict") is None


def test_recipes_are_compared_key_by_key() -> None:
    training = recipe()["training"] | {"learning_rate": 1e-5, "beta": 0.0}
    one = recipe("a", tasks=[{"x": 1}, {"x": 2}])
    two = recipe("a", credit={"type": "uniform"}, objective=None, tasks=[{"x": 1}, {"x": 3}], training=training)
    assert dict(facts.differences([one, two])) == {
        "credit": ["{type: token_group_average, eps: 1e-06}", "{type: uniform}"],
        "objective": ["{type: hapo, alpha: 1.0}", "null"],
        "training.learning_rate": ["0.0002", "1e-05"],
        "training.beta": ["-", "0.0"],
        "tasks[1].x": ["2", "3"],
    }
    assert facts.differences([one, one]) == []


def test_panels_find_the_metrics_of_a_run() -> None:
    found = {panel["key"]: [series["metric"] for series in panel["series"]] for panel in curves.panels(set(metrics(3)))}
    assert found["reward"] == ["reward"]
    assert found["accuracy"] == ["rewards/strict/mean", "rewards/lenient/mean"]
    assert found["rewards"] == ["rewards/short/mean"]
    assert found["entropy"] == ["entropy", "entropy/top20_quantile"]
    assert set(found["time"]) == {"profiling/Time taken: CreditTrainer.generate", "step_time"}
    assert {"length", "credit", "clip", "kl", "mismatch", "speed"} <= set(found)


def test_long_curves_are_thinned_to_means() -> None:
    table = curves.numeric(metrics(1000))
    packed = curves.pack_curves(table, 100)
    values = dict(zip(packed.metrics, np.reshape(unpacked_floats(packed.block), (-1, packed.points)), strict=True))
    assert (packed.points, packed.logged) == (100, 1000)
    assert values["step"][-1] == 1000 and values["trained_tokens"][-1] == 900_000
    assert values["reward"].mean() == pytest.approx(table["reward"].mean(), rel=1e-4)


# The file


def test_the_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    page = Page(build([full_run()], tmp_path / "sub" / "report.html"))
    assert {"summary", "curves", "evaluation", "inspector", "recipes", "environment"} <= {
        attributes.get("id") for _, attributes in page.tags
    }
    for tag, attributes in page.tags:
        assert "src" not in attributes and not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "style" not in attributes, tag  # the policy forbids it
        link = attributes.get("href") or "#"
        assert link.startswith(("#", "data:")), link
    for words in (
        "30.0 %",
        "60.0 %",
        "+30.0 points",
        "24.1 % to 36.7 %",
        "credit token_group_average",
        "0123abc",
        "holds",
    ):
        assert words in page.text, words
    assert "all 48 recorded completions (2,880 tokens)" in page.text
    assert page.data()["samples"][0]["rows"] == 48
    assert not list((tmp_path / "sub").glob("*.part"))


def test_the_policy_names_the_hashes_of_what_is_there(tmp_path: Path) -> None:
    page = Page(build([full_run()], tmp_path / "report.html"))
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy") or ""
    for part in [*page.scripts, page.style]:
        assert base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() in policy
    assert len(page.scripts) == 2
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy


def test_untrusted_text_is_never_markup(tmp_path: Path) -> None:
    bad = HOSTILE[0] + HOSTILE[1] + HOSTILE[2]
    rows = samples()
    rows["prompt"] = bad
    rows = rows.rename(columns={"reward/strict": f"reward/{bad}"})
    logged = metrics().rename(columns={"loss": bad})
    run = full_run(
        bad, path=Path("runs/x"), rows=rows, metrics=logged, recipe=recipe(bad), environment={bad: bad}, problems=[bad]
    )
    run.summary = {"expect": {bad: False}}
    clean = Page(build([full_run()], tmp_path / "clean.html"))
    page = Page(build([run], tmp_path / "bad.html"))
    count = lambda seen, tag: sum(name == tag for name, _ in seen.tags)  # noqa: E731
    assert count(page, "img") == 0
    assert count(page, "script") == count(clean, "script")
    assert bad in page.text
    assert page.data()["runs"] == [bad]


def test_a_page_is_the_same_for_the_same_runs(tmp_path: Path) -> None:
    first = build([full_run()], tmp_path / "a.html").read_bytes()
    assert first == build([full_run()], tmp_path / "b.html").read_bytes()


def test_too_many_completions_are_sampled_and_the_page_says_so(tmp_path: Path) -> None:
    rows = samples(rollouts=30, groups=2, size=4, length=300, columns="few")
    path = build([full_run(rows=rows)], tmp_path / "report.html", Limits(max_bytes=700_000))
    page = Page(path)
    index = page.data()["samples"][0]
    assert path.stat().st_size <= 700_000
    assert 0 < index["rows"] < index["recorded"] == 240
    assert index["rows"] % 4 == 0  # whole groups
    assert f"{index['rows']} of 240 recorded completions" in page.text
    table = json.loads(unpacked(index["table"]))
    assert table["rollout"][0] == 0 and table["rollout"][-1] == 29
    assert len(set(table["rollout"])) >= min(30, index["groups"])


def test_the_size_is_shared_by_several_runs(tmp_path: Path) -> None:
    rows = samples(rollouts=20, groups=2, size=4, length=300, columns="few")
    runs = [full_run(f"run{i}", seed=i, rows=rows) for i in range(3)]
    path = build(runs, tmp_path / "report.html", Limits(max_bytes=1_000_000))
    assert path.stat().st_size <= 1_000_000
    assert all(index["rows"] for index in Page(path).data()["samples"])


def test_packed_columns_are_the_recorded_ones() -> None:
    rows = samples(rollouts=2, groups=2, size=2, length=50)
    packed = pack_samples(FakeRun(rows=rows), 1e6)
    assert packed.index["rows"] == 8 and len(packed.chunks) == 1
    chunk = packed.chunks[0]
    for name in ("credit", "entropy", "ratio", "old_logp"):
        recorded = np.concatenate(list(rows[name])).astype(float)
        assert unpacked_floats(chunk[name]) == [float(f"{value:.5g}") for value in recorded]
    for name in ("clipped", "mark", "in_loss"):
        recorded = np.concatenate(list(rows[name])).astype(int)
        assert np.frombuffer(unpacked(chunk[name]), np.int8).tolist() == recorded.tolist()
    assert set(packed.values) >= {"credit", "credit_share", "mismatch", "entropy"}


def test_columns_a_run_did_not_compute_are_not_offered() -> None:
    rows = samples(rollouts=1, groups=1, size=2, length=50, columns="few")
    rows["fai"] = None
    rows["old_logp"] = [None, np.ones(3)]  # one absent, one of a wrong length
    packed = pack_samples(FakeRun(rows=rows), 1e6)
    assert "fai" not in packed.index["columns"] and "mismatch" not in packed.values
    assert "old_logp" not in packed.chunks[0]


def test_chunks_hold_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rltok.report.page.samples.CHUNK_TOKENS", 150)
    packed = pack_samples(FakeRun(rows=samples(rollouts=3, groups=2, size=2, length=50)), 1e6)
    assert packed.index["chunks"] == [0, 4, 8]
    assert len(packed.chunks) == 3


@pytest.mark.parametrize(
    "run",
    [
        FakeRun(problems=["recipe.yaml is missing", "no step was logged"]),
        full_run(metrics=metrics(1)),
        full_run(rows=pd.DataFrame(), evaluations={}, environment={}),
        full_run(rows=samples(1, 1, 1, 1), summary=None),
        full_run(metrics=pd.DataFrame({"step": [1], "seconds": [1.0], "reward": [None]})),
        full_run(
            metrics=pd.DataFrame({"step": [1, 2], "loss": ["NaN", 1], "note": ["a", None], "list": [[1], {"a": 2}]})
        ),
        full_run(metrics=pd.DataFrame({"step": [1, 2], "loss": [math.inf, -math.inf], "reward": [1e300, -1e-300]})),
        full_run(path=Path("runs/\udce4")),
    ],
    ids=[
        "nothing",
        "one step",
        "no samples",
        "one token",
        "no number",
        "no numbers",
        "infinite",
        "no UTF-8",
    ],
)
def test_whatever_is_missing_gives_a_page(run: FakeRun, tmp_path: Path) -> None:
    page = Page(build([run], tmp_path / "report.html"))
    for problem in run.problems:
        assert problem in page.text
    assert ("not complete" in page.text) == (run.summary is None)


def test_an_empty_completion_is_shown(tmp_path: Path) -> None:
    rows = samples(1, 1, 2, 50, columns="few")
    for name in ("token_ids", "tokens", "credit", "entropy", "ratio", "clipped"):
        rows.at[0, name] = rows[name][0][:0]
    rows.at[0, "completion"] = ""
    index = Page(build([full_run(rows=rows)], tmp_path / "report.html")).data()["samples"][0]
    assert (index["rows"], index["tokens"]) == (2, 50)


def test_several_runs_differ_in_a_table(tmp_path: Path) -> None:
    runs = [full_run("one"), full_run("two", recipe=recipe("two", credit={"type": "uniform"}))]
    page = Page(build(runs, tmp_path / "report.html"))
    assert "Differences" in page.text and "{type: uniform}" in page.text
    same = Page(build([full_run("one"), full_run("two", recipe=recipe("one", seed=0))], tmp_path / "same.html"))
    assert "The recipes are the same." in same.text


def test_a_large_curve_table_stays_small(tmp_path: Path) -> None:
    path = build([full_run(metrics=metrics(5000), rows=pd.DataFrame())], tmp_path / "report.html")
    page = Page(path)
    assert "1,000 points stand for 5,000 logged steps" in page.text
    assert path.stat().st_size < 500_000


def test_limits_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="max_bytes: 10 is too small"):
        Limits(max_bytes=10)
    with pytest.raises(ConfigError, match="max_points: 1 draws no curve"):
        Limits(max_points=1)
    with pytest.raises(ConfigError, match="max_completions: -1 is negative"):
        Limits(max_completions=-1)
    with pytest.raises(ConfigError, match="not unique"):
        build([full_run("a"), full_run("a")], tmp_path / "report.html")
    with pytest.raises(ConfigError, match="at least one run"):
        build([], tmp_path / "report.html")


def test_no_completions_on_request(tmp_path: Path) -> None:
    page = Page(build([full_run()], tmp_path / "report.html", Limits(max_completions=0)))
    assert "no completion is" in page.text and page.data()["samples"][0]["rows"] == 0


# Static fragment


def test_a_heatmap_is_plain_markup_with_exact_values() -> None:
    row = samples(1, 1, 1, 60).iloc[0].to_dict()
    text = heatmap(row, "entropy")
    assert "<script" not in text and "<img" not in text and "&lt;script&gt;" in text
    titles = re.findall(r'title="(\d+): ([-0-9.e+]+) nats"', text)
    assert [(int(place), float(value)) for place, value in titles] == [
        (i, float(f"{value:.5g}")) for i, value in enumerate(row["entropy"].tolist())
    ]
    assert "\u202e" not in text and "[U+202E]" in text
    assert ">F0<" in text


def test_heatmap_marks_what_the_loss_did_not_use() -> None:
    row = {"tokens": ["a", "b", "c"], "credit": [1.0, -1.0, 0.0], "in_loss": [True, True, False], "clipped": [1, -1, 0]}
    spans = re.findall(r"<span style=\"([^\"]*)\" title", heatmap(row))
    assert ["overline" in spans[0], "underline" in spans[1], "line-through" in spans[2]] == [True, True, True]
    assert text_color(rgb("#000000")) == "#ffffff" and text_color(rgb("#ffffff")) == "#000000"


def test_heatmap_refuses_what_it_cannot_colour() -> None:
    with pytest.raises(ValueError, match="'charm' cannot be coloured; allowed: credit"):
        heatmap({"tokens": ["a"]}, "charm")
    with pytest.raises(ValueError, match="needs entropy"):
        heatmap({"tokens": ["a"], "entropy": None}, "entropy")
    with pytest.raises(ValueError, match="one entry per token"):
        heatmap({"tokens": ["a"], "entropy": [1.0, 2.0]}, "entropy")
