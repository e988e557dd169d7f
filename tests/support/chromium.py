"""The machine's Chromium, in which pages are opened; tests/programs/conftest.py starts it."""

import shutil

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
