"""Files of a library, edited; commands on it, run in this process."""

import json
from collections.abc import Callable

from click.testing import CliRunner, Result

from axolotl_brainstacks import cli
from axolotl_brainstacks.library import Library
from support.random_library import library as library


def edited(library: Library, change: Callable[[dict], object]) -> None:
    path = library.path / "manifest.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def run(library: Library, *arguments: str, answer: str | None = None) -> Result:
    result = CliRunner().invoke(cli.library, [str(library.path), *arguments], input=answer)
    assert result.exception is None or isinstance(result.exception, SystemExit), "no traceback reaches the user"
    return result
