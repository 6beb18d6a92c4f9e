"""The singular values of a model's weights: power laws, the bulk of random entries, spikes, norms and ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import xarray as xr

from workbench.figure import Figure
from workbench.numerics.power_law import Distance
from workbench.numerics.sampling import Draw
from workbench.probe import Cost, Probe, Reading, Value, Variable
from workbench.schema import Choice, Display, Doc, Range
from workbench.spectra import weight_panels as panels
from workbench.spectra.weight_numbers import SHARES, Spectrum, bulk, decompose, sizes, tail
from workbench.spectra.weights import (
    Attention,
    Convolution,
    Reshape,
    Weights,
    coverage_values,
    coverage_words,
    listed,
    weight_matrices,
)
from workbench.subject import Subject


@dataclass(frozen=True)
class WeightSpectra(Probe[Subject]):
    """Eigenvalues x = σ²(W) of every weight matrix: power-law tail, Marchenko-Pastur bulk, spikes, norms and ranks.

    What it measures, layer by layer, from the singular values σ of W alone (x = σ², nothing divided by n):
    ``alpha`` = 1 + n_tail / Σ ln(x_i/x_min), the exponent of p(x) ~ x^-α for x >= ``x_min``, where x_min is the
    eigenvalue that gives the smallest ``distance`` (Kolmogorov-Smirnov) with at least 25 in the tail; ``p_value``, how
    often samples of that law lie as far; log likelihood ratios against an exponential and a cut-off lognormal law.
    ``edge`` = s²(√rows + √columns)², where eigenvalues of independent entries end, s by the median; ``spikes`` above it
    beyond chance (1 %); ``bulk_mass`` and ``bulk_norm``, the shares of eigenvalues and of Σx that random entries
    explain. ``stable_rank`` Σx / x_max, ``effective_rank`` exp(entropy(σ/Σσ)), ``log_norm`` log10 Σx,
    ``log_spectral_norm`` log10 x_max, ``alpha_weighted`` α log10 x_max, ``log_alpha_norm`` log10 Σ x^α.
    Matrices are all floating-point parameters of two or more dimensions, frozen ones too, each tied one once: linear
    layers, embeddings, recurrent weights (gates stacked as stored), attention cut into queries, keys and values,
    parameters beside modules. A convolution is reshaped to (out, in · k²), or as ``convolution`` says, without a
    normalisation. Weights under a parametrisation are taken as the layer uses them. ``analysed`` says which parameters
    are in, and the notes why others are not.

    How to read it: entries at random have ``bulk_mass`` near 1, a small ``bulk_misfit`` and no spikes; training adds
    spikes, then heavy tails. ``power_law`` is true only where nothing speaks against one: p >= 0.1, 2 <= α <= 6, and
    neither other law is better (5 %). Where it is false, α is a number without a law. Look at ``profile_alpha``: an
    exponent that depends on where the tail begins is none.

    What it costs: one decomposition a matrix, rows · columns · min(rows, columns); no example is looked at. Intervals
    and goodness refit the tail ``resamples`` times each, a tenth of a second or two for 500 eigenvalues. Memory: the
    largest matrix three times in float64.

    When it misleads: eigenvalues of one matrix repel each other, they are no independent sample, so intervals and
    p-values are guides. Below 50 eigenvalues no law is fitted (nan, and a note names the layer); with few more, much
    fits. A wide spectrum of any kind can pass for a power law on a short tail. The edge supposes entries of one
    variance; rows of unequal norm (embeddings by frequency) put eigenvalues above it without any learnt direction.
    Rescaling layers against each other changes norms and ``alpha_weighted`` while the network stays the same. "slices"
    and "matrix" of a convolution have different exponents; only "fourier" has the operator's norm, for circular
    padding.

    Errors: ``alpha_error`` is the larger arm of the 95 % interval ``alpha_low`` to ``alpha_high`` (bootstrap with the
    search of x_min, joined with ± 1.96 (α-1)/√n_tail); all else is exact to rounding, or nan. Source: Martin and
    Mahoney 2021; Clauset, Shalizi and Newman 2009; Marchenko and Pastur 1967; Sedghi et al. 2019 for "fourier".
    """

    layers: Annotated[str, Doc("Names or globs of the layers to look at, with commas between; empty for all.")] = ""
    convolution: Annotated[
        Convolution,
        Choice(
            {
                "matrix": "one matrix (out, in · k²)",
                "slices": "the matrices (out, in) at the places of the kernel, together",
                "fourier": "the convolution of an image, circular: a matrix (out, in) at each frequency",
            }
        ),
        Doc("Which matrices a convolution is."),
    ] = "matrix"
    grid: Annotated[int, Range(1, 64, step=1, soft=(4, 32)), Doc('Side of the image for "fourier".')] = 7
    attention: Annotated[
        Attention,
        Choice({"apart": "a matrix each", "together": "one matrix, as stored"}),
        Doc("What queries, keys and values in one tensor are."),
    ] = "apart"
    distance: Annotated[
        Distance,
        Choice({"two-sided": "both steps of the distribution function", "lower": "only the lower, as some tools do"}),
        Doc("Which Kolmogorov-Smirnov distance."),
    ] = "two-sided"
    resamples: Annotated[
        int, Range(0, 5000, step=1, soft=(0, 500)), Doc("Samples for the interval, and for the goodness, of each law.")
    ] = 100
    shown: Annotated[
        str, Doc("Names or globs of the layers whose densities are drawn, * for all; empty for some."), Display()
    ] = ""

    variables: ClassVar[tuple[Variable, ...]] = (
        Variable("eigenvalue", ("layer", "rank"), "squared singular values σ², largest first"),
        Variable("rows", ("layer",), "rows of the matrix"),
        Variable("columns", ("layer",), "columns of the matrix"),
        Variable("blocks", ("layer",), "matrices whose eigenvalues are taken together"),
        Variable("value_count", ("layer",), "number of eigenvalues, blocks · min(rows, columns)"),
        Variable("zeros", ("layer",), "eigenvalues that are zero up to rounding"),
        Variable("alpha", ("layer",), "exponent α of the power-law tail", error="alpha_error"),
        Variable("alpha_error", ("layer",), "larger arm of α's 95 % interval"),
        Variable("alpha_low", ("layer",), "lower end of α's 95 % interval"),
        Variable("alpha_high", ("layer",), "upper end of α's 95 % interval"),
        Variable("x_min", ("layer",), "eigenvalue at which the tail begins"),
        Variable("tail_size", ("layer",), "eigenvalues in the tail"),
        Variable("distance", ("layer",), "Kolmogorov-Smirnov distance between tail and law"),
        Variable("p_value", ("layer",), "share of samples of the law that lie as far from one", error="p_value_error"),
        Variable("p_value_error", ("layer",), "half-width of its 95 % interval, by the number of samples"),
        Variable("exponential_ratio", ("layer",), "log likelihood of the power law less that of the exponential"),
        Variable("exponential_p_value", ("layer",), "how often chance alone gives a ratio so far from zero"),
        Variable("lognormal_ratio", ("layer",), "log likelihood of the power law less that of the lognormal"),
        Variable("lognormal_p_value", ("layer",), "how often a power law gives a ratio so negative"),
        Variable("power_law", ("layer",), "whether nothing speaks against a power law", kind="bool"),
        Variable("profile_alpha", ("layer", "tail_share"), "α with that share of the eigenvalues as the tail"),
        Variable("profile_distance", ("layer", "tail_share"), "distance with that share as the tail"),
        Variable("alpha_weighted", ("layer",), "α log10 x_max", error="alpha_weighted_error"),
        Variable("alpha_weighted_error", ("layer",), "|log10 x_max| times the error of α"),
        Variable("log_alpha_norm", ("layer",), "log10 Σ x^α, at the α that was found"),
        Variable("log_norm", ("layer",), "log10 Σ x = log10 ‖W‖_F²"),
        Variable("log_spectral_norm", ("layer",), "log10 x_max"),
        Variable("spectral_norm", ("layer",), "largest singular value"),
        Variable("frobenius_norm", ("layer",), "Frobenius norm of the matrix"),
        Variable("stable_rank", ("layer",), "Σ x / x_max"),
        Variable("effective_rank", ("layer",), "exp(entropy(σ / Σσ))"),
        Variable("entry_std", ("layer",), "root mean square of the entries"),
        Variable("noise_std", ("layer",), "standard deviation of the entries of the bulk, by its median"),
        Variable("edge_low", ("layer",), "lower Marchenko-Pastur edge"),
        Variable("edge", ("layer",), "upper Marchenko-Pastur edge"),
        Variable("spike_threshold", ("layer",), "what the largest eigenvalue of random entries exceeds once in 100"),
        Variable("spikes", ("layer",), "eigenvalues above the threshold"),
        Variable("bulk_mass", ("layer",), "share of the eigenvalues between the edges, widened by chance"),
        Variable("bulk_norm", ("layer",), "share of Σ x between the edges, widened by chance"),
        Variable("bulk_misfit", ("layer",), "distance of the bulk's quantiles from the law's, over the larger spread"),
        Variable("analysed", ("parameter",), "whether the parameter is in one of the matrices", kind="bool"),
        Variable("vector", ("parameter",), "not analysed: fewer than two dimensions", kind="bool"),
        Variable("left_out", ("parameter",), "not analysed: left out by the setting layers", kind="bool"),
        Variable("not_floating", ("parameter",), "not analysed: not a floating-point tensor", kind="bool"),
        Variable("frozen", ("parameter",), "requires no gradient (analysed all the same)", kind="bool"),
        Variable("entries", ("parameter",), "number of scalars in the parameter"),
    )

    def stream(self, subject: Subject, draw: Draw) -> Iterator[Reading]:
        """Layer by layer: the decomposition and what follows from it at once, then the tail."""
        run = _Run(self, subject, draw)
        for i in range(len(run.weights.matrices)):
            yield from run.layer(i)

    def weights(self, subject: Subject) -> Weights:
        """The matrices that the settings say, and what becomes of each parameter.

        Raises:
            ValueError: ``layers`` names none, or the model has no matrix.
        """
        words = [word.strip() for word in self.layers.split(",") if word.strip()]
        return weight_matrices(subject, Reshape(self.convolution, self.grid), self.attention, words)

    def summary(self, data: xr.Dataset) -> dict[str, Value]:
        """How many layers have a power law, the mean exponent of those that have a fit, spikes, and mean log norms."""
        found: dict[str, Value] = {"layers": data.sizes["layer"]}
        fitted = np.isfinite(data.alpha.values)
        found |= {"fitted": int(fitted.sum()), "power_laws": int(data.power_law.values.sum())}
        if fitted.any():
            error = data.alpha_error.values[fitted]
            found["alpha"] = float(data.alpha.values[fitted].mean())
            found["alpha_error"] = float(np.sqrt((error**2).sum()) / error.size)
            found["alpha_weighted"] = float(data.alpha_weighted.values[fitted].mean())
            weighted = data.alpha_weighted_error.values[fitted]
            found["alpha_weighted_error"] = float(np.sqrt((weighted**2).sum()) / weighted.size)
        for name in ("spikes", "log_norm", "log_spectral_norm", "stable_rank"):
            values = data[name].values[np.isfinite(data[name].values)]
            if values.size:
                found[name] = int(values.sum()) if name == "spikes" else float(values.mean())
        return found

    def figure(self, data: xr.Dataset) -> Figure:
        """Exponents with intervals, spikes and ranks by layer; then the densities of the layers that are shown."""
        by_layer = (panels.exponents(data), panels.spikes(data), panels.ranks(data))
        fitted, laws = int(np.isfinite(data.alpha.values).sum()), int(data.power_law.values.sum())
        note = f"{laws} of {fitted} fitted tails may be power laws; {data.sizes['layer'] - fitted} without a fit"
        columns = 1 if data.sizes["layer"] > panels.CROWD else 2
        return Figure((*by_layer, *panels.densities(data, self.shown)), note=note, columns=columns)

    def estimate(self, subject: Subject) -> Cost:
        """The largest matrix in float64, with LAPACK's copies, and the table of eigenvalues."""
        matrices = self.weights(subject).matrices
        largest = max(math.prod(m.shape) for m in matrices)
        item = 16 if self.convolution == "fourier" else 8
        table = 8 * len(matrices) * max(m.count for m in matrices)
        words = f"one decomposition of each of {len(matrices)} matrices, the largest of {largest} entries"
        return Cost(3 * item * largest + 2 * table, len(matrices), words)


class _Run:
    """What one stream knows so far."""

    def __init__(self, probe: WeightSpectra, subject: Subject, draw: Draw) -> None:
        self.probe, self.subject, self.draw = probe, subject, draw
        self.weights = probe.weights(subject)
        count = len(self.weights.matrices)
        self.rank = max(m.count for m in self.weights.matrices)
        self.values: dict[str, Any] = {
            v.name: np.zeros(self._shape(v, count), bool)
            if v.kind == "bool"
            else np.full(self._shape(v, count), np.nan)
            for v in probe.variables
            if v.dims[0] == "layer"
        } | coverage_values(self.weights.covered)
        self.coords = {
            "layer": np.array([m.name for m in self.weights.matrices]),
            "rank": np.arange(1, self.rank + 1),
            "tail_share": SHARES,
            "parameter": np.array([c.name for c in self.weights.covered]),
        }
        work = np.cumsum([m.work + 1e7 for m in self.weights.matrices])  # a law's fit costs about so much too
        self.shares = np.r_[0.0, work / work[-1]]
        self.refused, self.narrow, self.known = dict[str, list[str]](), list[str](), True

    def _shape(self, variable: Variable, count: int) -> tuple[int, ...]:
        lengths = {"layer": count, "rank": self.rank, "tail_share": SHARES.size}
        return tuple(lengths[d] for d in variable.dims)

    def layer(self, i: int) -> Iterator[Reading]:
        """One layer's readings."""
        matrix, tensors = self.weights.matrices[i], self.weights.tensors
        spectrum = decompose(matrix, matrix.of(tensors), tensors[matrix.part.name].dtype)
        self.known = self.known and spectrum.known
        self.put(i, sizes(spectrum))
        self.values["eigenvalue"][i, : spectrum.sigma.size] = spectrum.sigma**2
        found, missing = bulk(spectrum)
        self.put(i, found)
        self.narrow += [matrix.name] if missing else []
        yield self.report(0.5 * (self.shares[i] + self.shares[i + 1]))
        self.fit(i, spectrum)
        yield self.report(float(self.shares[i + 1]), last=i + 1 == len(self.weights.matrices))

    def fit(self, i: int, spectrum: Spectrum) -> None:
        """The power law of one layer, or the reason that there is none."""
        found, missing = tail(spectrum, self.draw.generator(i), self.probe.resamples, self.probe.distance)
        self.put(i, found)
        if missing:
            self.refused.setdefault(missing, []).append(spectrum.matrix.name)

    def put(self, i: int, found: dict[str, Any]) -> None:
        """Numbers of one layer into their places."""
        for name, value in found.items():
            self.values[name][i] = value

    def report(self, done: float, last: bool = False) -> Reading:
        """The reading of now; converged where every weight was finite."""
        at = 1.0 if last else min(done, 0.999)
        return self.probe.reading(
            at, self.values, coords=self.coords, converged=last and self.known, notes=self.notes()
        )

    def notes(self) -> tuple[str, ...]:
        """What a reader must know about these numbers."""
        said = ["weights only: no example was looked at", *coverage_words(self.weights.covered)]
        if any(m.groups for m in self.weights.matrices):
            said.append(f"convolutions as {self.probe.convolution!r}: {_CONVOLUTION[self.probe.convolution]}")
        said += [f"{listed(names, 20)}: {reason}" for reason, names in self.refused.items()]
        if self.probe.resamples == 0:
            said.append("resamples=0: no goodness of fit, so that nothing is called a power law")
        if self.narrow:
            said.append(f"no Marchenko-Pastur law, too narrow or without rank: {listed(self.narrow, 20)}")
        return tuple(said)


_CONVOLUTION = {
    "matrix": "(out, in/groups · kernel), groups for themselves",
    "slices": "(out, in/groups) at each place of the kernel, without a normalisation",
    "fourier": "circular, stride 1",
}
