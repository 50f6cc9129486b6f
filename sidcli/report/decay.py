"""Notice that a training makes its student worse, from the proxy metrics of `--eval-every`.

Long trainings of one-step students can over-saturate, collapse or decay while their losses stay finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

IN_A_ROW = 3
"""Consecutive evaluations that are worse than the best one before a run is said to get worse."""
LOOKS = {"saturation": "saturation", "contrast": "contrast", "diversity": "diversity at one prompt"}
"""Proxy metric, relative to the teacher -> its name in a sentence."""
FAR = 1.25
"""Factor between a look and the teacher's from which a sentence names it."""

Records = Mapping[float, Mapping[str, float]]
"""Step -> numbers of metrics.jsonl, in order."""


@dataclass(frozen=True)
class Best:
    """The evaluation with the lowest CMMD to the teacher's images."""

    step: int
    cmmd: float
    high: float
    """Upper end of its 95 % interval."""


def best(records: Records, untrained: bool = False) -> Best | None:
    """Return the best evaluation, the first one of equal ones; None if there is none. With `untrained`, step 0 may be it."""
    found = [(values["proxy_cmmd"], step) for step, values in records.items() if "proxy_cmmd" in values and (step or untrained)]
    if not found:
        return None
    cmmd, step = min(found)
    return Best(int(step), cmmd, records[step].get("proxy_cmmd_high", cmmd))


def worsening(records: Records) -> str | None:
    """Return a sentence if each of the last IN_A_ROW evaluations is worse than the best one beyond both intervals, else None."""
    top = best(records, untrained=True)
    evaluated = [(step, values) for step, values in records.items() if "proxy_cmmd" in values]
    last = evaluated[-IN_A_ROW:]
    if top is None or len(last) < IN_A_ROW or last[0][0] <= top.step:
        return None
    if any(values.get("proxy_cmmd_low", values["proxy_cmmd"]) <= top.high for _, values in last):
        return None
    step, now = last[-1]
    said = f"the student has been getting worse since step {top.step}: CMMD to the teacher {top.cmmd:.4f} there, "
    said += f"{now['proxy_cmmd']:.4f} at step {step:.0f}"
    looks = [
        f"{name} {now[key]:.2f} times the teacher's"
        for look, name in LOOKS.items()
        if (key := f"proxy_{look}") in now and not 1 / FAR < now[key] < FAR
    ]
    return said + (f", {', '.join(looks)}" if looks else "")
