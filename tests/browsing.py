# SPDX-License-Identifier: Apache-2.0
"""A page in headless Chromium, and short ways to look at it."""

import re
import shutil

from selenium import webdriver
from selenium.webdriver import ActionChains
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait


def start_chromium(profile):
    """Chromium with an empty profile; it logs messages and requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"):
        options.add_argument(f"--{flag}")
    for flag in ("disable-background-networking", "disable-component-update", "disable-sync"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options, Service(shutil.which("chromedriver")))


class Browser:
    """One page at a time."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, page, *, width=1280, dark=False):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [theme]})
        self.driver.get(page.as_uri())

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def click(self, selector):
        """In the middle of the screen: the layer chooser stays at its top."""
        element = self.one(selector)
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    def hover(self, element):
        """In the middle of the screen, and until the page has answered."""
        self.driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        ActionChains(self.driver).move_to_element(element).perform()
        WebDriverWait(self.driver, 10).until(lambda _: self.one("#tip").is_displayed())

    def run(self, script):
        return self.driver.execute_script(f"return {script}")

    def map(self, selector, expression):
        """A JavaScript expression of every element `e`."""
        return self.run(f"[...document.querySelectorAll({selector!r})].map((e) => {expression})")

    def marks(self, figure):
        """(series, index, value, height) of every column."""
        return self.map(
            f"#{figure} rect.mark",
            "[e.dataset.series, Number(e.dataset.index), Number(e.dataset.value), "
            "Number(e.getAttribute('height'))]",
        )

    def chosen_layer(self):
        return int(self.run("document.getElementById('chosen').textContent"))


def luminance(colour):
    """Relative luminance of a CSS colour, as WCAG defines it."""
    parts = [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
    if not colour.startswith("color("):
        parts = [part / 255 for part in parts]
    r, g, b = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(one, other):
    """Of two CSS colours, as WCAG defines it."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def contrasts(browser):
    """Contrast of text to what is behind it."""
    found = {}
    ink = browser.run("getComputedStyle(document.querySelector('svg .in')).fill")
    fills = set(browser.map(".cell", "getComputedStyle(e).fill"))
    fills |= set(browser.map(".token", "getComputedStyle(e).backgroundColor"))
    for fill in fills:
        found[f"number on {fill}"] = contrast(ink, fill)
    for name, text, behind in [
        ("body", "body", "body"),
        ("caption", ".caption", "figure"),
        ("tile", ".tile dt", ".tile"),
        ("tip", "#tip", "#tip"),
    ]:
        colour = browser.run(f"getComputedStyle(document.querySelector({text!r})).color")
        back = browser.run(f"getComputedStyle(document.querySelector({behind!r})).backgroundColor")
        found[name] = contrast(colour, back)
    return found


def overlapping(browser):
    """Pairs of labels of one drawing that cover each other."""
    labels = browser.map(
        "svg",
        "[...e.querySelectorAll('text')].map((t) => [t.textContent, ...Object.values("
        "t.getBoundingClientRect().toJSON()).slice(0, 4)])",
    )
    return [
        (one[0], other[0])
        for drawing in labels
        for i, one in enumerate(drawing)
        for other in drawing[i + 1 :]
        if one[1] + one[3] > other[1] + 1
        and other[1] + other[3] > one[1] + 1
        and one[2] + one[4] > other[2] + 2
        and other[2] + other[4] > one[2] + 2
    ]
