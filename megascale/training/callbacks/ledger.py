"""What was read of each dataset, kept in checkpoints and proved when a run goes on."""

from __future__ import annotations

from typing import Any

from megascale.data.ledger import Ledger
from megascale.errors import UserError
from megascale.training.callbacks.base import Callback
from megascale.training.state import StepResult
from megascale.training.trainer import Trainer


class LedgerCallback(Callback):
    """Saves the counts of every source; a resume must find them by arithmetic.

    Args:
        ledger: that of the steps.
    """

    name = "ledger"

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._samples_seen = 0
        self._saved: dict[str, Any] = {}

    def on_fit_start(self, trainer: Trainer) -> None:
        """Compare what the checkpoint says with what follows from its samples seen.

        Raises:
            UserError: they differ, so the data is not what was counted.
        """
        self._samples_seen = trainer.state.samples_seen
        found = sorted(_counts(self._ledger.record(self._samples_seen)))
        expected = sorted(_counts(self._saved))
        if self._saved and found != expected:
            raise UserError(
                f"{self._samples_seen:,} samples are (samples, tokens) {found} of the datasets",
                rule=f"the checkpoint counted {expected}",
                remedy="give the data and the settings of data that the run began with",
            )

    def on_step_end(self, trainer: Trainer, result: StepResult) -> None:
        """Where the run stands."""
        self._samples_seen = trainer.state.samples_seen

    def state_dict(self) -> dict[str, Any]:
        """Source -> samples, tokens, epochs."""
        return self._ledger.record(self._samples_seen)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Callback.load_state_dict`."""
        self._saved = state


def _counts(record: dict[str, Any]) -> list[tuple[int, int]]:
    """(samples, tokens) of each source: its path may be another by now."""
    return [(int(count["samples"]), int(count["tokens"])) for count in record.values()]
