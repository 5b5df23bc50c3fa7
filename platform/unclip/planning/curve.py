"""The scaling curve as a picture."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from unclip.planning.planner import Planner, Run
from unclip.planning.tables import assumptions
from unclip.utils import storage


def draw_curve(planner: Planner, curve: Sequence[Run], uri: str) -> None:
    """Writes a PNG: images/s over GPUs beside what perfect scaling would give, with the assumptions below it."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    gpus = [run.step.shape.workers for run in curve]
    rates = [run.images_per_second for run in curve]
    axes.plot(gpus, [rates[0] * count / gpus[0] for count in gpus], "--", color="grey", label="perfect")
    axes.plot(gpus, rates, "o-", label=f"ZeRO stage {planner.config.zero.stage}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(f"{planner.plan.gpu} GPUs")
    axes.set_ylabel("images/s")
    axes.set_title(f"{planner.plan.stage}, recipe {planner.plan.recipe}, global batch {planner.batch}")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.supxlabel("\n".join(assumptions(planner.plan)).replace("$", r"\$"), fontsize=8, ha="left", x=0.08)
    with storage.local_target(uri) as path:
        figure.savefig(path, format="png", dpi=110)
