"""Prompts in the syntax of the Stable Diffusion web UI, as a reward should read them: the text that is drawn last.

Standard library alone: the script for web UIs carries a copy. The rules are those of the web UI's wiki ("Features":
attention, prompt editing, alternating words, composable diffusion) and of the examples in its prompt_parser.py.
"""

from __future__ import annotations

import re

_NETWORK = re.compile(r"<\w+:[^>]*>")
_PART_WEIGHT = re.compile(r"\s*:\s*([-+]?(?:\d+\.?|\d*\.\d+))\s*$")
_TOKEN = re.compile(r"(?:[^\\\[\]():|]|\\.)+|[\[\]():|]")
_NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
_MARK = re.compile(r"\\([()\[\]\\]?)|([(\[])|:\s*[-+]?[.\d]+\s*(\))|([)\]])|[^\\()\[\]:]+|:")
_PAIRS = {"(": ")", "[": "]"}


def drawn_last(prompt: str, steps: int, *, first_steps: int | None = None, last: int | None = None) -> str:
    """Returns what the last sampling step draws, without the marks of the syntax.

    `[a:b:0.5]`, `[a::0.5]` and `[b:0.5]` are what they have become by then, and `[a|b]` is the word whose turn it is.
    Of `a AND b :-1` the parts with a positive weight count. Marks of emphasis, `<lora:...>` and backslashes are taken
    off; AND and BREAK become commas.

    Args:
        steps: of the last pass; switching points and turns are counted by them.
        first_steps: of the pass before, if the last one is the upscaling of hires. fix.
        last: the last step that is made, from 1; less than `steps` in image to image.
    """
    parts = []
    for part in re.split(r"\bAND\b", _NETWORK.sub("", prompt)):
        weight = _PART_WEIGHT.search(part)
        if weight is None or float(weight[1]) > 0:
            text = _resolve(part[: weight.start()] if weight else part, steps, first_steps, last or steps)
            parts.append(" ".join(_without_emphasis(text).split()))
    return ", ".join(part for part in parts if part)


class _Group:
    """An open bracket and what stands in it: texts and the separators (: and |) between them.

    `whole` is False if a bracket or separator in it is left over, so that no rule holds around it.
    """

    def __init__(self, bracket=""):
        self.bracket, self.texts, self.separators, self.whole = bracket, [""], "", True

    def raw(self):
        """What was written, with resolved groups in place of theirs."""
        separated = (f"{separator}{text}" for separator, text in zip(self.separators, self.texts[1:]))
        return f"{self.bracket}{self.texts[0]}{''.join(separated)}"

    def closed(self, switch, turn):
        """(text, whether it is whole) of a group whose bracket has been closed."""
        raw = f"{self.raw()}{_PAIRS[self.bracket]}"
        if self.whole and self.bracket == "[" and self.separators:
            if set(self.separators) == {"|"}:
                return self.texts[turn % len(self.texts)], True
            number = _NUMBER.fullmatch(self.texts[-1])
            if self.separators in (":", "::") and number:
                before, after = ["", *self.texts[:-1]][-2:]
                return (after if switch(number[1]) else before), True
        allowed = ("", ":") if self.bracket == "(" else ("",)
        return raw, self.whole and self.separators in allowed


def _resolve(prompt, steps, first_steps, last):
    """Resolves prompt editing and alternating words, from the innermost brackets outwards.

    As in the web UI, a bar outside of alternating words, or a backslash at the end, leaves all of the prompt as it is.
    """

    def switch(when):
        first = first_steps or 0
        if "." in when:
            return last > min(steps, int((float(when) - bool(first)) * steps))
        return last > min(steps, int(float(when)) - first)

    def merge_open():
        """Makes text of the brackets that are open: one that is closed wrongly, or never, is no bracket."""
        while len(groups) > 1:
            inner = groups.pop()
            groups[-1].texts[-1] += inner.raw()
            bars.extend("|" * inner.separators.count("|"))
        groups[0].whole = False

    tokens, groups, bars = _TOKEN.findall(prompt), [_Group()], []
    for token in tokens:
        group = groups[-1]
        if token in _PAIRS:
            groups.append(_Group(token))
        elif token in ":|":
            group.separators += token
            group.texts.append("")
        elif token == _PAIRS.get(group.bracket):
            groups.pop()
            text, whole = group.closed(switch, last - 1)
            if not whole or group.bracket == "(":
                bars.extend("|" * group.separators.count("|"))
            groups[-1].texts[-1] += text
            groups[-1].whole &= whole
        elif token in ")]":
            merge_open()
            groups[0].texts[-1] += token
        else:
            group.texts[-1] += token
    merge_open()
    unread = bars or "|" in groups[0].separators or "".join(tokens) != prompt
    return prompt if unread else groups[0].raw()


def _without_emphasis(text):
    """Takes off the brackets of emphasis with their weights, and the backslashes before brackets that are text."""
    kept, open_brackets = [], {"(": 0, "[": 0}
    for mark in _MARK.finditer(text):
        opening, closing = mark[2], mark[3] or mark[4]
        bracket = {")": "(", "]": "["}.get(closing)
        if opening:
            open_brackets[opening] += 1
        elif closing and open_brackets[bracket]:
            open_brackets[bracket] -= 1
        elif mark[1] is not None:
            kept.append(mark[1])
        else:
            kept.append(re.sub(r"\s*\bBREAK\b\s*", ", ", mark[0]))
    return "".join(kept)
