# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: RUF001  (tables of signs that look alike)
r"""One spelling for each way of writing an answer: text to text, nothing is evaluated.

Every step is one pass over at most `MAX_CHARACTERS` characters by a pattern without nested
repetition, so the cost is linear. What comes out is LaTeX without spacing commands, with `\frac`
for every fraction, braces round every argument, and `\text{...}` left in place, because words
decide about units and about lists.
"""

import re

MAX_CHARACTERS = 2000

_SYMBOLS = {
    "−": "-", "–": "-", "—": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
    "÷": r"\div ", "≤": r"\le ", "≥": r"\ge ", "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ",
    "≈": r"\approx ", "±": r"\pm ", "∓": r"\mp ", "∞": r"\infty ", "π": r"\pi ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^{\circ}", "º": r"^{\circ}",
    "′": "'", "’": "'", "“": '"', "”": '"', "∑": r"\sum ", "∏": r"\prod ", "∫": r"\int ",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ",
    "λ": r"\lambda ", "μ": r"\mu ", "ρ": r"\rho ", "σ": r"\sigma ", "φ": r"\phi ",
    "ω": r"\omega ", "ε": r"\epsilon ", "τ": r"\tau ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}", "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}",
    "¾": r"\frac{3}{4}", "⅛": r"\frac{1}{8}", "²": "^{2}", "³": "^{3}", "¹": "^{1}", "⁴": "^{4}",
    "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "（": "(", "）": ")",
    "，": ",", "；": ";", "：": ":", "。": ".", "％": "%", "｜": "|", "…": r"\ldots ",
    "\u00a0": " ", "\u2009": " ", "\u202f": " ", "\u3000": " ", "\u200b": "", "\u200c": "",
    "\u200d": "", "\u2060": "", "\ufeff": "", "\u00ad": "", "\u200e": "", "\u200f": "",
    "∖": r"\setminus ", "∣": "|", "⟨": "(", "⟩": ")",
}  # fmt: skip
_TRANSLATION = str.maketrans(_SYMBOLS)

# A JSON string read once too often turns "\f" of \frac into a control character.
_CONTROLS = [
    (re.compile("\x0c(?=rac|loor|orall)"), r"\\f"),
    (re.compile("\x08(?=inom|egin|eta|ar|oxed|ig)"), r"\\b"),
    (re.compile("\t(?=ext|imes|heta|frac|an\\b|o\\b)"), r"\\t"),
    (re.compile("\r(?=ight|ho|ac)"), r"\\r"),
]
_COMMANDS = {
    "dfrac": "frac", "tfrac": "frac", "cfrac": "frac", "leq": "le", "geq": "ge", "leqslant": "le",
    "geqslant": "ge", "neq": "ne", "lt": "<", "gt": ">", "dbinom": "binom", "tbinom": "binom",
    "choose": "choose", "mbox": "text", "hbox": "text", "textrm": "text", "textit": "text",
    "textbf": "text", "textnormal": "text", "textsf": "text", "textup": "text", "mathrm": "text",
    "mathtext": "text", "mathsf": "text", "infin": "infty", "varnothing": "emptyset",
    "approxeq": "approx", "thickapprox": "approx", "simeq": "approx", "colon": ":",
    "lbrack": "[", "rbrack": "]", "lvert": "|", "rvert": "|", "vert": "|", "mid": "|",
    "lbrace": r"\{", "rbrace": r"\}", "langle": "(", "rangle": ")", "dots": "ldots",
    "cdots": "ldots", "dotsc": "ldots", "dotsb": "ldots", "ast": "*", "arcsin": "asin",
    "arccos": "acos", "arctan": "atan", "varphi": "phi", "varepsilon": "epsilon", "iff": "iff",
    "lg": "log", "tg": "tan", "ctg": "cot", "cosec": "csc", "degree": "^{\\circ}",
    "degrees": "^{\\circ}", "textdegree": "^{\\circ}", "textcirc": "^{\\circ}", "prime": "'",
    "euro": "€", "pounds": "£", "land": r"\text{ and }", "lor": r"\text{ or }",
    "vee": r"\text{ or }", "wedge": r"\text{ and }", "cupdot": r"\uplus ", "newline": " ",
    "quad": r"\ ", "qquad": r"\ ", "enspace": r"\ ", "thinspace": "", "medspace": "",
}  # fmt: skip
_DROPPED = frozenset(
    [
        "left",
        "right",
        "big",
        "Big",
        "bigg",
        "Bigg",
        "bigl",
        "bigr",
        "Bigl",
        "Bigr",
        "biggl",
        "biggr",
        "Biggl",
        "Biggr",
        "displaystyle",
        "textstyle",
        "limits",
        "nolimits",
        "mathit",
        "mathbf",
        "boldsymbol",
        "bm",
        "mathord",
        "mathbin",
        "operatorname",
        "scriptstyle",
        "rm",
        "it",
        "bf",
        "hfill",
        "hspace",
        "phantom",
        "noindent",
        "centering",
    ]
)
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?")
_SPACING = re.compile(r"\\[!,;:> ]|~")
_FRACTION = re.compile(r"\\frac(?!\s*\{)\s*([0-9A-Za-z])\s*(\{|[0-9A-Za-z])?")
_HALF_FRACTION = re.compile(r"(\\frac\{[^{}]*\})\s*([0-9A-Za-z])")
_ROOT = re.compile(r"\\sqrt\s*([0-9A-Za-z])")
_POWER = re.compile(r"\^\s*([0-9A-Za-z]|\\[A-Za-z]+)")
_JOINED = re.compile(r"(?<=\d)(?:\{,\}|,\\!|\\,|\\!|\{\\,\})\s*(?=\d\d\d(?!\d))")
_GROUPED = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d.,]| \d)")
_MIXED = re.compile(r"(?<![\d.^_{/])(\d{1,40})\s+(\d{1,40})\s*/\s*(\d{1,40})(?![\d.])")
_WORDS = re.compile(r"\\text\s*\{([^{}]*)\}")
_ROW = re.compile(r"\\\\(?:\s*\[[^\]]{0,9}\])?(?![A-Za-z])")
ROW = "¶"  # between the rows of a matrix, in place of a double backslash
_LEADING = re.compile(r"\s*(?:\\(?:therefore|Rightarrow|implies|to)(?![A-Za-z])|[:=])\s*")
_NUMBERS_AS_TEXT = re.compile(r"\\text\{([^{}A-Za-z]*)\}")
_GAP = re.compile(r" (?!(?<=[0-9.] )[0-9])")
_SPACES = re.compile(r"\s+")
_TIGHT = re.compile(r" ?([^A-Za-z0-9\\ ]) ?")


def normalize_answer(text: str) -> str:
    r"""Return the canonical spelling of an answer, for comparison and for the parsers.

    Removes what carries no meaning: math delimiters, sizes and spaces, bold marks, a final full
    stop. Unifies what has several spellings: fractions, comparison signs, Unicode signs, text
    commands, thousands separators that are marked as such (`10,\!080`, `10{,}080`, `10\,080`).

    Args:
        text: The answer; only its first `MAX_CHARACTERS` characters are read.

    Returns:
        The canonical text; equal answers may still differ, different ones are never unified.

    Example:
        >>> normalize_answer(r"$\dfrac12 \left( x \right)$."), normalize_answer(r"10{,}080")
        ('\\frac{1}{2}(x)', '10080')
    """
    text = text[:MAX_CHARACTERS]
    for pattern, replacement in _CONTROLS:
        text = pattern.sub(replacement, text)
    text = text.translate(_TRANSLATION)
    if "\\begin" in text:
        text = _ROW.sub(ROW, text)
    elif r"\\" in text:
        text = re.sub(r"\\\\(?=[A-Za-z])", r"\\", text)  # \\frac out of JSON written twice
        text = text.replace(r"\\", " ")
    text = re.sub(r"\\(?:left|right)\s*\.", "", text)
    text = _undelimited(text)
    text = _JOINED.sub("", text)
    text = _COMMAND.sub(_command, text)
    text = text.replace(r"\ ", " ").replace(r"\textbackslash", "\\")
    text = _SPACING.sub(" ", text).replace("\\%", "%").replace("\\#", "#").replace("\\&", "&")
    text = re.sub(r"\{\\(?:rm|bf|it)\s", "{", text)
    text = _braced(text)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    text = _GROUPED.sub(lambda match: match.group().replace(" ", ""), text)
    text = re.sub(r"\^\{?\\circ\s*\}?", "°", text)
    text = _SPACES.sub(" ", text)
    text = _NUMBERS_AS_TEXT.sub(r"\1", text)
    text = text[lead.end() :] if (lead := _LEADING.match(text)) else text
    text = text.replace(r"\{\}", r"\emptyset")
    return _tightened(text).strip(" ;,").rstrip(" .;,")


def without_spaces(text: str) -> str:
    """Return the text without its spaces, but for those that keep two numbers apart.

    Example:
        >>> without_spaces("2 x + 1"), without_spaces("2 3")
        ('2x+1', '2 3')
    """
    return _GAP.sub("", text)


def plain_text(text: str) -> str:
    r"""Return the words of an answer that is prose: no markup, lower case, single spaces.

    Example:
        >>> plain_text(r"\text{Evelyn}."), plain_text(r"\text{(C)}")
        ('evelyn', 'c')
    """
    text = _WORDS.sub(r"\1", text)
    text = re.sub(r"[{}$*\"'`]|\\[A-Za-z]*", " ", text)
    words = _SPACES.sub(" ", text).strip(" .,;:!").casefold()
    return words[1:-1].strip() if re.fullmatch(r"\([a-z]\)", words) else words


def _undelimited(text: str) -> str:
    text = text.strip().strip("*").strip()
    text = re.sub(r"\\[()\[\]]", " ", text)
    text = re.sub(r"\\\$", "＄", text)  # a dollar of money; the others delimit
    if text.count("$") == 1 and re.match(r"\$\s?\d", text):
        text = "＄" + text[1:]
    text = text.replace("$", " ").replace("＄", "$")
    return re.sub(r"\*\*|`", "", text)


def _command(match: re.Match[str]) -> str:
    name = match.group(1)
    if name in _DROPPED:
        return " "
    new = _COMMANDS.get(name, name)
    return "\\" + new + (" " if new != "text" else "") if new.isalpha() else new


def _braced(text: str) -> str:
    text = re.sub(r"\\(frac|sqrt|text|binom)\s+(?=[{\[])", r"\\\1", text)
    text = _FRACTION.sub(_argument_pair, text)
    text = _HALF_FRACTION.sub(r"\1{\2}", text)
    text = _ROOT.sub(r"\\sqrt{\1}", text)
    return _POWER.sub(r"^{\1}", text)


def _argument_pair(match: re.Match[str]) -> str:
    first, second = match.groups()
    if second is None:
        return match.group()
    return rf"\frac{{{first}}}" + (second if second == "{" else f"{{{second}}}")


def _tightened(text: str) -> str:
    r"""Drop spaces beside signs, but not those inside of `\text{...}` nor between words."""
    parts = []
    position = 0
    for match in _WORDS.finditer(text):
        parts.append(_TIGHT.sub(r"\1", text[position : match.start()]))
        parts.append(match.group())
        position = match.end()
    parts.append(_TIGHT.sub(r"\1", text[position:]))
    joined = "".join(parts)
    joined = re.sub(r"(?<=\w) (?=\\)", "", joined)
    return re.sub(r"(\\[A-Za-z]+) (?![A-Za-z])", r"\1", joined)
