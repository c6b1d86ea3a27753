"""What the scripts of this folder share: two paths in, one line out when something is wrong."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # works from a clone that is not installed

from sdv_jax.errors import UserError  # noqa: E402


def run(arguments: Sequence[str], usage: str, action: Callable) -> None:
    """Calls `action` with the two positional arguments; a UserError becomes one line on stderr and exit status 2."""
    try:
        if len(arguments) != 3:
            raise UserError(f"expected {usage}, found {len(arguments) - 1} arguments")
        action(*arguments[1:])
    except UserError as error:
        print(f"{arguments[0]}: error: {error}", file=sys.stderr)
        sys.exit(2)
