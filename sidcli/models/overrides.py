"""What the user knows better than the files of a model; read before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from sidcli.errors import UsageError

PREDICTIONS = ("auto", "epsilon", "v_prediction")


@dataclass(frozen=True)
class Overrides:
    """What the network predicts, a folder whose JSON files describe a single file, and the size in pixels to draw at (0: the model's own).

    Raises UsageError for a prediction that is none of PREDICTIONS.
    """

    prediction_type: str = "auto"
    model_config: str = ""
    width: int = 0
    height: int = 0

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTIONS:
            raise UsageError(f"--prediction-type must be one of {', '.join(PREDICTIONS)}, not {self.prediction_type!r}")
