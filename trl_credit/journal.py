"""A file of JSON lines that only grows: what was written stays, whatever happens to the process that writes."""

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """
    A file of JSON lines to which each row is appended as it comes.

    Args:
        path (`Path`):
            The file. A last line that a killed process left unfinished is cut off; the lines before it are kept.
    """

    def __init__(self, path: Path):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            file.seek(0)
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)

    def rows(self) -> list[Any]:
        """
        All rows, first to last.

        Raises:
            ValueError: If a line is not JSON, with its number.
        """
        return list(read_rows(self.path))

    def append(self, row: Any) -> None:
        """Add a row. It is on the disk when this returns."""
        line = json.dumps(row, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
        with open(self.path, "ab") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path):
    """Rows of a file of JSON lines; a `ValueError` names the line that is not JSON."""
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON: {error}") from None


def write_rows(path: Path, rows: list[Any]) -> None:
    """Write a whole file of JSON lines, or none of it."""
    partial = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "w", encoding="utf-8", errors="surrogatepass") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.replace(path)
