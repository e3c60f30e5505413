"""Draw Regions in a real browser: what is drawn is seen, kept, undone and sent, in both of the host's renderers."""

from __future__ import annotations

import json
import re

import pytest
from browser import find_browser, opened, reload
from served import PACK

from modular_concepts.regions.parsing import regions_from_json
from modular_concepts.regions.preview import COLOURS

PAGE = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Canvas.SelectionToolbox": False,
    "Comfy.Minimap.Visible": False,
    "Comfy.RightSidePanel.IsOpen": False,
}
PREPARED = """async () => {
    await app.loadGraphData({nodes: [], links: [], version: 0.4, last_node_id: 0, last_link_id: 0, groups: []});
    const [drawing, preview] = ["DrawRegions", "RegionPreview"].map((name) => LiteGraph.createNode(name));
    [drawing.pos, preview.pos] = [[40, 40], [560, 40]];
    app.graph.add(drawing); app.graph.add(preview); drawing.connect(0, preview, 0);
    app.canvas.ds.scale = 1.1; app.canvas.ds.offset = [40, 60]; app.canvas.setDirty(true, true);
}"""
TEXT = "app.graph._nodes.find((node) => node.comfyClass === 'DrawRegions').widgets.find((one) => one.name === 'json')"


class Editor:
    """The node's editor under a mouse and a keyboard; points are fractions of its picture."""

    def __init__(self, page):
        self.page, self.stage = page, page.locator(".mc-stage")
        self.prompt = page.locator(".mc-prompt")

    @property
    def entries(self) -> list[dict]:
        self.page.wait_for_timeout(700)  # longer than the editor waits for another letter
        return json.loads(self.page.evaluate(TEXT + ".value"))

    def drag(self, start, end):
        place, mouse = self.stage.bounding_box(), self.page.mouse
        start, end = ((place["x"] + place["width"] * x, place["y"] + place["height"] * y) for x, y in (start, end))
        mouse.move(*start)
        mouse.down()
        mouse.move((start[0] + end[0]) / 2, (start[1] + end[1]) / 2)
        mouse.move(*end)
        mouse.up()

    def draw(self, start, end, prompt):
        self.drag(start, end)
        self.page.keyboard.type(prompt)


@pytest.fixture(scope="module")
def browser() -> str:
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium found; install one, or set CHROMIUM_PATH")
    return path


@pytest.fixture(scope="module", params=["classic", "Nodes 2.0"])
def page(request, browser, server):
    server.post("/api/settings", PAGE | {"Comfy.VueNodes.Enabled": request.param == "Nodes 2.0"})
    with opened(browser, server.address) as page:
        yield page


@pytest.fixture
def editor(page):
    page.evaluate(PREPARED)
    page.locator(".mc-stage").wait_for()
    page.wait_for_timeout(1000)  # until the node has its size
    yield Editor(page)
    assert page.faults == []


def test_what_is_drawn_is_kept_and_sent(editor, server):
    editor.draw((0.01, 0.1), (0.49, 0.99), "a <tom> on the beach")
    editor.draw((0.51, 0.3), (0.99, 0.99), "a <minka> on the beach")
    drawn = editor.entries
    assert [entry["prompt"] for entry in drawn] == ["a <tom> on the beach", "a <minka> on the beach"]
    assert drawn[0]["box"][2] == drawn[1]["box"][0] == 0.5, "neighbours that were drawn nearly together share an edge"
    assert drawn[1]["box"][2:] == [1, 1], "an edge close to the picture's lies on it"
    reload(editor.page)
    assert Editor(editor.page).entries == drawn
    with editor.page.expect_response(lambda answer: answer.url.endswith("/api/prompt")) as answered:
        editor.page.get_by_test_id("queue-button").click()
    sent = answered.value.request.post_data_json["prompt"]
    (node,) = [node for node in sent.values() if node["class_type"] == "DrawRegions"]
    assert json.loads(node["inputs"]["json"]) == drawn and set(node["inputs"]) == {"width", "height", "json"}
    assert [region.box for region in regions_from_json(node["inputs"]["json"])] == [tuple(e["box"]) for e in drawn]
    prompt_id = answered.value.json()["prompt_id"]
    for _ in range(600):
        if done := json.loads(server.get(f"/history/{prompt_id}")).get(prompt_id):
            break
        editor.page.wait_for_timeout(200)
    assert done["status"]["status_str"] == "success"


def test_a_box_is_moved_resized_and_given_a_strength(editor):
    editor.draw((0.25, 0.25), (0.5, 0.5), "a dog")
    (entry,) = editor.entries
    assert entry["box"] == [0.25, 0.25, 0.5, 0.5]
    editor.drag((0.4, 0.4), (0.65, 0.65))
    assert editor.entries[0]["box"] == pytest.approx([0.5, 0.5, 0.75, 0.75])
    editor.drag((0.75, 0.75), (0.99, 0.99))
    assert editor.entries[0]["box"] == pytest.approx([0.5, 0.5, 1, 1])
    strength = editor.page.locator(".mc-number").first
    strength.fill("0.4")
    strength.press("Enter")
    assert editor.entries[0]["strength"] == 0.4
    strength.fill("1")
    strength.press("Enter")
    assert "strength" not in editor.entries[0], "what is as usual is not written"


def test_delete_takes_the_box_and_not_the_node_and_undo_brings_it_back(editor):
    editor.draw((0.1, 0.1), (0.4, 0.9), "a cat")
    drawn = editor.entries
    editor.drag((0.25, 0.7), (0.25, 0.7))
    editor.page.keyboard.press("Delete")
    assert editor.entries == []
    editor.page.mouse.click(900, 800)  # the canvas, where shortcuts are heard
    editor.page.keyboard.press("Control+z")
    assert editor.entries == drawn
    editor.page.locator(".mc-box").wait_for()


def test_text_from_elsewhere_is_shown_and_kept_whole(editor):
    entries = [
        {"prompt": "a <tom>", "box": [0, 0, 256, 512], "units": "pixels", "feather": 51.2, "priority": 3},
        {"prompt": "a <minka>", "box": "automatic"},
    ]
    editor.page.evaluate(TEXT + ".value = " + json.dumps(json.dumps(entries)))
    editor.page.locator(".mc-tab").last.wait_for()
    assert editor.page.locator(".mc-tab").all_inner_texts() == ["1 tom", "2 minka (automatic)"]
    assert json.loads(editor.page.evaluate(TEXT + ".value")) == entries, "looking changes nothing"
    editor.draw((0.75, 0.1), (1, 0.9), "a <rex>")
    first, second, third = editor.entries
    assert first == {"prompt": "a <tom>", "box": [0, 0, 0.5, 1], "feather": 0.1, "priority": 3}
    assert second == entries[1] and third["prompt"] == "a <rex>"


def test_text_that_is_no_list_is_left_alone_and_said(editor):
    editor.page.evaluate(TEXT + ".value = '[{'")
    editor.page.locator(".mc-problem").wait_for()
    assert "no JSON" in editor.page.locator(".mc-problem").inner_text()
    assert editor.page.evaluate(TEXT + ".value") == "[{"


def test_a_region_has_the_colour_that_the_preview_gives_it():
    text = (PACK / "js" / "region_boxes.js").read_text(encoding="utf-8")
    listed = text.partition("COLOURS = [")[2].partition("];")[0]
    assert [tuple(map(int, rgb)) for rgb in re.findall(r"\[(\d+), (\d+), (\d+)\]", listed)] == list(COLOURS)
