"""`megascale data ...`: the commands of `python -m data_prep`, loaded when one of them is named."""

from __future__ import annotations

from typing import Any

import typer


class WithDataPrep(typer.core.TyperGroup):
    """A group that has the commands of data_prep beside its own.

    They are imported when they are asked for: every other command starts without them.
    """

    def list_commands(self, ctx: Any) -> list[str]:
        """All names, its own first."""
        own = super().list_commands(ctx)
        return [*own, *(name for name in self._data_prep() if name not in own)]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Its own command of that name, else data_prep's."""
        return super().get_command(ctx, cmd_name) or self._data_prep().get(cmd_name)

    def _data_prep(self) -> dict[str, Any]:
        from data_prep.app import app as data_prep_app

        group = typer.main.get_command(data_prep_app)
        assert isinstance(group, typer.core.TyperGroup)
        return dict(group.commands)


app = typer.Typer(cls=WithDataPrep, help="Prepare and look into datasets.", no_args_is_help=True)


@app.callback()
def data() -> None:
    """Prepare and look into datasets."""
