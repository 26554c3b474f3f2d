"""Photograph every page of the built site: narrow and wide, light and dark.

``make screenshots`` writes the pictures to ``build/screenshots``. It also reports pages
that are wider than the window, broken images, and errors on the browser's console.
"""

import itertools
import shutil
import sys
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, sync_playwright

SITE = Path("build") / "docs"
PICTURES = Path("build") / "screenshots"
WIDTHS = {"narrow": 390, "wide": 1280}
SCHEMES: tuple[Literal["light", "dark"], ...] = ("light", "dark")
GENERATED = ("genindex.html", "search.html", "py-modindex.html")

BROKEN_IMAGES = (
    """() => [...document.images].filter(i => !i.naturalWidth).map(i => i.src)"""
)
OVERFLOW = "() => document.documentElement.scrollWidth - window.innerWidth"


def photograph(
    browser: Browser, page_path: Path, size: str, scheme: Literal["light", "dark"]
) -> list[str]:
    """Write a picture of a page, and return what is wrong with it."""
    problems: list[str] = []
    window = {"width": WIDTHS[size], "height": 900}
    page = browser.new_page(viewport=window, color_scheme=scheme)  # type: ignore[arg-type]
    page.on(
        "console",
        lambda message: (
            problems.append(message.text) if message.type == "error" else None
        ),
    )
    page.goto(page_path.resolve().as_uri())
    page.wait_for_load_state("networkidle")
    page.wait_for_timeout(500)  # Formulas are typeset after the page has loaded.
    if (excess := page.evaluate(OVERFLOW)) > 0:
        problems.append(f"{excess} pixels wider than the window")
    problems += [f"broken image {source}" for source in page.evaluate(BROKEN_IMAGES)]
    name = f"{page_path.stem}-{size}-{scheme}.png"
    page.screenshot(path=PICTURES / name, full_page=True)
    page.close()
    return [f"{name}: {problem}" for problem in problems]


def main() -> None:
    """Photograph all pages; fail if something is wrong with one."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("error: chromium is not installed: apt install chromium")
    PICTURES.mkdir(parents=True, exist_ok=True)
    pages = [p for p in sorted(SITE.glob("*.html")) if p.name not in GENERATED]
    problems: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox"]
        )
        for page, size, scheme in itertools.product(pages, WIDTHS, SCHEMES):
            problems += photograph(browser, page, size, scheme)
        browser.close()
    print(*problems, sep="\n")
    print(f"{len(pages)} pages in {PICTURES}")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
