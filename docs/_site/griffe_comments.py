"""What the reference shows of the source beyond its docstrings: the comment above a constant."""

from pathlib import Path

import griffe


class CommentsAsDocstrings(griffe.Extension):
    """Gives a module's constant the comment above it as its docstring."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: object) -> None:
        if attr.docstring is None and attr.parent is not None and attr.parent.is_module and attr.lineno:
            lines = Path(attr.filepath).read_text(encoding="utf-8").splitlines()
            first = attr.lineno - 1
            while first and lines[first - 1].startswith("#"):
                first -= 1
            text = "\n".join(line.removeprefix("#").strip() for line in lines[first : attr.lineno - 1])
            attr.docstring = griffe.Docstring(text or f"`{attr.name}`: a constant.", parent=attr)
