"""How external text is shown on a terminal; log lines are treated in the same way."""

import logging

import pytest

from medmax_jax.io.errors import PrintableFormatter, printable_text


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a\tb\nc", "a\tb\nc"),
        ("a\r\nb", "a\nb"),
        ("100%\rgone", "100%\\rgone"),
        ("\x1b[2Jx\x1b]0;t\x07", "\\x1b[2Jx\\x1b]0;t\\x07"),
        ("\x9b2J\x00\x08\x7f", "\\x9b2J\\x00\\x08\\x7f"),
        ("\u202edrow\u2066", "\\u202edrow\\u2066"),
        ("\u2028\ufeff\ud800", "\\u2028\\ufeff\\ud800"),
        ("\xa0\u3000\u202f", "\xa0\u3000\u202f"),  # spaces that scripts and numbers have
        ("نمی\u200cخواهم 👩\u200d⚕️ é 胸部", "نمی\u200cخواهم 👩\u200d⚕️ é 胸部"),
    ],
)
def test_control_characters_are_escaped_and_scripts_are_kept(text, shown):
    assert printable_text(text) == shown
    record = logging.LogRecord("n", logging.INFO, "f", 1, "said %s", (text,), None)
    assert PrintableFormatter("%(message)s").format(record) == f"said {shown}"
