# SPDX-License-Identifier: Apache-2.0
"""The page of figures: what it shows is what was observed, in a real browser and without one."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from browsing import Browser, contrasts, luminance, overlapping, start_chromium
from PIL import Image
from refusal import refused
from safetensors.torch import load_file, save_file
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from cmoe_hf.conversion import RequestError, report
from cmoe_hf.conversion.cli import app
from cmoe_hf.conversion.embedded import HELD_OUT
from cmoe_hf.conversion.measure.evaluate import evaluate
from cmoe_hf.conversion.measure.routing import sparse_blocks
from cmoe_hf.conversion.show.observe import observe
from cmoe_hf.conversion.source.calibration import consecutive_windows, tokenize

LENGTH, WINDOWS = 64, 4
QUICK = ["--text", HELD_OUT, "--sequence-length", LENGTH, "--windows", WINDOWS]
WITHIN = {"text": HELD_OUT, "sequence_length": LENGTH, "windows": WINDOWS}
PAGE_ONLY = {**WITHIN, "figures": False}
SAMPLE = "An expert said: </script><b>3 & 4</b> are\nnot “équal” $\\alpha$ <!-- 🎉."
OVER_LAYERS = ("reconstruction-error", "router-agreement", "imbalance", "mass")
IN_LAYER = ("routing", "activation-rate", "hidden-values", "layer-load")
FIGURES = (*OVER_LAYERS, *IN_LAYER, "routing-overview", "expert-load")


def invoke(*arguments):
    return CliRunner().invoke(app, ["report", *map(str, arguments)])


def data_of(folder):
    text = (folder / "index.html").read_text(encoding="utf-8")
    [content] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text)
    return json.loads(content, parse_constant=pytest.fail)


@pytest.fixture(scope="module", autouse=True)
def quiet():
    """As the console command is when nobody watches."""
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.enable_progress_bar()


@pytest.fixture(scope="module")
def plain(embedded, carve, tmp_path_factory):
    """A carved model and its report, as the command makes it. Read only."""
    folder = tmp_path_factory.mktemp("own") / "Tom & $Jerry$ <!--<script>"
    shutil.copytree(carve(embedded, (2, 2, 8)), folder)
    result = invoke(folder, *QUICK, "--dtype", "float32", "--sample", SAMPLE, "--json")
    assert result.exit_code == 0, result.stderr
    return folder, json.loads(result.stdout)


@pytest.fixture
def copy(plain, tmp_path):
    """That model and its report, to write into."""
    return Path(shutil.copytree(plain[0], tmp_path / "again"))


# ---- without a browser


def test_the_files_that_json_names_are_there_and_hold_no_path_and_no_markup(plain):
    folder, printed = plain
    assert printed["output"] == str(folder / "report" / "index.html")
    assert printed["tokens"] == LENGTH * WINDOWS
    assert printed["figures"] == ["expert-load.png", "reconstruction-error.png"]
    written = {path.name: path for path in (folder / "report").iterdir()}
    assert written.keys() == {"index.html", *printed["figures"]}
    for name in printed["figures"]:
        with Image.open(written[name]) as image:
            assert image.width > 500 and image.info["Software"] == "cmoe-hf"
            assert len(image.getcolors(2**20)) > 20  # something is drawn
        assert f"](report/{name})" in (folder / "README.md").read_text()
    for path in (*written.values(), folder / "README.md"):
        for secret in (folder.parent, HELD_OUT.parent, "/root", "/home/"):
            assert str(secret).encode() not in path.read_bytes(), path.name
    text = written["index.html"].read_text(encoding="utf-8")
    assert text.count("</script>") == 2 and "<!--<script>" not in text
    data = data_of(folder / "report")
    assert data["model"]["name"] == folder.name and SAMPLE in "".join(data["sample"]["tokens"])


def test_the_page_holds_what_was_observed(plain):
    folder, printed = plain
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenize(AutoTokenizer.from_pretrained(folder), HELD_OUT.read_text())
    expected = observe(model, consecutive_windows(ids, length=LENGTH)[:WINDOWS])
    data = data_of(folder / "report")
    assert data["perplexity"] == pytest.approx(expected.quality.perplexity, rel=1e-4)
    assert printed["perplexity"] == expected.quality.perplexity
    assert data["model"]["notation"] == "S2A2E8"
    assert data["model"]["chance"] == pytest.approx(1 / 15, rel=1e-4)
    assert data["measured"]["text"] == "heldout.txt"
    assert data["source"]["name"] == "llama-pydoc"
    conversion = json.loads((folder / "conversion.json").read_text())
    for shown, layer, made in zip(
        data["layers"], expected.layers, conversion["layers"], strict=True
    ):
        error = made["relative_output_error"]
        assert shown["relative_output_error"] == pytest.approx(error, rel=1e-4)
        for name in ("loads", "mass", "oracle_agreement", "imbalance"):
            assert shown[name] == pytest.approx(layer[name], rel=1e-4)
        assert shown["activation_rates"]["routed"] == layer["activation_rates"]["routed"]
        assert shown["hidden_values"]["shared"] == layer["hidden_values"]["shared"]
    measured = evaluate(folder, dtype="float32", **WITHIN)
    assert expected.quality.perplexity == pytest.approx(measured.perplexity, rel=1e-5)
    agreements = [layer["oracle_agreement"] for layer in expected.layers]
    mean = sum(agreements) / len(agreements)
    assert mean == pytest.approx(measured.router_oracle_agreement)


def test_a_second_report_replaces_the_first(copy):
    card = copy / "README.md"
    first = card.read_text()
    assert first.count("## Figures") == 1
    (copy / "report" / "mass.png").write_bytes(b"drawn by an earlier release")
    report(copy, **PAGE_ONLY)
    assert [path.name for path in (copy / "report").iterdir()] == ["index.html"]
    second = card.read_text()
    assert second.count("## Figures") == 1 and "](report/index.html)" in second
    assert ".png" not in second  # none were drawn this time
    assert second.split("<!--")[0] == first.split("<!--")[0]
    card.write_bytes((second.replace("\n", "\r\n") + "more\r\n").encode())
    report(copy, **PAGE_ONLY)
    after = card.read_bytes().decode()
    assert after.endswith("more\r\n") and after.count("## Figures") == 1


def test_the_card_is_left_alone_where_the_page_is_elsewhere(copy, hub, tmp_path):
    card = copy / "README.md"
    before = card.read_bytes()
    shutil.rmtree(copy / "report")
    hub.publish("someone/drawn", copy)
    result = report(copy, output=tmp_path / "new" / "page", **PAGE_ONLY)
    assert result.output == str(tmp_path / "new" / "page" / "index.html")
    assert not (copy / "report").exists()
    report(copy, card=False, **PAGE_ONLY)
    assert card.read_bytes() == before
    card.unlink()
    report(copy, **PAGE_ONLY)
    assert not card.exists()
    with pytest.raises(RequestError, match="is on the Hub: give --output"):
        report("someone/drawn", **PAGE_ONLY)
    report("someone/drawn", output=tmp_path / "page", **PAGE_ONLY)
    data = data_of(tmp_path / "page")
    assert data["model"]["name"] == "someone/drawn" and data["source"]["recipe"] == "refined"


@pytest.fixture(scope="module")
def compared(plain, embedded, carve, tmp_path_factory):
    """The page of two models beside the dense one. Read only."""
    folder = shutil.copytree(plain[0], tmp_path_factory.mktemp("own") / plain[0].name)
    record = {"task": "piqa", "metric": "acc_norm", "value": 0.61, "baseline_value": 0.68}
    (folder / "evaluation.json").write_text(json.dumps({"results": [record]}))
    other = carve(embedded, (1, 1, 8))
    options = {"baseline": embedded, "compare": other, "rounds": 1, "dtype": "float32"}
    output = tmp_path_factory.mktemp("compared") / "page"
    return report(folder, output=output, **options, **PAGE_ONLY), other


def test_the_page_opens_with_what_was_gained_and_lost(compared, plain, embedded):
    made, other = compared
    assert made.figures == []
    assert made.gains["columns"] == ["dense", f"{plain[0].name} S2A2E8", f"{other.name} S1A1E8"]
    rows = {row["name"]: row["values"] for row in made.gains["rows"]}
    baseline = {"baseline": embedded, "dtype": "float32"}
    measured = [evaluate(it, **baseline, **WITHIN) for it in (embedded, plain[0], other)]
    apart, same = (row["values"] for row in made.gains["rows"][:2])
    assert apart == pytest.approx([it.divergence for it in measured], abs=1e-6)
    assert same == pytest.approx([it.agreement for it in measured])
    assert apart[0] == 0 < apart[1] and same[0] == 1 > same[1]
    perplexities = [it.perplexity for it in measured]
    assert rows["perplexity on 256 tokens of heldout.txt"] == pytest.approx(perplexities)
    agreements = [it.router_oracle_agreement for it in measured]
    assert rows["the router picks the oracle's experts"] == pytest.approx(agreements)
    assert rows["piqa (acc_norm)"] == [0.68, 0.61, None]
    assert all(speed > 0 for speed in rows["tokens a second, decoding one sequence"])
    dense = AutoModelForCausalLM.from_pretrained(embedded)
    ffn = sum(p.numel() for name, p in dense.named_parameters() if ".mlp." in name)
    whole, *running = rows["parameters run for a token"]
    assert whole == dense.num_parameters()
    router = 2 * 4 * 7 * dense.config.hidden_size
    for run, share in zip(running, (0.5, 0.25), strict=True):
        assert whole - (1 - share) * ffn < run < whole - (1 - share) * ffn + router


def test_what_fails_leaves_the_earlier_report(copy):
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})

    def contents():
        return {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}

    before = contents()
    refused(invoke(copy, *QUICK, "--sample", "Another."), 1, "NaN")
    assert contents() == before


def test_nothing_but_a_report_is_replaced(plain, tmp_path):
    folder, _ = plain
    shutil.copytree(folder / "report", tmp_path / "mine")
    for name in ("index.html", "notes.txt", "mine.png"):
        target = tmp_path / name.partition(".")[0]
        target.mkdir(exist_ok=True)
        (target / name).write_text("mine")
        refused(invoke(folder, *QUICK, "--output", target), 2, "is not a report")
        assert (target / name).read_text() == "mine"
    file = tmp_path / "notes" / "notes.txt"
    for output in (folder, file):
        refused(invoke(folder, *QUICK, "--output", output), 2, "is not a report")
    refused(invoke(folder, *QUICK, "--output", file / "page"), 2, "cannot create")


def test_bad_requests(copy, dense, tmp_path, monkeypatch):
    for arguments, phrases in [
        ([tmp_path / "absent"], ["neither a folder nor"]),
        ([tmp_path], ["no config.json"]),
        ([dense, *QUICK], ["is not a carved model"]),
        ([copy, *QUICK, "--windows", 0], ["--windows is 0"]),
        ([copy, *QUICK, "--rounds", -1], ["--rounds is -1"]),
        ([copy, *QUICK, "--compare", dense], ["is not a carved model"]),
        ([copy, *QUICK, "--baseline", copy], ["is carved itself"]),
        ([copy, *QUICK, "--baseline", tmp_path / "absent"], ["neither a folder nor"]),
        ([copy, *QUICK, "--sequence-length", 1], ["at least 2 tokens"]),
        ([copy, *QUICK, "--sample", "word " * 300], ["--sample has", "at most 200"]),
        ([copy, *QUICK, "--sample", " "], ["--sample is empty"]),
        ([copy, *QUICK, "--dtype", "int3"], ["choose one of float32"]),
        ([copy, *QUICK, "--device", "quantum"], ["cannot be used"]),
        ([copy, "--text", tmp_path / "absent.txt"], ["there is no text file"]),
    ]:
        refused(invoke(*arguments), 2, *phrases)
    (copy / "conversion.json").write_text("{")
    refused(invoke(copy, *QUICK), 2, "conversion.json is not valid JSON")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == "matplotlib" else find(name)
    )
    refused(invoke(copy, *QUICK), 2, "pip install '.[report]'")
    assert not list(dense.glob("*report*"))


@pytest.mark.parametrize("content", [{}, {"layers": [{"relative_output_error": None}] * 2}])
def test_figures_of_another_version_are_not_known(carved, tmp_path, content):
    folder = shutil.copytree(carved, tmp_path / "again")
    (folder / "conversion.json").write_text(json.dumps(content))
    report(folder, **PAGE_ONLY)
    data = data_of(folder / "report")
    assert data["source"] is None
    assert all(layer["relative_output_error"] is None for layer in data["layers"])


# ---- in a browser


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        if os.environ.get("CMOE_REQUIRE_BROWSER") == "1":
            pytest.fail("CMOE_REQUIRE_BROWSER is set, but there is no chromium with chromedriver")
        pytest.skip("no chromium with chromedriver")
    driver = start_chromium(tmp_path_factory.mktemp("profile"))
    yield driver
    driver.quit()


@pytest.fixture
def browser(driver):
    """Afterwards there must be no message on the console, and nothing fetched but the page."""
    driver.get("about:blank")
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # of what was open before
    yield Browser(driver)
    assert driver.get_log("browser") == []
    sent = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [
        it["params"]["request"]["url"] for it in sent if it["method"] == "Network.requestWillBeSent"
    ]
    assert urls and all(re.match(r"data:|file:///.*/index\.html$", url) for url in urls)


def series_of(data, figure, layer):
    """Name and values of every series that a figure of columns draws."""
    layers, here = data["layers"], data["layers"][layer]
    rates = here["activation_rates"]
    return {
        "reconstruction-error": {"relative error": [it["relative_output_error"] for it in layers]},
        "router-agreement": {"router": [it["oracle_agreement"] for it in layers]},
        "imbalance": {"imbalance": [it["imbalance"] for it in layers]},
        "mass": {
            "shared expert": [it["mass"]["shared"] for it in layers],
            "routed, ran": [it["mass"]["ran"] for it in layers],
            "routed, idle": [it["mass"]["idle"] for it in layers],
        },
        "activation-rate": {"shared neurons": rates["shared"], "routed neurons": rates["routed"]},
        "layer-load": {"load": here["loads"]},
    }[figure]


def check_columns(browser, data, figure, layer):
    marks, expected = browser.marks(figure), series_of(data, figure, layer)
    assert len(marks) == sum(map(len, expected.values()))
    scale = max(mark[3] for mark in marks) / max(mark[2] for mark in marks)
    for series, index, value, height in marks:
        assert value == expected[series][index]
        assert height == pytest.approx(value * scale, abs=0.01)


def check_hidden_values(browser, data, layer):
    """Two outlines with a step for every bin, higher where there is more."""
    hidden = data["layers"][layer]["hidden_values"]
    paths = browser.map("#hidden-values path.mark", "e.getAttribute('d')")
    for path, who in zip(paths, ("shared", "routed"), strict=True):
        steps = [float(y) for y in re.findall(r"V([\d.]+)H", path)]
        assert len(steps) == len(hidden[who]) == 49
        order = sorted(range(49), key=lambda i: hidden[who][i])
        heights = [-steps[i] for i in order]
        assert heights == sorted(heights)


def check_routing(browser, data, layer):
    experts = data["sample"]["layers"][layer]["experts"]
    tokens = browser.map(".token", "[e.dataset.experts, e.querySelector('sub').textContent]")
    assert tokens == [[" ".join(map(str, list_)), str(list_[0])] for list_ in experts]
    counts = browser.map(".expert", "e.querySelector('span').textContent")
    for expert, text in enumerate(counts):
        assert text.startswith(f"{sum(expert in list_ for list_ in experts)} token")


def check_layer(browser, data, layer):
    assert browser.chosen_layer() == layer
    check_routing(browser, data, layer)
    check_columns(browser, data, "activation-rate", layer)
    check_columns(browser, data, "layer-load", layer)
    check_hidden_values(browser, data, layer)
    assert set(browser.map("figure .badge", "e.textContent")) == {f"layer {layer}"}
    assert set(browser.map("text.chosen", "e.textContent")) == {str(layer)}


@pytest.fixture
def page(plain):
    return plain[0] / "report" / "index.html"


@pytest.fixture
def data(page):
    return data_of(page.parent)


def test_the_table_of_gains_marks_gains_and_losses(browser, compared):
    browser.open(Path(compared[0].output), width=390)
    rows = compared[0].gains["rows"]
    names = browser.map("#gains tbody th", "e.textContent")
    assert names == [row["name"] for row in rows]
    ways = browser.map(
        "#gains tbody tr", "[...e.querySelectorAll('small')].map((s) => s.className)"
    )
    marks = dict(zip(names, ways, strict=True))
    assert marks["perplexity on 256 tokens of heldout.txt"] == ["lost", "lost"]
    assert marks["FFN neurons run"] == ["gained", "gained"]
    assert marks["piqa (acc_norm)"] == ["lost"] and marks["size of the weights"] == []
    assert "\u22127\u202fpoints, lost" in browser.one("#gains table").text
    assert browser.run("document.documentElement.scrollWidth") <= 390


def test_every_figure_shows_all_of_its_data(browser, page, data):
    browser.open(page)
    assert sorted(browser.map("figure", "e.id")) == sorted(FIGURES)
    for figure in OVER_LAYERS:
        check_columns(browser, data, figure, 0)
    check_layer(browser, data, 0)
    cells = browser.map("#expert-load .cell", "[e.dataset.row, e.dataset.column, e.dataset.value]")
    assert len(cells) == 4 * 6
    for row, column, value in cells:
        assert float(value) == data["layers"][int(column)]["loads"][int(row)]
    cells = browser.map(
        "#routing-overview .cell", "[e.dataset.row, e.dataset.column, e.dataset.value].map(Number)"
    )
    assert len(cells) == 4 * len(data["sample"]["tokens"])
    for row, column, value in cells:
        assert value == data["sample"]["layers"][row]["experts"][column][0]
    chance = browser.map("#router-agreement path.rule", "Number(e.dataset.value)")
    assert chance == [data["model"]["chance"]]
    assert browser.all(".tokens b, .tokens script") == []  # the sample is text
    shown = "".join(browser.map(".token", "e.firstChild.textContent"))
    assert "</script><b>3 & 4</b> are↵" in shown and "🎉" in shown
    assert browser.one("h1").text.startswith("Tom & $Jerry$ <!--<script>")
    assert all(browser.one(f"#{figure} .caption").text for figure in FIGURES)


def test_the_tables_hold_the_data(browser, page, data):
    browser.open(page)
    browser.run("document.querySelectorAll('details').forEach((e) => { e.open = true; })")
    ActionChains(browser.driver).pause(0.1).perform()
    rows = {f: len(browser.all(f"#{f} tr")) - 1 for f in FIGURES}
    bins = len(data["layers"][0]["activation_rates"]["shared"])
    assert rows == {
        **dict.fromkeys(OVER_LAYERS, 4),
        "routing-overview": 4,
        "routing": len(data["sample"]["tokens"]),
        "expert-load": 6,
        "layer-load": 6,
        "activation-rate": bins + 1,
        "hidden-values": 50,
    }
    for layer in data["layers"][:2]:
        last = browser.map("#activation-rate tr:last-child td", "e.textContent")
        rates = layer["activation_rates"]
        assert last == ["never", str(rates["outside_shared"]), str(rates["outside_routed"])]
        browser.one("#next").click()


def test_choosing_a_layer_changes_the_figures_of_the_layer(browser, page, data):
    browser.open(page)
    assert not browser.one("#previous").is_enabled()
    for layer, choose in [
        (1, browser.one("#next").click),
        (2, lambda: browser.one("body").send_keys(Keys.ARROW_RIGHT)),
        (3, lambda: browser.one("#range").send_keys(Keys.ARROW_RIGHT)),
        (2, browser.one("#previous").click),
        (1, lambda: browser.click("#mass .hit[data-layer='1']")),
        (0, lambda: browser.click("#routing-overview .cell[data-row='0'][data-column='5']")),
        (3, lambda: browser.click("#expert-load .cell[data-column='3']")),
    ]:
        choose()
        check_layer(browser, data, layer)
        assert browser.one("#next").is_enabled() == (layer < 3)


def test_a_token_shows_all_of_its_experts(browser, page, data):
    browser.open(page)
    for token in (3, 0):
        browser.hover(browser.all(".token")[token])
        tip = browser.one("#tip")
        assert tip.is_displayed()
        for expert in data["sample"]["layers"][0]["experts"][token]:
            assert f"expert {expert}: p = " in tip.text
        assert tip.text.count("weight 1") == 2
    first = browser.all(".token")[0]
    browser.run("document.querySelector('.token').focus()")
    first.send_keys(Keys.ARROW_RIGHT)
    focused = browser.run("document.activeElement.dataset.token")
    assert focused == "1" and browser.chosen_layer() == 0
    assert "token 1" in browser.one("#tip").text
    first.send_keys(Keys.ESCAPE)
    assert not browser.one("#tip").is_displayed()


def test_an_expert_lights_up_its_tokens(browser, page, data):
    experts = data["sample"]["layers"][0]["experts"]
    expert = experts[0][1]  # a second choice counts too
    browser.open(page)
    button = browser.one(f".expert[data-expert='{expert}']")
    button.click()
    assert button.get_attribute("aria-pressed") == "true"
    lit = browser.map(".token", "[e.matches('.lit'), e.matches('.off')]")
    assert lit == [[expert in list_, expert not in list_] for list_ in experts]
    dim = browser.map("#routing-overview .cell.off", "Number(e.dataset.row)")
    assert len(dim) == sum(expert not in list_ for list_ in experts) and set(dim) == {0}
    button.click()
    assert browser.all(".token.lit, .token.off, .cell.off") == []
    button.click()
    browser.one("#next").click()  # an expert of another layer is another expert
    assert browser.all(".token.lit, [aria-pressed='true']") == []


def test_light_and_dark(browser, page):
    def check(dark):
        background = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (luminance(background) < 0.1) == dark
        assert min(contrasts(browser).values()) > 4.5, contrasts(browser)

    for dark in (False, True):
        browser.open(page, dark=dark)
        check(dark)
        button = browser.one("#theme")
        assert button.text == ("Light" if dark else "Dark")
        for expected in (not dark, dark):
            button.click()
            check(expected)


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_fits_every_screen(browser, page, width):
    browser.open(page, width=width)
    root = "document.documentElement"
    assert browser.run(f"{root}.scrollWidth <= {root}.clientWidth")
    assert browser.run("innerWidth") == width
    assert overlapping(browser) == []
    parts = "header *, figure > *, .tile, .token, .chooser *"
    assert not any(browser.map(parts, "e.getBoundingClientRect().right > innerWidth + 1"))


def test_a_model_with_biases_and_a_pinned_expert(browser, carved, tmp_path):
    """One that somebody trained on and saved: it has no figures of the conversion."""
    model = AutoModelForCausalLM.from_pretrained(carved, dtype=torch.float32)
    for block in sparse_blocks(model):
        block.gate.balance_bias.copy_(torch.rand(6) - 0.5)
        block.gate.balance_bias[1] = 2.0
        block.gate.scale.data = torch.rand(6)
    model.save_pretrained(tmp_path / "again")
    AutoTokenizer.from_pretrained(carved).save_pretrained(tmp_path / "again")
    page = Path(report(tmp_path / "again", **PAGE_ONLY).output)
    layers = data_of(page.parent)["layers"]
    browser.open(page)
    assert "Not known" in browser.one("#reconstruction-error").text
    for name, key in (("with the balance bias", ""), ("without it", "_unbiased")):
        for figure, expected in [
            ("imbalance", [it[f"imbalance{key}"] for it in layers]),
            ("layer-load", layers[0][f"loads{key}"]),
        ]:
            assert [mark[2] for mark in browser.marks(figure) if mark[0] == name] == expected
    assert layers[0]["pinned"] == [1]
    assert browser.map(".expert", "e.textContent")[1] == "1always"
    even = browser.map("#layer-load path.rule", "Number(e.dataset.value)")
    assert even == pytest.approx([(2 - 1) / (6 - 1)])
    browser.hover(browser.one(".token"))
    tip = browser.one("#tip").text
    assert "expert 1: p = " in tip and "always runs" in tip
    for weight in data_of(page.parent)["sample"]["layers"][0]["weights"][0]:
        assert f"weight {weight:.4g}" in tip


@pytest.mark.parametrize("shape", [(4, 0, 8), (0, 3, 8), (3, 5, 8)])
def test_unusual_shapes(browser, dense, carve, tmp_path, shape):
    made = report(carve(dense, shape), output=tmp_path / "page", **PAGE_ONLY)
    browser.open(Path(made.output))
    silent = {f for f in FIGURES if "does not route" in browser.one(f"#{f}").text}
    if shape[1] == 0:
        of_routing = {"routing", "routing-overview", "router-agreement", "imbalance"}
        assert silent == of_routing | {"expert-load", "layer-load"}
        assert len(browser.marks("mass")) == 2 * 2
    else:
        assert silent == set()
        assert len(browser.all(".expert")) == shape[2] - shape[0]
    series = {mark[0] for mark in browser.marks("activation-rate")}
    assert ("shared neurons" in series) == (shape[0] > 0)
    browser.one("#next").click()
    assert browser.chosen_layer() == 1
