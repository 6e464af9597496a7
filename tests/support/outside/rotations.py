"""The objective of docs/WRITE_AN_OBJECTIVE.md: a vision tower and a linear head, which compile in a moment."""

import commands

exec(commands.blocks("docs/WRITE_AN_OBJECTIVE.md")[0][1])  # noqa: S102
