"""What to emit: the families of operators, their decay kinds and the forms every family has."""

from __future__ import annotations

from dataclasses import dataclass

FORMS = ("naive", "parallel", "chunk", "fused_chunk", "fused_recurrent")


@dataclass(frozen=True)
class Family:
    """One family of operators. Templates see it under the name `family`.

    name: the package that is emitted and the last part of its functions' names (`chunk_retention`).
    decay: the decay kind, which is the stem of the macro file `decay/<decay>.jinja`.
    title: what a docstring calls the family.
    recurrence: the state's recurrence, as a docstring shows it.
    paper: the source that a docstring names.
    """

    name: str
    decay: str
    title: str
    recurrence: str
    paper: str

    def function(self, form: str) -> str:
        """Name of the public function of `form`, for example `chunk_retention`."""
        return f"{form}_{self.name}"

    def kernel(self, form: str) -> str:
        """Name of a form's kernel in configuration files, for example `retention_fused_chunk`."""
        return f"{self.name}_{form}"


RETENTION = Family(
    name="retention",
    decay="head",
    title="retention",
    recurrence="S_t = gamma_h S_{t-1} + k_t v_t^T",
    paper="Sun et al. 2023, Retentive Network, arXiv:2307.08621",
)
LINEAR_ATTENTION = Family(
    name="linear_attention",
    decay="none",
    title="linear attention",
    recurrence="S_t = S_{t-1} + k_t v_t^T",
    paper="Katharopoulos et al. 2020, Transformers are RNNs, arXiv:2006.16236",
)

FAMILIES = (RETENTION,)
KNOWN_FAMILIES = (RETENTION, LINEAR_ATTENTION)
