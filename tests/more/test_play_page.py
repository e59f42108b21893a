"""The page to play with in a browser: prompt, edit, compare, inspect, cancel; wide and narrow, light and dark, by keyboard."""

import json

import pytest
from chrome import Browser, Tab
from conftest import each
from test_play import PROMPT, server  # noqa: F401

from demo.lessons import LESSONS, PROMPTS

READY = "typeof options === 'object' && player().document.documentElement.className === 'framed'"
DONE = "!running && race.answers.length === %d"
TOKEN = """(() => { const node = lanes()[%d].querySelector('[data-part="%s"]'), own = node.getBoundingClientRect(),
  frame = $('player').getBoundingClientRect(); return [frame.x + own.x + own.width / 2, frame.y + own.y + own.height / 2]; })()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    try:
        browser = Browser(tmp_path_factory.mktemp("profile"))
    except FileNotFoundError:
        pytest.skip("needs a browser such as chromium")
    yield browser
    browser.close()


@pytest.fixture
def tab(browser, server):  # noqa: F811
    """A page that is ready, with a short prompt; at the end nothing went wrong in it."""
    tab = Tab(browser, f"http://127.0.0.1:{server.server_port}/")
    tab.until(READY)
    fill_in(tab)
    yield tab
    tab.call("Page.close")
    problems, browser.problems = browser.problems, []
    assert not problems


def fill_in(tab, threshold=0.9, **values):
    for name, value in {"prompt": PROMPT, "knob-threshold": threshold, **values}.items():
        tab.js(f"$({name!r}).value = {json.dumps(value)}; $({name!r}).dispatchEvent(new Event('input'))")


def answer(tab, button="ask", answers=1):
    tab.js(f"$({button!r}).click()")
    tab.until(DONE % answers)


def titles(tab):
    return tab.js("[...lanes()].map((lane) => lane.querySelector('h2').textContent)")


def words(tab, lane=0):
    return tab.js(f"[...lanes()[{lane}].querySelectorAll('.span > p')].map((span) => span.textContent)")


def test_three_answers_to_a_prompt_stand_side_by_side_and_a_new_prompt_begins_anew(tab):
    for n, steps in enumerate((0, 0.3, 0.2, 0.1)):
        fill_in(tab, **{"knob-steps_ratio": steps})
        answer(tab, answers=min(n + 1, 3))
    assert titles(tab) == [f"planned · steps_ratio {steps} · threshold 0.9" for steps in (0.3, 0.2, 0.1)]
    assert tab.js("[...lanes()].every((lane) => /[0-9]+ positions/.test(lane.textContent))"), "cost beside each"
    fill_in(tab, prompt="<img src=x onerror=alert(1)>")
    answer(tab)
    assert tab.js("player().document.getElementById('prompt').textContent") == "<img src=x onerror=alert(1)>"
    assert not tab.js("document.images.length + player().document.images.length")


def test_an_error_is_a_sentence_and_a_way_has_its_own_knobs(tab):
    fill_in(tab, threshold=7)
    answer(tab, answers=0)
    assert tab.js("$('status').textContent") == "threshold 7.0: expected at least 0 and at most 1"
    assert tab.js("getComputedStyle($('status')).color !== getComputedStyle(document.body).color")
    for model, prompt in each([("tasks/ar", PROMPT + "?"), ("recipes/ar", PROMPTS["recipes"][0])]):
        tab.js(f"$('prompt').value = {PROMPT + '?'!r}")
        tab.js(f"$('model').value = {model!r}; $('model').dispatchEvent(new Event('change'))")
        assert (
            not tab.js("$('knob-threshold')") and tab.js("$('plan').hidden") and tab.js("$('prompt').value") == prompt
        )


def test_a_plan_is_edited_and_what_changed_is_marked(tab):
    answer(tab)
    chips = "[...$('chips').children].map((chip) => [chip.querySelector('input').value, +chip.querySelector('output').value])"
    assert [name for name, _ in tab.js(chips)] == ["river", "food", "ruler"]
    remove = "$('chips').children[%d].querySelector('[title=Remove]').click()"
    tab.js(f"{remove % 2}; {remove % 1}; $('add').click(); $('add').click()")
    for k, name in ((1, "craft"), (2, "gone")):
        tab.js(
            f"Object.assign($('chips').children[{k}].querySelector('input'), {{value: {name!r}}}).dispatchEvent(new Event('input'))"
        )
    tab.js(remove % 2)
    tab.js("for (const n of [1, 2]) $('chips').children[1].querySelector('[title=Longer]').click()")
    tab.js("$('chips').children[0].querySelector('[title=Shorter]').click()")
    (river, length), (craft, two) = tab.js(chips)
    assert (river, craft, two) == ("river", "craft", 4)
    here = [
        tab.js(
            f"(() => {{ const b = $('chips').children[{k}].firstChild.getBoundingClientRect(); return [b.x + 9, b.y + 9]; }})()"
        )
        for k in (0, 1)
    ]
    tab.mouse("Pressed", *here[0])
    tab.mouse("Moved", *here[1])
    tab.mouse("Released", *here[1])
    assert tab.js(chips) == [["craft", 4], ["river", length]]
    answer(tab, "under", 2)
    assert tab.js("race.answers[1].rounds[0].topics.map((topic) => topic.name[0].text.trim() + topic.length.text)") == [
        "craft 4",
        f"river {length}",
    ]
    assert titles(tab)[1] == f"planned · plan craft 4; river {length} · threshold 0.9"
    marked = tab.js(
        "[...lanes()[1].querySelectorAll('.span > p')].map((span) => span.querySelectorAll('.changed').length)"
    )
    assert marked[0] and marked[0] == tab.js("race.answers[1].rounds[0].spans[0].slots.filter(({text}) => text).length")
    answer(tab, "under", 3)
    assert words(tab, 2) == words(tab, 1) and not tab.js(
        "player().document.querySelectorAll('.answer .changed').length"
    )


def test_words_that_differ_are_those_outside_a_longest_common_subsequence(tab):
    for before, now, expected in each(
        [
            ("a b c", "a x c", ["x"]),
            ("a b", "b a b", ["b"]),
            ("", "a", ["a"]),
            ("a b", "", []),
            ("a b c", "p q a b c", ["p", "q"]),
        ]
    ):
        split = lambda text: json.dumps([{"text": f" {word}", "part": ""} for word in text.split()])
        found = tab.js(f"added(words({split(before)}), words({split(now)})).map(({{word}}) => word.trim())")
        assert sorted(found) == sorted(expected)


def test_a_slot_is_looked_into_at_a_pass(tab):
    fill_in(tab, threshold=0)
    answer(tab)
    slot = tab.js("race.answers[0].rounds[0].spans[0].slots.find(({looks}) => looks.length > 3)")
    (first, _, likeliest), *_ = slot["looks"]
    tab.js(f"player().go({first})")
    tab.click(*tab.js(TOKEN % (0, slot["part"])))
    text = tab.js("$('looked').innerText")
    assert f"masked after pass {first}" in text and f"Likeliest in pass {first}, where " in text
    shown = tab.js("[...document.querySelectorAll('.likely')].map((line) => line.lastChild.textContent)")
    assert shown == [f"{p:.3f}" for _, p in likeliest] and len(shown) == 5
    assert (
        "It sees the prompt, the plan, its own span." in text
        and "It does not see the span “food”, the span “ruler”." in text
    )
    tab.js(f"player().go({slot['since']})")
    assert f"from pass {slot['since']}" in tab.js("$('looked').innerText") and "where" not in tab.js(
        "$('looked').innerText"
    )
    seen = tab.js(
        """[...lanes()[0].querySelectorAll('[data-part]')].map(({dataset, classList}) => [dataset.part, classList.contains('seen')])"""
    )
    assert all(sees == (not part.startswith(("slot-0-1", "slot-0-2"))) for part, sees in seen) and len(seen) > 40
    tab.js("$('after').click()")
    assert tab.js("looked.part") == slot["part"].rsplit("-", 1)[0] + f"-{int(slot['part'].rsplit('-', 1)[1]) + 1}"
    tab.js("player().document.getElementById('answers').click()")
    assert not tab.js("player().document.querySelectorAll('.seen, .looking').length") and not tab.js("$('hint').hidden")


def test_an_answer_is_cancelled_and_another_tab_waits_and_gets_its_own(browser, tab, server):  # noqa: F811
    tab.js(
        "$('model').value = 'tasks/ar'; chooseModel(); $('knob-max_tokens').value = 4000; $('knob-temperature').value = 100"
    )
    tab.js("$('ask').click()")
    tab.until("/^pass [0-9]/.test($('status').textContent)")
    other = Tab(browser, f"http://127.0.0.1:{server.server_port}/")
    other.until(READY)
    fill_in(other)
    other.js("$('ask').click()")
    other.until("$('status').textContent === 'Another page has its turn: this answer waits.'")
    tab.js("$('cancel').click()")
    tab.until(DONE % 0)
    assert tab.js("$('status').textContent") == "Cancelled." and tab.js("$('cancel').disabled")
    other.until(DONE % 1)
    assert titles(other) == ["planned · threshold 0.9"] and not titles(tab)
    other.call("Page.close")


def test_a_lesson_sets_everything_up(tab):
    for key, lesson in each(LESSONS.items()):
        tab.js(f"document.querySelector('a[href=\"#{key}\"]').click()")
        tab.until(f"race.asked === {json.dumps(lesson['prompt'])} && {DONE % len(lesson['runs'])}")
        assert tab.js("$('lesson').textContent") == lesson["say"] and not tab.js("$('lesson').hidden")
        for title, (_, _, settings) in zip(titles(tab), lesson["runs"]):
            assert all(name == "plan" or f"{name} {value}" in title for name, value in settings.items())
    fill_in(tab)
    tab.js("$('model').value = 'tasks/planned'; chooseModel()")
    answer(tab)
    assert tab.js("$('lesson').hidden")


def test_it_fits_wide_and_narrow_and_follows_light_and_dark(tab):
    answer(tab)
    pages = set()
    for width, height, scheme in each(
        [(1280, 800, "light"), (1280, 800, "dark"), (390, 844, "light"), (390, 844, "dark")]
    ):
        tab.look(width, height, scheme)
        assert tab.js("document.documentElement.scrollWidth") <= width
        assert tab.js("player().document.documentElement.scrollWidth <= player().innerWidth")
        small = tab.js("""[...document.querySelectorAll('button, select, textarea, input:not([type=checkbox])')].filter((node) => node.checkVisibility())
          .filter((node) => node.getBoundingClientRect().height < 24).map((node) => node.outerHTML)""")
        assert not small
        colours = tab.js(
            "[document.body, $('prompt'), player().document.body].map((node) => getComputedStyle(node).backgroundColor + getComputedStyle(node).color)"
        )
        pages.add((scheme, *colours))
        if width > 1000:
            assert tab.js(
                "$('player').getBoundingClientRect().bottom < innerHeight && lanes()[0].querySelector('.words').clientHeight > 90"
            )
    assert len(pages) == 2 and all(light != dark for light, dark in zip(*pages)), "in the page and in the player"


def test_the_keyboard_alone_asks_edits_and_looks_inside(tab):
    def reach(what):
        for _ in range(80):
            if tab.js(f"document.activeElement.matches({what!r})"):
                return
            tab.press("Tab")
        raise AssertionError(f"{what} cannot be reached")

    tab.js("$('prompts').focus()")
    reach("#ask")
    tab.press("Enter")
    tab.until(DONE % 1)
    reach(".handle")
    tab.press("ArrowRight")
    assert tab.js("document.activeElement === $('chips').children[1].firstChild")
    assert tab.js("plan.map(({name}) => name).join()") == "food,river,ruler"
    reach("#under")
    tab.press(" ")
    tab.until(DONE % 2)
    reach("#player")
    tab.press("End")
    assert tab.js("player().document.getElementById('slider').value === player().document.getElementById('slider').max")
    reach("#after")
    tab.press("Enter", 3)
    assert tab.js("looked.lane === 1 && document.querySelectorAll('#looked p').length > 1")


def test_a_word_that_was_looked_at_is_let_go_when_another_prompt_is_answered(tab):
    answer(tab)
    tab.js("look(0, 'slot-0-0-3')")
    tab.until("looked")
    fill_in(tab, prompt=PROMPTS["tasks"][3])
    answer(tab)
    assert not tab.js("looked"), "and `tab` sees that nothing went wrong"


def test_what_is_missing_is_said_before_anything_is_asked(tab):
    tab.js("$('prompt').value = ' '; $('ask').click()")
    assert tab.js("$('status').textContent") == "Write a prompt first."
    fill_in(tab)
    answer(tab)
    tab.js("$('add').click(); $('under').click()")
    assert "has no name" in tab.js("$('status').textContent") and tab.js("race.answers.length") == 1


def test_a_plan_goes_with_its_prompt(tab):
    answer(tab)
    assert tab.js("plan.length")
    tab.js("$('prompts').selectedIndex = 2; $('prompts').dispatchEvent(new Event('change'))")
    assert not tab.js("plan.length") and tab.js("$('under').disabled")
