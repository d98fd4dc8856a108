"""Tell of what fails in a step: the first fault with its traceback, the others, which are its echoes, not at all."""

from collegium.fabric import logs

_log = logs.get("engine")


class StepFaults:
    """Owned by the engine's thread."""

    def __init__(self) -> None:
        self._has_told = False

    def begin(self) -> None:
        """Note that a new step begins."""
        self._has_told = False

    def tell(self, **fields: object) -> None:
        """Log the fault that is being handled, if it is the first one of the step."""
        if not self._has_told:
            self._has_told = True
            _log.exception("a step failed", **fields)
