"""How Open-Sora 1.x cleans prompts before T5 reads them: the rules of DeepFloyd IF, which PixArt and it took over.

Lower case; no addresses, HTML, @names, CJK, file names, numbers of articles, or advertisement; few kinds of dashes and
quotes. Prompts are cleaned twice, as there. What the library ftfy does in between is here as far as Unicode goes
(ligatures, wide letters, quotes, composed letters); text that was decoded wrongly stays as it is.
"""

import html
import re
import unicodedata
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Literal
from urllib.parse import unquote_plus

Cleaning = Literal["sampling", "always", "never"]  # when captions are cleaned
Rule = tuple[str, str]  # pattern, what stands there instead

_ADDRESS = (
    r"(?:{scheme}:(?:\/{{1,3}}|[a-zA-Z0-9%])|[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@))"
)
_FILES = "(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)"
_DASHES = (
    "\u002d\u058a\u05be\u1400\u1806\u2010-\u2015\u2e17\u2e1a\u2e3a\u2e3b\u2e40"
    "\u301c\u3030\u30a0\ufe31\ufe32\ufe58\ufe63\uff0d"
)
# Strokes, circled and squared words, extension A, hexagrams, unified ideographs; kana stay.
_CJK = (
    "\u31c0-\u31ef",
    "\u31f0-\u31ff",
    "\u3200-\u32ff",
    "\u3300-\u33ff",
    "\u3400-\u4dbf",
    "\u4dc0-\u4dff",
    "\u4e00-\u9fff",
)

BEFORE_HTML: tuple[Rule, ...] = (
    ("<person>", "person"),
    (rf"\b({_ADDRESS.format(scheme='https?')})", ""),
    (rf"\b({_ADDRESS.format(scheme='www')})", ""),
)
SIGNS: tuple[Rule, ...] = (
    (r"@[\w\d]+\b", ""),
    *((f"[{block}]+", "") for block in _CJK),
    (f"[{_DASHES}]+", "-"),
    ("[`´«»“”¨]", '"'),
    ("[‘’]", "'"),
    ("&quot;?", ""),
    ("&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),
    (r"\d:\d\d\s+$", ""),  # the time at the end of an article
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.{_FILES}", ""),
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
WORDS: tuple[Rule, ...] = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b{_FILES}(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
)
ENDS: tuple[Rule, ...] = (
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
)
_LATIN_LIGATURES = {0xFB00 + i: text for i, text in enumerate(("ff", "fi", "fl", "ffi", "ffl", "ſt", "st"))}


def clean_prompt(text: str) -> str:
    """A prompt as the family's text encoder is given it: cleaned twice."""
    return clean_caption(clean_caption(text))


def cleaned(text: str, clean: bool) -> str:
    """``clean_prompt`` where it is wanted; the empty prompt is no prompt, and stays."""
    return clean_prompt(text) if clean and text else text


def lowered(text: str) -> str:
    """A prompt where cleaning is switched off."""
    return text.lower().strip()


def clean_caption(text: str) -> str:
    """Once."""
    text = _by(BEFORE_HTML, unquote_plus(text).strip().lower())
    text = _by(SIGNS, _text_of_html(text))
    if len(re.findall(r"[-_]", text)) > 3:  # this-is-my-cute-cat
        text = re.sub(r"[-_]", " ", text)
    text = _by(WORDS, html.unescape(html.unescape(plain_unicode(text))).strip())
    return _by(ENDS, text.strip()).strip()


def _by(rules: tuple[Rule, ...], text: str) -> str:
    for pattern, instead in rules:
        text = re.sub(pattern, instead, text)
    return text


class _Text(HTMLParser):
    """Gathers what a browser would show."""

    hidden = ("script", "style", "template")

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self._inside = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._inside += tag in self.hidden

    def handle_endtag(self, tag: str) -> None:
        self._inside = max(0, self._inside - (tag in self.hidden))

    def handle_data(self, data: str) -> None:
        if not self._inside:
            self.parts.append(data)


def _text_of_html(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    parser.close()
    return "".join(parser.parts)


def plain_unicode(text: str) -> str:
    """What ftfy does, but for repairing what was decoded wrongly: ligatures and wide letters as plain ones, straight
    quotes, composed letters, no control characters or commands to terminals."""
    text = re.sub("\x1b\\[[0-9;]*[a-zA-Z]", "", text).replace("\ufeff", "")
    text = text.translate(_LATIN_LIGATURES)
    text = "".join(unicodedata.normalize("NFKC", one) if 0xFF01 <= ord(one) <= 0xFFEF else one for one in text)
    text = re.sub("[\u02bc\u2018-\u201b]", "'", re.sub("[\u201c-\u201f]", '"', text))
    text = re.sub("\r\n|[\r\u2028\u2029\u0085]", "\n", unicodedata.normalize("NFC", text))
    kept: Callable[[str], bool] = lambda one: one in "\t\n\f" or unicodedata.category(one) not in ("Cc", "Cs")  # noqa: E731
    return "".join(filter(kept, text))
