"""Tests of the report in Debian's chromium: laptop and phone widths, light and dark."""

import json
import shutil
from pathlib import Path

import pytest
import report_samples as samples

from diva_jax import report
from diva_jax.report.figures import COLOURS

LOOK = Path(__file__).with_name("look.js").read_text()


def browser():
    """Starts chromium without a window and without network services; skips the test if it is not installed."""
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("chromium and chromedriver are not installed (Debian: apt-get install chromium chromium-driver)")
    pytest.importorskip("selenium")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        "headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
        "disable-component-update", "disable-sync", "disable-dev-shm-usage",
    ):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return webdriver.Chrome(options=options, service=Service(driver))


def visit(driver, page, width, scheme):
    """Opens a page at a width and in a colour scheme: (console messages, requested URLs)."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    driver.get(page.as_uri())
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    sent = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return [entry["message"] for entry in driver.get_log("browser")], sent


def test_in_a_browser(tmp_path):
    (steps := tmp_path / "steps").mkdir()
    pages = {"evaluation": report.write(samples.write_full(tmp_path))[0], "run": report.write(tmp_path / "run")[0]}
    pages["steps"] = report.write(samples.write_steps(steps))[0]
    images = {"evaluation": 28 + 8, "run": 0, "steps": 4}  # Of flipped pairs, and of two strips of four.
    driver = browser()
    try:
        for name, page in pages.items():
            for width in (390, 1280):
                for scheme in ("light", "dark"):
                    console, sent = visit(driver, page, width, scheme)
                    assert not console, console
                    assert page.as_uri() in sent  # Requests are recorded; else the next line would pass without them.
                    assert not [url for url in sent if url != page.as_uri() and not url.startswith("data:")]
                    found = driver.execute_script(LOOK)
                    where = (name, width, scheme, found)
                    assert found["scroll"] <= found["window"] <= width and found["charts"] > 1, where
                    assert not any(found[fault] for fault in ("outside", "clipped", "broken", "small")), where
                    assert found["images"] == found["loaded"] == images[name], where
                    page_colour = bytes.fromhex(COLOURS["page"][scheme == "dark"][1:])
                    assert found["background"] == f"rgb({', '.join(map(str, page_colour))})", where
    finally:
        driver.quit()
