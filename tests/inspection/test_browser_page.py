"""The fixture `browser_page`: what goes wrong on a page must not go unseen."""

from __future__ import annotations


def test_a_sound_page_has_no_problems(browser_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text("<!doctype html><title>Sound</title><p>hello</p><script>console.log('fine')</script>")
    browser_page.goto(file.as_uri())
    assert browser_page.title() == "Sound"
    assert browser_page.problems == []


def test_errors_exceptions_and_requests_are_noticed(browser_page, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(
        "<!doctype html><script>console.error('one'); setTimeout(() => {throw Error('two')}, 0)</script>"
        "<img src='https://example.com/three.png'><img src='four.png'>"
    )
    browser_page.goto(file.as_uri(), wait_until="networkidle")
    problems = "\n".join(browser_page.problems)
    assert "console: one" in problems
    assert "exception: two" in problems
    assert "failed: https://example.com/three.png" in problems
    assert "four.png" in problems
