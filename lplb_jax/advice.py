"""advise(): which placement, how many redundant slots, what it gains and what it costs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lplb_jax import _cost
from lplb_jax._cost import Costs
from lplb_jax._problem import check_count
from lplb_jax._study import (
    ANY,
    BATCH,
    GIVEN,
    PACKED,
    Ageing,
    Choice,
    Study,
    plans,
    recommended,
    topology_of,
)
from lplb_jax._workload import Workload, find_workload
from lplb_jax.placement import check_nodes


@dataclasses.dataclass(frozen=True)
class Advice:
    """The result of `advise`.

    Attributes:
      choices: everything that was tried.
      recommended: the best of them.
      code: Python that makes the recommended placement and uses it.
      ageing: how the recommended placement ages, or, if copies are chosen per batch, the placement
        on any ranks instead; None if there are too few batches in chronological order.
      before: tokens of every rank in one batch, with experts in the given order.
      after: the same with the recommended choice.
      notes: assumptions behind the figures, in sentences.
    """

    choices: list[Choice]
    recommended: Choice
    code: str
    ageing: Ageing | None
    before: list[int]
    after: list[int]
    notes: list[str]

    def as_dict(self) -> dict[str, Any]:
        """All fields in types that JSON supports."""
        return {
            "choices": [choice._asdict() for choice in self.choices],
            "recommended": self.recommended._asdict(),
            "code": self.code,
            "ageing": None if self.ageing is None else self.ageing._asdict(),
            "before": self.before,
            "after": self.after,
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`as_dict` as text."""
        return json.dumps(self.as_dict(), indent=1)

    def draw(self, path: str | Path) -> None:
        """Writes a picture; needs Matplotlib."""
        from lplb_jax._advice_picture import draw

        found = self.choices, self.recommended, self.ageing, self.before, self.after
        draw(*found).savefig(path)

    def __str__(self) -> str:
        return "\n\n".join(
            ["\n".join(self.notes), self._table(), self._in_words(), "\n".join(self._code())]
        )

    def _table(self) -> str:
        """At most 100 columns wide."""
        baseline = self.choices[0]
        lines = [
            f"{'':18}{'slots':>7}{'busiest rank / mean':>22}{'memory':>12}{'copies':>11}"
            f"{'layer':>10}",
            f"{'placement':18}{'a rank':>7}{'mean':>8}{'p99':>7}{'bound':>7}{'a rank':>12}"
            f"{'a step':>11}{'time':>10}{'gain':>8}",
        ]
        for choice in self.choices:
            mark = "→ " if choice is self.recommended else "  "
            memory = _or_unknown(choice.memory, lambda n: f"{n / 2**30:.2f} GiB")
            traffic = _or_unknown(choice.traffic, lambda n: f"{n / 2**20:.0f} MiB")
            seconds = _or_unknown(choice.seconds, lambda n: f"{1e3 * n:.2f} ms")
            lines.append(
                f"{mark}{choice.placement:16}{choice.redundants:7}"
                f"{choice.mean:8.3f}{choice.p99:7.3f}{choice.bound:7.3f}{memory:>12}"
                f"{traffic:>11}{seconds:>10}{_gain(baseline, choice):7.2f}×"
                f"{'' if choice.fits else ' !'}"
            )
        if not all(choice.fits for choice in self.choices):
            lines.append("! needs more memory than the budget allows")
        return "\n".join(lines)

    def _in_words(self) -> str:
        best, first = self.recommended, self.choices[0]
        sentences = [f"Recommended: {_in_words(best)}: {first.mean:.2f} → {best.mean:.2f} × mean."]
        if best.seconds is not None and first.seconds is not None and best is not first:
            saved = 1e3 * (first.seconds - best.seconds)
            sentences.append(f"It saves an estimated {saved:.2f} ms of every layer.")
        if self.ageing is not None:
            sentences.append(_in_time(best, self.ageing))
        return "\n".join(sentences)

    def _code(self) -> list[str]:
        return ["    " + line for line in self.code.splitlines()]


def _or_unknown(value: float | None, text: Callable[[float], str]) -> str:
    return "—" if value is None else text(value)


def _gain(before: Choice, after: Choice) -> float:
    if before.seconds is None or after.seconds is None:
        return before.mean / after.mean
    return before.seconds / after.seconds


def _in_time(best: Choice, ageing: Ageing) -> str:
    """How long a placement lasts."""
    if ageing.refresh_after is None:
        lasts = f"is as good as a fresh one for {ageing.age[-1]:.0f} batches"
    else:
        lasts = f"should be updated every {ageing.refresh_after} batches"
    if best.placement == ageing.placement:
        return f"It {lasts}."
    return f"It does not age; a placement on {ageing.placement} {lasts}."


def _in_words(choice: Choice) -> str:
    if choice.redundants == 0:
        return f"{choice.placement}, no redundant slots"
    slots = f"{choice.redundants} redundant slot{'s' * (choice.redundants > 1)} per rank"
    return f"{choice.placement}, {slots}"


def advise(
    workload: Any,
    *,
    ep_size: int,
    n_nodes: int = 1,
    redundants: Sequence[int] | None = None,
    topology: str | None = None,
    n_logical: int | None = None,
    top_k: int | None = None,
    tokens_per_rank: int | None = None,
    hidden: int | None = None,
    width: int | None = None,
    bytes_per_expert: float | None = None,
    memory_budget: float | None = None,
    inference: bool = False,
    flops: float = _cost.FLOPS,
    link: float = _cost.LINK,
    node_link: float = _cost.NODE_LINK,
    memory_rate: float = _cost.MEMORY,
    most_layers: int = 4,
    progress: Callable[[float], None] | None = None,
) -> Advice:
    """Recommends a placement and a number of redundant slots for a workload.

    Placements are made from the earlier batches and balanced exactly on the later ones. Times are
    estimates: the busiest rank's GEMMs (or reading its weights, if that takes longer), then the
    exchange of tokens; the transfer of copies overlaps with the GEMMs. The recommendation is the
    fastest choice, or one with fewer redundant slots that is at most 0.5 % slower.

    Args:
      workload: a path of an .npz file; a dict of the same arrays; `lplb_jax.data.Traces`; an array
        like the file's `loads` or a `LoadHistory`; or the name of a model, see
        `lplb_jax._models.MODELS`, whose routing is then synthetic. The file has `loads`, real
        numbers of any dtype `[layers, batches, n_logical]`, `[layers, n_logical]` or
        `[n_logical]`, or `indices`, integers `[layers, tokens, top_k]`, the router's choices; and
        optionally `history`, like loads, of earlier batches. Index −1 means none, and so does an
        unsigned type's maximum, unless it is below n_logical or, for None, the number below it is
        an index as well. Shares, and batches of 2³¹ tokens or more, count as about a million
        tokens.
      ep_size: ranks.
      n_nodes: nodes of `ep_size / n_nodes` ranks each.
      redundants: numbers of redundant slots per rank to try; None for 1, 2, 4 and 8, if
        they fit.
      topology: the only one to try, one of `topologies.NAMED`; None for all that fit all ranks, the
        ranks of a node or, if none fits all ranks, smaller groups.
      n_logical: experts, for ids without loads; None for the largest id + 1.
      top_k: experts per token, for loads; None for 1, which overestimates the exchange.
      tokens_per_rank: tokens per rank and batch. Indices are cut into batches of that size; None
        makes one batch of all tokens of a layer (or, without history, two).
      hidden: size of a token; without it no times are estimated.
      width: inner width of the experts, `[hidden, 2 · width]` and `[width, hidden]`.
      bytes_per_expert: weights of an expert; None for 16-bit floats. Without this and `width`,
        memory, traffic and times are not estimated.
      memory_budget: bytes that the copies of all layers may take on a rank.
      inference: forward only; copies are fetched once. Otherwise they are fetched in every step
        and their gradients are returned.
      flops: floating-point operations per second that a rank's GEMMs reach. The defaults of all
        rates except node_link were measured on H200s.
      link: bytes per second from a rank to others of its node.
      node_link: the same to other nodes.
      memory_rate: bytes per second at which a rank reads weights.
      most_layers: layers to look at, evenly spaced.
      progress: called with the completed fraction, between 0 and 1.

    Returns:
      An `Advice`; `print` shows it as a table.

    Raises:
      OSError: the file cannot be read.
      TypeError, ValueError: an argument is not as above; the message starts with its name.

    >>> history = np.array([[[90, 10, 10, 10]] * 4])  # one layer, four batches
    >>> advice = advise(history, ep_size=2)
    >>> advice.recommended.placement, advice.recommended.redundants
    ('ring', 1)
    >>> round(advice.choices[0].mean, 3), advice.recommended.mean
    (1.667, 1.0)
    """
    check_nodes(ep_size, n_nodes)
    sizes = {
        "n_logical": n_logical,
        "top_k": top_k,
        "tokens_per_rank": tokens_per_rank,
        "hidden": hidden,
        "width": width,
        "most_layers": most_layers,
    }
    for name, size in sizes.items():
        if size is not None:
            check_count(name, size)
    rates = {"flops": flops, "link": link, "node_link": node_link, "memory_rate": memory_rate}
    _cost.check_positive(
        rates | {"bytes_per_expert": bytes_per_expert, "memory_budget": memory_budget}
    )
    found = find_workload(
        workload,
        ep_size=ep_size,
        n_logical=n_logical,
        tokens_per_rank=tokens_per_rank,
        top_k=top_k,
        most_layers=most_layers,
    )
    if found.model is not None:
        hidden, width = hidden or found.model.hidden, width or found.model.width
    parameters, bytes_per_expert = _of_an_expert(hidden, width, bytes_per_expert)
    costs = None
    if parameters is not None and hidden is not None and bytes_per_expert is not None:
        costs = Costs(
            found.rows / ep_size, found.top_k or 1, hidden, parameters, bytes_per_expert,
            ep_size, n_nodes, inference, *rates.values(),
        )  # fmt: skip
    tried = plans(found.n_logical, ep_size, redundants, topology, n_nodes)
    study = Study(found, ep_size, n_nodes, costs, bytes_per_expert, memory_budget)
    choices = []
    for i, (kind, n_redundant) in enumerate(tried):
        if progress is not None:
            progress(i / (len(tried) + 2))
        choices.append(study.judge(kind, n_redundant))
    best = recommended(choices)
    return Advice(
        choices,
        best,
        _code(best, found.n_logical, ep_size, n_nodes),
        study.ageing(best, choices),
        study.ranks(choices[0]),
        study.ranks(best),
        _notes(found, ep_size, n_nodes, costs),
    )


def _of_an_expert(
    hidden: int | None, width: int | None, bytes_per_expert: float | None
) -> tuple[float | None, float | None]:
    """Parameters and bytes of an expert; None if the arguments do not determine them."""
    if hidden is not None and width is not None:
        parameters = 3.0 * hidden * width
        return parameters, bytes_per_expert or 2 * parameters
    if bytes_per_expert is None:
        return None, None
    return bytes_per_expert / 2, bytes_per_expert


def _code(choice: Choice, n_logical: int, ep_size: int, n_nodes: int) -> str:
    """Python that places the experts and balances a batch."""
    if choice.placement == GIVEN:
        return "# Experts in the order of their ids are even enough; no placement is needed."
    along = choice.placement not in (PACKED, ANY, BATCH)
    name, group_size = topology_of(choice.placement, ep_size) if along else ("", 0)
    imported = ["place_experts", *["rebalance"] * (choice.redundants > 0), *["topologies"] * along]
    arguments = [
        "history",
        *[f"topologies.named({group_size})[{name!r}]"] * along,
        f"n_logical={n_logical}",
        f"ep_size={ep_size}",
        f"redundants_per_rank={choice.redundants}",
        *[f"n_nodes={n_nodes}"] * (n_nodes > 1),
    ]
    lines = [
        f"from lplb_jax import {', '.join(imported)}",
        *_statement("placement", "place_experts", arguments),
    ]
    if choice.redundants:
        per_batch = choice.placement == BATCH
        arguments = ["indices", "None", "placement=placement", 'axis_name="ep"']
        targets = "physical, split, chosen" if per_batch else "physical, split"
        lines += _statement(targets, "rebalance", arguments + ['copies="batch"'] * per_batch)
    return "\n".join(lines)


def _statement(target: str, function: str, arguments: list[str]) -> list[str]:
    """A call that fits 96 columns, on one line or on three."""
    inside = ", ".join(arguments)
    line = f"{target} = {function}({inside})"
    return [line] if len(line) <= 96 else [f"{target} = {function}(", f"    {inside}", ")"]


def _notes(workload: Workload, ep_size: int, n_nodes: int, costs: Costs | None) -> list[str]:
    n_layers, n_batches = workload.batches.shape[:2]
    n_history = workload.history.shape[1]
    nodes = f" on {n_nodes} nodes" if n_nodes > 1 else ""
    looked = (
        f"{n_layers} of {workload.n_layers} layers"
        if (n_layers < workload.n_layers)
        else f"{n_layers} layer{'s' * (n_layers > 1)}"
    )
    notes = [f"{workload.name}: {workload.n_logical} experts, {ep_size} ranks{nodes}, {looked}."]
    if workload.held_out:
        notes.append(
            f"Placed from {n_history} earlier batch{'es' * (n_history > 1)}, evaluated on "
            f"{n_batches} later one{'s' * (n_batches > 1)} of "
            f"{workload.rows / ep_size:,.0f} rows per rank."
        )
    else:
        notes.append("Evaluated on the batch it was placed from, the only one.")
    if workload.note:
        notes.append(workload.note)
    if costs is None:
        notes.append("No times: they need hidden and width. The gain is that of the busiest rank.")
    else:
        what = "Inference" if costs.inference else "Training"
        notes.append(
            f"{what}, estimated at {costs.flops / 1e12:g} TFLOP/s, {costs.link / 1e9:g} GB/s "
            f"within a node, {costs.node_link / 1e9:g} between nodes, "
            f"{costs.memory / 1e12:g} TB/s of memory."
        )
    return notes
