"""Tables in Markdown."""


def table(rows: list[list[str]]) -> str:
    """Rows as a Markdown table, the first its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])
