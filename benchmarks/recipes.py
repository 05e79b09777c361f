"""The merges that are measured, in the YAML that both mergekit and pack read."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Job:
    """One merge of the family.

    Attributes:
        method: Name of the merge method.
        base: Whether the base is an input besides the listed models, as `base_model`.
        models: Model name to its parameters.
        parameters: Parameters of the whole merge.
    """

    method: str
    base: bool
    models: Mapping[str, Mapping[str, float]]
    parameters: Mapping[str, float]

    def inputs(self) -> list[str]:
        """Return the names of the models that the merge reads, each once."""
        return list(dict.fromkeys([*(["base"] if self.base else []), *self.models]))

    def recipe(self, folders: Mapping[str, Path], dtype: str) -> str:
        """Return the recipe as YAML.

        Args:
            folders: Model name to folder. mergekit asks the Hub about relative paths, so the
                recipe holds absolute ones.
            dtype: Type to compute in and to write, as torch names it.
        """
        content: dict[str, object] = {"merge_method": self.method}
        if self.base:
            content["base_model"] = str(folders["base"].resolve())
        content["models"] = [
            {"model": str(folders[name].resolve())}
            | ({"parameters": dict(values)} if values else {})
            for name, values in self.models.items()
        ]
        if self.parameters:
            content["parameters"] = dict(self.parameters)
        content["dtype"] = dtype
        return yaml.safe_dump(content, sort_keys=False)


_WEIGHTS = {"tune-1": 0.5, "tune-2": 0.3, "tune-3": 0.4}
_WEIGHTED = {name: {"weight": weight} for name, weight in _WEIGHTS.items()}
_HALVED = {name: {"weight": weight, "density": 0.5} for name, weight in _WEIGHTS.items()}

JOBS = {
    job.method: job
    for job in (
        Job("linear", False, _WEIGHTED, {}),
        Job("slerp", True, {"base": {}, "tune-1": {}}, {"t": 0.4}),
        Job("task_arithmetic", True, _WEIGHTED, {}),
        Job("dare_ties", True, _HALVED, {}),
        Job("ties", True, _HALVED, {}),
    )
}
