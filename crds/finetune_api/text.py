"""Foreign text, of a manifest, a dataset or a model, where people read it."""


def visible(text: str) -> str:
    """The text with all that cannot be seen spelled out, such as ⟨U+001B⟩: what a terminal obeys, marks of the writing
    direction, line breaks, lone surrogates, which cannot even be written.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else f"⟨U+{ord(c):04X}⟩" for c in text)


def visible_lines(text: str) -> str:
    """The same for a text of several lines."""
    return "\n".join(map(visible, text.split("\n")))
