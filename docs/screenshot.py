"""Take the picture of README and guides, docs/found.png: the report of a forward on JAX whose SiLU was ported as
x * sigmoid(1.702 x), against torch.

python docs/screenshot.py [CHROMIUM]     (or make screenshot; Debian's chromium is at /usr/bin/chromium)
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
from playwright.sync_api import sync_playwright

import cli
from stages.commands.backends import BACKENDS
from svf_jax.backend import JaxBackend

DOCS = Path(__file__).resolve().parent
TOKENS = ",".join(str(7 * i % 500) for i in range(1, 25))
RUN = ("--no-progress", "forward", "--no-production", "--dtype", "float32", "--tokens", TOKENS)


class Port(JaxBackend):
    """A port of the forward with another activation."""

    @property
    def forward(self) -> Mapping[str, Callable[..., jax.Array]]:
        return {**super().forward, "ffn_silu": lambda gate: gate * jax.nn.sigmoid(1.702 * gate)}


def svf(*words: str) -> None:
    """`svf WORDS` in this process, whatever it ends with."""
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(sys.stderr):
        cli.app(list(words))


def diverged() -> Path:
    """The report of a port that is wrong."""
    svf(*RUN, "--backend", "torch", "--out", "torch")
    BACKENDS["jax"] = "__main__:Port"
    svf(*RUN, "--backend", "jax", "--out", "jax-port")
    svf("diff", "torch", "jax-port", "--html", "report.html")
    return Path("report.html").resolve()


def photograph(chromium: str, report: Path, target: Path, height: int) -> None:
    """The page's upper part, a desktop's width."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1280, "height": height}, color_scheme="light")
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-ready]")
        page.screenshot(path=target)
        browser.close()


def main() -> None:
    chromium = sys.argv[1] if len(sys.argv) > 1 else "/usr/bin/chromium"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        photograph(chromium, diverged(), DOCS / "found.png", 955)


if __name__ == "__main__":
    main()
