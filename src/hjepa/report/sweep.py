from dataclasses import dataclass
from typing import Any
@dataclass(frozen=True)
class Branch:
    name: str
    settings: Any
    run: str
    evaluation: Any
    checkpoint: Any
    curves: Any
    links: Any
@dataclass(frozen=True)
class Sweep:
    name: str
    made_at: str
    dataset: Any
    branches: Any
    best: str
    comparisons: Any
    config: str
    links: Any
    reproduce: str
def render_sweep(sweep: Sweep) -> str:
    return " ".join(b.name for b in sweep.branches)
