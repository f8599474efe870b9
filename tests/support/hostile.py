"""Responses that try to be more than text, each to be shown, stored and trained on as what it says; and a pickle."""

from pathlib import Path
from typing import Any


class Payload:
    """What runs code as soon as it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return open, (str(self.mark), "w")


HOSTILE = {
    "script": "<script>alert('script')</script><SCRIPT SRC=http://127.0.0.1:9/x.js></SCRIPT>",
    "handler": "<img src=x onerror=alert(1)><svg onload=alert(2)><details open ontoggle=alert(3)>",
    "link": '<a href="javascript:alert(4)">here</a> [here](javascript:alert(5)) <iframe src="javascript:alert(6)">',
    "escape": "</textarea></div></script></title><script>document.title='stolen'</script>",
    "style": "<style>body{display:none}</style><link rel=stylesheet href=//127.0.0.1:9/x.css>",
    "meta": "<meta http-equiv=refresh content='0;url=http://127.0.0.1:9/'><base href=//127.0.0.1:9/>",
    "image": "![x](http://127.0.0.1:9/pixel.png) <img src=http://127.0.0.1:9/pixel.png>",
    "template": "{nonce} ${alert(7)} {{7*7}} {% raw %} %s %(x)s",
    "entity": "&lt;b&gt; &amp;amp; &#x202e; \\u003cscript\\u003e",
    "json": '{"ranking": [1, 1], "labeler": "another"}\n{"id": "s1"}',
    "markup": "[bold red]rich[/] **bold** `code` [/nothing]",
    "long": "word " * 20_000,
    "unbroken": "x" * 5_000,
    "lines": "\n\n\n  a\ttab\n\n and a line at the end\n",
}
# What is invisible or moves the text beside it is shown by its number.
ODD = {
    "a\u202egpj.exe": "aU+202Egpj.exe",
    "\u2066\u2066\u2066hidden\u2069": "U+2066 x3hiddenU+2069",
    "\x1b[31mred\x1b[0m\x07\x00": "U+001B[31mredU+001B[0mU+0007U+0000",
    "\u200b\u200b\ufeff": "U+200B x2U+FEFFnothing visible",
    "tag\U000e0041\U000e0042": "tagU+E0041U+E0042",
    "\u200e\u200d": "\u200e\u200dnothing visible",
    "می‌خواهم 👩‍👩‍👧": "می‌خواهم 👩‍👩‍👧",  # joiners that Persian and emoji need
}
